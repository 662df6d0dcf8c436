# SPDX-License-Identifier: Apache-2.0
"""What the attention ops promise besides the battery, and their errors."""

import pytest
import torch
from tokenprune_ext import _library, ops
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.conformance import assert_same, needs_library
from tests.ops.common import expect, ints
from tests.ops.test_attention import attention, oracle_attention, scores

raw = torch.ops.tokenprune


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


def test_heads_without_channels_attend_evenly(device):
    q, cu = torch.randn(3, 2, 0, device=device, requires_grad=True), ints([0, 3], device)
    out, lse, cls = ops.sparse_attention(q, q, q, cu_seqlens_q=cu, max_seqlen_q=3, want_cls=True)
    assert out.shape == (3, 2, 0) and torch.autograd.grad(out.sum(), q)[0].shape == q.shape
    torch.testing.assert_close(lse, torch.full_like(lse, 3).log())
    torch.testing.assert_close(cls, torch.full_like(cls, 1 / 3))
    padded = q.detach()[None]
    assert ops.policy_attention(padded, padded, padded, torch.ones(1, 3, device=device)).shape == (1, 3, 2, 0)


def test_large_logits_do_not_overflow(device):
    q = packed(6, 1, 4, device=device) * 1e3
    out, lse = attention(q, q, q, ints([0, 6], device), max_q=6)
    expected = oracle_attention(*[q.double().cpu()] * 3, ints([0, 6]))
    torch.testing.assert_close((out.cpu().double(), lse.cpu().double()), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("hidden", [float("-inf"), -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_values_where_later_keys_outweigh_all_before(dtype, hidden, device):
    q, k, v = (packed(n, 2, 16, seed=n, device=device, dtype=dtype) for n in (53, 1251, 1251))
    rising = torch.linspace(-30, 100, 1251, device=device)
    bias = torch.where(rising < 0, hidden, rising + 100)  # over several blocks of keys
    cu_q, cu_k = ints([0, 50, 53], device), ints([0, 1100, 1251], device)
    found = attention(q, k, v, cu_q, cu_k, key_bias=bias, max_q=50, max_k=1100, cls=True)
    exact = [t.double().cpu() for t in (q, k, v)]
    expected = oracle_attention(*exact, cu_q.cpu(), cu_k.cpu(), key_bias=bias.double().cpu(), cls=True)
    for f, e, tolerance in zip(found, expected, (1e-5 if dtype == torch.float32 else 1e-2, 1e-5, 1e-5)):
        torch.testing.assert_close(f.double().cpu(), e, rtol=tolerance, atol=tolerance)


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
    plain = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(ops.policy_attention(q, k, v, torch.ones(1, 9, device=device), 0.0), plain)
    keep = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1, 0], device=device) > 0
    masked = ops.policy_attention(q, k, v, keep[None].float(), 0.0)[:, keep]
    gathered = [t[:, keep].transpose(1, 2) for t in (q, k, v)]
    torch.testing.assert_close(masked.transpose(1, 2), torch.nn.functional.scaled_dot_product_attention(*gathered))


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


@pytest.mark.parametrize("index", [None, [8, 0, 3, 3]])
def test_keys_may_have_an_index_of_their_own(index, device):
    q, k, v = (packed(9, 2, 8, seed=i, device=device).requires_grad_() for i in range(3))
    keys = ints([1, 7, 2, 5, 0, 4], device)
    queries = None if index is None else ints(index, device)
    starts = {"cu_seqlens_q": ints([0, 1, 4], device), "cu_seqlens_k": ints([0, 4, 6], device)}
    starts |= {"max_seqlen_q": 3, "max_seqlen_k": 4, "key_bias": torch.linspace(-1, 1, 6, device=device)}
    out = ops.sparse_attention(q, k, v, index=queries, index_k=keys, **starts)
    plain = [q if index is None else q[queries.long()], k[keys.long()], v[keys.long()]]
    expected = ops.sparse_attention(*plain, **starts)
    torch.testing.assert_close(out, expected)
    grads = [torch.autograd.grad(o[0].sin().sum() + o[1][:, :4].sum(), (q, k, v)) for o in (out, expected)]
    torch.testing.assert_close(*grads)
    with pytest.raises(TypeError, match="index_k must be int32 or int64"):
        ops.sparse_attention(q, k, v, index_k=keys.float(), **starts)


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
    expect(RuntimeError, "policy_attention", "k must", raw.policy_attention, P4, P4[:, :4], P4, POLICY, 0.0, 0.5)
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
    "beyond": [0, 2, 6],
}


