# SPDX-License-Identifier: Apache-2.0
"""ACT against the formulas of its paper, written out plainly."""

import math
from functools import partial
from unittest import mock

import pytest
import tokenprune_ext
import torch
from tokenprune_ext import reducers
from tokenprune_ext.nn import TokenState
from tokenprune_ext.ops._register import call
from tokenprune_ext.reducers.act import (
    Groups,
    act_attention,
    act_broadcast,
    act_codes,
    act_groups,
    act_weighted_sum,
)

from tests.conformance import needs_library

from . import test_protocol as protocol
from .common import DEPTH, HEADS, WIDTH, compile_over_counts, dense, pack_ragged, split, tiny_blocks, tokens, walk

FACTS = {"depth": DEPTH, "embed_dim": WIDTH, "head_dim": WIDTH // HEADS}
OPTIONS = [
    {"q_hashes": 4, "width": 2.0},
    {"q_hashes": 6, "k_hashes": 3, "group_k": True},
    {"k_hashes": 5, "group_q": False, "group_k": True, "layers": [1, 3]},
]
make = partial(reducers.create, "act", FACTS)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def signed(code):
    code %= 2**64
    return code - 2**64 if code >= 2**63 else code


def plain_codes(x, projection, offset, width=8.0):
    """Unbounded integers of Python, wrapped at the end."""
    h = ((x @ projection + offset) / width).floor().to(torch.int64)
    h = h - h.amin(1, keepdim=True)
    return [[signed(sum(v << 2 * i for i, v in enumerate(token))) for token in row] for row in h.tolist()]


def plain_groups(codes):
    ranks = [{code: rank for rank, code in enumerate(sorted(set(row)))} for row in codes]
    return [[rank[code] for code in row] for rank, row in zip(ranks, codes)]


def plain_attention(q, k, v, q_ids=None, k_ids=None, bias=None):
    """Row by row, group by group."""
    out = torch.zeros_like(q)
    for r in range(q.shape[0]):
        keys, values = k[r], v[r]
        logits_bias = torch.zeros(k.shape[1], dtype=q.dtype) if bias is None else bias[r]
        if k_ids is not None:
            members = [[n for n, g in enumerate(k_ids[r]) if g == group] for group in range(max(k_ids[r]) + 1)]
            keys = torch.stack([k[r, m].mean(0) for m in members])
            values = torch.stack([v[r, m].mean(0) for m in members])
            logits_bias = torch.tensor([math.log(len(m)) for m in members], dtype=q.dtype)
        for n in range(q.shape[1]):
            alike = [n] if q_ids is None else [m for m, g in enumerate(q_ids[r]) if g == q_ids[r][n]]
            out[r, n] = (keys @ q[r, alike].mean(0) + logits_bias).softmax(0) @ values
    return out


@pytest.mark.parametrize(("hashes", "scale"), [(1, 1), (5, 9), (31, 4), (32, 9), (32, 400)])
def test_codes_are_sums_that_wrap_around(hashes, scale, device):
    x, projection, offset = draw(3, 17, 8) * scale, draw(1, 8, hashes, seed=1), draw(1, hashes, 1, seed=2).abs() % 1
    expected = plain_codes(x, projection[0], offset[0, :, 0])
    codes = act_codes(*(t.to(device) for t in (x, projection, offset)))
    assert codes.dtype == torch.int64 and codes.tolist() == expected
    assert hashes < 32 or scale < 9 or min(map(min, expected)) < 0  # the top field reaches the sign


def test_codes_of_valid_tokens_ignore_the_others(device):
    x, projection, offset = draw(2, 9, 8) * 9, draw(8, 6, seed=1), draw(6, seed=2).abs() % 1
    valid = torch.arange(9) < torch.tensor([[5], [9]])
    padded = torch.where(valid[..., None], x, -1e6)
    codes = act_codes(*(t.to(device) for t in (padded, projection, offset)), valid=valid.to(device)).cpu()
    assert codes[0, :5].tolist() == plain_codes(x[:1, :5], projection, offset)[0]
    assert codes[1].tolist() == plain_codes(x[1:], projection, offset)[0]


def test_half_precision_hashes_in_float32(device):
    x = draw(2, 9, 8, dtype=torch.bfloat16).to(device)
    arguments = [t.to(device) for t in (draw(8, 6, dtype=torch.float32), draw(6, dtype=torch.float32).abs() % 1)]
    with torch.autocast(device.type, torch.bfloat16):
        codes = act_codes(x, *arguments)
    assert torch.equal(codes, act_codes(x.float(), *arguments))


def test_groups_are_signed_ranks(device):
    extremes = [-(2**63), 2**63 - 1, -1, 0, 5, 5, -1, 2**63 - 1]
    codes = torch.tensor([extremes, [7] * 8, list(range(8, 0, -1))])
    groups = act_groups(codes.to(device))
    assert groups.ids.dtype == groups.counts.dtype == torch.int32
    assert groups.ids.tolist() == plain_groups(codes.tolist())
    assert groups.counts.tolist() == [[1, 2, 1, 2, 2, 0, 0, 0], [8] + [0] * 7, [1] * 8]


def test_slots_without_a_token_join_no_group(device):
    codes = torch.tensor([[4, 3, 4, 9, 1], [4, 3, 4, 9, 1], [4, 3, 4, 9, 1]])
    valid = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 1, 1]]) > 0
    groups = act_groups(codes.to(device), valid.to(device))
    assert groups.ids.tolist() == [[1, 0, 1, -1, -1], [-1] * 5, [-1, 1, -1, 2, 0]]
    assert groups.counts.tolist() == [[1, 2, 0, 0, 0], [0] * 5, [1, 1, 1, 0, 0]]


