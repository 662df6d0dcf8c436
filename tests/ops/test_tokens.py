# SPDX-License-Identifier: Apache-2.0
"""select, gather, gather + LayerNorm and scatter-back of tokens."""

import torch
from tokenprune_ext import ops

from tests.conformance import Conformance, OpSpec, Sample

raw = torch.ops.tokenprune

SCHEMAS = [
    "select_tokens(Tensor mask) -> (Tensor indices, Tensor cu_seqlens)",
    "select_tokens_capacity(Tensor mask, SymInt capacity) -> (Tensor indices, Tensor cu_seqlens)",
    "gather_tokens(Tensor x, Tensor indices) -> Tensor",
    "gather_tokens_backward(Tensor grad, Tensor indices, SymInt rows) -> Tensor",
    "gather_layer_norm(Tensor x, Tensor indices, Tensor? weight, Tensor? bias, float eps) -> "
    "(Tensor out, Tensor mean, Tensor rstd)",
    "gather_layer_norm_backward(Tensor grad, Tensor x, Tensor indices, Tensor? weight, Tensor mean, Tensor rstd) -> "
    "(Tensor grad_rows, Tensor grad_weight, Tensor grad_bias)",
    "scatter_tokens(Tensor features, Tensor tokens, Tensor indices, Tensor? scale, bool add) -> Tensor",
    "scatter_tokens_(Tensor(a!) features, Tensor tokens, Tensor indices, Tensor? scale, bool add) -> ()",
    "scatter_tokens_backward(Tensor grad, Tensor? tokens, Tensor indices, Tensor? scale, bool add) -> "
    "(Tensor grad_features, Tensor grad_tokens, Tensor grad_scale)",
]


# ---------------------------------------------------------------- samples and oracles


def make_mask(rng, batch, tokens, keep=50, capacity=None):
    mask = torch.rand(batch, tokens, generator=rng) * 100 < keep
    return Sample({"mask": mask}, {} if capacity is None else {"capacity": capacity})


def select(mask, capacity=None):
    index = ops.select_tokens(mask, capacity=capacity)
    return index.indices, index.cu_seqlens


def oracle_select(mask, capacity=None):
    kept = [b * mask.shape[1] + i for b, row in enumerate(mask.tolist()) for i, keep in enumerate(row) if keep]
    starts = [0]
    for row in mask.tolist():
        starts.append(starts[-1] + sum(row))
    kept += [-1] * (0 if capacity is None else capacity - len(kept))
    return torch.tensor(kept, dtype=torch.int32), torch.tensor(starts, dtype=torch.int32)


