# SPDX-License-Identifier: Apache-2.0
"""Whole ViTs: dense and reduced on the same engine, in the same run, with the speed-up to be expected.

Speed-up: over our own dense model (same fused attention). Ideal: ratio of multiply-adds. Expected: the dense
model's time by part (linear, convolution, attention, other), each scaled by its own ratio, because parts run
at different rates; "other" scales with the number of token visits.
"""

import copy
from dataclasses import dataclass, field

import tokenprune_ext
import torch
import torch.nn.functional as F
from tokenprune_ext import _variants
from tokenprune_ext._images import load_photo, preprocess
from tokenprune_ext.profiling import time_parts, total_macs

from benchmarks.core import Case, Context, Peer, Prepared, Target
from benchmarks.ops.merge import tome_step

DENSE = "dense (ours)"
IDEAL_SHARE, EFFICIENCY = 0.9, 0.95  # of the FLOPs-ideal and of the expected speed-up


@dataclass(frozen=True)
class Setting:
    """One model with one method."""

    label: str
    model: str
    method: str
    options: dict
    text: str
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    batch: int = 1
    promised: bool = False
    quick: bool = True
    packed: bool = False  # both models with packed weights (tokenprune_ext.pack)
    arguments: dict = field(default_factory=dict)


_TOPK = {"selector": "cls", "mode": "topk"}
_LARGE = {"model": "vit_large_patch16_224", "dtypes": (torch.bfloat16,), "arguments": {"img_size": 512}}
SETTINGS = (
    Setting("deit_s_224", "deit_small_patch16_224", "tome", {"r": 13}, "r=13", promised=True),
    Setting("deit_s_224", "deit_small_patch16_224", "tome", {"r": 13}, "r=13", promised=True, packed=True),
    Setting("deit_s_224", "deit_small_patch16_224", "tome", {"r": 13}, "r=13", batch=8, quick=False),
    Setting("deit_s_224", "deit_small_patch16_224", "evit", {"keep": 0.7}, "keep .7 at 3, 6, 9"),
    Setting("deit_s_224", "deit_small_patch16_224", "threshold", _TOPK, "keep .7 .49 .343"),
    Setting("vit_l_512", method="tome", options={"r": 40}, text="r=40", **_LARGE),
    Setting("vit_l_512", method="evit", options={"keep": 0.7}, text="keep .7 at 6, 12, 18", **_LARGE),
    Setting("vit_l_512", method="threshold", options=_TOPK, text="keep .7 .49 .343", **_LARGE),
)


def eager_tome(model, images, r: int, fused: bool):
    """ToMe on a timm ViT in plain PyTorch, from the paper: proportional attention, merge between attention
    and MLP.

    Args:
        model: unpatched timm ViT with one class token.
        images: ``[B, 3, H, W]``.
        r: merges per layer.
        fused: attention through SDPA with the log sizes as mask, instead of an eager softmax.

    Returns:
        Logits ``[B, classes]``.
    """
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    size = torch.ones_like(x[..., :1])
    for block in model.blocks:
        attn = block.attn
        batch, tokens, width = x.shape
        qkv = attn.qkv(block.norm1(x)).reshape(batch, tokens, 3, attn.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        bias = size.log().transpose(1, 2)[:, None]
        if fused:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(-1, 1, tokens, -1), scale=attn.scale)
        else:
            y = (q @ k.transpose(-2, -1) * attn.scale + bias).softmax(-1) @ v
        x = x + block.ls1(attn.proj(y.transpose(1, 2).reshape(batch, tokens, width)))
        x, size = tome_step(k.mean(1), x, size, r)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return model.forward_head(model.norm(x))


def _verify(model, setting: Setting, images, dtype):
    """Logits in float64 (float32 for large models); ToMe by its plain PyTorch form."""
    small = sum(p.numel() for p in model.parameters()) < 50e6
    precise = torch.float64 if small else torch.float32
    reference_model = copy.deepcopy(model).cpu().to(precise)
    inputs = images[:1].cpu().to(precise)
    if setting.method == "tome":
        reference = eager_tome(reference_model, inputs, setting.options["r"], fused=False)
    else:
        reference = _variants.make(reference_model, "reference", setting.method, **setting.options).model(inputs)
    # Round-off flips single choices between nearly equal tokens, so the bound is on the logits as a whole.
    allowed = 1e-3 if dtype == torch.float32 else 5e-2

    def verify(output) -> str | None:
        error = ((output[:1].cpu().to(precise) - reference).norm() / reference.norm()).item()
        return None if error < allowed else f"logits are off by {error:.1e} (allowed {allowed:.0e})"

    return verify


