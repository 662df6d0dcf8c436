# SPDX-License-Identifier: Apache-2.0
"""Selection with a preserved feature map: gathered = masked = loops, sampling, losses, edge cases."""

import pytest
import torch
from tokenprune_ext import reducers
from tokenprune_ext.nn import TokenState
from tokenprune_ext.reducers import MlpSelector
from torch import nn

from .common import DEPTH, WIDTH, dense, pack_ragged, split, tiny_blocks, tokens, walk

LAYERS = [1, 2, 3]


def make(**options):
    torch.manual_seed(5)
    reducer = reducers.create(
        "threshold", {"depth": DEPTH, "embed_dim": WIDTH, "num_prefix": 1}, layers=LAYERS, **options
    )
    return reducer.double().eval()


def reference(blocks, x, state):
    """The chosen tokens of each image alone through each block, by loops, from the recorded decisions."""
    for layer, block in enumerate(blocks):
        if layer not in LAYERS:
            x = block(x)
            continue
        chosen = state.carry[f"decisions.{layer}"] != 0
        rows = []
        for image, mask in zip(x, chosen):
            image = image.clone()
            if mask.any():
                image[mask] = block(image[mask][None])[0]
            rows.append(image)
        x = torch.stack(rows)
    return x


MODES = [
    {"mode": "sample"},
    {"mode": "threshold"},
    {"mode": "topk", "keep": 0.4},
    {"mode": "expected"},
    {"mode": "threshold", "selector": "norm"},
    {"mode": "topk", "selector": "cls", "keep": [0.7, 0.5, 0.3]},
    {"mode": "threshold", "capacity": 1.0},
    {"mode": "sample", "candidate_prefix": [3]},
]


