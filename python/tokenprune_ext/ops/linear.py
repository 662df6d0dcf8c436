# SPDX-License-Identifier: Apache-2.0
"""Linear layers on kept tokens: rows of a feature map in, rows of another out.

The sparse blocks of dynamic token pruning (SViT, arXiv 2306.07050; DynamicViT, arXiv 2106.02034) apply their linear layers
to the kept tokens of a preserved feature map: gather, linear, residual scatter. Here that is one op.
"""

import torch
from torch import Tensor
from torch.nn import functional

from .. import _library
from ._register import autocast_cast, call, check, check_floating, check_index, register
from .tokens import TokenIndex, _indices, _rows, scatter_tokens

__all__ = ["gather_linear"]

_ACTIVATIONS = {None: 0, "gelu": 1}


# ---------------------------------------------------------------- public functions


def gather_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    index: TokenIndex | Tensor | None = None,
    activation: str | None = None,
    features: Tensor | None = None,
    scatter: TokenIndex | Tensor | None = None,
    add: bool = False,
) -> Tensor:
    """``activation(x[index] @ weight.T + bias)``, optionally written back into a copy of a feature map.

    On a GPU of compute capability 9.0 with ``TOKENPRUNE_HOPPER=1`` (and the unit built) 16-bit values run in one kernel;
    otherwise this is :func:`gather_tokens`, PyTorch's linear and :func:`scatter_tokens`.

    Args:
        x: ``[B, N, C]`` or ``[R, C]``.
        weight: ``[M, C]``; bias: ``[M]`` or None.
        index: TokenIndex, or flat int32/int64 row numbers ``[T]`` of ``x``; -1 stands for a row of zeros. Default: all
            rows in order.
        activation: None or ``"gelu"`` (exact).
        features: ``[B', N', M]`` or ``[F, M]``, the map that the results go to.
        scatter: rows of ``features``, without duplicates, -1 is skipped. Default: ``index``.
        add: add to the row that is there (a residual connection) instead of replacing it.

    Returns:
        ``[T, M]``, or a new tensor shaped like ``features``; differentiable in x, weight, bias and features.

    Raises:
        ValueError, TypeError: wrong shape, dtype, device or option. RuntimeError: index or scatter out of range (on the
            CPU; on CUDA under TOKENPRUNE_VALIDATE=1, otherwise such rows are zero, or skipped).
    """
    op = "gather_linear"
    check(activation in _ACTIVATIONS, op, "activation", "be None or 'gelu'", repr(activation))
    x, weight = autocast_cast(x, weight)
    bias = None if bias is None else bias.to(x.dtype)
    rows = _rows(op, "x", x)
    taken = None if index is None else _indices(op, index, x)
    common = (rows, weight, bias, taken)
    if features is None:
        check(scatter is None, op, "scatter", "come with features", "no features")
        check(not add, op, "add", "come with features", "no features")
        return call(op, x.device, *common, None, None, False, _ACTIVATIONS[activation])
    scatter = index if scatter is None else scatter
    check(scatter is not None, op, "scatter", "be given where there is no index", None)
    map_rows, target = _rows(op, "features", features), _indices(op, scatter, features)
    if features.dtype != x.dtype:  # a float32 residual stream beside half-precision layers
        tokens = call(op, x.device, *common, None, None, False, _ACTIVATIONS[activation])
        return scatter_tokens(features, tokens, target, add=add)
    return call(op, x.device, *common, map_rows, target, add, _ACTIVATIONS[activation]).view(features.shape)


# ---------------------------------------------------------------- checks


def _check(op, x, weight, bias, index, features, scatter, activation):
    """The arguments of the op itself, which may be called directly."""
    given = {"x": x, "weight": weight, "bias": bias, "features": features}
    check_floating(op, **{name: tensor for name, tensor in given.items() if tensor is not None})
    check(x.dim() == 2, op, "x", "have shape [R, C]", tuple(x.shape))
    fits = weight.dim() == 2 and weight.shape[1] == x.shape[1]
    check(fits, op, "weight", "have shape [M, {}]", tuple(weight.shape), x.shape[1])
    width = weight.shape[0]
    if bias is not None:
        check(tuple(bias.shape) == (width,), op, "bias", "have shape [{}]", tuple(bias.shape), width)
    check(
        activation in _ACTIVATIONS.values(), op, "activation", "be one of {}", activation, list(_ACTIVATIONS.values())
    )
    if index is not None:
        _check_rows(op, "index", index, x)
    pair = (features is None) == (scatter is None)
    check(pair, op, "features", "come with scatter", "only one of them")
    if features is None:
        return
    fits = features.dim() == 2 and features.shape[1] == width
    check(fits, op, "features", "have shape [F, {}]", tuple(features.shape), width)
    _check_rows(op, "scatter", scatter, x)
    count = (x if index is None else index).shape[0]
    check(scatter.shape[0] == count, op, "scatter", "have one row per token ({})", tuple(scatter.shape), count)


def _check_backward(grad, x, weight, bias, index, scatter, activation):
    op = "gather_linear_backward"
    _check(op, x, weight, bias, index, None, None, activation)
    check_floating(op, x=x, grad=grad)
    count = (x if index is None else index).shape[0]
    if scatter is not None:
        _check_rows(op, "scatter", scatter, x)
        check(scatter.shape[0] == count, op, "scatter", "have one row per token ({})", tuple(scatter.shape), count)
    fits = grad.dim() == 2 and grad.shape[1] == weight.shape[0] and (scatter is not None or grad.shape[0] == count)
    check(fits, op, "grad", "have the shape of the result", tuple(grad.shape))


