# SPDX-License-Identifier: Apache-2.0
"""FLOP counting: traced (``torch.utils.flop_counter``), and in closed form from token counts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

PARTS = ("linear", "conv", "attention", "deformable", "reduction", "other")

_LINEAR = {"aten.addmm", "aten.mm", "aten._addmm_activation", "aten.linear", "mkldnn._linear_pointwise"}
_ATTENTION = {"aten.bmm", "aten.baddbmm", "aten._softmax", "aten._safe_softmax"}
_OWN_LINEAR = ("packed_linear", "packed_attention", "packed_mlp", "gather_linear")  # attention: mostly
_OWN_ATTENTION = ("sparse_attention", "attention_scores", "policy_attention")


def part_of(func) -> str:
    """Part of a model that an op belongs to.

    Args:
        func: op overload or packet, as a dispatch mode receives it.

    Returns:
        One of ``PARTS``: linear layers, convolutions, attention products, deformable attention, token reduction
        (selection, matching, merging, gather and scatter), other.
    """
    name = str(getattr(func, "overloadpacket", func))
    namespace, _, op = name.partition(".")
    if namespace == "tokenprune":
        if op.startswith(_OWN_LINEAR):
            return "linear"
        if op.startswith("ms_deform_attn"):
            return "deformable"
        return "attention" if op.startswith(_OWN_ATTENTION) else "reduction"
    if name in _LINEAR:
        return "linear"
    if "convolution" in op or op == "conv2d":
        return "conv"
    if name in _ATTENTION or "attention" in op:
        return "attention"
    return "other"


def _cpu_sdpa_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


class _NoModules:
    """In place of torch's module tracker, which hooks gradients of module inputs and fails where these are parameters
    (the query of an attention pooling) under ``no_grad``."""

    parents = ("Global",)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def count_flops(function: Callable[[], object]) -> dict[str, int]:
    """FLOPs (a multiply-add is two) of one call, by part, counted at the token counts that really occur.

    Args:
        function: runs the forward pass.

    Returns:
        Part to FLOPs. Ops without a formula (normalisation, activation, copies) count zero.
    """
    custom = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_sdpa_flops}
    counter = FlopCounterMode(display=False, custom_mapping=custom)
    counter.mod_tracker = _NoModules()
    with torch.inference_mode(False), torch.no_grad(), counter:
        function()
    flops = dict.fromkeys(PARTS, 0)
    for op, count in counter.get_flop_counts().get("Global", {}).items():
        flops[part_of(op)] += count
    return flops


def traced_flops(model: torch.nn.Module, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> dict[str, int]:
    """:func:`count_flops` of one forward pass in which nothing is computed and nothing stored.

    Args:
        model: in evaluation mode, on any device, the meta device included.
        shape: of the images.
        dtype: of the images.

    Returns:
        Part to FLOPs. Where sequence lengths are known on the device only, attention counts what padding would cost.

    Raises:
        RuntimeError: the number of tokens depends on the data.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # On an imagined CPU rather than the meta device, for which autocast cannot even be switched off.
    with FakeTensorMode():
        fake = {name: torch.empty(t.shape, dtype=t.dtype, device="cpu") for name, t in tensors.items()}
        images = torch.empty(tuple(shape), dtype=dtype, device="cpu")
        return count_flops(lambda: torch.func.functional_call(model, fake, (images,)))


@dataclass(frozen=True)
class LayerTokens:
    """Tokens (prefix tokens included) that one block processes, per image of the batch."""

    attention: tuple[int, ...]
    mlp: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean number of tokens in the attention of this layer."""
        return sum(self.attention) / len(self.attention)


def _linear_macs(module: torch.nn.Module) -> int:
    """Multiply-adds per token of all linear layers below a module."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, torch.nn.Linear))


def vit_macs(model: torch.nn.Module, layers: Sequence[LayerTokens], pooled_tokens: int = 1) -> dict[str, float]:
    """Multiply-adds per image of a timm ViT from its token counts.

    Counts linear layers, the patch convolution and the two attention products; what a reduction method adds
    (selectors, matching) is not in it.

    Args:
        model: a timm ``VisionTransformer`` (the dense one: only its layer sizes are read).
        layers: tokens per block.
        pooled_tokens: rows that go through the classifier.

    Returns:
        Part to multiply-adds of one image (mean over the batch).
        ``other`` is the number of token visits: elementwise work is proportional to it.
    """
    macs = dict.fromkeys(PARTS, 0.0)
    images = len(layers[0].attention)
    for block, tokens in zip(model.blocks, layers, strict=True):
        width = model.embed_dim
        visits = sum(tokens.attention) / images
        macs["linear"] += _linear_macs(block.attn) * visits + _linear_macs(block.mlp) * sum(tokens.mlp) / images
        macs["attention"] += 2 * width * sum(n * n for n in tokens.attention) / images
        macs["other"] += visits + sum(tokens.mlp) / images
    for name in ("head", "head_dist"):
        macs["linear"] += _linear_macs(getattr(model, name, torch.nn.Identity())) * pooled_tokens
    stem = model.patch_embed
    for conv in (m for m in stem.modules() if isinstance(m, torch.nn.Conv2d)):
        macs["conv"] += conv.weight.numel() * stem.num_patches
    return macs


def total_macs(macs: dict[str, float]) -> float:
    """Linear, convolution and attention multiply-adds together."""
    return macs["linear"] + macs["conv"] + macs["attention"]
