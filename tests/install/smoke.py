# SPDX-License-Identifier: Apache-2.0
"""Run by test_wheel.py inside a clean environment: import, op values, gradients. Prints one JSON object."""

import json
import sys

import tokenprune_ext
import torch
from tokenprune_ext import _library, ops

x = torch.arange(12.0).view(2, 3, 2)
index = ops.select_tokens(torch.tensor([[True, False, True], [False, True, False]]))
tokens = ops.gather_tokens(x, index)
assert tokens.tolist() == [[0, 1], [4, 5], [8, 9]], tokens
assert ops.scatter_tokens(torch.zeros_like(x), tokens, index).sum() == tokens.sum()
normed = ops.gather_layer_norm(x, index)
assert torch.allclose(normed, torch.nn.functional.layer_norm(tokens, (2,))), normed

generator = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(2, 7, 3, 8, generator=generator).requires_grad_() for _ in range(3))
cu = torch.tensor([0, 7, 14], dtype=torch.int32)
out, lse = ops.sparse_attention(*(t.flatten(0, 1) for t in (q, k, v)), cu_seqlens_q=cu, max_seqlen_q=7)
expected = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
assert torch.allclose(out.view(2, 7, 3, 8), expected.transpose(1, 2), atol=1e-5)
ours, theirs = (torch.autograd.grad(o.square().sum(), (q, k, v)) for o in (out, expected))
assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, theirs, strict=True))

metric = torch.eye(4)[[0, 1, 2, 0, 3, 2]][None]
matching = ops.bipartite_soft_matching(metric, 2)
assert matching.src.tolist() == [[0, 1]] and matching.dst.tolist() == [[1, 2]], matching
merged, size = ops.merge_tokens(metric, matching, mode="weighted")
assert sorted(size[0].tolist()) == [1, 1, 2, 2] and torch.equal(ops.unmerge_tokens(merged, matching), metric)

compiled = torch.compile(ops.gather_tokens, backend="aot_eager", fullgraph=True)
assert torch.equal(compiled(x, index), tokens)

json.dump(
    {
        "file": tokenprune_ext.__file__,
        "version": tokenprune_ext.__version__,
        "torch": torch.__version__,
        "loaded": _library.cpu_loaded(),
        "reason": _library.cpu_error,
        "imported": sorted(m for m in ("timm", "torchvision", "matplotlib", "numpy") if m in sys.modules),
    },
    sys.stdout,
)
