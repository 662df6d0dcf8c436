# SPDX-License-Identifier: Apache-2.0
"""What is behind ``tokenprune bench classification``: the numbers that the original benchmark scripts print."""

import math
import os
import warnings
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from ... import _library, tables
from ..._errors import UserError
from ..._machine import describe
from ...profiling import measure, threads
from ...tables import dims_of, meta_model, without_memory
from .counting import count, image_size
from .flops import method_of
from .setting import Setting, turned

__all__ = ["Run", "run", "show"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_BATCH = {"cpu": 8, "cuda": 200}


@dataclass(frozen=True)
class Run:
    """How to measure.

    Attributes:
        batch: images of the throughput; None: 200 as published on a GPU, 8 on the CPU.
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        threads: on the CPU, None for all cores.
        seconds: spent on the measurement.
        image: photograph, for the GFLOPs of methods that choose by content.
    """

    batch: int | None = None
    dtype: str = "float32"
    device: str = "auto"
    threads: int | None = None
    seconds: float = 10.0
    image: str | None = None


def _checked(run: Run) -> torch.device:
    if run.dtype not in _DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(_DTYPES)}, got {run.dtype}")
    if run.batch is not None and run.batch < 1:
        raise UserError(f"--batch-size must be at least 1, got {run.batch}")
    if not 0 <= run.seconds < math.inf:
        raise UserError(f"--seconds must be finite and not negative, got {run.seconds}")
    cores = os.cpu_count() or 1
    if run.threads is not None and not 1 <= run.threads <= cores:
        raise UserError(f"--threads must lie between 1 and {cores}, got {run.threads}")
    if run.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu or cuda, got {run.device}")
    if run.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable CUDA GPU")
    if run.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() and _library.cuda_loaded() else "cpu")
    return torch.device(run.device)


def run(setting: Setting, how: Run) -> dict:
    """GFLOPs, images per second one by one and in batches, parameters; published figures of the same setting.

    Inputs are uniform noise in [0, 1), as in the original scripts. Times are medians.

    Args:
        setting: see :func:`.setting.resolve`.
        how: to measure.

    Returns:
        Plain object; keys in docs/outputs.md.

    Raises:
        UserError: impossible options, or a model that refuses the input.
    """
    device = _checked(how)
    counted = count(setting, image=how.image)
    batch = _BATCH[device.type] if how.batch is None else how.batch
    model = setting.build()
    size = image_size(model, setting.resolution)
    rows = _published(setting.build(meta=True))
    with threads(how.threads) as used, warnings.catch_warnings(), torch.inference_mode():
        warnings.filterwarnings("ignore", message=".*runs the slower PyTorch reference.*")
        model = model.to(device, _DTYPES[how.dtype])
        # Uniform noise, made once: random numbers differ in every tool, and times do not depend on them.
        images = turned(lambda: torch.rand(batch, *size).to(device, _DTYPES[how.dtype]))
        single = images[:1].contiguous()
        variants = {"one": lambda: model(single), "batch": lambda: model(images)}
        if batch == 1:
            del variants["batch"]
        times = turned(lambda: measure(variants, device=device, budget_s=how.seconds, min_rounds=3))
    one, many = times["one"].median_ms, times["batch" if batch > 1 else "one"].median_ms
    wanted = setting.wanted
    return {
        "model": wanted.model,
        "method": method_of(model) or "none",
        "options": wanted.options,
        "ids": [row.id for row in rows],
        "resolution": list(size[1:]),
        "dtype": how.dtype,
        "device": device.type,
        "threads": used if device.type == "cpu" else None,
        "batch": batch,
        "parameters": counted.parameters,
        "gflops": counted.gflops,
        "gflops_overhead": counted.overhead,
        "gflops_true": counted.true,
        "gflops_rule": None if counted.rule is None else counted.rule.gflops,
        "rule": None if counted.rule is None else counted.rule.rule,
        "data_dependent": counted.data_dependent,
        "latency_ms": one,
        "fps": 1e3 / one,
        "batch_ms": many,
        "throughput": batch * 1e3 / many,
        "published": [{"id": row.id, "gflops": row.published_gflops, **row.published} for row in rows],
        "machine": describe(device),
    }


def _published(model) -> list[tables.Row]:
    """Rows that were measured with the model and the method at hand."""
    wanted = _signature(model)
    return [row for row in tables.rows_like(model) if _signature(_model_of(row)) == wanted]


def _model_of(row):
    return meta_model(row.model, **row.options) if row.model is not None else without_memory(row.build)


def _signature(model):
    """Sizes of a model, and what its method was told."""
    reducer = getattr(model, "token_reducer", None)
    plain = (int, float, str, bool, list, tuple, dict, type(None))
    told = {} if reducer is None else {k: v for k, v in vars(reducer).items() if isinstance(v, plain) and k[0] != "_"}
    return type(model), dims_of(model), type(reducer), repr(sorted(told.items()))


def show(result: dict, console: Console) -> None:
    """Print the result of :func:`run`, published figures below ours."""
    where = f"{result['device']}, {result['dtype']}"
    where += "" if result["threads"] is None else f", {result['threads']} thread(s)"
    options = " ".join(f"{key}={value}" for key, value in result["options"].items())
    table = Table(title=f"{result['model']} {options} ({where})".replace("[", r"\\["))
    columns = ("", "GFLOPs", "true", "of it method", "FPS", f"throughput ({result['batch']})", "params")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    rule = result["gflops_rule"] if result["gflops_rule"] is not None else result["gflops"]
    table.add_row(
        "ours",
        f"{rule:.2f}",
        f"{result['gflops_true']:.2f}",
        f"{result['gflops_overhead']:.4f}",
        f"{result['fps']:.2f}",
        f"{result['throughput']:.2f}",
        f"{result['parameters'] / 1e6:.2f}M",
    )
    for row in result["published"]:
        cells = [str(row.get(key) or "") for key in ("gflops", "fps", "throughput")]
        table.add_row(row["id"], cells[0], "", "", *cells[1:], "")
    console.print(table)
    if result["rule"] is not None:
        console.print(f"GFLOPs: {result['rule']}.", highlight=False)
    console.print("True: multiply-adds of the trace. FPS: batch 1. Medians; uniform noise as input.", highlight=False)
