# SPDX-License-Identifier: Apache-2.0
"""What a row of a published table is, and how the tables are read."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files

import timm
import torch
from torch import nn

from .. import models  # noqa: F401  (registers ours with timm)

GIGA = 1e9


@dataclass(frozen=True)
class Estimate:
    """Multiply-adds by the rule of a published table.

    Attributes:
        gflops: the rule's value in units of 1e9 (most rules count small elementwise terms beside multiply-adds); None where
            there is no rule.
        rule: what is counted, in words.
        given: counts that depend on the data and that the value holds for; None: it holds for every input.
    """

    gflops: float | None
    rule: str
    given: dict | None = None


@dataclass(frozen=True)
class Row:
    """A row of a published table, with our value of its GFLOPs.

    Attributes:
        id: ``system/number``; rows that are only in a ``*_flops.json`` are named after that file.
        system, method, backbone, setting: what was measured; ``setting`` in words.
        estimate: our value by the table's own rule.
        published_gflops: None where the authors state none.
        others: value by name of further rules.
        published: other published numbers: ``fps``, ``throughput``, ``top1``, ``miou``, ``box_ap``, ``mask_ap``.
        model, options: name and keywords for :func:`tokenprune_ext.create_model` (or timm's), None where the system has
            no model here.
        build: makes the model where no registered name does.
        parameters: number of parameters where there is no model to count.
        note: what else is known about the published figure.
    """

    id: str
    system: str
    method: str
    backbone: str
    setting: str
    estimate: Estimate
    published_gflops: float | None = None
    others: dict = field(default_factory=dict)
    published: dict = field(default_factory=dict)
    model: str | None = None
    options: dict = field(default_factory=dict)
    build: Callable[[], nn.Module] | None = None
    parameters: int | None = None
    note: str = ""

    @property
    def data_dependent(self) -> bool:
        """Whether the value holds only for the given counts."""
        return self.estimate.given is not None

    @property
    def deviation(self) -> float | None:
        """Ours over published, minus 1."""
        if not self.published_gflops or self.estimate.gflops is None:
            return None
        return self.estimate.gflops / self.published_gflops - 1


@functools.cache
def read(name: str) -> dict:
    """The content of one of the tables in ``data/``."""
    return json.loads(files(__package__).joinpath("data", f"{name}.json").read_text())


def names() -> list[str]:
    """Names of all tables in ``data/``."""
    found = files(__package__).joinpath("data").iterdir()
    return sorted(file.name.removesuffix(".json") for file in found if file.name.endswith(".json"))


_RESULTS = ("fps", "throughput", "top1", "miou", "box_ap", "mask_ap")


def results_of(row: dict) -> dict:
    """The published numbers of a row besides GFLOPs."""
    return {key: row[key] for key in _RESULTS if row.get(key) is not None}


def number(text: str) -> float | None:
    """A number of a table's cell, which is ``-`` for the dense model; ``20%`` is 0.2."""
    text = str(text).strip()
    if text == "-":
        return None
    return float(text[:-1]) / 100 if text.endswith("%") else float(text)


def pair(text: str) -> tuple[int, int]:
    """``"23 x 23"`` -> ``(23, 23)``."""
    rows, columns = (int(part) for part in str(text).split("x"))
    return rows, columns


# Columns that are not the setting of a row.
_NO_SETTING = {"id", "system", "section", "method", "backbone", "gflops", "#param", *_RESULTS}


def published_row(row: dict, estimate: Estimate, *, where: str = "", dense: bool = False, **fields) -> Row:
    """A row of ``published.json`` with our estimate.

    Args:
        row: as it is there.
        estimate: ours.
        where: data set.
        dense: whether this is the model without token reduction.
        fields: further fields of :class:`Row`.
    """
    columns = {key: value for key, value in row.items() if key not in _NO_SETTING}
    text = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in columns.items())
    return Row(
        id=row["id"],
        system=row["system"],
        method=row.get("method", ""),
        backbone=row["backbone"],
        setting=", ".join(part for part in (where, "dense" if dense else text) if part),
        estimate=estimate,
        published_gflops=row.get("gflops"),
        published=results_of(row),
        **fields,
    )


def meta_model(name: str, **options) -> nn.Module:
    """A model of ours or of timm without memory for its weights, in evaluation mode; made once for the same arguments."""
    return _meta_model(name, json.dumps(options, sort_keys=True))


@functools.cache
def _meta_model(name, options):
    return without_memory(functools.partial(timm.create_model, name, **json.loads(options)))


def without_memory(make: Callable[[], nn.Module]) -> nn.Module:
    """A model made without memory for its weights, in evaluation mode."""
    with torch.device("meta"):
        return make().eval()
