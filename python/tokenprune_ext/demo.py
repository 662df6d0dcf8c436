# SPDX-License-Identifier: Apache-2.0
"""The demo behind ``tokenprune demo``: one photograph, one ViT, four ways to run it."""

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from . import _library, _variants
from ._command import parse_options  # noqa: F401 - of `tokenprune flops`
from ._errors import UserError
from ._flops import total_macs
from ._images import load_photo, preprocess
from ._machine import describe
from ._visualize import draw_rows, panels
from .profiling import measure, ratio, threads

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SEED = 0
_OPTIONS_SHOWN = {"tome": "r={r}", "evit": "keep={keep}", "threshold": "> {threshold}"}


@dataclass(frozen=True)
class Options:
    """Arguments of ``tokenprune demo``, see its help."""

    image: str | None = None
    model: str = "deit_small_patch16_224"
    pretrained: bool = False
    checkpoint: str | None = None
    dtype: str = "float32"
    threads: int | None = None
    device: str = "auto"
    batch: int = 1
    seconds: float = 10.0
    out: str = "out/demo.png"


def _check(options: Options) -> torch.device:
    """Refuse impossible options; returns the device."""
    if options.dtype not in _DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(_DTYPES)}, got {options.dtype}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if options.threads is not None and not 1 <= options.threads <= cores:
        raise UserError(f"--threads must lie between 1 and {cores}, got {options.threads}")
    if options.batch < 1:
        raise UserError(f"--batch must be at least 1, got {options.batch}")
    if not 0 <= options.seconds < math.inf:
        raise UserError(f"--seconds must be finite and not negative, got {options.seconds}")
    if options.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu or cuda, got {options.device}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable CUDA GPU")
    if options.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() and _library.cuda_loaded() else "cpu")
    return torch.device(options.device)


def _check_writable(path: str) -> None:
    """Fail before the work, not after it."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab"):
            return
    except OSError as error:
        raise UserError(f"cannot write the picture {path}: {error.strerror or error}") from None


def _create(name: str, pretrained: bool):
    import timm

    if not timm.is_model(name):
        close = timm.list_models(f"{name.split('_')[0]}*")[:3]
        raise UserError(
            f"timm has no model {name!r}" + (f" (did you mean one of {', '.join(close)}?)" if close else "")
        )
    torch.manual_seed(_SEED)
    return timm.create_model(name, pretrained=pretrained)


def build_model(options: Options, say: Callable[[str], None]) -> tuple[torch.nn.Module, str]:
    """Create the model and its weights.

    Args:
        options: of the demo.
        say: receives a line when other weights are used than were asked for.

    Returns:
        ``(model, "pretrained" | "seeded" | path of the checkpoint)``.
    """
    if options.checkpoint is not None:
        from .checkpoints import load_checkpoint

        model = _create(options.model, pretrained=False)
        try:
            load_checkpoint(model, options.checkpoint)
        except ValueError as error:
            raise UserError(str(error)) from None
        return model, options.checkpoint
    if options.pretrained:
        try:
            return _create(options.model, pretrained=True), "pretrained"
        except UserError:
            raise
        except Exception as error:  # the hub client raises many types when there is no network
            reason = str(error).strip().splitlines() or [type(error).__name__]
            say(f"Pretrained weights cannot be had ({reason[0][:120]}): using seeded weights.")
    else:
        say(
            "Seeded random weights (--pretrained or --checkpoint FILE for real ones): "
            "speed is the same, outputs mean nothing."
        )
    return _create(options.model, pretrained=False), "seeded"


def variants(model: torch.nn.Module) -> list[_variants.Variant]:
    """The rows of the table; ToMe's r is scaled to the model (13 for DeiT-S at 224 px)."""
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    r = int(0.8 * tokens / len(model.blocks))
    selector = "cls" if model.cls_token is not None else "norm"
    score = "cls" if model.cls_token is not None else "mean"
    return [
        _variants.make(model, "dense (timm)", None),
        _variants.dense(model),
        _variants.make(model, "ToMe", "tome", r=r),
        _variants.make(model, "EViT", "evit", keep=0.7, score_mode=score),
        _variants.make(model, "threshold", "threshold", selector=selector, mode="threshold", threshold=0.5),
    ]


