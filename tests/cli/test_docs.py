# SPDX-License-Identifier: Apache-2.0
"""Every method has a page with its picture, and the page names the options that the method has."""

import inspect
import re
from pathlib import Path

import pytest

pytest.importorskip("timm")

from tokenprune_ext import reducers

DOCS = Path(__file__).resolve().parents[2] / "docs"
# What a method learns from the model, not from the caller.
FACTS = {"depth", "embed_dim", "head_dim", "num_heads", "num_prefix", "class_token", "distill_token", "pooling"}


@pytest.mark.parametrize("method", reducers.names())
def test_the_page_of_a_method(method):
    text = (DOCS / "methods" / f"{method}.md").read_text()
    parameters = inspect.signature(reducers.get(method)).parameters
    rows = dict(re.findall(r"^\| `(\w+)` \| `(.*?)` \|", text, re.MULTILINE))
    assert rows.keys() == parameters.keys() - FACTS
    for name, default in rows.items():
        assert eval(default) == parameters[name].default, name
    assert f"methods/{method}.md" in (DOCS.parent / "mkdocs.yml").read_text()
    picture = DOCS / "assets" / "methods" / f"{method}.jpg"
    assert f"../assets/methods/{picture.name}" in text
    assert 10_000 < picture.stat().st_size < 150_000
