# SPDX-License-Identifier: Apache-2.0
"""The multi-scale deformable attention module, and where the queries of a ViT-Adapter look.

The module is from Deformable DETR (arXiv 2010.04159, section 4.1 and appendix A.2) with the official parameter names and
initialisation; ``ratio`` and the grids are from ViT-Adapter (arXiv 2205.08534, section 3).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ops import ms_deform_attn_fused

Grid = tuple[int, int]


class MSDeformAttn(nn.Module):
    """Every query samples ``n_points`` points per level and head around its reference point.

    Args:
        d_model: width of queries and of the output.
        n_levels: levels of the value pyramid.
        n_heads: heads; ``d_model`` and the value width must be multiples of it.
        n_points: points per level and head.
        ratio: width of the values over ``d_model``.

    Raises:
        ValueError: widths that do not divide by the heads, or a count that is not positive.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4, ratio: float = 1.0):
        super().__init__()
        width = int(d_model * ratio)
        for name, count in (("n_levels", n_levels), ("n_heads", n_heads), ("n_points", n_points)):
            if count < 1:
                raise ValueError(f"MSDeformAttn: {name} must be at least 1, got {count}")
        if d_model < 1 or d_model % n_heads:
            raise ValueError(f"MSDeformAttn: d_model must be a positive multiple of n_heads ({n_heads}), got {d_model}")
        if width < 1 or width % n_heads:
            raise ValueError(
                f"MSDeformAttn: ratio must make the value width a positive multiple of n_heads ({n_heads}), "
                f"got {ratio} * {d_model} = {width}"
            )
        self.d_model, self.n_levels, self.n_heads, self.n_points, self.ratio = (
            d_model,
            n_levels,
            n_heads,
            n_points,
            ratio,
        )
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, width)
        self.output_proj = nn.Linear(width, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Uniform weights; the points of head m lie on a ray at angle 2 pi m / M, the p-th at p + 1 pixels."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(self.n_heads, dtype=torch.float32) * (2.0 * math.pi / self.n_heads)
        ray = torch.stack((angle.cos(), angle.sin()), -1)
        ray = ray / ray.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        bias = ray[:, None, None] * steps[:, None]  # [M, 1, P, 2]
        self.sampling_offsets.bias.copy_(bias.expand(-1, self.n_levels, -1, -1).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"n_levels={self.n_levels}, n_heads={self.n_heads}, n_points={self.n_points}, ratio={self.ratio}"

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: Tensor | Sequence[Grid],
        input_level_start_index: Tensor | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[B, Q, d_model]``.
            reference_points: ``[B or 1, Q, L or 1, 2]`` in 0..1, or ``[..., 4]`` boxes (cx, cy, w, h).
            input_flatten: ``[B, S, d_model]``, the levels one after another.
            input_spatial_shapes: ``(H, W)`` of every level: a list of pairs, or an int64 tensor ``[L, 2]``.
            input_level_start_index: int64 ``[L]``; None is enough beside a list.
            input_padding_mask: bool ``[B, S]``, true where the input is padding (its values count as zero).

        Returns:
            ``[B, Q, d_model]``.

        Raises:
            ValueError, TypeError, RuntimeError: as :func:`tokenprune_ext.ops.ms_deform_attn_fused`.
        """
        heads, count = self.n_heads, self.n_levels * self.n_points
        value = self.value_proj(input_flatten).unflatten(-1, (heads, -1))
        offsets = self.sampling_offsets(query).unflatten(-1, (heads, self.n_levels, self.n_points, 2))
        logits = self.attention_weights(query).unflatten(-1, (heads, count))
        mask = None if input_padding_mask is None else input_padding_mask.bool()
        mixed = ms_deform_attn_fused(
            value, input_spatial_shapes, input_level_start_index, reference_points, offsets, logits, padding_mask=mask
        )
        return self.output_proj(mixed)


# ---------------------------------------------------------------- reference points


@dataclass(frozen=True)
class DeformInputs:
    """Where queries look, and the pyramid that they look at.

    Attributes:
        reference_points: float32 ``[1, Q, 1, 2]``, for all images and levels.
        spatial_shapes: ``(H, W)`` of the value levels, on the host.
    """

    reference_points: Tensor
    spatial_shapes: tuple[Grid, ...]

    @property
    def level_start_index(self) -> tuple[int, ...]:
        """First row of every level."""
        sizes = [h * w for h, w in self.spatial_shapes]
        return tuple(sum(sizes[:level]) for level in range(len(sizes)))


def grid_reference_points(grids: Sequence[Grid], device: torch.device | str | None = None) -> Tensor:
    """Centres of the cells of some grids, one grid after another, row by row.

    Returns:
        float32 ``[1, Q, 1, 2]``, (x, y) in 0..1; float32 also under autocast.
    """
    centres = []
    for height, width in grids:
        y = (torch.arange(height, dtype=torch.float32, device=device) + 0.5) / height
        x = (torch.arange(width, dtype=torch.float32, device=device) + 0.5) / width
        centres.append(torch.stack((x.expand(height, -1), y[:, None].expand(-1, width)), -1).flatten(0, 1))
    return torch.cat(centres)[None, :, None]


def deform_inputs(
    height: int, width: int, device: torch.device | str | None = None
) -> tuple[DeformInputs, DeformInputs]:
    """Inputs of a ViT-Adapter's injectors and extractors for images of ``height`` x ``width`` pixels.

    The ViT has a token per 16 x 16 pixels, the adapter's pyramid has strides 8, 16 and 32. Injectors: the ViT's tokens look
    at the pyramid. Extractors: the pyramid looks at the ViT's tokens.

    Returns:
        ``(injector, extractor)``.

    Raises:
        ValueError: a side is not a positive multiple of 32 (the pyramid would not fit the token grid).
    """
    if height < 32 or width < 32 or height % 32 or width % 32:
        raise ValueError(f"deform_inputs: image sides must be positive multiples of 32, got {height} x {width}")
    tokens = ((height // 16, width // 16),)
    pyramid = tuple((height // stride, width // stride) for stride in (8, 16, 32))
    return (
        DeformInputs(grid_reference_points(tokens, device), pyramid),
        DeformInputs(grid_reference_points(pyramid, device), tokens),
    )
