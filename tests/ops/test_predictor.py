# SPDX-License-Identifier: Apache-2.0
"""Token predictors in one call: against plain PyTorch, and the rules."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from tokenprune_ext import ops

from tests.conformance import Conformance, OpSpec, Sample, needs_library
from tests.ops.common import expect, ints

SCHEMAS = [
    "packed_predictor(Tensor x, Tensor? counted, Tensor? cu_seqlens, SymInt num_heads, Tensor? norm_weight, "
    "Tensor? norm_bias, float norm_eps, Tensor packed_0, Tensor? bias_0, Tensor packed_1, Tensor? bias_1, "
    "Tensor packed_2, Tensor? bias_2, Tensor packed_3, Tensor? bias_3, Tensor? packed_s0, Tensor? bias_s0, "
    "Tensor? packed_s1, Tensor? bias_s1) -> (Tensor scores, Tensor probabilities)",
]

CPU_ONLY = True  # elsewhere the vendor's library packs weights by itself


def shapes(width, heads):
    half, quarter, squeezed = width // 2, width // 4, heads // 2
    return [(width, width), (half, width), (quarter, half), (2, quarter), (squeezed, heads), (heads, squeezed)]


def make(rng, lengths, width, heads=1, *, padded=False, counted=False, weighted=False, full=False, behind=0):
    """``behind``: rows of no sequence."""

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    total, channels = sum(lengths) + behind, width * heads
    inputs = {"x": normal(len(lengths), lengths[0], channels) if padded else normal(total, channels)}
    for i, shape in enumerate(shapes(width, heads)[: 6 if weighted else 4]):
        inputs[f"weight_{i}"] = normal(*shape) / max(shape[1], 1) ** 0.5
        if full:
            inputs[f"bias_{i}"] = normal(shape[0])
    if full:
        inputs |= {"norm_weight": normal(width), "norm_bias": normal(width)}
    if counted:
        inputs["counted"] = torch.rand(inputs["x"].shape[:-1], generator=rng) < 0.6
    if not padded:
        inputs["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Sample(inputs, {"heads": heads})


def run(x, *, heads, norm_weight=None, norm_bias=None, counted=None, cu_seqlens=None, **parts):
    layers = [
        (ops.pack_linear(parts[f"weight_{i}"]), parts.get(f"bias_{i}")) for i in range(6) if f"weight_{i}" in parts
    ]
    got = ops.packed_predictor(
        x,
        layers[:4],
        norm=(norm_weight, norm_bias, 1e-5),
        num_heads=heads,
        weigher=layers[4:] or None,
        counted=counted,
        cu_seqlens=cu_seqlens,
    )
    return tuple(t.to(x.dtype) for t in got)  # scores of rounded features are not better than those


def oracle(x, *, heads, norm_weight=None, norm_bias=None, counted=None, cu_seqlens=None, **parts):
    """Image by image, head by head."""

    def layer(z, i):
        return F.linear(z, parts[f"weight_{i}"], parts.get(f"bias_{i}"))

    rows = x.flatten(0, -2)
    starts = [b * x.shape[1] for b in range(len(x) + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    starts = starts if len(starts) == 1 else [*starts[:-1], rows.shape[0]]
    counted = torch.ones(rows.shape[0], dtype=torch.bool) if counted is None else counted.flatten()
    width = x.shape[-1] // heads
    logs = x.new_zeros(rows.shape[0], heads, 2)
    for h in range(heads):
        part = rows[:, h * width : (h + 1) * width]
        features = F.gelu(layer(F.layer_norm(part, (width,), norm_weight, norm_bias, 1e-5), 0))
        for begin, end in pairwise(starts):
            kept = features[begin:end, width // 2 :][counted[begin:end]]
            mean = kept.mean(0) if len(kept) else kept.new_zeros(kept.shape[1])
            features[begin:end, width // 2 :] = mean
        logs[:, h] = layer(F.gelu(layer(F.gelu(layer(features, 1)), 2)), 3).log_softmax(-1)
    weight = torch.ones(rows.shape[0], heads, 1, dtype=x.dtype)
    if "weight_4" in parts:
        means = rows.view(-1, heads, width).mean(-1)
        weight = layer(F.gelu(layer(means, 4)), 5).sigmoid()[..., None]
    lead = (*x.shape[:-1], 2)
    return tuple(((weight * t).sum(1) / weight.sum(1)).view(lead) for t in (logs, logs.exp()))


SPECS = [
    OpSpec(
        "packed_predictor",
        run,
        oracle,
        make,
        cases={
            "dynamicvit": {"lengths": [40, 40], "width": 48, "padded": True, "full": True},
            "spvit": {"lengths": [50], "width": 64, "heads": 6, "weighted": True, "counted": True, "full": True},
            "multihead": {"lengths": [33] * 2, "width": 16, "heads": 3, "padded": True, "counted": True, "full": True},
            "ragged": {"lengths": [5, 0, 40, 1], "width": 20, "counted": True, "full": True, "behind": 3},
            "odd": {"lengths": [9, 4], "width": 13, "heads": 2, "weighted": True},
            "narrow": {"lengths": [6], "width": 4},
            "no_tokens": {"lengths": [0, 0], "width": 8, "padded": True},
            "no_images": {"lengths": [], "width": 8, "heads": 2, "weighted": True},
        },
        sized=lambda tokens: {"lengths": [tokens] * 2, "width": 16, "heads": 2, "weighted": True, "padded": True},
        fuzz={
            "lengths": [[3], [20, 1], [0, 9, 4], [7] * 5],
            "width": (4, 40),
            "heads": (2, 5),
            "weighted": [False, True],
            "counted": [False, True],
            "full": [False, True],
        },
    ),
]


class TestBattery(Conformance):
    specs = SPECS

    @pytest.fixture
    def device(self):
        return torch.device("cpu")


# ---------------------------------------------------------------- rules


def _arguments(**change):
    x, layers = torch.randn(2, 5, 8), [(ops.pack_linear(torch.randn(s)), None) for s in shapes(8, 1)[:4]]
    return {"x": x, "layers": layers, "norm": (None, None, 1e-5), **change}


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "x must be a float32", {"x": torch.ones(2, 5, 8).int()}),
        (ValueError, r"x must have shape \[B, N, C\] without cu_seqlens", {"x": torch.randn(5, 8)}),
        (ValueError, r"x must have shape \[T, C\] with cu_seqlens", {"cu_seqlens": ints([0, 5])}),
        (ValueError, r"num_heads must divide the channels \(8\), got 3", {"num_heads": 3}),
        (ValueError, "num_heads must divide the channels", {"num_heads": 0}),
        (TypeError, "counted must be bool", {"counted": torch.ones(2, 5)}),
        (ValueError, r"counted must have shape \[2, 5\]", {"counted": torch.ones(2, 4) > 0}),
    ],
)
def test_wrong_arguments(error, message, change):
    expect(error, "packed_predictor", message, ops.packed_predictor, **_arguments(**change))


@needs_library
def test_direct_calls_are_checked():
    x, starts = torch.randn(5, 8), ints([0, 2, 5])
    layers = [part for shape in shapes(8, 1)[:4] for part in (ops.pack_linear(torch.randn(shape)), None)]

    def call(x=x, counted=None, cu=starts, heads=1, layers=layers, weigher=(None,) * 4):
        norm = None, None, 1e-5
        return torch.ops.tokenprune.packed_predictor(x, counted, cu, heads, *norm, *layers, *weigher)

    assert call()[0].shape == (5, 2)
    for wrong, message in [
        ({"x": x[None]}, r"x must have shape \[T, C\] with cu_seqlens"),
        ({"cu": None}, r"x must have shape \[B, N, C\] without cu_seqlens"),
        ({"x": x.int()}, "x must be float32"),
        ({"heads": 3}, r"num_heads must divide the channels \(8\), got 3"),
        ({"heads": 0}, "num_heads must divide the channels"),
        ({"x": torch.empty(1 << 24, 0), "cu": starts[:1], "heads": 1 << 40}, "num_heads must divide the channels"),
        ({"heads": 2}, "packed must hold a float32 weight"),
        ({"counted": torch.ones(5)}, "counted must be bool"),
        ({"counted": torch.ones(4) > 0}, r"counted must have one entry per token \(5\)"),
        ({"cu": starts.long()}, "cu_seqlens must be int32"),
        ({"cu": starts[:0]}, "cu_seqlens must have at least one entry"),
        ({"cu": starts + 1}, "cu_seqlens must start at 0"),
        ({"cu": starts * 2}, "cu_seqlens must end within the 5 rows"),
        ({"weigher": (layers[0], None, None, None)}, "packed_s1 must be given with packed_s0"),
        ({"layers": [layers[6], *layers[1:]]}, "packed must hold a float32 weight"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**wrong)


@needs_library
def test_infinite_logits_stay_in_their_row():
    made = make(torch.Generator().manual_seed(0), [6], 8, full=True)
    made.inputs["x"][2] = float("nan")
    made.inputs["counted"] = torch.arange(6) != 2
    scores, _ = run(**made.inputs, **made.options)
    assert scores[2].isnan().all() and scores[torch.arange(6) != 2].isfinite().all()


@needs_library
@pytest.mark.parametrize(("heads", "weighted"), [(1, False), (4, True)])
def test_flops_are_those_of_the_layers(heads, weighted):
    from torch.utils.flop_counter import FlopCounterMode

    made = make(torch.Generator().manual_seed(0), [30], 16, heads, weighted=weighted)
    with FlopCounterMode(display=False) as counter:
        run(**made.inputs, **made.options)
    weights = sum(a * b for a, b in shapes(16, heads)[:4]) * heads
    weights += sum(a * b for a, b in shapes(16, heads)[4:]) if weighted else 0
    assert counter.get_total_flops() == 2 * 30 * weights


@needs_library
def test_differentiating_says_that_it_cannot():
    arguments = _arguments()
    scores, _ = ops.packed_predictor(**{**arguments, "x": arguments["x"].requires_grad_()})
    with pytest.raises(NotImplementedError, match="packed_predictor has no derivative"):
        scores.sum().backward()
