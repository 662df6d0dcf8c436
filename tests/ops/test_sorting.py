# SPDX-License-Identifier: Apache-2.0
"""Sorting of rows, sampling from sorted scores, groups of equal hashes, and attention in balanced clusters."""

import math

import pytest
import torch
from tokenprune_ext import ops
from tokenprune_ext.ops.sorting import _composite, _reference_groups, _reference_sample, _reference_tokens

from tests.conformance import Conformance, OpSpec, Sample, needs_library
from tests.ops.common import expect, ints
from tests.spec import DTYPES

SCHEMAS = [
    "argsort_rows(Tensor x) -> Tensor",
    "sample_rows(Tensor scores, Tensor order, SymInt grid_points, Tensor? grid_counts, Tensor? valid, bool published) "
    "-> (Tensor cdf, Tensor grid, Tensor pick, Tensor kept, Tensor rows)",
    "sample_tokens(Tensor attention, Tensor v, Tensor initial, Tensor cu_seqlens, SymInt max_seqlen, Tensor? key_bias, "
    "SymInt num_prefix, bool padded, bool drop) -> (Tensor rows, Tensor source, Tensor cu_seqlens)",
    "hash_groups(Tensor x, Tensor projection, Tensor offset, float width, float scale, Tensor? valid) -> "
    "(Tensor ids, Tensor counts)",
    "balanced_attention(Tensor q, Tensor k, Tensor v, Tensor q_order, Tensor k_order, Tensor? q_lengths, "
    "Tensor? k_lengths, Tensor? key_bias, SymInt q_size, SymInt k_size, bool per_row, float scale) -> "
    "(Tensor out, Tensor lse)",
]


# ---------------------------------------------------------------- sorting


def make_values(rng, rows, columns, steps=None):
    """``steps``: few distinct values, so that there are ties."""
    x = torch.randn(rows, columns, generator=rng, dtype=torch.float64)
    return Sample({"x": x if steps is None else (x * steps).round() / steps})


def oracle_sort(x):
    return torch.tensor([sorted(range(len(row)), key=row.__getitem__) for row in x.tolist()], dtype=torch.int32).view(
        x.shape
    )


def shaped(name, n=300):
    """Rows that the fast way does not fit, or that need care."""
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
    where = torch.rand(3, n, generator=torch.Generator().manual_seed(n + 1))
    if name == "nan":
        x[where < 0.2], x[where > 0.9], x[(where > 0.5) & (where < 0.6)] = math.nan, math.inf, -math.nan
    elif name == "all_nan":
        x[:] = math.nan
    elif name == "mostly_hidden":
        x[where < 0.7] = math.inf
    elif name == "zeros_of_both_signs":
        x = torch.where(where < 0.5, 0.0, -0.0)
    elif name == "far_apart":
        x = x.exp().pow(20)
    elif name == "outliers":
        x[:, n // 2], x[:, n // 3], x[:, n // 5] = 1e30, -1e-40, 1e-40
    elif name == "infinite":
        x[:, n // 2], x[:, n // 3] = -math.inf, math.inf
    elif name == "descending":
        x = -torch.arange(3.0 * n).view(3, n)
    return x


SHAPES = (
    "nan",
    "all_nan",
    "mostly_hidden",
    "zeros_of_both_signs",
    "far_apart",
    "outliers",
    "infinite",
    "descending",
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("columns", [1, 15, 64, 300, 5000])
def test_argsort_value_of_awkward_rows(shape, columns, dtype, device):
    x = shaped(shape, columns).to(device, dtype)
    assert torch.equal(ops.argsort_rows(x), x.argsort(dim=-1, stable=True).int())


def test_argsort_value_of_all_bfloat16_numbers(device):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    x = x[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))].to(device)
    assert torch.equal(ops.argsort_rows(x), x.argsort(dim=-1, stable=True).int())


def test_argsort_takes_any_leading_dimensions(device):
    x = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).to(device)
    assert torch.equal(ops.argsort_rows(x), x.argsort(-1).int())
    assert torch.equal(ops.argsort_rows(x[0, 0]), x[0, 0].argsort(-1).int())
    assert ops.argsort_rows(x[:0]).shape == (0, 3, 5) and ops.argsort_rows(x[..., :0]).shape == (2, 3, 0)
    assert not ops.argsort_rows(x.requires_grad_()).requires_grad


# ---------------------------------------------------------------- sampling


def make_scores(rng, batch, entries, points, masked=False, empty=False, published=False):
    scores = torch.rand(batch, entries, generator=rng, dtype=torch.float64) ** 3
    inputs = {"scores": scores * 0 if empty else scores}
    if masked:
        inputs["grid_counts"] = torch.randint(0, points + 1, (batch,), generator=rng).to(torch.int32)
        inputs["valid"] = torch.rand(batch, entries, generator=rng) < 0.7
    return Sample(inputs, {"grid_points": points, "published": bool(published)})


