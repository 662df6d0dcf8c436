# SPDX-License-Identifier: Apache-2.0
"""Ragged attention, attention scores and attention under a key policy."""

import pytest
import torch
from tokenprune_ext import ops
from torch.utils.flop_counter import FlopCounterMode

from tests.conformance import Conformance, OpSpec, Sample, assert_same, needs_library
from tests.ops.common import expect, ints

raw = torch.ops.tokenprune

_TAIL = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? key_bias, "
    "Tensor? q_index, Tensor? kv_index, float scale"
)
SCHEMAS = [
    f"sparse_attention(Tensor q, Tensor k, Tensor v, {_TAIL}, bool want_cls) -> (Tensor out, Tensor lse, Tensor cls)",
    "sparse_attention_backward(Tensor? grad_out, Tensor q, Tensor k, Tensor v, Tensor? out, Tensor lse, "
    f"Tensor? grad_lse, Tensor? grad_scores, int scores_kind, {_TAIL}) -> "
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias)",
    f"attention_scores(Tensor q, Tensor k, Tensor lse, {_TAIL}, int kind) -> Tensor",
    f"attention_scores_grad_lse(Tensor grad, Tensor q, Tensor k, Tensor lse, {_TAIL}, int kind) -> Tensor",
    "policy_attention(Tensor q, Tensor k, Tensor v, Tensor policy, float eps, float scale) -> "
    "(Tensor out, Tensor row_max, Tensor row_sum)",
    "policy_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor policy, Tensor out, "
    "Tensor row_max, Tensor row_sum, float eps, float scale) -> "
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_policy)",
]


# ---------------------------------------------------------------- samples


def normal(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def starts(lengths):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0)], dtype=torch.int32)


def make_ragged(rng, q, k=None, heads=2, dim=8, bias=None, spare=0, rows=None, scale=None, cls=False):
    """Sequence lengths ``q`` and ``k`` (None: self-attention); ``spare`` rows of no sequence; ``rows`` to index into."""
    total_q, total_k = sum(q) + spare, sum(q if k is None else k) + spare
    rows_q, rows_k = (total_q, total_k) if rows is None else (rows, rows)
    inputs = {
        "q": normal(rng, rows_q, heads, dim),
        "k": normal(rng, rows_k, heads, dim),
        "v": normal(rng, rows_k, heads, dim),
    }
    inputs["cu_q"] = starts(q)
    options = {"max_q": max(q, default=0) + 1, "scale": scale, "cls": cls}
    if k is not None:
        inputs["cu_k"] = starts(k)
        options["max_k"] = max(k, default=0)
    if bias is not None:
        inputs["key_bias"] = torch.rand(total_k, generator=rng, dtype=torch.float64) * 3
        if bias == "hidden":
            inputs["key_bias"][torch.rand(total_k, generator=rng) < 0.4] = float("-inf")
    if rows is not None:
        inputs["index"] = torch.randperm(rows, generator=rng)[:total_q].to(torch.int32)
        inputs["index"][total_q - spare :] = -1
    return Sample(inputs, options)


def make_scores(rng, kind="cls", **dims):
    """A sample of make_ragged with an lse near the true one, but independent of q and k."""
    sample = make_ragged(rng, **dims)
    inputs = {n: t for n, t in sample.inputs.items() if n != "v"}
    options = {n: o for n, o in sample.options.items() if n != "cls"}
    lse = oracle_attention(**sample.inputs, **options)[1]
    return Sample({**inputs, "lse": lse + 0.1 * normal(rng, *lse.shape)}, {**options, "kind": kind})


def make_policy(rng, batch, tokens, heads=2, dim=8, keep=60, eps=1e-6, scale=None):
    inputs = {n: normal(rng, batch, tokens, heads, dim) for n in "qkv"}
    inputs["policy"] = (torch.rand(batch, tokens, generator=rng) * 100 < keep).double()
    return Sample(inputs, {"eps": eps, "scale": scale})


# ---------------------------------------------------------------- functions under test


