# SPDX-License-Identifier: Apache-2.0
"""What a case is, how it is checked against float64, and how it is timed.

A family is a module of a suite folder with a function ``cases(context)`` that yields :class:`Case` objects.
Its inputs are made only when the case is run.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenprune_ext.profiling import Samples, measure, ratio
from torch import Tensor

# Round-off that the policy always grants, relative to the largest reference value (see check).
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Context:
    """Options of one run. ``full``: cases that take hours, too."""

    device: torch.device
    threads: int
    quick: bool
    budget_s: float
    clock: str
    graphs: bool = False
    full: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Target:
    """A promise: at least ``ratio`` times as fast as ``peer``, or at most ``ms``."""

    peer: str | None = None
    ratio: float | None = None
    ms: float | None = None


@dataclass(frozen=True)
class Peer:
    """Another way to do the same.

    Attributes:
        run: the computation.
        same: whether it gives the same outputs. If not, it is shown for orientation and never counts as the
            best peer.
        slow: left out by ``--quick`` (compiled variants).
    """

    run: Callable[[], object]
    same: bool = True
    slow: bool = False


@dataclass(frozen=True)
class Prepared:
    """Inputs made, functions ready.

    Attributes:
        ours: our computation.
        peers: name to :class:`Peer`.
        plain: name of the peer whose error sets the tolerance (plain PyTorch in the same dtype).
        reference: float64 outputs, in the order in which ``ours`` returns them.
        verify: replaces the comparison with ``reference`` (discrete outputs); returns the complaint or None.
        flops, bytes: of the formula, a multiply-add being two.
        extra: further result fields, computed from the samples.
        min_rounds: rounds that are run however long they take.
        cold: the inputs are in no cache: the floor is that of a copy in memory.
    """

    ours: Callable[[], object]
    peers: dict[str, Peer]
    flops: float
    bytes: float
    targets: tuple[Target, ...] = ()
    plain: str | None = None
    reference: Callable[[], tuple[Tensor, ...]] | None = None
    verify: Callable[[object], str | None] | None = None
    extra: Callable[[dict[str, Samples]], dict] | None = None
    notes: list[str] = field(default_factory=list)
    min_rounds: int = 5
    cold: bool = False


@dataclass(frozen=True)
class Case:
    """One line of the table; ``make`` builds the inputs. ``headline``: also in the short table."""

    name: str
    dtype: torch.dtype
    make: Callable[[], Prepared]
    headline: bool = False


def last_cache_bytes(device: torch.device) -> int:
    """Size of the last cache in front of memory (32 MiB where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    units = {"K": 2**10, "M": 2**20}
    texts = [path.read_text().strip() for path in sizes]
    return max((int(t[:-1]) * units[t[-1]] for t in texts if t[-1:] in units), default=2**25)


def copies(tensors: tuple[Tensor, ...], cold: bool = True) -> list[tuple[Tensor, ...]]:
    """Equal sets of tensors, at least four and together four times larger than the last cache; one if not ``cold``."""
    if not cold:
        return [tuple(t.clone() for t in tensors)]
    wanted = 4 * last_cache_bytes(tensors[0].device)
    count = max(4, -(-wanted // sum(t.numel() * t.element_size() for t in tensors)))
    return [tuple(t.clone() for t in tensors) for _ in range(count)]


def tensors_of(output) -> tuple[Tensor, ...]:
    """Outputs as a flat tuple of tensors."""
    if isinstance(output, Tensor):
        return (output,)
    return tuple(t for item in output for t in tensors_of(item)) if isinstance(output, (tuple, list)) else ()


def errors(outputs: Iterable[Tensor], reference: Iterable[Tensor]) -> list[float]:
    """Largest error of each output over its largest reference value; infinite where shapes differ."""
    found = []
    for got, want in zip(outputs, reference, strict=True):
        got, want = got.detach().cpu(), want.detach().cpu()
        if got.shape != want.shape:
            found.append(float("inf"))
        elif not want.is_floating_point():
            found.append(0.0 if torch.equal(got.long(), want.long()) else float("inf"))
        else:
            got = got.double()
            largest = want.abs().max().item() if want.numel() else 0.0
            error = (got - want).abs().max().item() if want.numel() else 0.0
            found.append(error / (largest or 1.0) if error == error else float("inf"))
    return found


def check(prepared: Prepared, dtype: torch.dtype, reference: tuple[Tensor, ...] | None) -> str | None:
    """Compare our output with the float64 reference.

    Each output may err twice as much as plain PyTorch in the same dtype, plus a round-off floor.

    Returns:
        None when it matches, otherwise what is wrong.
    """
    if prepared.verify is not None:
        return prepared.verify(prepared.ours())
    ours = errors(tensors_of(prepared.ours()), reference)
    plain = [0.0] * len(ours)
    if prepared.plain is not None:
        plain = errors(tensors_of(prepared.peers[prepared.plain].run()), reference)
    for number, (error, other) in enumerate(zip(ours, plain, strict=True)):
        allowed = 2 * other + FLOOR[dtype]
        if not error <= allowed:
            return f"output {number} is off by {error:.1e} (allowed {allowed:.1e}) from the float64 reference"
    return None


def usable_peers(prepared: Prepared, context: Context, dtype: torch.dtype, reference) -> dict[str, Peer]:
    """Peers that run here and, where they claim the same outputs, really give them."""
    usable = {}
    for name, peer in prepared.peers.items():
        if peer.slow and context.quick:
            continue
        try:
            output = tensors_of(peer.run())
        except Exception as error:  # a peer may be missing or unsupported here; that must not stop the run
            prepared.notes.append(
                f"{name}: does not run here ({type(error).__name__}: {str(error).splitlines()[0][:90]})"
            )
            continue
        if peer.same and reference is not None and max(errors(output, reference)) > 10 * FLOOR[dtype] + 1e-3:
            prepared.notes.append(f"{name}: left out, its output differs from the reference")
            continue
        usable[name] = peer
    return usable


def _as_graph(function: Callable[[], object]) -> Callable[[], None]:
    """Capture a function in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def _graphed(functions: dict[str, Callable], notes: list[str]) -> dict[str, Callable]:
    captured = {}
    for name, function in functions.items():
        try:
            captured[name] = _as_graph(function)
        except RuntimeError as error:
            notes.append(f"{name}: cannot be captured in a CUDA graph ({str(error).splitlines()[0][:80]})")
            torch.cuda.synchronize()
    return captured


def floor_ms(prepared: Prepared, dtype: torch.dtype, ceilings: dict) -> float:
    """Time below which this machine cannot go: bytes at the copy rate or FLOPs at the GEMM rate."""
    by_size = ceilings.get("copy_gbs_by_mib", {})
    largest = by_size[max(by_size, key=int)] if prepared.cold and by_size else ceilings["copy_gbs"]
    by_bytes = prepared.bytes / (largest * 1e9)
    rate = ceilings["gemm_gflops"].get(str(dtype).removeprefix("torch."))
    by_flops = prepared.flops / (rate * 1e9) if rate else 0.0
    return max(by_bytes, by_flops) * 1e3


def _target_fields(targets: tuple[Target, ...], samples: dict[str, Samples]) -> dict:
    applicable = [t for t in targets if t.ms is not None or t.peer in samples]
    main = next((t for t in applicable if t.peer is not None), None)
    fields = {"target_peer": None, "target_ratio": None, "ratio": None, "spread": None}
    if main is not None:
        value, low, high = ratio(samples[main.peer], samples["ours"])
        fields = {
            "target_peer": main.peer,
            "target_ratio": main.ratio,
            "ratio": value,
            "spread": {"min": low, "max": high},
        }
    rows = []
    for target in applicable:
        if target.ms is not None:
            got = samples["ours"].median_ms
            rows.append({"peer": None, "ms": target.ms, "got": got, "reached": got <= target.ms})
        elif target.ratio is not None:
            got = ratio(samples[target.peer], samples["ours"])[0]
            rows.append({"peer": target.peer, "ratio": target.ratio, "got": got, "reached": got >= target.ratio})
    return fields | {"targets": rows}


def run_case(suite: str, family: str, case: Case, context: Context, ceilings: dict) -> tuple[list[dict], list[str]]:
    """Prepare, check and time one case.

    Returns:
        ``(results, notes)``: no result when the output does not match the reference; a second one for CUDA
        graphs.
    """
    try:
        prepared = case.make()
        reference = prepared.reference() if prepared.reference is not None else None
        complaint = check(prepared, case.dtype, reference)
    except Exception as error:  # one broken case must not hide the others
        return [], [f"{case.name}: NOT TIMED, {type(error).__name__}: {' '.join(str(error).split())[:200]}"]
    if complaint is not None:
        return [], [f"{case.name}: NOT TIMED, {complaint}"]
    peers = usable_peers(prepared, context, case.dtype, reference)
    functions = {"ours": prepared.ours} | {name: peer.run for name, peer in peers.items()}
    modes = {"": functions}
    if context.graphs:
        graphed = _graphed(functions, prepared.notes)
        if "ours" in graphed:
            modes[" (CUDA graph)"] = graphed
    results = []
    for suffix, variants in modes.items():
        samples = measure(
            variants,
            device=context.device,
            budget_s=context.budget_s,
            clock=context.clock,
            min_rounds=prepared.min_rounds,
        )
        same = {name: samples[name].median_ms for name in variants if name != "ours" and peers[name].same}
        best = min(same, key=same.get, default=None)
        ours_ms = samples["ours"].median_ms
        result = {
            "suite": suite,
            "family": family,
            "case": case.name + suffix,
            "dtype": str(case.dtype).removeprefix("torch."),
            "device": context.device.type,
            "threads": context.threads,
            "ours_ms": ours_ms,
            "peers": {name: samples[name].median_ms for name in variants if name != "ours"},
            "best_peer": best,
            "best_ratio": same[best] / ours_ms if best else None,
            **_target_fields(prepared.targets, samples),
            "flops": prepared.flops,
            "bytes": prepared.bytes,
            "floor_ms": floor_ms(prepared, case.dtype, ceilings),
            "checked": True,
            "headline": case.headline,
        }
        if prepared.extra is not None:
            result |= prepared.extra(samples)
        results.append(result)
    return results, [f"{case.name}: {note}" for note in prepared.notes]
