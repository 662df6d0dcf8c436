# SPDX-License-Identifier: Apache-2.0
"""Packed weights: an inference optimisation of linear layers on the CPU, for dense and reduced models alike."""

import torch
from torch import Tensor, nn

from ..ops import pack_linear, packed_linear


class PackedLinear(nn.Linear):
    """A linear layer that runs from a packed copy of its weight where nothing needs a gradient, and as before elsewhere.

    Parameters, ``state_dict`` and hooks are those of ``nn.Linear``. The copy follows changes of the weight.
    """

    _copy: tuple | None = None

    def ready(self, x: Tensor) -> bool:
        """Whether ``x`` can go through the packed weight (otherwise this is a plain linear layer)."""
        weight = self.weight
        return (
            x.device.type == "cpu"
            and x.dtype == weight.dtype
            and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
            and not torch.is_autocast_enabled("cpu")
            and (self._copy is not None or not torch.compiler.is_compiling())
        )

    def packed(self) -> Tensor:
        """The packed weight, made again when the weight has changed since."""
        if torch.compiler.is_compiling():
            return self._copy[1]
        weight = self.weight
        version = None if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version, weight.dtype)
        if self._copy is None or self._copy[0] != key:
            with torch.no_grad():
                self._copy = (key, pack_linear(weight))
        return self._copy[1]

    def fused(self, x: Tensor, **parts) -> Tensor:
        """:func:`tokenprune_ext.ops.packed_linear` with this layer's weight and bias; only where :meth:`ready`."""
        return packed_linear(x, self.packed(), self.out_features, self.bias, **parts)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features] -> [..., out_features]``."""
        return self.fused(x) if self.ready(x) else super().forward(x)

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
        model: any model; its ``nn.Linear`` layers (not subclasses) change in place.

    Returns:
        ``model``, for chaining.
    """
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = PackedLinear
            if layer.weight.device.type == "cpu" and layer.weight.is_floating_point():
                layer.packed()
    return model


def unpack(model: nn.Module) -> nn.Module:
    """Undo :func:`pack`."""
    for layer in model.modules():
        if type(layer) is PackedLinear:
            layer.__class__ = nn.Linear
            layer.__dict__.pop("_copy", None)
    return model


def plain_norm(norm) -> tuple | None:
    """``(weight, bias, eps)`` of a LayerNorm over the last dimension without hooks, otherwise None."""
    if (
        isinstance(norm, nn.LayerNorm)
        and type(norm).__name__ == "LayerNorm"
        and len(norm.normalized_shape) == 1
        and not norm._forward_hooks
        and not norm._forward_pre_hooks
    ):
        return norm.weight, norm.bias, norm.eps
    return None


def activation_name(act) -> str | None:
    """Name of an activation module that :func:`packed_linear` knows, otherwise None."""
    if type(act) is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    return {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu"}.get(type(act).__name__)


def fusible(layer, x: Tensor) -> bool:
    """Whether ``layer`` may take over its neighbours' work: packed, ready and without hooks."""
    return (
        isinstance(layer, PackedLinear) and not layer._forward_hooks and not layer._forward_pre_hooks and layer.ready(x)
    )


def plain_scale(layer_scale, drop_path) -> tuple[bool, Tensor | None]:
    """``(whether the branch's tail is only a factor per channel, that factor or None)``."""
    if not (drop_path is None or isinstance(drop_path, nn.Identity) or not drop_path.training):
        return False, None
    if layer_scale is None or isinstance(layer_scale, Tensor):
        return True, layer_scale
    known = type(layer_scale).__name__ == "LayerScale" and hasattr(layer_scale, "gamma")
    return known, layer_scale.gamma if known else None


def idle(module) -> bool:
    """Whether a module does nothing: absent, an identity, or dropout outside training."""
    return module is None or isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and not module.training)


def fused_mlp(mlp, norm, x: Tensor, layer_scale, drop_path) -> Tensor | None:
    """``x`` plus a two-layer MLP branch in two passes, or None where a part stands in the way."""
    norm, (plain, gamma) = plain_norm(norm), plain_scale(layer_scale, drop_path)
    if norm is None or not plain or type(mlp).__name__ != "Mlp" or not fusible(mlp.fc1, x) or not fusible(mlp.fc2, x):
        return None
    act = activation_name(mlp.act)
    if act is None or not (idle(mlp.drop1) and idle(mlp.drop2) and idle(mlp.norm)):
        return None
    return mlp.fc2.fused(mlp.fc1.fused(x, norm=norm, act=act), residual=x, scale=gamma)
