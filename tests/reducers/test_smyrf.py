# SPDX-License-Identifier: Apache-2.0
"""SMYRF against the formulas of its paper, written out plainly."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from tokenprune_ext import reducers
from tokenprune_ext.nn import TokenState
from tokenprune_ext.reducers.smyrf import smyrf_attention, smyrf_hashes, smyrf_order, smyrf_transform

from . import test_protocol as protocol
from .common import DEPTH, HEADS, WIDTH, compile_over_counts, dense, pack_ragged, split, tiny_blocks, tokens, walk

FACTS = {"depth": DEPTH, "embed_dim": WIDTH, "head_dim": WIDTH // HEADS}
OPTIONS = [
    {"rounds": 3, "cluster_size": 5},
    {"rounds": 8, "cluster_size": 6, "layers": [0, 3], "per_row": False},  # 8 * 6 * 17 = 136 * 6
]
make = partial(reducers.create, "smyrf", FACTS)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def orders(rounds, rows, *counts, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(rounds, rows, count, generator=generator).argsort(-1) for count in counts]


def clusters_of_list(order, size):
    """The published cut: (round, row, token) lists."""
    flat = [(rd, r, n) for rd, rows in enumerate(order.tolist()) for r, row in enumerate(rows) for n in row]
    return [flat[i : i + size] for i in range(0, len(flat), size)]


def clusters_of_rows(order, size, other):
    """Every row by itself, as many clusters as the finer side of the two needs."""
    clusters = []
    for rd, rows in enumerate(order.tolist()):
        for r, row in enumerate(rows):
            parts = max(math.ceil(len(row) / size), math.ceil(other[0] / other[1]), 1)
            bounds = [i * len(row) // parts for i in range(parts + 1)]
            clusters += [[(rd, r, n) for n in row[a:b]] for a, b in pairwise(bounds)]
    return clusters


def plain_attention(q, k, v, q_clusters, k_clusters, rounds, scale, bias=None):
    """Cluster by cluster; a query's rounds are weighted with exp(lse)."""
    found = [[[] for _ in range(q.shape[1])] for _ in range(q.shape[0])]
    for queries, keys in zip(q_clusters, k_clusters, strict=True):
        for _, r, n in queries:
            if not keys:
                continue
            logits = torch.stack([q[r, n] @ k[s, m] * scale + (0 if bias is None else bias[s, m]) for _, s, m in keys])
            if logits.isinf().all():
                continue
            found[r][n].append((logits.logsumexp(0), logits.softmax(0) @ torch.stack([v[s, m] for _, s, m in keys])))
    out = torch.zeros_like(q)
    for r, row in enumerate(found):
        for n, parts in enumerate(row):
            if parts:
                weights = torch.stack([lse for lse, _ in parts]).softmax(0)
                out[r, n] = weights @ torch.stack([value for _, value in parts])
    return out


def test_transform_keeps_products_and_evens_norms(device):
    q, k = draw(3, 7, 8).to(device), draw(3, 5, 8, seed=1).to(device) * 3
    q_plus, k_plus = smyrf_transform(q, k)
    assert q_plus.shape == (3, 7, 10) and k_plus.shape == (3, 5, 10)
    torch.testing.assert_close(q_plus @ k_plus.transpose(1, 2), q @ k.transpose(1, 2))
    total = q.norm(dim=-1).amax(1) ** 2 + k.norm(dim=-1).amax(1) ** 2
    for rows in (q_plus, k_plus):
        torch.testing.assert_close(rows.square().sum(-1), total[:, None].expand(rows.shape[:2]))


def test_hashes_and_order(device):
    q, k, alpha, beta = draw(3, 7, 8), draw(3, 5, 8, seed=1), draw(10, 4, seed=2), draw(1, 4, seed=3)
    hashes = smyrf_hashes(*(t.to(device) for t in (q, k, alpha, beta)))
    for rows, got in zip(smyrf_transform(q, k), hashes):
        expected = torch.stack([rows @ alpha[:, i] + beta[0, i] for i in range(4)])
        torch.testing.assert_close(got.cpu(), expected)
        assert torch.equal(smyrf_order(got).cpu(), expected.argsort(-1))
    hidden = torch.tensor([1, 0, 0, 1, 0], device=device).expand(3, -1) > 0
    order = smyrf_order(hashes[1], hidden)
    assert order[..., 3:].tolist() == [[[0, 3]] * 3] * 4
    half = [t.to(device, torch.bfloat16) for t in (q, k)]
    with torch.autocast(device.type, torch.bfloat16):
        low = smyrf_hashes(*half, alpha.float().to(device), beta.float().to(device))
    full = smyrf_hashes(*(t.float() for t in half), alpha.float().to(device), beta.float().to(device))
    assert all(torch.equal(a, b) for a, b in zip(low, full))


