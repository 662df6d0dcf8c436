# SPDX-License-Identifier: Apache-2.0
"""Packed weights: an inference optimisation on the CPU, for dense and reduced models alike."""

import mmap
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from ..ops import pack_linear
from ..ops._register import call
from ..ops.packed import ACTIVATIONS, run_packed


class _Packed(nn.Module):
    """What the packed layers share: a packed copy of the weight, as one matrix, that follows the weight.

    The copy follows every change of the weight that autograd counts: in-place changes, ``load_state_dict``, other tensors.
    It cannot see what is written through ``weight.data``, nor, in a compiled model, in-place changes outside training
    mode: call :func:`pack` again after those.
    """

    _copy: tuple | None = None  # alias of the weight it was made from, facts about that, the packed weight

    def take(self, x: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """``(packed weight, bias)`` where ``x`` can go through them; None where this has to be a plain layer.

        The packed weight is made again when the weight has changed since.

        Args:
            x: input.
            others: what the product is to be joined with besides.
        """
        if not x.is_cpu or torch.is_autocast_enabled("cpu"):
            return None
        weight, bias, dtype = parameter(self, "weight"), parameter(self, "bias"), x.dtype
        tensors = weight, bias, *others
        for t in tensors:
            if t is not None and t.dtype != dtype:
                return None
        if torch.is_grad_enabled() and (x.requires_grad or any(t is not None and t.requires_grad for t in tensors)):
            return None
        copy = self._copy
        if torch.compiler.is_compiling():
            return None if copy is None else (copy[2], bias)
        if weight.is_inference():  # nothing counts its changes
            return None
        facts = weight.data_ptr(), weight._version, dtype, weight.shape, weight.stride()
        if copy is None or copy[1] != facts:
            with torch.no_grad():
                # The alias keeps the memory, so that no other weight can come to lie at the same address.
                self._copy = copy = (weight.detach(), facts, pack_linear(weight.flatten(1)))
        return copy[2], bias

    def prepare(self) -> None:
        """Make the copy now, where this layer can use one."""
        self._copy = None
        if self.weight.is_floating_point():
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                self.take(self.weight)

    def fused(self, x: Tensor, pair: tuple[Tensor, Tensor | None], **parts) -> Tensor:
        """:func:`tokenprune_ext.ops.packed_linear` with what :meth:`take` gave for ``x``."""
        packed, bias = pair
        return run_packed(x, packed, parameter(self, "weight").shape[0], bias, **parts)

    def train(self, mode: bool = True) -> "_Packed":
        """Training changes the weight: compiled code, which cannot look, must not find an older copy afterwards."""
        if mode:
            self._copy = None
        return super().train(mode)

    def _apply(self, fn, recurse=True):  # another dtype or device
        self._copy = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self._copy = None
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self):  # the layout belongs to this process's instruction set
        return {**self.__dict__, "_copy": None}


class PackedLinear(_Packed, nn.Linear):
    """``nn.Linear`` that runs from a packed copy of its weight where nothing needs a gradient, and as before elsewhere.

    Parameters, ``state_dict`` and hooks are those of ``nn.Linear``.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        pair = self.take(x)
        return super().forward(x) if pair is None else self.fused(x, pair)


class PackedPatches(_Packed, nn.Conv2d):
    """The convolution of a patch embedding, whose kernel is as large as its stride, as one product over packed weights."""

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_channels, H, W] -> [B, out_channels, H // kernel, W // kernel]``; channels are innermost in memory."""
        (high, wide), channels = self.kernel_size, self.in_channels
        fits = x.dim() == 4 and x.shape[1] == channels and x.shape[2] >= high and x.shape[3] >= wide
        pair = self.take(x) if fits else None
        if pair is None:
            return super().forward(x)
        batch, rows, columns = x.shape[0], x.shape[2] // high, x.shape[3] // wide
        x = x[:, :, : rows * high, : columns * wide].reshape(batch, channels, rows, high, columns, wide)
        patches = x.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows, columns, channels * high * wide)
        return self.fused(patches, pair).permute(0, 3, 1, 2)


_PLAIN = {PackedLinear: nn.Linear, PackedPatches: nn.Conv2d}


def pack(model: nn.Module) -> nn.Module:
    """Let the layers of ``model`` run from packed weights in CPU inference (a second copy of them in memory).

    Results agree with the plain layers up to rounding. Training, autocast and other devices are served as before;
    ``unpack`` restores the plain layers. A patched model also runs norm, activation and residual in the same pass.

    Args:
        model: any model; its ``nn.Linear`` layers and the ``nn.Conv2d`` of patch embeddings (not subclasses) change in
            place. Layers that are packed already are packed again.

    Returns:
        ``model``, for chaining.
    """
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = PackedLinear
        elif type(layer) is nn.Conv2d and _cuts_patches(layer):
            layer.__class__ = PackedPatches
        if isinstance(layer, _Packed):
            layer.prepare()
    _move_together([layer for layer in model.modules() if isinstance(layer, _Packed) and layer._copy is not None])
    return model