def some_rows(rng, rows, count, unique):
    """Row numbers with some -1 among them; ``unique`` forbids taking a row twice."""
    if unique:
        taken = torch.randperm(rows + count, generator=rng)[:count]
    else:
        taken = torch.randint(0, rows + max(1, rows // 8), (count,), generator=rng)
    return torch.where(taken < rows, taken, -1).to(torch.int32)


def make_gather(rng, batch, tokens, channels, count, flat=False, affine=None):
    shape = (batch * tokens, channels) if flat else (batch, tokens, channels)
    inputs = {
        "x": torch.randn(shape, generator=rng, dtype=torch.float64),
        "index": some_rows(rng, batch * tokens, count, unique=False),
    }
    if affine in ("weight", "both"):
        inputs["weight"] = torch.rand(channels, generator=rng, dtype=torch.float64) + 0.5
    if affine == "both":
        inputs["bias"] = torch.randn(channels, generator=rng, dtype=torch.float64)
    return Sample(inputs)


def oracle_gather(x, index):
    rows = x if x.dim() == 2 else x.flatten(0, 1)
    one_hot = index.long()[:, None] == torch.arange(rows.shape[0], device=x.device)
    return one_hot.to(x.dtype) @ rows


def oracle_layer_norm(x, index, weight=None, bias=None):
    normed = torch.nn.functional.layer_norm(oracle_gather(x, index), x.shape[-1:], weight, bias, 1e-5)
    return torch.where(index[:, None] >= 0, normed, 0)


def make_scatter(rng, batch, tokens, channels, count, add=False, scale=False, flat=False):
    shape = (batch * tokens, channels) if flat else (batch, tokens, channels)
    inputs = {
        "features": torch.randn(shape, generator=rng, dtype=torch.float64),
        "tokens": torch.randn(count, channels, generator=rng, dtype=torch.float64),
        "index": some_rows(rng, batch * tokens, count, unique=True),
    }
    if scale:
        inputs["scale"] = torch.randn(count, generator=rng, dtype=torch.float64)
    return Sample(inputs, {"add": bool(add)})


def scatter(features, tokens, index, scale=None, add=False):
    return ops.scatter_tokens(features, tokens, index, add=add, scale=scale)


def scatter_in_place(features, tokens, index, scale=None, add=False):
    with torch.no_grad():
        return ops.scatter_tokens_(features.contiguous().clone(), tokens, index, add=add, scale=scale)


def oracle_scatter(features, tokens, index, scale=None, add=False):
    rows = features if features.dim() == 2 else features.flatten(0, 1)
    one_hot = (index.long()[None] == torch.arange(rows.shape[0], device=index.device)[:, None]).to(rows.dtype)
    update = one_hot @ (tokens if scale is None else tokens * scale[:, None])
    kept = 1.0 if add else 1.0 - one_hot.sum(1, keepdim=True)
    return (rows * kept + update).view(features.shape)


def sized(channels=16, **extra):
    return lambda n: {"batch": 2, "tokens": n, "channels": channels, "count": 2 * n - 5, **extra}


CASES = {
    "ragged": {"batch": 3, "tokens": 11, "channels": 20, "count": 17},
    "rows": {"batch": 2, "tokens": 9, "channels": 7, "count": 30, "flat": True},
    "wide": {"batch": 2, "tokens": 40, "channels": 197, "count": 50},
    "many": {"batch": 4, "tokens": 300, "channels": 64, "count": 700},
    "one": {"batch": 1, "tokens": 1, "channels": 1, "count": 1},
    "no_index": {"batch": 2, "tokens": 5, "channels": 4, "count": 0},
    "no_tokens": {"batch": 0, "tokens": 5, "channels": 4, "count": 3},
    "no_channels": {"batch": 2, "tokens": 5, "channels": 0, "count": 3},
}
SELECT_CASES = {
    "half": {"batch": 3, "tokens": 37},
    "none": {"batch": 2, "tokens": 9, "keep": 0},
    "all": {"batch": 2, "tokens": 9, "keep": 101},
    "large": {"batch": 9, "tokens": 3000, "keep": 30},
    "one": {"batch": 1, "tokens": 1, "keep": 101},
    "no_tokens": {"batch": 3, "tokens": 0},
    "no_images": {"batch": 0, "tokens": 7},
}
NORM_CASES = {
    **{n: c for n, c in CASES.items() if n != "no_channels"},
    "one": {**CASES["one"], "channels": 5},
}
FUZZ = {"batch": (0, 3), "tokens": (0, 9), "channels": (1, 40), "count": (0, 20)}
SMALL = {"batch": 2, "tokens": 3, "channels": 4, "count": 5}


def layer_norm(x, index, weight=None, bias=None):
    return ops.gather_layer_norm(x, index, weight, bias, 1e-5)


def norm_spec(name, affine, grads):
    return OpSpec(
        name,
        layer_norm,
        oracle_layer_norm,
        make_gather,
        {n: {**c, "affine": affine} for n, c in NORM_CASES.items()},
        sized(affine=affine),
        {**FUZZ, "channels": (5, 40), "affine": [affine]},
        {**SMALL, "affine": affine},
        grads,
    )


def scatter_spec(name, grads, call=scatter, **extra):
    return OpSpec(
        name,
        call,
        oracle_scatter,
        make_scatter,
        {n: {**c, **extra} for n, c in CASES.items()},
        sized(**extra),
        {**FUZZ, **{n: [v] for n, v in extra.items()}},
        {**SMALL, **extra} if grads else None,
        grads,
        frozenset({"scale"}),
    )


SPECS = [
    OpSpec(
        "select_tokens",
        select,
        oracle_select,
        make_mask,
        SELECT_CASES,
        lambda n: {"batch": 2, "tokens": n},
        {"batch": (0, 4), "tokens": (0, 40), "keep": (0, 101)},
        dtypes=(torch.float32,),
    ),
    OpSpec(
        "select_tokens_capacity",
        select,
        oracle_select,
        make_mask,
        {n: {**c, "capacity": c["batch"] * c["tokens"] + 3} for n, c in SELECT_CASES.items()},
        lambda n: {"batch": 2, "tokens": n, "capacity": 131},
        {"batch": (0, 4), "tokens": (0, 40), "keep": (0, 101), "capacity": (160, 200)},
        dtypes=(torch.float32,),
    ),
    OpSpec(
        "gather_tokens",
        ops.gather_tokens,
        oracle_gather,
        make_gather,
        CASES,
        sized(),
        FUZZ,
        SMALL,
        ("x",),
        inductor=True,
    ),
    norm_spec("gather_layer_norm", "both", ("x", "weight", "bias")),
    norm_spec("gather_layer_norm_weight", "weight", ("x", "weight")),
    norm_spec("gather_layer_norm_plain", None, ("x",)),
    scatter_spec("scatter_tokens", ("features", "tokens")),
    scatter_spec("scatter_tokens_add", ("features", "tokens"), add=True),
    scatter_spec("scatter_tokens_scale", ("features", "tokens", "scale"), scale=True),
    scatter_spec("scatter_tokens_add_scale", ("features", "tokens", "scale"), add=True, scale=True),
    scatter_spec("scatter_tokens_", (), scatter_in_place, add=True, scale=True),
]


class TestBattery(Conformance):
    specs = SPECS
