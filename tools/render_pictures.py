# SPDX-License-Identifier: Apache-2.0
"""Draw the picture of every method's page in docs/methods, on the public-domain photograph of scikit-image.

    python tools/render_pictures.py [METHOD ...] [--checkpoint FILE]

Without a checkpoint the weights are seeded random numbers, and the pages say so. Weights of DeiT-S
(``tokenprune download deit_small_patch16_224``) give the pictures that the methods were made for; learned selectors
(DynamicViT, SPViT, SViT) stay random with them.
"""

import argparse
import sys
from pathlib import Path

from tokenprune_ext import reducers
from tokenprune_ext.tasks.classification.build import Wanted
from tokenprune_ext.tasks.classification.visualize import Options, visualize

ASSETS = Path(__file__).resolve().parents[1] / "docs" / "assets" / "methods"
MODEL = "deit_small_patch16_224"
LARGEST = 150_000
# What is drawn where the defaults of the method would not show it on DeiT-S.
OPTIONS = {
    "act": {"q_hashes": 8},
    "ats": {"layers": [3, 6, 9]},
    "hourglass": {"layer": 4, "clusters": 49},
    "smyrf": {"layers": list(range(12)), "cluster_size": 32},
    "tome": {"r": 13},
}


def main() -> int:
    """Draw the methods that are named, or all; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", help="default: all")
    parser.add_argument("--checkpoint", help="weights of DeiT-S")
    arguments = parser.parse_args()
    for method in arguments.methods or reducers.names():
        out = ASSETS / f"{method}.jpg"
        wanted = Wanted(MODEL, method, OPTIONS.get(method, {}), arguments.checkpoint)
        shown = visualize(Options(None, wanted, out=str(out)))
        size = out.stat().st_size
        print(f"{out.name}: {shown['drawn']}, {size / 1000:.0f} kB")
        if size > LARGEST:
            print(f"{out.name} must be smaller than {LARGEST // 1000} kB", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