def attention(
    q, k, v, cu_q, cu_k=None, key_bias=None, index=None, max_q=0, max_k=None, scale=None, cls=False
):
    return ops.sparse_attention(
        q,
        k,
        v,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        key_bias=key_bias,
        scale=scale,
        index=index,
        want_cls=cls,
    )


def qkvpacked(q, k, v, cu_q, key_bias=None, index=None, max_q=0, scale=None, cls=False):
    return ops.sparse_attention_qkvpacked(
        torch.stack([q, k, v], 1),
        cu_seqlens=cu_q,
        max_seqlen=max_q,
        key_bias=key_bias,
        scale=scale,
        index=index,
        want_cls=cls,
    )


def scores(
    q, k, lse, cu_q, cu_k=None, key_bias=None, index=None, max_q=0, max_k=None, scale=None, kind="cls"
):
    return ops.attention_scores(
        q,
        k,
        lse,
        kind,
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        max_seqlen_q=max_q,
        max_seqlen_k=max_k,
        key_bias=key_bias,
        scale=scale,
        index=index,
    )


def attention_then_scores(q, k, v, kind="mean", cls=False, **rest):
    """The scores a reducer asks for: the gradient must also pass through the lse."""
    out, lse = attention(q, k, v, **rest)
    return out, scores(q, k, lse, kind=kind, **rest)


# ---------------------------------------------------------------- oracles: dense, masked by sequence number


def sequence_of(cu, count):
    """Sequence number of every packed position, -1 for none."""
    number = torch.full((count,), -1)
    for b in range(len(cu) - 1):
        number[cu[b] : cu[b + 1]] = b
    return number


def pairs(q, k, cu_q, cu_k, key_bias, index, scale):
    """Logits [H, Tq, Tk] with zeros for forbidden pairs, and the mask of the allowed ones [Tq, Tk]."""
    if index is not None:
        q, k = q[index.long()], k[index.long()]
    cu_k = cu_q if cu_k is None else cu_k
    sq, sk = sequence_of(cu_q, q.shape[0]), sequence_of(cu_k, k.shape[0])
    allowed = (sq[:, None] == sk) & (sq[:, None] >= 0)
    logits = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if key_bias is not None:
        allowed = allowed & (key_bias > float("-inf"))
        logits = logits + torch.where(key_bias > float("-inf"), key_bias, 0)
    return torch.where(allowed, logits, 0), allowed, sq


def first_queries(number):
    """0/1 weight of the first query of every sequence."""
    previous = torch.cat([number.new_full((1,), -1), number[:-1]])
    return ((number != previous) & (number >= 0)).double()


def oracle_attention(
    q, k, v, cu_q, cu_k=None, key_bias=None, index=None, max_q=0, max_k=0, scale=None, cls=False
):
    logits, allowed, number = pairs(q, k, cu_q, cu_k, key_bias, index, scale)
    values = v if index is None else v[index.long()]
    some = allowed.any(1)
    masked = torch.where(allowed | ~some[:, None], logits, float("-inf"))
    lse = (
        torch.where(some, masked.logsumexp(-1), float("-inf"))
        if masked.shape[2]
        else masked.new_full(masked.shape[:2], float("-inf"))
    )
    probabilities = torch.where(allowed, masked.softmax(-1), 0)
    out = torch.einsum("hqk,khd->qhd", probabilities, values)
    if not cls:
        return out, lse
    return out, lse, torch.einsum("hqk,q->hk", probabilities, first_queries(number).to(q.dtype))


def oracle_scores(
    q, k, lse, cu_q, cu_k=None, key_bias=None, index=None, max_q=0, max_k=0, scale=None, kind="cls"
):
    logits, allowed, number = pairs(q, k, cu_q, cu_k, key_bias, index, scale)
    probabilities = torch.where(
        allowed, (logits - torch.where(lse > float("-inf"), lse, 0)[..., None]).exp(), 0
    )
    if kind == "cls":
        weight = first_queries(number)
    else:
        weight = torch.tensor([1 / (number == n).sum().item() for n in number], dtype=torch.float64)
    return torch.einsum("hqk,q->hk", probabilities, weight.to(q.dtype))


