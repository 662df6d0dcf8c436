# SPDX-License-Identifier: Apache-2.0
"""Official checkpoint layouts of the classification systems: every key is used, tied keys, refusals, start weights."""

import json
from pathlib import Path

import pytest
import torch
from tokenprune_ext import create_model, load_checkpoint
from tokenprune_ext.checkpoints import dynamicvit, sources, spvit, svit

MANIFESTS = Path(__file__).parents[1] / "manifests/classification"
MODELS = {
    "dynamicvit_deit_256_0.7": "dynamicvit_deit_256",
    "dynamicvit_deit_b_0.7": "dynamicvit_deit_b",
    "dynamicvit_deit_s_0.7": "dynamicvit_deit_s",
    "dynamicvit_lvvit_m_0.7": "dynamicvit_lvvit_m",
    "dynamicvit_lvvit_s_0.5": "dynamicvit_lvvit_s",
    "dynamicvit_lvvit_s_0.7": "dynamicvit_lvvit_s",
    "spvit_deit_base": "spvit_deit_base",
    "spvit_deit_small": "spvit_deit_small",
    "spvit_deit_tiny": "spvit_deit_tiny",
    "spvit_lvvit_m": "spvit_lvvit_m",
    "spvit_lvvit_s": "spvit_lvvit_s",
    "svit_cls_svit_s": "svit_s",
    "svit_cls_svit_t": "svit_t",
    "teacher_lvvit_s": "lvvit_s",
}
REFUSED = sorted(path.stem for path in MANIFESTS.glob("dynamic[cs][nw]*.json"))
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}


def manifest(name):
    return json.loads((MANIFESTS / f"{name}.json").read_text())


def shapes(entry):
    return {key: tuple(shape) for key, shape in entry["keys"].items()}


def test_every_manifest_is_here():
    listed = {path.stem for path in MANIFESTS.glob("*.json")}
    assert listed == {*MODELS, *REFUSED, "teacher_deit_small"} and len(REFUSED) == 6


@pytest.mark.parametrize("name", MODELS)
def test_published_layout(name):
    """On meta tensors: a file of exactly these keys and shapes loads, and the model gives them back."""
    entry = manifest(name)
    with torch.device("meta"):
        model = create_model(MODELS[name])
        state = {key: torch.empty(shape) for key, shape in shapes(entry).items()}
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    source = next(one for one in sources().values() if one.matches(state))
    rename = getattr(source, "rename", lambda key: key)
    assert {rename(key): shape for key, shape in shapes(entry).items()} == own
    export = getattr(source, "export", lambda model: model.state_dict())
    assert {key: tuple(value.shape) for key, value in export(model).items()} == shapes(entry)
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == entry["num_params"]
    gates = getattr(model, "token_reducer", None)
    assert sum(p.numel() for p in gates.parameters()) if gates else entry["num_params_selector"] == 0


def small_file(name, export, **options):
    """A model and an official file with the weights of another one of its kind."""
    torch.manual_seed(0)
    model, other = (create_model(name, **SMALL, **options) for _ in range(2))
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    return model, other, {key: value.clone() for key, value in export(other).items()}


CASES = [
    ("dynamicvit_deit_s", dynamicvit.export),
    ("dynamicvit_lvvit_s", dynamicvit.export),
    ("spvit_deit_small", spvit.export),
    ("spvit_lvvit_s", spvit.export),
    ("svit_s", svit.export),
    ("lvvit_s", lambda model: model.state_dict()),
]


@pytest.mark.parametrize(("name", "export"), CASES, ids=[name for name, _ in CASES])
@pytest.mark.parametrize("wrapped", [False, True])
def test_weights_arrive(name, export, wrapped, tmp_path):
    model, other, state = small_file(name, export)
    content = {"model": state, "epoch": 3, "optimizer": {}} if wrapped else state
    torch.save(content, tmp_path / "file.pth")
    load_checkpoint(model, tmp_path / "file.pth")
    for key, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize(("name", "export"), CASES, ids=[name for name, _ in CASES])
def test_missing_and_unexpected_keys(name, export):
    model, _, state = small_file(name, export)
    with pytest.raises(ValueError, match="unexpected keys: extra"):
        load_checkpoint(model, state | {"extra": torch.zeros(1)})
    gone = next(key for key in state if "norm1" in key)
    with pytest.raises(ValueError, match="missing keys"):
        load_checkpoint(model, {key: value for key, value in state.items() if key != gone})


def test_tied_copies():
    model, other, state = small_file("spvit_deit_small", spvit.export)
    copies = [key for key in state if key.startswith("score_predictor.0.in_conv.") and key.endswith(".1.weight")]
    assert len(copies) == 3
    state[copies[-1]] = state[copies[-1]] + 1
    with pytest.warns(UserWarning, match="copies of 1 selector weights differ"):
        load_checkpoint(model, state)
    wanted = other.token_reducer.selectors[0].in_conv[1].weight + 1
    assert torch.equal(model.token_reducer.selectors[0].in_conv[1].weight, wanted)
    with pytest.raises(ValueError, match="one copy per head"):
        load_checkpoint(model, {key: value for key, value in state.items() if key != copies[-1]})
    state[copies[0]] = state[copies[0]][:2]
    with pytest.raises(ValueError, match="one shape"):
        load_checkpoint(model, state)


def test_single_selectors_have_dynamicvits_layout():
    model, other, state = small_file("spvit_deit_small", dynamicvit.export, selector="single")
    load_checkpoint(model, state)
    assert torch.equal(
        model.token_reducer.selectors[0].in_conv[1].weight, other.token_reducer.selectors[0].in_conv[1].weight
    )


@pytest.mark.parametrize("name", REFUSED)
def test_other_networks_are_refused_by_name(name):
    with torch.device("meta"):
        model = create_model("dynamicvit_deit_s", **SMALL)
        state = {key: torch.empty(shape) for key, shape in shapes(manifest(name)).items()}
    what = "DynamicCNN" if "cnn" in name else "DynamicSwin"
    for source in (None, "dynamicvit"):
        with pytest.raises(ValueError, match=f"got one of {what}"):
            load_checkpoint(model, {"model": state}, source=source)


@pytest.mark.parametrize("name", ["spvit_deit_small", "svit_s", "dynamicvit_lvvit_s"])
def test_start_weights_leave_the_gates(name):
    torch.manual_seed(0)
    model = create_model(name, **SMALL)
    before = {key: value.clone() for key, value in model.token_reducer.state_dict().items()}
    plain = {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    plain = {key: value for key, value in plain.items() if not key.startswith("token_reducer.")}
    with pytest.warns(UserWarning, match="selectors keep their initial values"):
        load_checkpoint(model, {"model": plain})
    assert torch.equal(model.head.weight, plain["head.weight"])
    for key, value in model.token_reducer.state_dict().items():
        assert torch.equal(value, before[key])


def test_plain_deit_and_evit_files():
    import timm

    with torch.device("meta"):
        teacher = timm.create_model("deit_small_patch16_224")
    assert {key: tuple(value.shape) for key, value in teacher.state_dict().items()} == shapes(
        manifest("teacher_deit_small")
    )
    model = create_model("deit_small_patch16_shrink_base", **SMALL)
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    for source in (None, "evit", "deit"):
        torch.nn.init.zeros_(model.head.weight)
        load_checkpoint(model, {"model": state}, source=source)
        assert torch.equal(model.head.weight, state["head.weight"])
