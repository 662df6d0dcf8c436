# SPDX-License-Identifier: Apache-2.0
"""Deformable attention in the detectors of transformers (Deformable DETR, Grounding DINO, RT-DETR, OmDet-Turbo ...).

Their attention modules call a small module ``MultiScaleDeformableAttention``, which holds no weights; this one takes its
place, with its argument order.
"""

import inspect
from collections.abc import Sequence

from torch import Tensor, nn

from ..ops import ms_deform_attn

_NAME = "MultiScaleDeformableAttention"
_ARGUMENTS = (
    "value",
    "value_spatial_shapes",
    "value_spatial_shapes_list",
    "level_start_index",
    "sampling_locations",
    "attention_weights",
    "im2col_step",
)


class MultiScaleDeformableAttention(nn.Module):
    """The weightless module of that name in transformers, computed by :func:`tokenprune_ext.ops.ms_deform_attn`."""

    def __init__(self, original: nn.Module | None = None):
        super().__init__()
        self._original = (original,)  # in a tuple: not a submodule

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: Sequence[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        """As in transformers; the sizes are taken from the list, so that nothing is read from the GPU.

        Args:
            value: ``[B, S, M, D]``.
            value_spatial_shapes: int64 ``[L, 2]``; used when there is no list.
            value_spatial_shapes_list: ``(H, W)`` of every level.
            level_start_index: int64 ``[L]``.
            sampling_locations: ``[B, Q, M, L, P, 2]``.
            attention_weights: ``[B, Q, M, L, P]``.
            im2col_step: without effect.

        Returns:
            ``[B, Q, M * D]``.
        """
        shapes = value_spatial_shapes if value_spatial_shapes_list is None else value_spatial_shapes_list
        starts = level_start_index if value_spatial_shapes_list is None else None
        return ms_deform_attn(value, shapes, starts, sampling_locations, attention_weights, im2col_step)


def patch_deformable_attention(model: nn.Module) -> int:
    """Put our kernel into every deformable attention of a transformers model.

    Returns:
        How many were replaced.

    Raises:
        ValueError: there is none, or one takes other arguments than the known ones (another version of transformers).
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child).__name__ == _NAME and not isinstance(child, MultiScaleDeformableAttention)
    ]
    if not found:
        raise ValueError(f"patch_deformable_attention: model must have a {_NAME}, got a {type(model).__name__}")
    for _, name, child in found:
        arguments = tuple(inspect.signature(child.forward).parameters)
        if arguments != _ARGUMENTS:
            raise ValueError(
                f"patch_deformable_attention: {name} must take {', '.join(_ARGUMENTS)}, got {', '.join(arguments)}"
            )
    for parent, name, child in found:
        setattr(parent, name, MultiScaleDeformableAttention(child).train(child.training))
    return len(found)


def unpatch_deformable_attention(model: nn.Module) -> int:
    """Put the original modules back.

    Returns:
        How many were replaced.
    """
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, MultiScaleDeformableAttention) and child._original[0] is not None:
                setattr(parent, name, child._original[0])
                count += 1
    return count
