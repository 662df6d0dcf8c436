# SPDX-License-Identifier: Apache-2.0
"""The binary contract: the library is there, its schemas are pinned, its sources keep to the stable ABI.

Every family's test file lists its own SCHEMAS and SPECS; this file only collects them.
"""

import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tokenprune_ext import _library

from tests.conformance import TOKEN_COUNTS, needs_library, recorded_calls

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
FAMILIES = [
    import_module(f"tests.ops.{f.stem}")
    for f in sorted(Path(__file__).parent.glob("test_*.py"))
    if f.stem != "test_schemas"
]
FAMILIES = [f for f in FAMILIES if hasattr(f, "SCHEMAS")]
SOURCES = sorted(f for f in CSRC.rglob("*") if f.suffix in (".cpp", ".cu", ".cuh", ".h"))
needs_sources = pytest.mark.skipif(not SOURCES, reason="runs in a source tree")


def schemas():
    return sorted(s for f in FAMILIES for s in f.SCHEMAS)


def test_the_compiled_library_is_loaded():
    """Everything else also runs on the PyTorch reference; this test says that it did not."""
    _library.require()


@needs_library
def test_schemas_are_pinned():
    actual = [str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("tokenprune::")]
    assert sorted(actual) == [f"tokenprune::{s}" for s in schemas()]


@needs_library
def test_every_op_is_exercised_by_a_spec():
    called = {
        f"{func._schema.name}.{func._overloadname}".removesuffix(".default")
        for f in FAMILIES
        for spec in f.SPECS
        for func, _, _ in recorded_calls(spec, spec.sized(TOKEN_COUNTS[0]), "cpu")
    }
    assert called == {"tokenprune::" + s.partition("(")[0] for s in schemas()}


@needs_library
@pytest.mark.parametrize("key", ["CPU", "Meta", "Autograd"])
def test_every_op_has_its_kernels(key):
    for schema in schemas():
        name = "tokenprune::" + schema.partition("(")[0]
        if key == "Autograd" and name.endswith("_"):
            continue  # in-place ops are for inference
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key), f"{name} has no {key} kernel"


@needs_library
@pytest.mark.skipif(not _library.cuda_loaded(), reason="the CUDA library is not loaded")
def test_every_op_has_a_cuda_kernel():
    for schema in (s for f in FAMILIES if not getattr(f, "CPU_ONLY", False) for s in f.SCHEMAS):
        name = "tokenprune::" + schema.partition("(")[0]
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"), f"{name} has no CUDA kernel"


# ---------------------------------------------------------------- sources

INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.M)
TORCH_FREE = ("kernel*.cuh", "math.h", "cpu_isa*.cpp", "params.h")


def includes(path):
    return INCLUDE.findall(path.read_text())


def reachable(path):
    """The headers that a source includes, through our own headers."""
    seen, queue = set(), [path]
    while queue:
        current = queue.pop()
        for name in includes(current):
            inner = (current.parent / name).resolve()
            if name not in seen:
                seen.add(name)
                if inner.exists():
                    queue.append(inner)
    return seen


@needs_sources
def test_only_the_stable_abi_is_included():
    forbidden = re.compile(
        r"^(ATen|c10|caffe2)/|^torch/(?!csrc/stable|headeronly|csrc/inductor/aoti_torch/c/)|^Python\.h"
    )
    for path in SOURCES:
        if path.name == "bindings.cpp":  # the small pybind11 module; no tensor passes through it
            continue
        bad = [i for i in includes(path) if forbidden.search(i) or i.startswith("pybind11")]
        assert not bad, f"{path.relative_to(ROOT)} includes {bad}"


@needs_sources
def test_kernels_include_no_torch_header():
    for pattern in TORCH_FREE:
        for path in CSRC.glob(f"*/{pattern}"):
            bad = [i for i in reachable(path) if i.startswith("torch/")]
            assert not bad, f"{path.relative_to(ROOT)} reaches {bad}"


@needs_sources
def test_families_include_only_common():
    """A family may share another's math.h, or call the ops that its cpu.h declares; nothing else crosses the walls."""
    for path in SOURCES:
        for name in includes(path):
            crossed = re.match(r"\.\./(\w+)/(.+)", name)
            shared = not crossed or crossed[1] == "common" or crossed[2] in ("math.h", "cpu.h")
            assert shared, f"{path.relative_to(ROOT)}: {name}"


def check_calls(text):
    """The argument lists of all TP_CHECK calls in a source."""
    for match in re.finditer(r"\bTP_CHECK\(", text):
        if text.rfind("#define", 0, match.start()) > text.rfind("\n", 0, match.start()):
            continue
        depth, start, quoted, arguments = 1, match.end(), False, []
        i = start
        while depth:
            c = text[i]
            if c == '"' and text[i - 1] != "\\":
                quoted = not quoted
            elif not quoted:
                depth += (c in "([{") - (c in ")]}")
                if (c == "," and depth == 1) or depth == 0:
                    arguments.append(text[start:i].strip())
                    start = i + 1
            i += 1
        yield arguments


def message_problem(arguments):
    """What a check's message lacks of "op: argument must rule, got value", or None."""
    if len(arguments) < 3:
        return "no message"
    op, first = arguments[1], arguments[2]
    if not re.fullmatch(r'"[a-z_0-9]+"|\w*op\w*|\w+(\.|->)op|kOp\w*', op):
        return f"the second argument is not an op name: {op}"
    literals = "".join(re.findall(r'"((?:[^"\\]|\\.)*)"', " ".join(arguments[2:])))
    if not (re.match(r'"[a-z]\w* ', first) or re.fullmatch(r"[\w.>\-]+", first)):
        return f"the message does not begin with an argument: {first}"
    return None if " must " in f" {literals} " else f"the message states no rule with 'must': {literals!r}"


@needs_sources
def test_messages_name_op_argument_and_rule():
    found, problems = 0, []
    for path in SOURCES:
        for arguments in check_calls(path.read_text()):
            found += 1
            problem = message_problem(arguments)
            if problem:
                problems.append(f"{path.relative_to(ROOT)}: {problem}")
    assert found and not problems, "\n".join(problems)


@needs_sources
def test_nothing_prints_or_exits():
    for path in SOURCES:
        hit = re.search(
            r"\b(printf|std::cout|std::cerr|std::abort|exit)\s*(\(|<<)", re.sub(r"//.*", "", path.read_text())
        )
        assert not hit, f"{path.relative_to(ROOT)}: {hit[0]}"


@needs_sources
@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_sources_carry_a_licence_line(path):
    assert path.read_text().startswith("// SPDX-License-Identifier: Apache-2.0\n")
