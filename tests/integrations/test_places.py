# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding and biases of pairs that follow the tokens, against plain formulas."""

import math

import pytest
import torch
from tokenprune_ext.nn import AttentionBranch, PairBias, Rotary, TokenState
from torch import nn

from tests.reducers.common import pack_ragged

HEADS, DIM, PATCHES = 2, 8, 6
WIDTH = HEADS * DIM


def started(prefix, batch=2):
    """The state of tokens with a place each."""
    return TokenState(num_prefix=prefix).with_index(torch.empty(batch, prefix + PATCHES, WIDTH))


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def rotated(x, sin, cos, half):
    """One head's channels, turned."""
    if half:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin
    return x * cos + torch.stack([-x[1::2], x[::2]], -1).flatten() * sin


def rotated_tokens(values, index, sin, cos, half):
    """``values [n, H, D]`` of one image, each turned by its place in ``sin, cos [H, N, D]``."""
    result = values.clone()
    for token, place in enumerate(index.tolist()):
        for head in range(HEADS):
            if place >= 0:
                result[token, head] = rotated(values[token, head], sin[head, place], cos[head, place], half)
    return result


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("lead", [(), (HEADS,), (2, 1), (2, HEADS)])
def test_rotation_follows_the_index(lead, prefix, half):
    torch.manual_seed(0)
    angle = 3 * torch.rand(*lead, PATCHES, DIM, dtype=torch.float64)
    sin, cos = angle.sin(), angle.cos()
    state = started(prefix)
    rotary = Rotary(sin, cos, state, half=half)
    sin, cos = (t.expand(2, HEADS, PATCHES, DIM) for t in (sin, cos))
    q, k = (random(2, prefix + PATCHES, HEADS, DIM) for _ in range(2))
    for values, result in zip((q, k), rotary(q, k, state), strict=True):
        for b in range(2):
            expected = rotated_tokens(values[b], state.index[b], sin[b], cos[b], half)
            torch.testing.assert_close(result[b], expected)
    fewer = state.replace(index=torch.tensor([[-1, 4, 1, -1], [-1, 2, 5, 0]], dtype=torch.int32))
    q = random(2, 4, HEADS, DIM)
    for _ in range(2):  # the second time, the gathered values are remembered
        padded, _ = rotary(q, q, fewer)
        for b in range(2):
            torch.testing.assert_close(padded[b], rotated_tokens(q[b], fewer.index[b], sin[b], cos[b], half))
    flat, packed = fewer.as_packed(q.flatten(2))
    rows = flat.view(-1, HEADS, DIM)
    torch.testing.assert_close(rotary(rows, rows, packed)[0].view_as(padded), padded)


def test_rotation_keeps_the_dtype():
    state = started(1)
    angle = torch.rand(PATCHES, DIM)
    q = torch.randn(2, 1 + PATCHES, HEADS, DIM, dtype=torch.bfloat16)
    assert Rotary(angle.sin(), angle.cos(), state, half=True)(q, q, state)[0].dtype == torch.bfloat16


def branch(pair_bias, **options):
    torch.manual_seed(0)
    parts = nn.Identity(), nn.Linear(WIDTH, 3 * WIDTH).double(), nn.Identity()
    return AttentionBranch(*parts, num_heads=HEADS, head_dim=DIM, pair_bias=pair_bias, **options)


def weights_of(attention, x, bias):
    """Attention weights ``[H, n, n]`` and values of one image ``[n, C]`` under ``bias [H, n, n]``."""
    q, k, v = attention.qkv(x, None)
    logits = torch.einsum("qhd,khd->hqk", q, k) * DIM**-0.5 + bias
    return logits.softmax(-1), v