def oracle_attention_then_scores(q, k, v, kind="mean", cls=False, **rest):
    out, lse = oracle_attention(q, k, v, **rest)
    return out, oracle_scores(q, k, lse, kind=kind, **rest)


def oracle_policy(q, k, v, policy, eps, scale):
    """The formula of DynamicViT and SPViT, written out; the row maximum stays in the graph."""
    tokens = q.shape[1]
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if logits.numel() == 0:
        return torch.einsum("bhqk,bkhd->bqhd", logits, v)
    eye = torch.eye(tokens, dtype=q.dtype)
    visible = policy[:, None, None] + (1 - policy[:, None, None]) * eye
    weights = (logits - logits.max(-1, keepdim=True).values).exp() * visible
    return torch.einsum(
        "bhqk,bkhd->bqhd", (weights + eps / tokens) / (weights.sum(-1, keepdim=True) + eps), v
    )


# ---------------------------------------------------------------- specs

LENGTHS = {
    "ragged": {"q": [5, 9, 1, 17], "dim": 16},
    "long": {"q": [150, 70], "heads": 3, "dim": 64},
    "cross": {"q": [3, 8, 6], "k": [7, 2, 33], "dim": 12},
    "empties": {"q": [0, 3, 0, 4, 2, 0], "k": [2, 0, 0, 5, 1, 3], "dim": 5},
    "spare": {"q": [4, 6], "spare": 3},
    "one": {"q": [1], "heads": 1, "dim": 1},
    "no_sequences": {"q": []},
    "no_tokens": {"q": [0, 0]},
    "many_keys": {"q": [50, 2, 7], "k": [1030, 1100, 1], "heads": 1, "dim": 16},
    "dim80": {"q": [21, 40], "dim": 80},
}
BIASED = {
    "bias": {"q": [5, 19], "dim": 32, "bias": "finite"},
    "hidden": {"q": [6, 3, 1, 1, 12], "dim": 16, "bias": "hidden"},
    "cross_hidden": {"q": [3, 8], "k": [7, 2], "dim": 9, "bias": "hidden", "scale": 0.3},
}
INDEXED = {
    "index": {"q": [4, 7], "rows": 23, "dim": 16},
    "index_spare": {"q": [4, 0, 7], "rows": 23, "spare": 4, "bias": "finite", "dim": 24},
}
VIEWS = {"q", "k", "v"}


