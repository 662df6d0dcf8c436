# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention from values, reference points, offsets and logits to the output, and its gradients.

All variants start where the linear layers end, so the peers include the softmax and the arithmetic of the locations.
Points leave the grid of reference points by a normal distribution (in pixels of the level they sample), or lie anywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenprune_ext import ops
from tokenprune_ext.nn import grid_reference_points
from torch import Tensor

from benchmarks.core import Case, Context, Peer, Prepared, Target

EAGER = "grid_sample eager"
EAGER_FLOAT = "grid_sample eager in float32"
CLASSIC = "classic-style kernel (ours, one thread per scalar)"
ANYWHERE = float("inf")


@dataclass(frozen=True)
class Shape:
    """Queries on ``grids`` look at ``levels``; ``spread`` is the standard deviation of the offsets in pixels."""

    name: str
    heads: int
    dim: int
    levels: tuple[tuple[int, int], ...]
    grids: tuple[tuple[int, int], ...]
    batch: int = 1
    spread: float = 2.0
    points: int = 4
    quick: bool = False
    backward: bool = False

    @property
    def tokens(self) -> int:
        """Rows of the values."""
        return sum(h * w for h, w in self.levels)

    @property
    def queries(self) -> int:
        """Queries of one image."""
        return sum(h * w for h, w in self.grids)


PYRAMID, TOKENS = ((100, 168), (50, 84), (25, 42)), ((50, 84),)
DETR = (*PYRAMID, (13, 21))
SHAPES = (
    Shape("injector_s_800x1344", 6, 64, PYRAMID, TOKENS, quick=True, backward=True),
    Shape("injector_s_800x1344_0.5px", 6, 64, PYRAMID, TOKENS, spread=0.5),
    Shape("injector_s_800x1344_anywhere", 6, 64, PYRAMID, TOKENS, spread=ANYWHERE),
    Shape("injector_s_800x1344_b8", 6, 64, PYRAMID, TOKENS, batch=8),
    Shape("extractor_s_800x1344", 6, 64, TOKENS, PYRAMID, quick=True, backward=True),
    Shape("extractor_s_800x1344_0.5px", 6, 64, TOKENS, PYRAMID, spread=0.5),
    Shape("extractor_s_800x1344_anywhere", 6, 64, TOKENS, PYRAMID, spread=ANYWHERE),
    Shape("injector_t_800x1344", 6, 32, PYRAMID, TOKENS),
    Shape("extractor_t_800x1344", 6, 32, TOKENS, PYRAMID),
    Shape("injector_l_512", 16, 64, ((64, 64), (32, 32), (16, 16)), ((32, 32),)),
    Shape("detr_encoder_800x1344", 8, 32, DETR, DETR, quick=True, backward=True),
    Shape("detr_decoder_800x1344", 8, 32, DETR, ((15, 20),)),
)
# (forward, forward + backward) over grid_sample eager on one CPU thread
TARGETS = {
    ("injector_s_800x1344", torch.float32): (30.0, 18.0),
    ("extractor_s_800x1344", torch.float32): (50.0, 30.0),
    ("detr_encoder_800x1344", torch.float32): (35.0, None),
    ("injector_s_800x1344", torch.bfloat16): (60.0, None),
    ("extractor_s_800x1344", torch.bfloat16): (90.0, None),
}


