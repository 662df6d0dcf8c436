# SPDX-License-Identifier: Apache-2.0
"""Published tables: every row is there, and our counts are those of the original counters."""

import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")

from tokenprune_ext import _patch, load_checkpoint, patch, tables
from tokenprune_ext._flops import count_flops, traced_flops
from tokenprune_ext.models.swag import swag_vit
from tokenprune_ext.tables import adapter, dims_of, meta_model, segmenter, segvit, swag, without_memory
from tokenprune_ext.tasks.classification.counting import count, split, traced
from tokenprune_ext.tasks.classification.setting import resolve

from tests.conformance import needs_library
from tests.golden import harness

MANIFESTS = Path(__file__).parents[1] / "manifests"


@pytest.fixture(scope="module")
def rows():
    return {row.id: row for row in tables.rows()}


def of(rows, file):
    """Rows of one table with what is recorded for them."""
    recorded = tables.read(file)["rows"]
    recorded = list(recorded.values()) if isinstance(recorded, dict) else recorded
    return [(rows[f"{file}/{place:03d}"], entry) for place, entry in enumerate(recorded)]


def test_every_row_is_there(rows):
    published = [row["id"] for row in tables.read("published")["rows"]]
    assert list(rows)[: len(published)] == published
    counted = {name for name in tables.names() if name.endswith("_flops")}
    assert {name.rpartition("/")[0] for name in rows} == counted | {name.rpartition("/")[0] for name in published}
    for file in counted - {"dtop_segvit_flops"}:
        assert len([name for name in rows if name.startswith(f"{file}/")]) == len(tables.read(file)["rows"])
    table = tables.read("dtop_segvit_flops")
    assert len([name for name in rows if name.startswith("dtop_segvit_flops/")]) == (
        2 * len(table["rows"]) + len(table["segvit_rows"]) + len(table["check_points"])
    )
    for row in tables.read("published")["rows"]:
        ours = rows[row["id"]]
        assert ours.published_gflops == row.get("gflops") and ours.estimate.gflops > 0 and ours.estimate.rule
        assert ours.published == {key: row[key] for key in ours.published} and ("fps" in row) == (
            "fps" in ours.published
        )


def test_swag_rows_are_within_a_tenth_of_a_percent(rows):
    found = [row for row in rows.values() if row.id.startswith("expedit-swag/")]
    assert len(found) == 58
    assert {row.method for row in found if row.data_dependent} == {"SWAG + ACT", "SWAG + ATS"}
    for row in found:
        assert abs(row.deviation) < 1e-3, row.id


def test_swag_rows_are_those_of_the_original_counter(rows):
    for row, recorded in of(rows, "swag_flops"):
        assert row.estimate.gflops == pytest.approx(recorded["closed_form_gflops"], abs=6e-7), row.id
    for row, recorded in of(rows, "swag_methods_flops"):
        if recorded["reproduced_GFLOPs"] is not None:
            assert row.estimate.gflops == pytest.approx(recorded["reproduced_GFLOPs"], abs=6e-5), row.id
        assert row.data_dependent == (not recorded["deterministic"])
    assert dims_of(meta_model("vit_h14_in1k")).stem == 1369 * 3 * 14 * 14 * 1280


@pytest.mark.parametrize(
    "name", [name.rpartition("/")[2] for name in tables.read("swag_methods_flops")["tiny_check"]["values"]]
)
def test_small_models_as_the_original_counter_saw_them(name):
    """Counts of a forward pass, the data-dependent ones included; the counter adds a little scalar arithmetic."""
    path = harness.DATA / "swag_methods" / name
    if not path.exists():
        pytest.skip("golden files of another folder")
    golden = harness.load(path, "cpu")
    wanted = tables.read("swag_methods_flops")["tiny_check"]["values"][f"golden/{name}"]
    model, carry = _small(golden)
    images = golden["in.image"][:1]
    steps = _patch.trace(model, images)
    layers = tuple(tables.Layer(step.attention_tokens.item(), step.tokens.item()) for step in steps)
    if golden.config["method"] == "evit":
        layers = _traced_keeps(golden.config)
    found = _patch.features(model, images, carry=carry)[1].carry
    groups = {int(key.rpartition(".")[2]): ids.max().item() + 1 for key, ids in found.items() if "q_groups" in key}
    estimate = swag.rule(model, tables.Counts(layers, groups))
    assert estimate.gflops * 1e9 == pytest.approx(wanted, rel=1e-3 if "ats" in name else 2e-4)