def lengths_for(n):
    """Three sequences with lengths that depend on n; the sizes never coincide with the other dimensions."""
    return {"q": [n, 2 * n + 1, n // 2], "heads": 3, "dim": 8}


def spec(name, call, oracle, make, cases, grads, extra=None, sized=lengths_for, **more):
    extra = extra or {}
    return OpSpec(
        name,
        call,
        oracle,
        make,
        {n: {**c, **extra} for n, c in cases.items()},
        lambda n: {**sized(n), **extra},
        gradcheck={"q": [3, 0, 2], "dim": 3, "bias": "finite" if "key_bias" in grads else None, **extra},
        grads=grads,
        stats=frozenset({"key_bias", "lse", "policy"}),
        autocast=frozenset(VIEWS),
        **more,
    )


def fuzz_make(make):
    """Sequence lengths from three drawn numbers instead of lists."""

    def build(rng, **dims):
        if "a" in dims:
            lengths = [dims.pop(n) for n in "abc"]
            keys = [dims.pop(n) for n in "xyz"]
            dims.update(q=lengths, k=keys if sum(keys) % 2 else None)
        return make(rng, **dims)

    return build


RANGE = {
    **{n: (0, 12) for n in "abcxyz"},
    "heads": (1, 3),
    "dim": (1, 20),
    "spare": (0, 2),
    "bias": [None, "finite", "hidden"],
}
QKV = ("q", "k", "v")
SPECS = [
    spec(
        "sparse_attention",
        attention,
        oracle_attention,
        fuzz_make(make_ragged),
        LENGTHS,
        QKV,
        fuzz=RANGE,
        inductor=True,
    ),
    spec(
        "sparse_attention_bias",
        attention,
        oracle_attention,
        make_ragged,
        BIASED,
        (*QKV, "key_bias"),
        sized=lambda n: {**lengths_for(n), "bias": "finite"},
    ),
    spec(
        "sparse_attention_index",
        attention,
        oracle_attention,
        make_ragged,
        INDEXED,
        QKV,
        sized=lambda n: {**lengths_for(n), "rows": 4 * n + 9, "spare": 2},
    ),
    spec(
        "sparse_attention_cls",
        attention,
        oracle_attention,
        make_ragged,
        {
            n: {**LENGTHS, **BIASED, **INDEXED}[n]
            for n in ("ragged", "empties", "cross", "spare", "no_tokens", "hidden", "index")
        },
        QKV,
        {"cls": True},
    ),
    spec(
        "qkvpacked", qkvpacked, oracle_attention, make_ragged, {"ragged": LENGTHS["ragged"], **INDEXED}, QKV
    ),
    spec(
        "attention_scores_cls",
        scores,
        oracle_scores,
        fuzz_make(make_scores),
        {**LENGTHS, **INDEXED},
        ("q", "k", "lse"),
        {"kind": "cls"},
        fuzz={**RANGE, "kind": ["cls", "mean"]},
    ),
    spec(
        "attention_scores_mean",
        scores,
        oracle_scores,
        make_scores,
        {**LENGTHS, **INDEXED},
        ("q", "k", "lse"),
        {"kind": "mean"},
    ),
    spec(
        "attention_scores_bias",
        scores,
        oracle_scores,
        make_scores,
        BIASED,
        ("q", "k", "lse", "key_bias"),
        {"kind": "mean"},
        sized=lambda n: {**lengths_for(n), "bias": "finite"},
    ),
    spec(
        "attention_then_scores",
        attention_then_scores,
        oracle_attention_then_scores,
        make_ragged,
        {n: LENGTHS[n] for n in ("ragged", "cross", "empties")},
        QKV,
    ),
    OpSpec(
        "policy_attention",
        ops.policy_attention,
        oracle_policy,
        make_policy,
        {
            "train": {"batch": 2, "tokens": 13},
            "exact": {"batch": 2, "tokens": 21, "eps": 0.0, "dim": 16},
            "large_eps": {"batch": 2, "tokens": 9, "eps": 0.01, "scale": 1.0},
            "wide": {"batch": 1, "tokens": 70, "heads": 3, "dim": 64},
            "all_kept": {"batch": 2, "tokens": 5, "keep": 101},
            "all_dropped": {"batch": 2, "tokens": 5, "keep": 0},
            "one": {"batch": 1, "tokens": 1, "heads": 1, "dim": 1},
            "no_tokens": {"batch": 2, "tokens": 0},
            "no_images": {"batch": 0, "tokens": 3},
        },
        lambda n: {"batch": 2, "tokens": n, "heads": 3},
        {
            "batch": (0, 2),
            "tokens": (0, 20),
            "heads": (1, 3),
            "dim": (1, 20),
            "keep": (0, 101),
            "eps": [0.0, 1e-6, 1e-2],
        },
        {"batch": 1, "tokens": 4, "dim": 3, "eps": 0.01},
        (*QKV, "policy"),
        frozenset({"policy"}),
        frozenset(VIEWS),
    ),
]


class TestBattery(Conformance):
    specs = SPECS


# ---------------------------------------------------------------- what the family promises besides


def packed(*shape, seed=0, device="cpu", dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def test_equals_scaled_dot_product_attention(device):
    q, k, v = (packed(2, 3, 17, 16, seed=i, device=device) for i in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    flat = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    out, _ = ops.sparse_attention(*flat, cu_seqlens_q=ints([0, 17, 34], device), max_seqlen_q=17)
    torch.testing.assert_close(out.view(2, 17, 3, 16).transpose(1, 2), expected)


def test_packed_qkv_is_not_copied_and_equals_the_parts(device):
    qkv = packed(12, 3, 2, 8, device=device)
    cu = ints([0, 5, 12], device)
    out = ops.sparse_attention_qkvpacked(qkv, cu_seqlens=cu, max_seqlen=7)
    parts = [t.contiguous() for t in qkv.unbind(1)]
    assert_same(out, ops.sparse_attention(*parts, cu_seqlens_q=cu, max_seqlen_q=7))


def test_index_equals_gathered_rows(device):
    x = packed(2, 9, 3, 4, 8, device=device)
    index = ops.select_tokens(
        torch.tensor([[1, 0, 1, 1, 0, 0, 1, 0, 1], [0, 0, 1, 0, 0, 0, 0, 0, 1]], device=device) > 0
    )
    gathered = ops.gather_tokens(x.view(18, -1), index).view(-1, 3, 4, 8)
    options = {"cu_seqlens": index.cu_seqlens, "max_seqlen": index.max_seqlen, "want_cls": True}
    direct = ops.sparse_attention_qkvpacked(x.view(18, 3, 4, 8), index=index, **options)
    assert_same(direct, ops.sparse_attention_qkvpacked(gathered, **options))


def test_hidden_keys_equal_absent_keys(device):
    q, k, v = (packed(8, 2, 16, seed=i, device=device) for i in range(3))
    hidden = torch.tensor([0, 1, 0, 0, 1, 1, 0, 0], device=device) > 0
    bias = torch.zeros(8, device=device).masked_fill(hidden, float("-inf"))
    out, lse = attention(q, k, v, ints([0, 8], device), key_bias=bias, max_q=8)
    cu_q, cu_k = ints([0, 8], device), ints([0, 5], device)
    expected = attention(q, k[~hidden], v[~hidden], cu_q, cu_k, max_q=8, max_k=5)
    torch.testing.assert_close((out, lse), expected)


@pytest.mark.parametrize("kind", ["cls", "mean"])
def test_scores_of_a_sequence_sum_to_one(kind, device):
    q, k, v = (packed(11, 2, 16, seed=i, device=device) for i in range(3))
    cu = ints([0, 4, 4, 11], device)
    _, lse, cls = ops.sparse_attention(q, k, v, cu_seqlens_q=cu, max_seqlen_q=7, want_cls=True)
    result = scores(q, k, lse, cu, max_q=7, kind=kind)
    assert result.dtype == torch.float32
    sums = torch.stack([result[:, :4].sum(1), result[:, 4:].sum(1)])
    torch.testing.assert_close(sums, torch.ones_like(sums))
    if kind == "cls":
        torch.testing.assert_close(cls, result)


def test_large_logits_do_not_overflow(device):
    q = packed(6, 1, 4, device=device) * 1e3
    out, lse = attention(q, q, q, ints([0, 6], device), max_q=6)
    expected = oracle_attention(*[q.double().cpu()] * 3, ints([0, 6]))
    torch.testing.assert_close((out.cpu().double(), lse.cpu().double()), expected, rtol=1e-4, atol=1e-2)


def test_all_keys_hidden_gives_zero_and_finite_gradients(device):
    leaves = [packed(5, 2, 8, seed=i, device=device).requires_grad_() for i in range(3)]
    bias = torch.full((5,), float("-inf"), device=device)
    out, lse, cls = ops.sparse_attention(
        *leaves, cu_seqlens_q=ints([0, 5], device), max_seqlen_q=5, key_bias=bias, want_cls=True
    )
    assert out.abs().max() == 0 and cls.abs().max() == 0 and (lse == float("-inf")).all()
    for g in torch.autograd.grad(out.sum() + cls.sum(), leaves, allow_unused=True):
        assert g is None or g.abs().max() == 0


def test_policy_one_is_plain_attention_and_exact_policy_equals_gathering(device):
    q, k, v = (packed(1, 9, 2, 8, seed=i, device=device) for i in range(3))
    plain = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v))
    ).transpose(1, 2)
    torch.testing.assert_close(ops.policy_attention(q, k, v, torch.ones(1, 9, device=device), 0.0), plain)
    keep = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 0], device=device) > 0
    masked = ops.policy_attention(q, k, v, keep[None].float(), 0.0)[:, keep]
    gathered = [t[:, keep].transpose(1, 2) for t in (q, k, v)]
    torch.testing.assert_close(
        masked.transpose(1, 2), torch.nn.functional.scaled_dot_product_attention(*gathered)
    )