def sample(scores, grid_counts=None, valid=None, **options):
    order, cdf, grid, *picks = ops.sample_rows(scores, grid_counts=grid_counts, valid=valid, **options)
    return order, cdf.nan_to_num(), grid.nan_to_num(), *picks  # NaN where there is no distribution


def oracle_sample(scores, grid_counts=None, valid=None, *, grid_points, published):
    rows = []
    for b, s in enumerate(scores):
        ok = [True] * len(s) if valid is None else valid[b].tolist()
        count = max(grid_points if grid_counts is None else int(grid_counts[b]), 1)
        rows.append(oracle_row(s * torch.tensor(ok).to(s), ok, grid_points, count, published))
    if not rows:
        n, ints = scores.shape[1], torch.int64
        shapes = (
            (n, ints),
            (n, scores.dtype),
            (grid_points, scores.dtype),
            (grid_points, ints),
            (n, torch.bool),
            (n, ints),
        )
        return tuple(scores.new_zeros(0, size, dtype=dtype) for size, dtype in shapes)
    return tuple(torch.stack(parts) for parts in zip(*rows))


def oracle_row(s, ok, points, count, published):
    n = len(s)
    s = s / s.sum()
    key = [v if real else (0.0 if published else -1.0) for v, real in zip(s.nan_to_num(2.0).tolist(), ok)]
    order = sorted(range(n), key=key.__getitem__)
    total, hidden = s[order].cumsum(0), 0 if published else ok.count(False)
    least = total[hidden] if hidden < n else 0
    cdf, grid, pick = torch.zeros_like(s), s.new_zeros(points), [n] * points
    kept = [ok[i] for i in order]
    if n and float(total[-1] - least) > 0:
        cdf = ((total - least) / (total[-1] - least)).clamp(min=0)
        start, last = cdf[cdf > 0].min(), max(count - 1, 1)
        k = torch.arange(points).clamp(max=count - 1)
        grid = start + (torch.linspace(0 if count > 1 else 1, 1, count, dtype=s.dtype)[k] * last - start * k) / last
        pick = [min(range(n), key=(cdf - y).abs().tolist().__getitem__) for y in grid]
        lost = {1} if published and pick and max(pick) == 1 else set()
        kept = [real and i in set(pick) - lost for i, real in enumerate(kept)]
    rows = [i for i, keep in zip(order, kept) if keep]
    numbers = [torch.tensor(t, dtype=torch.int64) for t in (order, pick, rows + [-1] * (n - len(rows)))]
    return numbers[0], cdf, grid, numbers[1], torch.tensor(kept, dtype=torch.bool), numbers[2]


SAMPLES = {
    "patches": {"batch": 2, "entries": 196, "points": 196},
    "masked": {"batch": 3, "entries": 50, "points": 80, "masked": True},
    "fewer_points": {"batch": 2, "entries": 60, "points": 7},
    "published": {"batch": 2, "entries": 50, "points": 64, "published": True},
    "two_published": {"batch": 5, "entries": 2, "points": 5, "published": True},
    "no_scores": {"batch": 2, "entries": 9, "points": 12, "empty": True, "masked": True},
    "one": {"batch": 1, "entries": 1, "points": 1},
    "no_rows": {"batch": 0, "entries": 5, "points": 3},
    "no_entries": {"batch": 2, "entries": 0, "points": 3},
    "no_points": {"batch": 2, "entries": 5, "points": 0},
}


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", SAMPLES)
def test_sample_values_are_those_of_the_reference_to_the_bit(case, dtype, device):
    made = make_scores(torch.Generator().manual_seed(3), **SAMPLES[case])
    scores, counts, valid = (made.inputs.get(name) for name in ("scores", "grid_counts", "valid"))
    scores = (scores / scores.sum(1, keepdim=True) if valid is None else scores * valid).to(dtype)
    order = scores.argsort(dim=1, stable=True)
    arguments = (scores, order, made.options["grid_points"], counts, valid, made.options["published"])
    for ours, theirs in zip(torch.ops.tokenprune.sample_rows(*arguments), _reference_sample(*arguments), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0, equal_nan=True)


# ---------------------------------------------------------------- sampling of sequences


def make_sequences(rng, lengths, heads=2, dim=5, points=None, prefix=1, hidden=False, fixed=False, **layout):
    """``fixed``: cut nothing; some tokens of each sequence were no token of it at the start."""
    total, most = sum(lengths), max(lengths, default=3)
    points = most - prefix if points is None else points
    initial = torch.rand(len(lengths), prefix + points, generator=rng) < 0.9
    initial[:, :prefix] = True
    inputs = {
        "attention": torch.rand(heads, total, generator=rng, dtype=torch.float64) ** 3,
        "v": torch.randn(total, heads, dim, generator=rng, dtype=torch.float64),
        "initial": initial,
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
    }
    if hidden:
        bias = torch.randn(total, generator=rng, dtype=torch.float64)
        inputs["key_bias"] = bias.masked_fill(torch.rand(total, generator=rng) < 0.3, -math.inf)
    return Sample(inputs, {"max_seqlen": most, "num_prefix": prefix, "padded": False, "drop": not fixed, **layout})


