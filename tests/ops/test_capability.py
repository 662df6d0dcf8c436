# SPDX-License-Identifier: Apache-2.0
"""The values of every op under every instruction set that this machine can run, one process per set."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenprune_ext import _library

from tests.conformance import needs_library

ROOT = Path(__file__).parents[2]
NEEDS = {
    "generic": (),
    "avx2": ("avx2", "fma"),
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "avx512_bf16": ("avx512f", "avx512_bf16"),
}


def cpu_flags():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def run(arguments, capability):
    environment = {**os.environ, "TOKENPRUNE_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def in_use():
    name = ctypes.CDLL(str(_library.CPU_LIBRARY)).tokenprune_cpu_capability
    name.restype = ctypes.c_char_p
    return name().decode()


@needs_library
@pytest.mark.parametrize("capability", NEEDS)
def test_values_under_a_forced_instruction_set(capability, device):
    if device.type != "cpu" or os.environ.get("TOKENPRUNE_CPU_CAPABILITY"):
        pytest.skip("runs once, from the main process, for the CPU")
    if not set(NEEDS[capability]) <= cpu_flags():
        pytest.skip(f"this CPU has no {capability}")
    if capability == in_use():
        pytest.skip("this process runs the whole battery on it")
    selected = "(test_value and (float32 or bfloat16)) or (test_gradient and float32)"
    done = run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", selected, "tests/ops"], capability
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@needs_library
@pytest.mark.parametrize("capability", NEEDS)
def test_the_forced_instruction_set_is_the_one_in_use(capability):
    if not set(NEEDS[capability]) <= cpu_flags():
        pytest.skip(f"this CPU has no {capability}")
    code = "from tests.ops.test_capability import in_use; print(in_use())"
    done = run([sys.executable, "-c", code], capability)
    assert done.stdout.strip() == capability, done.stderr


@needs_library
@pytest.mark.parametrize("tokens", [4, 4096])  # in the calling thread, and in a parallel region
def test_an_unknown_instruction_set_is_an_error_that_names_the_legal_ones(tokens):
    code = f"""
import torch
from tokenprune_ext import ops
torch.set_num_threads(2)
ops.gather_layer_norm(torch.ones(1, {tokens}, 64), torch.arange({tokens}, dtype=torch.int32))
"""
    done = run([sys.executable, "-c", code], "avx1024")
    assert done.returncode != 0
    assert "TOKENPRUNE_CPU_CAPABILITY must be generic, avx2, avx512 or avx512_bf16, got 'avx1024'" in done.stderr


@needs_library
def test_asking_for_the_instruction_set_in_use_never_fails():
    done = run([sys.executable, "-c", "from tests.ops.test_capability import in_use; print(in_use())"], "avx1024")
    assert done.stdout.strip() == "invalid TOKENPRUNE_CPU_CAPABILITY", done.stderr
