# SPDX-License-Identifier: Apache-2.0
"""Token clustering and reconstruction, from Expediting Large-Scale Vision Transformers (arXiv 2210.01035).

Clustering is a soft k-means of a token map whose centers lie on a coarser grid and see only the tokens near them.
Reconstruction gives every original token a weighted mean of the (refined) centers nearest to it.
"""

import math

import torch
from torch import Tensor

from ._register import call, check, check_floating, check_index, register, stat_dtype
from .tokens import gather_tokens

__all__ = ["cluster_tokens", "nearest_centers", "reconstruct_tokens", "unpool_tokens"]

_NORMS = ("l2", "l1")
_MASS_FLOOR, _NORM_FLOOR = 1e-16, 1e-12


# ---------------------------------------------------------------- public functions


def cluster_tokens(
    x: Tensor,
    grid: tuple[int, int],
    clusters: int | tuple[int, int],
    *,
    iters: int = 5,
    temperature: float = 1.0,
    window: int = 5,
    return_labels: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Soft k-means of a token map to a grid of centers (section 3.2 of the paper).

    The centers start as the adaptive average pooling of the map. In every iteration a token spreads over the centers
    within ``window // 2`` cells of its home cell (nearest neighbour, in float32), with the softmax of ``-temperature *
    squared distance``; a center becomes the mean of its tokens weighted so. A center that (almost) no token chose
    becomes zero. Distances, weights and sums are float32 (float64 for float64 inputs) in every dtype, also under
    autocast, which changes nothing here.

    Gradients flow through the last weighted mean only, as in the original: the weights are constants. With ``iters=0``
    they are those of the pooling.

    Args:
        x: ``[B, H * W, C]``, row-major; float32, float64, float16 or bfloat16.
        grid: ``(H, W)`` of the tokens.
        clusters: ``(h, w)`` of the centers, or a square number of them. More centers than tokens are legal.
        iters: iterations; 0 returns the pooled map.
        temperature: multiplies the squared distances (the published dense models use 0.02).
        window: odd width, in cells, of what a token sees.
        return_labels: also return the nearest of all centers for every token.

    Returns:
        Centers ``[B, h * w, C]``, row-major, in the dtype of ``x``; with ``return_labels`` also int64 labels
        ``[B, H * W]`` (of equally near centers the first).

    Raises:
        ValueError: ``x`` is not of ``H * W`` tokens, ``clusters`` is not square or below 1, ``iters`` is negative,
            ``window`` even or below 1, ``temperature`` not positive and finite.
        TypeError: ``x`` is not a floating tensor.
    """
    op = "cluster_tokens"
    check_floating(op, x=x)
    check(x.dim() == 3, op, "x", "have shape [B, N, C]", tuple(x.shape))
    height, width = _pair(op, "grid", grid, 0)
    rows, cols = _pair(op, "clusters", _square(op, clusters) if isinstance(clusters, int) else clusters, 1)
    check(x.shape[1] == height * width, op, "x", "have {} x {} tokens", tuple(x.shape), height, width)
    check(iters >= 0, op, "iters", "be >= 0", iters)
    check(window >= 1 and window % 2 == 1, op, "window", "be odd and positive", window)
    _check_temperature(op, temperature)
    affinity = x.requires_grad and torch.is_grad_enabled()
    centers = call(op, x.device, x, height, width, rows, cols, iters, float(temperature), window, affinity)[0]
    if not return_labels:
        return centers
    return centers, nearest_centers(x, centers)


def nearest_centers(features: Tensor, centers: Tensor) -> Tensor:
    """Index of the nearest of all centers (squared distance, float32 or float64) for every token; no gradient.

    Args:
        features: ``[B, N, C]``.
        centers: ``[B, K, C]``, of the same dtype.

    Returns:
        int64 ``[B, N]``; of equally near centers the first.

    Raises:
        ValueError: the shapes do not fit together, or there is no center.
        TypeError: not floating, or of different dtypes.
    """
    op = "nearest_centers"
    check_floating(op, features=features, centers=centers)
    _check_shapes(op, features, centers=centers)
    return call(op, features.device, features.detach(), centers.detach())


def reconstruct_tokens(
    features: Tensor,
    centers: Tensor,
    values: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.02,
    norm: str = "l2",
) -> Tensor:
    """Values of the centers, spread over the original tokens (section 3.3 of the paper).

    A token weights its ``k`` nearest centers with ``exp(-temperature * squared distance)``; at a tie for the k-th place
    all of them count. The weights are divided by their L2 norm, as the published models do (``norm="l1"``: by their
    sum), but by no less than 1e-12: a token far from every center gets zeros. Distances, weights and sums are float32
    (float64 for float64 inputs) in every dtype. Differentiable in all three tensors; the choice of the ``k`` is a
    constant.

    Under autocast the three may differ in dtype and are promoted to the widest; nothing is cast down.

    Args:
        features: ``[B, N, C]``, the tokens before clustering.
        centers: ``[B, K, C]``, the centers that clustering returned.
        values: ``[B, K, V]``, what the centers became since.
        k: nearest centers to use, at most K; negative for all.
        temperature: multiplies the squared distances.
        norm: ``"l2"`` or ``"l1"``.

    Returns:
        ``[B, N, V]``.

    Raises:
        ValueError: shapes do not fit together, ``k`` is 0, there is no center, ``temperature`` is not positive and
            finite, or the norm is unknown.
        TypeError: not floating, or of different dtypes outside of autocast.
    """
    op = "reconstruct_tokens"
    features, centers, values = _promote(features, centers, values)
    check_floating(op, features=features, centers=centers, values=values)
    _check_shapes(op, features, centers=centers, values=values)
    check(k != 0, op, "k", "be positive, or negative for all centers", k)
    check(norm in _NORMS, op, "norm", "be one of {}", repr(norm), _NORMS)
    _check_temperature(op, temperature)
    return call(op, features.device, features, centers, values, k, float(temperature), norm == "l1")


def unpool_tokens(x: Tensor, labels: Tensor) -> Tensor:
    """The row of ``x`` that each label names: ``[B, K, C]`` and integer ``[B, N]`` -> ``[B, N, C]``, differentiable.

    Raises:
        ValueError: the shapes do not fit.
        RuntimeError: a label is outside of [0, K) (on the CPU; elsewhere such a token gets zeros).
    """
    op = "unpool_tokens"
    check_floating(op, x=x)
    check(x.dim() == 3, op, "x", "have shape [B, K, C]", tuple(x.shape))
    labels = check_index(op, "labels", labels, x.device, dim=2)
    check(labels.shape[0] == x.shape[0], op, "labels", "have batch size {}", tuple(labels.shape), x.shape[0])
    batch, rows, channels = x.shape
    start = torch.arange(batch, device=x.device, dtype=torch.int32)[:, None] * rows
    outside = (labels < 0) | (labels >= rows)  # not the row of another image
    index = torch.where(outside, batch * rows, labels + start).flatten()
    return gather_tokens(x, index).view(batch, labels.shape[1], channels)


# ---------------------------------------------------------------- checks and helpers


def _square(op, count):
    root = math.isqrt(max(count, 0))
    check(root * root == count, op, "clusters", "be a square number or a pair (h, w)", count)
    return root, root


def _pair(op, name, value, least):
    check(isinstance(value, (tuple, list)) and len(value) == 2, op, name, "be a pair of integers", value)
    for number in value:
        check(number >= least, op, name, "be at least {}", value, least)
    return value


def _check_temperature(op, temperature):
    check(0 < temperature < math.inf, op, "temperature", "be positive and finite", temperature)


def _check_shapes(op, features, **others):
    for name, tensor in {"features": features, **others}.items():
        check(tensor.dim() == 3, op, name, "have 3 dimensions", tuple(tensor.shape))
        check(tensor.shape[0] == features.shape[0], op, name, "have batch size {}", tensor.shape[0], features.shape[0])
    centers, values = others["centers"], others.get("values", others["centers"])
    check(centers.shape[2] == features.shape[2], op, "centers", "have {} channels", centers.shape[2], features.shape[2])
    check(centers.shape[1] >= 1 or features.shape[1] == 0, op, "centers", "not be empty", tuple(centers.shape))
    check(values.shape[1] == centers.shape[1], op, "values", "have {} rows", values.shape[1], centers.shape[1])


def _promote(features, centers, values):
    device = features.device.type if isinstance(features, Tensor) else "meta"
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.promote_types(torch.promote_types(features.dtype, centers.dtype), values.dtype)
        return features.to(dtype), centers.to(dtype), values.to(dtype)
    return features, centers, values


def _reach(cells, window):
    return min(window // 2, cells - 1)


def _slots(rows, cols, window):
    return (2 * _reach(rows, window) + 1) * (2 * _reach(cols, window) + 1)


# ---------------------------------------------------------------- fake


def _fake_cluster(x, height, width, rows, cols, iters, temperature, window, affinity):
    batch, tokens, channels = x.shape
    stat = stat_dtype(x.dtype)
    slots = _slots(rows, cols, window) if affinity and iters > 0 else 0
    return (
        x.new_empty(batch, rows * cols, channels),
        x.new_empty(batch, rows * cols, dtype=stat),
        x.new_empty(batch, tokens, slots, dtype=stat),
    )


def _fake_cluster_backward(grad, mass, affinity, height, width, rows, cols, iters, window):
    return grad.new_empty(grad.shape[0], height * width, grad.shape[2])


def _fake_nearest(features, centers):
    return features.new_empty(features.shape[:2], dtype=torch.int64)


def _fake_reconstruct(features, centers, values, k, temperature, l1):
    return features.new_empty(features.shape[0], features.shape[1], values.shape[2])


def _fake_reconstruct_backward(grad, features, centers, values, k, temperature, l1):
    return features.new_empty(features.shape), centers.new_empty(centers.shape), values.new_empty(values.shape)


# ---------------------------------------------------------------- autograd


def _setup_cluster(ctx, inputs, output):
    _, *ctx.geometry, _, ctx.window, ctx.kept = inputs
    _, mass, affinity = output
    ctx.mark_non_differentiable(mass, affinity)
    ctx.save_for_backward(mass, affinity)


def _backward_cluster(ctx, grad, grad_mass, grad_affinity):
    mass, affinity = ctx.saved_tensors
    height, width, rows, cols, iters = ctx.geometry
    check(ctx.kept or iters == 0, "cluster_tokens", "affinity", "be True where a gradient is wanted", ctx.kept)
    grad_x = torch.ops.tokenprune.cluster_tokens_backward(
        grad, mass, affinity, height, width, rows, cols, iters, ctx.window
    )
    return grad_x, *[None] * 8


def _setup_reconstruct(ctx, inputs, output):
    *tensors, ctx.k, ctx.temperature, ctx.l1 = inputs
    ctx.save_for_backward(*tensors)


def _backward_reconstruct(ctx, grad):
    grads = torch.ops.tokenprune.reconstruct_tokens_backward(grad, *ctx.saved_tensors, ctx.k, ctx.temperature, ctx.l1)
    return *grads, None, None, None


# ---------------------------------------------------------------- flops


def _flops_cluster(x, height, width, rows, cols, iters, temperature, window, affinity, *, out_val=None, **kwargs):
    batch, tokens, channels = x.shape
    return 4 * batch * tokens * channels * _slots(rows, cols, window) * iters  # distances, and weighted sums


def _flops_cluster_backward(grad, mass, affinity, height, width, rows, cols, iters, window, *, out_val=None, **kwargs):
    batch, _, channels = grad.shape
    return 2 * batch * height * width * channels * (_slots(rows, cols, window) if iters > 0 else 1)


def _flops_nearest(features, centers, *, out_val=None, **kwargs):
    batch, tokens, channels = features.shape
    return 2 * batch * tokens * centers.shape[1] * channels


def _flops_reconstruct(features, centers, values, k, temperature, l1, *, out_val=None, **kwargs):
    batch, tokens, channels = features.shape
    clusters, width = values.shape[1:]
    kept = clusters if k < 0 else min(k, clusters)
    return 2 * batch * tokens * (clusters * channels + kept * width)


def _flops_reconstruct_backward(grad, features, centers, values, k, temperature, l1, *, out_val=None, **kwargs):
    batch, tokens, channels = features.shape
    clusters, width = values.shape[1:]
    kept = clusters if k < 0 else min(k, clusters)
    # the distances again; of every kept pair: grad_weight, grad_values, grad_features, grad_centers
    return 2 * batch * tokens * (clusters * channels + kept * (2 * width + 2 * channels))


# ---------------------------------------------------------------- reference


def _home_cells(size, cells, device):
    """Home cell of every token along one axis: nearest neighbour, in float32."""
    scale = torch.tensor(cells, dtype=torch.float32) / max(size, 1)
    return (torch.arange(size, dtype=torch.float32) * scale).long().clamp(max=cells - 1).to(device)


def _pooling(size, cells, device):
    """Membership [cells, size] of adaptive average pooling."""
    token, cell = torch.arange(size, device=device), torch.arange(cells, device=device)[:, None]
    return (token >= cell * size // cells) & (token < ((cell + 1) * size + cells - 1) // cells)


def _near(size, cells, window, device):
    """Which cells see which tokens along one axis, [cells, size]."""
    cell = torch.arange(cells, device=device)[:, None]
    return (cell - _home_cells(size, cells, device)).abs() <= window // 2


def _outer(rows, cols):
    """Masks of both axes [h, H], [w, W] -> [h * w, H * W]."""
    return (rows[:, None, :, None] & cols[None, :, None, :]).flatten(2, 3).flatten(0, 1)


def _reference_cluster(x, height, width, rows, cols, iters, temperature, window, affinity):
    stat = stat_dtype(x.dtype)
    tokens = x.to(stat)
    device = x.device
    weights = _outer(_pooling(height, rows, device), _pooling(width, cols, device)).to(stat).expand(x.shape[0], -1, -1)
    candidates = _outer(_near(height, rows, window, device), _near(width, cols, window, device))
    mass = weights.sum(2)
    centers = weights @ tokens / mass.clamp(min=_MASS_FLOOR)[..., None]
    with torch.no_grad():
        for i in range(iters):
            if i > 0:
                centers = weights @ tokens / mass.clamp(min=_MASS_FLOOR)[..., None]
            offset = centers.mean(1, keepdim=True)
            distance = torch.cdist(centers - offset, tokens - offset).square()
            weights = (-temperature * distance).masked_fill(~candidates, -math.inf).softmax(1)
            mass = weights.sum(2)
    if iters > 0:
        centers = weights @ tokens / mass.clamp(min=_MASS_FLOOR)[..., None]
    if affinity and iters > 0:
        kept = _windowed(weights, height, width, rows, cols, window)
    else:
        kept = mass.new_empty(*x.shape[:2], 0)
    return centers.to(x.dtype), mass, kept


def _window_cells(size, cells, window, device):
    """Candidate cells of every token along one axis, [size, width of the window]; some are outside of the map."""
    reach = _reach(cells, window)
    return _home_cells(size, cells, device)[:, None] + torch.arange(-reach, reach + 1, device=device)


def _windowed(weights, height, width, rows, cols, window):
    """Dense affinities [B, K, N] -> [B, N, slots]."""
    y = _window_cells(height, rows, window, weights.device)
    x = _window_cells(width, cols, window, weights.device)
    inside = _outer(((y >= 0) & (y < rows)).T, ((x >= 0) & (x < cols)).T).T
    index = (y.clamp(0, rows - 1) * cols)[:, None, :, None] + x.clamp(0, cols - 1)[None, :, None, :]
    index = index.flatten(2, 3).flatten(0, 1).expand(weights.shape[0], -1, -1)
    return weights.transpose(1, 2).gather(2, index) * inside


def _distances(features, centers):
    """Squared distances [B, N, K], measured from a point in between (round-off grows with the offset)."""
    stat = stat_dtype(features.dtype)
    features, centers = features.to(stat), centers.to(stat)
    offset = centers.detach().mean(1, keepdim=True)
    features, centers = features - offset, centers - offset
    squares = features.square().sum(-1)[..., None] + centers.square().sum(-1)[:, None]
    return squares - 2 * features @ centers.transpose(1, 2)


def _reference_nearest(features, centers):
    return _distances(features, centers).argmin(-1)


def _reference_reconstruct(features, centers, values, k, temperature, l1):
    distance = _distances(features, centers)
    clusters = centers.shape[1]
    weights = torch.exp(-temperature * distance)
    if 0 < k < clusters:
        farthest = distance.detach().kthvalue(k, -1, keepdim=True).values
        weights = torch.where(distance <= farthest, weights, 0)
    norm = torch.linalg.vector_norm(weights, ord=1 if l1 else 2, dim=-1, keepdim=True)
    return (weights / norm.clamp(min=_NORM_FLOOR) @ values.to(weights.dtype)).to(features.dtype)


register(
    "cluster_tokens",
    fake=_fake_cluster,
    reference=_reference_cluster,
    setup_context=_setup_cluster,
    backward=_backward_cluster,
    flops=_flops_cluster,
)
register("cluster_tokens_backward", fake=_fake_cluster_backward, flops=_flops_cluster_backward)
register("nearest_centers", fake=_fake_nearest, reference=_reference_nearest, flops=_flops_nearest)
register(
    "reconstruct_tokens",
    fake=_fake_reconstruct,
    reference=_reference_reconstruct,
    setup_context=_setup_reconstruct,
    backward=_backward_reconstruct,
    flops=_flops_reconstruct,
)
register("reconstruct_tokens_backward", fake=_fake_reconstruct_backward, flops=_flops_reconstruct_backward)
