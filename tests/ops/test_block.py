# SPDX-License-Identifier: Apache-2.0
"""Halves of a block in one call: against plain PyTorch, and the rules."""

import pytest
import torch
import torch.nn.functional as F
from tokenprune_ext import ops

from tests.conformance import Conformance, OpSpec, Sample, assert_same, needs_library
from tests.ops.common import expect
from tests.ops.test_merge import oracle_whole
from tests.ops.test_sorting import make_sequences, oracle_groups, oracle_tokens
from tests.spec import DTYPES

SCHEMAS = [
    "packed_attention(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor packed_qkv, "
    "Tensor? bias_qkv, Tensor packed_proj, Tensor? bias_proj, Tensor? layer_scale, SymInt num_heads, SymInt head_dim, "
    "Tensor? indices, Tensor? cu_seqlens, SymInt max_seqlen, Tensor? key_bias, float scale, bool want_cls) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    "packed_attention_merged(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor packed_qkv, "
    "Tensor? bias_qkv, Tensor packed_proj, Tensor? bias_proj, Tensor? layer_scale, SymInt num_heads, SymInt head_dim, "
    "Tensor? key_bias, float scale, SymInt r, Tensor? size, bool class_token, bool distill_token, SymInt num_prefix) "
    "-> (Tensor y, Tensor size_out, Tensor log_size, Tensor parent)",
    "packed_attention_sampled(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor packed_qkv, "
    "Tensor? bias_qkv, Tensor packed_proj, Tensor? bias_proj, Tensor? layer_scale, SymInt num_heads, SymInt head_dim, "
    "Tensor? cu_seqlens, SymInt max_seqlen, Tensor? key_bias, float scale, Tensor initial, SymInt num_prefix, bool drop) "
    "-> (Tensor y, Tensor rows, Tensor source, Tensor cu_seqlens)",
    "packed_attention_grouped(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor packed_qkv, "
    "Tensor? bias_qkv, Tensor packed_proj, Tensor? bias_proj, Tensor? layer_scale, SymInt num_heads, SymInt head_dim, "
    "Tensor? cu_seqlens, SymInt max_seqlen, Tensor? key_bias, float scale, Tensor projection, Tensor offset, "
    "float width) -> (Tensor y, Tensor ids)",
    "packed_mlp(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float norm_eps, Tensor packed_1, Tensor? bias_1, "
    "SymInt hidden, int act, Tensor packed_2, Tensor? bias_2, Tensor? layer_scale) -> Tensor",
]

CPU_ONLY = True  # elsewhere the vendor's library packs weights by itself


# ---------------------------------------------------------------- samples and functions under test


def _normal(rng):
    return lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)


def make_attention(rng, lengths, heads, dim, channels, *, padded=False, full=False, want_cls=False, stored=0):
    normal, width, rows = _normal(rng), heads * dim, sum(lengths)
    x = normal(len(lengths), lengths[0] if lengths else 0, channels) if padded else normal(stored or rows, channels)
    tensors = {
        "x": x + 0.5,
        "qkv": normal(3 * width, channels) / channels**0.5,
        "proj": normal(channels, width) / max(width, 1) ** 0.5,
    }
    if full:
        tensors |= {"norm_weight": normal(channels), "norm_bias": normal(channels), "bias_qkv": normal(3 * width)}
        tensors |= {"bias_proj": normal(channels), "layer_scale": normal(channels)}
    stats = {"key_bias": normal(rows)} if full else {}
    if not padded:
        tensors["cu_seqlens"] = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    if stored:
        tensors["index"] = torch.randint(-1, stored, (rows,), generator=rng).to(torch.int32)
    return Sample(tensors | stats, {"heads": heads, "dim": dim, "want_cls": want_cls, "most": max(lengths, default=0)})


def run_attention(
    x,
    qkv,
    proj,
    norm_weight=None,
    norm_bias=None,
    bias_qkv=None,
    bias_proj=None,
    layer_scale=None,
    key_bias=None,
    cu_seqlens=None,
    index=None,
    *,
    heads,
    dim,
    want_cls,
    most,
):
    got = ops.packed_attention(
        x,
        (ops.pack_linear(qkv), bias_qkv),
        (ops.pack_linear(proj), bias_proj),
        norm=(norm_weight, norm_bias, 1e-6),
        num_heads=heads,
        head_dim=dim,
        layer_scale=layer_scale,
        index=index,
        cu_seqlens=cu_seqlens,
        max_seqlen=most,
        key_bias=key_bias,
        want_cls=want_cls,
    )
    got = tuple(t.to(x.dtype) for t in got)  # statistics of rounded queries and keys are not better than those
    return got if want_cls else got[:3]