def gathered(full, index, prefix):
    """The bias of one image's tokens: made tokens stand in for the class token, or have none."""
    bias = full if prefix else nn.functional.pad(full, (1, 0, 1, 0))
    return bias[:, (index + 1).long()][:, :, (index + 1).long()]


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("keys", [False, True])
def test_bias_follows_the_index(prefix, keys):
    full = random(HEADS, prefix + PATCHES, prefix + PATCHES)
    state = started(prefix)
    attention = branch(PairBias(lambda: full, state))
    x = random(2, prefix + PATCHES, WIDTH)
    out, _ = attention.core(x, state, "keys")
    for b in range(2):
        weights, v = weights_of(attention, x[b], full)
        torch.testing.assert_close(out[b], torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
    index = torch.tensor([[-1, 4, 1], [-1, 2, 5]], dtype=torch.int32)
    bias = random(2, 3) if keys else None
    fewer, x = state.replace(index=index, key_bias=bias), x[:, :3]
    for want in (None, "key", "keys", "cls", "mean"):
        out = attention.core(x, fewer, want)
        out, product = (out, None) if want is None else out
        for b in range(2):
            given = gathered(full, index[b], prefix) + (bias[b] if keys else 0)
            weights, v = weights_of(attention, x[b], given)
            torch.testing.assert_close(out[b], torch.einsum("hqk,khd->qhd", weights, v).flatten(1))
            key = attention.qkv(x[b], None)[1]
            expected = {"key": key.mean(1), "keys": key, "cls": weights[:, 0].mean(0), "mean": weights.mean((0, 1))}
            if want is not None:
                torch.testing.assert_close(product[b], expected[want])


@pytest.mark.parametrize("want", ["keys", "cls", "mean"])
def test_packed_tokens_have_the_bias_of_padded_ones(want):
    full = random(HEADS, 1 + PATCHES, 1 + PATCHES)
    attention = branch(PairBias(lambda: full, started(1)))
    images = [random(1, n, WIDTH) for n in (4, 2, 5)]
    x, state = pack_ragged(images)
    index = [torch.tensor([-1, *torch.randperm(PATCHES)[: image.shape[1] - 1]], dtype=torch.int32) for image in images]
    bias = random(x.shape[0])
    out, product = attention.core(x, state.replace(index=torch.cat(index), key_bias=bias), want)
    parts = zip(images, index, bias.split([4, 2, 5]), strict=True)
    expected = [attention.core(i, TokenState(num_prefix=1, index=n[None], key_bias=b[None]), want) for i, n, b in parts]
    torch.testing.assert_close(out, torch.cat([e[0][0] for e in expected]))
    torch.testing.assert_close(product, torch.cat([e[1][0] for e in expected]))


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_policy_with_a_bias(eps):
    full = random(HEADS, 1 + PATCHES, 1 + PATCHES)
    state = started(1)
    attention = branch(PairBias(lambda: full, state))
    x = random(2, 1 + PATCHES, WIDTH)
    policy = (torch.rand(2, 1 + PATCHES, dtype=torch.float64) > 0.4).double()
    out = attention.mix_policy(*attention.qkv(x, state), state, policy, eps)
    for b in range(2):
        weights, v = weights_of(attention, x[b], full)
        seen = torch.where(torch.eye(1 + PATCHES) > 0, 1.0, policy[b])
        scale = (weights / weights.amax(-1, keepdim=True)) * seen
        scale = (scale + eps / (1 + PATCHES)) / (scale.sum(-1, keepdim=True) + eps)
        torch.testing.assert_close(out[b], torch.einsum("hqk,khd->qhd", scale, v).flatten(1))


def test_hidden_keys():
    state = started(1)
    attention = branch(PairBias(lambda: random(HEADS, 1 + PATCHES, 1 + PATCHES), state))
    x, bias = random(2, 1 + PATCHES, WIDTH), torch.zeros(2, 1 + PATCHES)
    bias[:, 3] = -math.inf
    _, score = attention.core(x, state.replace(key_bias=bias), "mean")
    assert (score[:, 3] == 0).all() and torch.allclose(score.sum(1), torch.ones(2, dtype=torch.float64))


def test_grouped_queries_and_separate_projections():
    """Three projections, of which those of keys and values make fewer heads."""
    torch.manual_seed(0)
    q, k, v = (nn.Linear(WIDTH, heads * DIM).double() for heads in (4, 2, 2))
    attention = AttentionBranch(nn.Identity(), (q, k, v), nn.Identity(), num_heads=4, head_dim=DIM)
    x = random(2, 5, WIDTH)
    out = attention.core(x, TokenState())
    heads = [layer(x).unflatten(-1, (-1, DIM)).transpose(1, 2) for layer in (q, k, v)]
    expected = nn.functional.scaled_dot_product_attention(*heads, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2).flatten(2))


def test_errors():
    with pytest.raises(ValueError, match="num_prefix must be at most 1"):
        PairBias(lambda: None, started(2))
    attention = branch(PairBias(lambda: None, started(1)))
    with pytest.raises(ValueError, match="no bias for pairs of tokens"):
        attention.check_own_attention()
