# SPDX-License-Identifier: Apache-2.0
"""The commands tables, flops, bench and convert: JSON keys, published names and options, mistakes."""

import json

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("timm")
safetensors = pytest.importorskip("safetensors.torch")

import timm  # noqa: E402
from tokenprune_ext import cli, create_model, load_checkpoint, tables  # noqa: E402

from tests.conformance import needs_library  # noqa: E402

TINY = ["-o", "num_layers=4", "-o", "hidden_dim=16", "-o", "num_heads=2", "-o", "mlp_dim=24"]
SMALL = {"num_layers": 4, "hidden_dim": 16, "num_heads": 2, "mlp_dim": 24, "image_size": 64}
ROW_KEYS = {
    *("id", "system", "method", "backbone", "setting", "published_gflops", "ours_gflops", "deviation", "rule"),
    *("data_dependent", "given", "other_gflops", "true_gflops", "overhead_gflops", "true_reason", "parameters"),
    *("published", "measured", "model", "options", "note"),
}


def run_json(capsys, *arguments):
    assert cli.main([*arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)  # nothing else on standard output


def test_tables_writes_every_row(capsys):
    rows = run_json(capsys, "tables", "--no-trace")
    published = tables.read("published")["rows"]
    assert [row["id"] for row in rows[: len(published)]] == [row["id"] for row in published]
    for row in rows:
        assert row.keys() == ROW_KEYS and row["ours_gflops"] > 0 and row["parameters"] > 0, row["id"]
        assert (row["deviation"] is None) == (row["published_gflops"] is None)
        assert row["data_dependent"] == (row["given"] is not None)


@needs_library
def test_tables_traces_our_models(capsys):
    dense, clustered = run_json(capsys, "tables", "--only", "expedit-swag/00[01]")
    assert dense["true_gflops"] == pytest.approx(361.986, abs=1e-3) and dense["overhead_gflops"] == 0
    assert 0 < clustered["overhead_gflops"] < 1 and clustered["true_gflops"] < clustered["ours_gflops"]
    assert clustered["model"] == "hourglass_vit_l16_in1k"
    assert clustered["options"] == {"clustering_location": 12, "num_cluster": 529}


def test_tables_say_why_there_is_no_trace(capsys):
    (row,) = run_json(capsys, "tables", "--only", "dtop/001")
    assert row["true_gflops"] is None and row["true_reason"] == "no model here yet"
    (row,) = run_json(capsys, "tables", "--only", "expedit-swag/025")
    assert "tokenprune flops act_vit_l16_in1k" in row["true_reason"] and row["given"] == {"clusters": 424.6}


def test_tables_print_rules_and_counts(capsys):
    assert cli.main(["tables", "--no-trace", "--only", "expedit-swag/02[45]"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "333.502*" in shown and "for clusters 424.6" in shown and "solved for from the published figure" in shown
    assert "bias as a column" in shown and "worst deviation -0.009%" in shown


def test_measurements_stand_beside_published_results(tmp_path, capsys):
    file = tmp_path / "bench.json"
    by_id = {"model": "x", "ids": ["expedit-swag/000"], "fps": 0.25, "throughput": 0.5, "device": "cpu"}
    by_name = {"model": "tome_vit_l16_in1k", "options": {"tome_r": 10}, "method": None, "top1": 12.5}
    file.write_text(json.dumps([by_id, by_name]))
    arguments = ["tables", "--no-trace", "--only", "expedit-swag/0[01]?", "--measured", str(file)]
    rows = {row["id"]: row for row in run_json(capsys, *arguments)}
    assert rows["expedit-swag/000"]["measured"] == {"fps": 0.25, "throughput": 0.5, "device": "cpu"}
    assert rows["expedit-swag/017"]["measured"] == {"top1": 12.5} and rows["expedit-swag/018"]["measured"] == {}
    assert cli.main(arguments) == 0
    assert "12.7 | 0.25" in capsys.readouterr().out


FLOPS_KEYS = {
    *("name", "tokens", "tokens_mlp", "gflops", "gflops_by_part", "gflops_overhead", "gflops_true", "gflops_rule"),
    *("rule", "data_dependent", "parameters", "ideal_speedup"),
}


@needs_library
def test_flops_of_a_published_name_with_published_options(capsys):
    arguments = ["hourglass_vit_b16_in1k", *TINY, "-r", "64", "-l", "1", "-n", "3x2", "--cluster_iters", "2"]
    result = run_json(capsys, "flops", *arguments)
    dense, reduced = result["rows"]
    assert dense.keys() == reduced.keys() == FLOPS_KEYS
    assert result["method"] == reduced["name"] == "hourglass" and reduced["tokens"] == [17, 7, 7, 7]
    assert reduced["gflops_true"] == pytest.approx(reduced["gflops"] + reduced["gflops_overhead"])
    assert reduced["gflops_true"] < dense["gflops_true"] and reduced["gflops_rule"] < dense["gflops_rule"]
    by_method = ["vit_b16_in1k", "--method", "hourglass", "-r", "384", "-l", "6", "-n", "289"]
    named = ["hourglass_vit_b16_in1k", "-r", "384", "-l", "6", "-n", "289"]
    first, second = (run_json(capsys, "flops", *one)["rows"][1] for one in (by_method, named))
    assert first == second and first["tokens"] == [577] * 6 + [290] * 6


@needs_library
@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["deit_tiny_patch16_224"], ["dense"]),
        (["deit_tiny_patch16_224", "-o", "r=13"], ["dense", "tome"]),
        (["deit_tiny_patch16_224", "--method", "evit", "-o", "keep=0.5"], ["dense", "evit"]),
        (["deit_tiny_patch16_224", "--method", "threshold", "-o", "selector=cls"], ["dense", "threshold"]),
        (["e_vit_b16_in1k", "--method", "none"], ["dense"]),
        (["resnet18", "-r", "64"], ["dense"]),
        (["classification_flops/003"], ["dense", "dynamicvit"]),
    ],
)
def test_flops_of_any_model(arguments, names, capsys):
    rows = run_json(capsys, "flops", *arguments)["rows"]
    assert [row["name"] for row in rows] == names
    assert all(row["gflops_true"] > 0 for row in rows)
    if "resnet18" in arguments:
        assert rows[0]["tokens"] is rows[0]["gflops_rule"] is None
        assert rows[0]["gflops_true"] == pytest.approx(1.82 * (64 / 224) ** 2, rel=0.02)


