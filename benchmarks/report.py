# SPDX-License-Identifier: Apache-2.0
"""Tables of a run: on the terminal, the verdict on every target, and the table in README.md."""

from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

BEGIN, END = "<!-- benchmarks:begin (python -m benchmarks --readme) -->", "<!-- benchmarks:end -->"
SHORT = 2  # rows per family and dtype in README.md
SCALING_TARGET = {"attention": 1.85, "cluster": 1.85, "deform": 1.85}  # two threads over one; 1.6 elsewhere


def _ms(value: float) -> str:
    if value >= 1000:
        return f"{value / 1e3:.2f} s"
    return f"{value * 1e3:.1f} us" if value < 0.1 else f"{value:.3g} ms"


def ceiling_line(threads: int, limits: dict) -> str:
    """What this machine reaches: copy and GEMM."""
    gemm = ", ".join(f"{name} {rate:.0f}" for name, rate in limits["gemm_gflops"].items())
    return f"{threads} thread(s): copy {limits['copy_gbs']:.0f} GB/s, GEMM GFLOP/s: {gemm}"


def progress_line(result: dict) -> str:
    """One result in one line, printed as soon as it is there."""
    text = f"{result['family']:>9} {result['case']} {result['dtype']} t{result['threads']}: "
    text += f"ours {_ms(result['ours_ms'])}"
    for name, ms in result["peers"].items():
        text += f"; {name} {_ms(ms)} ({ms / result['ours_ms']:.2f}x)"
    return text


def _ratio_text(result: dict) -> str:
    if result["ratio"] is None:
        return "-"
    return f"{result['ratio']:.2f}x [{result['spread']['min']:.2f}..{result['spread']['max']:.2f}]"


def _target_text(result: dict) -> str:
    parts = []
    for target in result["targets"]:
        wanted = f"<= {_ms(target['ms'])}" if target["peer"] is None else f">= {target['ratio']:.2f}x"
        parts.append(wanted + (" ok" if target["reached"] else " missed"))
    return ", ".join(parts) or "-"


def _ops_table(results: list[dict]) -> Table:
    table = Table(
        title="Ops (ratio = target peer / ours, with its range over the rounds; floor = what bytes and FLOPs allow here)"
    )
    left = ("case", "dtype", "target peer", "target", "best peer (same outputs)")
    for name in ("case", "dtype", "thr", "ours", *left[2:3], "ratio", *left[3:], "floor", "of floor"):
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    for result in results:
        best = f"{result['best_peer']} ({result['best_ratio']:.2f}x)" if result["best_peer"] else "-"
        table.add_row(
            result["case"],
            result["dtype"],
            str(result["threads"]),
            _ms(result["ours_ms"]),
            result["target_peer"] or "-",
            _ratio_text(result),
            _target_text(result),
            best,
            _ms(result["floor_ms"]),
            f"{100 * result['floor_ms'] / result['ours_ms']:.0f} %",
        )
    return table


def _models_table(results: list[dict]) -> Table:
    table = Table(
        title="Models (speed-up over our own dense model; ideal = multiply-adds; "
        "expected = dense parts scaled by their FLOPs)"
    )
    for name in (
        "model",
        "setting",
        "dtype",
        "batch",
        "thr",
        "dense",
        "reduced",
        "speed-up",
        "ideal",
        "expected",
        "efficiency",
        "of ideal",
        "other",
    ):
        table.add_column(
            name,
            justify="left" if name in ("model", "setting", "dtype", "other") else "right",
            overflow="fold",
        )
    for result in results:
        others = "; ".join(f"{name} {_ms(ms)}" for name, ms in result["peers"].items() if name != result["target_peer"])
        table.add_row(
            result["model"],
            f"{result['method']} {result['setting']}",
            result["dtype"],
            str(result["batch"]),
            str(result["threads"]),
            _ms(result["dense_ms"]),
            _ms(result["ours_ms"]),
            f"{result['speedup']:.2f}x",
            f"{result['ideal_speedup']:.2f}x",
            f"{result['expected_speedup']:.2f}x",
            f"{result['efficiency']:.2f}",
            f"{result['speedup'] / result['ideal_speedup']:.2f}",
            others,
        )
    return table


