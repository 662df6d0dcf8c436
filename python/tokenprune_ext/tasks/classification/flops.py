# SPDX-License-Identifier: Apache-2.0
"""What is behind ``tokenprune flops``."""

from rich.console import Console
from rich.table import Table

from ... import reducers
from .counting import PARTS, Count, count
from .setting import Setting

__all__ = ["compare", "show"]


def compare(setting: Setting, *, image: str | None = None) -> dict:
    """GFLOPs of a setting and of the same model without its method.

    Args:
        setting: see :func:`.setting.resolve`.
        image: photograph for methods that choose by content, None for the example.

    Returns:
        Plain object with one row per variant; keys in docs/outputs.md.
    """
    method = method_of(setting.build(meta=True))
    if setting.wanted.checkpoint is not None:
        setting.build()  # weights that do not fit are an error, though most counts need none
    dense = count(setting.without_method())
    rows = [_row("dense", dense, dense)]
    if method is not None:
        rows.append(_row(method, count(setting, image=image), dense))
    wanted = setting.wanted
    return {"model": wanted.model, "method": method or "none", "options": wanted.options, "rows": rows}


def method_of(model) -> str | None:
    """Name of the method in a model, None for a dense one."""
    found = (getattr(module, "token_reducer", None) for module in model.modules())
    reducer = next((reducer for reducer in found if isinstance(reducer, reducers.Reducer)), None)
    names = (name for name in reducers.names() if type(reducer) is reducers.get(name))
    return None if reducer is None else next(names, type(reducer).__name__)


def _row(name: str, counted: Count, dense: Count) -> dict:
    return {
        "name": name,
        "tokens": _rounded(counted.tokens),
        "tokens_mlp": _rounded(counted.tokens_mlp),
        "gflops": counted.gflops,
        "gflops_by_part": counted.parts,
        "gflops_overhead": counted.overhead,
        "gflops_true": counted.true,
        "gflops_rule": None if counted.rule is None else counted.rule.gflops,
        "rule": None if counted.rule is None else counted.rule.rule,
        "data_dependent": counted.data_dependent,
        "parameters": counted.parameters,
        "ideal_speedup": dense.gflops / counted.gflops,
    }


def _rounded(tokens):
    return None if tokens is None else [round(number, 1) for number in tokens]


def show(result: dict, console: Console) -> None:
    """Print the table of :func:`compare`."""
    table = Table(title=f"{result['model']}: GFLOPs (multiply-adds per image)")
    columns = (
        "",
        "tokens per layer",
        *PARTS,
        "model",
        "method adds",
        "true",
        "table's rule",
        "ideal speed-up",
        "params",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right", overflow="fold")
    for row in result["rows"]:
        tokens = row["tokens"]
        table.add_row(
            row["name"],
            "-" if tokens is None else " ".join(f"{number:.0f}" for number in tokens),
            *(f"{row['gflops_by_part'][part]:.3f}" for part in PARTS),
            f"{row['gflops']:.3f}",
            f"{row['gflops_overhead']:.4f}",
            f"{row['gflops_true']:.3f}",
            "-" if row["gflops_rule"] is None else f"{row['gflops_rule']:.3f}",
            f"{row['ideal_speedup']:.2f}x",
            f"{row['parameters'] / 1e6:.1f}M",
        )
    console.print(table)
    for row in result["rows"]:
        if row["rule"] is not None:
            console.print(f"Rule ({row['name']}): {row['rule']}", highlight=False)
        if row["data_dependent"]:
            console.print(f"Counts of {row['name']} depend on the image; these are of one photograph.", highlight=False)
