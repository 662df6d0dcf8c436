# SPDX-License-Identifier: Apache-2.0
"""Faster vision transformers by processing fewer tokens: fused token-reduction kernels and drop-in reducers."""

from importlib import import_module

import torch  # noqa: F401  (first: the compiled libraries resolve their symbols against torch)

from . import ops
from ._version import __version__

_LAZY = {
    "patch": "._patch",
    "unpatch": "._patch",
    "trace": "._patch",
    "features": "._patch",
    "pack": ".nn",
    "unpack": ".nn",
    "patched": "._patch",
    "profile": ".profiling",
    "visualize": "._visualize",
    "create_model": ".models",
    "list_models": ".models",
    "load_checkpoint": ".checkpoints",
}
_MODULES = ("nn", "reducers", "integrations", "models", "checkpoints", "profiling")

__all__ = ["__version__", "ops", *_LAZY, *_MODULES]


def __getattr__(name):
    # Loaded on first use, so that `import tokenprune_ext` needs torch alone.
    if name in _MODULES:
        return import_module(f".{name}", __name__)
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