def _traced_keeps(config):
    """The original's counts while it is traced: shapes are tensors then, and a share of them a float32 (0.6 of 25 is 16)."""
    tokens, layers = (config["image_size"] // config["patch_size"]) ** 2 + 1, []
    for rate in config["keep_rate"]:
        left = int((torch.tensor(tokens - 1) * float(rate)).ceil())
        after = tokens if left == tokens - 1 else 1 + left + int(config["fuse_token"])
        layers.append(tables.Layer(tokens, after))
        tokens = after
    return tuple(layers)


def _small(golden):
    config = golden.config
    method = config["method"]
    network = ("image_size", "patch_size", "num_layers", "num_heads", "hidden_dim", "mlp_dim", "num_classes")
    model = swag_vit(**{key: config[key] for key in network}).eval()
    carry, options = {}, {}
    if method == "act":
        options = {"layers": config["act_layers"], "q_hashes": config["act_q_hashes"]}
        for layer in config["act_layers"]:
            carry[f"act.q_projection.{layer}"] = golden[f"in.layer_{layer}.proj_q"]
            carry[f"act.q_offset.{layer}"] = golden[f"in.layer_{layer}.bias_q"]
    elif method == "ats":
        options = {"layers": config["ats_blocks"], "drop_tokens": config["drop_tokens"]}
        options |= {"per_image": False, "residual": "normed"}
    elif method == "smyrf":
        options = {"layers": config["smyrf_layers"], "rounds": config["smyrf_n_hashes"], "per_row": False}
        options["cluster_size"] = config["smyrf_q_cluster_size"]
    elif method == "evit":
        options = {"keep": config["keep_rate"], "fuse_token": config["fuse_token"], "score_mode": "mean"}
    else:
        method, options = "evo", {"ratio": config["prune_ratio"], "layer": config["prune_location"]}
    patch(model, method, **options)
    return load_checkpoint(model, golden.group("param")), carry


def test_classification_rows_are_those_recorded(rows):
    for row, recorded in of(rows, "classification_flops"):
        assert row.estimate.gflops == pytest.approx(recorded["reproduced_G"], abs=6e-5), row.id
        if "estimator_rule_G" in recorded:
            assert row.others["DynamicViT's estimator"] == pytest.approx(recorded["estimator_rule_G"], abs=6e-5)


@needs_library
def test_traces_of_dynamicvit_are_the_true_counts_recorded(rows):
    models = set()
    for row, recorded in of(rows, "classification_flops"):
        if "true_macs_G" in recorded and row.model not in models:
            models.add(row.model)
            macs = traced(meta_model(row.model, **row.options))
            assert sum(macs.values()) / 1e9 == pytest.approx(recorded["true_macs_G"], abs=6e-5), row.id


def test_segmenter_rows_are_those_of_both_counters(rows):
    for row, recorded in of(rows, "segmenter_flops"):
        if "reproduced" not in recorded:
            assert row.data_dependent and abs(row.deviation) < 1e-5
            assert row.others["no two queries alike"] == pytest.approx(recorded["upper_bound_C_eq_n"], abs=6e-4)
            continue
        assert row.estimate.gflops == pytest.approx(recorded["reproduced"], abs=6e-5), row.id
        released = row.others.get("released counter", row.estimate.gflops)
        assert released == pytest.approx(recorded["released_counter"], abs=6e-5), row.id
        assert ("fitted" in row.estimate.rule) == ("FITTED" in recorded["rule"])


def test_segvit_rows_are_those_of_the_original_counter(rows):
    table = tables.read("dtop_segvit_flops")
    place = 0
    for recorded in table["rows"]:
        base, pruned = (rows[f"dtop_segvit_flops/{place + i:03d}"] for i in (0, 1))
        assert base.estimate.gflops == pytest.approx(recorded["base"]["reproduced"], abs=6e-7)
        three = recorded["pruned"]["base_with_all_three_heads"]
        assert base.others["all three heads"] == pytest.approx(three, abs=6e-5)
        assert pruned.data_dependent and abs(pruned.deviation) < 1e-4
        place += 2
    for recorded in table["segvit_rows"]:  # the closed form leaves a few small terms out
        assert rows[f"dtop_segvit_flops/{place:03d}"].estimate.gflops == pytest.approx(recorded["reproduced"], rel=4e-5)
        place += 1
    for recorded in table["check_points"]:
        row = rows[f"dtop_segvit_flops/{place:03d}"]
        assert row.estimate.gflops == pytest.approx(recorded["fvcore_gflops"], abs=1e-9)
        place += 1


def test_detector_rows_are_those_recorded_part_by_part(rows):
    names = {
        "spm": "spatial prior",
        "patch_embed": "patch embedding",
        "up": "upsampling",
        "fpn": "FPN",
        "rpn": "RPN",
        "box_head_1000_rois": "box head, 1000 regions",
        "mask_head_100_dets": "mask head, 100 detections",
        "backbone+fpn+rpn": "backbone, FPN and RPN",
        "sampling(not counted)": "deformable sampling (not counted)",
    }
    for row, recorded in of(rows, "svit_detection_flops"):
        for part, value in recorded.items():
            if part != "whole_1000rois_100dets":
                assert row.others[names.get(part, part)] == pytest.approx(value, abs=6e-4), (row.id, part)
        assert row.estimate.gflops == pytest.approx(recorded["whole_1000rois_100dets"], abs=6e-4)


def manifest(name):
    return json.loads((MANIFESTS / f"{name}.json").read_text())


@pytest.mark.parametrize("size", ["T", "S"])
def test_parameters_of_the_detectors(size):
    width = {"T": 192, "S": 384}[size]
    for kind, selectors in (("vit", 0), ("svit", 9)):
        counted = manifest(f"svit_detection/{kind}-adapter-{size.lower()}")["parameters"]
        assert adapter.parameters(width, selectors) == counted


def test_parameters_of_the_segmenters():
    files = {"ADE20K": "ade20k_seg_large_mask_640", "Cityscapes": "cityscapes_seg_large_mask"}
    files["Pascal Context"] = "pascal_context_seg_large_mask"
    for dataset, file in files.items():
        counted = manifest(f"segmenter/{file}_raw")["num_params"]
        assert segmenter.parameters(segmenter.sizes(dataset)) == counted - 1025 * 1000  # an unused classifier


def test_parameters_of_segvit(rows):
    names = ("ade20k", "ade20k_large", "pc", "cocostuff10k")
    for name, recorded in zip(names, tables.read("dtop_segvit_flops")["rows"], strict=True):
        counted = manifest(f"dtop_segvit/dtop_BASE_segvit_{name}")["num_parameters"]
        assert segvit.parameters(segvit._sizes(recorded)) == counted
    files = {8: "vitb_ade20k_51.3", 9: "vitl_ade20k_54.6", 10: "vitl_cocostuff10k_49.9", 11: "vitl_pc59_64.1"}
    files |= {13: "vitl_shrunk_ade20k_53.9", 14: "vitl_shrunk_cocostuff10k_49.1", 15: "vitl_shrunk_pc59_62.3"}
    for place, file in files.items():
        counted = manifest(f"dtop_segvit/segvit_{file}")["num_parameters"]
        assert rows[f"dtop_segvit_flops/{place:03d}"].parameters == counted


@needs_library
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_b16_in1k", {}),
        ("tome_vit_b16_in1k", {"tome_r": 3}),
        ("e_vit_b16_in1k", {"fuse_token": True}),
        ("evo_vit_b16_in1k", {}),
        ("hourglass_vit_b16_in1k", {"clustering_location": 2, "num_cluster": 9}),
        ("smyrf_vit_b16_in1k", {"smyrf_n_hashes": 2, "smyrf_q_cluster_size": 5, "smyrf_k_cluster_size": 5}),
        ("dynamicvit_deit_s", {"img_size": 32, "patch_size": 4, "embed_dim": 16, "num_heads": 2}),
        ("dynamicvit_lvvit_s", {"img_size": 32, "embed_dim": 16, "num_heads": 2}),
    ],
)
def test_a_trace_without_running_is_that_of_a_run(name, options):
    if name.endswith("in1k"):
        tiny = {"image_size": 32, "patch_size": 4, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24, "num_layers": 6}
        options = tiny | options
    model = meta_model(name, **options)
    without = traced_flops(model, (2, 3, 32, 32))
    real = model.to_empty(device="cpu")
    for parameter in real.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():
        images = torch.randn(2, 3, 32, 32)
        assert without == count_flops(lambda: real(images))
        dims, layers = dims_of(real), tuple(tables.planned(real))
    macs = {part: value / 4 for part, value in without.items()}
    parts, overhead = split(real, dims, macs, tables.Counts(layers, {}))
    assert sum(parts.values()) + overhead == pytest.approx(sum(macs.values())) and overhead >= 0


