# SPDX-License-Identifier: Apache-2.0
"""DeiT-S at 224 pixels with every method of the library."""

import functools

import timm
import tokenprune_ext
import torch
import torch.nn.functional as F

from benchmarks.core import Context
from benchmarks.models._common import Backbone, Row, case_of, settings
from benchmarks.ops.merge import tome_step

SMALL = Backbone("deit_s_224", lambda: timm.create_model("deit_small_patch16_224"))
IDEAL, EFFICIENCY = 0.9, 0.95


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


def _tome_peers(model, images) -> dict:
    return {
        "ToMe in plain PyTorch (eager softmax)": lambda: eager_tome(model, images, 13, fused=False),
        "ToMe in plain PyTorch (SDPA with mask)": lambda: eager_tome(model, images, 13, fused=True),
    }


def _patch(method, options, model):
    return tokenprune_ext.patch(model, method, **options)


def _published(name, options, model):
    """The reducer of a published model, gates included, in another model of the same size."""
    with torch.random.fork_rng(devices=()), torch.inference_mode(False):
        torch.manual_seed(0)
        reducer = tokenprune_ext.create_model(name, **options).token_reducer.requires_grad_(False)
    return tokenprune_ext.patch(model, reducer)


def _own(method, text, options, **more) -> Row:
    return Row(method, method, text, functools.partial(_patch, method, options), **more)


def _trained(method, text, name, options, **more) -> Row:
    return Row(method, method, text, functools.partial(_published, name, options), **more)


_PROMISED = {"ideal_share": IDEAL, "efficiency": EFFICIENCY, "headline": True}
_SLOWER = {"ideal_share": 0.85}
ROWS = (
    _own("tome", "r=13", {"r": 13}, peers=_tome_peers, **_PROMISED),
    _trained("evit", "keep .7", "deit_small_patch16_shrink_base", {"fuse_token": True}, **_PROMISED),
    _own("hourglass", "14x14 to 10x10 at 4", {"layer": 4, "clusters": 100}, **_PROMISED),
    _own("evo", "ratio .5 from 4", {"layer": 4, "ratio": 0.5}, **_PROMISED),
    _own("ats", "sampled at 3, 6, 9", {"layers": [3, 6, 9]}, **_PROMISED),
    _own("act", "16 hashes", {"q_hashes": 16}, **_SLOWER),
    _own("smyrf", "4 rounds of 32", {"rounds": 4, "cluster_size": 32}, **_SLOWER),
    _trained("dynamicvit", "keep .7 .49 .343", "dynamicvit_deit_s", {"base_rate": 0.7}, headline=True),
    _trained("spvit", "three selectors", "spvit_deit_small", {}, headline=True),
    _trained("svit", "gates from 3 on", "svit_s", {"mode": "threshold"}, headline=True),
    _own("threshold", "keep .7 .49 .343", {"selector": "cls", "mode": "topk"}),
)


def cases(context: Context):
    """Cases of the family deit."""
    for place in settings(context, SMALL, context.dtypes, (1,) if context.quick else (1, 8)):
        yield case_of(context, place, None)
        for row in ROWS:
            yield case_of(context, place, row)
