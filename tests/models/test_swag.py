# SPDX-License-Identifier: Apache-2.0
"""Published SWAG models: their sizes, names, keywords and settings."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

timm = pytest.importorskip("timm")

import tokenprune_ext as tp  # noqa: E402
from tokenprune_ext.models.swag import swag_vit  # noqa: E402

SIZES = {"b16": (86_859_496, 577, 12), "l16": (305_174_504, 1025, 24), "h14": (633_470_440, 1370, 32)}
TINY = {"image_size": 32, "patch_size": 4, "num_layers": 6, "num_heads": 2, "hidden_dim": 8, "mlp_dim": 12}
# Few tokens ask for settings of their own where the published ones would not fit.
SMALL = {
    "hourglass_vit": {"clustering_location": 2, "num_cluster": 9},
    "ats_vit": {"ats_blocks": [2]},
    "smyrf_vit": {"smyrf_n_hashes": 2, "smyrf_q_cluster_size": 4, "smyrf_k_cluster_size": 4},
}
PREFIXES = ("hourglass_vit", "tome_vit", "e_vit", "evo_vit", "ats_vit", "act_vit", "smyrf_vit")


def meta(name, **options):
    with torch.device("meta"):
        return tp.create_model(name, **options)


def tiny(name, **options):
    return tp.create_model(name, **TINY | {"num_classes": 5} | options).eval()


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    parameters, tokens, depth = SIZES[size]
    model = meta(f"vit_{size}_in1k")
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.pos_embed.shape[1] == tokens and len(model.blocks) == depth
    assert {module.eps for module in model.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-6}
    headless = meta(f"vit_{size}")
    assert isinstance(headless.head, torch.nn.Identity) and headless.patch_embed.img_size == (224, 224)


def test_evaluation_is_described_as_published():
    config = timm.data.resolve_model_data_config(meta("vit_h14_in1k"))
    assert config["input_size"] == (3, 518, 518) and config["crop_pct"] == 1.0
    assert config["interpolation"] == "bicubic" and config["mean"] == (0.485, 0.456, 0.406)


SETTINGS = [
    ("hourglass_vit_l16_in1k", {}, [1025] * 12 + [530] * 12),
    ("hourglass_vit_l16_in1k", {"clustering_location": 8, "num_cluster": 256}, [1025] * 8 + [257] * 16),
    ("hourglass_vit_l16_in1k", {"clustering_location": -1}, [1025] * 24),
    (
        "hourglass_vit_l16_in1k",
        {"clustering_location": 5, "cluster_after_output": True, "num_cluster": (3, 5)},
        [1025] * 6 + [16] * 18,
    ),
    ("hourglass_vit_h14_in1k", {}, [1370] * 10 + [677] * 22),
    ("tome_vit_l16_in1k", {"tome_r": 40}, [1025 - 40 * layer for layer in range(24)]),
    ("tome_vit_l16_in1k", {}, [1025 - 10 * layer for layer in range(24)]),
    ("e_vit_l16_in1k", {}, [1025] * 7 + [718] * 6 + [503] * 6 + [353] * 5),
    ("e_vit_h14_in1k", {"base_keep_rate": 0.5}, [1370] * 9 + [686] * 8 + [344] * 8 + [173] * 7),
    ("e_vit_b16_in1k", {"drop_loc": [3], "fuse_token": True}, [577] * 4 + [406] * 8),
    ("evo_vit_l16_in1k", {"evo_prune_ratio": 0.4, "evo_prune_location": 8}, [1025] * 8 + [410] * 16),
    ("evo_vit_l16_in1k", {}, [1025] * 4 + [513] * 20),
]


@pytest.mark.parametrize(("name", "options", "counts"), SETTINGS)
def test_published_settings(name, options, counts):
    model = meta(name, **options)
    plan = model.token_reducer.plan(len(model.blocks), model.pos_embed.shape[1])
    assert [before for before, _ in plan] == counts


def test_methods_differ_from_the_defaults_of_their_papers_where_the_tables_do():
    reducer = meta("e_vit_l16_in1k").token_reducer
    assert reducer.score_mode == "mean" and not reducer.fuse_token
    assert meta("tome_vit_l16_in1k").token_reducer.prop_attn
    assert meta("ats_vit_l16_in1k").token_reducer.residual == "normed"
    assert not meta("ats_vit_l16_in1k", num_tokens=1025).token_reducer.per_image
    assert not meta("smyrf_vit_l16_in1k").token_reducer.per_row
    hourglass = meta("hourglass_vit_l16_in1k", cluster_temperture=0.5, cluster_iters=3, cluster_window_size=7)
    assert (hourglass.token_reducer.iters, hourglass.token_reducer.window) == (3, 7)
    assert hourglass.token_reducer.temperature == 0.5


@pytest.mark.parametrize(
    ("name", "options", "layers"),
    [
        ("ats_vit_l16_in1k", {}, [20]),
        ("ats_vit_h14_in1k", {"ats_blocks": (14, 16)}, [14, 16]),
        ("act_vit_b16_in1k", {"act_q_hashes": 16}, list(range(12))),
        ("act_vit_b16_in1k", {"act_plug_in_index": 2, "act_plug_out_index": 5}, [2, 3, 4]),
        ("smyrf_vit_l16_in1k", {"smyrf_plug_in_index": 12}, list(range(12, 24))),
    ],
)
def test_layers_of_the_other_methods(name, options, layers):
    assert list(meta(name, **options).token_reducer.layers) == layers


@pytest.mark.parametrize("prefix", PREFIXES)
def test_reduced_models_run_and_add_no_weights(prefix):
    torch.manual_seed(0)
    dense = tiny("vit_b16_in1k")
    torch.nn.init.normal_(dense.head.weight)
    model = tiny(f"{prefix}_b16_in1k", **SMALL.get(prefix, {}))
    assert model.state_dict().keys() == dense.state_dict().keys()
    model.load_state_dict(dense.state_dict())
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        reduced = model(images)
        assert reduced.shape == (2, 5) and not torch.equal(reduced, dense(images))
        assert len(tp.trace(model, images)) == 6
        assert torch.equal(tp.unpatch(model)(images), dense(images))


@pytest.mark.parametrize("classifier", ["token", "gap"])
def test_classifiers(classifier):
    torch.manual_seed(0)
    model = swag_vit(**TINY, classifier=classifier, num_classes=None).eval()
    x = torch.randn(2, 3, 32, 32)
    features = model.forward_features(x)
    expected = features[:, 0] if classifier == "token" else features.mean(1)
    torch.testing.assert_close(model(x), expected)
    assert model.pos_embed.shape[1] == 64 + int(classifier == "token")


def test_weights_from_scratch():
    torch.manual_seed(0)
    model = swag_vit(**TINY | {"hidden_dim": 48, "mlp_dim": 96}, num_classes=3)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not model.head.weight.any() and not model.cls_token.any() and not model.patch_embed.proj.bias.any()
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.patch_embed.proj.weight.std().item() == pytest.approx(48**-0.5, rel=0.15)


def test_width_of_the_mlp_is_exact():
    for width, hidden in ((24, 40), (48, 47), (1024, 4097), (6, 19)):
        with torch.device("meta"):
            model = swag_vit(image_size=8, patch_size=4, num_layers=1, num_heads=2, hidden_dim=width, mlp_dim=hidden)
        assert model.blocks[0].mlp.fc1.out_features == hidden


def test_dropout_rates_reach_the_published_places():
    model = swag_vit(**TINY, dropout_rate=0.1, attention_dropout_rate=0.2, drop_path_rate=0.3)
    block = model.blocks[-1]
    assert (model.pos_drop.p, block.attn.proj_drop.p, block.mlp.drop1.p, block.mlp.drop2.p) == (0.1,) * 4
    assert block.attn.attn_drop.p == 0.2 and block.drop_path1.drop_prob == pytest.approx(0.3)


def test_every_model_is_in_timms_registry():
    for name in tp.list_models():
        assert timm.is_model(name)
    model = timm.create_model("tome_vit_b16_in1k", tome_r=3, img_size=32, depth=2, embed_dim=24, num_classes=7)
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 7) and model.token_reducer.r == [3, 3]
    with pytest.raises(ValueError, match="pretrained must be False"):
        timm.create_model("vit_b16_in1k", pretrained=True)


def test_hub():
    path = Path(__file__).parents[2] / "hubconf.py"
    if not path.exists():
        pytest.skip("runs in a source tree")
    spec = importlib.util.spec_from_file_location("hubconf", path)
    before = list(sys.path)
    hub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub)
    assert sys.path == before and "timm" in hub.dependencies
    assert all(callable(getattr(hub, name)) for name in tp.list_models())
    assert hub.e_vit_b16_in1k(base_keep_rate=0.6, drop_loc=[2], **TINY).token_reducer.keep[2] == 0.6


def test_list_models():
    assert tp.list_models("tome_*") == ["tome_vit_b16_in1k", "tome_vit_h14_in1k", "tome_vit_l16_in1k"]
    assert set(tp.list_models("vit_*_in1k")) == {f"vit_{size}_in1k" for size in SIZES}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tome_vit_l16_in2k", {}, "got 'tome_vit_l16_in2k' .did you mean tome_vit_l16_in1k"),
        ("nothing like it", {}, "got 'nothing like it'$"),
        ("tome_vit_b16_in1k", {"num_cluster": 4}, r"options must be among .*got \['num_cluster'\]"),
        ("vit_b16_in1k", {"tome_r": 4}, r"got \['tome_r'\]"),
        ("tome_vit_b16_in1k", {"tome_r": -4}, "no negative number of merges"),
        ("hourglass_vit_b16_in1k", {"num_cluster": 1000}, "square number"),
        ("ats_vit_l16_in1k", {"num_tokens": 197}, "num_tokens must be at least the 1025 tokens"),
        ("smyrf_vit_l16_in1k", {"smyrf_k_cluster_size": 32}, "must equal smyrf_k_cluster_size, got 64 and 32"),
        ("evo_vit_b16_in1k", {"evo_prune_location": 0}, "layer 0 must be a plain one"),
        ("vit_b16_in1k", {"image_size": 100}, "multiple of patch_size 16, got 100"),
        ("vit_b16_in1k", {"image_size": 8}, "multiple of patch_size 16, got 8"),
        ("vit_b16_in1k", {"num_heads": 7}, "multiple of num_heads 7, got 768"),
        ("vit_b16_in1k", {"classifier": "map"}, "classifier must be 'token' or 'gap'"),
    ],
)
def test_wrong_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        meta(name, **options)


@pytest.mark.parametrize("keywords", [{"ats_blocks": 3}, {"num_classes": "many"}])
def test_keywords_of_a_wrong_type_are_refused(keywords):
    with pytest.raises(ValueError, match="ats_vit_b16_in1k: options must be of the documented types"):
        tp.create_model("ats_vit_b16_in1k", **keywords)


def test_names_that_are_no_text_are_refused():
    for name in (3, ["vit_b16_in1k"]):
        with pytest.raises(ValueError, match="name must be one of"):
            tp.create_model(name)