@needs_library
@pytest.mark.parametrize("name", ["spvit_deit_tiny", "svit_t"])
def test_rules_with_selectors_are_the_trace(name):
    """What was kept on a photograph is counted alike by the closed form and by the trace, which also sees that selectors
    run on the class token of packed rows.
    """
    counted = count(resolve(name, options={"depth": 4, "embed_dim": 48, "num_heads": 3, "num_classes": 10}))
    assert counted.data_dependent and counted.overhead > 0
    assert counted.rule.gflops == pytest.approx(counted.true, rel=3e-4) and counted.rule.gflops <= counted.true


@needs_library
def test_groups_and_samples_are_counted_on_the_photograph():
    tiny = {"num_layers": 3, "hidden_dim": 48, "num_heads": 3, "mlp_dim": 64, "image_size": 64}
    grouped = count(resolve("act_vit_b16_in1k", options=tiny | {"act_q_hashes": 2}))
    dense = count(resolve("vit_b16_in1k", options=tiny))
    assert grouped.data_dependent and 0 < grouped.parts["attention"] < dense.parts["attention"]
    assert grouped.rule.gflops < dense.rule.gflops and grouped.overhead > 0
    sampled = count(resolve("ats_vit_b16_in1k", options=tiny | {"ats_blocks": [1]}))
    assert sampled.data_dependent and sampled.tokens[2] < sampled.tokens[1] == sampled.tokens[0]
    assert sampled.tokens_mlp[1] == sampled.tokens[2] and sampled.true < dense.true


