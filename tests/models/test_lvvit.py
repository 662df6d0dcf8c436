# SPDX-License-Identifier: Apache-2.0
"""LV-ViT: stem, scaled branches, stochastic depth, patch classifier. No golden file shows the real stem."""

import pytest
import torch
import torch.nn.functional as F
from tokenprune_ext import create_model, features, patch
from tokenprune_ext.models.lvvit import LVViT

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}


def small(**options):
    torch.manual_seed(0)
    model = LVViT(**SMALL | options)
    for name, parameter in model.named_parameters():  # nothing may hide behind small or zero weights
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name or ".bn" in name else 0.0, 0.2)
    return model.double().eval()


def pictures(batch=2):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def written_out(model, images, drop=None):
    """Tokens behind the last norm, from the weights by name."""
    weights = dict(model.named_parameters()) | dict(model.named_buffers())
    x = images
    for number, (stride, padding) in enumerate(((2, 3), (1, 1), (1, 1)), 1):
        stem = f"patch_embed.bn{number}"
        x = F.conv2d(x, weights[f"patch_embed.conv{number}.weight"], stride=stride, padding=padding)
        mean, variance = weights[f"{stem}.running_mean"], weights[f"{stem}.running_var"]
        x = (x - mean.view(1, -1, 1, 1)) / (variance.view(1, -1, 1, 1) + 1e-5).sqrt()
        x = (x * weights[f"{stem}.weight"].view(1, -1, 1, 1) + weights[f"{stem}.bias"].view(1, -1, 1, 1)).relu()
    x = F.conv2d(x, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=4)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([weights["cls_token"].expand(len(x), -1, -1), x], 1) + weights["pos_embed"]
    norm = lambda x, name: F.layer_norm(x, (24,), weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-5)
    for i in range(3):
        keep = [1.0, 1.0] if drop is None else drop[i]
        z = norm(x, f"blocks.{i}.norm1")
        q, k, v = (z @ weights[f"blocks.{i}.attn.qkv.weight"].T).unflatten(-1, (3, 3, 8)).unbind(2)
        mix = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 8**-0.5).softmax(-1)
        z = torch.einsum("bhqk,bkhd->bqhd", mix, v).flatten(2)
        z = F.linear(z, weights[f"blocks.{i}.attn.proj.weight"], weights[f"blocks.{i}.attn.proj.bias"])
        x = x + z * keep[0] / 2
        z = norm(x, f"blocks.{i}.norm2")
        z = F.gelu(F.linear(z, weights[f"blocks.{i}.mlp.fc1.weight"], weights[f"blocks.{i}.mlp.fc1.bias"]))
        z = F.linear(z, weights[f"blocks.{i}.mlp.fc2.weight"], weights[f"blocks.{i}.mlp.fc2.bias"])
        x = x + z * keep[1] / 2
    return norm(x, "norm")


def test_published_layout():
    with torch.device("meta"):
        model = create_model("lvvit_s")
    assert len(model.blocks) == 16 and model.embed_dim == 384 and model.blocks[0].attn.num_heads == 6
    assert model.blocks[0].mlp.fc1.out_features == 3 * 384 and model.blocks[0].attn.qkv.bias is None
    assert model.norm.eps == model.blocks[0].norm1.eps == 1e-5
    assert [tuple(getattr(model.patch_embed, f"conv{i}").weight.shape) for i in (1, 2, 3)] == [
        (64, 3, 7, 7),
        (64, 64, 3, 3),
        (64, 64, 3, 3),
    ]
    assert tuple(model.patch_embed.proj.weight.shape) == (384, 64, 8, 8)


def test_forward_equals_the_formulas():
    model, images = small(), pictures()
    for norm in (model.patch_embed.bn1, model.patch_embed.bn2, model.patch_embed.bn3):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        x = written_out(model, images)
        torch.testing.assert_close(model.forward_features(images), x, atol=1e-10, rtol=1e-10)
        cls, aux = model.head(x[:, 0]), model.aux_head(x[:, 1:])
        torch.testing.assert_close(model(images), cls + 0.5 * aux.max(1).values, atol=1e-10, rtol=1e-10)
        model.train()
        model.patch_embed.eval()
        torch.testing.assert_close(model(images), cls, atol=1e-10, rtol=1e-10)


