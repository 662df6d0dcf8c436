# SPDX-License-Identifier: Apache-2.0
"""SPViT: soft pruning, the dropped tokens live on in a package token (Kong et al., arXiv 2112.13890).

A multi-head selector in front of each of three blocks keeps or drops every token (section 4.2); what it drops is summed,
weighted with the keep probability, into a package token behind the others (section 4.3). Every image keeps as many
tokens as it needs. Where paper and published code differ, this follows the code.
"""

import torch
from torch import Tensor

from ..nn import row_positions, sequence_of_row
from ._base import register
from ._gates import gumbel_choice, hard_choice, straight_through
from ._predictors import HeadSelector, ImageMean, TokenPredictor, image_sums
from ._stages import StagedPruning, follow_masked, keep_map, take_rows

__all__ = ["SPViT", "package_token"]

_MODES = ("threshold", "sample")
_SELECTORS = ("senet", "multihead", "single")
_PACKAGES = ("sum", "norm", "accum", "mean")
_NOTHING_DROPPED = 1e-6  # what a normalised package token holds when nothing was dropped


@register("spvit")
class SPViT(StagedPruning):
    """Latency-aware soft token pruning.

    Args:
        depth, embed_dim, num_heads: of the model.
        layers: blocks with a selector in front; default depth/4, depth/2 and 3 depth/4 (3, 6, 9 of DeiT; 4, 8, 12 and
            5, 10, 15 of LV-ViT-S and -M).
        keep: target of the ratio loss: base rate (stage s wants ``keep ** (s + 1)``) or one share per stage. The last
            commit of the published training script wants (0.617, 0.369, 0.137) whatever the base rate says.
        selector: ``"senet"`` (published models), ``"multihead"`` (plain mean over the heads) or ``"single"``
            (DynamicViT's predictor).
        package: ``"sum"`` (published models): one token per stage, not normalised; ``"norm"``: divided by the sum of the
            weights (the paper); ``"accum"``: one token in all, old plus ``norm``; ``"mean"``: unweighted mean of the
            dropped tokens (what the published inference script does, unlike its training).
        mode: at inference, ``"threshold"``: keep where keep scores at least as high as drop (what the authors intend);
            ``"sample"``: with Gumbel noise, as the published evaluation does. Training always samples.
        eps: of the key policy while training; masked evaluation has none.
        ratio_per_sample: ratio loss of every image, averaged, instead of the whole batch.
        dense: compute masked instead of gathered; default: while training. The published evaluation is masked.
        generator: random generator of the noise.
        num_prefix: leading tokens that are no patches; they always stay. The state's number wins while running.
        pooling: what the model's classifier reads, which must be the class token.
        fast_idle: blocks without a key policy run as plain ones, the model's own if there is no selector.

    Noise of layer ``l`` can be given as ``state.carry["noise.l"]``, Gumbel ``[B, n, 2]`` (keep, drop) in the order of the
    original patches; entries behind them, which the published code draws for package tokens, change nothing. Keep masks
    are left in ``state.carry["keep.l"]``, ``[B, n]``.
    """

    def __init__(
        self,
        *,
        depth: int,
        embed_dim: int,
        num_heads: int,
        layers: list[int] | None = None,
        keep: float | list[float] = 0.7,
        selector: str = "senet",
        package: str = "sum",
        mode: str = "threshold",
        eps: float = 1e-6,
        ratio_per_sample: bool = False,
        dense: bool | None = None,
        generator: torch.Generator | None = None,
        num_prefix: int = 1,
        pooling: str = "token",
        fast_idle: bool = True,
    ):
        for name, value, legal in (
            ("selector", selector, _SELECTORS),
            ("package", package, _PACKAGES),
            ("mode", mode, _MODES),
        ):
            if value not in legal:
                raise ValueError(f"SPViT: {name} must be one of {legal}, got {value!r}")
        layers = sorted({depth // 4, depth // 2, 3 * depth // 4}) if layers is None else layers
        super().__init__(
            name="SPViT",
            depth=depth,
            layers=layers,
            keep=keep,
            selectors=[
                TokenPredictor(embed_dim)
                if selector == "single"
                else HeadSelector(embed_dim, num_heads, weighted=selector == "senet")
                for _ in layers
            ],
            mode=mode,
            eps=eps,
            dense=dense,
            generator=generator,
            num_prefix=num_prefix,
            pooling=pooling,
            fast_idle=fast_idle,
        )
        self.package, self.ratio_per_sample = package, ratio_per_sample

    def _made(self, stage):
        """Package tokens that are there in front of a stage's selector."""
        return min(stage, 1) if self.package == "accum" else stage

    def _stage_masked(self, x, state, layer):
        stage, prefix, before = self.layers.index(layer), state.num_prefix, state.carry["keep"]
        batch, patches = before.shape
        made = self._made(stage)
        front = torch.cat([before, before.new_ones(batch, made)], 1)
        scores, probability = self.selectors[stage](x[:, prefix:], ImageMean(front))
        noise = state.carry[f"noise.{layer}"][:, :patches] if self._sampled() else None
        soft, choice = gumbel_choice(scores[:, :patches], noise)
        keep = straight_through(choice, soft) * before
        old = x[:, prefix + patches :] if made and self.package == "accum" else None
        image = x[:, prefix : prefix + patches]
        token = package_token(image, probability[:, :patches, 0], before - keep, self.package, old)
        if old is not None:
            x = x[:, : prefix + patches]
        state = follow_masked(state, keep, x.shape[1])
        x = torch.cat([x, token], 1)
        ends = [keep.new_ones(batch, prefix), keep, keep.new_ones(batch, x.shape[1] - prefix - patches)]
        state = _with_made_fields(state, x.shape[1])
        return x, state.with_carry(keep=keep, policy=torch.cat(ends, 1), **{f"keep.{layer}": keep})

    def _stage_gathered(self, x, state, layer):
        stage = self.layers.index(layer)
        x, state = state.as_packed(x)
        cu_seqlens, index, before = state.cu_seqlens, state.index, state.carry["keep"]
        image = index >= 0
        front = row_positions(cu_seqlens, x.shape[0]) >= state.num_prefix
        scores, probability = self.selectors[stage](x, ImageMean(front, cu_seqlens))
        noise = None
        if self._sampled():
            owner = sequence_of_row(cu_seqlens, x.shape[0])
            noise = state.carry[f"noise.{layer}"][owner, index.clamp(min=0).long()]
        choice = hard_choice(scores, noise)
        stays = choice | ~image
        weights = probability[:, 0] if self.package != "mean" else torch.ones_like(probability[:, 0])
        old = None
        if self.package == "accum" and self._made(stage):
            last = (cu_seqlens[1:] - 1).long()
            old = x[last]
            stays, weights = stays.scatter(0, last, False), weights.scatter(0, last, 0)  # the new one replaces it
        keep = keep_map(index, choice, cu_seqlens, before)
        y, after = take_rows(x, state, stays, weights)
        if self.package != "sum":
            total = image_sums(torch.where(stays, 0, weights)[:, None], cu_seqlens).to(x.dtype)
            last = (after.cu_seqlens[1:] - 1).long()
            y = y.index_copy(0, last, _finish(y[last], total, self.package, old))
        return y, after.with_carry(keep=keep, **{f"keep.{layer}": keep})


def package_token(
    x: Tensor, probability: Tensor, dropped: Tensor, kind: str = "sum", old: Tensor | None = None
) -> Tensor:
    """The token that stands for dropped ones (SPViT section 4.3).

    Args:
        x: image tokens ``[B, n, C]``, as they enter the block.
        probability: their keep probabilities ``[B, n]``.
        dropped: 1 for a token dropped at this stage, ``[B, n]``.
        kind: ``"sum"``: weighted sum; ``"norm"``: weighted mean, 1e-6 where nothing was dropped; ``"accum"``: ``old`` plus
            ``norm``; ``"mean"``: unweighted mean, 0 where nothing was dropped.
        old: package token so far ``[B, 1, C]``, for ``"accum"``; None: there is none yet.

    Returns:
        ``[B, 1, C]``, differentiable in x, probability and dropped.
    """
    weights = (dropped if kind == "mean" else probability * dropped).to(x.dtype)
    return _finish(weights[:, None] @ x, weights.sum(1)[:, None, None], kind, old)


def _finish(sums, total, kind, old):
    """Package token from the weighted sums ``[..., C]`` and the sum of the weights ``[..., 1]``."""
    if kind == "sum":
        return sums
    some = total != 0
    mean = torch.where(some, sums / torch.where(some, total, 1), 0.0 if kind == "mean" else _NOTHING_DROPPED)
    return mean if kind != "accum" or old is None else old + mean


def _with_made_fields(state, tokens):
    """Per-token fields of the state for a padded stage that ends with ``tokens`` tokens, a made one last."""
    fields = {}
    for name, value in (("index", -1), ("size", 1), ("key_bias", 0)):
        values = getattr(state, name)
        if values is not None and values.shape[1] < tokens:
            fields[name] = torch.nn.functional.pad(values, (0, 1), value=value)
    return state.replace(**fields)
