# SPDX-License-Identifier: Apache-2.0
"""What is installed, what was loaded and why not: ``python -m tokenprune_ext.collect_env [--json]``."""

import importlib.metadata
import importlib.util
import json
import shutil
import sys
from pathlib import Path

import torch

from . import _library
from ._machine import describe

_PACKAGES = ("timm", "torchvision", "transformers", "nvidia-cutlass", "numpy")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _library_state(path: Path, error: str | None) -> dict:
    return {"file": path.name, "present": path.exists(), "loaded": error is None, "reason": error}


def _extension_module() -> dict:
    """State of the small pybind11 module ``_C``; the ops work without it."""
    if importlib.util.find_spec("tokenprune_ext._C") is None:
        return {"loaded": False, "reason": "not built for this interpreter (the ops do not need it)"}
    try:
        module = importlib.import_module("tokenprune_ext._C")
    except ImportError as error:
        return {"loaded": False, "reason": str(error)}
    return {"loaded": True, "reason": None, "cuda_archs": module.cuda_archs()}


def _gpus() -> list[dict]:
    if not torch.cuda.is_available():
        return []
    names = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        names.append({"name": properties.name, "capability": f"{properties.major}.{properties.minor}"})
    return names


def collect() -> dict:
    """Everything a bug report needs, as a plain object; keys are documented in docs/outputs.md."""
    return {
        **describe("cpu"),
        "torch_cuda": torch.version.cuda,
        "gpus": _gpus(),
        "nvcc": shutil.which("nvcc"),
        "cpu_library": _library_state(_library.CPU_LIBRARY, _library.cpu_error),
        "cuda_library": _library_state(_library.CUDA_LIBRARY, _library.cuda_error),
        "extension_module": _extension_module(),
        "build": _library.build_info(),
        "packages": {name: _version(name) for name in _PACKAGES},
    }


def _lines(info: dict, indent: str = "") -> list[str]:
    lines = []
    for key, value in info.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}:", *_lines(value, indent + "  ")]
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            lines.append(f"{indent}{key}: {'-' if shown in (None, '') else shown}")
    return lines


def render(info: dict) -> str:
    """The collected object as readable text."""
    return "\n".join(_lines(info))


def main(arguments: list[str] | None = None) -> int:
    """Command line: prints text, or one JSON object with ``--json``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    unknown = [argument for argument in arguments if argument != "--json"]
    if unknown:
        print(f"collect_env: unknown argument {unknown[0]!r} (there is only --json)", file=sys.stderr)
        return 2
    info = collect()
    print(json.dumps(info, indent=1) if arguments else render(info))
    return 0


if __name__ == "__main__":
    sys.exit(main())
