# SPDX-License-Identifier: Apache-2.0
"""Timing that can be trusted: variants interleaved in one run, medians, spread of per-round ratios, parts of
a model.

FLOP counting is in :mod:`tokenprune_ext._flops`, latency tables in :mod:`tokenprune_ext._latency`, the machine
and its ceilings in :mod:`tokenprune_ext._machine`; all are importable from here.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ._flops import PARTS, LayerTokens, count_flops, part_of, total_macs, vit_macs
from ._latency import LatencyTable, latency_table
from ._machine import ceilings, describe

__all__ = [
    "PARTS",
    "LatencyTable",
    "LayerTokens",
    "Samples",
    "ceilings",
    "count_flops",
    "describe",
    "latency_table",
    "measure",
    "part_of",
    "profile",
    "ratio",
    "threads",
    "time_parts",
    "total_macs",
    "vit_macs",
]


_LONG_S = 0.25  # a call this long is warmed up once only


@dataclass(frozen=True)
class Samples:
    """Seconds per call, one entry per round."""

    seconds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Median over the rounds in milliseconds."""
        return statistics.median(self.seconds) * 1e3


def ratio(slower: Samples, faster: Samples) -> tuple[float, float, float]:
    """Ratio of the medians, with the smallest and largest ratio of a single round.

    Args:
        slower: samples in the numerator.
        faster: samples in the denominator, of the same rounds.

    Returns:
        ``(ratio, lowest, highest)``.
    """
    rounds = [a / b for a, b in zip(slower.seconds, faster.seconds, strict=True)]
    return slower.median_ms / faster.median_ms, min(rounds), max(rounds)


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Run the body with ``count`` CPU threads (None: as it is), then restore."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def choose_clock(device: str | torch.device, clock: str = "auto") -> str:
    """Resolve ``auto``: CPU time where one thread works (immune to neighbours), else wall time."""
    if clock != "auto":
        return clock
    one_thread = torch.device(device).type == "cpu" and torch.get_num_threads() == 1
    return "cpu" if one_thread and hasattr(time, "thread_time") else "wall"


def _host_sampler(clock: str) -> Callable[[Callable, int], float]:
    now = time.thread_time if clock == "cpu" else time.perf_counter

    def sample(function, calls):
        start = now()
        for _ in range(calls):
            function()
        return (now() - start) / calls

    return sample


def _cuda_sample(function, calls):
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3 / calls