def test_stochastic_depth_is_on_both_branches_and_rises_linearly():
    """Each branch of each image is dropped on its own or divided by its keep probability, then halved."""
    model, images = small(drop_path_rate=0.4), pictures(4)
    assert [block.drop_path2.drop_prob for block in model.blocks[1:]] == pytest.approx([0.2, 0.4])
    assert isinstance(model.blocks[0].drop_path1, torch.nn.Identity)
    drawn = []

    def watch(module, args, out):
        kept = (out != 0).flatten(1).any(1)
        drawn.append(kept.view(-1, 1, 1).double() / (1 - module.drop_prob))

    for block in model.blocks[1:]:
        for part in (block.drop_path1, block.drop_path2):
            part.register_forward_hook(watch)
    model.train()
    model.patch_embed.eval()
    torch.manual_seed(3)
    with torch.no_grad():
        x = model.forward_features(images)
        drops = [[1.0, 1.0], drawn[0:2], drawn[2:4]]
        torch.testing.assert_close(x, written_out(model, images, drops), atol=1e-10, rtol=1e-10)
    assert any(bool((factor == 0).any()) for factor in drawn)
    torch.manual_seed(3)  # the same draws through the patched model
    drawn.clear()
    patch(model, "tome", r=0, fast_idle=False)
    model.train()
    model.patch_embed.eval()
    with torch.no_grad():
        torch.testing.assert_close(features(model, images)[0], x, atol=1e-10, rtol=1e-10)


def test_the_stem_learns_statistics_while_training():
    model = small().train()
    before = model.patch_embed.bn1.running_mean.clone()
    model(pictures())
    assert not torch.equal(before, model.patch_embed.bn1.running_mean)
    assert int(model.patch_embed.bn1.num_batches_tracked) == 1


@pytest.mark.parametrize("method", ["spvit", "dynamicvit", "tome", "evit", "threshold", "svit"])
def test_patch_logits_are_those_of_the_tokens_that_are_left(method):
    model, images = small(), pictures(3)
    options = {
        "spvit": {"layers": [1, 2]},
        "dynamicvit": {"layers": [1, 2]},
        "tome": {"r": 3},
        "evit": {"keep": 0.6, "fuse_token": False},
        "threshold": {"mode": "topk"},
        "svit": {"mode": "threshold"},
    }
    patch(model, method, **options[method])
    for linear in (m for m in model.token_reducer.modules() if isinstance(m, torch.nn.Linear)):
        torch.nn.init.normal_(linear.weight, std=0.5)
    with torch.no_grad():
        logits = model(images)
        x, state = features(model, images)
        for row in range(3):
            if state.packed:
                part = x[state.cu_seqlens[row] : state.cu_seqlens[row + 1]]
                patches = part[state.index[state.cu_seqlens[row] : state.cu_seqlens[row + 1]] >= 0]
            else:
                part, patches = x[row], x[row, 1:]
            expected = model.head(part[0])
            if len(patches):
                expected = expected + 0.5 * model.aux_head(patches).max(0).values
            torch.testing.assert_close(logits[row], expected, atol=1e-10, rtol=1e-10)
    assert x.shape[0] * (1 if state.packed else x.shape[1]) <= 3 * (1 + 16 + 2)


def test_masked_evaluation_reads_dropped_patches_too():
    """As published: the largest patch logit is taken over all patches, package tokens excluded."""
    model, images = small(), pictures()
    patch(model, "spvit", layers=[1], dense=True)
    with torch.no_grad():
        x, _ = features(model, images)
        assert x.shape[1] == 1 + 16 + 1
        expected = model.head(x[:, 0]) + 0.5 * model.aux_head(x[:, 1:17]).max(1).values
        torch.testing.assert_close(model(images), expected)


def test_an_image_without_patches_has_the_class_token_alone():
    model, images = small(), pictures()
    patch(model, "spvit", layers=[1])
    selector = model.token_reducer.selectors[0]
    torch.nn.init.zeros_(selector.out_conv[4].weight)
    selector.out_conv[4].bias.data = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    with torch.no_grad():
        x, state = features(model, images)
        assert state.cu_seqlens.diff().tolist() == [2, 2]
        torch.testing.assert_close(model(images), model.head(x[::2]))


def test_bad_input():
    with pytest.raises(ValueError, match="stem must be one of"):
        LVViT(stem="8_2", **SMALL)
    with pytest.raises(ValueError, match="divisible by an even patch_size"):
        LVViT(**SMALL | {"img_size": 30})
    with pytest.raises(ValueError, match=r"images must be \(32, 32\)"):
        small()(torch.randn(1, 3, 40, 40, dtype=torch.float64))
    with pytest.raises(ValueError, match="options must be among"):
        create_model("lvvit_s", width=3)
