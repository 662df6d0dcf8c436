# SPDX-License-Identifier: Apache-2.0
"""How the vision towers of transformers are laid out (release 5.23): one class per family, one line per layer class."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from ..nn import AttentionBranch, BlockParts, MlpBranch, PairBias, Rotary, TokenState


class Layer(NamedTuple):
    """Names of the parts of a layer and of its attention."""

    attention: str
    norm1: str
    norm2: str
    out: str = "o_proj"
    logit_scale: str = "scaling"
    attn_drop: str = "attention_dropout"
    scales: tuple[str, str] | None = None  # LayerScale modules (their ``lambda1``), or parameters


_NORMED = Layer("attention", "layernorm_before", "layernorm_after")
_SCALED = Layer("attention", "norm1", "norm2", scales=("layer_scale1", "layer_scale2"))
_CLIP = Layer("self_attn", "layer_norm1", "layer_norm2", out="out_proj", logit_scale="scale", attn_drop="dropout")

LAYERS = {
    "ViTLayer": _NORMED,
    "DeiTLayer": _NORMED,
    "BeitLayer": _NORMED._replace(scales=("lambda_1", "lambda_2")),
    "Dinov2Layer": _SCALED,
    "Dinov2WithRegistersLayer": _SCALED,
    "DINOv3ViTLayer": _SCALED._replace(attn_drop="dropout"),
    "CLIPEncoderLayer": _CLIP,
    "SiglipEncoderLayer": _CLIP,
}


@dataclass(frozen=True)
class Places:
    """What the layers of one forward pass are told of the tokens' places.

    Attributes:
        arguments: keyword arguments that a layer itself takes.
        first: the state in front of the first layer, where places matter to the attention.
        rotary: rotates queries and keys.
        bias: ``layer -> [1, H, N, N]``, the bias of every pair.
    """

    arguments: dict = field(default_factory=dict)
    first: TokenState | None = None
    rotary: Rotary | None = None
    bias: Callable[[nn.Module], Tensor] | None = None


class Tower:
    """A vision transformer with a class token, a norm behind the last layer, and a pooler that may be None."""

    arguments = ("pixel_values", "bool_masked_pos", "interpolate_pos_encoding", "attention_mask")
    options = ("bool_masked_pos", "interpolate_pos_encoding")  # of the embeddings
    distilled = rotary = False

    def layers(self, model: nn.Module) -> nn.ModuleList:
        """The layers in their order."""
        return model.layers

    def prefix(self, model: nn.Module) -> int:
        """Tokens in front of the patches."""
        return 1

    def pooling(self, model: nn.Module) -> str:
        """What ``pooler_output`` is made of."""
        return "token"

    def pair_bias(self, model: nn.Module) -> bool:
        """Whether there is a bias for every pair of tokens."""
        return False

    def embed(self, model: nn.Module, images: Tensor, options: dict) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Images as the model reads them, tokens in front of the layers, and the grid of the patches."""
        images = images.to(next(model.embeddings.patch_embeddings.parameters()).dtype)
        return images, model.embeddings(images, **options), _grid(model, images)

    def places(self, model: nn.Module, images: Tensor, first: TokenState, options: dict, keep: bool) -> Places:
        """What the layers are told."""
        return Places({"attention_mask": None})

    def norm(self, model: nn.Module, x: Tensor) -> Tensor:
        """``last_hidden_state`` of the last layer's tokens."""
        return model.layernorm(x)

    def pool(self, model: nn.Module, x: Tensor) -> Tensor | None:
        """``pooler_output`` of ``last_hidden_state``."""
        return None if model.pooler is None else model.pooler(x)


class _DeiT(Tower):
    distilled = True

    def prefix(self, model):
        return 2


class _Dinov2(Tower):
    arguments = ("pixel_values", "bool_masked_pos", "attention_mask")
    options = ("bool_masked_pos",)

    def layers(self, model):
        return model.encoder.layer

    def prefix(self, model):
        return 1 + getattr(model.config, "num_register_tokens", 0)

    def pool(self, model, x):
        return x[:, 0]


class _Dinov3(_Dinov2):
    arguments = ("pixel_values", "bool_masked_pos")
    rotary = True

    def layers(self, model):
        return model.model.layer

    def places(self, model, images, first, options, keep):
        cos, sin = model.rope_embeddings(images)
        rotary = Rotary(sin, cos, first, half=True, keep=keep)
        return Places({"attention_mask": None, "position_embeddings": (cos, sin)}, first, rotary)

    def norm(self, model, x):
        return model.norm(x)