@pytest.mark.parametrize("options", MODES)
def test_gathered_equals_masked_equals_loops(options):
    blocks, x = tiny_blocks(), tokens()
    with torch.no_grad():
        state = TokenState(num_prefix=1)
        _, drawn = make(**options).begin(x, state)
        y, after = walk(blocks, x, make(**options), drawn)
        z, masked = walk(blocks, x, make(**options, dense=True), drawn)
    torch.testing.assert_close(y, z, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(y, reference(blocks, x, after), atol=1e-10, rtol=1e-10)
    for layer in LAYERS:
        assert torch.equal(after.carry[f"decisions.{layer}"], masked.carry[f"decisions.{layer}"])
        if layer not in options.get("candidate_prefix", ()):
            assert bool((after.carry[f"decisions.{layer}"][:, 0] == 1).all())


@pytest.mark.parametrize("options", MODES)
def test_ragged_batch_equals_single_images(options):
    blocks = tiny_blocks()
    images = [tokens(1, count, seed=count) for count in (17, 6, 12)]
    x, state = pack_ragged(images)
    reducer = make(**options)
    with torch.no_grad():
        x, state = reducer.begin(x, state)
        results = [walk(blocks, x, make(**options, dense=masked), state) for masked in (False, True)]
        for y, after in results:
            for row, (image, part) in enumerate(zip(images, split(y, after))):
                noise = {
                    name: value[
                        row : row + 1, : image.shape[1] - int("3" not in name or not options.get("candidate_prefix"))
                    ]
                    for name, value in state.carry.items()
                }
                alone, _ = walk(blocks, image, make(**options), TokenState(num_prefix=1, carry=noise))
                torch.testing.assert_close(part, alone[0], atol=1e-10, rtol=1e-10)


def test_training_gives_the_selector_a_gradient():
    blocks, x = tiny_blocks(), tokens()
    reducer = make(mode="sample").train()
    y, state = walk(blocks, x, reducer)
    loss = y.square().mean() + sum(reducer.losses(state).values())
    loss.backward()
    for name, parameter in reducer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    shares = [state.carry[f"decisions.{layer}"][:, 1:].mean() for layer in LAYERS]
    expected = sum((share - target) ** 2 for share, target in zip(shares, (0.7, 0.49, 0.343))) / 3
    torch.testing.assert_close(reducer.losses(state)["ratio"], expected)
    packed = state.as_packed(y)[1]
    flat = {f"decisions.{layer}": state.carry[f"decisions.{layer}"].flatten() for layer in LAYERS}
    torch.testing.assert_close(reducer.losses(packed.with_carry(**flat))["ratio"], expected)
    reducer.ratio_per_sample = True
    assert reducer.losses(state)["ratio"] >= expected
    torch.testing.assert_close(*(reducer.losses(s)["ratio"] for s in (state, packed.with_carry(**flat))))


def test_decision_gradient_is_block_minus_input():
    block, x = tiny_blocks(1)[0], tokens()
    scores = torch.rand(2, 17, dtype=x.dtype).requires_grad_()
    reducer = reducers.create(
        "threshold", depth=1, layers=[0], selector=lambda _: scores, mode="threshold", candidate_prefix=[0], keep=0.5
    )
    y, _ = walk([block], x, reducer)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    chosen = scores.detach() > 0.5
    with torch.no_grad():
        bias = torch.where(chosen, 0.0, -float("inf"))
        full = block.feed(x + block.attend(x, bias)[0])
    torch.testing.assert_close(scores.grad, (weight * (full - x)).sum(-1), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("training", [False, True])
def test_nothing_chosen_is_the_identity(training):
    blocks, x = tiny_blocks(1), tokens().requires_grad_()
    scores = torch.zeros(2, 17, dtype=x.dtype)
    scores[1, 3:6] = 1
    scores.requires_grad_()
    reducer = reducers.create(
        "threshold",
        depth=1,
        layers=[0],
        selector=lambda _: scores,
        mode="threshold",
        candidate_prefix=[0],
        keep=0.5,
        dense=training,
    )
    y, _ = walk(blocks, x, reducer)
    torch.testing.assert_close(y[0], x[0])
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    torch.testing.assert_close(x.grad[0], torch.ones_like(x[0]))
    if training:
        assert bool((scores.grad[0] == 0).all())


def test_ties():
    even = torch.full((1, 4, 2), -0.6931471805599453, dtype=torch.float64)
    for mode, expected in (("sample", True), ("threshold", False)):
        reducer = reducers.create(
            "threshold", depth=1, layers=[0], selector=lambda _: even, mode=mode, candidate_prefix=[0], keep=0.5
        )
        state = TokenState(carry={"noise.0": torch.zeros(1, 4, 2, dtype=torch.float64)})
        _, after = walk(tiny_blocks(1), tokens(1, 4), reducer, state)
        assert bool((after.carry["decisions.0"] != 0).all()) is expected


def test_noise_is_drawn_once_and_reproducible():
    blocks, x = tiny_blocks(), tokens()
    outputs = []
    for _ in range(2):
        reducer = make(mode="sample", generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            outputs.append(walk(blocks, x, reducer)[0])
    assert torch.equal(*outputs)


def test_counts():
    x = tokens(2, 17)
    reducer = make(mode="topk", keep=0.3)
    record = []
    with torch.no_grad():
        walk(tiny_blocks(), x, reducer, record=record)
    assert [step.mlp.tolist() for step in record] == [[17, 17], [6, 6], [6, 6], [6, 6]]
    assert reducer.plan(DEPTH, 17) == [(17, 17), (6, 6), (6, 6), (6, 6)]
    assert make(mode="sample").plan(DEPTH, 17) is None
    probability = torch.tensor([[0.9, 0.8, 0.2, 0.3]], dtype=torch.float64)
    reducer = reducers.create(
        "threshold", depth=1, layers=[0], selector=lambda _: probability, mode="expected", candidate_prefix=[0]
    )
    _, after = walk(tiny_blocks(1), tokens(1, 4), reducer)
    assert after.carry["decisions.0"].tolist() == [[1, 1, 0, 0]]


def test_trace_names_the_processed_patches():
    x, record = tokens(2, 17), []
    with torch.no_grad():
        _, state = walk(tiny_blocks(), x, make(), TokenState(num_prefix=1).with_trace(x), record)
    for step in record[1:]:
        chosen = state.carry[f"decisions.{step.layer}"] != 0
        expected = torch.cat([torch.arange(-1, 16)[mask] for mask in chosen])
        assert torch.equal(step.state.index, expected.to(torch.int32))
    assert torch.equal(state.carry["parent"], torch.arange(17, dtype=torch.int32).expand(2, -1))


def test_selectors():
    own = [nn.Linear(WIDTH, 2).double() for _ in LAYERS]
    reducer = make(selector=own, mode="threshold")
    assert len(list(reducer.parameters())) == 6
    assert sorted(make().state_dict())[0] == "selectors.0.mlp.fc1.bias"
    assert MlpSelector(WIDTH)(tokens(dtype=torch.float32)).exp().sum(-1).allclose(torch.ones(2, 17))
    blocks, x = tiny_blocks(), tokens()
    everything = make(selector=lambda t: t.new_ones(t.shape[:-1]), mode="threshold")
    torch.testing.assert_close(walk(blocks, x, everything)[0], dense(blocks, x))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "best"}, "mode must be"),
        ({"layers": [9]}, "layers must lie in"),
        ({"layers": [1, 1]}, "each once"),
        ({"keep": [0.5]}, "3 shares"),
        ({"selector": "row"}, "selector must be"),
        ({"selector": "cls", "class_token": False}, "needs a class token"),
        ({"selector": [abs]}, "3, got 1"),
        ({"embed_dim": None}, "embed_dim"),
        ({"capacity": 0.0}, "capacity must be a share"),
        ({"capacity": 1.5}, "capacity must be a share"),
        ({"tau": float("nan")}, "tau must be positive"),
        ({"threshold": float("nan")}, "threshold must be a number"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        reducers.create("threshold", **{"depth": DEPTH, "embed_dim": WIDTH, **options})
