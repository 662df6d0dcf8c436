# SPDX-License-Identifier: Apache-2.0
"""The C++ example of the docs compiles against the stable ABI and computes what the Python ops compute."""

import os
import subprocess
from pathlib import Path

import tokenprune_ext.ops as ops
import torch

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "sparse_block.cpp"


def test_cpp_example(tmp_path):
    folder = Path(torch.__file__).parent
    library = tmp_path / "sparse_block.so"
    command = [
        os.environ.get("CXX", "g++"),
        "-std=c++20",
        "-shared",
        "-fPIC",
        "-DTORCH_TARGET_VERSION=0x020b000000000000ULL",
    ]
    command += [f"-I{folder}/include", str(EXAMPLE), "-o", str(library), f"{folder}/lib/libtorch_cpu.so"]
    subprocess.run(command, check=True)
    torch.ops.load_library(library)

    features, mask = torch.randn(2, 9, 8), torch.rand(2, 9) > 0.5
    out = torch.ops.example.sparse_block(features, mask, 2)

    index = ops.select_tokens(mask)
    rows = features.reshape(18, 2, 4)
    attended, _ = ops.sparse_attention(
        rows, rows, rows, cu_seqlens_q=index.cu_seqlens, max_seqlen_q=index.max_seqlen, index=index
    )
    torch.testing.assert_close(out, ops.scatter_tokens(features, attended.flatten(1), index, add=True))
