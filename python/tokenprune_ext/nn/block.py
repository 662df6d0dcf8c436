# SPDX-License-Identifier: Apache-2.0
"""A pre-norm transformer block taken apart, so that a method can step in anywhere without knowing the model.

``x + scale(drop_path(core(norm(x))))`` twice: attention, then MLP. Branches only hold references to a block's own
modules; they are cheap enough to be made at every forward, so later changes of the block (adapters, pruning of heads)
are seen.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._library import cpu_loaded
from ..ops import attention_scores, gather_layer_norm, gather_tokens, policy_attention, sparse_attention
from ..ops._register import call, stat_dtype
from ..ops.merge import count_merges
from .packed import PackedLinear, fused_mlp, fusible, idle, in_one_call, plain_norm, plain_scale
from .places import PairBias, biased_attention, biased_policy_attention
from .state import TokenState, sequence_of_row

_WANTS = (None, "key", "keys", "cls", "mean")
_AT_ONCE = (None, "key", "keys", "cls")  # "mean" takes a second pass


class AttentionBranch:
    """Sub-layer 1 of a block: ``branch(x, state)`` is ``scale(core(norm(x)))``, without the residual.

    Args:
        norm: LayerNorm before the attention.
        qkv: projection ``[..., C] -> [..., 3 * num_heads * head_dim]``, columns ordered q, k, v, then by head; or three
            projections, of which those of keys and values may make fewer heads (grouped queries).
        proj: projection of the mixed values.
        num_heads, head_dim: heads and their width.
        scale: factor of the logits.
        q_norm, k_norm: applied to each head's queries and keys.
        rotary: rotates queries and keys, ``(q, k, state) -> (q, k)`` (:class:`tokenprune_ext.nn.Rotary`).
        pair_bias: added to the logits of every pair of tokens.
        out_norm: applied to the mixed values.
        gate: linear layer on the block's normalised input; its sigmoid multiplies the mixed values.
        proj_drop: dropout behind ``proj``.
        attn_drop: dropout probability on the attention weights while training. Fused attention has none: refused.
        layer_scale: applied to the branch (LayerScale, or the norm of a post-norm block), or a factor per channel.
        drop_path: stochastic depth per image.
    """

    def __init__(
        self,
        norm: Callable,
        qkv: Callable | tuple[Callable, Callable, Callable],
        proj: Callable,
        *,
        num_heads: int,
        head_dim: int,
        scale: float | None = None,
        q_norm: Callable | None = None,
        k_norm: Callable | None = None,
        rotary: Callable | None = None,
        pair_bias: PairBias | None = None,
        out_norm: Callable | None = None,
        gate: Callable | None = None,
        proj_drop: Callable | None = None,
        attn_drop: float = 0.0,
        layer_scale: Callable | Tensor | None = None,
        drop_path: nn.Module | None = None,
    ):
        self.norm = norm
        self._projections, self._proj = qkv if isinstance(qkv, tuple) else (qkv,), proj
        self.num_heads, self.head_dim = num_heads, head_dim
        self.logit_scale = head_dim**-0.5 if scale is None else scale
        self._q_norm, self._k_norm = q_norm, k_norm
        self._rotary, self._pair_bias = rotary, pair_bias
        self._out_norm, self._gate, self._proj_drop = out_norm, gate, proj_drop
        self._attn_drop = attn_drop
        self._layer_scale, self._drop_path = layer_scale, drop_path

    @property
    def is_packed(self) -> bool:
        """Whether the layers were packed (:func:`tokenprune_ext.pack`), so that the branch beats the model's own code."""
        return isinstance(self._proj, PackedLinear)

    @property
    def fused(self) -> bool:
        """Whether the branch runs the fused attention, and does all that the module would do (no dropped weights)."""
        return not self.drops_weights and self._pair_bias is None

    @property
    def drops_weights(self) -> bool:
        """Whether attention weights are dropped now (while training), which only the model's own code does."""
        return self._attn_drop > 0

    def start(self, x: Tensor, state: TokenState, rows: Tensor | None = None) -> tuple:
        """Norm and projection of tokens ``x``: queries, keys, values, each ``[..., H, D]``, and what :meth:`finish` wants.

        With ``rows``, int32 ``[T]`` flat row numbers of ``x``, the tokens are those rows.
        """
        x = x if rows is None else x.flatten(0, -2)
        norm = None if self._gate is not None else plain_norm(self.norm)
        if norm is not None:
            pairs = [fusible(layer, x, norm[0], norm[1]) for layer in self._projections]
            if None not in pairs:
                outs = [
                    layer.fused(x, pair, norm=norm, index=rows)
                    for layer, pair in zip(self._projections, pairs, strict=True)
                ]
                return *self._heads(outs, state), None
        z = self.norm(x) if rows is None else _gather_norm(self.norm, x, rows)
        return *self.qkv(z, state), z

    def qkv(self, z: Tensor, state: TokenState) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised tokens ``[..., C]`` -> queries, keys, values, each ``[..., H, D]`` (rotated, where the model does)."""
        return self._heads([layer(z) for layer in self._projections], state)

    def _heads(self, parts, state):
        if len(parts) == 3:
            q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        else:
            (qkv,) = parts
            q, k, v = qkv.reshape(*qkv.shape[:-1], 3, self.num_heads, self.head_dim).unbind(-3)
        # A norm computes in float32 under autocast; attention takes one dtype.
        q = q if self._q_norm is None else self._q_norm(q).to(v.dtype)
        k = k if self._k_norm is None else self._k_norm(k).to(v.dtype)
        if self._rotary is not None:
            q, k = self._rotary(q, k, state)
        if k.shape[-2] != q.shape[-2]:
            k, v = (t.repeat_interleave(q.shape[-2] // t.shape[-2], -2) for t in (k, v))
        return q, k, v

    def check_own_attention(self) -> None:
        """For methods that put their own attention between :meth:`start` and :meth:`finish`.

        Raises:
            ValueError: the model's attention does what such a method does not: it drops attention weights, or adds a bias
                to every pair of tokens.
        """
        self._check_dropout()
        if self._pair_bias is not None:
            raise ValueError(
                "attention must have no bias for pairs of tokens (relative positions) for a method that computes its own "
                "attention, got one"
            )

    def _check_dropout(self):
        if self.drops_weights:
            raise ValueError(
                f"attn_drop must be 0 while training (fused attention drops no attention weights), got {self._attn_drop}"
            )

    def mix(self, q: Tensor, k: Tensor, v: Tensor, state: TokenState, want: str | None = None) -> tuple:
        """Attention within each image: ``(mixed [..., H * D], by-product or None)``; see :meth:`__call__`."""
        if want not in _WANTS:
            raise ValueError(f"AttentionBranch.mix: want must be one of {_WANTS}, got {want!r}")
        self._check_dropout()
        if self._pair_bias is not None:
            return biased_attention(q, k, v, self._pair_bias, state, self.logit_scale, want)
        lead = q.shape[:-2]
        cu_seqlens, max_seqlen = state.sequences(q)
        q, k, v = q.flatten(0, -3), k.flatten(0, -3), v.flatten(0, -3)
        bias = None if state.key_bias is None else state.key_bias.flatten()
        ragged = {
            "cu_seqlens_q": cu_seqlens,
            "max_seqlen_q": max_seqlen,
            "key_bias": bias,
            "scale": self.logit_scale,
        }
        out, lse, *cls = sparse_attention(q, k, v, want_cls=want == "cls", **ragged)
        product = None
        if want == "key":
            product = k.mean(1).view(*lead, self.head_dim)
        elif want == "keys":
            product = k.view(*lead, self.num_heads, self.head_dim)
        elif want == "cls":
            product = cls[0].mean(0).view(lead)
        elif want == "mean":
            product = attention_scores(q, k, lse, "mean", **ragged).mean(0).view(lead)
        return out.reshape(*lead, self.num_heads * self.head_dim), product

    def mix_policy(self, q: Tensor, k: Tensor, v: Tensor, state: TokenState, policy: Tensor, eps: float) -> Tensor:
        """Attention of padded tokens under a key policy ``[B, N]``: ``[B, N, H * D]``; see ``ops.policy_attention``."""
        self._check_dropout()
        if self._pair_bias is not None:
            return biased_policy_attention(q, k, v, self._pair_bias, state, policy, eps, self.logit_scale)
        return policy_attention(q, k, v, policy, eps, scale=self.logit_scale).flatten(2)

    def out(self, mixed: Tensor, z: Tensor) -> Tensor:
        """Output projection of the mixed values; ``z`` is the normalised input (a gate reads it)."""
        mixed = mixed if self._out_norm is None else self._out_norm(mixed)
        mixed = mixed if self._gate is None else mixed * self._gate(z).sigmoid()
        y = self._proj(mixed)
        return y if self._proj_drop is None else self._proj_drop(y)

    def finish(self, x: Tensor, mixed: Tensor, z: Tensor | None, state: TokenState) -> Tensor:
        """``x`` plus the branch, from the mixed values and what :meth:`start` gave; one pass when packed."""
        plain, gamma = plain_scale(self._layer_scale, self._drop_path)
        if self.is_packed and plain and self._gate is None and idle(self._proj_drop):
            inner = mixed if self._out_norm is None else self._out_norm(mixed)
            pair = fusible(self._proj, inner, gamma, x)
            if pair is not None:
                return self._proj.fused(inner, pair, residual=x, scale=gamma)
        return x + self.scale(self.out(mixed, z), state)

    def core(self, z: Tensor, state: TokenState, want: str | None = None):
        """Normalised tokens -> attention output (and the by-product, when one is wanted)."""
        mixed, product = self.mix(*self.qkv(z, state), state, want)
        y = self.out(mixed, z)
        return y if want is None else (y, product)

    def scale(self, y: Tensor, state: TokenState) -> Tensor:
        """LayerScale and stochastic depth (per image, also for packed tokens)."""
        return _scaled(y, state, self._layer_scale, self._drop_path)

    def __call__(self, x: Tensor, state: TokenState, want: str | None = None):
        """Tokens ``[B, N, C]`` or ``[T, C]`` -> the branch, same shape.

        ``want`` asks for a by-product and returns ``(branch, by-product)``:
            ``"key"``: keys averaged over heads, ``[..., D]``; ``"keys"``: of all heads, ``[..., H, D]``;
            ``"cls"``: attention of the first token of each image, averaged over heads, ``[...]``;
            ``"mean"``: attention each token receives, averaged over queries and heads, ``[...]``.
        """
        z = self.norm(x)
        if want is None:
            return self.scale(self.core(z, state), state)
        y, product = self.core(z, state, want)
        return self.scale(y, state), product

    def add(self, x: Tensor, state: TokenState, want: str | None = None, rows: Tensor | None = None):
        """``x`` plus the branch (and the by-product); norm, projection and residual in one pass each when packed.

        With ``rows``, int32 ``[T]`` flat row numbers of ``x``, of those rows alone: ``[T, C]``.
        """
        whole = self._add_at_once(x, state, want, rows)
        if whole is not None:
            return whole
        *heads, z = self.start(x, state, rows)
        mixed, product = self.mix(*heads, state, want)
        y = self.finish(x if rows is None else gather_tokens(x, rows), mixed, z, state)
        return y if want is None else (y, product)

    def add_merged(
        self,
        x: Tensor,
        state: TokenState,
        r: int,
        class_token: bool = False,
        distill_token: bool = False,
        num_prefix: int | None = None,
    ) -> tuple | None:
        """``ops.packed_attention_merged`` of padded tokens, or None where nothing merges or a part stands in the way."""
        parts = None if state.packed else self._at_once(x)
        if parts is None:
            return None
        r = count_merges("packed_attention_merged", x.shape[1], r, class_token, distill_token, num_prefix)
        if r == 0:
            return None
        size = None if state.size is None else state.size.to(stat_dtype(x.dtype))
        protected = class_token, distill_token, num_prefix or 0
        tail = _flat_bias(x, state), self.logit_scale, r, size, *protected
        return call("packed_attention_merged", x.device, x, *parts, *tail)

    def add_sampled(self, x: Tensor, state: TokenState, initial: Tensor, drop: bool) -> tuple | None:
        """``ops.packed_attention_sampled``, or None where a part stands in the way."""
        parts = self._at_once(x)
        if parts is None:
            return None
        sequences = state.cu_seqlens, state.max_seqlen, _flat_bias(x, state)
        return call(
            "packed_attention_sampled",
            x.device,
            x,
            *parts,
            *sequences,
            self.logit_scale,
            initial,
            state.num_prefix,
            drop,
        )

    def add_grouped(
        self, x: Tensor, state: TokenState, projection: Tensor, offset: Tensor, width: float
    ) -> tuple | None:
        """``ops.packed_attention_grouped``, or None where a part stands in the way."""
        parts = self._at_once(x)
        if parts is None:
            return None
        tail = state.cu_seqlens, state.max_seqlen, _flat_bias(x, state), self.logit_scale, projection, offset, width
        return call("packed_attention_grouped", x.device, x, *parts, *tail)

    def _at_once(self, x):
        """What ops that do it all in one call take behind the tokens, or None where a part stands in the way."""
        extra = self._rotary is not None or self._pair_bias is not None or self._gate is not None
        normed = self._q_norm is not None or self._k_norm is not None or self._out_norm is not None
        if not self.is_packed or extra or normed or len(self._projections) > 1:
            return None
        if self.drops_weights or not in_one_call():
            return None
        norm, (plain, gamma) = plain_norm(self.norm), plain_scale(self._layer_scale, self._drop_path)
        if norm is None or not plain or not idle(self._proj_drop):
            return None
        first, last = fusible(self._projections[0], x, norm[0], norm[1]), fusible(self._proj, x, gamma)
        if first is None or last is None:
            return None
        return *norm, *first, *last, gamma, self.num_heads, self.head_dim

    def _add_at_once(self, x, state, want, rows):
        """:meth:`add` in one call, or None where a part or the by-product stands in the way."""
        parts = self._at_once(x) if want in _AT_ONCE else None
        if parts is None:
            return None
        y, qkv, _, cls = call(
            "packed_attention",
            x.device,
            x if rows is None else x.flatten(0, -2),
            *parts,
            rows,
            state.cu_seqlens,
            state.max_seqlen,
            _flat_bias(x, state),
            self.logit_scale,
            want == "cls",
        )
        if want is None:
            return y
        lead = y.shape[:-1]
        if want == "cls":
            return y, cls.view(lead)
        keys = qkv.view(*lead, 3, self.num_heads, self.head_dim).select(-3, 1)
        return y, keys if want == "keys" else keys.mean(-2)


class MlpBranch:
    """Sub-layer 2 of a block: ``branch(x, state)`` is ``scale(core(norm(x)))``, without the residual."""

    def __init__(
        self,
        norm: Callable,
        mlp: Callable,
        *,
        layer_scale: Callable | Tensor | None = None,
        drop_path: nn.Module | None = None,
    ):
        self.norm, self._mlp = norm, mlp
        self._layer_scale, self._drop_path = layer_scale, drop_path

    def core(self, z: Tensor, state: TokenState) -> Tensor:
        """Normalised tokens -> MLP output."""
        return self._mlp(z)

    def scale(self, y: Tensor, state: TokenState) -> Tensor:
        """LayerScale and stochastic depth (per image, also for packed tokens)."""
        return _scaled(y, state, self._layer_scale, self._drop_path)

    def __call__(self, x: Tensor, state: TokenState) -> Tensor:
        """Tokens ``[B, N, C]`` or ``[T, C]`` -> the branch, same shape."""
        return self.scale(self.core(self.norm(x), state), state)

    def add(self, x: Tensor, state: TokenState) -> Tensor:
        """``x`` plus the branch; two passes in all when the layers are packed."""
        y = fused_mlp(self._mlp, self.norm, x, self._layer_scale, self._drop_path)
        return x + self(x, state) if y is None else y


@dataclass(frozen=True)
class BlockParts:
    """A block as its two branches, and the block itself for layers in which a method does nothing.

    Attributes:
        attention, mlp: the branches.
        original: the model's own block, ``[B, N, C] -> [B, N, C]``, or None when there is none.
        start: ``state.index`` of the tokens that ``original`` is made for, where it takes their positions from their
            order (rotary embedding, relative positions); None: it takes any tokens.
    """

    attention: AttentionBranch
    mlp: MlpBranch
    original: Callable | None = None
    start: Tensor | None = None


@dataclass(frozen=True)
class BlockRecord:
    """Tokens of one block: int32 ``[B]`` counts that entered attention and MLP, and the state before the MLP."""

    layer: int
    attention: Tensor
    mlp: Tensor
    state: TokenState


class BlockRun:
    """One block in the hands of a reducer: what ``Reducer.block`` receives as ``run``.

    ``run(x, state)`` runs the two sub-layers through the reducer; ``run.original(x, state)`` runs the model's own block
    untouched where that computes the same (padded tokens in their places, no key bias), the plain branches elsewhere;
    ``run.idle(x, state)`` is for the layers that a method leaves alone.
    """

    def __init__(self, parts: BlockParts, layer: int, reducer, record: list[BlockRecord] | None = None):
        self.parts, self.layer, self.reducer, self.record = parts, layer, reducer, record

    def __call__(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Attention, then MLP, both through the reducer."""
        before = None if self.record is None else state.lengths(x)
        x, state = self.reducer.attention(x, state, self.layer, self.parts.attention)
        self._note(x, state, before)
        return self.reducer.mlp(x, state, self.layer, self.parts.mlp)

    def original(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """The block without any reduction."""
        if self.record is not None:
            self._note(x, state, state.lengths(x))
        parts = self.parts
        exact = parts.original is not None and not state.packed and state.key_bias is None
        exact = exact and (parts.start is None or state.index is parts.start)
        if exact and (not parts.attention.is_packed or parts.attention.drops_weights):
            return parts.original(x), state
        return self._branches(x, state)

    def idle(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """The block without any reduction, bit for bit the model's own where the method reduces nowhere.

        In an active method the branches run where they are the faster way to the same result: on the CPU, whose
        compiled attention beats torch's (float64 excepted). They have no dropout of attention weights.
        """
        fused = x.device.type == "cpu" and x.dtype != torch.float64 and cpu_loaded()
        if self.reducer.active and fused and self.parts.attention.fused:
            if self.record is not None:
                self._note(x, state, state.lengths(x))
            return self._branches(x, state)
        return self.original(x, state)

    def _branches(self, x, state):
        x = self.parts.attention.add(x, state)
        return self.parts.mlp.add(x, state), state

    def _note(self, x, state, before):
        if self.record is not None:
            self.record.append(BlockRecord(self.layer, before, state.lengths(x), state))


def run_block(
    block: BlockParts,
    x: Tensor,
    state: TokenState,
    layer: int,
    reducer,
    record: list[BlockRecord] | None = None,
) -> tuple[Tensor, TokenState]:
    """One step of a model's loop over its blocks.

    Args:
        block: the block's parts.
        x: ``[B, N, C]`` or ``[T, C]``.
        state: what ``x`` is.
        layer: number of the block.
        reducer: :class:`tokenprune_ext.reducers.Reducer`, or None for the dense block.
        record: receives one entry per executed block (for traces).
    """
    run = BlockRun(block, layer, reducer, record)
    return run.original(x, state) if reducer is None else reducer.block(x, state, layer, run)


def _flat_bias(x, state):
    """The key bias of all tokens, as attention takes it."""
    return None if state.key_bias is None else state.key_bias.flatten().to(stat_dtype(x.dtype))


def _gather_norm(norm: Callable, x: Tensor, rows: Tensor) -> Tensor:
    """``norm`` of the gathered rows, ``[T, C]``; one pass over the memory when ``norm`` is a plain LayerNorm."""
    plain = plain_norm(norm)
    if plain is not None:
        return gather_layer_norm(x, rows, *plain)
    return norm(gather_tokens(x, rows))


def _scaled(y, state, layer_scale, drop_path):
    if layer_scale is not None:
        y = y * layer_scale if isinstance(layer_scale, Tensor) else layer_scale(y)
    if drop_path is None or isinstance(drop_path, nn.Identity):
        return y
    if not (state.packed and drop_path.training):
        return drop_path(y)
    # One draw per image, as for padded tokens; the module would draw once per row of [T, C].
    images = state.cu_seqlens.shape[0] - 1
    kept = drop_path(torch.ones(images, 1, dtype=y.dtype, device=y.device))
    return y * kept[sequence_of_row(state.cu_seqlens, y.shape[0])]