@needs_library
def test_flops_are_counted(device):
    q = packed(12, 2, 8, device=device).requires_grad_()
    cu = ints([0, 5, 12], device)
    with FlopCounterMode(display=False) as counter:
        ops.sparse_attention(q, q, q, cu_seqlens_q=cu, max_seqlen_q=7)[0].sum().backward()
    forward = 4 * 2 * 8 * (5 * 5 + 7 * 7)
    assert counter.get_total_flops() == forward * 7 // 2 or device.type == "cuda"


@needs_library
def test_separate_query_and_key_index(device):
    q, k, v = (packed(9, 2, 8, seed=i, device=device).requires_grad_() for i in range(3))
    qi, ki = ints([8, 0, 3, 3], device), ints([1, 7, 2, 5, 0, 4], device)
    cu_q, cu_k = ints([0, 1, 4], device), ints([0, 4, 6], device)
    out, lse, _ = raw.sparse_attention(q, k, v, cu_q, cu_k, 3, 4, None, qi, ki, 0.25, False)
    grads = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    plain = [t.index_select(0, i) for t, i in ((q, qi), (k, ki), (v, ki))]
    expected = raw.sparse_attention(*plain, cu_q, cu_k, 3, 4, None, None, None, 0.25, False)
    assert_same([out, lse], expected[:2])
    torch.testing.assert_close(grads, torch.autograd.grad(expected[0].sum() + expected[1].sum(), (q, k, v)))


