# SPDX-License-Identifier: Apache-2.0
"""Published names of DynamicViT, SPViT, SViT and EViT: settings, patched heads, intermediate maps, compilation."""

import pytest
import timm
import torch
from tokenprune_ext import _library, create_model, features, list_models, patch, patched, trace
from torch import nn

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}
GATED = ("dynamicvit_deit_s", "dynamicvit_lvvit_s", "spvit_deit_small", "spvit_lvvit_s", "svit_s")


def small(name, **options):
    torch.manual_seed(0)
    model = create_model(name, **SMALL, **options).eval()
    for linear in (module for module in model.token_reducer.modules() if isinstance(module, nn.Linear)):
        nn.init.normal_(linear.weight, std=0.5)
    return model, torch.randn(3, 3, 32, 32)


def test_names():
    assert {"spvit_deit_tiny", "spvit_deit_base", "spvit_lvvit_m"} <= set(list_models("spvit_*"))
    assert len(list_models("dynamicvit_*")) == 5
    assert {"svit_s", "lvvit_m", "deit_256_patch16_224", "deit_small_patch16_shrink_base"} <= set(list_models())
    assert timm.is_model("spvit_deit_small") and timm.is_model("svit_s")


def test_published_settings():
    with torch.device("meta"):
        models = {
            name: create_model(name)
            for name in ("dynamicvit_deit_b", "dynamicvit_lvvit_m", "spvit_deit_small", "svit_s")
        }
        shrink = create_model("deit_small_patch16_shrink_base", base_keep_rate=0.6, drop_loc=[2, 5])
        half = create_model("dynamicvit_lvvit_s", base_rate=0.5)
        listed = create_model("spvit_deit_tiny", token_ratio=[0.617, 0.369, 0.137])
    deit_b = models["dynamicvit_deit_b"]
    assert deit_b.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2) and deit_b.token_reducer.layers == [3, 6, 9]
    assert models["dynamicvit_lvvit_m"].token_reducer.layers == [5, 10, 15]
    spvit = models["spvit_deit_small"].token_reducer
    assert (spvit.layers, spvit.package, spvit.mode) == ([3, 6, 9], "sum", "threshold")
    assert spvit.keep == pytest.approx([0.7, 0.49, 0.343]) and not spvit.ratio_per_sample
    svit = models["svit_s"]
    assert svit.blocks[0].norm1.eps == 1e-5 and svit.norm.eps == 1e-6 and svit.token_reducer.mode == "sample"
    assert shrink.token_reducer.keep[2] == shrink.token_reducer.keep[5] == 0.6 and shrink.token_reducer.fuse_token
    assert half.token_reducer.keep == [0.5, 0.25, 0.125] and half.token_reducer.layers == [4, 8, 12]
    assert listed.token_reducer.keep == [0.617, 0.369, 0.137]
    assert models["spvit_deit_small"].pretrained_cfg["crop_pct"] == 0.875


@pytest.mark.parametrize("name", GATED)
def test_logits_read_the_class_token_of_every_image(name):
    model, images = small(name, mode="threshold") if "svit" in name or "spvit" in name else small(name)
    with torch.no_grad():
        logits = model(images)
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-4)
        assert logits.shape == (3, 5) and torch.isfinite(logits).all()
        for step in trace(model, images):
            assert step.parent.shape == (3, 17) and bool((step.parent[:, 0] == 0).all())


@pytest.mark.parametrize("name", GATED)
@pytest.mark.parametrize("fmt", ["NCHW", "NLC"])
def test_intermediates_are_full_maps(name, fmt):
    model, images = small(name)
    with torch.no_grad():
        maps = model.forward_intermediates(images, output_fmt=fmt, intermediates_only=True, return_prefix_tokens=True)
    assert len(maps) == 4
    for patches, front in maps:
        assert tuple(patches.shape) == ((3, 24, 4, 4) if fmt == "NCHW" else (3, 16, 24))
        assert tuple(front.shape) == (3, 1, 24)


@pytest.mark.parametrize("name", GATED)
def test_training_step(name):
    model, images = small(name)
    model.train()
    x, state = features(model, images)
    ratio = model.token_reducer.losses(state)["ratio"]
    (model.head(x[:, 0]).square().mean() + ratio).backward()
    assert all(p.grad is not None for p in model.token_reducer.parameters())
    assert model(images).shape == (3, 5)


@pytest.mark.parametrize("name", ["spvit_lvvit_s", "dynamicvit_deit_s"])
def test_compiled_model(name):
    if not _library.cpu_loaded():
        pytest.skip("the references read lengths on the host")
    model, images = small(name)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    config = {"capture_dynamic_output_shape_ops": True, "error_on_recompile": True}
    with torch.no_grad(), torch._dynamo.config.patch(**config):
        for batch in (2, 3, 5):
            more = images[:1].expand(batch, -1, -1, -1) + torch.arange(batch).view(-1, 1, 1, 1) / 4
            torch.testing.assert_close(compiled(more), model(more))


FAMILIES = {
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "layer scale": ("deit3_small_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "pre-norm": ("vit_base_patch16_clip_224", {}),
    "qk norm": ("deit_tiny_patch16_224", {"qk_norm": True}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_transformers_of_timm(family):
    """Everything kept is the identity in each family; prefix tokens stay in front; gathered is masked."""
    name, options = FAMILIES[family]
    torch.manual_seed(0)
    size = 56 if "patch14" in name else 64
    model = timm.create_model(name, img_size=size, depth=3, embed_dim=24, num_heads=3, num_classes=5, **options).eval()
    images = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model(images)
        for masked in (False, True):
            with patched(model, "dynamicvit", keep=1.0, layers=[1], dense=masked, fast_idle=False):
                torch.testing.assert_close(model(images), expected, atol=2e-5, rtol=1e-4)
        for method, setting in (("spvit", {}), ("dynamicvit", {"keep": 0.5})):
            torch.manual_seed(1)
            with patched(model, method, layers=[1, 2], **setting):
                for linear in (m for m in model.token_reducer.modules() if isinstance(m, nn.Linear)):
                    nn.init.normal_(linear.weight, std=0.5)
                gathered = model(images)
                for step in trace(model, images):
                    assert torch.equal(step.parent[:, : model.num_prefix_tokens], _front(model))
                model.token_reducer.dense = True
                torch.testing.assert_close(model(images), gathered, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(model(images), expected)


def _front(model):
    return torch.arange(model.num_prefix_tokens, dtype=torch.int32).expand(2, -1)


def test_other_classifiers_are_refused():
    for options in ({"global_pool": "avg"}, {"global_pool": "avg", "class_token": False}, {"global_pool": "map"}):
        model = timm.create_model("deit_tiny_patch16_224", depth=4, **options)
        for method in ("spvit", "dynamicvit"):
            with pytest.raises(ValueError, match="must read the class token"):
                patch(model, method)


def test_wrong_options():
    with pytest.raises(ValueError, match="options must be among"):
        create_model("spvit_deit_small", rate=0.5)
    with pytest.raises(ValueError, match="base_rate must not be given beside keep"):
        create_model("spvit_deit_small", base_rate=0.5, keep=0.5)
    with pytest.raises(ValueError, match="options must be among"):
        create_model("dynamicvit_deit_s", fuse_token=True)
