# SPDX-License-Identifier: Apache-2.0
"""What DynamicViT and SPViT share: gates in front of a few blocks, after which dropped tokens stay dropped.

Masked (training): all tokens stay, a key policy hides the dropped ones, and the gates get straight-through gradients.
Gathered (inference): the kept tokens alone go on, padded while all images keep equally many, otherwise packed.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import TokenState, pad_rows, row_positions, sequence_of_row, split_prefix
from ..ops import keep_marked_tokens
from ..ops._register import stat_dtype
from ._base import Reducer
from ._gates import draw_gumbel
from ._trace import restore_by_parent

# Per-token fields of the state, and what a made token gets.
FIELDS = (("index", -1), ("size", 1), ("key_bias", 0))


class StagedPruning(Reducer):
    """Base of methods with a selector in front of each block of ``layers``.

    A subclass offers ``_stage_masked(x, state, layer)`` and ``_stage_gathered(x, state, layer)``.

    Carry: ``"keep"`` (``[B, n]`` over the original patches, 1 = still there), ``"keep.l"`` (the same behind layer l's
    selector, with the gradient of the gates while training), ``"noise.l"`` (Gumbel noise of a sampled gate, drawn in
    ``begin`` or given) and ``"policy"`` (``[B, N]``, masked computation only).
    """

    def __init__(
        self, *, name, depth, layers, keep, selectors, mode, eps, dense, generator, num_prefix, pooling, fast_idle
    ):
        super().__init__()
        if pooling != "token":
            raise ValueError(
                f"{name}: the model's classifier must read the class token (pooling 'token'), got pooling {pooling!r}"
            )
        if not all(0 <= layer < depth for layer in layers) or sorted(set(layers)) != list(layers):
            raise ValueError(f"{name}: layers must rise and lie in [0, {depth}), got {layers}")
        if not eps >= 0:
            raise ValueError(f"{name}: eps must be >= 0, got {eps}")
        self.layers, self.keep = list(layers), keep_targets(name, keep, len(layers))
        self.selectors, self.mode, self.eps = nn.ModuleList(selectors), mode, eps
        self.dense, self.generator = dense, generator
        self.num_prefix, self.fast_idle = num_prefix, fast_idle
        self.ratio_per_sample = False
        for module in self.selectors.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @property
    def active(self) -> bool:
        """Whether there is any selector."""
        return bool(self.layers)

    def begin(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Everything is kept; the noise of sampled gates is drawn, except where it is given."""
        if not self.layers:
            return x, state
        if self._masked() and state.packed:
            if not state.uniform(x):
                raise ValueError(
                    f"{type(self).__name__}: masked computation (training) needs images of equal length, got packed "
                    "tokens of different lengths"
                )
            x, state = state.as_padded(x)
        prefix = state.num_prefix
        if state.packed:
            column = torch.arange(state.max_seqlen - prefix, device=x.device)
            keep = (column < (state.cu_seqlens.diff() - prefix)[:, None]).float()
        else:
            keep = torch.ones(x.shape[0], x.shape[1] - prefix, device=x.device)
        keep = keep.to(stat_dtype(x.dtype))
        carry = {"keep": keep}
        if state.packed and not state.uniform(x):
            carry["patches"] = state.cu_seqlens.diff() - prefix
        if self._sampled():
            for layer in self.layers:
                if f"noise.{layer}" not in state.carry:
                    carry[f"noise.{layer}"] = draw_gumbel((*keep.shape, 2), x, self.generator)
        if self._masked() and self.training:
            carry["policy"] = torch.ones(x.shape[:2], dtype=keep.dtype, device=x.device)
        return x, state.with_carry(**carry)

    def block(self, x: Tensor, state: TokenState, layer: int, run) -> tuple[Tensor, TokenState]:
        """Decide in front of the block, then run it."""
        if layer in self.layers:
            if state.index is None:
                state = state.replace(index=_patch_index(x, state))
            stage = self._stage_masked if self._masked() else self._stage_gathered
            x, state = stage(x, state, layer)
        if "policy" in state.carry or not self.fast_idle:
            return run(x, state)
        return run.idle(x, state)

    def attention(self, x: Tensor, state: TokenState, layer: int, branch) -> tuple[Tensor, TokenState]:
        """Under the key policy, when there is one."""
        policy = state.carry.get("policy")
        if policy is None:
            return super().attention(x, state, layer, branch)
        *heads, z = branch.start(x, state)
        mixed = branch.mix_policy(*heads, state, policy, self.eps if self.training else 0.0)
        return branch.finish(x, mixed, z, state), state

    def pool(self, x: Tensor, state: TokenState) -> Tensor:
        """The prefix tokens ``[B, P, C]`` alone: what the dropped tokens hold means nothing.

        A head that reads other tokens takes them with their state (``forward_tokens`` of LV-ViT).
        """
        return split_prefix(x, state)[0]

    def restore(self, y: Tensor, state: TokenState) -> Tensor:
        """Every patch takes the value of the token that stands for it; zero where there is none (needs a trace)."""
        return restore_by_parent(type(self).__name__, y, state)

    def losses(self, state: TokenState) -> dict[str, Tensor]:
        """``ratio``: squared distance of the kept share from its target, averaged over the stages."""
        if not self.layers:
            return {}
        keeps = [state.carry[f"keep.{layer}"] for layer in self.layers]
        return {"ratio": ratio_loss(keeps, self.keep, per_sample=self.ratio_per_sample) / len(keeps)}

    def _masked(self):
        return self.training if self.dense is None else self.dense

    def _sampled(self):
        return self.training or self.mode == "sample"