def test_nothing_to_group(device):
    codes = act_codes(*(t.to(device) for t in (draw(2, 0, 8), draw(8, 3), draw(3))))
    assert codes.shape == act_groups(codes).ids.shape == (2, 0)
    x = draw(2, 0, 8).to(device)
    assert act_attention(x, x, x, act_groups(codes)).shape == (2, 0, 8)


def test_weighted_sum_and_broadcast(device):
    ids = torch.tensor([[0, 2, -1, 2, 7, 1], [5, 0, 0, 3, 1, -9]], device=device)
    x, y = draw(2, 6, 3).to(device).requires_grad_(), draw(2, 4, 3, seed=1).to(device).requires_grad_()
    weights = draw(2, 4, seed=2).to(device).requires_grad_()
    expected, back = torch.zeros(2, 4, 3, dtype=x.dtype), torch.zeros(2, 6, 3, dtype=x.dtype)
    for r in range(2):
        for n, g in enumerate(ids[r].tolist()):
            if 0 <= g < 4:
                expected[r, g] += (weights[r, g] * x[r, n]).detach().cpu()
                back[r, n] = (weights[r, g] * y[r, g]).detach().cpu()
    torch.testing.assert_close(act_weighted_sum(x, ids, weights).cpu(), expected, check_device=False)
    torch.testing.assert_close(act_broadcast(y, ids.int(), weights).cpu(), back, check_device=False)
    assert torch.autograd.gradcheck(lambda x, w: act_weighted_sum(x, ids, w), (x, weights))
    assert torch.autograd.gradcheck(lambda y, w: act_broadcast(y, ids, w), (y, weights))


