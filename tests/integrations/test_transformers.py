# SPDX-License-Identifier: Apache-2.0
"""``patch`` on the vision towers of transformers, alone and within larger models; built small and at random."""

import copy
import io

import pytest
import tokenprune_ext as tp
import torch
from tokenprune_ext import reducers
from torch import nn

transformers = pytest.importorskip("transformers")
if int(transformers.__version__.split(".")[0]) < 5:
    pytest.skip("the layout of transformers 5", allow_module_level=True)

from tokenprune_ext._patch import features, patched  # noqa: E402
from tokenprune_ext.integrations import transformers as adapter  # noqa: E402

from . import common  # noqa: E402

BASE = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 64,
    "patch_size": 16,
    "num_labels": 7,
}
WIDE = {**BASE, "intermediate_size": 96}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 60,
    "max_position_embeddings": 8,
}

FAMILIES = {
    "vit": ("ViTForImageClassification", "ViTConfig", WIDE),
    "vit without head": ("ViTModel", "ViTConfig", WIDE),
    "deit": ("DeiTForImageClassification", "DeiTConfig", WIDE),
    "deit with teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", WIDE),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", BASE),
    "dinov2 swiglu": ("Dinov2Model", "Dinov2Config", {**BASE, "use_swiglu_ffn": True}),
    "dinov2 registers": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {**BASE, "num_register_tokens": 3},
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**WIDE, "num_register_tokens": 2}),
    "dinov3 gated": ("DINOv3ViTModel", "DINOv3ViTConfig", {**WIDE, "use_gated_mlp": True}),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", WIDE),
    "clip projection": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", WIDE),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", WIDE),
    "beit": ("BeitForImageClassification", "BeitConfig", {**WIDE, "use_relative_position_bias": True}),
    "beit shared": (
        "BeitForImageClassification",
        "BeitConfig",
        {**WIDE, "use_shared_relative_position_bias": True, "use_mean_pooling": False},
    ),
    "beit absolute": ("BeitForImageClassification", "BeitConfig", {**WIDE, "use_absolute_position_embeddings": True}),
}
TOWERS = ("vit", "dinov2", "dinov3", "clip", "siglip", "beit")


