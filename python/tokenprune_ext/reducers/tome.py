# SPDX-License-Identifier: Apache-2.0
"""ToMe: merge the most similar tokens of every layer (Bolya et al., arXiv 2210.09461).

Between attention and MLP, even tokens are matched with odd ones by the cosine of their mean key, and the ``r`` best
pairs become size-weighted means (section 3). Proportional attention adds the log of the size to the logits (eq. 1).
"""

import torch
from torch import Tensor

from ..nn import TokenState, pad_rows, sequence_of_row, unpad_rows
from ..ops import Matching, bipartite_soft_matching, match_and_merge, merge_tokens
from ._base import Reducer, register
from ._trace import restore_by_parent

__all__ = ["ToMe", "parse_r"]


def parse_r(num_layers: int, r: int | list[int] | tuple[int, float]) -> list[int]:
    """Merges per layer.

    Args:
        num_layers: layers of the model.
        r: constant int; list (padded with zeros; surplus entries are never used); or ``(r, inflect)`` with inflect in
            [-1, 1]: linear from ``r * (1 - inflect)`` to ``r * (1 + inflect)``, so -1 merges most in the first layers.
    """
    if isinstance(r, list):
        return r + [0] * (num_layers - len(r))
    inflect = 0.0
    if isinstance(r, tuple):
        r, inflect = r
    low = int(r * (1.0 - inflect))
    if num_layers == 1:
        return [low]
    step = (2 * r - low - low) / (num_layers - 1)
    return [int(low + step * layer) for layer in range(num_layers)]


