# SPDX-License-Identifier: Apache-2.0
"""Token clustering and reconstruction of the Expedit models: the whole five iterations, the whole k = 20 reconstruction.

The opponents give the same outputs: k-means over dense masks, and dense weights with ``topk``, as the paper writes them.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenprune_ext import ops
from torch import Tensor

from benchmarks.core import Case, Context, Peer, Prepared, Target

ITERS, WINDOW, K = 5, 5, 20
TEMPERATURE = 0.02  # of the published dense models; the time does not depend on it
DENSE, COMPILED = "dense masked k-means in eager PyTorch", "torch.compile of it"
TOPK = "dense weights and top-k in eager PyTorch"


@dataclass(frozen=True)
class Shape:
    """A square map of ``side`` tokens and ``cells`` centers per axis."""

    name: str
    side: int
    cells: int
    channels: int
    cluster: tuple[float, float] | None = None  # targets on the CPU in float32 and bfloat16
    reconstruct: tuple[float, float] | None = None
    batch: int = 1
    quick: bool = False


SHAPES = (
    Shape("vit_l_512_32x32_to_16x16_c1024", 32, 16, 1024, (22.0, 10.0), (4.0, 3.0), quick=True),
    Shape("vit_l_512_32x32_to_23x23_c1024", 32, 23, 1024, (18.0, 10.0), (4.0, 3.0)),
    Shape("vit_h_518_37x37_to_26x26_c1280", 37, 26, 1280),
    Shape("segmenter_l_640_40x40_to_28x28_c1024", 40, 28, 1024),
    Shape("vit_l_512_32x32_to_16x16_c1024_b8", 32, 16, 1024, batch=8),
)


def _mask(size: int, cells: int, device: torch.device) -> Tensor:
    """Which centers do not see which tokens, [cells^2, size^2]."""
    scale = torch.tensor(cells, dtype=torch.float32) / size
    home = (torch.arange(size, dtype=torch.float32) * scale).long().to(device)
    far = (torch.arange(cells, device=device)[:, None] - home).abs() > WINDOW // 2
    return (far[:, None, :, None] | far[None, :, None, :]).reshape(cells * cells, size * size)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    return a.square().sum(-1)[..., None] + b.square().sum(-1)[:, None] - 2 * (a @ b.transpose(1, 2))


def dense_cluster(x: Tensor, size: int, cells: int) -> Tensor:
    """Windowed soft k-means in eager PyTorch, written from the paper (arXiv 2210.01035, section 3.2)."""
    batch, _, channels = x.shape
    far = _mask(size, cells, x.device)
    centers = F.adaptive_avg_pool2d(x.transpose(1, 2).reshape(batch, channels, size, size), cells)
    centers = centers.flatten(2).transpose(1, 2)
    for _ in range(ITERS):
        logits = -TEMPERATURE * _distances(centers, x)
        affinity = logits.masked_fill(far, -math.inf).softmax(1)
        centers = (affinity @ x) / affinity.sum(2, keepdim=True).clamp(min=1e-16)
    return centers


def dense_reconstruct(features: Tensor, centers: Tensor, values: Tensor) -> Tensor:
    """Reconstruction from the k nearest centers in eager PyTorch, written from the paper (section 3.3)."""
    weights = torch.exp(-TEMPERATURE * _distances(features, centers))
    kth = weights.topk(K, dim=-1).values[..., -1:]
    weights = torch.where(weights >= kth, weights, 0)
    return (weights / torch.linalg.vector_norm(weights, dim=-1, keepdim=True).clamp(min=1e-12)) @ values


def _features(context: Context, dtype: torch.dtype, shape: Shape) -> Tensor:
    """A smooth map with noise: neighbours resemble each other, as in a network."""
    generator = torch.Generator().manual_seed(shape.side + shape.cells)
    coarse = torch.randn(shape.batch, shape.channels, shape.side // 4, shape.side // 4, generator=generator)
    smooth = F.interpolate(coarse, size=(shape.side, shape.side), mode="bilinear")
    noise = torch.randn(smooth.shape, generator=generator)
    return (0.65 * smooth + 0.1 * noise).flatten(2).transpose(1, 2).contiguous().to(context.device, dtype)


def _targets(context: Context, dtype: torch.dtype, peer: str, ratios) -> tuple[Target, ...]:
    if context.device.type != "cpu" or ratios is None:
        return (Target(peer),)
    return (Target(peer, ratios[0] if dtype == torch.float32 else ratios[1]),)


def _cluster(context: Context, dtype: torch.dtype, shape: Shape) -> Prepared:
    x = _features(context, dtype, shape)
    grid, clusters = (shape.side, shape.side), (shape.cells, shape.cells)
    tokens, centers = shape.side**2, shape.cells**2
    compiled = torch.compile(dense_cluster, dynamic=False)
    return Prepared(
        ours=lambda: ops.cluster_tokens(x, grid, clusters, iters=ITERS, temperature=TEMPERATURE, window=WINDOW),
        peers={
            DENSE: Peer(lambda: dense_cluster(x, shape.side, shape.cells)),
            COMPILED: Peer(lambda: compiled(x, shape.side, shape.cells), slow=True),
            "adaptive pooling only": Peer(lambda: ops.cluster_tokens(x, grid, clusters, iters=0), same=False),
        },
        plain=DENSE,
        flops=4 * shape.batch * tokens * WINDOW**2 * shape.channels * ITERS,
        bytes=shape.batch * (tokens + centers) * shape.channels * x.element_size(),
        targets=_targets(context, dtype, DENSE, shape.cluster),
        reference=lambda: (dense_cluster(x.double().cpu(), shape.side, shape.cells),),
    )


def _reconstruct_inputs(context: Context, dtype: torch.dtype, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    x = _features(context, dtype, shape)
    centers = ops.cluster_tokens(x, (shape.side, shape.side), (shape.cells, shape.cells), iters=1)
    generator = torch.Generator().manual_seed(shape.cells)
    return x, centers, torch.randn(centers.shape, generator=generator).to(context.device, dtype)


def _reconstruct(context: Context, dtype: torch.dtype, shape: Shape) -> Prepared:
    x, centers, values = _reconstruct_inputs(context, dtype, shape)
    compiled = torch.compile(dense_reconstruct, dynamic=False)
    tokens, count = shape.side**2, shape.cells**2
    return Prepared(
        ours=lambda: ops.reconstruct_tokens(x, centers, values, k=K, temperature=TEMPERATURE),
        peers={
            TOPK: Peer(lambda: dense_reconstruct(x, centers, values)),
            COMPILED: Peer(lambda: compiled(x, centers, values), slow=True),
        },
        plain=TOPK,
        flops=2 * shape.batch * tokens * shape.channels * (count + K),
        bytes=shape.batch * (2 * tokens + 2 * count) * shape.channels * x.element_size(),
        targets=_targets(context, dtype, TOPK, shape.reconstruct),
        reference=lambda: (dense_reconstruct(*(t.double().cpu() for t in (x, centers, values))),),
    )


def _training(context: Context, dtype: torch.dtype, shape: Shape) -> Prepared:
    """Forward and backward of the reconstruction."""
    with torch.inference_mode(False):  # which the runner sets for everything
        leaves = [t.clone().requires_grad_() for t in _reconstruct_inputs(context, dtype, shape)]
    weight = torch.randn(shape.batch, shape.side**2, shape.channels, generator=torch.Generator().manual_seed(1))
    weight = weight.to(context.device, dtype)

    def gradients(function, tensors, upstream):
        with torch.inference_mode(False), torch.enable_grad():
            return torch.autograd.grad(function(*tensors), tensors, upstream)

    def reference():
        with torch.inference_mode(False):
            tensors = [t.detach().double().cpu().requires_grad_() for t in leaves]
        return gradients(dense_reconstruct, tensors, weight.double().cpu())

    tokens, count = shape.side**2, shape.cells**2
    return Prepared(
        ours=lambda: gradients(lambda *t: ops.reconstruct_tokens(*t, k=K, temperature=TEMPERATURE), leaves, weight),
        peers={TOPK: Peer(lambda: gradients(dense_reconstruct, leaves, weight))},
        plain=TOPK,
        flops=2 * shape.batch * tokens * shape.channels * (2 * count + 5 * K),
        bytes=shape.batch * (4 * tokens + 4 * count) * shape.channels * leaves[0].element_size(),
        targets=(Target(TOPK),),
        reference=reference,
    )


def cases(context: Context):
    """Cases of the family cluster."""
    shapes = [s for s in SHAPES if s.quick or not context.quick]
    for dtype in context.dtypes:
        for shape in shapes:
            yield Case(f"cluster_{shape.name}", dtype, lambda d=dtype, s=shape: _cluster(context, d, s))
            yield Case(f"reconstruct_{shape.name}", dtype, lambda d=dtype, s=shape: _reconstruct(context, d, s))
        yield Case(f"reconstruct_train_{shapes[0].name}", dtype, lambda d=dtype, s=shapes[0]: _training(context, d, s))
