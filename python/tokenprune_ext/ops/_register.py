# SPDX-License-Identifier: Apache-2.0
"""Wires fake, autograd, flop formula and reference to a compiled op, and dispatches calls to one of them."""

import warnings
from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from .. import _library

_references: dict[str, Callable] = {}
_ops: dict[str, Callable] = {}
_warned: set[tuple[str, str]] = set()
_interpreter = torch._C._functorch.peek_interpreter_stack
_FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def register(name, *, fake, reference=None, setup_context=None, backward=None, flops=None, vmap=None, composed=False):
    """Attach Python rules to ``tokenprune::name``.

    Args:
        name: op name in the ``tokenprune`` namespace; ``name.overload`` for an overload.
        fake: shape function for meta and fake tensors.
        reference: the same computation in plain PyTorch; serves devices without kernels.
        setup_context: saves what ``backward`` needs; see ``torch.library.register_autograd``.
        backward: autograd formula. Ops without one raise when differentiated.
        flops: flop formula, called with the op's arguments (not shapes) and ``out_val``; serves all overloads.
        vmap: batching rule; see ``torch.library.register_vmap``.
        composed: the op is made of others on CUDA: its kernel there is the reference, or this function.
    """
    if reference is not None:
        _references[name] = reference
    if not _library.cpu_loaded():
        return
    qualified = f"tokenprune::{name}"
    packet, _, overload_name = name.partition(".")
    overload = getattr(getattr(torch.ops.tokenprune, packet), overload_name or "default")
    _ops[name] = overload
    torch.library.register_fake(qualified, fake)
    if composed and _library.cuda_loaded():
        torch.library.impl(qualified, "CUDA", _contiguous(reference if composed is True else composed))
    mutable = overload._schema.is_mutable
    if not mutable:
        torch.library.register_autograd(
            qualified, backward or _no_gradient(name), setup_context=setup_context or _save_nothing
        )
    if vmap is not None:
        torch.library.register_vmap(qualified, vmap)
    if flops is not None:
        from torch.utils.flop_counter import register_flop_formula

        register_flop_formula(overload.overloadpacket, get_raw=True)(flops)


def _contiguous(function):
    """``function`` with the layout that kernels and fakes have."""

    def kernel(*args):
        out = function(*args)
        return tuple(t.contiguous() for t in out) if isinstance(out, tuple) else out.contiguous()

    return kernel


def batched(tensor, dim, size):
    """``tensor`` with its vmapped dimension first, expanded to ``size`` where it has none; None stays None."""
    if tensor is None:
        return None
    return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _save_nothing(ctx, inputs, output):
    return None


def _no_gradient(name):
    def backward(ctx, *grads):
        raise NotImplementedError(f"tokenprune::{name} has no derivative (no double backward)")

    return backward


def call(name, device, *args):
    """Run the compiled op, or the reference (with one warning) where there is no kernel for the device."""
    if (forward_ad._current_level >= 0 or _interpreter() is not None) and not torch.compiler.is_compiling():
        _refuse_transforms(name, args)
    if _library.has_kernels(device.type):
        return _ops[name](*args)
    if (name, device.type) not in _warned and not torch.compiler.is_compiling():
        _warned.add((name, device.type))
        reason = _library.cpu_error or (_library.cuda_error if device.type == "cuda" else "no kernels")
        warnings.warn(
            f"tokenprune_ext: {name} runs the slower PyTorch reference on {device.type}: {reason}", stacklevel=3
        )
    with torch.autocast(device.type, enabled=False):  # the public function has cast already
        return _references[name](*args)


def _refuse_transforms(name, args):
    """Forward-mode and functorch differentiation would silently give zeros; say so instead."""
    interpreter = _interpreter()
    functional = interpreter is not None and interpreter.key().name in ("Grad", "Jvp")
    if functional or (
        forward_ad._current_level >= 0
        and any(isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args)
    ):
        raise NotImplementedError(
            f"tokenprune::{name} supports reverse-mode autograd only (no torch.func.grad, no forward mode)"
        )


def check(condition, op, argument, rule, got, *parts, error=ValueError):
    """Raise ``error`` in the form "tokenprune::op: argument must rule, got value".

    ``parts`` fill the braces of ``rule``. They are formatted only on failure: under torch.compile, formatting a symbolic
    size would specialise on it.
    """
    if not condition:
        raise error(f"tokenprune::{op}: {argument} must {rule.format(*parts)}, got {got}")


def check_floating(op, **tensors):
    """All given tensors are floating and of one dtype (TypeError otherwise) and device (ValueError otherwise)."""
    (first_name, first), *others = tensors.items()
    if not isinstance(first, torch.Tensor) or first.dtype not in _FLOATING:
        got = getattr(first, "dtype", type(first))
        check(False, op, first_name, "be a float32, float64, float16 or bfloat16 tensor", got, error=TypeError)
    dtype, device = first.dtype, first.device
    for name, tensor in others:
        if tensor.dtype != dtype:
            check(False, op, name, "have the dtype of {} ({})", tensor.dtype, first_name, dtype, error=TypeError)
        if tensor.device != device:
            check(False, op, name, "be on {}", tensor.device, device)


def check_index(op, argument, tensor, device, dim=1):
    """Integer tensor of ``dim`` dimensions on ``device``; returned as int32."""
    if not isinstance(tensor, torch.Tensor):
        check(False, op, argument, "be a tensor", type(tensor), error=TypeError)
    if tensor.dtype not in (torch.int32, torch.int64):
        check(False, op, argument, "be int32 or int64", tensor.dtype, error=TypeError)
    if tensor.dim() != dim:
        check(False, op, argument, "have {} dimension(s)", tuple(tensor.shape), dim)
    if tensor.device != device:
        check(False, op, argument, "be on {}", tensor.device, device)
    if tensor.dtype == torch.int32:
        return tensor
    return tensor.clamp(-(2**31), 2**31 - 1).to(torch.int32)  # saturate: what is out of range must stay so


def stat_dtype(dtype):
    """Scores, sizes and statistics are float32, or float64 beside float64 values."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def default_scale(dim):
    """Factor of attention logits for heads of width ``dim``; logits of empty heads are zeros whatever it is."""
    return (dim or 1) ** -0.5


def autocast_cast(*tensors):
    """Cast to the autocast dtype of the tensors' device when autocast is on (as matmul and SDPA do)."""
    device_type = tensors[0].device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type) and tensors[0].dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        return tuple(t.to(dtype) for t in tensors)
    return tensors
