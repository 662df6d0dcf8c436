# SPDX-License-Identifier: Apache-2.0
"""``patch`` on timm's models: exact for every family it accepts, a named refusal for the others."""

import copy
import io

import pytest
import torch
from torch import nn

timm = pytest.importorskip("timm")

import tokenprune_ext as tp  # noqa: E402
from tokenprune_ext import reducers  # noqa: E402
from tokenprune_ext._patch import features, patched  # noqa: E402

from . import common  # noqa: E402

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 7}
MODULES = (
    "beit", "deit", "eva", "naflexvit", "vision_transformer", "vision_transformer_hybrid", "vision_transformer_relpos",
    "vision_transformer_sam",
)  # fmt: skip
NAMES = sorted(name for module in MODULES for name in timm.list_models(module=module))

# Blocks that are no attention and MLP in a row, or another attention.
REFUSED = {
    "vit_base_patch16_18x2_224": "ParallelThingsBlock",
    "vit_base_patch16_xp_224": "ParallelScalingBlock",
    "vit_dlittle_patch16_reg1_gap_256": "DiffAttention",
    "vit_dpwee_patch16_reg1_gap_256": "DiffParallelScalingBlock",
    "vit_dwee_patch16_reg1_gap_256": "DiffAttention",
    "vit_huge_patch14_xp_224": "ParallelScalingBlock",
    "vit_large_patch14_xp_224": "ParallelScalingBlock",
    "vit_pwee_patch16_reg1_gap_256": "ParallelScalingBlock",
    "vit_small_patch16_18x2_224": "ParallelThingsBlock",
}
# Other classes: attention in windows, or patches of several images in one sequence. Nothing to patch.
OTHER_CLASS = ("naflexvit", "samvit")
# Cannot be built at this width: a hybrid stem of fixed width.
NOT_BUILT = {"vit_base_mci_224"}
# Key heads are listed per block.
PER_BLOCK = "sapiens2"


def small(name, depth=2, **options):
    """A seeded small model and images of the right size."""
    torch.manual_seed(0)
    size = 56 if "patch14" in name else 64
    options = {**SMALL, "depth": depth, **options}
    if PER_BLOCK in name:
        options |= {"num_kv_heads": (1, 3)}
    try:
        model = timm.create_model(name, img_size=size, **options)
    except TypeError:  # classes without img_size
        model, size = timm.create_model(name, **options), timm.get_pretrained_cfg(name).input_size[-1]
    return common.liven(model), torch.randn(2, 3, size, size)


@pytest.mark.parametrize("name", NAMES)
def test_registry(name):
    """r = 0 and keep = 1 are the identity in every family; the others are refused by name."""
    if name in NOT_BUILT:
        with pytest.raises((AssertionError, TypeError)):
            small(name)
        return
    model, images = small(name)
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"must be a timm .*{REFUSED[name]}"):
            tp.patch(model, "tome", r=0)
        return
    if name.startswith(OTHER_CLASS):
        with pytest.raises(ValueError, match="must hold exactly one supported"):
            tp.patch(model, "tome", r=0)
        return
    with torch.no_grad():
        expected = model(images)
        assert expected.std() > 0
        for method, options in (("tome", {"r": 0}), ("evit", {"keep": 1.0, "score_mode": "mean"})):
            with patched(model, method, **options):
                assert torch.equal(model(images), expected)
        for method, options in IDENTITIES:
            with patched(model, method, **options):
                torch.testing.assert_close(model(images), expected, atol=2e-5, rtol=1e-4)
        with patched(model, "tome", r=2):
            reduced = model(images)
            assert reduced.shape == expected.shape and torch.isfinite(reduced).all()
        assert torch.equal(model(images), expected)


