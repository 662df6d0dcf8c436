# SPDX-License-Identifier: Apache-2.0
"""Compiles every CUDA unit for every architecture and reads back what the compiler made of it. Needs no GPU.

    python tools/cuda_check.py                       # every unit for the architectures this nvcc knows
    python tools/cuda_check.py --arch 80 90a --unit attention --all
    python tools/cuda_check.py --write docs/kernels.md

For every kernel: registers, shared memory (static), bytes spilled, and how many instructions of the kinds that matter
it has (matrix: HMMA, HGMMA; wide loads: LDG.128; asynchronous copies: LDGSTS; tiles by the copy engine: UTMALDG; matrix
loads: LDSM). The units csrc/*/hopper*.cu are compiled for sm_90a where the CUTLASS headers are. The exit status is 1 when a
kernel spills, when a tensor-core kernel lost its instructions or the compiler serialises its wgmma; 2 when nvcc or
cuobjdump cannot be found.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHS = ("80", "86", "89", "90a", "100", "120")
KINDS = {
    "HMMA": r"HMMA\.",
    "HGMMA": r"HGMMA\.",
    "LDG.128": r"LDG\.\S*128",
    "LDGSTS": r"LDGSTS",
    "UTMALDG": r"UTMALDG",
    "LDSM": r"LDSM",
}
BEGIN, END = "<!-- cuda-check: begin (written by tools/cuda_check.py) -->", "<!-- cuda-check: end -->"


@dataclass
class Kernel:
    unit: str
    arch: str
    symbol: str
    name: str = ""
    registers: int = 0
    shared: int = 0
    stack: int = 0
    spills: int = 0
    serialised: bool = False
    counts: Counter = field(default_factory=Counter)

    @property
    def family(self) -> str:
        return re.sub(r"<.*", "", self.name)

    def problems(self) -> list[str]:
        """What must not be: spills, or a kernel of the tensor-core engine without its instructions."""
        found = []
        if self.spills:
            found.append(f"spills {self.spills} bytes")
        needed = ["HMMA", "LDSM"] if "mma" in self.name.lower().replace("fmatile", "") else []
        needed += ["LDGSTS"] if "MmaTile" in self.name else []
        needed = ["HGMMA", "UTMALDG"] if "hopper" in self.name else needed
        found += ["waits after every wgmma"] if self.serialised else []
        found += [f"has no {kind}" for kind in needed if not self.counts[kind]]
        return found


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [Path(home) / "bin" / "nvcc"] if home else []
    candidates += [Path(p) for p in [shutil.which("nvcc")] if p]
    candidates += sorted(Path("/usr/local").glob("cuda*/bin/nvcc"), reverse=True)
    return next((str(c) for c in candidates if c.exists()), None)


def find_cuobjdump(nvcc: str) -> str | None:
    """The toolkit's, or the one inside Triton's wheel (which a CUDA build of torch brings along)."""
    candidates = [Path(nvcc).parent / "cuobjdump"]
    candidates += [Path(p) for p in [shutil.which("cuobjdump")] if p]
    spec = importlib.util.find_spec("triton")
    for folder in spec.submodule_search_locations or [] if spec else []:
        candidates += sorted(Path(folder).glob("backends/nvidia/bin/cuobjdump"))
    return next((str(c) for c in candidates if c.exists()), None)


def find_cutlass() -> Path | None:
    """The CUTLASS headers, as third_party/cutlass.cmake finds them."""
    roots = [Path(os.environ["TOKENPRUNE_CUTLASS_DIR"])] if os.environ.get("TOKENPRUNE_CUTLASS_DIR") else []
    spec = importlib.util.find_spec("cutlass_library")
    roots += [Path(folder) / "source" for folder in (spec.submodule_search_locations or [] if spec else [])]
    return next((root / "include" for root in roots if (root / "include" / "cutlass" / "cutlass.h").exists()), None)


def torch_include() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("cuda_check: torch is not installed (only its headers are needed)")
    return Path(spec.origin).parent / "include"


def supported(nvcc: str) -> set[str]:
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return {line.removeprefix("sm_") for line in listed.split()}


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def read_resources(log: str, unit: str, arch: str) -> dict[str, Kernel]:
    kernels: dict[str, Kernel] = {}
    current = None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            current = kernels.setdefault(match[1], Kernel(unit, arch, match[1]))
        elif current is None:
            continue
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current.stack, current.spills = int(match[1]), int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            current.registers = int(match[1])
            smem = re.search(r"(\d+) bytes smem", line)
            current.shared = int(smem[1]) if smem else 0
            current = None
    for symbol in re.findall(r"\(C7510\).* in the function '(\S+)'", log):
        kernels[symbol].serialised = True
    return kernels


def count_instructions(sass: str, kernels: dict[str, Kernel]) -> None:
    patterns = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}
    current = None
    for line in sass.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            current = kernels.get(match[1])
        elif current is not None and "/*" in line:
            for kind, pattern in patterns.items():
                if pattern.search(line):
                    current.counts[kind] += 1


def demangle(kernels: list[Kernel]) -> None:
    tool = shutil.which("c++filt")
    names = [k.symbol for k in kernels]
    if tool and names:
        names = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True).stdout.splitlines()
    for kernel, name in zip(kernels, names):
        name = re.sub(r"^void |\(.*", "", name)
        name = re.sub(r"tokenprune::(\w+::)*|\(anonymous namespace\)::", "", name)
        kernel.name = name.replace("__nv_bfloat16", "bf16").replace("__half", "fp16").replace(" >", ">")


def is_hopper(source: Path) -> bool:
    return source.name.startswith("hopper")


def check_unit(tools: tuple[str, str, list[Path]], source: Path, arch: str, folder: Path) -> list[Kernel]:
    nvcc, cuobjdump, includes = tools
    unit = f"{source.parent.name}/{source.name}"
    cubin = folder / f"{source.parent.name}_{source.stem}_{arch}.cubin"
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-std=c++20", "--expt-relaxed-constexpr", "-Xptxas=-v"]
    defines = ["-DNDEBUG", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL", f"-I{ROOT}"]
    defines += ["-DTOKENPRUNE_WITH_HOPPER"] if is_hopper(source) else []
    folders = [part for folder in includes for part in ("-isystem", str(folder))]
    log = run([nvcc, *flags, *defines, *folders, "-cubin", "-o", str(cubin), str(source)])
    kernels = read_resources(log, unit, arch)
    count_instructions(run([cuobjdump, "-sass", str(cubin)]), kernels)
    cubin.unlink()
    result = list(kernels.values())
    demangle(result)
    return result


def table(rows: list[list[str]], head: list[str]) -> str:
    """A Markdown table that also reads well in a terminal."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]

    def line(row: list[str]) -> str:
        cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        return "| " + " | ".join(cells) + " |"

    return "\n".join([line(head), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, rows)])