@pytest.mark.parametrize("cross", [11, 6])
@pytest.mark.parametrize(("group_q", "group_k"), [(True, False), (True, True), (False, True), (False, False)])
def test_attention_matches_the_formulas(group_q, group_k, cross, device):
    q, k, v = (draw(3, n, 8, seed=i).to(device).requires_grad_() for i, n in enumerate((11, cross, cross)))
    generator = torch.Generator().manual_seed(4)
    groups, plain = [], []
    for on, count in ((group_q, 11), (group_k, cross)):
        codes = torch.randint(0, 5, (3, count), generator=generator)
        groups.append(act_groups(codes.to(device)) if on else None)
        plain.append(plain_groups(codes.tolist()) if on else None)
    out = act_attention(q, k, v, *groups)
    expected = plain_attention(*(t.cpu() for t in (q, k, v)), *plain).to(device)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    weight = draw(*out.shape, seed=5).to(device)
    grads = [torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (out, expected)]
    torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-12)
    assert torch.equal(out, act_attention(q, k, v, *groups))  # bit for bit


@pytest.mark.parametrize(("group_q", "group_k"), [(True, False), (True, True), (False, True), (False, False)])
def test_rows_of_different_lengths(group_q, group_k, device):
    lengths = [7, 0, 11]
    q, k, v = (draw(3, 11, 8, seed=i).to(device) for i in range(3))
    valid = (torch.arange(11) < torch.tensor(lengths)[:, None]).to(device)
    codes = torch.randint(0, 4, (3, 11), generator=torch.Generator().manual_seed(4)).to(device)
    groups = [act_groups(codes, valid) if on else None for on in (group_q, group_k)]
    bias = None if group_k else draw(3, 11, seed=6).to(device)
    out = act_attention(q, k, v, *groups, q_valid=valid, k_valid=valid, key_bias=bias)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1), slice(0, length)
        alone = [act_groups(codes[one]) if on else None for on in (group_q, group_k)]
        single = act_attention(q[one], k[one], v[one], *alone, key_bias=None if bias is None else bias[one])
        torch.testing.assert_close(out[one], single, atol=1e-12, rtol=1e-12)
        assert bool((out[row, length:] == 0).all())


def test_key_bias_is_added_to_every_group(device):
    q, k, v = (draw(2, 7, 8, seed=i) for i in range(3))
    codes = torch.randint(0, 3, (2, 7), generator=torch.Generator().manual_seed(1))
    bias = draw(2, 7, seed=3)
    bias[:, 4] = -math.inf
    out = act_attention(*(t.to(device) for t in (q, k, v)), act_groups(codes.to(device)), key_bias=bias.to(device))
    torch.testing.assert_close(out.cpu(), plain_attention(q, k, v, plain_groups(codes.tolist()), bias=bias))


