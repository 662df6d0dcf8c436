# SPDX-License-Identifier: Apache-2.0
"""What clustering and reconstruction promise besides the battery, and their errors."""

import resource

import pytest
import torch
from tokenprune_ext import ops

from tests.conformance import assert_same, needs_library
from tests.ops.common import expect, ints
from tests.ops.test_cluster import home_cells, oracle_cluster, oracle_nearest, oracle_reconstruct
from tests.spec import DTYPES

raw = torch.ops.tokenprune


def draw(*shape, seed=0, device="cpu", dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


# ---------------------------------------------------------------- clustering


@pytest.mark.parametrize(("size", "cells"), [(44, 26), (46, 28), (74, 48), (32, 23), (37, 26), (40, 28), (600, 300)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_home_cells_follow_the_float32_rule(size, cells, dtype, device):
    """With a window of one cell a center is the mean of the tokens at home there, in every dtype."""
    home = torch.tensor(home_cells(size, cells))
    if (size, cells) in ((44, 26), (46, 28), (74, 48)):  # here exact integers would give something else
        assert home.tolist() != [i * cells // size for i in range(size)]
    one_hot = torch.eye(size, device=device, dtype=dtype)[None]
    centers = ops.cluster_tokens(one_hot, (1, size), (1, cells), iters=1, window=1)[0].cpu()
    assert torch.equal(centers > 0, home == torch.arange(cells)[:, None])


def test_a_number_of_clusters_is_a_square(device):
    x = draw(1, 64, 6, device=device)
    assert_same([ops.cluster_tokens(x, (8, 8), 9)], [ops.cluster_tokens(x, (8, 8), (3, 3))])


def test_no_iteration_is_adaptive_pooling(device):
    x = draw(2, 63, 5, device=device)
    pooled = torch.nn.functional.adaptive_avg_pool2d(x.transpose(1, 2).unflatten(2, (7, 9)), (3, 4))
    torch.testing.assert_close(ops.cluster_tokens(x, (7, 9), (3, 4), iters=0), pooled.flatten(2).transpose(1, 2))


def test_one_center_is_the_mean(device):
    x = draw(2, 30, 5, device=device)
    torch.testing.assert_close(ops.cluster_tokens(x, (5, 6), 1), x.mean(1, keepdim=True))


def test_a_center_that_nobody_chose_becomes_zero(device):
    centers = ops.cluster_tokens(draw(1, 1, 3, device=device), (1, 1), (4, 4), iters=1, window=1)
    assert centers[0, 0].abs().min() > 0 and centers[0, 1:].abs().max() == 0
    far = 100 * draw(1, 64, 8, device=device)
    centers = ops.cluster_tokens(far, (8, 8), (6, 6))
    assert (centers.abs().amax(-1) < 1e-3).any()  # a total affinity below 1e-16 shrinks towards zero
    exact = oracle_cluster(far.cpu().double().unflatten(1, (8, 8)), (6, 6))
    torch.testing.assert_close(centers.cpu().double(), exact, atol=1e-3, rtol=1e-5)


def test_a_shift_of_all_tokens_shifts_the_centers(device):
    """Distances are taken from near the tokens: a large common offset costs few digits."""
    x = draw(1, 100, 32, device=device)
    centers = ops.cluster_tokens(x, (10, 10), 16, temperature=0.1)
    shifted = ops.cluster_tokens(x + 64, (10, 10), 16, temperature=0.1)
    torch.testing.assert_close(shifted - 64, centers, atol=2e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_iterate_in_float32(dtype, device):
    """Five iterations lose no more than one rounding of inputs and outputs would."""
    x = draw(1, 256, 64, device=device, dtype=dtype)
    centers = ops.cluster_tokens(x, (16, 16), 64, temperature=0.02)
    exact = ops.cluster_tokens(x.double(), (16, 16), 64, temperature=0.02)
    assert (centers.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_labels_are_the_nearest_returned_centers(dtype, device):
    x = draw(2, 90, 24, device=device, dtype=dtype)
    centers, labels = ops.cluster_tokens(x, (9, 10), (4, 5), temperature=0.1, return_labels=True)
    assert labels.dtype == torch.int64
    assert torch.equal(labels.cpu(), oracle_nearest(x.cpu().double(), centers.cpu().double()))


def test_labels_see_all_centers_and_take_the_first(device):
    features = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [3.0, 3.0]]], device=device)
    centers = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]], device=device)
    assert ops.nearest_centers(features, centers).tolist() == [[1, 1, 1]]
    assert ops.nearest_centers(features, torch.full((1, 3, 2), float("nan"), device=device)).tolist() == [[0, 0, 0]]


