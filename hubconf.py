# SPDX-License-Identifier: Apache-2.0
"""``torch.hub.load(REPOSITORY, "hourglass_vit_l16_in1k", ...)``: every model under its published name and keywords."""

import sys
from importlib.util import find_spec
from pathlib import Path

dependencies = ["torch", "timm"]

if find_spec("tokenprune_ext") is None:  # not installed: the sources serve, on the PyTorch reference where not built
    sys.path.insert(0, str(Path(__file__).parent / "python"))

from tokenprune_ext.models import entry_points as _entry_points  # noqa: E402

globals().update(_entry_points())