def _expected(dense_ms: float, parts_ms: dict, dense_macs: dict, macs: dict) -> float:
    """Speed-up if every part of the dense model shrank as its own work does."""
    fixed = {part: parts_ms[part] for part in ("linear", "conv", "attention")}
    fixed["other"] = max(dense_ms - sum(fixed.values()), 0.0)
    return dense_ms / sum(ms * macs[part] / dense_macs[part] for part, ms in fixed.items())


def _prepare(context: Context, setting: Setting, dtype: torch.dtype) -> Prepared:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(setting.model, **setting.arguments).eval()
    images, _ = preprocess(load_photo()[0], model)
    plain = model = model.to(context.device, dtype)
    if setting.packed:
        model = tokenprune_ext.pack(copy.deepcopy(model))
    images = images.to(context.device, dtype).expand(setting.batch, -1, -1, -1).contiguous()
    reduced = _variants.make(model, "reduced", setting.method, **setting.options).model
    dense = _variants.dense(model).model
    entries = {
        name: _variants.Variant(name, method, {}, m)
        for name, method, m in (("dense", None, model), ("reduced", setting.method, reduced))
    }
    macs = {name: _variants.macs_of(entry, _variants.layer_tokens(entry, images)[0]) for name, entry in entries.items()}
    ideal = _variants.ideal_speedup(macs["dense"], macs["reduced"])
    peers = {
        DENSE: Peer(lambda: dense(images), same=False),
        "dense timm": Peer(lambda: plain(images), same=False),
    }
    if setting.promised:
        compiled = torch.compile(_variants.share(plain), dynamic=False)
        peers["dense timm, torch.compile"] = Peer(lambda: compiled(images), same=False, slow=True)
    if setting.method == "tome":
        r = setting.options["r"]
        peers["ToMe in plain PyTorch (eager softmax)"] = Peer(lambda: eager_tome(plain, images, r, fused=False))
        peers["ToMe in plain PyTorch (SDPA with mask)"] = Peer(lambda: eager_tome(plain, images, r, fused=True))

    def extra(samples) -> dict:
        dense_ms, ours_ms = samples[DENSE].median_ms, samples["ours"].median_ms
        parts = time_parts(
            lambda: dense(images),
            device=context.device,
            rounds=3 if dense_ms > 500 else 9,
            clock=context.clock,
        )
        expected = _expected(dense_ms, parts, macs["dense"], macs["reduced"])
        return {
            "model": setting.label,
            "method": setting.method,
            "setting": setting.text,
            "batch": setting.batch,
            "dense_ms": dense_ms,
            "speedup": dense_ms / ours_ms,
            "ideal_speedup": ideal,
            "expected_speedup": expected,
            "efficiency": dense_ms / ours_ms / expected,
            "efficiency_target": EFFICIENCY if setting.promised else None,
            "parts_ms": parts,
        }

    promised = setting.promised and context.device.type == "cpu"
    return Prepared(
        ours=lambda: reduced(images),
        peers=peers,
        flops=2 * total_macs(macs["reduced"]) * setting.batch,
        bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        targets=(Target(DENSE, IDEAL_SHARE * ideal if promised else None),),
        verify=_verify(plain, setting, images, dtype),
        extra=extra,
    )


def cases(context: Context):
    """Cases of the family vit."""
    for setting in SETTINGS:
        if context.quick and not setting.quick:
            continue
        for dtype in setting.dtypes:
            if setting.packed and context.device.type != "cpu":
                continue
            name = f"{setting.label}_{setting.method}_b{setting.batch}{'_packed' if setting.packed else ''}"
            yield Case(name, dtype, lambda s=setting, d=dtype: _prepare(context, s, d))
