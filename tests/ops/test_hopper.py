# SPDX-License-Identifier: Apache-2.0
"""The sm_90a units without a GPU: what was built is told, and their tiles are those of CuTe.

Their kernels run on the host model (tests/csrc/test_hopper_kernels.cpp, test_linear_kernels.cpp; tools/sanitize.sh).
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tokenprune_ext import _library

from tools.cuda_check import find_cutlass

ROOT = Path(__file__).parents[2]


def cuda_headers():
    """The include folder of the CUDA toolkit, or None."""
    nvcc = shutil.which("nvcc")
    homes = [Path(os.environ[n]) for n in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(n)]
    homes += [Path(nvcc).resolve().parents[1]] if nvcc else []
    homes += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    return next((h / "include" for h in homes if (h / "include" / "cuda.h").exists()), None)


def test_tiles_descriptors_and_registers_are_those_of_cute(tmp_path):
    cutlass, cuda, compiler = find_cutlass(), cuda_headers(), shutil.which("c++")
    if not (cutlass and cuda and compiler):
        pytest.skip("needs a C++ compiler and the headers of CUTLASS (nvidia-cutlass) and of the CUDA toolkit")
    program = tmp_path / "cute_tiles"
    folders = [f"-isystem{folder}" for folder in (cutlass, cuda, cuda / "cccl")]
    source = ROOT / "tests" / "csrc" / "cute_tiles.cpp"
    subprocess.run([compiler, "-std=c++20", "-O1", "-DNDEBUG", *folders, str(source), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.strip().endswith(" compared, 0 wrong")


@pytest.mark.skipif(not _library.cuda_loaded(), reason="the CUDA library is not loaded")
def test_the_build_tells_whether_it_has_the_units():
    told = _library.build_info().get("cuda_units")
    if told is None:
        pytest.skip("not built by setup.py")
    built = any("off unless TOKENPRUNE_HOPPER=1" in line for line in told)
    assert built or any("left out" in line for line in told)
    assert built == hasattr(torch.ops.tokenprune_sm90a, "gather_linear")