@register("tome")
class ToMe(Reducer):
    """Token merging.

    Args:
        r: merges per layer, see :func:`parse_r`; at most half of the unprotected tokens merge in one layer.
        depth: layers of the model.
        prop_attn: proportional attention. On for models used off the shelf, off for training and for MAE models.
        class_token, distill_token: whether tokens 0 and 1 are protected.
        num_prefix: leading tokens that are no patches; when there are more of them than the two above (registers), all
            of them are protected. The state's number wins while running.
        trace_source: keep ``carry["parent"]`` (the row of every original token), which ``restore`` needs.
        weighted_pool: average pooling counts every token as often as its size says (the published MAE variant); by
            default every token counts once. Class and register tokens are left as they are.
        fast_idle: layers without merges run as plain blocks, the model's own ones if no layer merges.
    """

    def __init__(
        self,
        *,
        r: int | list[int] | tuple[int, float] = 8,
        depth: int,
        prop_attn: bool = True,
        class_token: bool = True,
        distill_token: bool = False,
        num_prefix: int = 0,
        trace_source: bool = False,
        weighted_pool: bool = False,
        fast_idle: bool = True,
    ):
        super().__init__()
        _check_r(r)
        self.r = parse_r(depth, r)
        if any(merges < 0 for merges in self.r):
            raise ValueError(f"ToMe: r must give no negative number of merges, got {self.r}")
        self.prop_attn, self.trace_source, self.fast_idle = prop_attn, trace_source, fast_idle
        self.class_token, self.distill_token, self.num_prefix = class_token, distill_token, num_prefix
        self.weighted_pool = weighted_pool

    @property
    def active(self) -> bool:
        """Whether any layer merges."""
        return any(self.r)

    def begin(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Start the trace, when it is wanted."""
        if self.trace_source:
            state = state.with_trace(x)
        return x, state

    def block(self, x: Tensor, state: TokenState, layer: int, run) -> tuple[Tensor, TokenState]:
        """The plain block where nothing merges."""
        return run.idle(x, state) if self.r[layer] == 0 and self.fast_idle else run(x, state)

    def attention(self, x: Tensor, state: TokenState, layer: int, branch) -> tuple[Tensor, TokenState]:
        """Attention with the residual, then merging."""
        if self.r[layer] == 0:
            return super().attention(x, state, layer, branch)
        whole = branch.add_merged(x, state, self.r[layer], **self._flags(state))
        if whole is not None:
            return self._follow(state, *whole)
        x, keys = branch.add(x, state, want="keys")
        if state.uniform(x):
            packed = state.packed
            padded, state = state.as_padded(x)
            padded, state = self._merge(padded, keys.reshape(*padded.shape[:2], *keys.shape[-2:]), state, self.r[layer])
            return state.as_packed(padded) if packed else (padded, state)
        return self._merge_ragged(x, keys.mean(-2), state, self.r[layer])

    def pool(self, x: Tensor, state: TokenState) -> Tensor:
        """Scale patch tokens so that their plain mean is the mean over the original patches."""
        if not self.weighted_pool or state.size is None:
            return x
        if state.packed:
            raise ValueError("ToMe.pool: tokens must be padded [B, N, C], got a packed state")
        size = state.size[:, state.num_prefix :]
        weight = size * (size.shape[1] / size.sum(1, keepdim=True))
        weight = torch.nn.functional.pad(weight, (state.num_prefix, 0), value=1.0)
        return x * weight[..., None].to(x.dtype)

    def restore(self, y: Tensor, state: TokenState) -> Tensor:
        """Every patch takes the value of the token it was merged into: ``[B, n, ...] -> [B, N0, ...]``."""
        if "parent" not in state.carry:
            raise ValueError("ToMe.restore: trace_source must be True, got a state without sources")
        return restore_by_parent("ToMe", y, state)

    def plan(self, depth: int, n: int) -> list[tuple[int, int]]:
        """Token counts, clamped as in the matching."""
        counts = []
        protected = max(self.num_prefix, int(self.class_token) + int(self.distill_token))
        for layer in range(depth):
            left = n - max(min(self.r[layer], (n - protected) // 2), 0)
            counts.append((n, left))
            n = left
        return counts

    def _flags(self, state):
        if state.num_prefix > int(self.class_token) + int(self.distill_token):
            return {"num_prefix": state.num_prefix}
        return {"class_token": self.class_token, "distill_token": self.distill_token}

    def _merge(self, x, metric, state, r):
        return self._follow(state, *match_and_merge(x, metric, r, size=state.size, **self._flags(state)))

    def _follow(self, state, x, size, log_size, parent):
        index = state.index
        if parent is not None:
            state = state.reparent(parent)
            index = _first_source(parent, index, x.shape[1])
        return x, state.replace(index=index, size=size, key_bias=log_size if self.prop_attn else state.key_bias)

    def _merge_ragged(self, x, metric, state, r):
        cu_seqlens, rows, batch = state.cu_seqlens, x.shape[0], state.cu_seqlens.shape[0] - 1
        protected = max(state.num_prefix, int(self.class_token) + int(self.distill_token))
        if not torch.compiler.is_compiling() and cu_seqlens.device.type == "cpu":
            shortest = int(cu_seqlens.diff().min())
            if (shortest - protected) // 2 < r:
                raise ValueError(
                    f"ToMe: r must be at most half of the unprotected tokens of every packed sequence "
                    f"({(shortest - protected) // 2}), got {r}"
                )
        # Zero metrics behind the end of a sequence have NaN similarities: they rank last, nothing merges into them.
        padded = pad_rows(metric.detach(), cu_seqlens, state.max_seqlen, 0.0)
        matching = bipartite_soft_matching(padded, r, **self._flags(state))
        parent = _close_gaps(matching.parent, cu_seqlens, state.max_seqlen - r)
        starts = cu_seqlens - r * torch.arange(batch + 1, dtype=torch.int32, device=x.device)
        flat = unpad_rows(parent, cu_seqlens, rows) + starts[sequence_of_row(cu_seqlens, rows)]
        whole = Matching(matching.unm, matching.src, matching.dst, flat[None], rows - batch * r)
        index = None if state.index is None else state.index[None]
        index = _first_source(flat[None], index, whole.num_tokens_out)
        index = None if index is None else index[0]
        size = None if state.size is None else state.size[None]
        x, size = (t[0] for t in merge_tokens(x[None], whole, size=size, mode="weighted"))
        state = state.reparent(parent)
        bias = size.log() if self.prop_attn else state.key_bias
        return x, state.replace(
            cu_seqlens=starts, max_seqlen=state.max_seqlen - r, index=index, size=size, key_bias=bias
        )


def _check_r(r):
    """Whole numbers, and a share for the slope: anything else would be truncated into another schedule."""
    sloped = isinstance(r, tuple) and len(r) == 2 and type(r[1]) in (int, float) and -1 <= r[1] <= 1
    counts = r if isinstance(r, list) else r[:1] if sloped else [r]
    if not all(type(n) is int or (sloped and type(n) is float) for n in counts):
        raise ValueError(f"ToMe: r must be an int, a list of ints or (r, inflect in [-1, 1]), got {r!r}")


def _close_gaps(parent, cu_seqlens, out_len):
    """Output rows of padded sequences -> output rows of the same sequences without their padding."""
    tokens = parent.shape[1]
    real = torch.arange(tokens, device=parent.device) < cu_seqlens.diff()[:, None]
    used = torch.zeros(parent.shape[0], out_len + 1, dtype=torch.int32, device=parent.device)
    used = used.scatter(1, torch.where(real, parent, out_len).long(), 1)[:, :out_len]
    rank = used.cumsum(1, dtype=torch.int32) - 1
    return torch.where(real, rank.gather(1, parent.long()), -1)


def _first_source(parent, index, out_len):
    """Original patch of each merged token: the first of its sources (prefix tokens keep -1)."""
    if index is None:
        return None
    nothing = torch.iinfo(index.dtype).max
    first = index.new_full((index.shape[0], out_len), nothing)
    return first.scatter_reduce(1, parent.long(), index, "amin")