def oracle_tokens(attention, v, initial, cu_seqlens, key_bias=None, *, max_seqlen, num_prefix, padded, drop):
    scores, bounds = attention.sum(0) * v.flatten(1).norm(dim=1), cu_seqlens.tolist()
    found = []
    for begin, end, start in zip(bounds, bounds[1:], initial):
        s = scores[begin + num_prefix : end]
        ok = [
            key_bias is None or b > -math.inf for b in (s if key_bias is None else key_bias[begin + num_prefix : end])
        ]
        points, count = len(start) - num_prefix, max(int(start.sum()) - num_prefix, 1)
        rows = oracle_row(s * torch.tensor(ok).to(s), ok, points, count, False)[-1].tolist()
        found.append([*range(num_prefix), *(row + num_prefix for row in rows if row >= 0)])
    columns = max(map(len, found)) if padded and drop and found else max_seqlen
    filled = [row + [-1] * (columns - len(row)) for row in found]
    source = [b + i if i >= 0 else -1 for b, row in zip(bounds, filled if padded else found) for i in row]
    starts = torch.tensor([0, *(len(row) for row in (filled if padded else found))]).cumsum(0)
    return ints(filled).view(len(found), columns), ints(source), starts


SEQUENCES = {
    "image": {"lengths": [197], "heads": 6, "dim": 64},
    "ragged": {"lengths": [17, 1, 60, 2, 5], "points": 90, "prefix": 1},
    "hidden": {"lengths": [40, 30], "hidden": True, "prefix": 3, "dim": 33},
    "few_points": {"lengths": [30, 50], "points": 4},
    "no_points": {"lengths": [9, 4], "points": 0},
    "no_prefix": {"lengths": [9, 4, 0], "prefix": 0},
    "no_heads": {"lengths": [9, 4], "heads": 0},
    "no_sequences": {"lengths": []},
}


@needs_library
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("case", SEQUENCES)
def test_sampled_tokens_are_those_of_the_reference(case, padded, drop):
    made = make_sequences(torch.Generator().manual_seed(4), **SEQUENCES[case])
    attention, v, initial, cu_seqlens, bias = map(
        made.inputs.get, ("attention", "v", "initial", "cu_seqlens", "key_bias")
    )
    tail = made.options["max_seqlen"], bias, made.options["num_prefix"], padded, drop
    arguments = attention, v, initial, cu_seqlens, *tail
    for ours, theirs in zip(torch.ops.tokenprune.sample_tokens(*arguments), _reference_tokens(*arguments), strict=True):
        assert ours.dtype == theirs.dtype == torch.int32 and torch.equal(ours, theirs)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_sequences_without_a_distribution_keep_all(bad, device):
    made = make_sequences(torch.Generator().manual_seed(0), [5, 4])
    inputs = {name: t.to(device) for name, t in made.inputs.items()}
    inputs["attention"][:, 1:5] = bad
    rows, source, starts = ops.sample_tokens(**inputs, **made.options)
    assert sorted(rows[0].tolist()) == [0, 1, 2, 3, 4] and source[:5].tolist() == rows[0].tolist()
    assert starts.tolist() == [0, 5, len(source)] and len(source) < 9


# ---------------------------------------------------------------- groups of equal hashes


def make_hashed(rng, rows, tokens, dim, hashes, spread=3, width=8.0, scale=1.0, masked=False):
    """Numbers with few binary digits: every sum is exact, whatever its order."""

    def whole(most, *shape):
        return torch.randint(-most, most + 1, shape, generator=rng).double()

    draws = {"projection": whole(4, dim, hashes) / 2, "offset": (whole(4, hashes) + 4) / 16}
    inputs = {"x": whole(spread, rows, tokens, dim), **draws}
    if masked:
        inputs["valid"] = torch.rand(rows, tokens, generator=rng) < 0.7
    return Sample(inputs, {"width": width, "scale": scale})


def oracle_groups(x, projection, offset, valid=None, *, width, scale):
    rows, tokens = x.shape[:2]
    hashes = torch.floor((x.double() * scale @ projection.double() + offset.double()) / width).long().tolist()
    valid = [[True] * tokens] * rows if valid is None else valid.tolist()
    ids, counts = torch.full((rows, tokens), -1), torch.zeros(rows, tokens, dtype=torch.long)
    for r in range(rows):
        real = [n for n in range(tokens) if valid[r][n]]
        least = [min(column) for column in zip(*(hashes[r][n] for n in real))]
        codes = {n: sum((h - low) << 2 * i for i, (h, low) in enumerate(zip(hashes[r][n], least))) for n in real}
        codes = {n: (code + 2**63) % 2**64 - 2**63 for n, code in codes.items()}
        ranks = {code: rank for rank, code in enumerate(sorted(set(codes.values())))}
        for n in real:
            ids[r, n] = ranks[codes[n]]
            counts[r, ranks[codes[n]]] += 1
    return ids.to(torch.int32), counts.to(torch.int32)