@pytest.mark.parametrize("options", OPTIONS)
def test_reducer_matches_the_formulas(options):
    blocks, x, reducer = tiny_blocks(), tokens(), make(**options)
    y, state = walk(blocks, x, reducer)
    z = x
    for layer, block in enumerate(blocks):
        if layer not in reducer.layers:
            z = block(z)
            continue
        heads = block.qkv(block.norm1(z)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)
        q, k, v = heads[0] * (WIDTH // HEADS) ** -0.5, heads[1], heads[2]
        ids = {}
        for name, rows in (("q", q), ("k", k)):
            if name in reducer.hashes:
                projection = state.carry[f"act.{name}_projection.{layer}"][0]
                offset = state.carry[f"act.{name}_offset.{layer}"][0, :, 0]
                ids[name] = plain_groups(plain_codes(rows, projection, offset, reducer.width))
                assert state.carry[f"act.{name}_groups.{layer}"].flatten(0, 1).tolist() == ids[name]
        mixed = plain_attention(q, k, v, ids.get("q"), ids.get("k"))
        mixed = mixed.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)
        z = block.feed(z + block.proj(mixed))
    torch.testing.assert_close(y, z, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", OPTIONS)
def test_ragged_batch_equals_single_images(options):
    blocks, reducer = tiny_blocks(), make(**options)
    images = [tokens(1, count, seed=count) for count in (17, 1, 12, 23)]
    x, state = pack_ragged(images)
    x.requires_grad_()
    _, state = reducer.begin(x, state)
    y, after = walk(blocks, x, reducer, state)
    for image, part in zip(images, split(y, after)):
        single, _ = walk(blocks, image, reducer, TokenState(num_prefix=1, carry=state.carry))
        torch.testing.assert_close(part, single[0], atol=1e-10, rtol=1e-10)
    assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()


@needs_library
@pytest.mark.parametrize("layout", ["padded", "ragged", "one", "hidden"])
def test_packed_weights_group_in_one_call(layout):
    blocks, reducer = tokenprune_ext.pack(tiny_blocks()).requires_grad_(False), make(layers=[0, 2], q_hashes=4)
    x, state = tokens(1 if layout == "one" else 3, 18), TokenState(num_prefix=1)
    if layout == "ragged":
        x, state = pack_ragged([tokens(1, count, seed=count) for count in (17, 1, 12, 23)])
    elif layout == "hidden":
        state = state.replace(key_bias=torch.where(torch.arange(18) < 9, 0.0, -math.inf).double().expand(3, -1))
    state = reducer.begin(x, state)[1]
    for name in state.carry:  # draws are constants
        state.carry[name].requires_grad_()
    with mock.patch("tokenprune_ext.nn.block.call", wraps=call) as calls:
        y, after = walk(blocks, x, reducer, state)
    assert [c.args[0] for c in calls.mock_calls] == ["packed_attention_grouped", "packed_attention"] * 2
    assert not y.requires_grad
    with mock.patch("tokenprune_ext.nn.block.in_one_call", return_value=False):
        expected, same = walk(blocks, x, reducer, state)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=1e-12)
    for layer in (0, 2):
        ids = after.carry[f"act.q_groups.{layer}"]
        assert torch.equal(ids, same.carry[f"act.q_groups.{layer}"]) and 0 < int(ids.max()) < 17


def test_hidden_keys_are_not_attended():
    blocks, x = tiny_blocks(1), tokens(1, 9)
    reducer = reducers.create("act", depth=1, embed_dim=WIDTH, q_hashes=1, width=1e-4)
    bias = torch.zeros(1, 9, dtype=x.dtype)
    bias[0, 5:] = -math.inf
    y, _ = walk(blocks, x, reducer, TokenState(num_prefix=1, key_bias=bias))
    torch.testing.assert_close(y[:, :5], dense(blocks, x[:, :5]), atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match="key_bias must be None"):
        walk(blocks, x, make(group_k=True, layers=[0]), TokenState(num_prefix=1, key_bias=bias))


@pytest.mark.parametrize("options", [{"layers": []}, {"group_q": False}])
def test_inactive_runs_the_original_blocks(options):
    y, _ = walk(tiny_blocks(), tokens(), make(**options))
    assert torch.equal(y, dense(tiny_blocks(), tokens()))


@pytest.mark.parametrize("group_k", [False, True])
def test_a_group_for_every_token_is_the_identity(group_k):
    y, state = walk(tiny_blocks(), tokens(), make(q_hashes=1, k_hashes=1, width=1e-6, group_k=group_k))
    assert int(state.carry["act.q_groups.0"].amax()) == 16
    torch.testing.assert_close(y, dense(tiny_blocks(), tokens()), atol=1e-12, rtol=1e-12)


