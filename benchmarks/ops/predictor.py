# SPDX-License-Identifier: Apache-2.0
"""Token predictors of DynamicViT-S and SPViT-S on the patches of an image of 224 pixels, from packed weights in one call."""

import copy

import torch
from tokenprune_ext import ops
from tokenprune_ext.reducers._predictors import HeadSelector, ImageMean, TokenPredictor

from benchmarks.core import Case, Context, Peer, Prepared, Target

TOKENS, CHANNELS, HEADS = 196, 384, 6
EAGER, COMPILED = "its layers in eager PyTorch", "torch.compile of them"


def _predictor(context: Context, dtype: torch.dtype, heads: int) -> Prepared:
    torch.manual_seed(0)
    module = TokenPredictor(CHANNELS) if heads == 1 else HeadSelector(CHANNELS, heads)
    module = module.to(dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, TOKENS, CHANNELS, generator=generator).to(dtype)
    linear = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    layers, norm = [(ops.pack_linear(layer.weight), layer.bias) for layer in linear], module.in_conv[0]

    def eager():
        return module(x, ImageMean())[0]

    def ours():
        return ops.packed_predictor(
            x,
            layers[:4],
            norm=(norm.weight, norm.bias, norm.eps),
            num_heads=heads,
            weigher=layers[4:] or None,
        )[0]

    weights = sum(layer.weight.numel() for layer in linear)
    weigher = sum(layer.weight.numel() for layer in linear[4:])
    return Prepared(
        ours=ours,
        peers={EAGER: Peer(eager), COMPILED: Peer(torch.compile(eager, dynamic=False), slow=True)},
        flops=2 * TOKENS * (heads * (weights - weigher) + weigher),
        bytes=(weights + x.numel()) * x.element_size() + 16 * TOKENS,
        targets=(Target(EAGER), Target(COMPILED)),
        reference=lambda: (copy.deepcopy(module).double()(x.double(), ImageMean())[0],),
    )


def cases(context: Context):
    """Cases of the family predictor."""
    if context.device.type == "cpu":
        for dtype in context.dtypes:
            for name, heads in (("dynamicvit", 1), ("spvit", HEADS)):
                yield Case(f"{name}_deit_s_n{TOKENS}", dtype, lambda d=dtype, h=heads: _predictor(context, d, h))