@pytest.mark.parametrize(
    ("counts", "sizes", "rounds"),
    [((12, 12), (4, 4), 2), ((11, 11), (4, 4), 4), ((10, 5), (4, 2), 4), ((11, 11), (44, 44), 1)],
)
def test_one_list_matches_the_formulas(counts, sizes, rounds, device):
    q, k, v = (draw(4, n, 8, seed=i).to(device).requires_grad_() for i, n in enumerate((*counts, counts[1])))
    q_order, k_order = orders(rounds, 4, *counts)
    out = smyrf_attention(
        q, k, v, q_order.to(device), k_order.to(device), q_size=sizes[0], k_size=sizes[1], scale=0.5, per_row=False
    )
    cut = clusters_of_list(q_order, sizes[0]), clusters_of_list(k_order, sizes[1])
    check(out, plain_attention(*(t.cpu() for t in (q, k, v)), *cut, rounds, 0.5), q, k, v)


@pytest.mark.parametrize(
    ("counts", "sizes"), [((12, 12), (4, 4)), ((11, 11), (4, 4)), ((11, 6), (4, 4)), ((3, 9), (8, 2)), ((5, 5), (9, 9))]
)
def test_rows_by_themselves_match_the_formulas(counts, sizes, device):
    q, k, v = (draw(3, n, 8, seed=i).to(device).requires_grad_() for i, n in enumerate((*counts, counts[1])))
    q_order, k_order = orders(3, 3, *counts)
    bias = draw(3, counts[1], seed=9)
    bias[:, 1] = -math.inf
    options = {"q_size": sizes[0], "k_size": sizes[1], "key_bias": bias.to(device)}
    out = smyrf_attention(q, k, v, q_order.to(device), k_order.to(device), **options)
    cut = (
        clusters_of_rows(q_order, sizes[0], (counts[1], sizes[1])),
        clusters_of_rows(k_order, sizes[1], (counts[0], sizes[0])),
    )
    assert all(len(c) <= size for clusters, size in zip(cut, sizes) for c in clusters)
    check(out, plain_attention(*(t.cpu() for t in (q, k, v)), *cut, 3, 8**-0.5, bias), q, k, v)


def check(out, expected, q, k, v):
    expected = expected.to(out.device)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)
    weight = draw(*out.shape, seed=5).to(out.device)
    grads = [torch.autograd.grad((o * weight).sum(), (q, k, v)) for o in (out, expected)]
    torch.testing.assert_close(*grads, atol=1e-12, rtol=1e-12)


def test_the_two_cuts_agree_where_rows_divide(device):
    q, k, v = (draw(3, 12, 8, seed=i).to(device) for i in range(3))
    order = [o.to(device) for o in orders(4, 3, 12, 12)]
    one, other = (smyrf_attention(q, k, v, *order, q_size=4, k_size=4, per_row=mode) for mode in (False, True))
    torch.testing.assert_close(one, other, atol=1e-14, rtol=1e-14)


def test_one_cluster_per_row_is_dense_attention(device):
    q, k, v = (draw(3, 12, 8, seed=i).to(device) for i in range(3))
    order = [o.to(device) for o in orders(4, 3, 12, 12)]
    out = smyrf_attention(q, k, v, *order, q_size=12, k_size=12)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_rows_of_different_lengths(device):
    lengths = [7, 0, 12, 1]
    q, k, v = (draw(4, 12, 8, seed=i).to(device) for i in range(3))
    valid = (torch.arange(12) < torch.tensor(lengths)[:, None]).to(device)
    alpha, beta = draw(10, 3, seed=4).to(device), draw(3, seed=5).to(device)
    # The transform scales with the longest vector of a row, so what is behind its end must be zero.
    q, k, v = (torch.where(valid[..., None], t, 0) for t in (q, k, v))
    order = [smyrf_order(h, ~valid) for h in smyrf_hashes(q, k, alpha, beta)]
    out = smyrf_attention(q, k, v, *order, q_size=4, k_size=4, q_valid=valid, k_valid=valid)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1), slice(0, length)
        alone = [smyrf_order(h) for h in smyrf_hashes(q[one], k[one], alpha, beta)]
        single = smyrf_attention(q[one], k[one], v[one], *alone, q_size=4, k_size=4)
        torch.testing.assert_close(out[one], single, atol=1e-12, rtol=1e-12)
        assert bool((out[row, length:] == 0).all())