def oracle_attention(
    x,
    qkv,
    proj,
    norm_weight=None,
    norm_bias=None,
    bias_qkv=None,
    bias_proj=None,
    layer_scale=None,
    key_bias=None,
    cu_seqlens=None,
    index=None,
    *,
    heads,
    dim,
    want_cls,
    most,
):
    z = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-6)
    if index is not None:
        x, z = (torch.cat((t, t.new_zeros(1, t.shape[1])))[index.long()] for t in (x, z))
    wide = F.linear(z, qkv, bias_qkv)
    flat = wide.reshape(-1, 3, heads, dim)
    lengths = [x.shape[1]] * x.shape[0] if cu_seqlens is None else cu_seqlens.diff().tolist()
    biases = flat.new_zeros(flat.shape[0]) if key_bias is None else key_bias
    mixed, lse, cls = [], [], []
    for part, bias in zip(flat.split(lengths), biases.split(lengths), strict=True):
        q, k, v = part.permute(1, 2, 0, 3)
        logits = q @ k.mT * dim**-0.5 + bias
        mixed.append((logits.softmax(-1) @ v).transpose(0, 1))
        lse.append(logits.logsumexp(-1))
        cls.append(logits[:, :1].softmax(-1).sum((0, 1)) / max(heads, 1))
    inner = torch.cat([flat[:0, 0], *mixed]).reshape(*x.shape[:-1], heads * dim)
    y = F.linear(inner, proj, bias_proj)
    y = x + (y if layer_scale is None else y * layer_scale)
    out = y, wide, torch.cat([flat.new_zeros(heads, 0), *lse], 1), torch.cat([flat.new_zeros(0), *cls])
    return out if want_cls else out[:3]


def make_merged(rng, batch, tokens, heads, dim, channels, r, *, sizes=True, full=False, **protected):
    made = make_attention(rng, [tokens] * batch, heads, dim, channels, padded=True, full=full)
    size = {"size": torch.randint(1, 5, (batch, tokens), generator=rng).double()} if sizes else {}
    return Sample(made.inputs | size, {"heads": heads, "dim": dim, "r": r, **protected})


def run_merged(x, qkv, proj, key_bias=None, size=None, layer_scale=None, *, heads, dim, r, **options):
    parts = {name: options.pop(name, None) for name in ("norm_weight", "norm_bias", "bias_qkv", "bias_proj")}
    return ops.packed_attention_merged(
        x,
        (ops.pack_linear(qkv), parts["bias_qkv"]),
        (ops.pack_linear(proj), parts["bias_proj"]),
        r,
        norm=(parts["norm_weight"], parts["norm_bias"], 1e-6),
        num_heads=heads,
        head_dim=dim,
        layer_scale=layer_scale,
        key_bias=key_bias,
        size=size,
        **options,
    )


def oracle_merged(x, qkv, proj, size=None, *, heads, dim, r, **options):
    protected = {n: options.pop(n) for n in ("class_token", "distill_token", "num_prefix") if n in options}
    y, wide, _ = oracle_attention(x, qkv, proj, heads=heads, dim=dim, want_cls=False, most=x.shape[1], **options)
    keys = wide.reshape(*x.shape[:2], 3, heads, dim)[:, :, 1]
    return oracle_whole(y, keys, r, size, **protected)


def make_sampled(rng, lengths, heads, dim, channels, *, points=None, prefix=1, hidden=False, drop=True, **options):
    made = make_attention(rng, lengths, heads, dim, channels, **options)
    sequences = make_sequences(rng, lengths, points=points, prefix=prefix, hidden=hidden).inputs
    if hidden:
        sequences["key_bias"][sequences["cu_seqlens"][:-1].long()] = 0  # a class token sees itself
    made.inputs["qkv"][: heads * dim] *= 4  # attention that differs enough to drop some
    tensors = {name: sequences[name] for name in ("initial", "key_bias") if name in sequences}
    return Sample(
        made.inputs | tensors,
        {"heads": heads, "dim": dim, "most": max(lengths, default=prefix), "prefix": prefix, "drop": drop},
    )


def run_sampled(
    x, qkv, proj, initial, cu_seqlens=None, key_bias=None, layer_scale=None, *, heads, dim, most, prefix, drop, **parts
):
    return ops.packed_attention_sampled(
        x,
        (ops.pack_linear(qkv), parts.get("bias_qkv")),
        (ops.pack_linear(proj), parts.get("bias_proj")),
        initial,
        norm=(parts.get("norm_weight"), parts.get("norm_bias"), 1e-6),
        num_heads=heads,
        head_dim=dim,
        layer_scale=layer_scale,
        cu_seqlens=cu_seqlens,
        max_seqlen=most,
        num_prefix=prefix,
        key_bias=key_bias,
        drop=drop,
    )


def oracle_sampled(x, qkv, proj, initial, cu_seqlens=None, key_bias=None, *, heads, dim, most, prefix, drop, **parts):
    """What is kept of the whole half block."""
    padded = cu_seqlens is None
    if padded:
        cu_seqlens, most = torch.arange(x.shape[0] + 1) * x.shape[1], x.shape[1]
    x, sizes = x.flatten(0, -2), {"heads": heads, "dim": dim}
    whole = {"cu_seqlens": cu_seqlens, "key_bias": key_bias, **parts}
    y, wide, _, cls = oracle_attention(x, qkv, proj, **whole, **sizes, want_cls=True, most=most)
    v = wide.view(-1, 3, heads, dim)[:, 2]
    options = {"max_seqlen": most, "num_prefix": prefix, "padded": padded, "drop": drop}
    rows, source, starts = oracle_tokens(cls[None], v, initial, cu_seqlens, key_bias, **options)
    kept = torch.cat([y, y.new_zeros(1, y.shape[1])])[source.long()]
    return kept.view(*rows.shape, -1) if padded else kept, rows, source, starts


