# SPDX-License-Identifier: Apache-2.0
"""Timing, FLOP counting in closed form against traced counts, and the benchmark runner."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenprune_ext import profiling

timm = pytest.importorskip("timm")
ROOT = Path(__file__).resolve().parents[2]


def test_measure_interleaves_and_counts_rounds():
    order = []
    variants = {name: lambda name=name: order.append(name) for name in "ab"}
    samples = profiling.measure(variants, budget_s=0, min_rounds=4, sample_s=0)
    assert [len(s.seconds) for s in samples.values()] == [4, 4]
    assert order[-8:] == ["a", "b", "b", "a"] * 2  # the order rotates


def test_ratio_is_of_medians_with_its_range():
    slow, fast = profiling.Samples((2.0, 4.0, 9.0)), profiling.Samples((1.0, 2.0, 3.0))
    assert profiling.ratio(slow, fast) == (2.0, 2.0, 3.0)


def test_threads_are_restored():
    before = torch.get_num_threads()
    with profiling.threads(1) as used:
        assert used == torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "method, options", [(None, {}), ("tome", {"r": 9}), ("evit", {}), ("threshold", {"selector": "norm"})]
)
def test_closed_form_equals_traced_flops(method, options):
    from tokenprune_ext import _variants

    model = timm.create_model("deit_tiny_patch16_224", depth=4).eval()
    images = torch.randn(2, 3, 224, 224)
    variant = _variants.make(model, "x", method, **options)
    torch.manual_seed(0)
    layers, _ = _variants.layer_tokens(variant, images)
    macs = _variants.macs_of(variant, layers)
    torch.manual_seed(0)
    traced = profiling.count_flops(lambda: variant.model(images))
    for part in ("linear", "conv"):
        assert traced[part] / 4 == pytest.approx(macs[part], rel=1e-9)  # two per multiply-add, two images
    assert traced["attention"] / 4 == pytest.approx(macs["attention"], rel=0.03)  # scores and matching come on top


def test_sharing_leaves_the_model_alone():
    from tokenprune_ext import _variants

    model = timm.create_model("deit_tiny_patch16_224", depth=2).eval()
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        before = model(images)
        _variants.make(model, "x", "tome", r=20)
        assert torch.equal(model(images), before)
    assert not hasattr(model, "token_reducer")


def test_profile_reports_tokens_and_parts():
    import tokenprune_ext

    model = timm.create_model("deit_tiny_patch16_224", depth=2).eval()
    tokenprune_ext.patch(model, "tome", r=20)
    report = profiling.profile(model, torch.randn(1, 3, 224, 224), budget_s=0.01)
    assert report["tokens"] == [197, 177]
    assert report["latency_ms"] > 0
    assert report["gflops"]["linear"] > report["gflops"]["attention"] > 0


def _benchmarks(*arguments):
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_benchmarks_write_the_documented_json():
    done = _benchmarks("--family", "tokens", "--case", "select", "--quick", "--budget", "0.01", "--json", "-")
    assert done.returncode == 0, done.stderr
    out = json.loads(done.stdout)
    assert {"copy_gbs", "gemm_gflops"} <= out["ceilings"].keys()
    keys = "suite family case dtype device threads ours_ms peers best_peer best_ratio target_peer target_ratio ratio"
    for result in out["results"]:
        assert {*keys.split(), "flops", "bytes", "floor_ms", "checked", "spread"} <= result.keys()
        assert result["checked"] is True
        assert result["ratio"] == pytest.approx(result["peers"][result["target_peer"]] / result["ours_ms"])


@pytest.mark.parametrize(
    "arguments", [("--suite", "none"), ("--family", "none"), ("--threads", "x"), ("--from", "none.json")]
)
def test_benchmarks_refuse_mistakes_in_one_line(arguments):
    done = _benchmarks(*arguments)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_wrong_result_is_not_timed():
    sys.path.insert(0, str(ROOT))
    try:
        from benchmarks.core import Case, Context, Prepared, run_case
    finally:
        sys.path.remove(str(ROOT))
    x = torch.ones(4)
    prepared = Prepared(ours=lambda: x * 1.1, peers={}, flops=0, bytes=16, reference=lambda: (x.double(),))
    context = Context(torch.device("cpu"), 1, True, 0.01, "auto")
    results, notes = run_case(
        "ops", "none", Case("wrong", torch.float32, lambda: prepared), context, {"copy_gbs": 1, "gemm_gflops": {}}
    )
    assert results == []
    assert "NOT TIMED" in notes[0]