def test_flops_of_a_published_row_is_that_of_the_table(capsys):
    _, row = run_json(capsys, "flops", "classification_flops/003")["rows"]
    assert row["gflops_rule"] == pytest.approx(2.9065, abs=1e-4)
    assert row["gflops_true"] == pytest.approx(2.9809, abs=1e-4)


@needs_library
def test_bench_measures_and_finds_the_published_row(capsys):
    result = run_json(
        capsys, *["bench", "classification", "deit_tiny_patch16_224", "-b", "2", "--seconds", "0.01", "--threads", "1"]
    )
    assert result["ids"] == ["classification_flops/012"] and result["published"][0]["gflops"] == 1.3
    assert result["fps"] == pytest.approx(1e3 / result["latency_ms"])
    assert result["throughput"] == pytest.approx(2e3 / result["batch_ms"])
    assert result["gflops_rule"] == pytest.approx(1.2537, abs=1e-4) and result["parameters"] == 5_717_416
    assert (result["batch"], result["device"], result["threads"], result["method"]) == (2, "cpu", 1, "none")


@needs_library
def test_bench_of_a_method_in_batches_of_one(capsys):
    arguments = ["act_vit_b16_in1k", *TINY, "-r", "64", "-b", "1", "--seconds", "0.01", "--dtype", "bfloat16"]
    result = run_json(capsys, "bench", "classification", *arguments)
    assert result["throughput"] == result["fps"] and result["ids"] == [] and result["data_dependent"]
    assert cli.main(["bench", "classification", *arguments]) == 0
    assert "FPS" in capsys.readouterr().out


def test_published_settings_find_their_rows_by_method_too(capsys):
    from tokenprune_ext.tasks.classification.bench import _published
    from tokenprune_ext.tasks.classification.setting import resolve

    named = _published(resolve("tome_vit_l16_in1k", published={"tome_r": 40}).build(meta=True))
    patched = _published(resolve("vit_l16_in1k", "tome", {"r": 40}).build(meta=True))
    assert [row.id for row in named] == [row.id for row in patched] == ["expedit-swag/019", "swag_flops/006"]
    default = _published(resolve("e_vit_l16_in1k").build(meta=True))  # a keep rate of 0.7 without being told
    assert [row.id for row in default] == ["expedit-swag/010", "swag_methods_flops/003"]
    assert _published(resolve("e_vit_l16_in1k", options={"fuse_token": True}).build(meta=True)) == []


def official(path, name="vit_b16_in1k", **options):
    """A checkpoint as SWAG's authors publish it."""
    torch.manual_seed(0)
    model = create_model(name, **SMALL | options)
    torch.nn.init.normal_(model.head.weight)
    state = _official_names(model)
    torch.save(state, path)
    return model, state


