# SPDX-License-Identifier: Apache-2.0
"""Linear layers on the kept tokens of a feature map: gather in, residual scatter out, at the sizes of SViT and ViT-L.

Without the sm_90a unit (``TOKENPRUNE_HOPPER=1`` on a GPU of capability 9.0) the op is a composition of the token ops and
PyTorch's linear, so a gain over ``index_select`` and ``index_add`` comes from them alone.
"""

import torch
import torch.nn.functional as F
from tokenprune_ext import ops

from benchmarks.core import Case, Context, Peer, Prepared

# tokens of the map, kept share, columns in, columns out
SHAPES = {"svit_s_proj": (4200, 0.49, 384, 384), "vit_l_fc2": (4 * 1025, 0.5, 4096, 1024)}


def _layer(context: Context, dtype: torch.dtype, shape: tuple) -> Prepared:
    tokens, keep, channels, width = shape
    generator = torch.Generator().manual_seed(0)
    count = round(tokens * keep)
    long = torch.randperm(tokens, generator=generator)[:count].sort().values.to(context.device)
    short = long.int()

    def random(*size):
        return torch.randn(*size, generator=generator).to(context.device, dtype)

    x, features, bias = random(tokens, channels), random(tokens, width), random(width)
    weight = (random(width, channels) / channels**0.5).to(dtype)
    packed = x[long]

    def ours():
        return ops.gather_linear(x, weight, bias, index=short, features=features, add=True)

    def select_add():
        return features.index_add(0, long, F.linear(x.index_select(0, long), weight, bias))

    def reference():
        rows = F.linear(packed.double().cpu(), weight.double().cpu(), bias.double().cpu())
        return (features.double().cpu().index_add(0, long.cpu(), rows),)

    return Prepared(
        ours=ours,
        peers={
            "index_select, linear, index_add": Peer(select_add),
            "linear on packed rows (no selection)": Peer(lambda: F.linear(packed, weight, bias), same=False),
        },
        flops=2 * count * channels * width,
        bytes=(count * (channels + width) + channels * width + 2 * tokens * width) * x.element_size(),
        plain="index_select, linear, index_add",
        reference=reference,
    )


def cases(context: Context):
    """Cases of the family linear."""
    for dtype in context.dtypes:
        for name, shape in SHAPES.items():
            yield Case(name, dtype, lambda d=dtype, s=shape: _layer(context, d, s))