class _Clip(Tower):
    arguments = ("pixel_values", "interpolate_pos_encoding")
    options = ("interpolate_pos_encoding",)

    def layers(self, model):
        return model.encoder.layers

    def embed(self, model, images, options):
        x = model.embeddings(images, **options)
        return images, model.pre_layrnorm(x), _grid(model, images)

    def norm(self, model, x):
        return x

    def pool(self, model, x):
        return model.post_layernorm(x[:, 0])


class _Siglip(_Clip):
    def prefix(self, model):
        return 0

    def pooling(self, model):
        return "map" if model.use_head else "none"

    def embed(self, model, images, options):
        return images, model.embeddings(images, **options), _grid(model, images)

    def norm(self, model, x):
        return model.post_layernorm(x)

    def pool(self, model, x):
        return model.head(x) if model.use_head else None


class _Beit(Tower):
    options = ("bool_masked_pos",)

    def pooling(self, model):
        return "avg" if model.config.use_mean_pooling else "token"

    def pair_bias(self, model):
        return model.shared_position_bias is not None or model.layers[0].relative_position_bias is not None

    def places(self, model, images, first, options, keep):
        size, tokens = tuple(images.shape[2:]), first.num_prefix + first.grid[0] * first.grid[1]
        stretch = options.get("interpolate_pos_encoding", False)
        shared = model.shared_position_bias
        if shared is not None:
            shared = shared(first.grid, interpolate_pos_encoding=stretch, dim_size=tokens)
        own = {"attention_mask": shared, "interpolate_pos_encoding": stretch, "resolution": size}
        if not self.pair_bias(model):
            return Places(own)

        def bias(layer):
            if layer.relative_position_bias is None:
                return shared
            made = layer.relative_position_bias(first.grid, stretch, dim_size=tokens)
            return made if shared is None else made + shared

        return Places(own, first, bias=bias)


FAMILIES = {
    "ViTModel": Tower(),
    "DeiTModel": _DeiT(),
    "Dinov2Model": _Dinov2(),
    "Dinov2WithRegistersModel": _Dinov2(),
    "DINOv3ViTModel": _Dinov3(),
    "CLIPVisionModel": _Clip(),
    "SiglipVisionModel": _Siglip(),
    "BeitModel": _Beit(),
}


def layer_parts(layer: nn.Module, places: Places, saving: bool) -> BlockParts:
    """A layer as branches over its own submodules.

    Args:
        layer: one of ``LAYERS``.
        places: of this forward pass.
        saving: gradient checkpointing, which the layer would do a second time: its branches run instead.
    """
    names, own = LAYERS[type(layer).__name__], layer._modules  # plain dictionaries: this runs at every forward
    attn = own[names.attention]
    inner, mlp = attn._modules, own["mlp"]
    scales = (None, None) if names.scales is None else [_scale(layer, name) for name in names.scales]
    dropout, drop_path = own.get("dropout"), own.get("drop_path")
    if dropout is not None and dropout.training and dropout.p > 0:
        mlp = partial(_dropped, mlp, dropout)
    pair_bias = None if places.bias is None else PairBias(partial(places.bias, layer), places.first)
    attention = AttentionBranch(
        own[names.norm1],
        (inner["q_proj"], inner["k_proj"], inner["v_proj"]),
        inner[names.out],
        num_heads=inner["q_proj"].out_features // attn.head_dim,
        head_dim=attn.head_dim,
        scale=getattr(attn, names.logit_scale),
        rotary=places.rotary,
        pair_bias=pair_bias,
        proj_drop=dropout,
        attn_drop=getattr(attn, names.attn_drop) if attn.training else 0.0,
        layer_scale=scales[0],
        drop_path=drop_path,
    )
    branch = MlpBranch(own[names.norm2], mlp, layer_scale=scales[1], drop_path=drop_path)
    original = None if saving else partial(layer, **places.arguments)
    return BlockParts(attention, branch, original, None if places.first is None else places.first.index)


def _dropped(mlp, dropout, z):
    return dropout(mlp(z))


def _scale(layer, name):
    scale = getattr(layer, name)
    if isinstance(scale, nn.Module):
        return scale.lambda1
    return scale if isinstance(scale, Tensor) else None  # 1.0 where there is none


def _grid(model, images):
    """Rows and columns of patches."""
    patch = model.config.patch_size
    high, wide = (patch, patch) if isinstance(patch, int) else patch
    return images.shape[2] // high, images.shape[3] // wide