def scaling(results: list[dict]) -> list[dict]:
    """Two threads against one, for every case that was run with both."""
    single = {(r["case"], r["dtype"]): r for r in results if r["threads"] == 1}
    rows = []
    for result in results:
        one = single.get((result["case"], result["dtype"]))
        if result["threads"] != 2 or one is None or result["device"] != "cpu":
            continue
        gain = one["ours_ms"] / result["ours_ms"]
        target = SCALING_TARGET.get(result["family"], 1.6)
        rows.append(
            {
                "case": result["case"],
                "dtype": result["dtype"],
                "gain": gain,
                "target": target,
                "reached": gain >= target,
            }
        )
    return rows


def _machine_gain(out: dict, dtype: str) -> str:
    """What the second thread is worth to the machine's own large products and copies, or nothing where it is not known."""
    one, two = (out.get("ceilings", {}).get("by_threads", {}).get(n) for n in ("1", "2"))
    if not one or not two or dtype not in one["gemm_gflops"]:
        return ""
    product = two["gemm_gflops"][dtype] / one["gemm_gflops"][dtype]
    return f" (a large matrix product gains {product:.2f}x here, a copy {two['copy_gbs'] / one['copy_gbs']:.2f}x)"


def _lost(result: dict) -> str:
    """Where the time of a reduced model goes that its FLOPs do not explain."""
    scaled = result["dense_ms"] / result["expected_speedup"]
    text = f"the dense parts scaled would take {_ms(scaled)}, "
    left = result["ours_ms"] - scaled
    if left <= 0:
        return text + "the rest of the target is out of their reach: parts run at different rates"
    return text + f"the method and smaller products cost {_ms(left)} more"


def _shortfall(result: dict, target: dict) -> str:
    short = f"{100 * (1 - target['got'] / target['ratio']):.0f} % short"
    if result.get("method", "dense") != "dense":
        ideal = f", ideal {result['ideal_speedup']:.2f}x"
        return f"{target['got']:.2f}x over {target['peer']}, target {target['ratio']:.2f}x{ideal} ({short}; {_lost(result)})"
    room = f"{_of_floor(result)}, which allows {result['peers'][target['peer']] / result['floor_ms']:.1f}x"
    return f"{target['got']:.2f}x over {target['peer']}, target {target['ratio']:.2f}x ({short}; {room})"


def _of_floor(result: dict) -> str:
    return f"ours reaches {100 * result['floor_ms'] / result['ours_ms']:.0f} % of the floor"


def verdicts(out: dict) -> list[str]:
    """One line per missed target: by how much, and why or what the machine leaves to gain."""
    lines = []
    for result in out["results"]:
        where = f"MISSED {result['case']} {result['dtype']} {result['threads']} thread(s)"
        for target in result["targets"]:
            if target["reached"]:
                continue
            if target["peer"] is None:
                lines.append(f"{where}: {_ms(target['got'])}, target {_ms(target['ms'])}; {_of_floor(result)}")
            else:
                lines.append(f"{where}: {_shortfall(result, target)}")
        if result.get("efficiency_target") and result["efficiency"] < result["efficiency_target"]:
            lines.append(
                f"{where}: {result['efficiency']:.2f} of the expected speed-up, "
                f"target {result['efficiency_target']:.2f} ({_lost(result)})"
            )
    lines += [
        f"MISSED {row['case']} {row['dtype']}: two threads {row['gain']:.2f}x one, target {row['target']:.2f}x"
        + _machine_gain(out, row["dtype"])
        for row in scaling(out["results"])
        if not row["reached"]
    ]
    return lines


def _count_targets(out: dict) -> int:
    efficiencies = sum(bool(result.get("efficiency_target")) for result in out["results"])
    return sum(len(result["targets"]) for result in out["results"]) + efficiencies + len(scaling(out["results"]))