@needs_library
@pytest.mark.parametrize("bad", BAD_STARTS)
def test_cu_seqlens_contents_are_checked_on_the_cpu(bad):
    cu = ints(BAD_STARTS[bad])
    both = {"max_q": 9, "max_k": 9}
    expect(RuntimeError, "sparse_attention", "cu_seqlens_q must", call_attention, cu_q=cu, cu_k=CU, **both)
    expect(RuntimeError, "sparse_attention", "cu_seqlens_k must", call_attention, cu_k=cu, **both)
    expect(RuntimeError, "attention_scores", "cu_seqlens_q must", call_scores, cu_q=cu, cu_k=CU, **both)
    expect(RuntimeError, "sparse_attention", "cu_seqlens_q must", raw_attention, cu_q=cu, **both)
    expect(RuntimeError, "sparse_attention", "cu_seqlens_k must", raw_attention, cu_k=cu, **both)
    op, rest = (
        "sparse_attention_backward",
        (Q, Q, Q, Q, Q, LSE, None, None, 0, cu, CU, 9, 9, None, None, None, 0.5),
    )
    expect(RuntimeError, op, "cu_seqlens_q must", getattr(raw, op), *rest)


@needs_library
def test_a_sequence_longer_than_the_maximum_is_an_error():
    expect(RuntimeError, "sparse_attention", "max_seqlen_q must", call_attention, max_q=2, max_k=3)
    expect(RuntimeError, "sparse_attention", "max_seqlen_k must", raw_attention, max_k=2)


@needs_library
def test_a_bound_may_be_far_too_large():
    q, k, v = (torch.randn(6, 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    results = []
    for bound in (4, 2**40):
        out, lse = ops.sparse_attention(q, k, v, cu_seqlens_q=ints([0, 2, 6]), max_seqlen_q=bound)
        scores = ops.attention_scores(q, k, lse, "mean", cu_seqlens_q=ints([0, 2, 6]), max_seqlen_q=bound)
        loss = (out**2).sum() + (scores**2).sum()
        results.append([out, scores, *torch.autograd.grad(loss, (q, k, v))])
    assert_same(*results)


@needs_library
@pytest.mark.parametrize("bad", [[0, 1, 2, 3, 5], [0, 1, 2, 3, -2]], ids=["large", "negative"])
def test_index_contents_are_checked_on_the_cpu(bad):
    index = ints(bad)
    expect(RuntimeError, "sparse_attention", "q_index must", call_attention, index=index)
    expect(RuntimeError, "sparse_attention", "kv_index must", raw_attention, ki=index)
    expect(RuntimeError, "attention_scores", "q_index must", call_scores, index=index)


def test_no_token_inside_a_sequence_is_harmless(device):
    """-1 within a sequence: memory-safe and finite, and the other sequences do not notice."""
    x = packed(9, 3, 2, 8, device=device)
    cu = ints([0, 3, 6], device)
    options = {"cu_seqlens": cu, "max_seqlen": 3}
    whole = ops.sparse_attention_qkvpacked(x, index=ints([4, 0, 2, 8, 1, 3], device), **options)
    holed = ops.sparse_attention_qkvpacked(x, index=ints([4, -1, 2, 8, 1, 3], device), **options)
    assert holed[0].isfinite().all() and not holed[1].isnan().any()
    assert_same([holed[0][3:], holed[1][:, 3:]], [whole[0][3:], whole[1][:, 3:]])


@pytest.mark.skipif(not _library.cuda_loaded(), reason="the reference takes any width")
def test_heads_too_wide_for_the_cuda_kernels_are_refused_before_any_launch():
    with FakeTensorMode():  # shapes on a CUDA device, without one
        q = torch.empty(6, 2, 192, device="cuda")
        cu = torch.tensor([0, 6], dtype=torch.int32, device="cuda")
        rule = "the head dimension on CUDA must be <= 128, got 192"
        expect(ValueError, "sparse_attention", rule, ops.sparse_attention, q, q, q, cu_seqlens_q=cu, max_seqlen_q=6)
        q, policy = torch.empty(1, 6, 2, 192, device="cuda"), torch.empty(1, 6, device="cuda")
        expect(ValueError, "policy_attention", rule, ops.policy_attention, q, q, q, policy)
        narrow = q[..., :128]
        assert ops.policy_attention(narrow, narrow, narrow, policy).shape == narrow.shape