HASHED = {
    "few": {"rows": 3, "tokens": 61, "dim": 16, "hashes": 3},
    "published": {"rows": 6, "tokens": 197, "dim": 64, "hashes": 32, "spread": 1, "scale": 0.125},
    "wrapping": {"rows": 2, "tokens": 130, "dim": 24, "hashes": 31, "spread": 40, "width": 0.5},
    "seventeen": {"rows": 2, "tokens": 50, "dim": 9, "hashes": 17, "width": 32.0, "masked": True},
    "masked": {"rows": 4, "tokens": 33, "dim": 8, "hashes": 2, "masked": True},
    "alike": {"rows": 2, "tokens": 20, "dim": 8, "hashes": 4, "spread": 0},
    "one": {"rows": 1, "tokens": 1, "dim": 1, "hashes": 1},
    "no_channels": {"rows": 2, "tokens": 5, "dim": 0, "hashes": 3},
    "no_tokens": {"rows": 2, "tokens": 0, "dim": 4, "hashes": 3},
    "no_rows": {"rows": 0, "tokens": 5, "dim": 4, "hashes": 3},
}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
def test_hashes_beyond_64_bits_are_those_of_the_reference(bad, device):
    inputs = make_hashed(torch.Generator().manual_seed(3), 3, 40, 8, 5).inputs
    x = inputs["x"].float().to(device)
    x[0, 7, 2], x[1] = bad, bad
    draws = inputs["projection"].float().to(device), inputs["offset"].float().to(device)
    ids, counts = ops.hash_groups(x, *draws)
    expected = _reference_groups(x, *draws, 8.0, 1.0, None)
    assert torch.equal(ids, expected[0]) and torch.equal(counts, expected[1])


# ---------------------------------------------------------------- attention


def make_clusters(rng, rows, queries, keys, dim, rounds, q_size, k_size, per_row=True, ragged=False, bias=False):
    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    def order(tokens):
        return torch.rand(rounds, rows, tokens, generator=rng).argsort(-1).to(torch.int32)

    inputs = {"q": normal(rows, queries, dim), "k": normal(rows, keys, dim), "v": normal(rows, keys, dim)}
    inputs |= {"q_order": order(queries), "k_order": order(keys)}
    if ragged:
        for name, tokens in (("q_lengths", queries), ("k_lengths", keys)):
            inputs[name] = torch.randint(0, tokens + 1, (rows,), generator=rng).to(torch.int32)
            inputs[name][-1:] = tokens  # somebody meets two keys: otherwise the gradient is nothing but round-off
    if bias:
        hidden = torch.rand(rows, keys, generator=rng) < 0.2
        inputs["key_bias"] = (
            normal(rows, keys).masked_fill(hidden, -math.inf) if bias == "hidden" else normal(rows, keys)
        )
    return Sample(inputs, {"q_size": q_size, "k_size": k_size, "per_row": bool(per_row)})


