# SPDX-License-Identifier: Apache-2.0
"""``tokenprune eval classification``: accuracy, throughput and tokens per layer on a folder of images.

Whole batches are dealt to the processes, and random draws are seeded per batch: every number but the times is the same
with one process, with several, and after an interruption, also for methods that draw or that look across the batch.
"""

import contextlib
import hashlib
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from ..._errors import UserError
from ..._machine import describe
from ..._version import __version__
from ...data import BrokenImage, ImageFolder, Preprocessing, class_numbers, find_folder, preprocessing
from ...nn import pack
from ...profiling import threads
from .build import Wanted, build
from .processes import processes
from .progress import ProgressFile

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Options:
    """Arguments of the command, see its help."""

    data: str
    wanted: Wanted = field(default_factory=Wanted)
    split: str | None = None
    batch_size: int = 64
    crop_pct: float | None = None
    interpolation: str | None = None
    dtype: str = "float32"
    amp: bool = False
    packed: bool = False
    device: str = "auto"
    threads: int | None = None
    workers: int | None = None
    limit: int | None = None
    seed: int = 0
    state: str | None = None


@dataclass(frozen=True)
class _Setup:
    """Everything that a process needs for its batches."""

    model: nn.Module
    images: ImageFolder
    numbers: list[int]
    chosen: list[int]
    transform: Preprocessing
    device: torch.device
    options: Options

    @property
    def batches(self) -> list[list[int]]:
        size = self.options.batch_size
        return [self.chosen[start : start + size] for start in range(0, len(self.chosen), size)]


def evaluate(options: Options, console: Console) -> dict:
    """Evaluate a model, alone or as one of torchrun's processes.

    Args:
        options: see :class:`Options`.
        console: for the progress bar.

    Returns:
        Plain object, keys in docs/outputs.md; the same in every process.

    Raises:
        UserError: a mistake of the user (in the first process; the others end with exit code 2).
    """
    with processes() as group:
        setup, error = None, None
        try:
            setup = _prepare(options, group)
            progress = ProgressFile(options.state, _settings(setup), group.rank)
            done = progress.read() if group.first else {}
            progress.check_writable() if group.first else None
        except UserError as caught:
            error = str(caught)
        errors = [found for found in group.gather(error) if found is not None]
        if errors:
            if group.first:
                raise UserError(errors[0])
            raise SystemExit(2)
        done = group.gather(done)[0]
        started = time.perf_counter()
        with threads(options.threads) as used:
            own = _run(setup, group, done, progress, console)
        records = {record["batch"]: record for part in group.gather(own) for record in part}
        wall = time.perf_counter() - started
        return _result(setup, group, done, records, wall, used)


