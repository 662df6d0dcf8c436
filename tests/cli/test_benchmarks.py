# SPDX-License-Identifier: Apache-2.0
"""The benchmark runner's figures, short table, rotating inputs and model rows."""

from pathlib import Path

import pytest
import torch
from tokenprune_ext import profiling

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


def _result(case, **more):
    result = {"suite": "ops", "family": "tokens", "case": case, "dtype": "float32", "device": "cpu", "threads": 1}
    result |= {"ours_ms": 1.0, "peers": {"eager": 2.0}, "best_peer": "eager", "best_ratio": 2.0, "target_peer": "eager"}
    result |= {"target_ratio": None, "ratio": 2.0, "spread": {"min": 1.9, "max": 2.1}, "targets": [], "flops": 10}
    return result | {"bytes": 1e6, "floor_ms": 0.5, "checked": True, "headline": False} | more


def _model(method, **more):
    fields = {
        "suite": "models",
        "family": "deit",
        "model": "deit_s_224",
        "method": method,
        "setting": "r=13",
        "batch": 1,
    }
    fields |= {"dense_ms": 2.0, "speedup": 2.0, "ideal_speedup": 2.2, "expected_speedup": 2.1, "efficiency": 0.95}
    return _result(f"deit_s_224_{method}_b1", **fields, packed=False, **more)


def _out(*results):
    machine = {"cpu": "a CPU", "torch": "2", "load_average": 0.0}
    return {"machine": machine, "ceilings": {}, "results": list(results), "notes": []}


def test_one_figure_per_family(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import figures

    out = _out(_result("small", bytes=1e5), _result("large"), _result("large_hot"), _model("dense"), _model("tome"))
    files = figures.draw(out, tmp_path / "new")
    assert sorted(file.name for file in files) == ["models_deit.png", "tokens.png"]
    assert all(file.stat().st_size < 200_000 for file in files)


def test_short_table_has_headlines_of_the_fewest_threads():
    from benchmarks import report

    rows = [_result("a"), _result("b", headline=True), _result("b", headline=True, threads=2)]
    others = [_result(name, family="deform") for name in "xyz"]  # none is marked: the first ones
    models = [_model("dense", headline=True), _model("tome", headline=True), _model("evo")]
    found = report.short_list([*rows, *others, *models])
    assert [row["case"] for row in found] == ["b", "x", "y", "deit_s_224_tome_b1"]


def test_missed_target_of_a_model_says_where_the_time_goes():
    from benchmarks import report

    missed = {"peer": "eager", "ratio": 2.05, "got": 2.0, "reached": False}
    (line,) = report.verdicts(_out(_model("tome", targets=[missed])))
    assert "2.00x over eager, target 2.05x, ideal 2.20x (2 % short" in line
    assert "the method and smaller products cost" in line


def test_both_tables_are_written(tmp_path):
    from benchmarks import report

    files = [tmp_path / name for name in ("README.md", "performance.md")]
    for file in files:
        file.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write_readme(_out(_result("a", headline=True), _result("b"), _model("dense"), _model("evo")), *files)
    short, full = (file.read_text() for file in files)
    assert "| a |" in short and "| b |" not in short
    assert "| b |" in full and "| dense model |" in full
    assert all(text.startswith("before") and text.endswith("after\n") and "old" not in text for text in (short, full))


def test_rotating_inputs_exceed_the_last_cache():
    from benchmarks.core import copies, last_cache_bytes

    x = torch.randn(1 << 20)
    sets = copies((x, x))
    assert len(sets) >= 4
    assert len(sets) * 2 * x.nbytes >= 4 * last_cache_bytes(x.device)
    assert len({t.data_ptr() for one in sets for t in one}) == 2 * len(sets)
    assert len(copies((x,), cold=False)) == 1


def test_every_published_row_is_a_case():
    pytest.importorskip("timm")
    from tokenprune_ext import tables

    from benchmarks.core import Context
    from benchmarks.models import swag

    for size in ("l16", "h14"):
        published = {row.id for row in tables.rows() if row.id.startswith("expedit-swag/") and f"_{size}_" in row.model}
        dense = {row.id for row in tables.rows() if row.model == f"vit_{size}_in1k"}
        assert {row.published for row in swag.rows(size)} == published - dense
        assert len({row.key for row in swag.rows(size)}) == len(swag.rows(size))
        assert len({row.method for row in swag.rows(size) if row.headline}) == 7
    context = Context(torch.device("cpu"), 1, True, 0.01, "auto")
    quick = [case.name for case in swag.cases(context)]
    assert sum(not name.endswith("_packed") for name in quick) == 8  # seven methods, and dense


def test_linear_layers_of_ours_count_as_linear():
    assert profiling.part_of(torch.ops.tokenprune.packed_linear) == "linear"
    assert profiling.part_of(torch.ops.tokenprune.gather_linear) == "linear"
    assert profiling.part_of(torch.ops.tokenprune.ms_deform_attn.default) == "deformable"


def test_long_calls_are_warmed_up_once(monkeypatch):
    calls = []
    monkeypatch.setattr(profiling, "_LONG_S", 0.0)
    samples = profiling.measure({"a": lambda: calls.append(0)}, budget_s=0, min_rounds=3, sample_s=0)
    assert len(samples["a"].seconds) == 3
    assert len(calls) == 5


def test_runs_of_one_machine_are_joined(tmp_path):
    import json

    from benchmarks import __main__ as runner

    first = _out(_result("a", ours_ms=1.0), _result("b", ours_ms=1.0))
    again = _out(_result("b", ours_ms=2.0), _result("b", ours_ms=3.0, threads=2))
    other = {**_out(_result("c")), "machine": {**first["machine"], "cpu": "another CPU"}}
    files = []
    for name, out in (("first", first), ("again", again), ("other", other)):
        files.append(str(tmp_path / f"{name}.json"))
        Path(files[-1]).write_text(json.dumps(out))
    joined = runner.load(files[:2])["results"]
    assert [(row["case"], row["ours_ms"]) for row in joined] == [("a", 1.0), ("b", 2.0), ("b", 3.0)]
    with pytest.raises(runner.UserError, match="must be of a CPU, got another CPU"):
        runner.load(files)
    for damaged in ("{", "[1]", "{}"):
        Path(files[1]).write_text(damaged)
        with pytest.raises(runner.UserError, match=r"again\.json"):
            runner.load(files)