# ---------------------------------------------------------------- errors

Q = torch.zeros(5, 2, 4)
CU = ints([0, 2, 5])
LSE = torch.zeros(2, 5)
P4 = torch.zeros(1, 5, 2, 4)
POLICY = torch.ones(1, 5)


def call_attention(**changes):
    arguments = {"q": Q, "k": Q, "v": Q, "cu_q": CU, "max_q": 3, **changes}
    return attention(**arguments)


def call_scores(**changes):
    arguments = {"q": Q, "k": Q, "lse": LSE, "cu_q": CU, "max_q": 3, **changes}
    return scores(**arguments)


META = torch.zeros(5, 2, 4, device="meta")
PUBLIC_ERRORS = {
    "q_rank": (ValueError, "q must", {"q": Q[0]}),
    "q_dtype": (TypeError, "q must", {"q": Q.int(), "k": Q.int(), "v": Q.int()}),
    "k_heads": (ValueError, "k must", {"k": Q[:, :1]}),
    "k_dtype": (TypeError, "k must", {"k": Q.half()}),
    "v_shape": (ValueError, "v must", {"v": Q[:4]}),
    "v_device": (ValueError, "v must", {"v": META}),
    "cu_rank": (ValueError, "cu_seqlens_q must", {"cu_q": CU[None]}),
    "cu_dtype": (TypeError, "cu_seqlens_q must", {"cu_q": CU.float()}),
    "cu_none": (ValueError, "cu_seqlens_q must", {"cu_q": CU[:0]}),
    "cu_device": (ValueError, "cu_seqlens_q must", {"cu_q": CU.to("meta")}),
    "cu_k_shape": (ValueError, "cu_seqlens_k must", {"cu_k": CU[:2]}),
    "max_negative": (ValueError, "max_seqlen_q must", {"max_q": -1}),
    "bias_shape": (ValueError, "key_bias must", {"key_bias": torch.zeros(4)}),
    "bias_device": (ValueError, "key_bias must", {"key_bias": torch.zeros(5, device="meta")}),
    "index_dtype": (TypeError, "index must", {"index": torch.zeros(5)}),
    "index_rank": (ValueError, "index must", {"index": CU[None]}),
}


