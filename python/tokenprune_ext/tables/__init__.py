# SPDX-License-Identifier: Apache-2.0
"""Published result tables, and our own count of every row. A file added to this folder is found by itself.

``data/published.json`` holds the tables as their authors print them, ``data/*_flops.json`` what is known about the rules
behind the GFLOPs and further settings. A file of this folder serves the systems (rows of ``published.json``) named in its
``SYSTEMS`` with ``published(row) -> Row`` and the tables named in its ``FILES`` with ``counted(file) -> [Row]``. For models
at hand it may offer ``serves(model) -> bool`` and ``rule(model, counts) -> Estimate | None``, the rule of its tables.

Every value is computed: from the token counts of our models (or, where there is no model here, from the sizes of the
published one) by the closed form of the rule. No result is stored.
"""

from importlib import import_module
from pkgutil import iter_modules

from torch import nn

from ._base import Estimate, Row, meta_model, names, published_row, read, without_memory
from ._vit import Counts, Dims, Layer, dims_of, macs_by_part, planned

__all__ = [
    "Counts",
    "Dims",
    "Estimate",
    "Layer",
    "Row",
    "dims_of",
    "macs_by_part",
    "meta_model",
    "names",
    "planned",
    "read",
    "rows",
    "rows_like",
    "rule_of",
    "without_memory",
]


def _sources():
    found = (info.name for info in iter_modules(__path__) if not info.name.startswith("_"))
    return [import_module(f"{__name__}.{name}") for name in found]


def rows() -> list[Row]:
    """All rows: those of ``published.json`` in its order, then those of the ``*_flops.json``."""
    sources = _sources()
    by_system = {system: source for source in sources for system in _of(source, "SYSTEMS")}
    by_file = {file: source for source in sources for file in _of(source, "FILES")}
    found = []
    for row in read("published")["rows"]:
        source = by_system.get(row["system"])
        found.append(_unknown(row) if source is None else source.published(row))
    for file in names():
        if file in by_file:
            found += by_file[file].counted(file)
    return found


def rows_like(model: nn.Module) -> list[Row]:
    """Rows of the tables that have a rule for a model: those that may be of it."""
    source = _serving(model)
    if source is None:
        return []
    found = [source.published(row) for row in read("published")["rows"] if row["system"] in _of(source, "SYSTEMS")]
    return found + [row for file in _of(source, "FILES") for row in source.counted(file)]


def rule_of(model: nn.Module, counts: Counts) -> Estimate | None:
    """GFLOPs of one image as the tables of the model's system count them.

    Args:
        model: built by ``create_model`` or timm, dense or patched.
        counts: the tokens it processes.

    Returns:
        None when no table has a rule for this model and method.
    """
    source = _serving(model)
    return None if source is None else source.rule(model, counts)


def _serving(model):
    return next((source for source in _sources() if hasattr(source, "serves") and source.serves(model)), None)


def _of(source, name):
    return getattr(source, name, ())


def _unknown(row):
    return published_row(row, Estimate(None, f"no counting rule for {row['system']} here yet"))
