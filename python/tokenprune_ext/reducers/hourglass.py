# SPDX-License-Identifier: Apache-2.0
"""Hourglass: cluster the patch map once, run the remaining layers on the clusters (Liang et al., arXiv 2210.01035).

Token clustering (section 3.2, algorithm 1) replaces the patches by the centres of a regular grid of cells; token
reconstruction (section 3.3) gives dense tasks every patch back, from its nearest centres.
"""

import math

import torch
from torch import Tensor

from .. import ops
from ..nn import TokenState
from ._base import Reducer, register

__all__ = ["Hourglass"]


@register("hourglass")
class Hourglass(Reducer):
    """Clusters from one layer on.

    Args:
        depth: layers of the model.
        layer: first layer on clusters, which is the number of layers at full resolution (alpha in the tables). -1, None
            or ``depth``: never.
        clusters: ``(rows, columns)`` of the grid of clusters, or their number, which must be a square.
        iters: iterations of the clustering; 0 is plain average pooling.
        temperature: factor of the squared distances in the soft assignment (a large one makes it hard).
        window: odd side of the neighbourhood of cells in which a patch looks for its centre.
        k: centres that a patch is reconstructed from; negative: all.
        restore_temperature: factor of the squared distances there, default ``temperature``.
        norm: normalisation of the reconstruction weights, ``"l2"`` (as published) or ``"l1"``.
        restore_at: what dense tasks reconstruct, ``"logits"`` or ``"features"``.
        num_prefix: leading tokens that are no patches; they are not clustered. The state's number wins while running.

    The published classification settings keep the defaults of iters, temperature and window.
    """

    def __init__(
        self,
        *,
        depth: int,
        layer: int | None = None,
        clusters: int | tuple[int, int] = 256,
        iters: int = 5,
        temperature: float = 1.0,
        window: int = 5,
        k: int = 20,
        restore_temperature: float | None = None,
        norm: str = "l2",
        restore_at: str = "logits",
        num_prefix: int = 1,
    ):
        super().__init__()
        layer = -1 if layer is None else layer
        for name, value in (("layer", layer), ("iters", iters), ("window", window), ("k", k)):
            if not isinstance(value, int):
                raise ValueError(f"Hourglass: {name} must be a whole number, got {value!r}")
        if not -1 <= layer <= depth:
            raise ValueError(f"Hourglass: layer must lie in [-1, {depth}], got {layer}")
        self.depth, self.layer, self.clusters = depth, layer, _grid(clusters)
        if iters < 0:
            raise ValueError(f"Hourglass: iters must be >= 0, got {iters}")
        for name, value in (("temperature", temperature), ("restore_temperature", restore_temperature)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"Hourglass: {name} must be positive and finite, got {value}")
        if window < 1 or window % 2 == 0:
            raise ValueError(f"Hourglass: window must be odd and positive, got {window}")
        if k == 0:
            raise ValueError("Hourglass: k must not be 0")
        if norm not in ("l2", "l1"):
            raise ValueError(f"Hourglass: norm must be 'l2' or 'l1', got {norm!r}")
        if restore_at not in ("logits", "features"):
            raise ValueError(f"Hourglass: restore_at must be 'logits' or 'features', got {restore_at!r}")
        self.iters, self.temperature, self.window = iters, temperature, window
        self.k, self.norm, self.restore_at, self.num_prefix = k, norm, restore_at, num_prefix
        self.restore_temperature = temperature if restore_temperature is None else restore_temperature

    @property
    def active(self) -> bool:
        """Whether any layer runs on clusters."""
        return 0 <= self.layer < self.depth

    def block(self, x: Tensor, state: TokenState, layer: int, run) -> tuple[Tensor, TokenState]:
        """Cluster in front of the chosen layer; all blocks are plain ones."""
        if layer == self.layer:
            x, state = self._cluster(x, state)
        return run.idle(x, state)

    def restore(self, y: Tensor, state: TokenState) -> Tensor:
        """Values of the clusters -> values of the patches, weighted by feature distance: ``[B, K, ...] -> [B, N, ...]``."""
        if "centers" not in state.carry:
            return y
        features, centers = state.carry["features"], state.carry["centers"]
        flat = y.reshape(*centers.shape[:2], math.prod(y.shape[2:]))
        k = self.k if self.k < 0 else min(self.k, centers.shape[1])
        full = ops.reconstruct_tokens(
            features, centers, flat, k=k, temperature=self.restore_temperature, norm=self.norm
        )
        return full.view(*full.shape[:2], *y.shape[2:]) if y.dim() > 2 else full[..., 0]

    def plan(self, depth: int, n: int) -> list[tuple[int, int]]:
        """Token counts."""
        clustered = self.num_prefix + self.clusters[0] * self.clusters[1]
        return [(clustered, clustered) if 0 <= self.layer <= layer else (n, n) for layer in range(depth)]

    def _cluster(self, x, state):
        packed = state.packed
        x, state = state.as_padded(x)
        if state.size is not None or state.key_bias is not None:
            raise ValueError("Hourglass: tokens must be plain patches, got merged or hidden ones")
        prefix, patches = state.num_prefix, x.shape[1] - state.num_prefix
        if state.grid is None or math.prod(state.grid) != patches:
            raise ValueError(f"Hourglass: tokens must fill the patch grid {state.grid}, got {patches} patches")
        features, traced = x[:, prefix:], state.index is not None
        centers = ops.cluster_tokens(
            features,
            state.grid,
            self.clusters,
            iters=self.iters,
            temperature=self.temperature,
            window=self.window,
            return_labels=traced,
        )
        if traced:
            centers, labels = centers
            state = _follow(state, labels, centers.shape[1])
        state = state.with_carry(features=features, centers=centers)
        x = torch.cat([x[:, :prefix], centers], 1)
        return state.as_packed(x) if packed else (x, state)


def _grid(clusters):
    """Rows and columns of a grid of clusters."""
    if isinstance(clusters, int):
        side = math.isqrt(max(clusters, 0))
        if side == 0 or side * side != clusters:
            raise ValueError(f"Hourglass: clusters must be a square number or (rows, columns), got {clusters}")
        return side, side
    sides = tuple(clusters) if isinstance(clusters, (tuple, list)) else ()
    if len(sides) != 2:
        raise ValueError(f"Hourglass: clusters must be a square number or (rows, columns), got {clusters!r}")
    if not all(isinstance(side, int) and side >= 1 for side in sides):
        raise ValueError(f"Hourglass: clusters must be positive whole numbers, got {sides}")
    return sides


def _follow(state, labels, count):
    """The trace through the clustering: a patch goes to its nearest centre."""
    prefix, batch = state.num_prefix, labels.shape[0]
    rows = labels.to(torch.int32) + prefix
    front = torch.arange(prefix, dtype=torch.int32, device=labels.device).expand(batch, -1)
    nobody = torch.iinfo(torch.int32).max
    patch = torch.where(state.index[:, prefix:] < 0, nobody, state.index[:, prefix:])
    first = patch.new_full((batch, count), nobody).scatter_reduce(1, labels.long(), patch, "amin")
    first = torch.where(first == nobody, -1, first)
    index = torch.cat([state.index[:, :prefix], first], 1)
    return state.reparent(torch.cat([front, rows], 1)).replace(index=index)
