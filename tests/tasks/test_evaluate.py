# SPDX-License-Identifier: Apache-2.0
"""``tokenprune eval classification`` on a folder of real photographs: exact counts with 1 and 2 processes, resuming."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("timm")
pytest.importorskip("skimage")

import timm
from tokenprune_ext import cli, patch
from tokenprune_ext.tasks.classification.evaluate import counted_tokens, ranks

from tests.photos import COUNT, make_folder

TIMES = ("images_per_s", "model_images_per_s", "processes", "resumed_images", "machine", "threads")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("photos"))


def arguments(folder, *more):
    model = ["--model", "deit_tiny_patch16_224", "--image-size", "64", "--workers", "0", "--batch-size", "2"]
    return ["eval", "classification", "--data", str(folder), *model, *more]


def run(capsys, folder, *more):
    assert cli.main([*arguments(folder, *more), "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def numbers(result):
    return {key: value for key, value in result.items() if key not in TIMES}


def in_processes(folder, count, file, *more):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += ["-m", "tokenprune_ext.cli", *arguments(folder, *more), "--json", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return done


@pytest.mark.parametrize("method", ["ats", "svit"])  # counts by image; draws
def test_two_processes_give_the_numbers_of_one(method, folder, tmp_path, capsys):
    options = [
        "--method",
        method,
        *{"ats": ["-o", "layers=[4,8]"]}.get(method, []),
        "--threads",
        "1",
    ]
    one = run(capsys, folder, *options)
    done = in_processes(folder, 2, tmp_path / "two.json", *options)
    assert done.returncode == 0, done.stderr
    two = json.loads((tmp_path / "two.json").read_text())
    assert (two["processes"], one["images"]) == (2, COUNT)  # an odd number of images and of batches
    assert numbers(one) == numbers(two)


def test_accuracy_is_that_of_a_plain_loop(folder, tmp_path, capsys):
    from tokenprune_ext.data import ImageFolder, preprocessing

    torch.manual_seed(1)
    model = timm.create_model("deit_tiny_patch16_224", img_size=64, num_classes=4).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    options = ["--num-classes", "4", "--checkpoint", str(tmp_path / "weights.pth")]
    result = run(capsys, folder, *options)
    images = ImageFolder(folder / "val", preprocessing(model, "deit_tiny_patch16_224").transform())
    with torch.no_grad():
        logits = torch.cat([model(image[None]) for image, _ in images])
    labels = torch.tensor([label for _, label in images])
    assert result["correct"]["top1"] == int((logits.argmax(1) == labels).sum())
    assert result["correct"]["top5"] == COUNT  # of four classes
    assert result["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-4)
    assert result["tokens"] == [17.0] * 12
    assert result["weights"].endswith("weights.pth")


def test_a_killed_run_goes_on(folder, tmp_path, capsys):
    state, options = tmp_path / "state.jsonl", ["--method", "svit", "--threads", "1"]
    whole = run(capsys, folder, *options, "--state", str(state))
    lines = state.read_text().splitlines(keepends=True)
    state.write_text("".join(lines[:3]) + lines[3][:10])  # two batches, and a line that was cut off
    resumed = run(capsys, folder, *options, "--state", str(state))
    assert (whole["resumed_images"], resumed["resumed_images"]) == (0, 4)
    assert numbers(whole) == numbers(resumed)
    again = run(capsys, folder, *options, "--state", str(state))
    assert (again["resumed_images"], again["images_per_s"]) == (COUNT, None)
    assert numbers(whole) == numbers(again)


def test_processes_share_a_state_file(folder, tmp_path, capsys):
    state, options = tmp_path / "state.jsonl", ["--method", "tome", "-o", "r=1", "--threads", "1"]
    done = in_processes(folder, 2, tmp_path / "two.json", *options, "--state", str(state))
    assert done.returncode == 0, done.stderr
    assert state.with_name(state.name + ".1").is_file()
    alone = run(capsys, folder, *options, "--state", str(state))
    assert alone["resumed_images"] == COUNT
    two, fresh = json.loads((tmp_path / "two.json").read_text()), run(capsys, folder, *options)
    assert numbers(alone) == numbers(two) == numbers(fresh)


def test_another_evaluation_is_refused(folder, tmp_path, capsys):
    state = tmp_path / "state.jsonl"
    run(capsys, folder, "--state", str(state))
    assert cli.main(arguments(folder, "--method", "tome", "--state", str(state))) == 2
    error = capsys.readouterr().err.strip()
    assert 'method was null, is "tome"' in error
    assert len(error.splitlines()) == 1
    state.write_text("something else\n")
    assert cli.main(arguments(folder, "--state", str(state))) == 2
    assert "not a state file" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more",
    [["--dtype", "bfloat16"], ["--dtype", "bfloat16", "--amp"], ["--pack"], ["--limit", "3"], ["--workers", "1"]],
)
def test_other_ways_to_run(more, folder, capsys):
    plain, other = run(capsys, folder), run(capsys, folder, *more)
    assert other["images"] == (3 if "--limit" in more else COUNT)
    if "--limit" not in more:
        assert other["loss"] == pytest.approx(plain["loss"], abs=0.1 if "--dtype" in more else 1e-3)


@pytest.mark.parametrize(
    "more, text",
    [
        (["--data", "missing"], "does not exist"),
        (["--model", "deit_tiny_patch16"], "did you mean"),
        (["--model", "vit_b16"], "no classifier"),
        (["--method", "magic"], "method must be one of"),
        (["--method", "tome", "-o", "keep=0.5"], "options must be among"),
        (["--method", "tome", "-o", "r=-3"], "r must"),
        (["--method", "tome", "-o", "r=1.5"], "r must"),
        (["--model", "tome_vit_b16_in1k", "--method", "tome"], "brings its own method"),
        (["--image-size", "8"], "at least a patch"),
        (["--image-size", "40"], "multiple of the patch"),
        (["--num-classes", "3"], "3 classes and the data folder 4"),
        (["--checkpoint", "missing.pth"], "must exist"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--amp"], "--amp needs"),
        (["--amp", "--dtype", "bfloat16", "--pack"], "exclude each other"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--seed", "9223372036854775807"], "--seed must"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--split", "train"], "no folder train"),
        (["--crop-pct", "2"], "--crop-pct"),
        (["--device", "tpu"], "--device must be"),
        (["--state", "/proc/nowhere/state"], "cannot write the state file"),
    ],
)
def test_mistakes_give_one_line_and_code_2(more, text, folder, capsys):
    assert cli.main(arguments(folder, *more)) == 2
    error = capsys.readouterr().err.strip()
    assert text in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_truncated_image_is_named(workers, tmp_path, capsys):
    file = make_folder(tmp_path) / "val" / "n09193705" / "grass.png"
    file.write_bytes(file.read_bytes()[:500])
    assert cli.main(arguments(tmp_path, "--workers", workers)) == 2
    error = capsys.readouterr().err.strip()
    assert "grass.png cannot be read" in error
    assert len(error.splitlines()) == 1


def test_mistakes_are_told_once_by_two_processes(folder, tmp_path):
    done = in_processes(folder, 2, tmp_path / "two.json", "--num-classes", "3")
    assert done.returncode != 0
    assert done.stderr.count("tokenprune: the model has 3 classes") == 1


def test_rank_counts_equal_logits_in_the_order_of_classes():
    logits = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 1.0], [0.0, 2.0, 1.0]])
    assert ranks(logits, torch.tensor([2, 1, 0])).tolist() == [2, 0, 2]


def test_counted_tokens_are_those_of_the_plan():
    model = patch(timm.create_model("deit_tiny_patch16_224", img_size=64).eval(), "tome", r=1)
    images = torch.zeros(2, 3, 64, 64)
    with torch.no_grad():
        before = model(images)
        with counted_tokens(model) as counts:
            after = model(images)
    found = [(int(attention[0]), int(mlp[0])) for attention, mlp in counts]
    assert found == model.token_reducer.plan(12, 17)
    assert torch.equal(before, after)
    assert "block" not in vars(model.token_reducer)
