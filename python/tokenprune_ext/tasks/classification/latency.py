# SPDX-License-Identifier: Apache-2.0
"""Latency-aware training of SPViT (Kong et al., arXiv 2112.13890, section 5), as the paper describes it.

The published code has none of this: targets are constants there. So there is nothing to reproduce but the procedure;
times are those of the device that :func:`tokenprune_ext.profiling.latency_table` ran on.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from ..._latency import LatencyTable
from ...reducers._stages import ratio_loss

__all__ = ["block_shares", "latency_sparsity_loss", "layer_to_phase", "predicted_ms", "solve_base_rate"]

_BISECTIONS = 50


def block_shares(stages: dict[int, float], depth: int) -> list[float]:
    """Share of the patches that each block processes, from ``{layer of a selector: kept share}``."""
    shares, now = [], 1.0
    for layer in range(depth):
        now = stages.get(layer, now)
        shares.append(now)
    return shares


def predicted_ms(table: LatencyTable, stages: dict[int, float], depth: int) -> float:
    """Latency of a model with selectors in front of ``stages``' layers."""
    return table.model(block_shares(stages, depth), sorted(stages))


def solve_base_rate(
    table: LatencyTable, layers: Sequence[int], depth: int, limit_ms: float, lowest: float = 0.05
) -> float:
    """Largest base rate r, with stage s keeping ``r ** (s + 1)``, whose predicted latency is within a limit.

    Args:
        table: of the device.
        layers: blocks with a selector in front.
        depth: blocks of the model.
        limit_ms: latency allowed.
        lowest: smallest base rate considered.

    Raises:
        ValueError: not even the lowest rate is fast enough.
    """

    def fits(rate):
        return predicted_ms(table, {layer: rate ** (s + 1) for s, layer in enumerate(layers)}, depth) <= limit_ms

    if not fits(lowest):
        rates = {layer: lowest ** (s + 1) for s, layer in enumerate(layers)}
        raise ValueError(
            f"solve_base_rate: limit_ms must be at least {predicted_ms(table, rates, depth):.3f} (base rate {lowest}), "
            f"got {limit_ms}"
        )
    if fits(1.0):
        return 1.0
    low, high = lowest, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def latency_sparsity_loss(keeps: Sequence[Tensor], pruning_rates: Sequence[float]) -> Tensor:
    """Sum over the stages of ``(1 - rate - kept share of the batch) ** 2``; weight 2 in the paper's total.

    Args:
        keeps: keep masks ``[B, n]``, one per stage.
        pruning_rates: share of the patches to drop at each stage so that the table's latency fits the budget.
    """
    return ratio_loss(keeps, [1 - rate for rate in pruning_rates], per_sample=False)


def layer_to_phase(
    score: Callable[[dict[int, float]], float],
    table: LatencyTable,
    *,
    depth: int,
    limit_ms: float,
    first_layer: int = 3,
    max_drop: float = 0.5,
    merge_below: float = 0.085,
) -> dict[int, float]:
    """Where selectors go and what they keep: the progressive training of the paper.

    From the last block to the front a selector is put in, and the smallest kept share of the table is chosen whose
    accuracy is within ``max_drop`` of the dense model. Neighbours whose shares differ little become one phase, of which
    the first selector is kept with its share. If the result is faster than need be, the first phase keeps more.

    Args:
        score: trains (fine-tunes) a model with selectors ``{layer: kept share}`` and returns its accuracy in percent; it
            is called many times. Train once more with the result.
        table: of the device.
        depth: blocks of the model.
        limit_ms: latency allowed.
        first_layer: blocks in front of it stay dense.
        max_drop: accuracy that may be lost, in percentage points.
        merge_below: difference of shares below which neighbours become one phase.

    Returns:
        Kept share by layer; a result slower than ``limit_ms`` means that the accuracy does not allow more.
    """
    enough = score({}) - max_drop
    stages: dict[int, float] = {}
    for layer in range(depth - 1, first_layer - 1, -1):
        later = stages.get(layer + 1, 0.0)
        for share in (ratio for ratio in table.ratios if later <= ratio < 1):  # tokens never come back
            if score({layer: share} | stages) >= enough:
                stages = {layer: share} | stages
                break
    phases: dict[int, float] = {}
    for layer in sorted(stages):
        if not phases or phases[max(phases)] - stages[layer] >= merge_below:
            phases[layer] = stages[layer]
    return _slowest_allowed(phases, table, depth, limit_ms)


def _slowest_allowed(phases, table, depth, limit_ms):
    """The first phase's share raised as far as the limit allows."""
    if not phases:
        return phases
    first = min(phases)
    for share in (ratio for ratio in table.ratios if ratio > phases[first]):
        if predicted_ms(table, phases | {first: share}, depth) > limit_ms:
            break
        phases = phases | {first: share}
    return phases
