# SPDX-License-Identifier: Apache-2.0
"""Packed weights: an inference optimisation of linear layers on the CPU, for dense and reduced models alike."""

import torch
from torch import Tensor, nn

from ..ops import pack_linear, packed_linear


class PackedLinear(nn.Linear):
    """A linear layer that runs from a packed copy of its weight where nothing needs a gradient, and as before elsewhere.

    Parameters, ``state_dict`` and hooks are those of ``nn.Linear``. The copy follows every change of the weight that
    autograd counts: in-place changes, ``load_state_dict``, other tensors. It cannot see what is written through
    ``weight.data``, nor, in a compiled model, in-place changes outside training mode: call :func:`pack` again after those.
    """

    _copy: tuple | None = None  # alias of the weight it was made from, facts about that, the packed weight

    def ready(self, x: Tensor, *others: Tensor | None) -> bool:
        """Whether ``x`` can go through the packed weight (otherwise this is a plain linear layer).

        Args:
            x: input.
            others: what :meth:`fused` will get besides.
        """
        if not x.is_cpu or torch.is_autocast_enabled("cpu"):
            return False
        weight, dtype, grads = parameter(self, "weight"), x.dtype, torch.is_grad_enabled()
        if grads and x.requires_grad:
            return False
        for t in (weight, parameter(self, "bias"), *others):
            if t is not None and (t.dtype != dtype or (grads and t.requires_grad)):
                return False
        return self._copy is not None if torch.compiler.is_compiling() else not weight.is_inference()

    def packed(self) -> Tensor:
        """The packed weight, made again when the weight has changed since."""
        copy = self._copy
        if not torch.compiler.is_compiling():
            weight = parameter(self, "weight")
            if copy is None or copy[1] != _facts(weight):
                with torch.no_grad():
                    # The alias keeps the memory, so that no other weight can come to lie at the same address.
                    self._copy = copy = (weight.detach(), _facts(weight), pack_linear(weight))
        return copy[2]

    def prepare(self) -> None:
        """Make the copy now, where this layer can use one."""
        self._copy = None
        if self.weight.device.type == "cpu" and self.weight.is_floating_point() and not self.weight.is_inference():
            self.packed()

    def fused(self, x: Tensor, **parts) -> Tensor:
        """:func:`tokenprune_ext.ops.packed_linear` with this layer's weight and bias; only where :meth:`ready`."""
        return packed_linear(x, self.packed(), self.out_features, parameter(self, "bias"), **parts)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        return self.fused(x) if self.ready(x) else super().forward(x)

    def train(self, mode: bool = True) -> "PackedLinear":
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


def pack(model: nn.Module) -> nn.Module:
    """Let the linear layers of ``model`` run from packed weights in CPU inference (a second copy of them in memory).

    Results agree with the plain layers up to rounding. Training, autocast and other devices are served as before;
    ``unpack`` restores the plain layers. A patched model also runs norm, activation and residual in the same pass.

    Args:
        model: any model; its ``nn.Linear`` layers (not subclasses) change in place. Layers that are packed already are
            packed again.

    Returns:
        ``model``, for chaining.
    """
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = PackedLinear
        if isinstance(layer, PackedLinear):
            layer.prepare()
    return model


def unpack(model: nn.Module) -> nn.Module:
    """Undo :func:`pack`."""
    for layer in model.modules():
        if type(layer) is PackedLinear:
            layer.__class__ = nn.Linear
            layer.__dict__.pop("_copy", None)
    return model


def _facts(weight):
    return weight.data_ptr(), weight._version, weight.dtype, weight.stride()


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


def fusible(layer, x: Tensor, *others: Tensor | None) -> bool:
    """Whether ``layer`` may take over its neighbours' work: packed, without hooks, and ready for ``x`` and ``others``."""
    return isinstance(layer, PackedLinear) and not hooked(layer) and layer.ready(x, *others)


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


def fused_mlp(mlp, norm, x: Tensor, layer_scale, drop_path) -> Tensor | None:
    """``x`` plus a two-layer MLP branch in two passes, or None where a part stands in the way."""
    norm, (plain, gamma) = plain_norm(norm), plain_scale(layer_scale, drop_path)
    if norm is None or not plain or type(mlp).__name__ != "Mlp" or hooked(mlp):
        return None
    parts = mlp._modules
    fc1, fc2, act = (parts.get(name) for name in ("fc1", "fc2", "act"))
    if not fusible(fc1, x, norm[0], norm[1]) or not fusible(fc2, x, gamma):
        return None
    act = None if act is None or hooked(act) else activation_name(act)
    if act is None or not all(idle(module) for name, module in parts.items() if name not in ("fc1", "fc2", "act")):
        return None
    return fc2.fused(fc1.fused(x, norm=norm, act=act), residual=x, scale=gamma)
