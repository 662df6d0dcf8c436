# SPDX-License-Identifier: Apache-2.0
"""SPViT, DynamicViT and SViT in the tests of what every method promises."""

# A gate decides by content: the code that runs and changes nothing is that without gates, or with everything kept.
INACTIVE = {"dynamicvit": {"layers": []}, "spvit": {"layers": []}, "svit": {"layers": []}}
ACTIVE_IDENTITY = {
    "dynamicvit": [{"keep": 1.0, "layers": [0, 2], "dense": masked, "fast_idle": False} for masked in (False, True)],
    "spvit": [{"layers": [], "fast_idle": False, "dense": masked} for masked in (False, True)],
    "svit": [{"layers": [], "fast_idle": False}],
}
ACTIVE = {
    "dynamicvit": [{"keep": 0.7}, {"keep": [0.9, 0.3], "layers": [1, 3]}, {"keep": 0.6, "dense": True}],
    "spvit": [
        {"layers": [1, 2, 3]},
        {"layers": [1, 2, 3], "package": "accum", "selector": "multihead"},
        {"layers": [0, 2], "package": "norm", "mode": "sample", "selector": "single"},
        {"layers": [1, 3], "package": "mean", "dense": True},
    ],
    "svit": [
        {"mode": "threshold"},
        {"layers": [1, 2, 3], "share": [0, 0, 1], "inherit": True},
    ],
}
DEFAULT_COMPILES = ("dynamicvit-0", "spvit-0", "svit-1")
