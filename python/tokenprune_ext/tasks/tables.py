# SPDX-License-Identifier: Apache-2.0
"""What is behind ``tokenprune tables``: published figures beside ours, for the systems of all tasks."""

import fnmatch
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from .. import tables
from .._errors import UserError
from ..tables import Counts, Row, dims_of, meta_model, planned, without_memory

__all__ = ["collect", "show"]

GIGA = 1e9
_NO_MODEL = "no model here yet"
_BY_DATA = "depends on the image: tokenprune flops {} --image FILE"
# Results that a measurement may bring, and the column that shows them.
_RESULTS = ("fps", "throughput", "top1", "miou", "box_ap", "mask_ap")


def collect(
    *,
    only: str | None = None,
    trace: bool = True,
    measured: Iterable[str] = (),
    progress: Callable[[list[Row]], Iterable[Row]] = iter,
) -> list[dict]:
    """All rows as plain objects; keys in docs/outputs.md.

    Args:
        only: pattern with shell wildcards for the ids, e.g. ``"expedit-swag/*"``.
        trace: count our models too (about a second each).
        measured: JSON files of ``tokenprune bench`` and ``tokenprune eval``, whose results are put beside the published.
        progress: iterates over the rows, telling how far it is.

    Raises:
        UserError: no row fits the pattern, or a file cannot be read.
    """
    results = [result for file in measured for result in _results(file)]
    rows = [row for row in tables.rows() if only is None or fnmatch.fnmatch(row.id, only)]
    if not rows:
        raise UserError(f"--only must fit an id such as expedit-swag/003, got {only!r}")
    seen: dict[str, dict] = {}
    return [_as_dict(row, _traced(row, seen) if trace else {}, _measured(row, results)) for row in progress(rows)]


def _model(row):
    if row.model is not None:
        return meta_model(row.model, **row.options)
    return None if row.build is None else without_memory(row.build)


def _traced(row, seen):
    """GFLOPs of our model and what its method adds, or why there are none."""
    if row.model is None and row.build is None:
        return {"true_reason": _NO_MODEL}
    if row.data_dependent:
        return {"true_reason": _BY_DATA.format(row.model)}
    key = json.dumps([row.model, row.options, repr(row.build)], sort_keys=True)
    if key not in seen:
        from .classification.counting import split, traced

        model = _model(row)
        macs = traced(model)
        _, overhead = split(model, dims_of(model), macs, Counts(tuple(planned(model)), {}))
        seen[key] = {"true_gflops": sum(macs.values()) / GIGA, "overhead_gflops": overhead / GIGA}
    return seen[key]


def _as_dict(row, traced, measured):
    model = None if row.parameters is not None else _model(row)
    count = row.parameters if model is None else sum(p.numel() for p in model.parameters())
    return {
        "id": row.id,
        "system": row.system,
        "method": row.method,
        "backbone": row.backbone,
        "setting": row.setting,
        "published_gflops": row.published_gflops,
        "ours_gflops": row.estimate.gflops,
        "deviation": row.deviation,
        "rule": row.estimate.rule,
        "data_dependent": row.data_dependent,
        "given": row.estimate.given,
        "other_gflops": row.others,
        "true_gflops": traced.get("true_gflops"),
        "overhead_gflops": traced.get("overhead_gflops"),
        "true_reason": traced.get("true_reason"),
        "parameters": count,
        "published": row.published,
        "measured": measured,
        "model": row.model,
        "options": row.options,
        "note": row.note,
    }


def _results(file):
    """Objects in a JSON file, with the ids of the rows that each of them measured."""
    try:
        content = json.loads(Path(file).read_text())
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}") from None
    found = content if isinstance(content, list) else [content]
    if not all(isinstance(result, dict) and "model" in result for result in found):
        raise UserError(f"{file} holds no results of tokenprune bench or tokenprune eval")
    return found