IDENTITIES = [
    ("tome", {"r": 0, "fast_idle": False}),
    ("evit", {"keep": 1.0, "fast_idle": False, "score_mode": "mean"}),
    ("threshold", {"mode": "topk", "keep": 1.0, "selector": "norm"}),
]
FAMILIES = {
    "plain": ("deit_tiny_patch16_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "layer scale": ("deit3_small_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "average pooling": ("vit_medium_patch16_gap_240", {}),
    "attention pooling": ("vit_base_patch16_siglip_224", {}),
    "pre-norm": ("vit_base_patch16_clip_224", {}),
    "residual post-norm": ("vit_base_patch16_rpn_224", {}),
    "qk norm": ("deit_tiny_patch16_224", {"qk_norm": True, "scale_attn_norm": True}),
    "no class token": ("deit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "gated mlp": ("vit_giant_patch14_dinov2", {}),
    "eva": ("eva_giant_patch14_224", {}),
    "eva-02": ("eva02_tiny_patch14_224", {}),
    "eva post-norm": ("eva02_tiny_patch14_224", {"use_post_norm": True, "scale_mlp": False}),
    "rotary": ("vit_small_patch16_rope_224", {}),
    "rotary per head": ("vit_small_patch16_rope_mixed_224", {}),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "perception encoder": ("vit_pe_core_tiny_patch16_384", {}),
    "grouped queries": ("vit_base_patch16_sapiens2", {}),
    "beit": ("beit_base_patch16_224", {}),
    "beit shared": ("beit_base_patch16_224", {"use_shared_rel_pos_bias": True}),
    "relative positions": ("vit_relpos_medium_patch16_cls_224", {}),
    "shared relative positions": ("vit_srelpos_small_patch16_224", {}),
    "relative positions, post-norm": ("vit_relpos_small_patch16_rpn_224", {}),
}
PLACED = [
    "dinov3",
    "rotary per head",
    "beit",
    "beit shared",
    "relative positions",
    "shared relative positions",
]
ADAPTERS = {"Eva": "timm_eva", "Beit": "timm_beit", "VisionTransformerRelPos": "timm_relpos"}


def adapter_of(model):
    from importlib import import_module

    return import_module(f"tokenprune_ext.integrations.{ADAPTERS.get(type(model).__name__, 'timm')}")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_in_every_family(family):
    name, options = FAMILIES[family]
    model, images = small(name, **options)
    common.hold_identities(model, lambda: model(images), adapter_of(model))


@pytest.mark.parametrize("family", PLACED)
def test_tokens_keep_their_places(family):
    name, options = FAMILIES[family]
    model, images = small(name, depth=3, **options)
    common.hold_places(model, images)


@pytest.mark.parametrize("family", ["dinov3", "rotary per head", "beit", "shared relative positions"])
def test_families_with_places_train_and_autocast(family):
    name, options = FAMILIES[family]
    model, images = small(name, **options)
    common.hold_autocast(model, lambda: model(images))
    common.hold_checkpointing(model, lambda: model(images), model.set_grad_checkpointing)
    model, images = model.double(), images.double()
    common.hold_gradients(model.train(), lambda: model(images))


@pytest.mark.parametrize("family", ["dinov3", "beit"])
@pytest.mark.parametrize("method", ["spvit", "dynamicvit"])
def test_masked_training_with_places(family, method):
    """Masked computation, as while training, equals the gathered one."""
    name, options = FAMILIES[family]
    model, images = small(
        name, **options, global_pool="token", **({} if family == "dinov3" else {"use_fc_norm": False})
    )
    outputs = []
    with torch.no_grad():
        for dense in (True, False):
            torch.manual_seed(0)
            with patched(model, method, layers=[1], dense=dense):
                outputs.append(model(images))
        torch.testing.assert_close(*outputs, atol=2e-5, rtol=1e-4)
    with patched(model, method, layers=[1]):
        model.train()
        model(images).square().sum().backward()
        assert all(p.grad is not None for p in model.blocks.parameters())


@pytest.mark.parametrize("family", ["dinov3", "rotary per head"])
def test_patch_dropout_with_rotary_embedding(family):
    name, options = FAMILIES[family]
    model, images = small(name, patch_drop_rate=0.5, **options)
    model.train()
    outputs = []
    for method in (None, {"r": 0, "fast_idle": False}, {"r": 1}):
        if method is not None:
            tp.patch(model, "tome", **method)
        torch.manual_seed(0)
        outputs.append(model(images))
        if method is not None:
            tp.unpatch(model)
    torch.testing.assert_close(outputs[1], outputs[0])
    assert torch.isfinite(outputs[2]).all()


@pytest.mark.parametrize("family", ["eva", "eva-02", "dinov3", "beit"])
def test_packed_weights_in_other_families(family):
    name, options = FAMILIES[family]
    model, images = small(name, **options)
    with torch.no_grad():
        for method in ({"r": 0}, {"r": 3}):
            with patched(model, "tome", **method):
                expected = model(images)
                tp.pack(model)
                torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)
                tp.unpack(model)


def test_dynamic_image_sizes_with_rotary_embedding():
    model, _ = small("vit_small_patch16_dinov3", dynamic_img_size=True)
    for size in ((64, 96), (32, 64)):
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = model(images)
            with patched(model, "tome", r=0, fast_idle=False):
                torch.testing.assert_close(model(images), expected)
                assert features(model, images)[1].grid == (size[0] // 16, size[1] // 16)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefix_tokens_stay_in_front(family):
    name, options = FAMILIES[family]
    model, images = small(name, **options)
    prefix = model.num_prefix_tokens
    tp.patch(model, "tome", r=3)
    for step in tp.trace(model, images):
        front = torch.arange(prefix, dtype=torch.int32).expand(2, -1)
        assert torch.equal(step.parent[:, :prefix], front)
        patches = step.index[:, prefix:]
        assert bool((step.index[:, :prefix] == -1).all()) and bool((patches >= 0).all())
    plan = model.token_reducer.plan(2, model.patch_embed.num_patches + prefix)
    assert [(int(s.attention_tokens[0]), int(s.tokens[0])) for s in tp.trace(model, images)] == plan


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["tome", "evit", "threshold"])
def test_training_step_equals_the_original(family, method):
    """With nothing to reduce, the gradients of the patched model are those of the original."""
    name, options = FAMILIES[family]
    model, images = small(name, **options)
    model, images = model.double(), images.double()
    gradients = []
    for reduced in (False, True):
        if reduced:
            tp.patch(model, method, **dict(IDENTITIES)[method])
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for original, patched_ in zip(*gradients, strict=True):
        torch.testing.assert_close(patched_, original, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("prefix", [{}, {"reg_tokens": 2}, {"class_token": False}])
def test_weighted_pooling_is_the_mean_over_all_patches(prefix):
    """The published MAE variant: every token counts as often as the patches it stands for."""
    model, images = small("deit_tiny_patch16_224", global_pool="avg", **prefix)
    tp.patch(model, "tome", r=3, weighted_pool=True, trace_source=True)
    with torch.no_grad():
        x, state = features(model, images)
        patches = model.token_reducer.restore(x[:, state.num_prefix :], state)
        assert patches.shape[1] == 16
        expected = model.head(model.fc_norm(patches.mean(1)))
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            model.forward_head(model.token_reducer.pool(x, state)), expected, atol=1e-5, rtol=1e-5
        )
        tp.unpatch(model)
        plain = model(images)
        with patched(model, "tome", r=0, weighted_pool=True):
            torch.testing.assert_close(model(images), plain)
        with patched(model, "tome", r=3):
            unweighted = model(images)
        assert not torch.allclose(unweighted, expected, atol=1e-4)
        assert "forward" not in vars(model) and torch.equal(model(images), plain)


def test_gate():
    from timm.models.vision_transformer import Attention

    model, images = small("deit_tiny_patch16_224")
    for block in model.blocks:
        torch.manual_seed(1)
        block.attn = Attention(48, num_heads=3, qkv_bias=True, gated=True).eval()
    with torch.no_grad():
        expected = model(images)
        tp.patch(model, reducers.Reducer())
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-4)