def span(values: list[int]) -> str:
    return str(min(values)) if min(values) == max(values) else f"{min(values)}-{max(values)}"


def summary(kernels: list[Kernel]) -> str:
    """One row per kernel, over its instances: registers on every architecture, instructions on one of them."""
    archs = list(dict.fromkeys(k.arch for k in sorted(kernels, key=lambda k: int(k.arch.rstrip("a")))))
    shown = "90a" if "90a" in archs else archs[0]
    groups: dict[str, dict[str, list[Kernel]]] = {}
    for k in kernels:
        groups.setdefault(k.family, {}).setdefault(k.arch, []).append(k)
    rows = []
    for family, by_arch in sorted(groups.items()):
        members = by_arch.get(shown, [])
        total = sum((k.counts for k in members), Counter())
        every = [k for group in by_arch.values() for k in group]
        registers = [span([k.registers for k in by_arch[a]]) if a in by_arch else "" for a in archs]
        kinds = ", ".join(f"{total[kind]} {kind}" for kind in KINDS if total[kind])
        shared, spills = max(k.shared for k in every), sum(k.spills for k in every)
        rows.append([family, kinds, str(len(members)), str(shared), str(spills), *registers])
    head = ["kernel", f"instructions on sm_{shown}", "instances", "shared", "spills", *(f"sm_{a}" for a in archs)]
    return table(rows, head)