def make_grouped(rng, lengths, heads, dim, channels, hashes, *, width=1.0, **options):
    made = make_attention(rng, lengths, heads, dim, channels, **options)
    draws = {"projection": _normal(rng)(dim, hashes), "offset": torch.rand(hashes, generator=rng).double()}
    sizes = {"heads": heads, "dim": dim, "most": max(lengths, default=0), "width": width}
    return Sample(made.inputs | draws, sizes)


def run_grouped(
    x,
    qkv,
    proj,
    projection,
    offset,
    cu_seqlens=None,
    key_bias=None,
    layer_scale=None,
    *,
    heads,
    dim,
    most,
    width,
    **parts,
):
    return ops.packed_attention_grouped(
        x,
        (ops.pack_linear(qkv), parts.get("bias_qkv")),
        (ops.pack_linear(proj), parts.get("bias_proj")),
        projection,
        offset,
        norm=(parts.get("norm_weight"), parts.get("norm_bias"), 1e-6),
        num_heads=heads,
        head_dim=dim,
        layer_scale=layer_scale,
        cu_seqlens=cu_seqlens,
        max_seqlen=most,
        key_bias=key_bias,
        width=width,
    )


def oracle_grouped(
    x,
    qkv,
    proj,
    projection,
    offset,
    norm_weight=None,
    norm_bias=None,
    bias_qkv=None,
    bias_proj=None,
    layer_scale=None,
    key_bias=None,
    cu_seqlens=None,
    *,
    heads,
    dim,
    most,
    width,
):
    z = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-6)
    flat = F.linear(z, qkv, bias_qkv).reshape(-1, 3, heads, dim)
    lengths = [x.shape[1]] * x.shape[0] if cu_seqlens is None else cu_seqlens.diff().tolist()
    biases = flat.new_zeros(flat.shape[0]) if key_bias is None else key_bias
    mixed, found = [], torch.full((len(lengths), heads, x.shape[1] if cu_seqlens is None else most), -1).int()
    for image, (part, bias) in enumerate(zip(flat.split(lengths), biases.split(lengths), strict=True)):
        q, k, v = part.permute(1, 2, 0, 3)
        ids, _ = oracle_groups(q, projection, offset, width=width, scale=dim**-0.5)
        found[image, :, : ids.shape[1]] = ids
        alike = (ids[:, :, None] == ids[:, None]).to(q)
        means = alike @ q / alike.sum(-1, keepdim=True)
        mixed.append(((means @ k.mT * dim**-0.5 + bias).softmax(-1) @ v).transpose(0, 1))
    inner = torch.cat([flat[:0, 0], *mixed]).reshape(*x.shape[:-1], heads * dim)
    y = F.linear(inner, proj, bias_proj)
    return x + (y if layer_scale is None else y * layer_scale), found


def make_mlp(rng, lead, channels, hidden, *, act="gelu", full=False):
    normal = _normal(rng)
    tensors = {
        "x": normal(*lead, channels) + 0.5,
        "first": normal(hidden, channels) / channels**0.5,
        "second": normal(channels, hidden) / max(hidden, 1) ** 0.5,
    }
    if full:
        tensors |= {"norm_weight": normal(channels), "norm_bias": normal(channels), "bias_1": normal(hidden)}
        tensors |= {"bias_2": normal(channels), "layer_scale": normal(channels)}
    return Sample(tensors, {"act": act})


def run_mlp(
    x, first, second, norm_weight=None, norm_bias=None, bias_1=None, bias_2=None, layer_scale=None, *, act="gelu"
):
    return ops.packed_mlp(
        x,
        (ops.pack_linear(first), bias_1),
        (ops.pack_linear(second), bias_2),
        norm=(norm_weight, norm_bias, 1e-6),
        hidden=first.shape[0],
        act=act,
        layer_scale=layer_scale,
    )


def oracle_mlp(
    x, first, second, norm_weight=None, norm_bias=None, bias_1=None, bias_2=None, layer_scale=None, *, act="gelu"
):
    h = F.linear(F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-6), first, bias_1)
    h = h * torch.sigmoid(1.702 * h) if act == "quick_gelu" else F.gelu(h) if act == "gelu" else h
    y = F.linear(h, second, bias_2)
    return x + (y if layer_scale is None else y * layer_scale)


IMAGE = {"batch": 1, "tokens": 33, "heads": 3, "dim": 16, "channels": 48, "r": 7}