def test_learned_parts_belong_to_the_model():
    model, images = small("deit_tiny_patch16_224")
    keys = set(model.state_dict())
    tp.patch(model, "threshold", layers=[1])
    added = set(model.state_dict()) - keys
    assert added and all(key.startswith("token_reducer.selectors.0.") for key in added)
    model.train()
    output, state = features(model, images)
    loss = model.forward_head(output).square().mean() + model.token_reducer.losses(state)["ratio"]
    loss.backward()
    assert all(p.grad is not None for p in model.token_reducer.parameters())
    tp.unpatch(model)
    assert set(model.state_dict()) == keys and not {"forward_features", "forward_intermediates"} & set(vars(model))


def test_given_noise_decides():
    model, images = small("deit_tiny_patch16_224")
    tp.patch(model, "threshold", layers=[1], mode="sample")
    noise = torch.zeros(2, 16, 2)
    noise[..., 1] = 100.0
    with torch.no_grad():
        _, state = features(model, images, carry={"noise.1": noise})
    assert state.carry["decisions.1"].sum().item() == 2  # the class tokens alone


def test_copies_and_pickles_work_on_their_own():
    model, images = small("deit_tiny_patch16_224")
    tp.patch(model, "tome", r=3)
    with torch.no_grad():
        expected = model(images)
        twin = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for other in (twin, torch.load(buffer, weights_only=False)):
            assert torch.equal(other(images), expected)
            other.norm.weight.data.zero_()
            assert not torch.equal(other(images), expected)
        assert torch.equal(model(images), expected)
    tp.unpatch(twin)
    assert hasattr(model, "token_reducer")