def keep_targets(name: str, keep: float | Sequence[float], stages: int) -> list[float]:
    """Kept share per stage: a base rate gives its powers ``base, base**2, ...``, a list is taken as it is."""
    rates = [keep ** (stage + 1) for stage in range(stages)] if isinstance(keep, (int, float)) else list(keep)
    if len(rates) != stages or not all(0 < rate <= 1 for rate in rates):
        raise ValueError(f"{name}: keep must be a base rate or {stages} rates in (0, 1], got {keep}")
    return rates


def ratio_loss(keeps: Sequence[Tensor], targets: Sequence[float], *, per_sample: bool) -> Tensor:
    """Sum over the stages of the squared distance between kept share and target.

    Args:
        keeps: keep masks ``[B, n]``, one per stage.
        targets: wanted shares.
        per_sample: distance of every image, averaged (DynamicViT); otherwise of the whole batch's share (SPViT), which
            lets every image have a rate of its own.
    """
    terms = [((keep.mean(1) if per_sample else keep.mean()) - t) ** 2 for keep, t in zip(keeps, targets, strict=True)]
    return torch.stack([term.mean() for term in terms]).sum()


def take_rows(x: Tensor, state: TokenState, keep: Tensor, weights: Tensor | None = None) -> tuple[Tensor, TokenState]:
    """Kept rows of packed tokens, with weights a row behind each image's that stands for the dropped ones; order stays.

    Args:
        x: ``[T, C]``.
        state: packed; its trace, index, size and key bias follow.
        keep: bool ``[T]``.
        weights: ``[T]``; the row behind is the sum of the dropped ones times these.
    """
    y, source, cu_seqlens = keep_marked_tokens(x, keep, state.cu_seqlens, weights)
    alone = cu_seqlens.shape[0] == 2 and not torch.compiler.is_compiling()
    longest = y.shape[0] if alone else state.max_seqlen + (weights is not None)
    rows, fields = source.long(), {}  # -1 is the made value behind all others
    for name, made in FIELDS:
        values = getattr(state, name)
        if values is not None:
            fields[name] = values[rows] if weights is None else F.pad(values, (0, 1), value=made)[rows]
    if "parent" in state.carry:
        owner = sequence_of_row(state.cu_seqlens, x.shape[0])
        before = F.pad(keep.cumsum(0, dtype=torch.int32), (1, 0))
        place = before[:-1] - before[state.cu_seqlens[:-1].long()][owner]  # of kept rows, within their image
        lost = -1 if weights is None else (cu_seqlens.diff() - 1)[owner]
        state = state.reparent(pad_rows(torch.where(keep, place, lost), state.cu_seqlens, state.max_seqlen, -1))
    return y, state.replace(cu_seqlens=cu_seqlens, max_seqlen=longest, **fields)


def keep_map(index: Tensor, keep: Tensor, cu_seqlens: Tensor, like: Tensor) -> Tensor:
    """Which original patches are kept: ``[B, n]`` shaped like ``like``, from packed rows' ``index`` and ``keep``."""
    batch, patches = like.shape
    here = keep & (index >= 0)
    flat = index.long() if batch == 1 else sequence_of_row(cu_seqlens, index.shape[0]) * patches + index
    flat = torch.where(here, flat, batch * patches)
    return like.new_zeros(batch * patches + 1).scatter(0, flat, 1)[:-1].view(batch, patches)


def rank_choice(scores: Tensor, here: Tensor, count: Tensor | int) -> Tensor:
    """Bool mask of the ``count`` best scores of each row of ``[B, N]`` among those ``here``; ties in order, NaN last."""
    scores = torch.where(here & ~scores.isnan(), scores.detach(), -math.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(scores.shape[1], device=scores.device) < count
    return torch.zeros_like(here).scatter(1, order, first.expand_as(here)) & here


def follow_masked(state: TokenState, keep: Tensor, stand_in: int) -> TokenState:
    """The trace through a masked stage: dropped patches go to the row ``stand_in`` (-1: nowhere), the others stay.

    Args:
        state: before the stage.
        keep: ``[B, n]``.
        stand_in: row of a made token behind all others, which must be the next one, or -1.
    """
    if "parent" not in state.carry:
        return state
    batch, patches = keep.shape
    row = torch.arange(state.index.shape[1], dtype=torch.int32, device=keep.device).expand(batch, -1)
    prefix = state.num_prefix
    patch = torch.where(keep.detach() > 0, row[:, prefix : prefix + patches], stand_in)
    return state.reparent(torch.cat([row[:, :prefix], patch, row[:, prefix + patches :]], 1))


def follow_order(state: TokenState, order: Tensor) -> TokenState:
    """The state of padded tokens ``order``, int64 ``[B, N']``: the row that each of them was."""
    fields = {name: values.gather(1, order) for name, _ in FIELDS if (values := getattr(state, name)) is not None}
    if "parent" in state.carry:
        place = torch.arange(order.shape[1], dtype=torch.int32, device=order.device).expand_as(order)
        state = state.reparent(torch.full_like(state.index, -1).scatter(1, order, place))
    return state.replace(**fields)


def _patch_index(x, state):
    if state.packed:
        row = row_positions(state.cu_seqlens, x.shape[0])
    else:
        row = torch.arange(x.shape[1], dtype=torch.int32, device=x.device).expand(x.shape[0], -1)
    return torch.where(row < state.num_prefix, -1, row - state.num_prefix)


__all__ = [
    "StagedPruning",
    "follow_masked",
    "follow_order",
    "keep_map",
    "keep_targets",
    "rank_choice",
    "ratio_loss",
    "take_rows",
]