SPECS = [
    OpSpec(
        "packed_attention",
        run_attention,
        oracle_attention,
        make_attention,
        cases={
            "padded": {"lengths": [33, 33], "heads": 3, "dim": 16, "channels": 48, "padded": True, "full": True},
            "ragged": {"lengths": [5, 0, 70, 1], "heads": 2, "dim": 32, "channels": 40, "full": True, "want_cls": True},
            "indexed": {"lengths": [9, 40], "heads": 2, "dim": 16, "channels": 40, "full": True, "stored": 23},
            "one_token": {"lengths": [1], "heads": 1, "dim": 8, "channels": 8, "padded": True, "want_cls": True},
            "wide_heads": {"lengths": [50], "heads": 2, "dim": 80, "channels": 64, "padded": True},
            "no_tokens": {"lengths": [0, 0], "heads": 2, "dim": 8, "channels": 16, "padded": True, "full": True},
            "no_images": {"lengths": [], "heads": 2, "dim": 8, "channels": 16},
        },
        sized=lambda tokens: {"lengths": [tokens], "heads": 2, "dim": 16, "channels": 32, "padded": True},
        fuzz={
            "lengths": [[3], [40, 1], [0, 9, 64], [17] * 5],
            "heads": (1, 4),
            "dim": (1, 48),
            "channels": (1, 70),
            "full": [False, True],
            "want_cls": [False, True],
        },
    ),
    OpSpec(
        "packed_attention_merged",
        run_merged,
        oracle_merged,
        make_merged,
        cases={
            "class": {**IMAGE, "class_token": True, "full": True},
            "distill": {**IMAGE, "batch": 2, "class_token": True, "distill_token": True},
            "prefix": {**IMAGE, "tokens": 34, "num_prefix": 5, "full": True},
            "no_sizes": {**IMAGE, "sizes": False},
            "clamped": {**IMAGE, "r": 100},
        },
        sized=lambda tokens: {**IMAGE, "tokens": tokens, "r": 2, "class_token": True},
        fuzz={
            "batch": (1, 2),
            "tokens": (3, 40),
            "heads": (1, 3),
            "dim": (2, 40),
            "channels": (1, 60),
            "r": (1, 30),
            "full": [False, True],
            "num_prefix": [None, 1],
        },
        dtypes=(torch.float32, torch.float64),  # in others rounding moves the matches: see below
        stats=frozenset({"size"}),
    ),
    OpSpec(
        "packed_attention_sampled",
        run_sampled,
        oracle_sampled,
        make_sampled,
        cases={
            "image": {"lengths": [60], "heads": 3, "dim": 16, "channels": 48, "padded": True, "full": True},
            "padded": {"lengths": [33] * 3, "heads": 3, "dim": 16, "channels": 48, "padded": True, "points": 50},
            "fixed": {"lengths": [33] * 3, "heads": 2, "dim": 9, "channels": 20, "padded": True, "drop": False},
            "hidden": {"lengths": [40] * 2, "heads": 2, "dim": 16, "channels": 48, "padded": True, "hidden": True},
            "ragged": {"lengths": [5, 70, 2, 1], "heads": 2, "dim": 32, "channels": 40, "full": True, "points": 90},
            "prefix": {"lengths": [20, 41], "heads": 2, "dim": 16, "channels": 40, "hidden": True, "prefix": 2},
            "no_images": {"lengths": [], "heads": 2, "dim": 8, "channels": 16},
        },
        sized=lambda tokens: {"lengths": [tokens, tokens], "heads": 2, "dim": 16, "channels": 32, "padded": True},
        fuzz={
            "lengths": [[3], [40, 1], [1, 9, 64], [17] * 5],
            "heads": (1, 4),
            "dim": (1, 48),
            "channels": (1, 70),
            "full": [False, True],
            "hidden": [False, True],
        },
        dtypes=(torch.float32, torch.float64),  # in others rounding moves the scores: see below
    ),
    OpSpec(
        "packed_attention_grouped",
        run_grouped,
        oracle_grouped,
        make_grouped,
        cases={
            "padded": {
                "lengths": [33] * 2,
                "heads": 3,
                "dim": 16,
                "channels": 48,
                "hashes": 5,
                "padded": True,
                "full": True,
            },
            "ragged": {"lengths": [5, 0, 70, 1], "heads": 2, "dim": 32, "channels": 40, "hashes": 3, "full": True},
            "alone": {"lengths": [20], "heads": 2, "dim": 9, "channels": 20, "hashes": 32, "width": 1e-3},
            "together": {"lengths": [20] * 2, "heads": 2, "dim": 9, "channels": 20, "hashes": 2, "width": 1e6},
            "one_token": {"lengths": [1], "heads": 1, "dim": 8, "channels": 8, "hashes": 4, "padded": True},
            "no_tokens": {"lengths": [0, 0], "heads": 2, "dim": 8, "channels": 16, "hashes": 4, "padded": True},
            "no_images": {"lengths": [], "heads": 2, "dim": 8, "channels": 16, "hashes": 4},
        },
        sized=lambda tokens: {
            "lengths": [tokens, tokens],
            "heads": 2,
            "dim": 16,
            "channels": 32,
            "hashes": 4,
            "padded": True,
        },
        fuzz={
            "lengths": [[3], [40, 1], [0, 9, 64], [17] * 5],
            "heads": (1, 4),
            "dim": (1, 48),
            "channels": (1, 70),
            "hashes": (1, 9),
            "full": [False, True],
        },
        dtypes=(torch.float32, torch.float64),  # in others rounding moves the hashes: see below
    ),
    OpSpec(
        "packed_mlp",
        run_mlp,
        oracle_mlp,
        make_mlp,
        cases={
            "padded": {"lead": [2, 33], "channels": 48, "hidden": 130, "full": True},
            "rows": {"lead": [70], "channels": 33, "hidden": 71, "act": "quick_gelu", "full": True},
            "plain": {"lead": [7], "channels": 16, "hidden": 16, "act": None},
            "no_rows": {"lead": [0], "channels": 8, "hidden": 8, "full": True},
            "no_hidden": {"lead": [3], "channels": 8, "hidden": 0, "full": True},
        },
        sized=lambda tokens: {"lead": [tokens], "channels": 32, "hidden": 48, "full": True},
        fuzz={"lead": [[3], [2, 61]], "channels": (1, 80), "hidden": (0, 150), "full": [False, True]},
    ),
]