@pytest.mark.parametrize("case", PUBLIC_ERRORS)
def test_public_errors(case):
    error, rule, changes = PUBLIC_ERRORS[case]
    expect(error, "sparse_attention", rule, call_attention, **changes)
    if not {"v"} & set(changes):
        expect(error, "attention_scores", rule, call_scores, **changes)


def test_public_errors_of_scores_and_policy():
    expect(ValueError, "attention_scores", "kind must", call_scores, kind="max")
    expect(ValueError, "attention_scores", "lse must", call_scores, lse=LSE.t())
    expect(TypeError, "attention_scores", "lse must", call_scores, lse=LSE.double())
    expect(ValueError, "attention_scores", "lse must", call_scores, lse=LSE.to("meta"))
    expect(
        ValueError,
        "sparse_attention_qkvpacked",
        "qkv must",
        ops.sparse_attention_qkvpacked,
        Q,
        cu_seqlens=CU,
        max_seqlen=3,
    )
    expect(ValueError, "policy_attention", "q must", ops.policy_attention, Q, Q, Q, POLICY)
    expect(ValueError, "policy_attention", "k must", ops.policy_attention, P4, P4[:, :4], P4, POLICY)
    expect(TypeError, "policy_attention", "v must", ops.policy_attention, P4, P4, P4.half(), POLICY)
    expect(ValueError, "policy_attention", "policy must", ops.policy_attention, P4, P4, P4, POLICY[..., None])
    expect(ValueError, "policy_attention", "policy must", ops.policy_attention, P4, P4, P4, POLICY.to("meta"))
    expect(ValueError, "policy_attention", "eps must", ops.policy_attention, P4, P4, P4, POLICY, -1.0)


def raw_attention(q=Q, k=Q, v=Q, cu_q=CU, cu_k=CU, max_q=3, max_k=3, bias=None, qi=None, ki=None):
    return raw.sparse_attention(q, k, v, cu_q, cu_k, max_q, max_k, bias, qi, ki, 0.5, False)


RAW_ERRORS = {
    "q_rank": ("q must", {"q": Q[0]}),
    "q_dtype": ("q must", {"q": Q.int(), "k": Q.int(), "v": Q.int()}),
    "k_heads": ("k must", {"k": Q[:, :1]}),
    "k_dtype": ("k must", {"k": Q.half()}),
    "v_rows": ("v must", {"v": Q[:4]}),
    "cu_dtype": ("cu_seqlens_q must", {"cu_q": CU.long()}),
    "cu_none": ("cu_seqlens_q must", {"cu_q": CU[:0], "cu_k": CU[:0]}),
    "cu_k_shape": ("cu_seqlens_k must", {"cu_k": CU[:2]}),
    "max_negative": ("max_seqlen_q must", {"max_q": -1}),
    "bias_dtype": ("key_bias must", {"bias": torch.zeros(5).double()}),
    "bias_shape": ("key_bias must", {"bias": torch.zeros(4)}),
    "q_index_dtype": ("q_index must", {"qi": torch.zeros(5, dtype=torch.int64)}),
    "kv_index_rank": ("kv_index must", {"ki": CU[None]}),
}


@needs_library
@pytest.mark.parametrize("case", RAW_ERRORS)
def test_raw_errors(case):
    rule, changes = RAW_ERRORS[case]
    expect(RuntimeError, "sparse_attention", rule, raw_attention, **changes)