def test_gradient_checkpointing():
    model, images = small("deit_tiny_patch16_224")
    tp.patch(model, "threshold", layers=[0, 1], generator=torch.Generator())
    gradients = []
    for saving in (False, True):
        model.set_grad_checkpointing(saving)
        model.token_reducer.generator.manual_seed(0)
        model.train().zero_grad()
        model(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


IDLE = {
    "tome": {"r": 0},
    "evit": {"keep": 1.0},
    "threshold": {"layers": []},
    "evo": {"ratio": 1.0},
    "hourglass": {"layer": -1},
}
REDUCING = {
    "tome": {"r": 4},
    "evit": {"keep": [0.6, 0.5]},
    "threshold": {"layers": [1]},
    "evo": {"ratio": 0.5, "layer": 1},
    "hourglass": {"layer": 1, "clusters": (2, 3)},
}


@pytest.mark.parametrize("method", IDLE)
@pytest.mark.parametrize("fmt", ["NCHW", "NLC"])
def test_intermediates_are_full_maps(method, fmt):
    model, images = small("vit_small_patch14_reg4_dinov2")
    idle = IDLE[method]
    with torch.no_grad():
        expected = model.forward_intermediates(images, indices=2, norm=True, output_fmt=fmt, return_prefix_tokens=True)
        with patched(model, method, **idle):
            got = model.forward_intermediates(images, indices=2, norm=True, output_fmt=fmt, return_prefix_tokens=True)
        torch.testing.assert_close(got, expected)
        with patched(model, method, **REDUCING[method]):
            reduced = model.forward_intermediates(images, output_fmt=fmt, intermediates_only=True)
            named = model.forward_intermediates(images, output_fmt=fmt, output_dict=True)
            last = model.get_intermediate_layers(images)
    assert [m.shape for m in reduced] == [m[0].shape for m in expected[1]]
    assert sorted(named) == ["image_features", "image_intermediates"] and last[0].shape == (2, 16, 48)


def test_dynamic_image_sizes():
    model, _ = small("deit_tiny_patch16_224", dynamic_img_size=True)
    tp.patch(model, "tome", r=2, trace_source=True)
    for size in ((64, 96), (32, 64)):
        with torch.no_grad():
            _, state = features(model, torch.randn(1, 3, *size))
        assert state.grid == (size[0] // 16, size[1] // 16)


def test_random_patch_drop_leaves_no_grid():
    model, images = small("deit_tiny_patch16_224", patch_drop_rate=0.5)
    tp.patch(model, "tome", r=2)
    model.train()
    assert features(model, images)[1].grid is None
    model.eval()
    assert features(model, images)[1].grid == (4, 4)


def test_a_wrapped_model_is_found():
    model, images = small("deit_tiny_patch16_224")
    wrapper = nn.Sequential(model, nn.Softmax(-1))
    assert tp.patch(wrapper, "evit") is wrapper and hasattr(model, "token_reducer")
    assert len(tp.trace(wrapper, images)) == 2
    tp.unpatch(wrapper)
    assert not hasattr(model, "token_reducer")


COMPILED = {
    "tome": {"r": 3},
    "evit": {"keep": 0.6},
    "threshold": {"mode": "topk"},
    "evo": {"ratio": 0.6, "layer": 1},
    "hourglass": {"layer": 1, "clusters": 4},
}


@pytest.mark.parametrize("method", COMPILED)
def test_compiled_model(method):
    from tokenprune_ext import _library

    if not _library.cpu_loaded():
        pytest.skip("the references read lengths on the host")
    model, images = small("deit_tiny_patch16_224")
    tp.patch(model, method, **COMPILED[method])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for batch in (2, 3, 5):
            more = images[:1].expand(batch, -1, -1, -1) + torch.arange(batch).view(-1, 1, 1, 1) / 4
            torch.testing.assert_close(compiled(more), model(more))


@pytest.mark.parametrize("method", ["evo", "hourglass"])
def test_unused_methods_of_every_family_run_the_models_own_blocks(method):
    for name, options in FAMILIES.values():
        model, images = small(name, **options)
        if method == "evo" and model.cls_token is None:
            with pytest.raises(ValueError, match="must have a class token"):
                tp.patch(model, method)
            continue
        with torch.no_grad():
            expected = model(images)
            with patched(model, method, **IDLE[method]):
                assert torch.equal(model(images), expected)
            with patched(model, method, **REDUCING[method]):
                reduced = model(images)
                assert torch.isfinite(reduced).all() and not torch.equal(reduced, expected)


@pytest.mark.parametrize("family", ["dinov3", "beit"])
def test_compiled_families_with_places(family):
    name, options = FAMILIES[family]
    model, _ = small(name, **options)
    common.hold_compile(model, lambda batch: torch.randn(batch, 3, 64, 64), methods=[("tome", {"r": 3})])


@pytest.mark.extended
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["evit", "threshold", "evo"])
def test_compiled_families(family, method):
    name, options = FAMILIES[family]
    model, images = small(name, **options)
    active = {"evit": {"keep": 0.6, "score_mode": "mean"}, "threshold": {"mode": "topk"}, "evo": {"layer": 1}}
    if not common.legal(method, active[method], adapter_of(model).facts(model)):
        pytest.skip("needs a class token")
    size = images.shape[-1]
    common.hold_compile(model, lambda batch: torch.randn(batch, 3, size, size), methods=[(method, active[method])])


def test_context_manager_keeps_the_error():
    model, _ = small("deit_tiny_patch16_224")
    with pytest.raises(ValueError, match="method must be one of"), patched(model, "tom"):
        pytest.fail("the block must not run")


def test_export_of_a_patched_model():
    from tokenprune_ext import _library

    if not _library.cpu_loaded():
        pytest.skip("the references read lengths on the host")
    model, images = small("deit_tiny_patch16_224")
    tp.patch(model, "tome", r=3)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        more = torch.cat([images, images])
        torch.testing.assert_close(program.module()(more), model(more))


def _two_models():
    return nn.ModuleList(small("deit_tiny_patch16_224")[0] for _ in range(2))


def _changed(change):
    def build():
        model, _ = small("deit_tiny_patch16_224")
        change(model)
        return model

    return build


def _custom_attention(model):
    model.blocks[1].attn = nn.MultiheadAttention(48, 3)


def _batch_norm(model):
    model.blocks[1].norm2 = nn.BatchNorm1d(48)


def _unknown_mlp(model):
    model.blocks[0].mlp = nn.Sequential(nn.Linear(48, 48))


def _unknown_scale(model):
    model.blocks[0].ls1 = nn.Linear(48, 48)


def _adapter_part(model):
    model.blocks[0].extra = nn.Linear(48, 48)


def _own_forward(model):
    model.forward_features = lambda x: x


def _own_block(model):
    class Wrapped(nn.Module):
        def forward(self, x):
            return x

    model.blocks[0] = Wrapped()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: nn.Linear(2, 2), "none in Linear"),
        (lambda: timm.create_model("resnet18"), "none in ResNet"),
        (_two_models, r"exactly one .*'0', '1'"),
        (_changed(_custom_attention), r"blocks.1.attn must be a timm Attention, got MultiheadAttention"),
        (_changed(_batch_norm), r"blocks.1.norm2 must be one of .*got BatchNorm1d"),
        (_changed(_unknown_mlp), r"blocks.0.mlp must be one of .*got Sequential"),
        (_changed(_unknown_scale), r"blocks.0.ls1 must be one of .*got Linear"),
        (_changed(_adapter_part), r"blocks.0 must have known parts only, got extra"),
        (_changed(_own_forward), "forward_features, got an overridden one"),
        (_changed(_own_block), r"blocks.0 must be a timm Block .*got Wrapped"),
    ],
)
def test_refusals_name_the_component(build, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        tp.patch(model, "tome")
    assert not hasattr(model, "token_reducer")


def test_wrong_use():
    model, images = small("deit_tiny_patch16_224")
    for call in (tp.unpatch, lambda m: tp.trace(m, images), lambda m: features(m, images)):
        with pytest.raises(ValueError, match="must be patched"):
            call(model)
    tp.patch(model, "tome")
    with pytest.raises(ValueError, match="unpatched first, got one with ToMe"):
        tp.patch(model, "evit")
    with pytest.raises(ValueError, match="attn_mask"):
        model(images, attn_mask=torch.ones(17, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="is_causal"):
        model.forward_features(images, is_causal=True)
    tp.unpatch(model)
    with pytest.raises(ValueError, match="method must be one of"):
        tp.patch(model, "tom")
    with pytest.raises(ValueError, match="options must be among"):
        tp.patch(model, "tome", rate=2)
    with pytest.raises(ValueError, match="the model itself tells"):
        tp.patch(model, "tome", depth=1)
    with pytest.raises(ValueError, match="must be a module"):
        tp.patch(3, "tome")
    headless, _ = small("deit_tiny_patch16_224", class_token=False, global_pool="avg")
    with pytest.raises(ValueError, match="needs a class token"):
        tp.patch(headless, "evit", score_mode="cls")
    dropping, images = small("deit_tiny_patch16_224", attn_drop_rate=0.1)
    tp.patch(dropping, reducers.Reducer())
    dropping(images)
    with pytest.raises(ValueError, match="attn_drop must be 0 while training"):
        dropping.train()(images)


@torch.no_grad()
def test_a_hook_on_a_norm_runs_where_the_norm_would_be_fused_into_a_gather():
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=32, depth=2, embed_dim=48, num_heads=3).eval()
    tp.patch(model, "threshold", layers=[1], mode="topk", keep=0.5, selector="norm")
    seen = []
    model.blocks[1].norm1.register_forward_hook(lambda *args: seen.append(args[2].shape))
    model(torch.randn(1, 3, 32, 32))
    assert len(seen) == 1
