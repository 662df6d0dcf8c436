# SPDX-License-Identifier: Apache-2.0
"""SViT for classification: shared and inherited decisions, versions of the gate, gathered = masked = loops."""

import pytest
import torch
from tokenprune_ext import reducers
from tokenprune_ext.nn import TokenState
from torch import nn

from .common import DEPTH, WIDTH, dense, tiny_blocks, tokens, walk

FACTS = {"depth": DEPTH, "embed_dim": WIDTH, "num_prefix": 1}
LAYERS = [1, 2, 3]


def make(**options):
    torch.manual_seed(5)
    reducer = reducers.create("svit", FACTS, **{"layers": LAYERS, **options}).double().eval()
    for linear in (module for module in reducer.modules() if isinstance(module, nn.Linear)):
        nn.init.normal_(linear.weight, std=0.5)
    return reducer


def loops(blocks, image, reducer, noise):
    """One image [N, C], everything written out; also the decisions."""
    share, inherit = list(reducer.gate_of.values()), reducer.inherit
    decision, found, numbers = torch.ones(len(image), dtype=torch.bool), {}, dict(zip(LAYERS, share))
    for layer, block in enumerate(blocks):
        if layer not in numbers:
            image = block(image[None])[0]
            continue
        if numbers[layer] == layer:
            front = 0 if layer in reducer.candidate_prefix else 1
            logs = reducer.selectors[reducer.layers.index(layer)](image)
            if noise is None:
                choice = logs[:, 0] > logs[:, 1]
            else:
                logs = logs[front:] + noise[layer]
                choice = torch.cat([torch.ones(front, dtype=torch.bool), logs[:, 0] >= logs[:, 1]])
            choice[:front] = True
            decision = choice & decision if inherit else choice
        found[layer] = decision
        if bool(decision.any()):
            image = image.clone()
            image[decision] = block(image[decision][None])[0]
    return image, found