@pytest.mark.parametrize("options", OPTIONS)
def test_reducer_matches_the_formulas(options):
    blocks, x, reducer = tiny_blocks(), tokens(), make(**options)
    y, state = walk(blocks, x, reducer)
    z, size = x, reducer.cluster_size
    for layer, block in enumerate(blocks):
        if layer not in reducer.layers:
            z = block(z)
            continue
        q, k, v = block.qkv(block.norm1(z)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)
        alpha, beta = state.carry[f"smyrf.alpha.{layer}"], state.carry[f"smyrf.beta.{layer}"]
        order = [(t @ alpha + beta).permute(2, 0, 1).argsort(-1) for t in smyrf_transform(q, k)]
        if reducer.per_row:
            cut = [clusters_of_rows(o, size, (17, size)) for o in order]
        else:
            cut = [clusters_of_list(o, size) for o in order]
        mixed = plain_attention(q, k, v, *cut, reducer.rounds, (WIDTH // HEADS) ** -0.5)
        mixed = mixed.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)
        z = block.feed(z + block.proj(mixed))
    torch.testing.assert_close(y, z, atol=1e-10, rtol=1e-10)


def test_only_the_published_cut_depends_on_the_batch():
    blocks, x = tiny_blocks(), tokens(2, 17)
    for per_row in (True, False):
        reducer = make(rounds=8, cluster_size=6, per_row=per_row)
        _, state = reducer.begin(x, TokenState(num_prefix=1))
        y, _ = walk(blocks, x, reducer, state)
        alone, _ = walk(blocks, x[:1], reducer, state)
        assert torch.allclose(y[:1], alone, atol=1e-12, rtol=1e-12) is per_row


def test_ragged_batch_equals_single_images():
    blocks, reducer = tiny_blocks(), make(rounds=3, cluster_size=5)
    images = [tokens(1, count, seed=count) for count in (17, 1, 12, 23)]
    x, state = pack_ragged(images)
    x.requires_grad_()
    _, state = reducer.begin(x, state)
    y, after = walk(blocks, x, reducer, state)
    for image, part in zip(images, split(y, after)):
        single, _ = walk(blocks, image, reducer, TokenState(num_prefix=1, carry=state.carry))
        torch.testing.assert_close(part, single[0], atol=1e-10, rtol=1e-10)
    assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()
    with pytest.raises(ValueError, match="per_row must be True for rows of different lengths"):
        walk(blocks, x, make(rounds=3, cluster_size=5, per_row=False), state)


def test_hidden_tokens_come_last_and_count_for_nothing():
    blocks, x = tiny_blocks(1), tokens(1, 16)
    reducer = reducers.create("smyrf", depth=1, head_dim=WIDTH // HEADS, layers=[0], rounds=2, cluster_size=4)
    bias = torch.zeros(1, 16, dtype=x.dtype)
    bias[0, 12:] = -math.inf
    _, state = reducer.begin(x, TokenState(num_prefix=1))
    y, _ = walk(blocks, x, reducer, state.replace(key_bias=bias))
    alone, _ = walk(blocks, x[:, :12], reducer, state)
    torch.testing.assert_close(y[:, :12], alone, atol=1e-12, rtol=1e-12)


def test_inactive_runs_the_original_blocks():
    y, _ = walk(tiny_blocks(), tokens(), make(layers=[]))
    assert torch.equal(y, dense(tiny_blocks(), tokens()))


@pytest.mark.parametrize("per_row", [True, False])
def test_one_cluster_per_row_is_the_identity(per_row):
    y, _ = walk(tiny_blocks(), tokens(), make(layers=[0, 1, 2, 3], rounds=3, cluster_size=17, per_row=per_row))
    torch.testing.assert_close(y, dense(tiny_blocks(), tokens()), atol=1e-12, rtol=1e-12)


def test_draws_are_made_once_and_can_be_given():
    x, reducer = tokens(), make(rounds=4, width=3.0, generator=torch.Generator().manual_seed(5))
    _, state = reducer.begin(x, TokenState(num_prefix=1))
    assert sorted(state.carry) == ["smyrf.alpha.2", "smyrf.alpha.3", "smyrf.beta.2", "smyrf.beta.3"]
    assert state.carry["smyrf.alpha.2"].shape == (WIDTH // HEADS + 2, 4) and state.carry["smyrf.beta.3"].shape == (1, 4)
    assert 1 < float(state.carry["smyrf.beta.2"].max()) < 3
    again = reducer.begin(x, state)[1]
    assert all(again.carry[name] is value for name, value in state.carry.items())
    wide = reducers.create("smyrf", depth=1, embed_dim=WIDTH, layers=[0])
    assert wide.begin(x, state.replace(carry={}))[1].carry["smyrf.alpha.0"].shape == (WIDTH + 2, 32)
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
    check("smyrf", options)


@pytest.mark.skipif(not protocol._library.cpu_loaded(), reason="the references read lengths on the host")
@pytest.mark.parametrize("per_row", [True, pytest.param(False, marks=pytest.mark.extended)])
@pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.extended)])
def test_compiles_once(packed, per_row):
    reducer = make(rounds=8, cluster_size=8, layers=[0, 1], per_row=per_row)
    compile_over_counts(tiny_blocks(2), reducer, packed=packed)


