# SPDX-License-Identifier: Apache-2.0
"""Binary keep gates with a straight-through gradient (Jang et al., Gumbel-softmax, arXiv 1611.01144)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops._register import stat_dtype


def draw_gumbel(shape: Sequence[int], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Gumbel(0, 1) noise of ``shape`` beside tokens ``like``: ``-log(E)`` with E exponential, float32 (or float64)."""
    draw = torch.empty(tuple(shape), dtype=stat_dtype(like.dtype), device=like.device)
    return -draw.exponential_(generator=generator).log()


def gumbel_choice(scores: Tensor, noise: Tensor | None, tau: float = 1.0) -> tuple[Tensor, Tensor]:
    """Choose between (keep, drop).

    Args:
        scores: ``[..., 2]`` logits or log-probabilities.
        noise: Gumbel noise of the same shape; None: the more probable one.
        tau: temperature of the soft value; the choice does not depend on it.

    Returns:
        ``(soft, keep)``, both ``[...]``: softmax value of keep, and the choice. A tie keeps.
    """
    noisy = scores if noise is None else scores + noise
    soft = (noisy if tau == 1 else noisy / tau).softmax(-1)[..., 0]
    return soft, hard_choice(noisy)


def hard_choice(scores: Tensor, noise: Tensor | None = None) -> Tensor:
    """The choice of :func:`gumbel_choice` alone, bool ``[...]``."""
    noisy = scores if noise is None else scores + noise
    return noisy[..., 0] >= noisy[..., 1]


def straight_through(choice: Tensor, soft: Tensor) -> Tensor:
    """0 or 1 in value, with the gradient of ``soft``. Exact: the soft value of the winner is at least one half."""
    hard = choice.to(soft.dtype)
    return hard - soft.detach() + soft if soft.requires_grad else hard