def lively(model):
    """Seeded weights that hide nothing."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "position_bias" not in name:
            nn.init.normal_(parameter, std=0.15, generator=generator)
    return common.liven(model)


def small(family, **options):
    """A seeded small model."""
    torch.manual_seed(0)
    model, config, sizes = FAMILIES[family]
    return lively(getattr(transformers, model)(getattr(transformers, config)(**{**sizes, **options})))


def images(batch=2):
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def read(output):
    """What a user reads from the output of a model."""
    names = ("logits", "image_embeds", "pooler_output", "last_hidden_state")
    return next(output[name] for name in names if output.get(name) is not None)


def tower_of(model):
    """``(owner or None, tower)``."""
    ((name, tower),) = adapter.find(model)
    return (model.get_submodule(name.rpartition(".")[0]) if name else None), tower


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_in_every_family(family):
    model, x = small(family), images()
    owner, tower = tower_of(model)
    common.hold_identities(model, lambda: read(model(x)), adapter, owner, tower)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", TOWERS)
def test_both_implementations_of_attention(family, implementation):
    model, x = small(family), images()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        expected = read(model(x))
        with patched(model, "tome", r=0):
            assert torch.equal(read(model(x)), expected)
        with patched(model, "tome", r=0, fast_idle=False):
            torch.testing.assert_close(read(model(x)), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["dinov3", "beit", "beit shared"])
def test_tokens_keep_their_places(family):
    common.hold_places(small(family), images())


@pytest.mark.parametrize("family", TOWERS)
def test_training(family):
    model, x = small(family), images()
    common.hold_autocast(model, lambda: read(model(x)))

    def switch(on):
        model.gradient_checkpointing_enable() if on else model.gradient_checkpointing_disable()

    common.hold_checkpointing(model, lambda: read(model(x)), switch)
    model, x = model.double(), x.double()
    common.hold_gradients(model, lambda: read(model(x)))
    common.hold_gradients(model.train(), lambda: read(model(x)))


def test_dropout_and_stochastic_depth_are_the_models():
    x = images()
    for family, options in (
        ("vit", {"hidden_dropout_prob": 0.3}),
        ("beit", {"hidden_dropout_prob": 0.3, "drop_path_rate": 0.4}),
        ("dinov2", {"drop_path_rate": 0.4}),
    ):
        model = small(family, **options).train()
        outputs = []
        for method in (None, {"r": 0, "fast_idle": False}, {"r": 2}):
            if method:
                tp.patch(model, "tome", **method)
            torch.manual_seed(0)
            outputs.append(read(model(x)))
            if method:
                tp.unpatch(model)
        torch.testing.assert_close(outputs[1], outputs[0])
        assert torch.isfinite(outputs[2]).all()


@pytest.mark.parametrize("family", ["vit", "dinov3", "clip"])
def test_dropped_attention_weights_are_refused_while_training(family):
    option = "attention_probs_dropout_prob" if family == "vit" else "attention_dropout"
    model, x = small(family, **{option: 0.1}), images()
    tp.patch(model, "tome", r=3)
    model(x)
    with pytest.raises(ValueError, match="attn_drop must be 0"):
        model.train()(x)


@pytest.mark.parametrize("family", ["vit", "dinov3"])
def test_compile(family):
    common.hold_compile(small(family), images, read, methods=[("tome", {"r": 3})])


@pytest.mark.extended
@pytest.mark.parametrize("family", TOWERS)
@pytest.mark.parametrize("method", ["evit", "threshold", "evo"])
def test_compile_every_family(family, method):
    options = {"evit": {"keep": 0.6, "score_mode": "mean"}, "threshold": {"mode": "topk"}, "evo": {"layer": 1}}[method]
    model = small(family)
    owner, tower = tower_of(model)
    if not common.legal(method, options, adapter.facts(tower, owner)):
        pytest.skip("needs a class token")
    common.hold_compile(model, images, read, methods=[(method, options)])


@pytest.mark.parametrize("family", ["vit", "dinov2 registers", "dinov3", "clip", "siglip", "beit"])
def test_hidden_states_are_full_maps(family):
    """What dense heads and vision-language models read: every layer, restored."""
    model, x = small(family), images()
    with torch.no_grad():
        expected = model(x, output_hidden_states=True).hidden_states
        with patched(model, "tome", r=0):
            for found, wanted in zip(model(x, output_hidden_states=True).hidden_states, expected, strict=True):
                assert torch.equal(found, wanted)
        with patched(model, "tome", r=3):
            hidden = model(x, output_hidden_states=True).hidden_states
            assert [h.shape for h in hidden] == [h.shape for h in expected]
            assert torch.equal(hidden[0], expected[0])
            chosen = model(x, output_hidden_states=[-2]).hidden_states
            assert torch.equal(chosen[-2], hidden[-2]) and [h is None for h in chosen] == [True, True, False, True]
            as_tuple = model(x, output_hidden_states=True, return_dict=False)
            assert isinstance(as_tuple, tuple) and len(as_tuple[-1]) == 4
        tp.patch(model, "evit", keep=0.5, score_mode="mean")
        assert model(x, output_hidden_states=True).hidden_states[-1].shape == expected[-1].shape
        tp.unpatch(model)


def test_hidden_states_of_a_method_that_cannot_restore():
    class Half(reducers.Reducer):
        def block(self, x, state, layer, run):
            return run.idle(x[:, :9], state)

    model, x = small("vit"), images()
    tp.patch(model, Half())
    with pytest.raises(ValueError, match="must restore reduced tokens, and Half does not"):
        model(x, output_hidden_states=True)


def test_dense_heads_read_restored_maps():
    """A segmentation model on hidden states works unchanged."""
    torch.manual_seed(0)
    options = {**WIDE, "num_hidden_layers": 4, "out_indices": [1, 2, 3, 4], "pool_scales": [1, 2]}
    model = lively(transformers.BeitForSemanticSegmentation(transformers.BeitConfig(**options))).eval()
    x = images()
    with torch.no_grad():
        expected = model(x).logits
        with patched(model, "tome", r=0):
            assert torch.equal(model(x).logits, expected)
        with patched(model, "tome", r=3):
            assert model(x).logits.shape == expected.shape


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_towers_within_larger_models(name):
    text = {**TEXT, "projection_size": WIDE["hidden_size"]}  # SigLIP's; CLIP projects both
    config = getattr(transformers, f"{name}Config")(vision_config={**WIDE}, text_config=text)
    torch.manual_seed(0)
    model = lively(getattr(transformers, f"{name}Model")(config)).eval()
    inputs = {"pixel_values": images(), "input_ids": torch.randint(1, 50, (3, 8))}
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
        for options in ({"r": 0}, {"r": 0, "fast_idle": False}):
            with patched(model, "tome", **options):
                assert hasattr(model.vision_model, "token_reducer")
                torch.testing.assert_close(model(**inputs).logits_per_image, expected, atol=1e-4, rtol=1e-4)
        with patched(model, "tome", r=3):
            assert not torch.allclose(model(**inputs).logits_per_image, expected)
            model.get_image_features(pixel_values=images())
    wrapped = getattr(transformers, f"{name}ForImageClassification")
    config.num_labels = 5
    model = lively(wrapped(config)).eval()
    with torch.no_grad():
        expected = model(images()).logits
        with patched(model, "tome", r=0, fast_idle=False):
            torch.testing.assert_close(model(images()).logits, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="got pooling 'avg'"):
        tp.patch(model, "dynamicvit")


def test_distillation_token_stays():
    model, x = small("deit with teacher"), images()
    tp.patch(model, "tome", r=3)
    assert model.deit.token_reducer.distill_token
    for step in tp.trace(model, x):
        assert torch.equal(step.parent[:, :2], torch.tensor([[0, 1], [0, 1]], dtype=torch.int32))


def test_weighted_pooling():
    """Mean pooling within the tower sees the reducer's weights."""
    model, x = small("beit"), images()
    tp.patch(model, "tome", r=3, weighted_pool=True, trace_source=True)
    with torch.no_grad():
        y, state = features(model, x)
        patches = model.beit.token_reducer.restore(y[:, 1:], state)
        expected = model.classifier(model.beit.pooler.layernorm(patches.mean(1)))
        torch.testing.assert_close(model(x).logits, expected, atol=1e-5, rtol=1e-5)


