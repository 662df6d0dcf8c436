# SPDX-License-Identifier: Apache-2.0
"""Our ops and methods against the original implementations."""

import json
import re
from pathlib import Path

import pytest
from tokenprune_ext.reducers.tome import parse_r

from tests.golden import harness
from tests.golden.not_built import NOT_BUILT

harness.load_kinds()
KINDS = {path: harness.kind_of(path) for path in harness.files()}
SPEC = Path(__file__).parents[2] / "docs/spec/golden.md"


@pytest.mark.parametrize(
    "path",
    [p for p, kind in KINDS.items() if kind not in NOT_BUILT],
    ids=lambda p: str(p.relative_to(harness.DATA).with_suffix("")),
)
def test_golden(path, device):
    golden = harness.load(path, device)
    assert golden.kind in harness.handlers, f"unknown kind {golden.kind!r}"
    harness.run(golden)


def test_there_are_golden_files():
    assert KINDS, f"no *.safetensors below {harness.DATA}"


def test_no_kind_is_both_built_and_not_built():
    assert not set(harness.handlers) & NOT_BUILT


@pytest.mark.skipif(not SPEC.exists(), reason="runs in a source tree")
def test_every_documented_kind_is_on_a_list():
    documented = set(re.findall(r"^## (\S+)", SPEC.read_text(), re.M))
    assert set(harness.handlers) | NOT_BUILT == documented


@pytest.mark.skipif(not SPEC.exists(), reason="runs in a source tree")
@pytest.mark.parametrize("kind", sorted(harness.handlers))
def test_every_documented_key_is_known(kind):
    section = re.search(rf"^## {re.escape(kind)}$(.*?)(^## |\Z)", SPEC.read_text(), re.M | re.S)[1]
    keys = re.findall(r"`([\w.]+)` [^;`]+", section.partition("config:")[2])
    assert set(keys) == set(harness.config_rules[kind])


def test_unknown_keys_and_values_fail(device):
    path = next((p for p, kind in KINDS.items() if kind == "swag/tome_matching"), None)
    if path is None:
        pytest.skip("no file to spoil")
    golden = harness.load(path, device)
    for key, value in (("colour", 1), ("r", "many"), ("class_token", 1)):
        spoilt = {**golden.config, key: value}
        with pytest.raises(AssertionError, match=key):
            harness.check_config(harness.Golden(path, golden.meta, spoilt, golden.tensors, golden.device))


SCHEDULES = sorted(harness.DATA.rglob("parse_r*.json"))


@pytest.mark.parametrize("path", SCHEDULES, ids=lambda p: str(p.relative_to(harness.DATA)))
def test_parse_r(path):
    for case in json.loads(path.read_text()):
        assert set(case) == {"num_layers", "r", "r_tuple", "out"}
        r = case["r"] if case["r_tuple"] is None else tuple(case["r_tuple"])
        assert parse_r(case["num_layers"], r) == case["out"]