@dataclass(frozen=True)
class Inputs:
    """What the linear layers give."""

    shape: Shape
    value: Tensor  # [B, S, M, D]
    reference: Tensor  # [1, Q, 1, 2] float32
    offsets: Tensor  # [B, Q, M, L, P, 2]
    logits: Tensor  # [B, Q, M, L * P]

    def to(self, dtype: torch.dtype) -> "Inputs":
        """All in one dtype, references at least in float32."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return Inputs(
            self.shape, self.value.to(dtype), self.reference.to(wide), self.offsets.to(dtype), self.logits.to(dtype)
        )

    def leaves(self) -> "Inputs":
        """Copies that receive gradients."""
        value, offsets, logits = (t.clone().requires_grad_() for t in (self.value, self.offsets, self.logits))
        return Inputs(self.shape, value, self.reference, offsets, logits)

    @property
    def differentiable(self) -> tuple[Tensor, ...]:
        """The tensors that gradients are taken of."""
        return self.value, self.offsets, self.logits


def _inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Inputs:
    rng = torch.Generator().manual_seed(shape.queries)
    levels, lead = len(shape.levels), (shape.batch, shape.queries, shape.heads)
    value = torch.randn(shape.batch, shape.tokens, shape.heads, shape.dim, generator=rng)
    reference = grid_reference_points(shape.grids)
    size = _size(shape.levels, reference)
    if shape.spread == ANYWHERE:
        pixel = torch.rand(*lead, levels, shape.points, 2, generator=rng) * size - 0.5
    else:
        moved = shape.spread * torch.randn(*lead, levels, shape.points, 2, generator=rng)
        pixel = reference[:, :, None, :, None] * size - 0.5 + moved
    # Off the pixel edges, where the derivative jumps and round-off would decide.
    pixel = pixel.floor() + (pixel - pixel.floor()).clamp(0.01, 0.99)
    offsets = pixel + 0.5 - reference[:, :, None, :, None] * size
    logits = torch.randn(*lead, levels * shape.points, generator=rng)
    return Inputs(
        shape, value.to(device, dtype), reference.to(device), offsets.to(device, dtype), logits.to(device, dtype)
    )


def _size(levels, like: Tensor) -> Tensor:
    return like.new_tensor([[w, h] for h, w in levels]).view(-1, 1, 2)


# ---------------------------------------------------------------- variants


def points_of(x: Inputs) -> tuple[Tensor, Tensor]:
    """Locations (in the dtype of the references) and attention weights, in eager PyTorch."""
    size = _size(x.shape.levels, x.reference)
    locations = x.reference[:, :, None, :, None] + x.offsets / size
    weights = x.logits.softmax(-1).unflatten(-1, (len(x.shape.levels), x.shape.points))
    return locations, weights


def sample_eager(value: Tensor, levels, locations: Tensor, weights: Tensor) -> Tensor:
    """The formulation with one ``grid_sample`` per level that detectors fall back to, written from the definition."""
    batch, _, heads, dim = value.shape
    queries = locations.shape[1]
    grids = 2 * locations.transpose(1, 2).flatten(0, 1) - 1  # [B * M, Q, L, P, 2]
    sampled = []
    for level, rows in enumerate(value.split([h * w for h, w in levels], 1)):
        image = rows.permute(0, 2, 3, 1).reshape(batch * heads, dim, *levels[level])
        if value.dtype != torch.float32:
            image = image.contiguous()  # torch's grid_sample overruns strided half-precision maps of this size
        sampled.append(F.grid_sample(image, grids[:, :, level].to(value.dtype), align_corners=False))
    weights = weights.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
    mixed = (torch.stack(sampled, -2).flatten(-2) * weights).sum(-1)
    return mixed.view(batch, heads * dim, queries).transpose(1, 2).contiguous()


def _ours(x: Inputs) -> Tensor:
    return ops.ms_deform_attn_fused(x.value, x.shape.levels, None, x.reference, x.offsets, x.logits)


def _eager(x: Inputs) -> Tensor:
    return sample_eager(x.value, x.shape.levels, *points_of(x))


def _eager_float(x: Inputs) -> Tensor:
    return _eager(x.to(torch.float32)).to(x.value.dtype)


def _tensors(levels, device) -> tuple[Tensor, Tensor]:
    shapes = torch.tensor(levels, device=device)
    return shapes, shapes.prod(1).cumsum(0) - shapes.prod(1)


def _transformers(x: Inputs) -> Callable[[Inputs], Tensor]:
    shapes, starts = _tensors(x.shape.levels, x.value.device)

    def run(x: Inputs) -> Tensor:
        from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

        locations, weights = points_of(x)
        locations = locations.to(x.value.dtype)
        module = MultiScaleDeformableAttention()
        return module(x.value, shapes, list(x.shape.levels), starts, locations, weights, 64)

    return run


def _deformops(x: Inputs) -> Callable[[Inputs], Tensor]:
    shapes, starts = _tensors(x.shape.levels, x.value.device)

    def run(x: Inputs) -> Tensor:
        from deformops.registry import msda

        locations, weights = points_of(x)
        return msda(x.value, shapes, starts, locations, weights)

    return run


@cache
def _classic_library() -> None:
    """Compiles benchmarks/classic_msda.cu at run time."""
    from torch.utils.cpp_extension import load

    load(
        "classic_msda",
        [str(Path(__file__).parents[1] / "classic_msda.cu")],
        extra_cuda_cflags=["-O3", "-std=c++20", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"],
        is_python_module=False,
    )


class _ClassicFunction(torch.autograd.Function):
    """Both kernels, in float32 as the original op runs them."""

    @staticmethod
    def forward(ctx, value, shapes, starts, locations, weights):
        ctx.save_for_backward(value, shapes, starts, locations, weights)
        return torch.ops.classic_msda.forward(value, shapes, starts, locations, weights)

    @staticmethod
    def backward(ctx, grad):
        grads = torch.ops.classic_msda.backward(*ctx.saved_tensors, grad.contiguous())
        return grads[0], None, None, grads[1], grads[2]


def _classic(x: Inputs) -> Callable[[Inputs], Tensor]:
    shapes, starts = _tensors(x.shape.levels, x.value.device)

    def run(x: Inputs) -> Tensor:
        _classic_library()
        locations, weights = points_of(x)
        tensors = (t.float().contiguous() for t in (x.value, locations, weights))
        value, locations, weights = tensors
        return _ClassicFunction.apply(value, shapes, starts, locations, weights).to(x.value.dtype)

    return run


# ---------------------------------------------------------------- cases


def _with_gradients(function: Callable[[Inputs], Tensor], x: Inputs, grad: Tensor) -> Callable[[], tuple]:
    with torch.inference_mode(False):
        leaves, grad = x.leaves(), grad.clone()

    def run() -> tuple[Tensor, ...]:
        with torch.inference_mode(False), torch.enable_grad():
            out = function(leaves)
            return out.detach(), *torch.autograd.grad(out, leaves.differentiable, grad)

    return run


def _without(function: Callable[[Inputs], Tensor], x: Inputs) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return function(x)

    return run


@torch.inference_mode(False)  # tensors of inference mode cannot be saved for a backward
def _prepare(context: Context, shape: Shape, dtype: torch.dtype, backward: bool) -> Prepared:
    x = _inputs(shape, dtype, context.device)
    grad = torch.randn(shape.batch, shape.queries, shape.heads * shape.dim).to(context.device, dtype)

    def variant(function: Callable[[Inputs], Tensor]) -> Callable[[], object]:
        return _with_gradients(function, x, grad) if backward else _without(function, x)

    def reference() -> tuple[Tensor, ...]:
        wide = x.to(torch.float64)
        run = _with_gradients(_eager, wide, grad.double()) if backward else _without(_eager, wide)
        out = run()
        return out if backward else (out,)

    # Locations in half precision miss by tenths of a pixel: such peers are shown, but give other outputs.
    exact = dtype == torch.float32
    peers = {
        EAGER: Peer(variant(_eager), same=exact),
        "torch.compile of it": Peer(variant(torch.compile(_eager, dynamic=False)), same=exact, slow=True),
        "transformers": Peer(variant(_transformers(x)), same=exact),
        "deformops": Peer(variant(_deformops(x)), same=exact),
        "copy of value": Peer(lambda: x.value.clone(), same=False),
    }
    if not exact:
        peers[EAGER_FLOAT] = Peer(variant(_eager_float))
        if context.device.type == "cpu":
            del peers["transformers"]  # its strided half-precision maps end the process (see sample_eager)
    if context.device.type == "cuda":
        peers[CLASSIC] = Peer(variant(_classic(x)))
    samples = x.logits.numel() * shape.dim
    traffic = sum(t.numel() * t.element_size() for t in (x.value, x.offsets, x.logits, grad))
    ratio = TARGETS.get((shape.name, dtype), (None, None))[backward] if context.device.type == "cpu" else None
    targets = [Target(EAGER, ratio)]
    if context.device.type == "cuda":
        targets = [Target(CLASSIC, 3.0 if backward else 4.0), Target(EAGER, None if backward else 15.0)]
    return Prepared(
        ours=variant(_ours),
        peers=peers,
        flops=(24 if backward else 8) * samples,
        bytes=(3 if backward else 1) * traffic,
        targets=tuple(targets),
        plain=EAGER if exact else EAGER_FLOAT,
        reference=reference,
    )


def cases(context: Context):
    """Cases of the family deform."""
    for dtype in context.dtypes:
        for shape in SHAPES:
            if context.quick and not shape.quick:
                continue
            case = f"{shape.name}_d{shape.dim}"
            yield Case(case, dtype, lambda d=dtype, s=shape: _prepare(context, s, d, False))
            if shape.backward and dtype == torch.float32:
                yield Case(f"{case}_fwd_bwd", dtype, lambda d=dtype, s=shape: _prepare(context, s, d, True))