class TestBattery(Conformance):
    specs = SPECS

    @pytest.fixture
    def device(self):
        return torch.device("cpu")


# ---------------------------------------------------------------- rules


def _weights(channels=8, heads=2, dim=4):
    qkv = ops.pack_linear(torch.randn(3 * heads * dim, channels)), None
    proj = ops.pack_linear(torch.randn(channels, heads * dim)), None
    return qkv, proj


NORM = {"norm": (None, None, 1e-6)}


def test_errors_name_op_argument_rule_and_value():
    qkv, proj = _weights()
    call, sizes = ops.packed_attention, {**NORM, "num_heads": 2, "head_dim": 4}
    x, cu = torch.randn(3, 8), torch.tensor([0, 3], dtype=torch.int32)
    name = "packed_attention"
    expect(ValueError, name, "x must have shape .* without", call, x, qkv, proj, **sizes)
    expect(ValueError, name, "x must have shape .* with", call, x[None], qkv, proj, cu_seqlens=cu, **sizes)
    expect(TypeError, name, "x must be a float32", call, x.int(), qkv, proj, **sizes)
    expect(TypeError, name, "cu_seqlens must be int32", call, x, qkv, proj, cu_seqlens=cu.float(), **sizes)
    sampled, some = ops.packed_attention_sampled, torch.ones(1, 3) > 0
    name = "packed_attention_sampled"
    expect(ValueError, name, "x must have shape .* with", sampled, x[None], qkv, proj, some, cu_seqlens=cu, **sizes)
    expect(ValueError, name, "num_prefix must be >= 1", sampled, x[None], qkv, proj, some, num_prefix=0, **sizes)
    expect(TypeError, name, "x must be a float32", sampled, x.int(), qkv, proj, some, **sizes)
    merged, name = ops.packed_attention_merged, "packed_attention_merged"
    expect(ValueError, name, "x must have shape", merged, x, qkv, proj, 1, **sizes)
    expect(ValueError, name, "r must be >= 0", merged, x[None], qkv, proj, -1, **sizes)
    expect(TypeError, name, "x must be a float32", merged, x.int(), qkv, proj, 1, **sizes)
    grouped, name, draws = ops.packed_attention_grouped, "packed_attention_grouped", (torch.rand(4, 3), torch.rand(3))
    expect(ValueError, name, "x must have shape .* without", grouped, x, qkv, proj, *draws, **sizes)
    expect(ValueError, name, "offset must have shape", grouped, x[None], qkv, proj, draws[0], draws[0], **sizes)
    expect(TypeError, name, "x must be a float32", grouped, x.int(), qkv, proj, *draws, **sizes)
    mlp = ops.packed_mlp
    expect(ValueError, "packed_mlp", "act must be one of", mlp, x, qkv, proj, hidden=24, act="relu", **NORM)
    expect(TypeError, "packed_mlp", "x must be a float32", mlp, x.int(), qkv, proj, hidden=24, **NORM)


@needs_library
def test_heads_without_channels_add_nothing():
    x = torch.randn(1, 3, 8)
    y, _, _, cls = ops.packed_attention(x, *_weights(dim=0), num_heads=2, head_dim=0, want_cls=True, **NORM)
    assert torch.equal(y, x)
    torch.testing.assert_close(cls, torch.full((3,), 1 / 3))