def meetings(q_order, k_order, q_lengths, k_lengths, q_size, k_size, per_row):
    """How often every query meets every key, ``[R * Nq, R * Nk]``."""
    (rounds, rows, queries), keys = q_order.shape, k_order.shape[2]
    counts = torch.zeros(rows * queries, rows * keys, dtype=torch.float64)
    lists = [[], []]
    for t in range(rounds):
        for r in range(rows):
            for side, (order, n) in enumerate(((q_order, queries), (k_order, keys))):
                lists[side].append([r * n + i for i in order[t, r].tolist()])
    if per_row:
        pairs = []
        for i, (mine, others) in enumerate(zip(*lists)):
            mine = mine if q_lengths is None else mine[: int(q_lengths[i % rows])]
            others = others if k_lengths is None else others[: int(k_lengths[i % rows])]
            parts = max(math.ceil(len(mine) / q_size), math.ceil(len(others) / k_size))
            cuts = [[len(x) * c // parts for c in range(parts + 1)] if parts else [] for x in (mine, others)]
            pairs += [(mine[a:b], others[c:d]) for a, b, c, d in zip(cuts[0], cuts[0][1:], cuts[1], cuts[1][1:])]
    else:
        mine, others = ([i for row in side for i in row] for side in lists)
        count = len(mine) // q_size
        pairs = [(mine[c * q_size :][:q_size], others[c * k_size :][:k_size]) for c in range(count)]
    for mine, others in pairs:
        for i in mine:
            counts[i] += torch.bincount(torch.tensor(others, dtype=torch.long), minlength=rows * keys)
    return counts


def oracle(q, k, v, q_order, k_order, q_lengths=None, k_lengths=None, key_bias=None, *, q_size, k_size, per_row):
    """One softmax over everything that a query met."""
    counts = meetings(q_order, k_order, q_lengths, k_lengths, q_size, k_size, per_row).to(q.dtype)
    logits = q.flatten(0, 1) @ k.flatten(0, 1).T * q.shape[2] ** -0.5 + counts.log()
    logits = logits if key_bias is None else logits + key_bias.flatten()
    met = (logits > -math.inf).any(1, keepdim=True)
    weights = torch.where(met, torch.where(met, logits, 0).softmax(1), 0)
    return (weights @ v.flatten(0, 1)).view(q.shape)


def sized(**extra):
    return lambda n: {"rows": 3, "queries": n, "keys": n, "dim": 16, "rounds": 3, "q_size": 5, "k_size": 7, **extra}


ROWS = {
    "several": {"rows": 3, "queries": 37, "keys": 37, "dim": 16, "rounds": 3, "q_size": 8, "k_size": 8},
    "exact": {"rows": 2, "queries": 64, "keys": 64, "dim": 64, "rounds": 2, "q_size": 32, "k_size": 32},
    "odd": {"rows": 2, "queries": 41, "keys": 29, "dim": 7, "rounds": 4, "q_size": 9, "k_size": 4},
    "wide": {"rows": 2, "queries": 50, "keys": 45, "dim": 136, "rounds": 2, "q_size": 50, "k_size": 20},
    "large_clusters": {"rows": 2, "queries": 150, "keys": 300, "dim": 20, "rounds": 2, "q_size": 999, "k_size": 999},
    "single": {"rows": 2, "queries": 9, "keys": 9, "dim": 33, "rounds": 3, "q_size": 1, "k_size": 1},
    "one": {"rows": 1, "queries": 1, "keys": 1, "dim": 1, "rounds": 1, "q_size": 1, "k_size": 1},
    "no_rows": {"rows": 0, "queries": 5, "keys": 4, "dim": 8, "rounds": 2, "q_size": 2, "k_size": 2},
    "no_rounds": {"rows": 2, "queries": 5, "keys": 4, "dim": 8, "rounds": 0, "q_size": 2, "k_size": 2},
    "no_queries": {"rows": 2, "queries": 0, "keys": 4, "dim": 8, "rounds": 2, "q_size": 2, "k_size": 2},
    "no_keys": {"rows": 2, "queries": 5, "keys": 0, "dim": 8, "rounds": 2, "q_size": 2, "k_size": 2},
}
LISTS = {
    "published": {"rows": 4, "queries": 33, "keys": 33, "dim": 64, "rounds": 8, "q_size": 32, "k_size": 32},
    "even": {"rows": 3, "queries": 12, "keys": 12, "dim": 8, "rounds": 2, "q_size": 4, "k_size": 4},
    "beyond_rows": {"rows": 4, "queries": 11, "keys": 11, "dim": 9, "rounds": 3, "q_size": 44, "k_size": 44},
    "two_sizes": {"rows": 4, "queries": 10, "keys": 5, "dim": 24, "rounds": 4, "q_size": 4, "k_size": 2},
    "many_keys": {"rows": 2, "queries": 3, "keys": 150, "dim": 16, "rounds": 3, "q_size": 6, "k_size": 300},
    "one_row": {"rows": 1, "queries": 17, "keys": 17, "dim": 16, "rounds": 6, "q_size": 6, "k_size": 6},
}
FUZZ = {
    "rows": (0, 3),
    "queries": (0, 20),
    "keys": (6, 20),
    "dim": (1, 40),
    "rounds": (0, 3),
    "q_size": (4, 9),
    "k_size": (4, 9),
}
SMALL = {"rows": 2, "queries": 5, "keys": 4, "dim": 3, "rounds": 2, "q_size": 3, "k_size": 2}


def spec(name, cases, grads, sized, small, fuzz=None, **extra):
    return OpSpec(
        name,
        ops.balanced_attention,
        oracle,
        make_clusters,
        {n: {**c, **extra} for n, c in cases.items()},
        sized,
        fuzz or {},
        {**small, **extra},
        grads,
        frozenset({"key_bias"}),
        frozenset({"q", "k", "v"}),
    )


LIST_SMALL = {"rows": 2, "queries": 5, "keys": 5, "dim": 3, "rounds": 2, "q_size": 4, "k_size": 4}
SPECS = [
    OpSpec(
        "argsort_rows",
        ops.argsort_rows,
        oracle_sort,
        make_values,
        {
            "plain": {"rows": 3, "columns": 200},
            "ties": {"rows": 3, "columns": 200, "steps": 8},
            "short": {"rows": 5, "columns": 3},
            "long": {"rows": 2, "columns": 5000},
            "one": {"rows": 1, "columns": 1},
            "no_rows": {"rows": 0, "columns": 7},
            "no_columns": {"rows": 3, "columns": 0},
        },
        lambda n: {"rows": 2, "columns": n},
        {"rows": (0, 3), "columns": (0, 80), "steps": [None, 2]},
    ),
    OpSpec(
        "sample_rows",
        sample,
        oracle_sample,
        make_scores,
        SAMPLES,
        lambda n: {"batch": 2, "entries": n, "points": 20, "masked": True},
        {"batch": (0, 3), "entries": (0, 40), "points": (0, 50), "masked": [False, True]},
        dtypes=(torch.float32, torch.float64),  # rounded scores tie, and as published the sort is not stable
    ),
    *(
        OpSpec(
            f"sample_tokens-{name}",
            ops.sample_tokens,
            oracle_tokens,
            make_sequences,
            {case: {**dims, **layout} for case, dims in SEQUENCES.items()},
            lambda n, layout=layout: {"lengths": [n, 7, n], "heads": 3, "hidden": True, **layout},
            {
                "lengths": [[3], [40, 1], [17] * 3, []],
                "heads": (1, 3),
                "dim": (0, 20),
                "points": (0, 50),
                "hidden": [False, True],
                **{key: [value] for key, value in layout.items()},
            },
            stats=frozenset({"attention", "key_bias"}),
        )
        for name, layout in (("packed", {}), ("padded", {"padded": True}), ("fixed", {"padded": True, "fixed": True}))
    ),
    OpSpec(
        "hash_groups",
        ops.hash_groups,
        oracle_groups,
        make_hashed,
        HASHED,
        lambda n: {"rows": 2, "tokens": n, "dim": 16, "hashes": 4, "masked": True},
        {
            "rows": (0, 3),
            "tokens": (0, 60),
            "dim": (0, 20),
            "hashes": (1, 32),
            "spread": (0, 9),
            "masked": [False, True],
        },
        stats=frozenset({"projection", "offset"}),
    ),
    spec("balanced_attention", ROWS, ("q", "k", "v"), sized(), SMALL, FUZZ),
    spec(
        "balanced_attention_ragged",
        ROWS,
        ("q", "k", "v", "key_bias"),
        sized(ragged=True, bias=True),
        SMALL,
        {**FUZZ, "ragged": [True], "bias": [True]},
        ragged=True,
        bias=True,
    ),
    spec("balanced_attention_hidden", ROWS, ("q", "k", "v"), sized(bias="hidden"), SMALL, bias="hidden"),
    spec(
        "balanced_attention_list",
        LISTS,
        ("q", "k", "v"),
        sized(rounds=4, rows=2, q_size=8, k_size=8, per_row=False),
        LIST_SMALL,
        per_row=False,
    ),
]


class TestBattery(Conformance):
    specs = SPECS


# ---------------------------------------------------------------- rules

ALL = {n: {**c, "bias": "hidden"} for n, c in ROWS.items()} | {n: {**c, "per_row": False} for n, c in LISTS.items()}


@needs_library
@pytest.mark.parametrize("case", ALL)
def test_log_sum_exp_is_that_of_the_composite(case, device):
    sample = make_clusters(torch.Generator().manual_seed(1), **ALL[case])
    tensors = {n: t.to(device) for n, t in sample.inputs.items()}
    options = [sample.options[n] for n in ("q_size", "k_size", "per_row")]
    lengths = tensors.get("q_lengths"), tensors.get("k_lengths"), tensors.get("key_bias")
    arguments = [tensors[n] for n in ("q", "k", "v", "q_order", "k_order")] + [*lengths, *options, 0.3]
    if device.type == "cpu":
        torch.testing.assert_close(torch.ops.tokenprune.balanced_attention(*arguments), _composite(*arguments))


def test_nan_stays_in_its_clusters(device):
    sample = make_clusters(torch.Generator().manual_seed(1), **{**ROWS["several"], "rounds": 1})
    q, k, v, q_order, k_order = (t.to(device) for t in sample.inputs.values())
    clean = ops.balanced_attention(q, k, v, q_order, k_order, **sample.options)
    k[1, 5] = math.nan
    out = ops.balanced_attention(q, k, v, q_order, k_order, **sample.options)
    bad = out.isnan().any(-1)
    assert bool(bad[1].any()) and not bool(bad[0].any()) and not bool(bad[2].any())
    assert torch.equal(out[~bad], clean[~bad])


Q, ORDER = torch.randn(2, 6, 8), torch.arange(6, dtype=torch.int32).expand(3, 2, 6)
WRONG = [
    ({"q": Q.long()}, TypeError, "q must be a float32"),
    ({"q": Q[0]}, ValueError, r"q must have shape \[R, N, D\]"),
    ({"k": Q[:1]}, ValueError, "k must have shape"),
    ({"v": Q[:, :5]}, ValueError, "v must be like k"),
    ({"k": Q.double()}, TypeError, "k must have the dtype of q"),
    ({"q_order": ORDER.float()}, TypeError, "q_order must be int32 or int64"),
    ({"q_order": ORDER[:, :1]}, ValueError, "q_order must have shape"),
    ({"k_order": ORDER[:2]}, ValueError, "k_order must have shape"),
    ({"q_size": 0}, ValueError, "q_size must be positive, got 0"),
    ({"k_size": -2}, ValueError, "k_size must be positive, got -2"),
    ({"q_lengths": ints([1, 2, 3])}, ValueError, r"q_lengths must have shape \[2\]"),
    ({"key_bias": Q[0]}, ValueError, r"key_bias must have shape \[2, 6\]"),
    ({"per_row": False, "q_size": 5}, ValueError, r"q_size must divide rounds \* rows \* tokens \(36\), got 5"),
    ({"per_row": False, "k_size": 4}, ValueError, "q_size and k_size must make as many clusters"),
    ({"per_row": False, "k_lengths": ints([1, 2])}, ValueError, "per_row must be True for rows of different lengths"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_wrong_arguments(change, error, message):
    arguments = {"q": Q, "k": Q, "v": Q, "q_order": ORDER, "k_order": ORDER, "q_size": 3, "k_size": 3}
    expect(error, "balanced_attention", message, ops.balanced_attention, **{**arguments, **change})


SCORES = torch.rand(2, 6)
V = torch.rand(9, 2, 3)
SEQUENCE = {
    "attention": V[:, :, 0].T,
    "v": V,
    "initial": torch.ones(2, 6) > 0,
    "cu_seqlens": ints([0, 4, 9]),
    "max_seqlen": 5,
}
WRONG_SAMPLES = [
    ({"scores": SCORES.long()}, TypeError, "scores must be a float32"),
    ({"scores": SCORES[0]}, ValueError, r"scores must have shape \[B, n\]"),
    ({"grid_points": -1}, ValueError, "grid_points must be >= 0, got -1"),
    ({"grid_counts": ints([1])}, ValueError, r"grid_counts must have shape \[2\]"),
    ({"valid": SCORES}, TypeError, "valid must be bool"),
    ({"valid": SCORES[:1] > 0}, ValueError, r"valid must have shape \(2, 6\)"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG_SAMPLES)
def test_wrong_samples(change, error, message):
    expect(error, "sample_rows", message, ops.sample_rows, **{"scores": SCORES, "grid_points": 4, **change})


WRONG_SEQUENCES = [
    ({"v": V.long()}, TypeError, "v must be a float32"),
    ({"v": V[0]}, ValueError, r"v must have shape \[T, H, D\]"),
    ({"attention": V[:, :, 0]}, ValueError, r"attention must have shape \[2, 9\]"),
    ({"initial": torch.ones(2, 6)}, TypeError, "initial must be bool"),
    ({"initial": torch.ones(3, 6) > 0}, ValueError, "initial must have a row per sequence with at least the prefix"),
    ({"num_prefix": 7}, ValueError, "initial must have a row per sequence with at least the prefix"),
    ({"num_prefix": -1}, ValueError, "num_prefix must be >= 0, got -1"),
    ({"key_bias": V[:5, 0, 0]}, ValueError, r"key_bias must have shape \[9\]"),
    ({"cu_seqlens": ints([[0, 9]])}, ValueError, "cu_seqlens must have 1 dimension"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG_SEQUENCES)
def test_wrong_sequences(change, error, message):
    expect(error, "sample_tokens", message, ops.sample_tokens, **{**SEQUENCE, **change})


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": ints([0, 5, 10])}, "cu_seqlens must end within the 9 rows"),
        ({"cu_seqlens": ints([1, 4, 9])}, "cu_seqlens must start at 0"),
        ({"max_seqlen": 4}, "max_seqlen must be at least every sequence length, got 4"),
        (
            {"cu_seqlens": ints([0, 1, 6]), "num_prefix": 2},
            "num_prefix must be at most every .* 2 for a length of 1 at 0",
        ),
    ],
)
def test_sequences_with_wrong_contents(change, message):
    expect(RuntimeError, "sample_tokens", message, ops.sample_tokens, **{**SEQUENCE, **change})


@needs_library
def test_direct_calls_with_sequences_are_checked():
    def call(
        attention=SEQUENCE["attention"], v=V, initial=SEQUENCE["initial"], cu=SEQUENCE["cu_seqlens"], most=5, **rest
    ):
        return torch.ops.tokenprune.sample_tokens(
            attention, v, initial, cu, most, rest.get("bias"), rest.get("prefix", 1), False, True
        )

    assert call()[0].shape == (2, 5)
    for wrong, message in [
        ({"attention": V[:, :, 0]}, "attention must have size 2"),
        ({"attention": V[:, :, 0].T.double()}, "attention must be float32"),
        ({"bias": torch.zeros(8)}, "key_bias must have size 9"),
        ({"cu": ints([])}, "cu_seqlens must have at least one entry"),
        ({"cu": SEQUENCE["cu_seqlens"].long()}, "cu_seqlens must be int32"),
        ({"most": 2**30}, r"max_seqlen must give fewer than 2\^31 rows in 2 sequences"),
        ({"initial": torch.ones(2, 6)}, "initial must be bool"),
        ({"initial": torch.ones(2, 0) > 0}, r"initial must have the prefix \(1\)"),
        ({"prefix": -1}, "num_prefix must be >= 0"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**wrong)


HASHED_ROWS = {"x": torch.rand(2, 5, 3), "projection": torch.rand(3, 4), "offset": torch.rand(4)}
WRONG_HASHES = [
    ({"x": torch.ones(2, 5, 3).long()}, TypeError, "x must be a float32"),
    ({"x": torch.rand(5, 3)}, ValueError, r"x must have shape \[R, N, D\]"),
    ({"projection": torch.rand(4, 4)}, ValueError, r"projection must have shape \[3, L\], got \(4, 4\)"),
    ({"projection": torch.rand(3, 33)}, ValueError, "projection must hold 1 to 32 hashes, got 33"),
    ({"projection": torch.rand(3, 4).double()}, TypeError, "projection must be torch.float32"),
    ({"offset": torch.rand(5)}, ValueError, r"offset must have shape \[4\], got \(5,\)"),
    ({"offset": torch.rand(4).half()}, TypeError, "offset must be torch.float32"),
    ({"width": 0.0}, ValueError, "width must be positive, got 0.0"),
    ({"width": math.nan}, ValueError, "width must be positive"),
    ({"valid": torch.ones(2, 5)}, TypeError, "valid must be bool"),
    ({"valid": torch.ones(2, 4) > 0}, ValueError, r"valid must have shape \[2, 5\]"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG_HASHES)
def test_wrong_hashes(change, error, message):
    expect(error, "hash_groups", message, ops.hash_groups, **{**HASHED_ROWS, **change})


@needs_library
def test_direct_calls_with_hashes_are_checked():
    def call(x=HASHED_ROWS["x"], projection=HASHED_ROWS["projection"], offset=HASHED_ROWS["offset"], **rest):
        return torch.ops.tokenprune.hash_groups(
            x, projection, offset, rest.get("width", 8.0), rest.get("scale", 1.0), rest.get("valid")
        )

    assert call()[0].shape == (2, 5)
    for wrong, message in [
        ({"x": torch.rand(5, 3)}, "x must have shape"),
        ({"x": torch.ones(2, 5, 3).int()}, "x must be"),
        ({"projection": torch.rand(2, 4)}, "projection must have size 3"),
        ({"projection": torch.rand(3, 4).double()}, "projection must be float32"),
        ({"projection": torch.rand(3, 33), "offset": torch.rand(33)}, "projection must hold 1 to 32 hashes, got 33"),
        ({"offset": torch.rand(3)}, "offset must have size 4"),
        ({"width": -1.0}, "width must be positive, got -1"),
        ({"valid": torch.ones(2, 4) > 0}, "valid must have size 5"),
        ({"valid": torch.ones(2, 5)}, "valid must be bool"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**wrong)


def test_wrong_values_to_sort():
    expect(TypeError, "argsort_rows", "x must be a float32", ops.argsort_rows, ORDER)
    expect(ValueError, "argsort_rows", r"x must have shape \[..., N\]", ops.argsort_rows, torch.tensor(1.0))


@needs_library
@pytest.mark.parametrize("place", [-1, 6])
@pytest.mark.parametrize("name", ["q_order", "k_order"])
def test_an_order_that_leaves_its_row(name, place):
    wrong = ORDER.clone()
    wrong[2, 1, 3] = place
    arguments = {"q": Q, "k": Q, "v": Q, "q_order": ORDER, "k_order": ORDER, "q_size": 3, "k_size": 3, name: wrong}
    expect(
        RuntimeError,
        "balanced_attention",
        rf"{name} must be in \[0, 6\), got {place}",
        ops.balanced_attention,
        **arguments,
    )


@needs_library
@pytest.mark.parametrize("place", [-1, 6])
def test_an_order_of_scores_that_leaves_its_row(place):
    order = ORDER[0].long()
    order[1, 3] = place
    with pytest.raises(RuntimeError, match=rf"sample_rows: order must be in \[0, 6\), got {place} at 9"):
        torch.ops.tokenprune.sample_rows(SCORES, order, 4, None, None, False)


@needs_library
def test_orders_that_name_tokens_twice_are_safe():
    twice = torch.zeros(3, 2, 6, dtype=torch.int32)
    out = ops.balanced_attention(Q, Q, Q, twice, twice, q_size=4, k_size=3)
    assert out.isfinite().all()


def test_flops_are_those_of_the_clusters(device):
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        ops.balanced_attention(Q, Q, Q, ORDER, ORDER, q_size=4, k_size=3)
    assert counter.get_total_flops() == 4 * 8 * 3 * 2 * (3 * 3 + 3 * 3)
    with FlopCounterMode(display=False) as counter:
        ops.balanced_attention(
            Q, Q, Q, ORDER, ORDER, q_size=4, k_size=3, q_lengths=ints([6, 0]), k_lengths=ints([5, 2])
        )
    assert counter.get_total_flops() == 4 * 8 * 3 * (3 * 2 + 3 * 3)
    with FlopCounterMode(display=False) as counter:
        ops.balanced_attention(
            Q, Q, Q, ORDER, ORDER, q_size=4, k_size=3, q_lengths=ints([0, 9]), k_lengths=ints([-1, 6])
        )
    assert counter.get_total_flops() == 4 * 8 * 3 * (3 * 3 + 3 * 3)
    with FlopCounterMode(display=False) as counter:
        ops.balanced_attention(Q, Q, Q, ORDER, ORDER, q_size=4, k_size=4, per_row=False)
    assert counter.get_total_flops() == 4 * 8 * 36 * 4
