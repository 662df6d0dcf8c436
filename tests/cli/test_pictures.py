# SPDX-License-Identifier: Apache-2.0
"""``tokenprune visualize`` for every method, and ``tokenprune predict``."""

import json

import pytest

pytest.importorskip("typer")
pytest.importorskip("timm")
pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

from tokenprune_ext import cli, reducers  # noqa: E402

TINY = ["--model", "deit_tiny_patch16_224", "--image-size", "96"]
OPTIONS = {"hourglass": ["layer=4", "clusters=9"], "ats": ["layers=[4,8]"], "act": ["q_hashes=8"], "tome": ["r=2"]}
DRAWN = {
    "tome": "merged regions",
    "hourglass": "merged regions",
    "act": "groups of head 0",
    "smyrf": "groups of head 0",
}


@pytest.mark.parametrize("method", reducers.names())
def test_every_method_is_drawn(method, tmp_path, capsys):
    picture = tmp_path / "made" / "picture.jpg"
    options = [part for pair in OPTIONS.get(method, []) for part in ("-o", pair)]
    command = [
        "visualize",
        *TINY,
        "--method",
        method,
        *options,
        "--layers",
        "0,9",
        "--out",
        str(picture),
        "--json",
        "-",
    ]
    assert cli.main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["drawn"] == DRAWN.get(method, "kept patches")
    assert (result["layers"], len(result["tokens"]), result["tokens"][0]) == ([0, 9], 12, 37)
    with Image.open(picture) as image:
        assert image.width > 2 * image.height  # input, two layers, curve
    assert picture.stat().st_size < 150_000


def test_published_models_are_drawn_as_they_are(tmp_path, capsys):
    command = ["visualize", "--model", "deit_small_patch16_shrink_base", "--image-size", "96", "--json", "-"]
    assert cli.main([*command, "--out", str(tmp_path / "a.png")]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"][-1] < 37


@pytest.fixture
def photos(tmp_path):
    colour = Image.linear_gradient("L").resize((60, 40))
    colour.save(tmp_path / "grey.png")
    colour.convert("RGBA").save(tmp_path / "clear.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    return [str(tmp_path / name) for name in ("grey.png", "clear.png", "dot.png")]


def test_predict_names_classes_of_several_images(photos, capsys):
    assert cli.main(["predict", *photos, *TINY, "--method", "evit", "--top", "2", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["image"] for row in rows] == photos
    for row in rows:
        first, second = row["classes"]
        assert first["probability"] >= second["probability"]
        assert isinstance(first["name"], str)
    assert rows[0]["classes"] == rows[1]["classes"]  # the same picture


def test_predict_takes_names_from_a_file(photos, tmp_path, capsys):
    names = tmp_path / "names.txt"
    names.write_text("cat\ndog\n")
    command = ["predict", photos[0], *TINY, "--num-classes", "2", "--json", "-"]
    assert cli.main([*command, "--classes", str(names)]) == 0
    found = json.loads(capsys.readouterr().out)["rows"][0]["classes"]
    assert {entry["name"] for entry in found} == {"cat", "dog"}
    assert cli.main(command) == 0  # without names
    assert json.loads(capsys.readouterr().out)["rows"][0]["classes"][0]["name"] is None


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["predict"], "IMAGE"),
        (["predict", "missing.png"], "cannot read the image"),
        (["predict", "GOOD", "CUT"], "is damaged"),
        (["predict", "GOOD", "TEXT"], "not an image"),
        (["predict", "."], "cannot read the image"),
        (["predict", "GOOD", "--top", "0"], "--top must be at least 1"),
        (["predict", "GOOD", "--classes", "TEXT"], "one line per class"),
        (["predict", "GOOD", "--method", "none", "-o", "r=1"], "takes no options"),
        (["predict", "GOOD", "-o", "r=1"], "need a method"),
        (["visualize"], "no method to draw"),
        (["visualize", "--method", "tome", "--layers", "12"], "layers must lie between 0 and 11"),
        (["visualize", "--method", "tome", "--layers", "a"], "--layers must be numbers"),
        (["visualize", "--method", "tome", "--head", "-1"], "--head must be"),
        (["visualize", "--method", "smyrf", "--head", "3"], "head must lie between 0 and 2"),
        (["visualize", "--method", "tome", "--out", "picture.magic"], "magic"),
        (["visualize", "TEXT", "--method", "tome"], "not an image"),
    ],
)
def test_mistakes_give_one_line_and_code_2(arguments, text, photos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = (tmp_path / "grey.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    files = {"GOOD": photos[0], "CUT": "cut.png", "TEXT": "text.png"}
    assert cli.main([*(files.get(part, part) for part in arguments), *TINY]) == 2
    error = capsys.readouterr().err.strip()
    assert text in error
    assert len(error.splitlines()) == 1