@needs_library
def test_direct_calls_are_checked():
    (qkv, _), (proj, _) = _weights()
    raw, x = torch.ops.tokenprune.packed_attention, torch.randn(1, 3, 8)
    cu = torch.tensor([0, 3], dtype=torch.int32)

    def call(x=x, qkv=qkv, heads=2, dim=4, cu=None, most=0, bias=None, rows=None):
        return raw(x, None, None, 1e-6, qkv, None, proj, None, None, heads, dim, rows, cu, most, bias, 0.5, False)

    assert torch.equal(call()[0][0], call(x[0], cu=cu, most=3)[0])
    for wrong, message in [
        ({"heads": -1}, "num_heads must be in"),
        ({"dim": 1 << 40}, "head_dim must be in"),
        ({"rows": cu}, "cu_seqlens must be given with indices"),
        ({"x": x[0], "rows": cu, "cu": cu, "most": 3}, "indices must be -1 or in"),
        ({"heads": 3}, r"packed must hold a float32 weight \[36, 8\]"),
        ({"x": x.double()}, "packed must hold a float64 weight"),
        ({"x": x[0]}, r"x must have shape \[B, N, C\]"),
        ({"cu": cu}, r"x must have shape \[T, C\]"),
        ({"x": x[0], "cu": cu, "most": 2}, "max_seqlen"),
        ({"x": x[0], "cu": cu + 1, "most": 4}, "cu_seqlens"),
        ({"bias": torch.zeros(4)}, "key_bias must have size 3"),
        ({"bias": torch.zeros(3).half()}, "key_bias must be float32"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**wrong)
    with pytest.raises(RuntimeError, match="packed must hold"):
        torch.ops.tokenprune.packed_mlp(x, None, None, 1e-6, qkv, None, 24, 1, qkv, None, None)
    with pytest.raises(RuntimeError, match="act must be in"):
        torch.ops.tokenprune.packed_mlp(x, None, None, 1e-6, qkv, None, 24, 7, qkv, None, None)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["class", "distill", "prefix", "no_sizes"])
def test_merged_attention_is_its_parts_one_by_one(case, dtype):
    merged = next(spec for spec in SPECS if spec.name == "packed_attention_merged")
    made = merged.sample(**merged.cases[case])
    inputs, o = merged.cast(made, dtype), made.options
    x, heads, dim = inputs["x"], o["heads"], o["dim"]
    y, wide, *_ = ops.packed_attention(
        x,
        (ops.pack_linear(inputs["qkv"]), inputs.get("bias_qkv")),
        (ops.pack_linear(inputs["proj"]), inputs.get("bias_proj")),
        norm=(inputs.get("norm_weight"), inputs.get("norm_bias"), 1e-6),
        num_heads=heads,
        head_dim=dim,
        layer_scale=inputs.get("layer_scale"),
        key_bias=inputs.get("key_bias"),
    )
    keys = wide.view(*x.shape[:2], 3, heads, dim)[:, :, 1]
    protected = {n: o[n] for n in ("class_token", "distill_token", "num_prefix") if n in o}
    expected = ops.match_and_merge(y, keys, o["r"], size=inputs.get("size"), **protected)
    assert_same(run_merged(**inputs, **o), expected)


@needs_library
def test_flops_of_merged_attention_are_those_of_its_parts():
    from torch.utils.flop_counter import FlopCounterMode

    merged = next(spec for spec in SPECS if spec.name == "packed_attention_merged")
    made = merged.sample(**merged.cases["class"])
    inputs = merged.cast(made, torch.float32)
    with FlopCounterMode(display=False) as counter:
        run_merged(**inputs, **made.options)
    rows, width, channels = 33, 48, 48
    attention = 2 * rows * channels * 4 * width + 4 * width * rows**2
    assert counter.get_total_flops() == attention + 2 * 17 * 16 * 16


@needs_library
def test_direct_calls_of_merged_attention_are_checked():
    (qkv, _), (proj, _) = _weights()

    x = torch.randn(1, 5, 8)

    def call(x=x, heads=2, bias=None, r=1, size=None, flags=(True, False, 0)):
        parts = None, None, 1e-6, qkv, None, proj, None, None, heads, 4
        return torch.ops.tokenprune.packed_attention_merged(x, *parts, bias, 0.5, r, size, *flags)

    assert call()[0].shape == (1, 4, 8) and call(x[:0])[0].shape == (0, 4, 8)
    for wrong, message in [
        ({"x": torch.randn(5, 8)}, r"x must have shape \[B, N, C\]"),
        ({"heads": -1}, "num_heads must be in"),
        ({"heads": 3}, "packed must hold a float32 weight"),
        ({"bias": torch.zeros(4)}, "key_bias must have size 5"),
        ({"r": 3}, r"r must be in \[0, 2\], got 3"),
        ({"r": -1}, r"r must be in \[0, 2\], got -1"),
        ({"size": torch.ones(1, 4)}, "size must have size 5"),
        ({"flags": (True, False, 2)}, "num_prefix must be 0 beside"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**wrong)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["image", "fixed", "hidden", "ragged"])