def test_arguments_of_the_embeddings():
    model, x = small("vit"), images(1)
    large = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        expected = model(large, interpolate_pos_encoding=True).logits
        with patched(model, "tome", r=0, fast_idle=False):
            torch.testing.assert_close(model(large, interpolate_pos_encoding=True).logits, expected)
            assert features(model, x)[1].grid == (4, 4)
    model = small("dinov2")
    masked = torch.zeros(1, 16, dtype=torch.bool)
    masked[:, 3] = True
    with torch.no_grad():
        expected = model.dinov2(x, bool_masked_pos=masked).pooler_output
        with patched(model, "tome", r=0, fast_idle=False):
            torch.testing.assert_close(model.dinov2(x, masked).pooler_output, expected)
            assert not torch.allclose(model.dinov2(x).pooler_output, expected)


@pytest.mark.parametrize("family", ["dinov2", "dinov3", "beit", "beit shared"])
def test_other_image_sizes(family):
    model = small(family)
    for size in ((96, 64), (64, 64)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            expected = read(model(x))
            with patched(model, "tome", r=0, fast_idle=False):
                torch.testing.assert_close(read(model(x)), expected, atol=2e-5, rtol=1e-4)
            with patched(model, "tome", r=3):
                assert torch.isfinite(read(model(x))).all()


def test_packed_weights():
    for family in ("vit", "dinov3", "beit"):
        model, x = small(family), images()
        with torch.no_grad(), patched(model, "tome", r=3):
            expected = read(model(x))
            tp.pack(model)
            torch.testing.assert_close(read(model(x)), expected, atol=1e-4, rtol=1e-4)


def test_half_precision():
    for family in ("vit", "dinov3", "beit"):
        model, x = small(family).bfloat16(), images().bfloat16()
        with torch.no_grad(), patched(model, "tome", r=3):
            assert read(model(x)).dtype == torch.bfloat16


def test_trace_and_parameters():
    model, x = small("dinov3"), images()
    keys = set(model.state_dict())
    tp.patch(model, "tome", r=[2, 3, 0])
    assert [step.tokens.tolist() for step in tp.trace(model, x)] == [[17, 17], [14, 14], [14, 14]]
    assert set(model.state_dict()) == keys
    tp.unpatch(model)
    assert "forward" not in vars(model) and not hasattr(model, "token_reducer")
    tp.patch(model, "threshold", layers=[1])
    assert all(key.startswith("token_reducer.") for key in set(model.state_dict()) - keys)


def test_profile_and_picture_of_a_nested_tower(tmp_path):
    model, x = small("dinov2 registers"), images()
    tp.patch(model, "tome", r=[2, 3, 0])
    assert tp.profile(model, x, budget_s=0.01)["tokens"] == [20, 18, 15]
    assert tp.visualize(model, x, tmp_path / "layers.png").stat().st_size > 0


def test_copies_and_pickles_work_on_their_own():
    model, x = small("dinov3"), images()
    tp.patch(model, "tome", r=3)
    with torch.no_grad():
        expected = read(model(x))
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert torch.equal(read(other(x)), expected)
            other.norm.weight.zero_()
            assert not torch.equal(read(other(x)), expected)
        assert torch.equal(read(model(x)), expected)


def test_the_loss_of_a_trainer_goes_through():
    model, x = small("vit"), images()
    tp.patch(model, "tome", r=3)
    loss = model(x, labels=torch.tensor([1, 2]), num_items_in_batch=2).loss
    loss.backward()
    assert model.vit.layers[0].mlp.fc1.weight.grad is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_attentions": True}, "output_attentions must be False"),
        ({"attention_mask": torch.ones(2, 17)}, "attention_mask must be None"),
        ({"head_mask": torch.ones(3)}, r"arguments must be among .*got \['head_mask'\]"),
        ({"pixel_values": None}, "pixel_values must be given"),
    ],
)
def test_wrong_arguments(arguments, message):
    model = small("vit without head")
    tp.patch(model, "tome")
    with pytest.raises(ValueError, match=message):
        model(**{"pixel_values": images(), **arguments})