def test_the_gradient_is_that_of_the_last_mean(device):
    x = draw(1, 30, 4, device=device).requires_grad_()
    centers = ops.cluster_tokens(x, (5, 6), (2, 3), temperature=0.3)
    grads = torch.stack([torch.autograd.grad(c, x, retain_graph=True)[0][0, :, 0] for c in centers[0, :, 0]])
    torch.testing.assert_close(grads.sum(1), torch.ones(6, device=device))  # each center is a mean
    torch.testing.assert_close(grads @ x[0], centers[0])


def test_strided_tokens_need_no_copy_of_the_caller(device):
    wide = draw(2, 31, 9, device=device)
    views = (wide[:, 1:, :8], wide.transpose(0, 1).contiguous().transpose(0, 1)[:, 1:, :8])
    for view in (*views, wide[:, 1:, :8].transpose(1, 2).contiguous().transpose(1, 2)):
        assert_same([ops.cluster_tokens(view, (5, 6), (2, 3))], [ops.cluster_tokens(view.contiguous(), (5, 6), (2, 3))])


@needs_library
def test_the_dense_affinities_never_exist(device):
    """They would take 4 GiB here."""
    x = draw(1, 256 * 256, 4, device=device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    centers = ops.cluster_tokens(x, (256, 256), (128, 128), iters=1)
    assert centers.isfinite().all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@needs_library
def test_a_gradient_needs_the_affinities(device):
    x = draw(1, 6, 3, device=device).requires_grad_()
    centers, mass, affinity = raw.cluster_tokens(x, 2, 3, 1, 2, 1, 1.0, 3, False)
    assert not mass.requires_grad and not affinity.requires_grad and affinity.shape == (1, 6, 0)
    expect(ValueError, "cluster_tokens", "affinity must be True", centers.sum().backward)


# ---------------------------------------------------------------- reconstruction


def weights_of(features, centers, **options):
    """With identity values the output is the weights."""
    identity = torch.eye(centers.shape[1], device=centers.device, dtype=centers.dtype).expand(len(centers), -1, -1)
    return ops.reconstruct_tokens(features, centers, identity, **options)


def test_ties_are_all_kept(device):
    centers = draw(1, 5, 8, device=device).repeat_interleave(3, 1)
    weights = weights_of(draw(1, 40, 8, seed=1, device=device), centers, k=4)
    assert ((weights > 0).sum(-1) == 6).all()


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_rows_have_unit_norm(norm, device):
    weights = weights_of(draw(2, 40, 8, device=device), draw(2, 30, 8, seed=1, device=device), k=7, norm=norm)
    length = torch.linalg.vector_norm(weights, ord=2 if norm == "l2" else 1, dim=-1)
    torch.testing.assert_close(length, torch.ones_like(length))
    assert ((weights > 0).sum(-1) == 7).all()


def test_k_is_clamped_and_negative_means_all(device):
    f, s, v = draw(1, 20, 6, device=device), draw(1, 9, 6, seed=1, device=device), draw(1, 9, 4, seed=2, device=device)
    assert_same([ops.reconstruct_tokens(f, s, v, k=k) for k in (9, 50, -1)], [ops.reconstruct_tokens(f, s, v)] * 3)


def test_a_token_far_from_all_centers_gets_zeros(device):
    f, s, v = (draw(1, n, 4, seed=n, device=device).requires_grad_() for n in (6, 5, 5))
    far = torch.cat([f[:, :3], f[:, 3:] + 1000], 1)
    y = ops.reconstruct_tokens(far, s, v, k=2)
    assert y[0, :3].abs().min() > 0 and y[0, 3:].abs().max() == 0
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (f, s, v)))