def test_sampled_attention_is_its_parts_one_by_one(case, dtype):
    sampled = next(spec for spec in SPECS if spec.name == "packed_attention_sampled")
    made = sampled.sample(**sampled.cases[case])
    inputs, o = sampled.cast(made, dtype), made.options
    x, cu, most, bias, heads, dim = (
        inputs["x"],
        inputs.get("cu_seqlens"),
        o["most"],
        inputs.get("key_bias"),
        o["heads"],
        o["dim"],
    )
    padded = cu is None
    cu = torch.arange(x.shape[0] + 1, dtype=torch.int32) * most if padded else cu
    rows, norm = x.flatten(0, -2), (inputs.get("norm_weight"), inputs.get("norm_bias"), 1e-6)
    weights = [ops.pack_linear(inputs[name]) for name in ("qkv", "proj")]
    wide = ops.packed_linear(rows, weights[0], 3 * heads * dim, inputs.get("bias_qkv"), norm=norm)
    q, k, v = wide.view(-1, 3, heads, dim).unbind(1)
    keys = {"cu_seqlens_k": cu, "max_seqlen_k": most, "key_bias": bias}
    one = torch.arange(len(cu), dtype=torch.int32)
    *_, cls = ops.sparse_attention(q[cu[:-1].long()], k, v, cu_seqlens_q=one, max_seqlen_q=1, want_cls=True, **keys)
    options = {"max_seqlen": most, "num_prefix": o["prefix"], "key_bias": bias, "padded": padded, "drop": o["drop"]}
    kept, source, starts = ops.sample_tokens(cls, v, inputs["initial"], cu_seqlens=cu, **options)
    chosen = ops.gather_tokens(q.flatten(1), source).view(-1, heads, dim)
    mixed, _ = ops.sparse_attention(chosen, k, v, cu_seqlens_q=starts, max_seqlen_q=kept.shape[1], **keys)
    y = ops.packed_linear(
        mixed.flatten(1),
        weights[1],
        x.shape[-1],
        inputs.get("bias_proj"),
        scale=inputs.get("layer_scale"),
        residual=ops.gather_tokens(rows, source),
    )
    y[source < 0] = 0
    expected = y.view(*kept.shape, -1) if padded else y, kept, source, starts
    assert 0 < int((kept >= 0).sum()) < len(rows)
    assert_same(run_sampled(**inputs, **o), expected)


@needs_library
def test_flops_of_sampled_attention_are_those_of_what_is_kept():
    from torch.utils.flop_counter import FlopCounterMode

    for case in ("image", "ragged"):
        sampled = next(spec for spec in SPECS if spec.name == "packed_attention_sampled")
        made = sampled.sample(**sampled.cases[case])
        inputs, heads, dim = sampled.cast(made, torch.float32), made.options["heads"], made.options["dim"]
        with FlopCounterMode(display=False) as counter:
            y, rows, *_ = run_sampled(**inputs, **made.options)
        lengths = sampled.cases[case]["lengths"]
        pairs = sum(n * (int(kept) + 1) for n, kept in zip(lengths, (rows >= 0).sum(1)))
        linear = 2 * heads * dim * (3 * inputs["x"].numel() + y.numel())
        assert counter.get_total_flops() == linear + 4 * heads * dim * pairs


@needs_library
def test_direct_calls_of_sampled_attention_are_checked():
    (qkv, _), (proj, _) = _weights()
    x, cu, initial = torch.randn(1, 3, 8), torch.tensor([0, 3], dtype=torch.int32), torch.ones(1, 3) > 0

    def call(x=x, heads=2, cu=None, most=0, bias=None, initial=initial, prefix=1):
        parts = None, None, 1e-6, qkv, None, proj, None, None, heads, 4
        return torch.ops.tokenprune.packed_attention_sampled(x, *parts, cu, most, bias, 0.5, initial, prefix, True)

    assert torch.equal(call()[0][0], call(x[0], cu=cu, most=3)[0])
    for wrong, message in [
        ({"prefix": 0}, "num_prefix must be >= 1"),
        ({"heads": -1}, "num_heads must be in"),
        ({"x": x[0]}, r"x must have shape \[B, N, C\]"),
        ({"x": x[0], "cu": cu[:0], "most": 3}, "cu_seqlens must have at least one entry"),
        ({"x": x[0], "cu": cu.long(), "most": 3}, "cu_seqlens must be int32"),
        ({"x": x[0], "cu": cu[None], "most": 3}, "cu_seqlens must have shape"),
        ({"initial": initial.float()}, "initial must be bool"),
        ({"prefix": 4, "initial": torch.ones(1, 9) > 0}, "num_prefix must be at most every sequence length"),
        (
            {"x": x[0], "cu": torch.tensor([0, 3, 3]).int(), "most": 3},
            "every sequence a class token, got an empty one at 1",
        ),
        ({"x": x[0], "cu": cu * 2, "most": 6}, "cu_seqlens must end within the 3 rows"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**wrong)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["padded", "ragged", "alone", "together"])