def show(out: dict, console: Console) -> None:
    """Print the tables and the verdict on the targets."""
    ops = [r for r in out["results"] if "model" not in r]
    models = [r for r in out["results"] if "model" in r]
    for rows, table in ((ops, _ops_table), (models, _models_table)):
        if rows:
            console.print(table(rows))
    gains = scaling(out["results"])
    if gains:
        text = ", ".join(f"{row['case']} {row['dtype']} {row['gain']:.2f}x" for row in gains)
        console.print(f"Two threads over one: {text}", highlight=False, markup=False)
    machine = out["machine"]
    console.print(
        f"{machine.get('gpu', machine['cpu'])}, torch {machine['torch']}, load {machine['load_average']}",
        highlight=False,
    )
    missed, total = verdicts(out), _count_targets(out)
    if total:
        console.print(f"Targets reached: {total - len(missed)} of {total}", highlight=False)
    for line in [*missed, *(note for note in out["notes"] if "NOT TIMED" in note)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def short_list(results: list[dict]) -> list[dict]:
    """A handful per family for README.md: rows marked as headlines, otherwise the first ones; the fewest threads."""
    fewest = min((result["threads"] for result in results), default=1)
    families = defaultdict(list)
    for result in results:
        if result["threads"] == fewest:
            families["model" in result, result["family"], result["dtype"]].append(result)
    chosen = []
    for (is_model, *_), rows in families.items():
        marked = [row for row in rows if row.get("headline")]
        if is_model:
            chosen += [row for row in marked or rows if row["method"] != "dense" and not row.get("packed")]
        else:
            chosen += (marked or [row for row in rows if row["ratio"] is not None])[:SHORT]
    return chosen


def _markdown(out: dict, results: list[dict]) -> str:
    machine = out["machine"]
    lines = [
        f"Measured on {machine.get('gpu', machine['cpu'])}, torch {machine['torch']}; "
        "ours and the peer interleaved in one run, medians.",
    ]
    ops = [r for r in results if "model" not in r and r["ratio"] is not None]
    if ops:
        lines += ["", "| case | dtype | threads | ours | peer | ratio |", "|---|---|---|---|---|---|"]
    for result in ops:
        peer = result["target_peer"]
        cells = (
            *(result["case"], result["dtype"], result["threads"], _ms(result["ours_ms"])),
            f"{peer} {_ms(result['peers'][peer])}",
            f"**{result['ratio']:.2f}x**",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines + _models_markdown([r for r in results if "model" in r]))


def _models_markdown(models: list[dict]) -> list[str]:
    lines = []
    reduced = [r for r in models if r["method"] != "dense"]
    if reduced:
        lines += [
            "",
            "| model | dtype | threads | dense | reduced | speed-up | FLOPs-ideal | expected |",
            "|---|---|---|---|---|---|---|---|",
        ]
    for r in reduced:
        cells = (
            f"{r['model']}, {r['method']} {r['setting']}, batch {r['batch']}",
            *(r["dtype"], r["threads"], _ms(r["dense_ms"]), _ms(r["ours_ms"])),
            *(f"**{r['speedup']:.2f}x**", f"{r['ideal_speedup']:.2f}x", f"{r['expected_speedup']:.2f}x"),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    dense = [r for r in models if r["method"] == "dense"]
    if dense:
        lines += ["", "| dense model | dtype | threads | ours | others |", "|---|---|---|---|---|"]
    for r in dense:
        others = "; ".join(f"{name} {_ms(ms)}" for name, ms in r["peers"].items())
        cells = (f"{r['model']}{', packed weights' * r['packed']}, batch {r['batch']}", r["dtype"], r["threads"])
        lines.append("| " + " | ".join(map(str, (*cells, _ms(r["ours_ms"]), others))) + " |")
    return lines


def write_readme(out: dict, readme: Path, full: Path) -> None:
    """Put the tables of this run between the markers: a handful of rows into README.md, all into ``full``."""
    for path, results in ((readme, short_list(out["results"])), (full, out["results"])):
        text = path.read_text()
        if BEGIN not in text or END not in text:
            raise SystemExit(f"benchmarks: {path.name} has no lines {BEGIN!r} and {END!r}")
        head, rest = text.split(BEGIN, 1)
        path.write_text(f"{head}{BEGIN}\n{_markdown(out, results)}\n{END}{rest.split(END, 1)[1]}")