def test_a_norm_below_the_floor_is_a_constant(device):
    f, s, v = (draw(1, n, 4, seed=n, device=device, dtype=torch.float64) for n in (6, 5, 5))
    f = f + 33  # weights around 1e-25 to 1e-35
    inputs = [t.requires_grad_() for t in (f, s, v)]
    grads = []
    for function in (ops.reconstruct_tokens, oracle_reconstruct):
        y = function(*inputs, k=3, temperature=0.02)
        grads.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert 0 < grads[1][0].abs().max() < 1e-6
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, atol=0, rtol=1e-9)


def test_nan_stays_in_its_row(device):
    f, s, v = draw(1, 100, 6, device=device), draw(1, 9, 6, seed=1, device=device), draw(1, 9, 4, seed=2, device=device)
    clean = ops.reconstruct_tokens(f, s, v, k=3)
    f[0, 50] = float("nan")
    y = ops.reconstruct_tokens(f, s, v, k=3)
    assert y[0, 50].isnan().all()
    others = torch.arange(100) != 50
    assert_same([y[0, others]], [clean[0, others]])


def test_autocast_promotes(device):
    f, s, v = draw(1, 20, 6, device=device), draw(1, 9, 6, seed=1, device=device), draw(1, 9, 4, seed=2, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        y = ops.reconstruct_tokens(f, s, v.bfloat16())
    assert y.dtype == torch.float32
    assert_same([y], [ops.reconstruct_tokens(f, s, v.bfloat16().float())])


# ---------------------------------------------------------------- unpooling


def test_a_label_names_a_row_of_its_own_image(device):
    x = draw(2, 3, 4, device=device)
    y = ops.unpool_tokens(x, ints([[2, 0], [1, 1]], device, torch.int64))
    assert_same([y], [torch.stack([x[0, [2, 0]], x[1, [1, 1]]])])


@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_a_label_outside_is_an_error_on_the_cpu(label):
    labels = ints([[0, label]] * 2, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="must be"):
        ops.unpool_tokens(draw(2, 3, 4), labels)


# ---------------------------------------------------------------- errors

X = torch.zeros(2, 30, 4)
F, S, V = torch.zeros(2, 30, 4), torch.zeros(2, 6, 4), torch.zeros(2, 6, 7)


def call_cluster(**changes):
    arguments = {"x": X, "grid": (5, 6), "clusters": (2, 3), **changes}
    return ops.cluster_tokens(arguments.pop("x"), arguments.pop("grid"), arguments.pop("clusters"), **arguments)


def call_reconstruct(**changes):
    arguments = {"features": F, "centers": S, "values": V, **changes}
    rows = [arguments.pop(n) for n in ("features", "centers", "values")]
    return ops.reconstruct_tokens(*rows, **arguments)


CLUSTER, RECONSTRUCT = "cluster_tokens", "reconstruct_tokens"
PUBLIC_ERRORS = {
    "x_rank": (ValueError, CLUSTER, "x must", lambda: call_cluster(x=X[0])),
    "x_dtype": (TypeError, CLUSTER, "x must", lambda: call_cluster(x=X.int())),
    "x_tokens": (ValueError, CLUSTER, "x must", lambda: call_cluster(grid=(5, 5))),
    "grid": (ValueError, CLUSTER, "grid must", lambda: call_cluster(grid=30)),
    "grid_negative": (ValueError, CLUSTER, "grid must", lambda: call_cluster(grid=(-5, -6))),
    "clusters_square": (ValueError, CLUSTER, "clusters must", lambda: call_cluster(clusters=1000)),
    "clusters_none": (ValueError, CLUSTER, "clusters must", lambda: call_cluster(clusters=0)),
    "clusters_negative": (ValueError, CLUSTER, "clusters must", lambda: call_cluster(clusters=-4)),
    "clusters_three": (ValueError, CLUSTER, "clusters must", lambda: call_cluster(clusters=(1, 2, 3))),
    "iters": (ValueError, CLUSTER, "iters must", lambda: call_cluster(iters=-1)),
    "window_even": (ValueError, CLUSTER, "window must", lambda: call_cluster(window=4)),
    "window_negative": (ValueError, CLUSTER, "window must", lambda: call_cluster(window=-1)),
    "temperature_zero": (ValueError, CLUSTER, "temperature must", lambda: call_cluster(temperature=0)),
    "temperature_nan": (ValueError, CLUSTER, "temperature must", lambda: call_cluster(temperature=float("nan"))),
    "nearest_none": (ValueError, "nearest_centers", "centers must", lambda: ops.nearest_centers(F, S[:, :0])),
    "nearest_width": (ValueError, "nearest_centers", "centers must", lambda: ops.nearest_centers(F, V)),
    "features_rank": (ValueError, RECONSTRUCT, "features must", lambda: call_reconstruct(features=F[0])),
    "features_dtype": (TypeError, RECONSTRUCT, "features must", lambda: call_reconstruct(features=F.int())),
    "centers_dtype": (TypeError, RECONSTRUCT, "centers must", lambda: call_reconstruct(centers=S.half())),
    "centers_batch": (ValueError, RECONSTRUCT, "centers must", lambda: call_reconstruct(centers=S[:1])),
    "centers_width": (ValueError, RECONSTRUCT, "centers must", lambda: call_reconstruct(centers=V)),
    "centers_device": (ValueError, RECONSTRUCT, "centers must", lambda: call_reconstruct(centers=S.to("meta"))),
    "centers_none": (
        ValueError,
        RECONSTRUCT,
        "centers must",
        lambda: call_reconstruct(centers=S[:, :0], values=V[:, :0]),
    ),
    "values_rows": (ValueError, RECONSTRUCT, "values must", lambda: call_reconstruct(values=V[:, :5])),
    "k": (ValueError, RECONSTRUCT, "k must", lambda: call_reconstruct(k=0)),
    "norm": (ValueError, RECONSTRUCT, "norm must", lambda: call_reconstruct(norm="max")),
    "negative": (ValueError, RECONSTRUCT, "temperature must", lambda: call_reconstruct(temperature=-1)),
    "infinite": (ValueError, RECONSTRUCT, "temperature must", lambda: call_reconstruct(temperature=float("inf"))),
    "unpool_rank": (ValueError, "unpool_tokens", "x must", lambda: ops.unpool_tokens(X[0], ints([[1]]))),
    "labels_rank": (ValueError, "unpool_tokens", "labels must", lambda: ops.unpool_tokens(X, ints([1]))),
    "labels_batch": (ValueError, "unpool_tokens", "labels must", lambda: ops.unpool_tokens(X, ints([[1]]))),
    "labels_dtype": (TypeError, "unpool_tokens", "labels must", lambda: ops.unpool_tokens(X, X[..., 0])),
}


@pytest.mark.parametrize("case", PUBLIC_ERRORS)
def test_public_errors(case):
    expect(*PUBLIC_ERRORS[case])


G, MASS, AFFINITY = torch.zeros(2, 6, 4), torch.zeros(2, 6), torch.zeros(2, 30, 15)
GEOMETRY = (5, 6, 2, 3, 1)
BACKWARD, RECONSTRUCT_BACKWARD = "cluster_tokens_backward", "reconstruct_tokens_backward"
RAW_ERRORS = {
    "x_rank": (CLUSTER, "x must", X[0], *GEOMETRY, 1.0, 5, False),
    "x_dtype": (CLUSTER, "x must", X.int(), *GEOMETRY, 1.0, 5, False),
    "x_tokens": (CLUSTER, "x must", X[:, :20], *GEOMETRY, 1.0, 5, False),
    "height": (CLUSTER, "height must", X, -5, -6, 2, 3, 1, 1.0, 5, False),
    "rows": (CLUSTER, "rows must", X, 5, 6, 0, 3, 1, 1.0, 5, False),
    "cols": (CLUSTER, "cols must", X, 5, 6, 2, 2**25, 1, 1.0, 5, False),
    "iters": (CLUSTER, "iters must", X, 5, 6, 2, 3, -1, 1.0, 5, False),
    "window": (CLUSTER, "window must", X, *GEOMETRY, 1.0, 2, False),
    "temperature": (CLUSTER, "temperature must", X, *GEOMETRY, 0.0, 5, False),
    "grad_rows": (BACKWARD, "grad must", G[:, :5], MASS, AFFINITY, *GEOMETRY, 5),
    "grad_dtype": (BACKWARD, "grad must", G.int(), MASS, AFFINITY, *GEOMETRY, 5),
    "mass_shape": (BACKWARD, "mass must", G, MASS[:, :5], AFFINITY, *GEOMETRY, 5),
    "mass_dtype": (BACKWARD, "mass must", G, MASS.double(), AFFINITY, *GEOMETRY, 5),
    "affinity_slots": (BACKWARD, "affinity must", G, MASS, AFFINITY, *GEOMETRY, 3),
    "affinity_dtype": (BACKWARD, "affinity must", G, MASS, AFFINITY.half(), *GEOMETRY, 5),
    "nearest_width": ("nearest_centers", "centers must", F, V),
    "nearest_none": ("nearest_centers", "centers must", F, S[:, :0]),
    "centers_dtype": (RECONSTRUCT, "centers must", F, S.half(), V, 3, 1.0, False),
    "centers_none": (RECONSTRUCT, "centers must", F, S[:, :0], V[:, :0], 3, 1.0, False),
    "values_rows": (RECONSTRUCT, "values must", F, S, V[:, :5], 3, 1.0, False),
    "k": (RECONSTRUCT, "k must", F, S, V, 0, 1.0, False),
    "negative": (RECONSTRUCT, "temperature must", F, S, V, 3, -1.0, False),
    "grad_width": (RECONSTRUCT_BACKWARD, "grad must", F, F, S, V, 3, 1.0, False),
}


@needs_library
@pytest.mark.parametrize("case", RAW_ERRORS)
def test_raw_errors(case):
    op, rule, *arguments = RAW_ERRORS[case]
    expect(RuntimeError, op, rule, getattr(raw, op), *arguments)


# ---------------------------------------------------------------- devices without kernels, flops


def test_the_reference_agrees(device):
    """What serves devices without kernels, gradients and affinities included."""
    from tokenprune_ext.ops._register import _references

    arguments = (draw(2, 42, 12, device=device).requires_grad_(), 6, 7, 4, 3, 2, 0.1, 3, True)
    results = []
    for function in (_references["cluster_tokens"], raw.cluster_tokens.default):
        out = function(*arguments)
        results.append([*out, torch.autograd.grad(out[0].square().sum(), arguments[0])[0]])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    rows = [draw(2, n, 12, seed=n, device=device).requires_grad_() for n in (20, 9, 9)]
    results = []
    for function in (_references["reconstruct_tokens"], raw.reconstruct_tokens.default):
        out = function(*rows, 4, 0.1, True)
        results.append([out, *torch.autograd.grad(out.square().sum(), rows)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    assert torch.equal(_references["nearest_centers"](*rows[:2]), raw.nearest_centers(*rows[:2]))


@needs_library
def test_flops():
    from torch.utils.flop_counter import FlopCounterMode

    x = draw(2, 64, 8).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        centers = ops.cluster_tokens(x, (8, 8), 16, iters=3)
        ops.reconstruct_tokens(x, centers, centers, k=5).sum().backward()
    count = {str(k).rpartition(".")[2]: v for k, v in counter.get_flop_counts()["Global"].items()}
    assert count == {
        "cluster_tokens": 3 * 4 * 128 * 25 * 8,
        "cluster_tokens_backward": 2 * 128 * 25 * 8,
        "reconstruct_tokens": 2 * 128 * (16 + 5) * 8,
        "reconstruct_tokens_backward": 2 * 128 * (16 + 5 * 4) * 8,
    }
