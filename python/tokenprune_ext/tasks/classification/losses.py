# SPDX-License-Identifier: Apache-2.0
"""Training losses of DynamicViT, SPViT and SViT: classification, kept share, distillation of logits and tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..._patch import features as reduced_features
from ...nn import TokenState
from ...reducers._stages import ratio_loss

__all__ = [
    "LossParts",
    "TokenOutputs",
    "distillation_loss",
    "kl_divergence",
    "ratio_loss",
    "soft_cross_entropy",
    "svit_loss",
    "token_distillation",
    "token_outputs",
]


@dataclass(frozen=True)
class LossParts:
    """A loss and what it is made of, each unweighted; parts that a setting lacks are 0.

    Attributes:
        total: what is minimised.
        cls: classification.
        ratio_sum: squared distances of the kept shares from their targets, summed over the stages.
        kl: distillation of the logits.
        token: distillation of the tokens.
    """

    total: Tensor
    cls: Tensor
    ratio_sum: Tensor
    kl: Tensor
    token: Tensor


@dataclass(frozen=True)
class TokenOutputs:
    """What a model says while it is trained or teaches.

    Attributes:
        logits: of the class token, ``[B, K]``.
        tokens: every patch behind the last norm, ``[B, n, C]``; of an LV-ViT the patch logits ``[B, n, K]``.
        state: of the tokens; None for a model that is not patched.
    """

    logits: Tensor
    tokens: Tensor
    state: TokenState | None

    @property
    def mask(self) -> Tensor | None:
        """Patches still there behind the last stage, ``[B, n]`` without gradient; None when nothing is masked."""
        return None if self.state is None or "keep" not in self.state.carry else self.state.carry["keep"].detach()


def token_outputs(model: nn.Module, images: Tensor, carry: dict[str, Tensor] | None = None) -> TokenOutputs:
    """Run a student (patched with a masked method) or a dense teacher.

    A teacher belongs in ``eval()`` and under ``torch.no_grad()``: in training mode the BatchNorms of an LV-ViT would
    follow the student's batches.

    Args:
        model: a timm ``VisionTransformer`` with class token, or an LV-ViT; patched or not.
        images: ``[B, 3, H, W]``.
        carry: given noise.

    Raises:
        ValueError: the method gathers its tokens: not every patch is there.
    """
    if hasattr(model, "token_reducer"):
        x, state = reduced_features(model, images, carry=carry)
    else:
        x, state = model.forward_features(images), None
    prefix, patches = model.num_prefix_tokens, model.patch_embed.num_patches
    if x.dim() != 3 or x.shape[1] < prefix + patches:
        raise ValueError(
            "token_outputs: model must keep all patches (training mode, or dense=True), got gathered tokens of shape "
            f"{tuple(x.shape)}"
        )
    tokens = x[:, prefix : prefix + patches]
    tokens = model.aux_logits(tokens) if hasattr(model, "aux_logits") else tokens
    return TokenOutputs(model.head(x[:, 0]), tokens, state)


def soft_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the batch of ``-sum_c q_c log softmax(logits)_c``; target ``[B, K]`` probabilities (mixup)."""
    return -(target * F.log_softmax(logits, -1)).sum(-1).mean()


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of logits ``[M, K]``, summed over the classes, mean over the rows."""
    return F.kl_div(F.log_softmax(student, -1), F.log_softmax(teacher, -1), log_target=True, reduction="batchmean")


def token_distillation(student: Tensor, teacher: Tensor, mask: Tensor, kind: str = "mse") -> Tensor:
    """Distance of the tokens that are still there; 0 when there are none.

    Args:
        student, teacher: ``[B, n, C]`` tokens or ``[B, n, K]`` logits.
        mask: ``[B, n]``, above 0.5 = still there.
        kind: ``"mse"``: mean squared difference; ``"kl"``: KL(teacher || student) of logits, mean over the tokens.
    """
    if kind not in ("mse", "kl"):
        raise ValueError(f"token_distillation: kind must be 'mse' or 'kl', got {kind!r}")
    weights = (mask > 0.5).to(student.dtype)
    count = weights.sum()
    if kind == "mse":
        each = (student - teacher).square().mean(-1)
    else:
        logs = F.log_softmax(teacher, -1)
        each = (logs.exp() * (logs - F.log_softmax(student, -1))).sum(-1)
    return (each * weights).sum() / (count + (count == 0))


def distillation_loss(
    logits: Tensor,
    target: Tensor,
    keeps: Sequence[Tensor],
    targets: Sequence[float],
    *,
    tokens: Tensor | None = None,
    mask: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    teacher_tokens: Tensor | None = None,
    token_kind: str = "mse",
    ratio_per_sample: bool = False,
    cls_weight: float = 1.0,
    ratio_weight: float = 2.0,
    distill_weight: float = 0.5,
) -> LossParts:
    """``cls_weight CE + ratio_weight / S sum_s R_s + distill_weight (KL + TOK)``.

    Args:
        logits: of the student's class token ``[B, K]``.
        target: class probabilities ``[B, K]``.
        keeps: keep masks ``[B, n]``, one per stage, with the gradient of the gates.
        targets: wanted shares, one per stage.
        tokens, mask: student's tokens ``[B, n, *]`` and which are still there; see :class:`TokenOutputs`.
        teacher_logits, teacher_tokens: of the teacher; None: no distillation.
        token_kind: ``"mse"`` (DeiT: tokens) or ``"kl"`` (LV-ViT: patch logits).
        ratio_per_sample: R of every image, averaged: DynamicViT, and SPViT when it is trained without distillation;
            False: R of the whole batch (SPViT).
        cls_weight, ratio_weight, distill_weight: published: 1, 2 (DynamicViT DeiT-B: 5), 0.5.
    """
    cls = soft_cross_entropy(logits, target)
    ratio = ratio_loss(keeps, targets, per_sample=ratio_per_sample)
    kl = token = torch.zeros_like(cls)
    if teacher_logits is not None:
        kl = kl_divergence(logits, teacher_logits)
    if teacher_tokens is not None:
        token = token_distillation(tokens, teacher_tokens, mask, token_kind)
    total = cls_weight * cls + ratio_weight / len(keeps) * ratio + distill_weight * (kl + token)
    return LossParts(total, cls, ratio, kl, token)


def svit_loss(logits: Tensor, target: Tensor, ratio: Tensor, ratio_weight: float = 4.0) -> Tensor:
    """``CE + ratio_weight * ratio``; ``ratio`` as ``SViT.losses(state)["ratio"]`` gives it."""
    return soft_cross_entropy(logits, target) + ratio_weight * ratio
