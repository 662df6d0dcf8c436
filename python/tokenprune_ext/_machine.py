# SPDX-License-Identifier: Apache-2.0
"""What a measurement ran on: the machine, and the copy and GEMM rates that it really reaches."""

import ctypes
import os
import platform
import re
import time
from pathlib import Path

import torch


def cpu_name() -> str:
    """Model name of the CPU as the operating system tells it."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)$", text, flags=re.MULTILINE))
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields:
        name += f" (family {fields['cpu family']}, model {fields.get('model', '?')})"
    return name


def kernel_capability() -> str | None:
    """Instruction set that our CPU kernels use: generic, avx2, avx512 or avx512_bf16; None without the library."""
    from . import _library

    if not _library.cpu_loaded():
        return None
    # Asked from the loaded library itself, so that it also works where the module _C does not fit the interpreter.
    ask = ctypes.CDLL(str(_library.CPU_LIBRARY)).tokenprune_cpu_capability
    ask.restype = ctypes.c_char_p
    return ask().decode()


def _math_libraries() -> dict:
    config = torch.__config__.show()
    found = {}
    for key, pattern in (
        ("mkl", r"oneAPI Math Kernel Library Version ([\d.]+)"),
        ("onednn", r"MKL-DNN v([\d.]+)"),
    ):
        match = re.search(pattern, config)
        if match:
            found[key] = match.group(1)
    return found


def describe(device: str | torch.device = "cpu") -> dict:
    """Plain description of the machine, the libraries and the load, for a report.

    Args:
        device: device that the measurement runs on.

    Returns:
        Dict with stable keys; see docs/outputs.md.
    """
    from . import _library
    from ._version import __version__

    info = {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernel_capability": kernel_capability(),
        "load_average": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokenprune_ext": __version__,
        "cpu_kernels": _library.cpu_loaded(),
        "cuda_kernels": _library.cuda_loaded(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        **_math_libraries(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info |= {
            "gpu": properties.name,
            "gpu_capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
        }
    return info


def _gemm_variants(device: torch.device, dtype: torch.dtype) -> tuple[dict, int]:
    """Ways to run one large product; the best is the ceiling (MKL is not the fastest on every CPU)."""
    rows, inner, columns = (1024, 1024, 4096) if device.type == "cpu" else (8192, 8192, 8192)
    x = torch.randn(rows, inner, device=device, dtype=dtype)
    w = torch.randn(columns, inner, device=device, dtype=dtype)
    variants = {"linear": lambda: torch.nn.functional.linear(x, w)}
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        pointwise = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
        if pointwise is not None:
            variants["onednn"] = lambda: pointwise(x, w, None, "none", [], "")
    return variants, 2 * rows * inner * columns


def _copy_variant(device: torch.device, mebibytes: int):
    source = torch.randn(mebibytes * 2**18, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2 * source.nbytes


def ceilings(device: str | torch.device = "cpu", dtypes=(torch.float32,), *, budget_s: float = 0.5) -> dict:
    """Measure what a copy and a matrix product reach on this machine with the current thread count.

    Args:
        device: where to measure.
        dtypes: dtypes of the products.
        budget_s: seconds spent on each.

    Returns:
        ``{"copy_gbs", "copy_gbs_by_mib": {size: rate}, "gemm_gflops": {dtype: rate}}``. Bytes of a copy count
        the read and the write; ``copy_gbs`` is the best rate of all sizes, so that a floor made from it is
        never too high.
    """
    from .profiling import measure

    device = torch.device(device)
    by_size = {}
    for mebibytes in (1, 8, 64) if device.type == "cpu" else (8, 64, 1024):
        copy, moved = _copy_variant(device, mebibytes)
        seconds = min(measure({"copy": copy}, device=device, budget_s=budget_s)["copy"].seconds)
        by_size[str(mebibytes)] = round(moved / seconds / 1e9, 1)
    gemm = {}
    for dtype in dtypes:
        variants, flops = _gemm_variants(device, dtype)
        rates = []
        for name, variant in variants.items():
            try:
                seconds = measure({name: variant}, device=device, budget_s=budget_s)[name].seconds
            except RuntimeError:  # a CPU without this oneDNN path
                continue
            rates.append(flops / min(seconds) / 1e9)
        gemm[str(dtype).removeprefix("torch.")] = round(max(rates), 1)
    return {"copy_gbs": max(by_size.values()), "copy_gbs_by_mib": by_size, "gemm_gflops": gemm}