def test_draws_are_made_once_and_can_be_given():
    x, reducer = tokens(), make(q_hashes=4, group_k=True, k_hashes=3, generator=torch.Generator().manual_seed(5))
    _, state = reducer.begin(x, TokenState(num_prefix=1))
    assert state.carry["act.q_projection.0"].shape == (1, WIDTH // HEADS, 4)
    assert state.carry["act.k_offset.3"].shape == (1, 3, 1) and 0 <= float(state.carry["act.k_offset.3"].min()) < 1
    assert not torch.equal(state.carry["act.q_projection.0"], state.carry["act.q_projection.1"])
    again = reducer.begin(x, state)[1]
    assert all(again.carry[name] is value for name, value in state.carry.items())
    wide = reducers.create("act", depth=1, embed_dim=WIDTH)  # the width of a head is not known before the blocks
    assert wide.begin(x, state.replace(carry={}))[1].carry["act.q_projection.0"].shape == (1, WIDTH, 32)
    walk(tiny_blocks(1), x, wide)


CHECKS = [
    protocol.test_padded_and_packed_are_equal,
    protocol.test_nothing_is_stored_or_changed,
    protocol.test_plan_equals_what_runs,
    protocol.test_gradients,
    protocol.test_autocast_and_half,
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_protocol(check, options):
    check("act", options)


@pytest.mark.skipif(not protocol._library.cpu_loaded(), reason="the references read lengths on the host")
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.extended)])
def test_compiles_once_without_reading_a_count(packed):
    compile_over_counts(tiny_blocks(2), make(q_hashes=6, layers=[0, 1]), packed=packed)


@pytest.mark.extended
@pytest.mark.skipif(not protocol._library.cpu_loaded(), reason="the references read lengths on the host")
@pytest.mark.parametrize("options", OPTIONS)
def test_compiled_training_step(options):
    protocol.test_compiled_training_step("act", options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"projection": draw(8, 33), "offset": draw(33)}, ValueError, "projection must hold 1 to 32 hashes, got 33"),
        ({"projection": draw(8, 0), "offset": draw(0)}, ValueError, "projection must hold 1 to 32 hashes"),
        ({"projection": draw(7, 4)}, ValueError, r"projection must have shape \[8, L\], got \(7, 4\)"),
        ({"offset": draw(5)}, ValueError, r"offset must have shape \[4\], got \(5,\)"),
        ({"projection": torch.ones(8, 4, dtype=torch.int64)}, TypeError, "projection must be a floating"),
        ({"width": 0.0}, ValueError, "width must be positive, got 0.0"),
        ({"width": math.nan}, ValueError, "width must be positive"),
        ({"x": draw(3, 8)}, ValueError, r"x must have shape \[R, N, D\]"),
        ({"x": torch.ones(2, 3, 8, dtype=torch.int64)}, TypeError, "x must be a float32"),
    ],
)
def test_wrong_hashes(change, error, message):
    with pytest.raises(error, match=f"act_codes: {message}"):
        act_codes(**{"x": draw(2, 3, 8), "projection": draw(8, 4), "offset": draw(4), **change})


def test_wrong_arguments():
    x, ids = draw(2, 3, 8), torch.zeros(2, 3, dtype=torch.int32)
    groups = Groups(ids, ids)
    with pytest.raises(TypeError, match="codes must be int64"):
        act_groups(ids)
    with pytest.raises(ValueError, match="codes must have shape"):
        act_groups(ids.long()[0])
    with pytest.raises(TypeError, match="ids must be int32 or int64"):
        act_weighted_sum(x, ids.float(), draw(2, 4))
    with pytest.raises(ValueError, match=r"weights must have shape \[2, C\]"):
        act_weighted_sum(x, ids, draw(3, 4))
    with pytest.raises(ValueError, match="weights must have shape"):
        act_broadcast(x, ids, draw(2, 4))
    with pytest.raises(ValueError, match="k must have shape"):
        act_attention(x, x[:1], x)
    with pytest.raises(ValueError, match="v must have the shape of k"):
        act_attention(x, x, x[:, :2])
    with pytest.raises(ValueError, match="key_bias must be None beside k_groups"):
        act_attention(x, x, x, None, groups, key_bias=draw(2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"q_hashes": 33}, r"q_hashes must lie in \[1, 32\], got 33"),
        ({"k_hashes": 0}, r"k_hashes must lie in \[1, 32\], got 0"),
        ({"layers": [4]}, r"layers must lie in \[0, 4\)"),
        ({"width": -1.0}, "width must be positive"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=f"ACT: {message}"):
        make(**options)
