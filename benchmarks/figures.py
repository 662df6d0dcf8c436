# SPDX-License-Identifier: Apache-2.0
"""One figure per family: time against size for ops, speed-up against its FLOPs-ideal for models."""

from collections import defaultdict
from itertools import chain
from pathlib import Path

OURS, FLOOR = "ours", "floor of this machine"
_COLOURS = (
    "#d95f02",
    "#7570b3",
    "#1b9e77",
    "#e6ab02",
    "#66a61e",
    "#a6761d",
    "#e7298a",
    "#666666",
    "#1f78b4",
    "#b2df8a",
)


def draw(out: dict, folder: Path) -> list[Path]:
    """Write the figures of a run.

    Args:
        out: the JSON object of a run.
        folder: is made if it does not exist.

    Returns:
        The files: ``<family>.png`` of the ops, ``models_<family>.png``.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    families = defaultdict(list)
    first = min((result["threads"] for result in out["results"]), default=1)
    for result in out["results"]:
        if result["threads"] == first:
            families["model" in result, result["family"]].append(result)
    written = []
    for (is_model, family), results in sorted(families.items()):
        figure = _models(results) if is_model else _ops(results)
        machine = out["machine"]
        figure.suptitle(
            f"{family}: {machine.get('gpu', machine['cpu'])}, {first} thread(s), torch {machine['torch']}", fontsize=9
        )
        path = folder / f"{'models_' if is_model else ''}{family}.png"
        figure.savefig(path, dpi=100)
        written.append(path)
    return written


def _size(result: dict) -> float:
    """What grows along the horizontal axis: megabytes that have to move."""
    return result["bytes"] / 1e6


def _ops(results: list[dict]):
    """A panel per kind of case and dtype; cases with the same peers are of one kind."""
    from matplotlib.figure import Figure

    panels = defaultdict(list)
    for result in results:
        panels[tuple(sorted(result["peers"])), result["dtype"], result["case"].endswith("_hot")].append(result)
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.7 * rows + 0.3), layout="constrained")
    for place, ((peers, dtype, _), group) in enumerate(panels.items()):
        group.sort(key=_size)
        axes = figure.add_subplot(rows, columns, place + 1)
        sizes = [_size(result) for result in group]
        axes.plot(sizes, [r["ours_ms"] for r in group], "o-", color="black", linewidth=2, label=OURS, zorder=3)
        for peer, colour in zip(peers, _COLOURS * len(peers)):
            axes.plot(sizes, [r["peers"][peer] for r in group], ".-", color=colour, linewidth=1, label=peer)
        axes.plot(sizes, [r["floor_ms"] for r in group], "_:", color="grey", label=FLOOR)
        for result, size, name in zip(group, sizes, _labels([result["case"] for result in group])):
            axes.annotate(name, (size, result["ours_ms"]), (3, -9), textcoords="offset points", fontsize=5.5)
        _log_axes(axes, sizes, list(chain.from_iterable(_times(result) for result in group)))
        last = "" if len(group) == 1 else f" to {group[-1]['case']}"
        axes.set_title(f"{group[0]['case']}{last}\n{dtype}", fontsize=6.5)
        axes.legend(fontsize=5.5, framealpha=0.6)
    return figure


def _labels(cases: list[str]) -> list[str]:
    """The words in which the names differ; nothing for a single case, whose name is the title."""
    words = [case.split("_") for case in cases]
    common = set.intersection(*map(set, words))
    return [" ".join(word for word in split if word not in common) for split in words]


def _times(result):
    return result["ours_ms"], result["floor_ms"], *result["peers"].values()


def _log_axes(axes, sizes, times):
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(min(sizes) / 1.6, max(sizes) * 3)
    axes.set_ylim(min(t for t in times if t > 0) / 1.5, max(times) * 3)  # room for the legend
    axes.set_xlabel("MB to move", fontsize=7)
    axes.set_ylabel("ms", fontsize=7)
    axes.tick_params(labelsize=6.5)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)


def _models(results: list[dict]):
    """Horizontal bars: measured speed-up, with marks for the FLOPs-ideal and the expected one."""
    from matplotlib.figure import Figure

    rows = [result for result in results if result["method"] != "dense"] or results
    figure = Figure(figsize=(7.5, 0.22 * len(rows) + 1.4), layout="constrained")
    axes = figure.add_subplot()
    names = [
        f"{r['model']} {r['method']} {r['setting']}, {r['dtype'].replace('float', '')}, batch {r['batch']}"
        for r in rows
    ]
    places = list(range(len(rows)))[::-1]
    axes.barh(places, [r["speedup"] for r in rows], color="#9ecae1", label="measured speed-up over our dense model")
    axes.plot([r["ideal_speedup"] for r in rows], places, "|", color="black", markersize=9, label="FLOPs-ideal")
    axes.plot(
        [r["expected_speedup"] for r in rows], places, ".", color="#d95f02", label="expected from the dense parts"
    )
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_yticks(places, names, fontsize=6)
    axes.tick_params(axis="x", labelsize=7)
    axes.legend(fontsize=6.5, loc="lower right")
    return figure