def test_grouped_attention_is_its_parts_one_by_one(case, dtype):
    grouped = next(spec for spec in SPECS if spec.name == "packed_attention_grouped")
    made = grouped.sample(**grouped.cases[case])
    inputs, o = grouped.cast(made, dtype), made.options
    x, heads, dim, draws = inputs["x"], o["heads"], o["dim"], (inputs["projection"], inputs["offset"])
    draws = [t.to(torch.float64 if dtype == torch.float64 else torch.float32) for t in draws]
    inputs["projection"], inputs["offset"] = draws
    lengths = grouped.cases[case]["lengths"]
    rows, norm = x.flatten(0, -2), (inputs.get("norm_weight"), inputs.get("norm_bias"), 1e-6)
    weights = [ops.pack_linear(inputs[name]) for name in ("qkv", "proj")]
    wide = ops.packed_linear(rows, weights[0], 3 * heads * dim, inputs.get("bias_qkv"), norm=norm)
    q, k, v = wide.view(-1, 3, heads, dim).unbind(1)
    bias = inputs.get("key_bias", torch.zeros(len(rows), dtype=draws[0].dtype))
    mixed, found = torch.zeros_like(q), torch.full((len(lengths), heads, max(lengths)), -1, dtype=torch.int32)
    for image, end in enumerate(torch.tensor(lengths).cumsum(0).tolist()):
        own, n = slice(end - lengths[image], end), lengths[image]
        if n == 0:
            continue
        ids, counts = ops.hash_groups(q[own].transpose(0, 1), *draws, width=o["width"], scale=dim**-0.5)
        found[image, :, :n] = ids
        for h in range(heads):
            slots = int((counts[h] > 0).sum())
            parent = ids[h : h + 1]
            matching = ops.Matching(parent, parent, parent, parent, slots)
            means, _ = ops.merge_tokens(q[None, own, h].contiguous(), matching)
            ends = {"cu_seqlens_q": [0, slots], "cu_seqlens_k": [0, n]}
            ends = {name: torch.tensor(cu, dtype=torch.int32) for name, cu in ends.items()}
            out, _ = ops.sparse_attention(
                means[0, :, None],
                k[own, h : h + 1],
                v[own, h : h + 1],
                **ends,
                max_seqlen_q=slots,
                max_seqlen_k=n,
                key_bias=bias[own].to(draws[0].dtype),
            )
            mixed[own, h] = out[ids[h].long(), 0]
    y = ops.packed_linear(
        mixed.flatten(1),
        weights[1],
        x.shape[-1],
        inputs.get("bias_proj"),
        scale=inputs.get("layer_scale"),
        residual=rows,
    )
    assert_same(run_grouped(**inputs, **o), (y.view(x.shape), found))


@needs_library
def test_flops_of_grouped_attention_are_those_of_its_groups():
    from torch.utils.flop_counter import FlopCounterMode

    for case in ("padded", "ragged"):
        grouped = next(spec for spec in SPECS if spec.name == "packed_attention_grouped")
        made = grouped.sample(**grouped.cases[case])
        inputs, heads, dim = grouped.cast(made, torch.float32), made.options["heads"], made.options["dim"]
        with FlopCounterMode(display=False) as counter:
            y, ids = run_grouped(**inputs, **made.options)
        lengths, hashes = grouped.cases[case]["lengths"], grouped.cases[case]["hashes"]
        pairs = sum(n * int(ids[i].amax(-1).add(1).sum()) for i, n in enumerate(lengths))
        assert pairs < heads * sum(n * n for n in lengths)
        linear = 8 * heads * dim * y.numel() + 2 * sum(lengths) * heads * dim * hashes
        assert counter.get_total_flops() == linear + 4 * dim * pairs


@needs_library
def test_direct_calls_of_grouped_attention_are_checked():
    (qkv, _), (proj, _) = _weights()
    x, cu = torch.randn(1, 3, 8), torch.tensor([0, 3], dtype=torch.int32)
    projection, offset = torch.randn(4, 5), torch.rand(5)

    def call(x=x, heads=2, cu=None, most=0, bias=None, projection=projection, offset=offset, width=8.0):
        parts = None, None, 1e-6, qkv, None, proj, None, None, heads, 4
        return torch.ops.tokenprune.packed_attention_grouped(x, *parts, cu, most, bias, 0.5, projection, offset, width)

    assert torch.equal(call()[0][0], call(x[0], cu=cu, most=3)[0])
    y, ids = call(x[0], cu=cu, most=100000)  # a bound may be far too large
    assert torch.equal(y, call()[0][0]) and bool((ids[..., 3:] == -1).all())
    for wrong, message in [
        ({"heads": -1}, "num_heads must be in"),
        ({"heads": 3}, "packed must hold a float32 weight"),
        ({"x": x[0]}, r"x must have shape \[B, N, C\]"),
        ({"x": x[0], "cu": cu[:0], "most": 3}, "cu_seqlens must have at least one entry"),
        ({"x": x[0], "cu": cu.long(), "most": 3}, "cu_seqlens must be int32"),
        ({"x": x[0], "cu": cu[None], "most": 3}, "cu_seqlens must have shape"),
        ({"x": x[0], "cu": cu, "most": 2}, "max_seqlen must be at least"),
        ({"x": x[0], "cu": cu + 1, "most": 4}, "cu_seqlens must start at 0"),
        ({"x": x[0], "cu": cu, "most": 1 << 31}, "max_seqlen must be in"),
        ({"bias": torch.zeros(4)}, "key_bias must have size 3"),
        ({"bias": torch.zeros(3).half()}, "key_bias must be float32"),
        ({"projection": torch.randn(5, 5)}, "projection must have size 4"),
        ({"offset": torch.rand(4)}, "offset must have size 5"),
        ({"width": 0.0}, "width must be positive"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**wrong)


@needs_library
def test_differentiating_says_that_it_cannot():
    qkv, proj = _weights()
    x = torch.randn(1, 3, 8, requires_grad=True)
    y = ops.packed_attention(x, qkv, proj, num_heads=2, head_dim=4, **NORM)[0]
    with pytest.raises(NotImplementedError, match="packed_attention has no derivative"):
        y.sum().backward()
