# SPDX-License-Identifier: Apache-2.0
"""Linear layers on gathered rows, with and without scatter-back."""

import pytest
import torch
from tokenprune_ext import ops

from tests.conformance import Conformance, OpSpec, Sample, needs_library
from tests.ops.test_tokens import oracle_gather, oracle_scatter, some_rows

SCHEMAS = [
    "gather_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? index, Tensor? features, Tensor? scatter, bool add, "
    "int activation) -> Tensor",
    "gather_linear_backward(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor? index, Tensor? scatter, "
    "bool add, int activation) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias, Tensor grad_features)",
]


# ---------------------------------------------------------------- samples and oracles


def make(rng, batch, tokens, channels, width, count, index=True, bias=True, scatter=False, rows=0, **options):
    def normal(*shape):
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    inputs = {"x": normal(batch, tokens, channels), "weight": normal(width, channels) / max(channels, 1) ** 0.5}
    if bias:
        inputs["bias"] = normal(width)
    taken = count if index else batch * tokens
    if index:
        inputs["index"] = some_rows(rng, batch * tokens, count, unique=False)
    if scatter:
        inputs["features"] = normal(rows, width)
        inputs["scatter"] = some_rows(rng, rows, taken, unique=True)
    return Sample(inputs, options)


def oracle(x, weight, bias=None, index=None, features=None, scatter=None, add=False, activation=None):
    rows = x.flatten(0, 1) if index is None else oracle_gather(x, index)
    y = rows @ weight.T if bias is None else rows @ weight.T + bias
    if activation == "gelu":
        y = torch.nn.functional.gelu(y)
    return y if features is None else oracle_scatter(features, y, scatter, add=add)


CASES = {
    "ragged": {"batch": 3, "tokens": 11, "channels": 20, "width": 17, "count": 19},
    "many": {"batch": 2, "tokens": 200, "channels": 64, "width": 96, "count": 300},
    "one": {"batch": 1, "tokens": 1, "channels": 1, "width": 1, "count": 1},
    "no_index": {"batch": 2, "tokens": 5, "channels": 4, "width": 3, "count": 0},
    "no_tokens": {"batch": 0, "tokens": 5, "channels": 4, "width": 3, "count": 3},
}
FUZZ = {"batch": (0, 3), "tokens": (0, 9), "channels": (1, 20), "width": (1, 20), "count": (0, 20)}
SMALL = {"batch": 2, "tokens": 3, "channels": 4, "width": 3, "count": 5}


def spec(name, grads, **extra):
    return OpSpec(
        name,
        ops.gather_linear,
        oracle,
        make,
        {n: {**c, **extra} for n, c in CASES.items()},
        lambda n: {"batch": 2, "tokens": n, "channels": 16, "width": 12, "count": 2 * n - 5, **extra},
        {**FUZZ, **{n: [v] for n, v in extra.items()}},
        {**SMALL, **extra},
        grads,
        autocast=frozenset({"x", "weight", "bias"}),
        inductor=name == "gather_linear_residual",
    )


SPECS = [
    spec("gather_linear", ("x", "weight", "bias")),
    spec("gather_linear_plain", ("x", "weight"), index=False, bias=False),
    spec("gather_linear_gelu", ("x", "weight", "bias"), activation="gelu"),
    spec("gather_linear_residual", ("x", "weight", "bias", "features"), scatter=True, rows=131, add=True),
    spec("gather_linear_replace", ("x", "weight", "features"), bias=False, scatter=True, rows=131, activation="gelu"),
]


class TestBattery(Conformance):
    specs = SPECS


@needs_library
def test_a_direct_call_with_one_number_as_index_is_refused():
    index = torch.tensor(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="gather_linear: index must have 1 dimension"):
        torch.ops.tokenprune.gather_linear(torch.randn(4, 8), torch.randn(3, 8), None, index, None, None, False, 0)