def details(kernels: list[Kernel]) -> str:
    rows = [
        [k.name, f"sm_{k.arch}", str(k.registers), str(k.shared), str(k.spills), *(str(k.counts[n]) for n in KINDS)]
        for k in sorted(kernels, key=lambda k: (k.name, k.arch))
    ]
    return table(rows, ["instance", "arch", "registers", "shared", "spills", *KINDS])


def write_section(path: Path, kernels: list[Kernel], version: str) -> None:
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        sys.exit(f"cuda_check: {path} lacks the lines '{BEGIN}' and '{END}'")
    archs = ", ".join(f"sm_{a}" for a in dict.fromkeys(k.arch for k in kernels))
    section = (
        f"{BEGIN}\n\nnvcc {version}; {archs}. Registers per thread on every architecture, static shared memory and spills "
        f"in bytes, instructions in the code of all instances together.\n\n{summary(kernels)}\n\n{END}"
    )
    path.write_text(text[: text.index(BEGIN)] + section + text[text.index(END) + len(END) :], encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile the CUDA kernels for every architecture and inspect them.")
    parser.add_argument("--arch", nargs="+", help=f"default: those of {' '.join(ARCHS)} that nvcc supports")
    parser.add_argument("--unit", default="", help="only sources whose path contains this text")
    parser.add_argument("--all", action="store_true", help="one line per instance instead of one per kernel")
    parser.add_argument("--write", type=Path, help="replace the marked section of this Markdown file")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()

    nvcc = find_nvcc()
    cuobjdump = find_cuobjdump(nvcc) if nvcc else None
    if nvcc is None or cuobjdump is None:
        print(f"cuda_check: {'nvcc' if nvcc is None else 'cuobjdump'} not found", file=sys.stderr)
        return 2
    cutlass = find_cutlass()
    tools = (nvcc, cuobjdump, [torch_include(), *([cutlass] if cutlass else [])])
    known = supported(nvcc)
    archs = args.arch or [a for a in ARCHS if a.rstrip("a") in known or a in known]
    sources = [s for s in sorted((ROOT / "csrc").glob("*/cuda*.cu")) if args.unit in str(s.relative_to(ROOT))]
    hopper = [s for s in sorted((ROOT / "csrc").glob("*/hopper*.cu")) if args.unit in str(s.relative_to(ROOT))]
    if hopper and cutlass is None:
        print("cuda_check: no CUTLASS headers (pip install --no-deps nvidia-cutlass): sm_90a units left out")
    elif "90a" in archs:
        sources += hopper
    started, kernels, failures = time.monotonic(), [], []
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        pairs = [(s, a) for s in sources for a in archs if a == "90a" or not is_hopper(s)]
        jobs = {pool.submit(check_unit, tools, s, a, Path(folder)): (s, a) for s, a in pairs}
        for job in concurrent.futures.as_completed(jobs):
            source, arch = jobs[job]
            try:
                kernels += job.result()
            except RuntimeError as error:
                failures.append(f"{source.relative_to(ROOT)} for sm_{arch} does not compile:\n{error}")
    kernels.sort(key=lambda k: (k.unit, k.name, archs.index(k.arch)))
    broken = bool(failures)
    failures += [f"{k.name} (sm_{k.arch}): {', '.join(k.problems())}" for k in kernels if k.problems()]

    print(details(kernels) if args.all else summary(kernels))
    version = run([nvcc, "--version"]).strip().splitlines()[-2].split(", ", 1)[-1]
    spilled = sum(1 for k in kernels if k.spills)
    print(
        f"\nnvcc {version}: {len(sources)} units, {len(archs)} architectures, {len(kernels)} kernels, {spilled} with "
        f"spills, {time.monotonic() - started:.0f} s"
    )
    for failure in failures:
        print(f"FAIL {failure}", file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps([vars(k) for k in kernels], indent=1), encoding="utf-8")
    if args.write and not broken:
        write_section(args.write, kernels, version)
    return 1 if failures or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