def _official_names(model):
    names = {"cls_token": "class_token", "patch_embed.proj.": "conv_proj.", "norm.": "encoder.ln."}
    names |= {"head.": "head.layers.head."}
    parts = {"norm1": "ln_1", "norm2": "ln_2", "mlp.fc1": "mlp.linear_1", "mlp.fc2": "mlp.linear_2"}
    parts |= {"attn.qkv.": "self_attention.in_proj_", "attn.proj": "self_attention.out_proj"}
    state = {}
    for key, value in model.state_dict().items():
        if key == "pos_embed":
            state["encoder.pos_embedding"] = value.transpose(0, 1).contiguous()
        elif key.startswith("blocks."):
            _, number, rest = key.split(".", 2)
            old = next(part for part in parts if rest.startswith(part))
            state[f"encoder.layers.layer_{number}.{rest.replace(old, parts[old])}"] = value
        else:
            old = next(part for part in names if key.startswith(part))
            state[key.replace(old, names[old])] = value
    return state


def test_convert_to_our_names(tmp_path, capsys):
    file, out = tmp_path / "vit_b16.torch", tmp_path / "made" / "vit.safetensors"
    model, _ = official(file)
    options = [word for key, value in SMALL.items() for word in ("-o", f"{key}={value}")]
    result = run_json(capsys, "convert", str(file), str(out), "--model", "tome_vit_b16_in1k", *options)
    assert result["file"] == str(out) and result["tensors"] == len(model.state_dict())
    written = safetensors.load_file(out)
    assert written.keys() == model.state_dict().keys()
    assert all(torch.equal(written[key], value) for key, value in model.state_dict().items())
    again = load_checkpoint(create_model("e_vit_b16_in1k", **SMALL), out)
    assert torch.equal(again.head.weight, model.head.weight)


