# SPDX-License-Identifier: Apache-2.0
"""LV-ViT (Jiang et al., "All Tokens Matter", arXiv 2104.10858): convolutional stem, scaled branches, labelled tokens."""

from collections.abc import Callable
from functools import partial

import torch
from timm.layers import LayerNorm, PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..nn import TokenState, row_positions, sequence_of_row
from ..ops import gather_tokens, select_tokens
from ._base import check_options, register
from .deit import evaluation_setting

__all__ = ["SIZES", "LVViT"]

# width, heads, depth
SIZES = {"s": (384, 6, 16), "m": (512, 8, 20)}
_AUX_WEIGHT = 0.5


class ConvStem(nn.Module):
    """The "4_2" stem: three 3x3-or-larger convolutions at half resolution, then non-overlapping patches.

    Args:
        img_size: input size, divisible by ``patch_size``; others are refused.
        patch_size: side of a patch in the image, even.
        in_chans, embed_dim: channels in and out.
        bias: of the patch projection. dynamic_img_pad: must be False.
        hidden: channels of the convolutions.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        hidden: int = 64,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        if patch_size % 2 or any(side % patch_size for side in size) or dynamic_img_pad:
            raise ValueError(f"ConvStem: img_size must be divisible by an even patch_size, got {size} and {patch_size}")
        self.img_size, self.patch_size = size, (patch_size, patch_size)
        self.grid_size = (size[0] // patch_size, size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        made = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, hidden, 7, stride=2, padding=3, bias=False, **made)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False, **made)
        self.conv3 = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False, **made)
        self.bn1, self.bn2, self.bn3 = (nn.BatchNorm2d(hidden, **made) for _ in range(3))
        half = patch_size // 2
        self.proj = nn.Conv2d(hidden, embed_dim, half, stride=half, bias=bias, **made)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` -> tokens ``[B, n, D]``, row by row."""
        if tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(f"ConvStem: images must be {self.img_size}, got {tuple(x.shape[-2:])}")
        for conv, norm in ((self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)):
            x = norm(conv(x)).relu()
        return self.proj(x).flatten(2).transpose(1, 2)


class BranchScale(nn.Module):
    """Multiplies a branch by a constant, where other transformers have LayerScale."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """``x * factor``."""
        return x * self.factor

    def extra_repr(self) -> str:
        """Shown in the model's printout."""
        return f"factor={self.factor}"


class LVViT(VisionTransformer):
    """LV-ViT: in every block ``x + drop_path(branch(norm(x))) / skip_lam``, and a second classifier on every patch.

    Evaluation adds half of the largest patch logit of each class to the class token's logits; training gives those of
    the class token alone (the patches' own are :meth:`aux_logits`).

    Args:
        img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, num_classes: as in
            :func:`tokenprune_ext.models.deit.deit`.
        stem: ``"4_2"`` (:class:`ConvStem`), or ``"naive"``: one convolution per patch.
        skip_lam: divisor of the branches.
        drop_path_rate: stochastic depth of the last block, on both branches; it rises linearly from 0 at the first.
        block_eps: eps of all LayerNorms.
        qkv_bias: bias of the projection to queries, keys and values.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        *,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        num_classes: int = 1000,
        stem: str = "4_2",
        skip_lam: float = 2.0,
        drop_path_rate: float = 0.0,
        block_eps: float = 1e-5,
        qkv_bias: bool = False,
        device=None,
        dtype: torch.dtype | None = None,
    ):
        stems: dict[str, Callable] = {"4_2": ConvStem, "naive": PatchEmbed}
        if stem not in stems:
            raise ValueError(f"LVViT: stem must be one of {sorted(stems)}, got {stem!r}")
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            num_classes=num_classes,
            drop_path_rate=drop_path_rate,
            norm_layer=partial(LayerNorm, eps=block_eps),
            embed_layer=stems[stem],
            device=device,
            dtype=dtype,
        )
        if skip_lam != 1:
            for block in self.blocks:
                block.ls1, block.ls2 = BranchScale(1 / skip_lam), BranchScale(1 / skip_lam)
        self.aux_head = nn.Linear(embed_dim, num_classes, device=device, dtype=dtype)
        nn.init.trunc_normal_(self.aux_head.weight, std=0.02)
        nn.init.zeros_(self.aux_head.bias)
        self.pretrained_cfg = self.default_cfg = evaluation_setting(self)

    def aux_logits(self, x: Tensor) -> Tensor:
        """Logits of patch tokens behind the last norm: ``[..., C] -> [..., classes]``."""
        return self.aux_head(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens ``[B, 1 + n, C]`` behind the last norm -> logits ``[B, classes]`` (or the class token)."""
        if pre_logits:
            return x[:, 0]
        logits = self.head(x[:, 0])
        return logits if self.training else logits + _AUX_WEIGHT * self.aux_logits(x[:, 1:]).amax(1)

    def forward_tokens(self, x: Tensor, state: TokenState) -> Tensor:
        """As :meth:`forward_head`, for reduced tokens.

        The largest patch logit is taken over the patch tokens that are there: of gathered tokens over the kept ones, of
        masked tokens over all (as the published evaluation does). An image without any has none to add.

        Args:
            x: ``[B, N, C]`` or ``[T, C]``, behind the last norm.
            state: of the tokens.
        """
        if not state.packed:
            tokens = x.shape[1] if state.grid is None else state.num_prefix + state.grid[0] * state.grid[1]
            return self.forward_head(x[:, :tokens])  # made tokens lie behind the patches
        logits = self.head(x[state.cu_seqlens[:-1].long()])
        if self.training:
            return logits
        if state.index is None:
            patch = row_positions(state.cu_seqlens, x.shape[0]) >= state.num_prefix
        else:
            patch = state.index >= 0
        rows = select_tokens(patch[None])
        aux = self.aux_logits(gather_tokens(x, rows))
        owner = sequence_of_row(state.cu_seqlens, x.shape[0])[rows.indices.long()]
        best = torch.full_like(logits, -torch.inf)
        best = best.scatter_reduce(0, owner[:, None].expand_as(aux), aux, "amax")
        return logits + _AUX_WEIGHT * torch.where(best == -torch.inf, 0, best)


def _register(size):
    name = f"lvvit_{size}"
    width, heads, depth = SIZES[size]

    def build(**options):
        check_options(name, options, LVViT)
        return LVViT(**{"embed_dim": width, "num_heads": heads, "depth": depth} | options)

    build.__doc__ = f"LV-ViT-{size.upper()}. Options: those of :class:`LVViT`."
    build.__module__ = __name__
    register(name)(build)


for _size in SIZES:
    _register(_size)