def _masked(family, config):
    return lambda: getattr(transformers, family)(getattr(transformers, config)(**WIDE))


def _changed(change, family="vit"):
    def build():
        model = small(family)
        change(model)
        return model

    return build


def _other_attention(model):
    model.vit.layers[1].attention = nn.Linear(48, 48)


def _other_mlp(model):
    model.vit.layers[1].mlp = nn.Linear(48, 48)


def _batch_norm(model):
    model.vit.layers[0].layernorm_after = nn.BatchNorm1d(48)


def _more(model):
    model.vit.layers[0].adapter = nn.Linear(48, 48)


def _own_forward(model):
    model.vit.forward = lambda x: x


def _other_layer(model):
    model.vit.layers[0] = nn.Identity()


def _older_layout(model):
    del model.vit.layers[0].attention.q_proj


def _older_model(model):
    del model.vit.layers


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_masked("ViTForMaskedImageModeling", "ViTConfig"), "not read every patch .*ViTForMaskedImageModeling"),
        (_masked("DeiTForMaskedImageModeling", "DeiTConfig"), "not read every patch"),
        (_masked("BeitForMaskedImageModeling", "BeitConfig"), "not read every patch"),
        (lambda: transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT)), "none in CLIPTextModel"),
        (lambda: nn.ModuleList([small("vit"), small("clip")]), r"exactly one .*'0.vit', '1'"),
        (_changed(_other_attention), "layers.1.attention must be a known module of transformers, got Linear"),
        (_changed(_other_mlp), "layers.1.mlp must be a known module of transformers, got Linear"),
        (_changed(_batch_norm), "layers.0.layernorm_after must be one of .*got BatchNorm1d"),
        (_changed(_more), "layers.0 must have known parts only, got adapter"),
        (_changed(_own_forward), "transformers' forward, got an overridden one in ViTModel"),
        (_changed(_other_layer), "layers.0 must be a known module of transformers, got Identity"),
        (_changed(_older_layout), r"laid out as in transformers 5.23, got one without \['q_proj'\]"),
        (_changed(_older_model), "ViTModel must be laid out as in transformers 5.23"),
    ],
)
def test_refusals_name_the_component(build, message):
    with pytest.raises(ValueError, match=message):
        tp.patch(build(), "tome")
