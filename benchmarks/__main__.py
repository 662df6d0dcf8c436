# SPDX-License-Identifier: Apache-2.0
"""The one runner of all benchmarks: ``python -m benchmarks --help``."""

import argparse
import importlib
import json
import os
import pkgutil
import sys
import warnings
from pathlib import Path

import torch
from rich.console import Console
from tokenprune_ext import _library
from tokenprune_ext.profiling import ceilings, choose_clock, describe, threads

import benchmarks
from benchmarks import figures, report
from benchmarks.core import Context, run_case

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.bfloat16)


class UserError(Exception):
    """A mistake of the caller: told in one line, exit code 2."""


def find_families(suite: str | None, family: str | None) -> list[tuple[str, str, object]]:
    """Modules of the wanted suites and families: ``(suite, family, module)``."""
    suites = [m.name for m in pkgutil.iter_modules(benchmarks.__path__) if m.ispkg]
    if suite is not None and suite not in suites:
        raise UserError(f"no suite {suite!r} (there are: {', '.join(suites)})")
    found = []
    for name in [suite] if suite else suites:
        package = importlib.import_module(f"benchmarks.{name}")
        found += [
            (name, m.name, importlib.import_module(f"{package.__name__}.{m.name}"))
            for m in pkgutil.iter_modules(package.__path__)
            if not m.name.startswith("_")
        ]
    if family is not None:
        known = sorted({entry[1] for entry in found})
        found = [entry for entry in found if entry[1] == family]
        if not found:
            raise UserError(f"no family {family!r} (there are: {', '.join(known)})")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Ours and its peers, interleaved in one run."
    )
    parser.add_argument("--suite", help="ops or models (default: all)")
    parser.add_argument("--family", help="one file of a suite, such as attention")
    parser.add_argument("--case", help="only cases whose name contains this text")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--threads",
        help="CPU threads; a list such as 1,2 also reports the scaling (default: 1,2; 1 with --quick)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases, no compiled peers, short rounds")
    parser.add_argument("--full", action="store_true", help="every row of every published table (hours)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="only this dtype (default: both)")
    parser.add_argument("--budget", type=float, help="seconds per case (default 3; 0.5 with --quick)")
    parser.add_argument(
        "--clock",
        default="auto",
        choices=("auto", "wall", "cpu"),
        help="auto: CPU time for one thread, else wall",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write the results; '-' is standard output with nothing else on it"
    )
    parser.add_argument(
        "--from",
        dest="sources",
        metavar="FILE",
        nargs="+",
        help="do not measure: show the results of earlier --json files; of a case measured twice, those of the last file",
    )
    parser.add_argument(
        "--figures",
        metavar="DIR",
        help="write a figure per family (default: the folder 'figures' beside the file of --json)",
    )
    parser.add_argument(
        "--readme",
        action="store_true",
        help="put the headline rows into README.md and all of them into docs/performance.md, between their markers",
    )
    return parser


def _thread_counts(text: str | None, device: str, quick: bool) -> list[int]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if text is None:
        return [1] if quick or device == "cuda" or cores < 2 else [1, 2]
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--threads must be numbers such as 1 or 1,2, got {text!r}") from None
    if not counts or min(counts) < 1 or max(counts) > cores:
        raise UserError(f"--threads must lie between 1 and {cores} (the cores of this machine), got {text}")
    return counts


def run(options: argparse.Namespace, console: Console) -> dict:
    """Measure everything that the options ask for; returns the JSON object."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable CUDA GPU")
    device = torch.device(options.device)
    families = find_families(options.suite, options.family)
    counts = _thread_counts(options.threads, options.device, options.quick)
    out = {"machine": describe(device), "ceilings": {}, "results": [], "notes": []}
    if not _library.has_kernels(device.type):
        reason = _library.cpu_error or _library.cuda_error
        console.print(f"[bold]The compiled kernels are not loaded ({reason}): these are times of the reference.[/bold]")
    if out["machine"]["load_average"] > 0.7 * out["machine"]["cores"]:
        console.print(f"Load {out['machine']['load_average']}: others use this machine, wall times mean little.")
    by_threads = {}
    for count in counts:
        with threads(count), torch.inference_mode():
            context = Context(
                device=device,
                threads=count,
                quick=options.quick,
                budget_s=options.budget or (0.5 if options.quick else 3.0),
                clock=options.clock,
                graphs=device.type == "cuda",
                full=options.full,
                dtypes=(getattr(torch, options.dtype),) if options.dtype else DTYPES,
            )
            limits = ceilings(device, context.dtypes, budget_s=min(context.budget_s, 1.0))
            by_threads[str(count)] = limits | {"clock": choose_clock(device, options.clock)}
            out["ceilings"] = by_threads[str(counts[0])] | {"by_threads": by_threads}
            console.print(report.ceiling_line(count, limits))
            for suite, family, module in families:
                for case in module.cases(context):
                    if options.case and options.case not in case.name:
                        continue
                    results, notes = run_case(suite, family, case, context, limits)
                    out["results"] += results
                    out["notes"] += notes
                    for line in [*map(report.progress_line, results), *notes]:
                        console.print(line, highlight=False, markup=False, soft_wrap=True)
                    _save(out, options.json)  # a run takes long: what is measured stays
    return out


def _save(out: dict, file: str | None) -> None:
    if file in (None, "-"):
        return
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(out, indent=1) + "\n")


def load(files: list[str]) -> dict:
    """The results of earlier runs on one machine, as one: of a case measured twice, those of the last file.

    Raises:
        UserError: a file is missing or damaged, or from another machine.
    """
    whole = None
    for file in files:
        try:
            out = json.loads(Path(file).read_text())
            machine, results, notes = out["machine"], out["results"], out["notes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--from {file}: {error!r}") from None
        if whole is None:
            whole = out
            continue
        for fact in ("cpu", "gpu", "torch"):
            if machine.get(fact) != whole["machine"].get(fact):
                raise UserError(f"--from {file}: must be of {whole['machine'].get(fact)}, got {machine.get(fact)}")
        merged = {_key(result): result for result in whole["results"]} | {_key(result): result for result in results}
        whole["results"], whole["notes"] = list(merged.values()), [*whole["notes"], *notes]
    return whole


def _key(result: dict) -> tuple:
    return tuple(result[name] for name in ("suite", "family", "case", "dtype", "device", "threads"))


def _draw(out: dict, folder: Path, console: Console) -> None:
    try:
        files = figures.draw(out, folder)
    except ModuleNotFoundError as error:
        console.print(f"No figures: {error} (pip install matplotlib)")
        return
    console.print(f"Figures: {', '.join(map(str, files))}", highlight=False, soft_wrap=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    options = _parser().parse_args(arguments)
    console = Console(stderr=options.json == "-", width=None if sys.stdout.isatty() else 170)
    warnings.filterwarnings("ignore", message=".*(nested tensors|runs the slower PyTorch reference).*")
    try:
        out = load(options.sources) if options.sources else run(options, console)
    except UserError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    report.show(out, console)
    if options.json == "-":
        json.dump(out, sys.stdout, indent=1)
    _save(out, options.json)
    if options.figures or (options.json not in (None, "-") and out["results"]):
        _draw(out, Path(options.figures or Path(options.json).parent / "figures"), console)
    if options.readme:
        report.write_readme(out, ROOT / "README.md", ROOT / "docs" / "performance.md")
    return 0 if not any("NOT TIMED" in note for note in out["notes"]) else 1


if __name__ == "__main__":
    sys.exit(main())