@pytest.mark.extended
@pytest.mark.skipif(not protocol._library.cpu_loaded(), reason="the references read lengths on the host")
@pytest.mark.parametrize("options", OPTIONS)
def test_compiled_training_step(options):
    protocol.test_compiled_training_step("smyrf", options)


X, ORDER = draw(2, 6, 8), orders(3, 2, 6)[0]
WRONG = [
    ({"q": draw(2, 6)}, ValueError, r"q must have shape \[R, N, D\]"),
    ({"k": draw(1, 6, 8)}, ValueError, "k must have shape"),
    ({"v": draw(2, 5, 8)}, ValueError, "v must be like k"),
    ({"k": X.float()}, TypeError, "k must have the dtype of q"),
    ({"q_order": ORDER[:, :1]}, ValueError, "q_order must have shape"),
    ({"k_order": ORDER[:2]}, ValueError, "k_order must have shape"),
    ({"q_size": 0}, ValueError, "q_size must be positive, got 0"),
    ({"k_size": -2}, ValueError, "k_size must be positive, got -2"),
    ({"q_size": 5}, ValueError, r"q_size must divide rounds \* rows \* tokens \(36\), got 5"),
    ({"k_size": 4}, ValueError, "q_size and k_size must make as many clusters of queries as of keys"),
    ({"q_valid": X[..., 0] > 0}, ValueError, "per_row must be True for rows of different lengths"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_arguments(change, error, message):
    arguments = {"q": X, "k": X, "v": X, "q_order": ORDER, "k_order": ORDER, "q_size": 3, "k_size": 3, "per_row": False}
    with pytest.raises(error, match=f"balanced_attention: {message}"):
        smyrf_attention(**{**arguments, **change})


@pytest.mark.parametrize(
    ("alpha", "beta", "message"),
    [
        (draw(9, 4), draw(4), r"alpha must have shape \[10, rounds\]"),
        (draw(10, 0), draw(0), "alpha must hold at least one round"),
        (draw(10, 4), draw(3), r"beta must have shape \[4\]"),
    ],
)
def test_wrong_draws(alpha, beta, message):
    with pytest.raises(ValueError, match=f"smyrf_hashes: {message}"):
        smyrf_hashes(X, X, alpha, beta)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [-1]}, r"layers must lie in \[0, 4\)"),
        ({"rounds": 0}, "rounds must be positive, got 0"),
        ({"cluster_size": -3}, "cluster_size must be positive"),
        ({"width": 0.0}, "width must be positive"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=f"SMYRF: {message}"):
        make(**options)