def test_convert_with_the_files_own_names(tmp_path, capsys):
    file = tmp_path / "vit_b16.torch"
    model, state = official(file)
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, file)
    result = run_json(capsys, "convert", str(file))
    written = safetensors.load_file(tmp_path / "vit_b16.safetensors")
    assert result["names"] == "the file" and written.keys() == state.keys()
    assert torch.equal(load_checkpoint(create_model("vit_b16_in1k", **SMALL), written).head.weight, model.head.weight)
    assert cli.main(["convert", str(file)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.main(["convert", str(file), "--force"]) == 0


def test_convert_writes_tied_and_strided_tensors(tmp_path, capsys):
    shared = torch.randn(4, 6)
    torch.save({"a": shared, "b": shared, "c": shared.t(), "d": shared[1:3]}, tmp_path / "x.pth")
    run_json(capsys, "convert", str(tmp_path / "x.pth"))
    written = safetensors.load_file(tmp_path / "x.safetensors")
    assert torch.equal(written["a"], shared) and torch.equal(written["b"], shared)
    assert torch.equal(written["c"], shared.t()) and torch.equal(written["d"], shared[1:3])
    assert not list(tmp_path.glob("*.part"))


def test_convert_keeps_the_tied_heads_of_spvit(tmp_path, capsys):
    small = {"depth": 4, "embed_dim": 48, "num_heads": 3, "img_size": 64, "num_classes": 4}
    model = create_model("spvit_deit_tiny", **small)
    torch.save({"model": model.state_dict()}, tmp_path / "spvit.pth")
    options = [word for key, value in small.items() for word in ("-o", f"{key}={value}")]
    run_json(capsys, "convert", str(tmp_path / "spvit.pth"), "--model", "spvit_deit_tiny", *options)
    again = load_checkpoint(create_model("spvit_deit_tiny", **small), tmp_path / "spvit.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["tables", "--only", "nothing*"], "must fit an id"),
        (["tables", "--no-trace", "--measured", "missing.json"], "cannot read missing.json"),
        (["tables", "--no-trace", "--only", "dtop/*", "--json", "/proc/x/y"], "cannot write"),
        (["flops", "no_such_model"], "no model 'no_such_model'"),
        (["flops", "deit_tiny_patch16_224", "--model", "resnet18"], "must not differ"),
        (["flops", "expedit-swag/999"], "no row 'expedit-swag/999'"),
        (["flops", "dtop/000"], "no model here yet"),
        (["flops", "vit_b16_in1k", "--method", "magic"], "method must be one of"),
        (["flops", "vit_b16_in1k", "--method", "none", "-o", "r=3"], "takes no options"),
        (["flops", "vit_b16_in1k", "--method", "tome", "-o", "keep=0.5"], "options must be among"),
        (["flops", "vit_b16_in1k", "--method", "tome", "-l", "3"], "does not take clustering_location"),
        (["flops", "vit_b16_in1k", "-o", "tome_r=3"], "options must be among"),
        (["flops", "tome_vit_b16_in1k", "--method", "tome"], "brings its own method"),
        (["flops", "tome_vit_b16_in1k", "--tome_r", "-1"], "no negative number of merges"),
        (["flops", "tome_vit_b16_in1k", "--tome_r", "1.5"], "--tome_r"),
        (["flops", "hourglass_vit_b16_in1k", "-n", "1000"], "square number"),
        (["flops", "hourglass_vit_b16_in1k", "-n", "2x3x4"], "--num_cluster must be"),
        (["flops", "hourglass_vit_b16_in1k", "-n", "many"], "--num_cluster must be"),
        (["flops", "vit_b16_in1k", "-r", "100"], "multiple of patch_size"),
        (["flops", "deit_tiny_patch16_224", "-r", "8"], "patch"),
        (["flops", "resnet18", "--method", "tome"], "supported vision transformer"),
        (["flops", "resnet18", "-r", "0"], "at least 1"),
        (["flops", "act_vit_b16_in1k", "-r", "64", "--image", "missing.jpg"], "cannot read the image"),
        (["bench"], ""),
        (["bench", "classification", "resnet18", "-b", "0"], "--batch-size must be at least 1"),
        (["bench", "classification", "resnet18", "--dtype", "int8"], "--dtype must be one of"),
        (["bench", "classification", "resnet18", "--device", "tpu"], "--device must be"),
        (["bench", "classification", "resnet18", "--threads", "0"], "--threads must lie between"),
        (["bench", "classification", "vit_b16_in1k", "-r", "64", "--checkpoint", "no.pth"], "file must exist"),
        (["convert", "missing.pth"], "file must exist"),
        (["convert", "missing.pth", "-o", "a=1"], "give it too"),
        (["convert", "missing.pth", "out.pth"], "must end in .safetensors"),
        (["bench", "classification", "test_vit", "--seconds", "nan"], "--seconds must be"),
        (["bench", "classification", "test_vit", "-b", "100000000000"], "out of memory"),
        (["convert", "missing.pth", "--source", "swag"], "give --model too"),
        (["convert", "missing.pth", "--model", "no_such"], "no model 'no_such'"),
    ],
)
def test_mistakes_give_one_line_and_code_2(arguments, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert text in error
    assert len(error.splitlines()) == (1 if text else 0)


def test_bad_files_are_refused(tmp_path, capsys):
    (tmp_path / "empty.pth").write_bytes(b"")
    torch.save({"stages.0.weight": torch.ones(1)}, tmp_path / "other.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:300])
    for file, text in (("empty", "empty"), ("half", "damaged or foreign")):
        assert cli.main(["convert", str(tmp_path / f"{file}.pth")]) == 2
        assert text in capsys.readouterr().err
    assert cli.main(["convert", str(tmp_path / "other.pth"), "--model", "vit_b16_in1k", "-r", "64"]) == 2
    assert "missing keys" in capsys.readouterr().err
    (tmp_path / "words.json").write_text("{")
    assert cli.main(["tables", "--no-trace", "--measured", str(tmp_path / "words.json")]) == 2
    assert "is no JSON" in capsys.readouterr().err
    (tmp_path / "words.json").write_text("[3]")
    assert cli.main(["tables", "--no-trace", "--measured", str(tmp_path / "words.json")]) == 2
    assert "holds no results" in capsys.readouterr().err


@pytest.mark.parametrize("maker", [timm.create_model, create_model])
def test_published_names_and_keywords_are_known_everywhere(maker):
    keywords = {
        "hourglass_vit": {
            "clustering_location": 1,
            "num_cluster": 4,
            "cluster_iters": 2,
            "cluster_temperture": 0.5,
            "cluster_window_size": 3,
        },
        "tome_vit": {"tome_r": 2},
        "e_vit": {"base_keep_rate": 0.5, "drop_loc": [1], "fuse_token": True},
        "act_vit": {"act_plug_in_index": 1, "act_plug_out_index": 3, "act_q_hashes": 8, "act_group_k": True},
        "ats_vit": {"ats_blocks": [1], "num_tokens": 1025, "drop_tokens": True},
        "evo_vit": {"evo_prune_ratio": 0.4, "evo_prune_location": 2},
        "smyrf_vit": {"smyrf_plug_in_index": 1, "smyrf_n_hashes": 4, "smyrf_q_cluster_size": 8}
        | {"smyrf_k_cluster_size": 8},
    }
    with torch.device("meta"):
        for prefix, options in keywords.items():
            for size in ("b16", "l16", "h14"):
                small = SMALL | {"image_size": 56 if size == "h14" else 64}
                assert hasattr(maker(f"{prefix}_{size}_in1k", **small, **options), "token_reducer")
