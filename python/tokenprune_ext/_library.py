# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled libraries. Import never fails and touches no device: errors are kept and told at call time."""

import json
import os
from pathlib import Path

import torch

_HERE = Path(__file__).parent
# Another build of the libraries, e.g. one with sanitizers.
_LIBRARIES = Path(os.environ.get("TOKENPRUNE_LIBRARY_DIR") or _HERE)
CPU_LIBRARY = _LIBRARIES / "libtokenprune_cpu.so"
CUDA_LIBRARY = _LIBRARIES / "libtokenprune_cuda.so"


class LibraryNotLoadedError(RuntimeError):
    """The compiled library is needed (an op was asked for by name) but could not be loaded."""


def _load(path: Path) -> str | None:
    """Load one library; return the reason when it cannot be loaded, None on success."""
    if os.environ.get("TOKENPRUNE_DISABLE_LIBRARY"):
        return "disabled by TOKENPRUNE_DISABLE_LIBRARY"
    if not path.exists():
        return f"{path.name} is not installed"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return str(error)
    return None


cpu_error = _load(CPU_LIBRARY)
if cpu_error is not None:
    cuda_error = f"the CPU library did not load: {cpu_error}"
elif torch.version.cuda is None:
    cuda_error = "torch was built without CUDA"
else:
    cuda_error = _load(CUDA_LIBRARY)


def cpu_loaded() -> bool:
    """Whether the schemas and CPU kernels are there."""
    return cpu_error is None


def cuda_loaded() -> bool:
    """Whether the CUDA kernels are there (which needs no GPU)."""
    return cuda_error is None


def require() -> None:
    """Raise LibraryNotLoadedError with the reason and the remedy when the library is missing."""
    if cpu_error is not None:
        raise LibraryNotLoadedError(
            f"tokenprune_ext: the compiled library is not loaded ({cpu_error}). "
            "Reinstall with `pip install .`; `python -m tokenprune_ext.collect_env` tells more."
        )


def has_kernels(device_type: str) -> bool:
    """Whether ops on tensors of this device type run compiled (or shape-only) kernels."""
    if device_type == "cuda":
        return cuda_error is None
    return cpu_error is None and device_type in ("cpu", "meta")


def hopper_unit(name: str, device: torch.device):
    """The sm_90a version of an op where it is built, switched on by TOKENPRUNE_HOPPER=1 and fits the GPU; else None.

    They stay off until a GPU has shown them right and faster.
    """
    if device.type != "cuda":
        return None
    wanted = os.environ.get("TOKENPRUNE_HOPPER", "")
    if wanted not in ("", "0", "1"):
        raise ValueError(f"tokenprune: TOKENPRUNE_HOPPER must be 0 or 1, got {wanted!r}")
    if wanted != "1" or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    unit = getattr(torch.ops.tokenprune_sm90a, name, None)
    return unit and unit.default


def build_info() -> dict:
    """What setup.py wrote about the build: version, CUDA outcome and archs, compilers, torch."""
    path = _LIBRARIES / "_build_info.json"
    return json.loads(path.read_text()) if path.exists() else {}