def _check_rows(op, name, rows, like):
    check(rows.dtype == torch.int32, op, name, "be int32", rows.dtype, error=TypeError)
    check_index(op, name, rows, like.device)


# ---------------------------------------------------------------- fake


def _fake(x, weight, bias, index, features, scatter, add, activation):
    _check("gather_linear", x, weight, bias, index, features, scatter, activation)
    if features is not None:
        return x.new_empty(features.shape)
    return x.new_empty((x if index is None else index).shape[0], weight.shape[0])


def _fake_backward(grad, x, weight, bias, index, scatter, add, activation):
    _check_backward(grad, x, weight, bias, index, scatter, activation)
    return (
        x.new_empty(x.shape),
        x.new_empty(weight.shape),
        x.new_empty(0 if bias is None else weight.shape[0]),
        x.new_empty(0) if scatter is None else x.new_empty(grad.shape),
    )


# ---------------------------------------------------------------- autograd


def _setup(ctx, inputs, output):
    x, weight, bias, index, _, scatter, ctx.add, ctx.activation = inputs
    ctx.save_for_backward(x, weight, bias, index, scatter)


def _backward(ctx, grad):
    x, weight, bias, index, scatter = ctx.saved_tensors
    grad_x, grad_weight, grad_bias, grad_features = torch.ops.tokenprune.gather_linear_backward(
        grad, x, weight, bias, index, scatter, ctx.add, ctx.activation
    )
    return (
        grad_x,
        grad_weight,
        None if bias is None else grad_bias,
        None,
        None if scatter is None else grad_features,
        None,
        None,
        None,
    )


# ---------------------------------------------------------------- flop formulas


def _flops(x, weight, bias, index, features, scatter, add, activation, *, out_val=None, **kwargs):
    return 2 * (x if index is None else index).shape[0] * weight.shape[0] * weight.shape[1]


def _flops_backward(grad, x, weight, bias, index, scatter, add, activation, *, out_val=None, **kwargs):
    return 2 * _flops(x, weight, bias, index, None, scatter, add, activation)


# ---------------------------------------------------------------- composition


def _without_autocast(function):
    """The public function has cast already; a direct call of the op must not change its dtype either."""

    def run(x, *args):
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args)

    return run


def _composition(x, weight, bias, index, features, scatter, add, activation):
    _check("gather_linear", x, weight, bias, index, features, scatter, activation)
    rows = x if index is None else call("gather_tokens", x.device, x, index)
    y = functional.linear(rows, weight, bias)
    if activation == 1:
        y = functional.gelu(y)
    return y if features is None else call("scatter_tokens", x.device, features, y, scatter, None, add)


@_without_autocast
def _composed_backward(grad, x, weight, bias, index, scatter, add, activation):
    _check_backward(grad, x, weight, bias, index, scatter, activation)
    tokens = torch.ops.tokenprune
    rows = x if index is None else tokens.gather_tokens(x, index)
    grad_y = grad if scatter is None else tokens.gather_tokens(grad, scatter)
    if activation == 1:
        grad_y = torch.ops.aten.gelu_backward(grad_y, functional.linear(rows, weight, bias))
    grad_rows = grad_y @ weight
    grad_x = grad_rows if index is None else tokens.gather_tokens_backward(grad_rows, index, x.shape[0])
    grad_features = grad.new_empty(0)
    if scatter is not None:  # a replaced row gives no gradient to what was there
        gone = torch.zeros_like(grad_y)
        grad_features = grad.clone() if add else tokens.scatter_tokens(grad, gone, scatter, None, False)
    return grad_x, grad_y.t() @ rows, grad.new_empty(0) if bias is None else grad_y.sum(0), grad_features


@_without_autocast
def _kernel(x, weight, bias, index, features, scatter, add, activation):
    unit = _library.hopper_unit("gather_linear", x.device)
    if unit is not None:
        _check("gather_linear", x, weight, bias, index, features, scatter, activation)
        if _fits_hopper(x, weight, (x if index is None else index).shape[0]):
            return unit(x, weight, bias, index, features, scatter, add, activation)
    return _composition(x, weight, bias, index, features, scatter, add, activation)


def _fits_hopper(x, weight, count):
    """What the sm_90a kernel takes (csrc/linear/kernel_hopper.cuh): 16-bit values in units of 16 bytes, not empty."""
    units = weight.shape[0] % 8 == 0 and weight.shape[1] % 8 == 0
    return x.dtype in (torch.float16, torch.bfloat16) and units and min(*x.shape, weight.shape[0], count) > 0


if _library.cpu_loaded():
    torch.library.register_kernel("tokenprune::gather_linear", ("cpu", "cuda"), _kernel)
    torch.library.register_kernel("tokenprune::gather_linear_backward", ("cpu", "cuda"), _composed_backward)
register("gather_linear", fake=_fake, reference=_composition, setup_context=_setup, backward=_backward, flops=_flops)
register("gather_linear_backward", fake=_fake_backward, flops=_flops_backward)