def measure(
    variants: Mapping[str, Callable[[], object]],
    *,
    device: str | torch.device = "cpu",
    budget_s: float = 2.0,
    min_rounds: int = 5,
    max_rounds: int = 101,
    sample_s: float = 2e-3,
    clock: str = "auto",
) -> dict[str, Samples]:
    """Time variants side by side.

    Every round runs each variant once (often enough to fill ``sample_s``); the order rotates from round to
    round, so that drift of the clock frequency or of the neighbours' load falls on all alike.

    Args:
        variants: name to function without arguments.
        device: ``cpu`` or ``cuda``; CUDA is timed with events.
        budget_s: rounds are added until this time is used up, within ``min_rounds`` and ``max_rounds``.
        min_rounds, max_rounds: bounds of the number of rounds.
        sample_s: least duration of one sample.
        clock: ``wall``, ``cpu`` (time of this thread; right for one thread only) or ``auto``.

    Returns:
        Samples by name, in the order given.

    Example:
        >>> x = torch.randn(64, 64)
        >>> times = measure({"mm": lambda: x @ x, "exp": lambda: x.exp()}, budget_s=0.01)
        >>> times["mm"].median_ms > 0
        True
    """
    if not budget_s >= 0:  # NaN too
        raise ValueError(f"measure: budget_s must be >= 0, got {budget_s}")
    on_cuda = torch.device(device).type == "cuda"
    sample = _cuda_sample if on_cuda else _host_sampler(choose_clock(device, clock))
    calls, round_s = {}, 0.0
    for name, function in variants.items():
        function()  # the first call allocates, packs and may compile
        once = sample(function, 1)
        if once < _LONG_S:
            once = max(min(once, sample(function, 1), sample(function, 1)), 1e-7)
        calls[name] = max(1, round(sample_s / once))
        round_s += once * calls[name]
    rounds = int(min(max(min_rounds, budget_s // round_s), max_rounds))  # an infinite budget too
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(sample(variants[name], calls[name]))
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


class _PartTimer(TorchDispatchMode):
    """Adds up the time of every ATen or tokenprune op by part of the model."""

    def __init__(self, device: torch.device, clock: str):
        super().__init__()
        self.on_cuda = device.type == "cuda"
        self.now = time.thread_time if clock == "cpu" else time.perf_counter
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.events = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        part = part_of(func)
        if self.on_cuda:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            out = func(*args, **(kwargs or {}))
            end.record()
            self.events.append((part, start, end))
            return out
        start = self.now()
        out = func(*args, **(kwargs or {}))
        self.seconds[part] += self.now() - start
        return out

    def finish(self) -> dict[str, float]:
        if self.events:
            torch.cuda.synchronize()
        for part, start, end in self.events:
            self.seconds[part] += start.elapsed_time(end) * 1e-3
        return self.seconds


def time_parts(
    function: Callable[[], object], *, device: str | torch.device = "cpu", rounds: int = 7, clock="auto"
) -> dict:
    """Milliseconds that a forward pass spends in its parts, from the median over rounds of each.

    Args:
        function: runs the forward pass.
        device: where it runs.
        rounds: number of passes.
        clock: see :func:`measure`.

    Returns:
        Part to ms. ``other`` holds normalisation, activation and residuals; the interpreter's time between
        ops is in none.
    """
    device = torch.device(device)
    totals = []
    # Not in inference mode: composite ops would arrive whole.
    with torch.inference_mode(False), torch.no_grad():
        function()
        for _ in range(rounds):
            timer = _PartTimer(device, choose_clock(device, clock))
            with timer:
                function()
            totals.append(timer.finish())
    return {part: statistics.median(total[part] for total in totals) * 1e3 for part in PARTS}


def _peak_memory_mb(function, device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    function()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 2**20


def _tokens(model, images):
    """Mean number of tokens in the attention of every layer; None for a model that is not patched."""
    from ._patch import trace

    if not any(hasattr(module, "token_reducer") for module in model.modules()):
        return None
    return [step.attention_tokens.double().mean().item() for step in trace(model, images)]


@torch.no_grad()
def profile(model: torch.nn.Module, images: torch.Tensor, *, budget_s: float = 1.0, clock: str = "auto") -> dict:
    """Tokens per layer, FLOPs by part, latency by part and peak memory of one forward pass.

    Args:
        model: any module that takes ``images``; a model that went through ``tokenprune_ext.patch`` also
            reports tokens.
        images: ``[B, 3, H, W]`` on the model's device and of its dtype.
        budget_s: seconds spent on the latency.
        clock: see :func:`measure`.

    Returns:
        ``{"tokens": [...] or None, "gflops": {part: ...}, "latency_ms", "parts_ms", "throughput",
        "peak_memory_mb"}``.
        GFLOPs count a multiply-add as two.
    """
    device = images.device
    run = lambda: model(images)
    training = model.training
    model.eval()
    try:
        flops = count_flops(run)
        samples = measure({"model": run}, device=device, budget_s=budget_s, clock=clock)["model"]
        parts = time_parts(run, device=device, clock=clock)
        memory = _peak_memory_mb(run, device)
        tokens = _tokens(model, images)
    finally:
        model.train(training)
    return {
        "tokens": tokens,
        "gflops": {part: count / 1e9 for part, count in flops.items()},
        "latency_ms": samples.median_ms,
        "parts_ms": parts,
        "throughput": images.shape[0] * 1e3 / samples.median_ms,
        "peak_memory_mb": memory,
    }