@torch.no_grad()
def run(options: Options, say: Callable[[str], None] = print) -> dict:
    """Run the demo.

    Args:
        options: see :class:`Options`.
        say: receives progress and remarks, one line each.

    Returns:
        Plain object with the machine, the settings and one row per variant; keys in docs/outputs.md.
    """
    device = _check(options)
    _check_writable(options.out)
    photo, description = load_photo(options.image)
    model, weights = build_model(options, say)
    if not hasattr(model, "blocks") or not hasattr(model, "patch_embed"):
        raise UserError(f"{options.model} is not a plain vision transformer (try deit_small_patch16_224)")
    model = model.eval().to(device, _DTYPES[options.dtype])
    images, crop = preprocess(photo, model)
    images = images.to(device, _DTYPES[options.dtype]).expand(options.batch, -1, -1, -1)
    try:
        images = images.contiguous()
    except RuntimeError:
        raise UserError(f"out of memory for --batch {options.batch}") from None
    if not _library.has_kernels(device.type):
        reason = _library.cpu_error or _library.cuda_error
        say(f"The compiled kernels are not loaded ({reason}): the PyTorch reference runs, and its times mean little.")
    with threads(options.threads) as used, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*runs the slower PyTorch reference.*")
        entries = variants(model)
        say(
            f"Running {len(entries)} variants of {options.model} on {description} ({device.type}, {used} thread(s)) ..."
        )
        with torch.inference_mode():
            rows = _rows(entries, images, device, options, weights)
        picture = _picture(entries, images[:1], crop, options.out)
    return {
        "machine": describe(device),
        "model": options.model,
        "weights": weights,
        "image": description,
        "device": device.type,
        "dtype": options.dtype,
        "threads": used,
        "batch": options.batch,
        "picture": str(picture),
        "rows": rows,
    }


def _rows(entries, images, device, options, weights) -> list[dict]:
    outputs = {entry.name: entry.model(images).float() for entry in entries}
    functions = {entry.name: lambda m=entry.model: m(images) for entry in entries}
    samples = measure(functions, device=device, budget_s=options.seconds, clock="wall")
    counted = {entry.name: _variants.layer_tokens(entry, images)[0] for entry in entries}
    macs = {entry.name: _variants.macs_of(entry, counted[entry.name]) for entry in entries}
    rows = []
    for entry in entries:
        speedup, low, high = ratio(samples["dense"], samples[entry.name])
        similarity = F.cosine_similarity(outputs[entry.name], outputs["dense"]).mean().item()
        row = {
            "name": entry.name,
            "method": entry.method if entry.name != "dense" else None,
            "options": entry.options if entry.name != "dense" else {},
            "tokens": [round(layer.mean, 1) for layer in counted[entry.name]],
            "tokens_mlp": [round(sum(layer.mlp) / len(layer.mlp), 1) for layer in counted[entry.name]],
            "gflops": total_macs(macs[entry.name]) / 1e9,
            "gflops_overhead": _variants.overhead_macs(entry, images, macs[entry.name]) / 1e9,
            "latency_ms": samples[entry.name].median_ms,
            "speedup": speedup,
            "spread": {"min": low, "max": high},
            "ideal_speedup": _variants.ideal_speedup(macs["dense"], macs[entry.name]),
            "similarity": similarity,
        }
        if weights != "seeded" and outputs[entry.name].shape[-1] == 1000:
            row["top1"] = _label(outputs[entry.name][0])
        rows.append(row)
    return rows


def _label(logits: torch.Tensor) -> str:
    """Name and probability of the best ImageNet class."""
    from timm.data import ImageNetInfo

    probability, best = logits.softmax(0).max(0)
    return f"{ImageNetInfo().index_to_description(best.item()).split(',')[0]} ({probability:.0%})"


def _picture(entries, images, crop, path) -> Path:
    rows = []
    for entry in entries:
        if entry.method is not None and entry.name != "dense":
            title, drawn = panels(entry.model, images, crop)
            rows.append((f"{entry.name}: {title}", drawn))
    try:
        return draw_rows(crop, rows, path)
    except (OSError, ValueError) as error:  # ValueError: matplotlib does not know the suffix
        raise UserError(f"cannot write the picture {path}: {error}") from None


def _row_name(row: dict) -> str:
    return f"{row['name']} {_OPTIONS_SHOWN.get(row['method'], '')}".strip().format(**row["options"])


def _tokens_text(tokens: list[float]) -> str:
    return " ".join(f"{count:.0f}" for count in tokens)


def show(result: dict, console: Console) -> None:
    """Print the table of :func:`run`."""
    settings = ("model", "dtype", "device")
    title = ", ".join(result[key] for key in settings)
    title += f", {result['threads']} thread(s), batch {result['batch']}, {result['weights']} weights"
    table = Table(title=title)
    columns = (
        "",
        "GFLOPs",
        "+ method",
        "latency",
        "speed-up",
        "FLOPs-ideal",
        "similarity",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:1] else "right", overflow="fold")
    labelled = "top1" in result["rows"][0]
    if labelled:
        table.add_column("top-1")
    for row in result["rows"]:
        cells = [
            _row_name(row),
            f"{row['gflops']:.2f}",
            f"{row['gflops_overhead']:.3f}",
            f"{row['latency_ms']:.2f} ms",
            f"{row['speedup']:.2f}x",
            f"{row['ideal_speedup']:.2f}x",
            f"{row['similarity']:.4f}",
        ]
        table.add_row(*cells, *([row["top1"]] if labelled else []))
    console.print(table)
    tokens = Table("", "tokens per layer", box=None, pad_edge=False)
    for row in result["rows"]:
        tokens.add_row(_row_name(row), _tokens_text(row["tokens"]))
    console.print(tokens)
    console.print(
        "GFLOPs: multiply-adds per image, and what the method adds. "
        "Speed-up and ideal are over 'dense', which uses the same fused attention.",
        highlight=False,
    )
    console.print(f"Picture: {result['picture']}", highlight=False)