def _prepare(options, group):
    """Check everything, build the model and list the images."""
    _check(options)
    device = _device(options, group)
    folder = find_folder(options.data, options.split)
    model = build(options.wanted)
    transform = preprocessing(
        model, options.wanted.model, crop_pct=options.crop_pct, interpolation=options.interpolation
    )
    images = ImageFolder(folder, transform.transform())
    numbers = class_numbers(images.classes, _outputs(options.wanted, model), class_labels(model))
    count = len(images) if options.limit is None else min(options.limit, len(images))
    chosen = [place * len(images) // count for place in range(count)]
    if not options.amp:
        model = model.to(DTYPES[options.dtype])
    model = model.to(device)
    if options.packed:
        pack(model)
    return _Setup(model, images, numbers, chosen, transform, device, options)


def _check(options):
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {', '.join(DTYPES)}, got {options.dtype}")
    if options.amp and options.dtype == "float32":
        raise UserError("--amp needs --dtype bfloat16 or float16")
    if options.amp and options.packed:
        raise UserError("--pack and --amp exclude each other: packed weights have one dtype (--dtype without --amp)")
    for name, value, least in (
        ("--batch-size", options.batch_size, 1),
        ("--limit", options.limit, 1),
        ("--threads", options.threads, 1),
        ("--workers", options.workers, 0),
    ):
        if value is not None and value < least:
            raise UserError(f"{name} must be at least {least}, got {value}")
    if abs(options.seed) >= 2**62:  # batches count on from it; torch's seeds have 64 bits
        raise UserError(f"--seed must have less than 63 bits, got {options.seed}")


def _device(options, group):
    if options.device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu or cuda, got {options.device}")
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        raise UserError("--device cuda: this machine has no usable CUDA GPU")
    if options.device == "cpu" or not cuda:
        return torch.device("cpu")
    if options.packed:
        raise UserError("--pack is for the CPU: add --device cpu")
    torch.cuda.set_device(group.local_rank % torch.cuda.device_count())
    return torch.device("cuda", torch.cuda.current_device())


def _outputs(wanted, model):
    count = getattr(model, "num_classes", None)
    if not count:
        raise UserError(f"{wanted.model} has no classifier (try its *_in1k name, or --num-classes)")
    return count


def class_labels(model: nn.Module) -> list[str] | None:
    """ImageNet's names (``n01440764`` ...) of a model's outputs, None where they are something else."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = "imagenet-1k" if model.num_classes == 1000 else infer_imagenet_subset(model)
    return None if subset is None else list(ImageNetInfo(subset).label_names())


def _settings(setup):
    """What the numbers depend on: a run with other settings cannot be continued."""
    options, files = setup.options, [setup.images.files[index][0] for index in setup.chosen]
    settings = {"version": __version__, **asdict(options.wanted)}
    settings["checkpoint"] = _file_digest(options.wanted.checkpoint)
    for name in ("batch_size", "dtype", "amp", "packed", "seed"):
        settings[name] = getattr(options, name)
    settings["preprocessing"] = setup.transform.to_dict()
    settings["device"] = setup.device.type
    settings["images"] = len(files)
    settings["files"] = hashlib.sha256("\n".join(files).encode()).hexdigest()
    return settings


def _file_digest(path):
    if path is None:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _slowly(file)


def _slowly(file):
    total = hashlib.sha256()
    for chunk in iter(lambda: file.read(1 << 20), b""):
        total.update(chunk)
    return total.hexdigest()


def _collate(items):
    """Images ``[B, 3, H, W]`` and folder numbers ``[B]``, or the first image that cannot be read."""
    broken = next((image for image, _ in items if isinstance(image, BrokenImage)), None)
    if broken is not None:
        return broken
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])


def _loader(setup, group, numbers):
    workers = setup.options.workers
    if workers is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        workers = min(8, max(cores // group.world - 1, 0))
    batches = setup.batches
    return torch.utils.data.DataLoader(
        setup.images,
        batch_sampler=[batches[number] for number in numbers],
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=setup.device.type == "cuda",
    )


@torch.inference_mode()
def _run(setup, group, done, progress, console):
    """This process's share of the batches that are not done; their records."""
    numbers = [number for number in range(len(setup.batches)) if number not in done][group.rank :: group.world]
    labels = torch.tensor(setup.numbers)
    records = []
    with _bar(console, group, setup, sum(len(setup.batches[number]) for number in numbers)) as advance:
        for number, loaded in zip(numbers, _loader(setup, group, numbers)):
            if isinstance(loaded, BrokenImage):
                raise UserError(loaded.message)
            images, folders = loaded
            record = {"batch": number, **_batch(setup, images, labels[folders], number)}
            progress.add(record)
            records.append(record)
            advance(record["images"])
    progress.close()
    return records


def _batch(setup, images, labels, number):
    """Counts and times of one batch."""
    options, device, dtype = setup.options, setup.device, DTYPES[setup.options.dtype]
    torch.manual_seed(options.seed + number)
    started = time.perf_counter()
    images = images.to(device, torch.float32 if options.amp else dtype, non_blocking=True)
    cast = torch.autocast(device.type, dtype) if options.amp else contextlib.nullcontext()
    with counted_tokens(setup.model) as tokens, cast:
        logits = setup.model(images).float()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    logits = logits.cpu()
    rank, finite = ranks(logits, labels), torch.isfinite(logits).all(1)
    loss = F.cross_entropy(logits, labels, reduction="none").double()
    return {
        "images": len(labels),
        "top1": int(((rank < 1) & finite).sum()),
        "top5": int(((rank < 5) & finite).sum()),
        "loss": float(loss[finite].sum()),
        "not_finite": int((~finite).sum()),
        "tokens": [int(step[0].sum()) for step in tokens],
        "tokens_mlp": [int(step[1].sum()) for step in tokens],
        "seconds": seconds,
    }


def ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """How many classes come before the right one, int64 ``[B]``; of equal logits the lower class comes first.

    Args:
        logits: ``[B, classes]``. labels: int64 ``[B]``.
    """
    own = logits.gather(1, labels[:, None])
    before = torch.arange(logits.shape[1]) < labels[:, None]
    return ((logits > own) | ((logits == own) & before)).sum(1)


@contextlib.contextmanager
def counted_tokens(model: nn.Module):
    """Collect, while a patched model runs, ``(attention tokens, MLP tokens)`` per layer, int32 ``[B]`` each.

    Of a model without a reducer the list stays empty.
    """
    counts: list[tuple[Tensor, Tensor]] = []
    reducer = getattr(model, "token_reducer", None)
    if reducer is None:
        yield counts
        return

    class Record:
        """Takes the entries of a trace and keeps the counts only."""

        append = staticmethod(lambda step: counts.append((step.attention, step.mlp)))

    def block(x, state, layer, run):
        run.record = Record
        return type(reducer).block(reducer, x, state, layer, run)

    reducer.block = block
    try:
        yield counts
    finally:
        del reducer.block


def is_first_process() -> bool:
    """Whether this process of torchrun talks to the user."""
    return int(os.environ.get("RANK", 0)) == 0


@contextlib.contextmanager
def _bar(console, group, setup, total):
    """A progress bar in the first process; gives the function that moves it on."""
    if not group.first:
        yield lambda images: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    share = f" (process 1 of {group.world})" if group.world > 1 else ""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    started = time.perf_counter()
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(f"{setup.options.wanted.model}{share}", total=total, rate="")

        def advance(images):
            seen = bar.tasks[0].completed + images
            bar.update(task, advance=images, rate=f"{seen / (time.perf_counter() - started):.1f} images/s")

        yield advance


def _result(setup, group, done, records, wall, used):
    every = {**done, **records}
    missing = [number for number in range(len(setup.batches)) if number not in every]
    if missing:
        raise RuntimeError(f"evaluate: every batch must be counted once, {len(missing)} are missing")
    ordered = [every[number] for number in range(len(setup.batches))]
    images = sum(record["images"] for record in ordered)
    fresh = sum(record["images"] for record in records.values())
    finite = images - sum(record["not_finite"] for record in ordered)
    options, wanted = setup.options, setup.options.wanted
    return {
        "task": "classification",
        "model": wanted.model,
        "method": wanted.method,
        "options": wanted.options,
        "weights": wanted.weights,
        "data": str(Path(options.data)),
        "classes": len(setup.images.classes),
        "images": images,
        "top1": 100 * sum(record["top1"] for record in ordered) / images,
        "top5": 100 * sum(record["top5"] for record in ordered) / images,
        "correct": {name: sum(record[name] for record in ordered) for name in ("top1", "top5")},
        "loss": sum(record["loss"] for record in ordered) / finite if finite else None,
        "not_finite": images - finite,
        "tokens": _mean_tokens(setup, ordered, "tokens", images),
        "tokens_mlp": _mean_tokens(setup, ordered, "tokens_mlp", images),
        "images_per_s": fresh / wall if fresh else None,
        "model_images_per_s": images / sum(record["seconds"] for record in ordered),
        "resumed_images": images - fresh,
        "processes": group.world,
        "batch_size": options.batch_size,
        "dtype": options.dtype,
        "amp": options.amp,
        "packed": options.packed,
        "preprocessing": setup.transform.to_dict(),
        "device": setup.device.type,
        "threads": used,
        "seed": options.seed,
        "machine": describe(setup.device),
    }


def _mean_tokens(setup, ordered, name, images):
    """Tokens per layer, mean over the images; of a dense model what it starts with, or None where that is unknown."""
    if ordered[0][name]:
        return [sum(record[name][layer] for record in ordered) / images for layer in range(len(ordered[0][name]))]
    embed, blocks = getattr(setup.model, "patch_embed", None), getattr(setup.model, "blocks", None)
    if hasattr(embed, "num_patches") and blocks is not None:
        return [float(embed.num_patches + getattr(setup.model, "num_prefix_tokens", 0))] * len(blocks)
    return None