def _measured(row, results):
    """What was measured of a row; the last file wins."""
    found = {}
    for result in results:
        if not _is_of(row, result):
            continue
        found |= {key: result[key] for key in _RESULTS if result.get(key) is not None}
        found |= {key: result[key] for key in ("device", "dtype", "batch", "machine") if key in result}
    return found


def _is_of(row, result):
    if "ids" in result:
        return row.id in result["ids"]
    same = row.model is not None and row.model == result["model"] and row.options == result.get("options", {})
    return same and result.get("method") in (None, "none")


def show(rows: list[dict], console: Console) -> None:
    """Print the rows, a table per system, and what their rules count."""
    for system in dict.fromkeys(row["system"] for row in rows):
        of_system = [row for row in rows if row["system"] == system]
        rules = list(dict.fromkeys(row["rule"] for row in of_system))
        console.print(_table(system, of_system, rules))
        if any(row["true_gflops"] is not None for row in of_system):
            console.print(" true: trace of our model, what the method adds included (and alone under method)")
        for number, rule in enumerate(rules, 1):
            console.print(f" ({number}) {rule}", highlight=False)
        notes = dict.fromkeys(row["note"] for row in of_system if row["data_dependent"] and row["note"])
        if any(row["data_dependent"] for row in of_system):
            console.print(" * depends on the image: the value of the rule for the counts shown", highlight=False)
        for note in notes:
            console.print(f"   {note}", highlight=False)
        console.print()
    console.print(_summary(rows), highlight=False)


def _table(system, rows, rules):
    """The columns that have anything in them."""
    columns: dict[str, Callable[[dict], str]] = {
        "id": lambda row: row["id"],
        "setting": _setting,
        "published": lambda row: "" if row["published_gflops"] is None else str(row["published_gflops"]),
        "ours": lambda row: _number(row["ours_gflops"]) + ("*" if row["data_dependent"] else ""),
        "deviation": lambda row: "" if row["deviation"] is None else f"{row['deviation']:+.3%}",
        "rule": lambda row: f"({rules.index(row['rule']) + 1})",
        "true": lambda row: _number(row["true_gflops"]),
        "method": lambda row: _number(row["overhead_gflops"]),
        "params": lambda row: "" if row["parameters"] is None else f"{row['parameters'] / 1e6:.1f}M",
    }
    columns |= {key: partial(_result, key) for key in _RESULTS}
    cells = {name: [cell(row) for row in rows] for name, cell in columns.items()}
    table = Table(title=f"{system}: GFLOPs (multiply-adds per image)", box=box.SIMPLE_HEAD, pad_edge=False)
    filled = [name for name in cells if any(cells[name])]
    for name in filled:
        left = name in ("id", "setting")
        table.add_column(name, justify="left" if left else "right", overflow="fold", no_wrap=name != "setting")
    for place in range(len(rows)):
        table.add_row(*(cells[name][place] for name in filled))
    return table


def _setting(row):
    given = row["given"] or {}
    counts = "; ".join(f"{name.replace('_', ' ')} {value}" for name, value in given.items())
    parts = [f"{row['method']} {row['backbone']}".strip(), row["setting"], f"for {counts}" if counts else ""]
    return ", ".join(part for part in parts if part).replace("[", r"\[")


def _result(key, row):
    """Published, and ours behind a stroke where it was measured."""
    published, ours = row["published"].get(key), row["measured"].get(key)
    text = "" if published is None else str(published)
    return text if ours is None else f"{text or '-'} | {ours:.4g}"


def _number(value):
    return "" if value is None else f"{value:.3f}"


def _summary(rows):
    fixed = [row for row in rows if row["deviation"] is not None and not row["data_dependent"]]
    if not fixed:
        return f"{len(rows)} rows"
    worst = max(fixed, key=lambda row: abs(row["deviation"]))
    return (
        f"{len(rows)} rows; {len(fixed)} have a published figure that does not depend on images, "
        f"worst deviation {worst['deviation']:+.3%} ({worst['id']})"
    )