def _move_together(layers: list[_Packed]) -> None:
    """Packed weights into one memory of large pages: they pass through every forward, and small pages are looked up slowly."""
    sizes = [-(-layer._copy[2].numel() // 64) * 64 for layer in layers]  # each from a cache line on
    if sum(sizes) < 8 << 20 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return
    memory = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    places = torch.frombuffer(memory, dtype=torch.uint8).split(sizes)
    for layer, place in zip(layers, places, strict=True):
        weight, facts, packed = layer._copy
        layer._copy = weight, facts, place[: packed.numel()].copy_(packed)


def unpack(model: nn.Module) -> nn.Module:
    """Undo :func:`pack`."""
    for layer in model.modules():
        if type(layer) in _PLAIN:
            layer.__class__ = _PLAIN[type(layer)]
            layer.__dict__.pop("_copy", None)
    return model


def _cuts_patches(conv: nn.Conv2d) -> bool:
    """Whether every output sees pixels of its own, and enough of them in a row to be worth copying."""
    apart = conv.kernel_size == conv.stride and conv.padding in ((0, 0), "valid") and conv.dilation == (1, 1)
    return apart and conv.groups == 1 and conv.kernel_size[1] >= 8


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """``module.name`` without the search of ``nn.Module``: this runs several times per block of every forward."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def hooked(module: nn.Module) -> bool:
    """Whether somebody watches or changes the module's forward, so that it has to be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def plain_norm(norm) -> tuple | None:
    """``(weight, bias, eps)`` of a LayerNorm over the last dimension without hooks, otherwise None."""
    if (
        isinstance(norm, nn.LayerNorm)
        and type(norm).__name__ == "LayerNorm"
        and len(norm.normalized_shape) == 1
        and not hooked(norm)
    ):
        return parameter(norm, "weight"), parameter(norm, "bias"), norm.eps
    return None


def activation_name(act) -> str | None:
    """Name of an activation module that :func:`packed_linear` knows, otherwise None."""
    if type(act) is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    return {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}.get(type(act).__name__)


def fusible(layer, x: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    """``(packed weight, bias)`` of a layer that may take over the work of its neighbours ``others``, otherwise None."""
    return layer.take(x, *others) if isinstance(layer, PackedLinear) and not hooked(layer) else None


def run_chain(layers: nn.Sequential | Sequence[nn.Module], x: Tensor) -> Tensor:
    """The layers one after another; a packed linear one takes the LayerNorm in front of it and the activation behind it along."""
    if isinstance(layers, nn.Module) and (hooked(layers) or layers._backward_hooks or layers._backward_pre_hooks):
        return layers(x)
    layers, i = list(layers), 0
    while i < len(layers):
        norm = plain_norm(layers[i])
        at = i if norm is None else i + 1
        pair = fusible(layers[at], x, *(norm or ())[:2]) if at < len(layers) else None
        if pair is None:
            x, i = layers[i](x), i + 1
            continue
        after = layers[at + 1] if at + 1 < len(layers) else None
        act = None if after is None or hooked(after) else activation_name(after)
        x = layers[at].fused(x, pair, norm=norm, act=act)
        i = at + 1 if act is None else at + 2
    return x


def plain_scale(layer_scale, drop_path) -> tuple[bool, Tensor | None]:
    """``(whether the branch's tail is only a factor per channel, that factor or None)``."""
    if not (drop_path is None or isinstance(drop_path, nn.Identity) or not drop_path.training):
        return False, None
    if layer_scale is None or isinstance(layer_scale, Tensor):
        return True, layer_scale
    known = type(layer_scale).__name__ == "LayerScale" and hasattr(layer_scale, "gamma") and not hooked(layer_scale)
    return known, layer_scale.gamma if known else None


def idle(module) -> bool:
    """Whether a module does nothing: absent, an identity, or dropout outside training; without hooks."""
    if module is None:
        return True
    nothing = isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and not module.training)
    return nothing and not hooked(module)


def in_one_call() -> bool:
    """Whether half a block may be one op: in eager mode, where nobody counts or times its layers one by one."""
    return not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0


def fused_mlp(mlp, norm, x: Tensor, layer_scale, drop_path) -> Tensor | None:
    """``x`` plus a two-layer MLP branch in two passes, or None where a part stands in the way."""
    norm, (plain, gamma) = plain_norm(norm), plain_scale(layer_scale, drop_path)
    if norm is None or not plain or type(mlp).__name__ != "Mlp" or hooked(mlp):
        return None
    parts = mlp._modules
    fc1, fc2, act = parts.get("fc1"), parts.get("fc2"), parts.get("act")
    first, second = fusible(fc1, x, norm[0], norm[1]), fusible(fc2, x, gamma)
    if first is None or second is None:
        return None
    act = None if act is None or hooked(act) else activation_name(act)
    if act is None:
        return None
    for name, module in parts.items():
        if name not in ("fc1", "fc2", "act") and not idle(module):
            return None
    if not in_one_call():
        return fc2.fused(fc1.fused(x, first, norm=norm, act=act), second, residual=x, scale=gamma)
    hidden = parameter(fc1, "weight").shape[0]
    return call("packed_mlp", x.device, x, *norm, *first, hidden, ACTIVATIONS.index(act), *second, gamma)
