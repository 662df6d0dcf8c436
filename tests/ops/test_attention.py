# SPDX-License-Identifier: Apache-2.0
"""Ragged attention, attention scores and attention under a key policy."""

import torch
from tokenprune_ext import ops

from tests.conformance import Conformance, OpSpec, Sample

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
    """Sequence lengths ``q`` and ``k`` (None: as q); ``spare`` rows of no sequence; ``rows`` to index into."""
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


def attention(q, k, v, cu_q, cu_k=None, key_bias=None, index=None, max_q=0, max_k=None, scale=None, cls=False):
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


def scores(q, k, lse, cu_q, cu_k=None, key_bias=None, index=None, max_q=0, max_k=None, scale=None, kind="cls"):
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


def oracle_attention(q, k, v, cu_q, cu_k=None, key_bias=None, index=None, max_q=0, max_k=0, scale=None, cls=False):
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


def oracle_scores(q, k, lse, cu_q, cu_k=None, key_bias=None, index=None, max_q=0, max_k=0, scale=None, kind="cls"):
    logits, allowed, number = pairs(q, k, cu_q, cu_k, key_bias, index, scale)
    probabilities = torch.where(allowed, (logits - torch.where(lse > float("-inf"), lse, 0)[..., None]).exp(), 0)
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
    return torch.einsum("bhqk,bkhd->bqhd", (weights + eps / tokens) / (weights.sum(-1, keepdim=True) + eps), v)


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
    spec("qkvpacked", qkvpacked, oracle_attention, make_ragged, {"ragged": LENGTHS["ragged"], **INDEXED}, QKV),
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
