# SPDX-License-Identifier: Apache-2.0
"""A wheel, built from this tree and installed where nothing else of it can be seen.

TOKENPRUNE_TEST_WHEEL names a finished wheel to test instead of building one.
"""

import json
import os
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SMOKE = Path(__file__).parent / "smoke.py"
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="runs in a source tree")


def command(*arguments, **options):
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{arguments}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    given = os.environ.get("TOKENPRUNE_TEST_WHEEL")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("wheel")
    command(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ROOT,
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        folder,
    )
    (built,) = folder.glob("*.whl")
    return built


def create(folder, wheel, packages=None):
    """An environment with the wheel; ``packages`` is a folder whose packages it sees besides."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    if packages is not None:
        (site / "torch_from_outside.pth").write_text(f"{packages}\n")
    install = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    command(*install, env=without_this_tree())
    return python


def without_this_tree():
    """The environment without PYTHONPATH and our switches: pip must not take this tree for an installation."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TOKENPRUNE"))}


def smoke(python, folder):
    """Run the smoke test with no compiler to be found and nothing of this tree on the path."""
    environment = {**without_this_tree(), "PATH": str(python.parent)}
    return json.loads(command(python, "-I", SMOKE, cwd=folder, env=environment))


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clean")
    return create(folder / "venv", wheel, Path(torch.__file__).parents[1])


def test_wheel_holds_the_published_tables(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tables = ROOT / "python" / "tokenprune_ext" / "tables" / "data"
    assert {f"tokenprune_ext/tables/data/{file.name}" for file in tables.glob("*.json")} <= set(names)


def test_wheel_works_without_compiler(python, tmp_path):
    report = smoke(python, tmp_path)
    assert report["loaded"], report["reason"]
    assert Path(report["file"]).is_relative_to(python.parents[1])
    assert report["torch"] == torch.__version__


def test_import_needs_torch_alone(python, tmp_path):
    assert not set(smoke(python, tmp_path)["imported"]) - {"numpy"}


def test_collect_env_runs(python, tmp_path):
    report = json.loads(command(python, "-I", "-m", "tokenprune_ext.collect_env", "--json", cwd=tmp_path))
    assert isinstance(report, dict) and report


def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = next(n for n in names if n.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(archive.read(metadata).decode())
        libraries = {n: archive.read(n) for n in names if n.endswith(".so")}
    assert "tokenprune_ext/libtokenprune_cpu.so" in libraries
    assert not [
        n for n in names if n.startswith(("tests/", "csrc/", "benchmarks/")) or n.endswith((".cpp", ".cu", ".o"))
    ]
    requirements = [r.replace(" ", "") for r in fields.get_all("Requires-Dist") or []]
    assert any(r.startswith("torch>=2.11") for r in requirements), requirements
    leaks = [n for n, data in libraries.items() if str(ROOT).encode() in data]
    assert not leaks, f"the build folder is named inside {leaks}"


@pytest.mark.abi
def test_the_same_wheel_under_torch_2_11(wheel, tmp_path):
    python = create(tmp_path / "venv", wheel)
    index = "https://download.pytorch.org/whl/cpu"
    command(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "torch==2.11.0",
        "--extra-index-url",
        index,
        env=without_this_tree(),
    )
    report = smoke(python, tmp_path)
    assert report["loaded"] and report["torch"].startswith("2.11")
