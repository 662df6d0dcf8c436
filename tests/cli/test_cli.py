# SPDX-License-Identifier: Apache-2.0
"""The command line: JSON keys, the picture, one clear line and exit code 2 for mistakes."""

import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("timm")
Image = pytest.importorskip("PIL.Image")

from tokenprune_ext import cli  # noqa: E402
from tokenprune_ext._errors import UserError  # noqa: E402
from tokenprune_ext._images import load_photo  # noqa: E402

TINY = ["--model", "deit_tiny_patch16_224"]


def test_demo_writes_rows_and_picture(tmp_path, capsys):
    picture = tmp_path / "made" / "demo.png"
    arguments = ["demo", *TINY, "--seconds", "0.01", "--threads", "1", "--out", str(picture), "--json", "-"]
    assert cli.main(arguments) == 0
    result = json.loads(capsys.readouterr().out)  # nothing else on standard output
    assert picture.stat().st_size > 10_000
    assert [row["name"] for row in result["rows"]] == ["dense (timm)", "dense", "ToMe", "EViT", "threshold"]
    rows = {row["name"]: row for row in result["rows"]}
    assert rows["dense (timm)"]["similarity"] == pytest.approx(1, abs=1e-4)
    assert rows["ToMe"]["tokens"] == [197 - 13 * layer for layer in range(12)]
    for row in result["rows"]:
        assert row["latency_ms"] > 0
        assert row["ideal_speedup"] >= 1
        assert row["spread"]["min"] <= row["speedup"] * 1.0001


def test_flops_counts_the_published_deit_s(capsys):
    assert cli.main(["flops", "--model", "deit_small_patch16_224", "-o", "r=13", "--json", "-"]) == 0
    dense, tome = json.loads(capsys.readouterr().out)["rows"]
    assert dense["gflops"] == pytest.approx(4.6, abs=0.05)
    assert tome["gflops"] == pytest.approx(2.7, abs=0.05)
    assert 0 < tome["gflops_overhead"] < 0.01


def test_env_is_plain_json(capsys):
    assert cli.main(["env", "--json", "-"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert {"torch", "cpu_capability", "cpu_library", "cuda_library", "build"} <= info.keys()
    assert (info["cpu_library"]["reason"] is None) == info["cpu_library"]["loaded"]


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["demo", "--image", "missing.jpg"], "cannot read the image"),
        (["demo", "--model", "no_such_model"], "no model 'no_such_model'"),
        (["demo", "--model", "resnet18"], "not a plain vision transformer"),
        (["demo", "--dtype", "int8"], "--dtype must be one of"),
        (["demo", "--threads", "0"], "--threads must lie between"),
        (["demo", "--batch", "0"], "--batch must be at least 1"),
        (["demo", "--checkpoint", "missing.pth"], "file must exist"),
        (["demo", *TINY, "--seconds", "nan"], "--seconds must be"),
        (["flops", *TINY, "--method", "magic"], "method must be one of"),
        (["flops", *TINY, "-o", "r"], "NAME=VALUE"),
        (["flops", *TINY, "-o", "keep=1"], "options must be among"),
        (["flops", *TINY, "-o", "depth=1"], "which the model itself tells"),
        (["flops", *TINY, "-o", "r=1", "--tome_r", "2"], "given once"),
        (["flops", *TINY, "--method", "tome", "--checkpoint", "missing.pth"], "file must exist"),
        (["flops", *TINY, "--method", "tome", "--image", "missing.jpg"], "cannot read the image"),
        (["flops", *TINY, "--method", "evit", "-o", "layers=3"], "layers must be a list of whole numbers"),
        (["flops", *TINY, "--method", "act", "-o", "q_hashes=many"], "options must be of the documented types"),
        (["flops", *TINY, "--method", "hourglass", "-o", "clusters=[7]"], "clusters must be"),
        (["env", "--nonsense"], "--nonsense"),
    ],
)
def test_mistakes_give_one_line_and_code_2(arguments, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert text in error
    assert len(error.splitlines()) == 1


def test_demo_counts_models_with_attention_pooling(tmp_path, capsys):
    arguments = [
        "demo",
        "--model",
        "test_vit3",
        "--seconds",
        "0.01",
        "--threads",
        "1",
        "--out",
        str(tmp_path / "a.png"),
    ]
    assert cli.main(arguments) == 0


def test_names_of_files_are_shown_as_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a[").mkdir()
    load_photo()[0].resize((64, 64)).save(tmp_path / "a[" / "b]:cat:.png")
    assert cli.main(["predict", "a[/b]:cat:.png", "--model", "test_vit"]) == 0  # no markup, no emoji
    assert "a[/b]:cat:.png" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "I;16"])
def test_every_kind_of_image_becomes_rgb(mode, tmp_path):
    file = tmp_path / ("photo.jpg" if mode == "CMYK" else "photo.png")
    image = load_photo()[0].resize((40, 30))
    image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    image.save(file)
    loaded, _ = load_photo(file)
    assert (loaded.mode, loaded.size) == ("RGB", (40, 30))


@pytest.mark.parametrize("content", ["truncated", "empty", "text"])
def test_bad_images_are_refused_in_one_line(content, tmp_path):
    file = tmp_path / "photo.png"
    load_photo()[0].save(file)
    whole = file.read_bytes()
    file.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"no image"}[content])
    with pytest.raises(UserError) as caught:
        load_photo(file)
    assert len(str(caught.value).splitlines()) == 1
