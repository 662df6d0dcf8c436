# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoint files and finding the weights in them, whatever the system."""

import argparse
import decimal
import pathlib

import pytest
import torch
from tokenprune_ext import checkpoints, load_checkpoint
from tokenprune_ext.checkpoints._base import find_weights
from torch import nn

WEIGHTS = {"weight": torch.arange(6.0).view(2, 3), "bias": torch.tensor([1.0, 2.0])}


def model():
    return nn.Linear(3, 2)


def loaded(content, source=None):
    target = model()
    assert load_checkpoint(target, content, source) is target
    return all(torch.equal(value, WEIGHTS[name]) for name, value in target.state_dict().items())


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_file_formats(form, tmp_path):
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.torch")
    if form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(WEIGHTS, path)
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=form == "zip")
    assert loaded(path) and loaded(str(path))


@pytest.mark.parametrize("wrapper", ["model", "state_dict", "model_state_dict", "module", "model_ema", "ema"])
def test_wrappers_are_found(wrapper):
    assert loaded({wrapper: WEIGHTS, "epoch": 3, "optimizer": {"state": {}}})


def test_nested_wrappers_and_prefixes():
    prefixed = {f"module._orig_mod.{name}": value for name, value in WEIGHTS.items()}
    assert loaded({"model": {"state_dict": prefixed}})
    assert loaded({f"module.module.{name}": value for name, value in WEIGHTS.items()})


def test_averaged_weights_serve_only_alone():
    other = {name: value + 1 for name, value in WEIGHTS.items()}
    assert loaded({"model_ema": other, "model": WEIGHTS}) and not loaded({"model_ema": other, "model": {}})


def test_plain_values_beside_the_weights_are_no_obstacle(tmp_path):
    extras = {"args": argparse.Namespace(lr=0.1, out=pathlib.PosixPath("x")), "epoch": 3}
    numpy = pytest.importorskip("numpy")
    torch.save({"model": WEIGHTS, **extras, "best": numpy.float64(0.8)}, tmp_path / "file.pth")
    assert loaded(tmp_path / "file.pth")


class Executed:
    """Unpickling this would run code."""

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("executed"),)


@pytest.mark.parametrize("content", [Executed(), decimal.Decimal(1)])
def test_other_objects_are_refused_and_nothing_runs(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": WEIGHTS, "hook": content}, "file.pth")
    with pytest.raises(
        ValueError, match=r"file.pth must hold tensors and plain values only, got a .*(getattr|Decimal)"
    ):
        loaded("file.pth")
    assert not pathlib.Path("executed").exists()


def _damage(path, form):
    if form == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(WEIGHTS, path)
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=form == "zip")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated_files(form, tmp_path):
    path = tmp_path / ("file.safetensors" if form == "safetensors" else "file.pth")
    _damage(path, form)
    with pytest.raises(ValueError, match=r"file\.\w+ must be a complete checkpoint, got a damaged or foreign file"):
        loaded(path)


@pytest.mark.parametrize("name", ["page.pth", "page.safetensors"])
def test_foreign_files(name, tmp_path):
    (tmp_path / name).write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="damaged or foreign file"):
        loaded(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "must hold weights, got only an empty dict"),
        ({"epoch": 3, "optimizer": {}}, r"must hold weights, got only \['epoch', 'optimizer'\]"),
        ({"weight": WEIGHTS["weight"]}, "got 1 missing keys: bias"),
        (WEIGHTS | {"scale": torch.ones(1)}, "got 1 unexpected keys: scale"),
        (WEIGHTS | {"bias": torch.ones(3)}, r"got 1 other shapes: bias \(3,\) where the model has \(2,\)"),
    ],
)
def test_what_does_not_fit_is_named(content, message):
    with pytest.raises(ValueError, match=message):
        loaded(content)


def test_long_lists_are_cut():
    with pytest.raises(ValueError, match="9 unexpected keys: a0, a1, a2, a3, a4 and 4 more"):
        loaded(WEIGHTS | {f"a{i}": torch.ones(1) for i in range(9)})


def test_nothing_is_loaded_when_something_is_wrong():
    target = model()
    before = target.weight.clone()
    with pytest.raises(ValueError, match="missing"):
        load_checkpoint(target, {"weight": WEIGHTS["weight"]})
    assert torch.equal(target.weight, before)


def test_missing_empty_and_unknown(tmp_path):
    with pytest.raises(ValueError, match=r"file must exist, got .*nowhere\.pth"):
        loaded(tmp_path / "nowhere.pth")
    (tmp_path / "empty.pth").touch()
    with pytest.raises(ValueError, match="got the empty"):
        loaded(tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="source must be one of"):
        loaded(WEIGHTS, source="nobody")
    with pytest.raises(ValueError, match="must hold a state dict, got list"):
        find_weights([1])


def test_wrapped_models_are_filled():
    compiled = torch.compile(model(), backend="eager")
    load_checkpoint(compiled, WEIGHTS)
    assert torch.equal(compiled.weight, WEIGHTS["weight"])


def test_a_new_source_is_one_new_file(tmp_path, monkeypatch):
    (tmp_path / "dummy_source.py").write_text(
        "def matches(state):\n    return 'w' in state\n\n\n"
        "def convert(state, model):\n    return {'weight': state['w'], 'bias': state['b']}\n"
    )
    monkeypatch.setattr(checkpoints, "__path__", [*checkpoints.__path__, str(tmp_path)])
    assert "dummy_source" in checkpoints.sources()
    assert loaded({"w": WEIGHTS["weight"], "b": WEIGHTS["bias"]})