@needs_library
def test_raw_errors_of_scores_and_policy():
    tail = (CU, CU, 3, 3, None, None, None, 0.5)
    expect(RuntimeError, "attention_scores", "lse must", raw.attention_scores, Q, Q, LSE.t(), *tail, 0)
    expect(RuntimeError, "attention_scores", "lse must", raw.attention_scores, Q, Q, LSE.double(), *tail, 0)
    expect(RuntimeError, "attention_scores", "kind must", raw.attention_scores, Q, Q, LSE, *tail, 2)
    expect(
        RuntimeError,
        "attention_scores_grad_lse",
        "grad must",
        raw.attention_scores_grad_lse,
        LSE.t(),
        Q,
        Q,
        LSE,
        *tail,
        0,
    )
    backward = raw.sparse_attention_backward
    expect(
        RuntimeError,
        "sparse_attention_backward",
        "grad_out must",
        backward,
        Q[:4],
        Q,
        Q,
        Q,
        Q,
        LSE,
        None,
        None,
        0,
        *tail,
    )
    expect(
        RuntimeError,
        "sparse_attention_backward",
        "out must",
        backward,
        Q,
        Q,
        Q,
        Q,
        None,
        LSE,
        None,
        None,
        0,
        *tail,
    )
    expect(
        RuntimeError,
        "sparse_attention_backward",
        "grad_lse must",
        backward,
        Q,
        Q,
        Q,
        Q,
        Q,
        LSE,
        LSE[:1],
        None,
        0,
        *tail,
    )
    expect(RuntimeError, "policy_attention", "q must", raw.policy_attention, Q, Q, Q, POLICY, 0.0, 0.5)
    expect(
        RuntimeError, "policy_attention", "k must", raw.policy_attention, P4, P4[:, :4], P4, POLICY, 0.0, 0.5
    )
    expect(
        RuntimeError,
        "policy_attention",
        "policy must",
        raw.policy_attention,
        P4,
        P4,
        P4,
        POLICY.double(),
        0.0,
        0.5,
    )
    expect(
        RuntimeError,
        "policy_attention",
        "policy must",
        raw.policy_attention,
        P4,
        P4,
        P4,
        POLICY.t(),
        0.0,
        0.5,
    )


BAD_STARTS = {
    "not_from_zero": [1, 2, 5],
    "negative": [-1, 2, 5],
    "decreasing": [0, 3, 2],
    "beyond_the_data": [0, 2, 6],
    "longer_than_the_maximum": [0, 1, 5],
}


@needs_library
@pytest.mark.parametrize("bad", BAD_STARTS)
def test_cu_seqlens_contents_are_checked_on_the_cpu(bad):
    cu = ints(BAD_STARTS[bad])
    expect(RuntimeError, "sparse_attention", "cu_seqlens_q must", call_attention, cu_q=cu, cu_k=CU, max_k=3)
    expect(RuntimeError, "sparse_attention", "cu_seqlens_k must", call_attention, cu_k=cu, max_k=3)
    expect(RuntimeError, "attention_scores", "cu_seqlens_q must", call_scores, cu_q=cu, cu_k=CU, max_k=3)
    expect(RuntimeError, "sparse_attention", "cu_seqlens_q must", raw_attention, cu_q=cu)
    expect(RuntimeError, "sparse_attention", "cu_seqlens_k must", raw_attention, cu_k=cu)
    tail = (cu, CU, 3, 3, None, None, None, 0.5)
    backward = raw.sparse_attention_backward
    expect(
        RuntimeError,
        "sparse_attention_backward",
        "cu_seqlens_q must",
        backward,
        Q,
        Q,
        Q,
        Q,
        Q,
        LSE,
        None,
        None,
        0,
        *tail,
    )


@needs_library
@pytest.mark.parametrize("bad", [[0, 1, 2, 3, 5], [0, 1, 2, 3, -2]], ids=["large", "negative"])
def test_index_contents_are_checked_on_the_cpu(bad):
    index = ints(bad)
    expect(RuntimeError, "sparse_attention", "q_index must", call_attention, index=index)
    expect(RuntimeError, "sparse_attention", "kv_index must", raw_attention, ki=index)
    expect(RuntimeError, "attention_scores", "q_index must", call_scores, index=index)