def test_what_no_table_counts_has_no_rule():
    assert tables.rule_of(torch.nn.Linear(2, 2), tables.Counts((), {})) is None
    assert tables.rows_like(torch.nn.Linear(2, 2)) == []
    smyrf = meta_model("deit_tiny_patch16_224")
    patch(smyrf, "smyrf")
    try:
        assert tables.rule_of(smyrf, tables.Counts((), {})) is None  # its attention is in no table of DeiT
    finally:
        _patch.unpatch(smyrf)


def test_a_system_without_rule_is_shown(monkeypatch):
    row = {"id": "new/000", "system": "new", "section": ["Results"], "backbone": "X", "gflops": 3.0, "alpha": "2"}
    monkeypatch.setattr(tables, "read", lambda name: {"rows": [row]})
    monkeypatch.setattr(tables, "names", lambda: [])
    (found,) = tables.rows()
    assert (found.published_gflops, found.estimate.gflops, found.deviation) == (3.0, None, None)
    assert re.search("no counting rule for new", found.estimate.rule) and found.setting == "alpha 2"


def test_models_without_memory_are_made_once():
    assert meta_model("vit_b16_in1k") is meta_model("vit_b16_in1k")
    assert next(without_memory(lambda: torch.nn.Linear(2, 3)).parameters()).device.type == "meta"