OPTIONS = [
    {"mode": "threshold"},
    {"mode": "sample"},
    {"mode": "threshold", "share": [0, 0, 1]},
    {"mode": "sample", "share": [0, 1, 1], "inherit": True},
    {"mode": "sample", "inherit": True, "candidate_prefix": [2, 3]},
    {"mode": "threshold", "inherit": True, "candidate_prefix": [], "capacity": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_gathered_equals_masked_equals_loops(options):
    blocks, x, reducer = tiny_blocks(), tokens(3), make(**options)
    with torch.no_grad():
        _, state = reducer.begin(x, TokenState(num_prefix=1))
        y, gathered = walk(blocks, x, reducer, state)
        z, masked = walk(blocks, x, make(**options, dense=True), state)
        rows, inner = state.as_packed(x)
        flat, packed = walk(blocks, rows, reducer, inner)
        torch.testing.assert_close(y, z, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(flat.view(y.shape), y, atol=1e-10, rtol=1e-10)
        for row in range(3):
            sampled = options["mode"] == "sample"
            noise = {n: state.carry[f"noise.{n}"][row] for n in reducer.layers} if sampled else None
            expected, found = loops(blocks, x[row], reducer, noise)
            torch.testing.assert_close(y[row], expected, atol=1e-10, rtol=1e-10)
            for layer in LAYERS:
                for after in (gathered, masked):
                    assert torch.equal(after.carry[f"decisions.{layer}"][row] != 0, found[layer])
                assert torch.equal(packed.carry[f"decisions.{layer}"].view(3, -1)[row] != 0, found[layer])


def test_published_gates():
    reducer = reducers.create("svit", depth=12, embed_dim=384)
    assert list(reducer.gate_of) == list(range(3, 12)) and reducer.candidate_prefix == (11,)
    assert list(reducer.keep.values()) == [0.7] * 3 + [0.49] * 3 + [0.343] * 3
    assert reducer.mode == "sample" and reducer.plan(12, 197) is None
    assert sum(p.numel() for p in reducer.parameters()) == 341298


def test_shared_gates_are_fewer():
    reducer = make(share=[0, 0, 1])
    assert reducer.layers == [1, 3] and len(reducer.selectors) == 2 and len(reducer.keep) == 2


def test_later_uses_of_a_shared_decision_carry_no_gradient():
    blocks, x = tiny_blocks(3), tokens()
    reducer = make(layers=[1, 2], share=[0, 0], candidate_prefix=[]).train()
    noise = torch.zeros(2, 16, 2, dtype=x.dtype)
    y, _ = walk(blocks, x, reducer, TokenState(num_prefix=1, carry={"noise.1": noise}))
    z = blocks[0](x)
    logs = reducer.selectors[0](z)[:, 1:]
    soft = logs.softmax(-1)[..., 0]
    decision = (logs[..., 0] >= logs[..., 1]).to(soft) - soft.detach() + soft
    decision = torch.cat([torch.ones_like(decision[:, :1]), decision], 1)[..., None]
    bias = torch.where(decision[..., 0] > 0.5, 0.0, -torch.inf)
    for block, mask in ((blocks[1], decision), (blocks[2], decision.detach())):
        z = mask * block.feed(z + block.attend(z, bias)[0]) + (1 - mask) * z
    torch.testing.assert_close(y, z, atol=1e-12, rtol=1e-12)
    weight, leaves = torch.randn_like(y), list(reducer.parameters())
    ours, theirs = (torch.autograd.grad((out * weight).sum(), leaves) for out in (y, z))
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("inherit", [False, True])
def test_training_step(inherit):
    blocks, x = tiny_blocks(), tokens()
    reducer = make(inherit=inherit).train()
    y, state = walk(blocks, x, reducer)
    shares = [
        state.carry[f"decisions.{layer}"][:, 0 if layer == 3 else 1 :].mean() for layer in LAYERS
    ]  # the class token is a candidate of the last gate
    expected = sum((share - target) ** 2 for share, target in zip(shares, (0.7, 0.49, 0.343))) / 3
    torch.testing.assert_close(reducer.losses(state)["ratio"], expected)
    (y.square().mean() + 4 * expected).backward()
    for name, parameter in reducer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_training_samples_whatever_the_mode():
    blocks, x = tiny_blocks(), tokens()
    reducer = make(mode="threshold").train()
    _, state = walk(blocks, x, reducer)
    assert "noise.1" in state.carry
    assert "noise.1" not in walk(blocks, x, reducer.eval())[1].carry


def test_all_selected_is_the_dense_model():
    blocks, x, reducer = tiny_blocks(), tokens(), make(mode="threshold")
    for selector in reducer.selectors:
        nn.init.zeros_(selector.mlp["fc2"].weight)
        selector.mlp["fc2"].bias.data = torch.tensor([1.0, 0.0], dtype=x.dtype)
    for masked in (False, True):
        reducer.dense = masked
        torch.testing.assert_close(walk(blocks, x, reducer)[0], dense(blocks, x), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_none_selected_in_the_last_block_is_the_identity(masked):
    blocks, x = tiny_blocks(), tokens()
    reducer = make(mode="threshold", dense=masked)
    for parameter in reducer.selectors[2].mlp["fc2"].parameters():
        nn.init.zeros_(parameter)  # a tie skips, the class token too
    y, state = walk(blocks, x, reducer)
    z, _ = walk(blocks[:3], x, reducer)
    assert torch.equal(y, z) and not state.carry["decisions.3"].any()
    y.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in blocks[:3].parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "topk"}, "mode must be"),
        ({"share": [1, 0, 2]}, "never falling"),
        ({"share": [0]}, "one number for each"),
        ({"layers": [2, 1, 3]}, "must rise"),
        ({"candidate_prefix": [0]}, "among the gates"),
        ({"tau": 0.0}, "tau must be positive"),
        ({"keep": [0.5]}, "3 shares"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
