# SPDX-License-Identifier: Apache-2.0
"""What deformable attention promises besides the battery, and its errors."""

import pytest
import torch
from tokenprune_ext import ops

from tests.conformance import assert_same, needs_library
from tests.ops.common import expect, ints
from tests.ops.test_deform import CLASSIC, FUSED, PYRAMID, SPECS, USUAL, oracle_classic

raw = torch.ops.tokenprune
SHAPES = [list(s) for s in PYRAMID]
BY_NAME = {s.name: s for s in SPECS}


def sample_of(name, seed=0, device="cpu", **changes):
    spec = BY_NAME[name]
    return spec.cast(spec.sample(seed, **{**USUAL, **changes}), torch.float32, device)


def classic(device="cpu", **changes):
    return sample_of("ms_deform_attn", device=device, **changes)


def fused(device="cpu", **changes):
    return sample_of("ms_deform_attn_fused", device=device, **changes)


def gradients(function, inputs, names):
    leaves = {n: t.clone().requires_grad_(n in names) for n, t in inputs.items()}
    out = function(**leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, torch.autograd.grad(out, [leaves[n] for n in names], weight)


# ---------------------------------------------------------------- call forms


def test_all_forms_of_the_shapes_agree(device):
    inputs = classic(device)
    expected = ops.ms_deform_attn(**inputs)
    value, _, starts, *points = inputs.values()
    forms = [(SHAPES, None), (SHAPES, starts), (SHAPES, starts.tolist()), (tuple(PYRAMID), starts.int())]
    forms += [(inputs["spatial_shapes"].int(), starts), ([torch.Size(s) for s in SHAPES], None)]
    for shapes, start in forms:
        assert torch.equal(ops.ms_deform_attn(value, shapes, start, *points), expected)


@needs_library
def test_the_step_has_no_effect(device):
    inputs = classic(device)
    value, *rest = inputs.values()
    for step in (1, 64, 7):  # 7 does not divide the batch
        assert torch.equal(ops.ms_deform_attn(value, *rest, step), ops.ms_deform_attn(**inputs))
        assert torch.equal(raw.ms_deform_attn(value, *rest, step), ops.ms_deform_attn(**inputs))


def test_one_gemm_output_serves_offsets_and_logits_without_a_copy(device):
    inputs = fused(device)
    offsets, logits = inputs["offsets"], inputs["logits"]
    batch, queries = offsets.shape[:2]
    wide = torch.cat([offsets.flatten(2), logits.flatten(2)], -1)  # as one projection gives them
    split = wide.split([offsets[0, 0].numel(), logits[0, 0].numel()], -1)
    views = {"offsets": split[0].view(offsets.shape), "logits": split[1].view(logits.shape)}
    assert not views["offsets"].is_contiguous() and views["offsets"].shape[:2] == (batch, queries)
    expected, grads = gradients(ops.ms_deform_attn_fused, inputs, FUSED)
    actual, view_grads = gradients(ops.ms_deform_attn_fused, {**inputs, **views}, FUSED)
    assert torch.equal(actual, expected)
    assert_same(view_grads, grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_offsets_and_logits_in_the_dtype_of_the_values(dtype, device):
    inputs = {n: t.to(dtype) if n in ("value", "offsets", "logits") else t for n, t in fused(device).items()}
    wide = {n: t.float() if n in ("offsets", "logits") else t for n, t in inputs.items()}
    actual, grads = gradients(ops.ms_deform_attn_fused, inputs, FUSED)
    expected, wide_grads = gradients(ops.ms_deform_attn_fused, wide, FUSED)
    assert actual.dtype == dtype and [g.dtype for g in grads] == [inputs[n].dtype for n in FUSED]
    assert torch.equal(actual, expected)
    assert_same([g.float() for g in grads], [g.to(h.dtype).float() for g, h in zip(wide_grads, grads, strict=True)])


def test_half_coordinates_are_not_half_precise(device):
    """float32 locations beside bfloat16 values place samples as float32 does."""
    inputs = classic(device, shapes=((40, 300),), dim=8)
    inputs["value"] = torch.arange(300.0, device=device).repeat(2, 40)[..., None, None].expand(-1, -1, 3, 8) / 256
    exact = ops.ms_deform_attn(**inputs)
    rough = ops.ms_deform_attn(**{**inputs, "value": inputs["value"].bfloat16()})
    torch.testing.assert_close(rough.float(), exact, rtol=0, atol=0.02)


def test_masked_values_count_as_zero_even_if_they_are_not_finite(device):
    inputs = sample_of("ms_deform_attn_fused_levels_mask", device=device, per_level=True, mask=True)
    mask = inputs["padding_mask"][..., None, None]
    zeros = {**inputs, "value": inputs["value"].masked_fill(mask, 0), "padding_mask": torch.zeros_like(mask[..., 0, 0])}
    poison = {**inputs, "value": inputs["value"].masked_fill(mask, float("nan"))}
    expected, grads = gradients(ops.ms_deform_attn_fused, zeros, FUSED)
    actual, masked_grads = gradients(ops.ms_deform_attn_fused, poison, FUSED)
    assert torch.equal(actual, expected)
    assert (masked_grads[0].masked_select(mask) == 0).all()
    assert torch.equal(masked_grads[0].masked_fill(mask, 0), grads[0].masked_fill(mask, 0))
    assert_same(masked_grads[1:], grads[1:], exact=False)


# ---------------------------------------------------------------- points outside and undefined ones


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30, -1e30, 3.0, -2.0])
def test_points_that_read_nothing(bad, device):
    inputs = classic(device)
    locations, weights = inputs["sampling_locations"], inputs["attention_weights"]
    locations[:, 1::2, :, :, 1] = bad
    locations[:, ::3, :, 1, 2, 0] = bad  # one coordinate is enough
    reads = torch.isfinite(locations).all(-1) & (locations.abs() < 2).all(-1)
    weights[~reads] = float("nan")  # nothing is multiplied with it
    out, grads = gradients(ops.ms_deform_attn, inputs, CLASSIC)
    clean = {**inputs, "sampling_locations": torch.where(reads[..., None], locations, -5.0)}
    clean["attention_weights"] = torch.where(reads, weights, 0)
    expected, clean_grads = gradients(ops.ms_deform_attn, clean, CLASSIC)
    assert torch.equal(out, expected)
    assert_same(grads, clean_grads)
    assert (grads[1][~reads] == 0).all() and (grads[2][~reads] == 0).all()


@pytest.mark.parametrize("columns", [2, 4])
def test_undefined_references_read_nothing(columns, device):
    inputs = sample_of("ms_deform_attn_fused", device=device, columns=columns)
    inputs["reference_points"][:, ::2] = float("nan")
    out, grads = gradients(ops.ms_deform_attn_fused, inputs, FUSED)
    assert (out[:, ::2] == 0).all() and out[:, 1::2].isfinite().all()
    assert all(g.isfinite().all() for g in grads)
    assert (grads[1][:, ::2] == 0).all() and (grads[2][:, ::2] == 0).all()


def test_pixels_outside_do_not_leak_into_border_samples(device):
    """A corner outside reads zero: what lies next to the level in memory has no part, even if it is infinite."""
    value = torch.full((1, 12, 1, 4), float("inf"), device=device)
    value[:, 4:8] = 1.0
    weights = torch.ones(1, 3, 1, 3, 1, device=device)
    weights[:, :, :, [0, 2]] = 0
    locations = torch.full((1, 3, 1, 3, 1, 2), -9.0, device=device)
    locations[0, :, 0, 1, 0] = torch.tensor([[0.0, 0.5], [1.0, 0.5], [1.0, 1.0]], device=device)
    out = ops.ms_deform_attn(value, [(2, 2)] * 3, None, locations, weights)
    assert torch.equal(out[0, :, 0].cpu(), torch.tensor([0.5, 0.5, 0.25]))


def test_whole_pixels_are_read_exactly(device):
    height, width = 3, 5
    value = torch.randn(1, height * width, 1, 20, device=device)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    at = torch.stack([(x + 0.5) / width, (y + 0.5) / height], -1).view(1, -1, 1, 1, 1, 2).to(device)
    out = ops.ms_deform_attn(value, [(height, width)], None, at, torch.ones(1, 15, 1, 1, 1, device=device))
    torch.testing.assert_close(out, value.flatten(2), rtol=1e-5, atol=1e-5)


def test_an_output_beyond_the_caches_is_that_of_its_parts(device):
    rng = torch.Generator().manual_seed(0)
    value = torch.randn(1, 12, 4, 64, generator=rng).to(device)
    locations = torch.rand(1, 36000, 4, 1, 1, 2, generator=rng).to(device)
    weights = torch.rand(1, 36000, 4, 1, 1, generator=rng).to(device)
    whole = ops.ms_deform_attn(value, [[3, 4]], None, locations, weights)
    assert whole.numel() * 4 > 32 << 20
    parts = zip(locations.split(12000, 1), weights.split(12000, 1), strict=True)
    assert torch.equal(whole, torch.cat([ops.ms_deform_attn(value, [[3, 4]], None, *part) for part in parts], 1))


def test_scattered_and_crowded_queries_agree_with_the_oracle(device):
    """Queries in no order, and all of them in one place: the order of visits is no business of the result."""
    rng = torch.Generator().manual_seed(3)
    shapes, queries = ((24, 40), (12, 20)), 1500
    value = torch.randn(1, 24 * 40 + 240, 2, 32, generator=rng)
    centre = torch.rand(1, queries, 1, 1, 1, 2, generator=rng)
    centre[:, 1000:] = 0.43
    locations = centre + 0.1 * torch.randn(1, queries, 2, 2, 3, 2, generator=rng)
    weights = torch.rand(1, queries, 2, 2, 3, generator=rng)
    inputs = {"value": value, "sampling_locations": locations, "attention_weights": weights}
    wide = {n: t.double() for n, t in inputs.items()}
    levels = {"spatial_shapes": shapes, "level_start_index": None}
    actual, grads = gradients(
        lambda **t: ops.ms_deform_attn(**levels, **t), {n: t.to(device) for n, t in inputs.items()}, CLASSIC
    )
    expected, truth = gradients(lambda **t: oracle_classic(**levels, **t), wide, CLASSIC)
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-4, atol=1e-4)
    # the derivative along a coordinate jumps at whole pixels: leave points out that are closer than float32 tells
    pixel = locations.double() * torch.tensor([[40, 24], [20, 12]]).view(2, 1, 2) - 0.5
    sure = ((pixel - pixel.round()).abs() > 1e-3).all(-1)
    for name, got, want in zip(CLASSIC, grads, truth, strict=True):
        got = got.cpu().double()
        if name == "sampling_locations":
            got, want = got[sure], want[sure]
        torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-3)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_gradients_do_not_depend_on_the_threads(threads, device):
    """One image with two heads and one level: fewer slices than threads, so they are cut further."""
    inputs = classic(device, batch=1, heads=2, shapes=((20, 15),), queries=300, dim=24)
    expected, grads = gradients(ops.ms_deform_attn, inputs, CLASSIC)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        actual, again = gradients(ops.ms_deform_attn, inputs, CLASSIC)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(actual, expected)
    assert_same(again, grads)


# ---------------------------------------------------------------- transforms and tracing


@needs_library
@pytest.mark.parametrize("name", ["ms_deform_attn", "ms_deform_attn_fused_levels_mask"])
def test_vmap(name, device):
    options = {"per_level": True, "mask": True} if "mask" in name else {}
    function = BY_NAME[name].call
    samples = [sample_of(name, seed, device, **options) for seed in range(3)]
    shapes, starts = samples[0]["spatial_shapes"], samples[0]["level_start_index"]
    names = [n for n in samples[0] if n not in ("spatial_shapes", "level_start_index")]

    def call(*tensors):
        return function(spatial_shapes=shapes, level_start_index=starts, **dict(zip(names, tensors, strict=True)))

    stacked = [torch.stack([s[n] for s in samples], 1) for n in names]
    expected = torch.stack([function(**s) for s in samples])
    assert_same([torch.vmap(call, in_dims=1)(*stacked)], [expected])
    first = samples[0][names[1]]  # shared by the batch
    shared = torch.vmap(lambda v: call(v, first, *(samples[0][n] for n in names[2:])))(stacked[0].movedim(1, 0))
    assert torch.equal(shared[0], expected[0])
    with pytest.raises(ValueError, match="spatial_shapes must"):
        torch.vmap(lambda s: function(**{**samples[0], "spatial_shapes": s}))(shapes.expand(3, -1, -1))


@needs_library
def test_compiled_with_changing_sizes_in_a_list(device):
    spec = BY_NAME["ms_deform_attn_fused_list_shared"]
    torch._dynamo.reset()
    compiled = torch.compile(spec.call, backend="aot_eager", fullgraph=True, dynamic=True)
    for i, (height, width) in enumerate(((6, 9), (4, 5), (7, 3), (12, 8))):
        shapes = ((height, width), (height // 2 + 1, width // 2 + 1))
        sample = spec.sample(i, **{**USUAL, "shapes": shapes, "queries": height * width}, as_list=True, shared=True)
        inputs = spec.cast(sample, torch.float32, device)
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            assert torch.equal(compiled(**inputs, **sample.options), spec.call(**inputs, **sample.options))


@needs_library
def test_flops_count_the_samples():
    from torch.utils.flop_counter import FlopCounterMode

    inputs = fused()
    inputs["value"].requires_grad_()
    with FlopCounterMode(display=False) as counter:
        ops.ms_deform_attn_fused(**inputs).sum().backward()
    samples = inputs["logits"].numel() * inputs["value"].shape[-1]
    assert counter.get_total_flops() == (8 + 16) * samples


# ---------------------------------------------------------------- errors

C, FU = classic(), fused()
STARTS = C["level_start_index"]


def call(**changes):
    return ops.ms_deform_attn(**{**C, **changes})


def call_fused(**changes):
    return ops.ms_deform_attn_fused(**{**FU, **changes})


PUBLIC_ERRORS = {
    "value_rank": (ValueError, "value must", lambda: call(value=C["value"][0])),
    "value_dtype": (TypeError, "value must", lambda: call(value=C["value"].int())),
    "shapes_width": (ValueError, "spatial_shapes must", lambda: call(spatial_shapes=C["spatial_shapes"][:, :1])),
    "shapes_dtype": (TypeError, "spatial_shapes must", lambda: call(spatial_shapes=C["spatial_shapes"].float())),
    "shapes_device": (ValueError, "spatial_shapes must", lambda: call(spatial_shapes=C["spatial_shapes"].to("meta"))),
    "shapes_no_starts": (ValueError, "level_start_index must", lambda: call(level_start_index=None)),
    "list_sum": (ValueError, "spatial_shapes must", lambda: call(spatial_shapes=[(5, 7), (3, 4), (2, 3)])),
    "list_negative": (ValueError, "spatial_shapes must", lambda: call(spatial_shapes=[(5, 7), (-3, -4), (2, 2)])),
    "list_triples": (ValueError, "spatial_shapes must", lambda: call(spatial_shapes=[(5, 7, 1), (3, 4), (2, 2)])),
    "starts_shape": (ValueError, "level_start_index must", lambda: call(level_start_index=STARTS[:2])),
    "starts_dtype": (TypeError, "level_start_index must", lambda: call(level_start_index=STARTS.float())),
    "locations_rank": (
        ValueError,
        "sampling_locations must",
        lambda: call(sampling_locations=C["sampling_locations"][0]),
    ),
    "locations_heads": (
        ValueError,
        "sampling_locations must",
        lambda: call(sampling_locations=C["sampling_locations"][:, :, :1]),
    ),
    "locations_dtype": (
        TypeError,
        "sampling_locations must",
        lambda: call(sampling_locations=C["sampling_locations"].int()),
    ),
    "weights_shape": (
        ValueError,
        "attention_weights must",
        lambda: call(attention_weights=C["attention_weights"][..., :1]),
    ),
    "weights_device": (
        ValueError,
        "attention_weights must",
        lambda: call(attention_weights=C["attention_weights"].to("meta")),
    ),
}
FUSED_ERRORS = {
    "offsets_levels": (ValueError, "offsets must", lambda: call_fused(offsets=FU["offsets"][:, :, :, :2])),
    "logits_shape": (ValueError, "logits must", lambda: call_fused(logits=FU["logits"][..., :5])),
    "reference_queries": (
        ValueError,
        "reference_points must",
        lambda: call_fused(reference_points=FU["reference_points"][:, :2]),
    ),
    "reference_columns": (
        ValueError,
        "reference_points must",
        lambda: call_fused(reference_points=FU["reference_points"][..., :1]),
    ),
    "reference_levels": (
        ValueError,
        "reference_points must",
        lambda: call_fused(reference_points=FU["reference_points"].expand(-1, -1, 2, -1)),
    ),
    "mask_shape": (
        ValueError,
        "padding_mask must",
        lambda: call_fused(padding_mask=torch.zeros(2, 3, dtype=torch.bool)),
    ),
    "mask_dtype": (
        TypeError,
        "padding_mask must",
        lambda: call_fused(padding_mask=torch.zeros(FU["value"].shape[:2])),
    ),
}


@pytest.mark.parametrize("case", PUBLIC_ERRORS)
def test_public_errors(case):
    error, rule, function = PUBLIC_ERRORS[case]
    expect(error, "ms_deform_attn", rule, function)


@pytest.mark.parametrize("case", FUSED_ERRORS)
def test_public_errors_of_the_fused_form(case):
    error, rule, function = FUSED_ERRORS[case]
    expect(error, "ms_deform_attn_fused", rule, function)


V, SH, ST, LOC, W = C.values()
_, _, _, REF, OFF, LOG = FU.values()
FLAT = [size for pair in PYRAMID for size in pair]
GRAD = torch.zeros(2, 6, 48)
RAW_ERRORS = {
    "value_rank": ("ms_deform_attn", "value must", V[0], SH, ST, LOC, W),
    "value_dtype": ("ms_deform_attn", "value must", V.int(), SH, ST, LOC, W),
    "shapes_dtype": ("ms_deform_attn", "spatial_shapes must", V, SH.int(), ST, LOC, W),
    "shapes_rank": ("ms_deform_attn", "spatial_shapes must", V, SH[0], ST, LOC, W),
    "shapes_sum_large": ("ms_deform_attn", "spatial_shapes must", V, SH + ints([[0, 1]] * 3), ST, LOC, W),
    "shapes_sum_small": ("ms_deform_attn", "spatial_shapes must", V, SH.clamp(max=3), ints([0, 9, 18]).long(), LOC, W),
    "shapes_negative": ("ms_deform_attn", "spatial_shapes must", V, -SH, ST, LOC, W),
    "shapes_huge": ("ms_deform_attn", "spatial_shapes must", V, SH * 2**40, ST, LOC, W),
    "starts_dtype": ("ms_deform_attn", "level_start_index must", V, SH, ST.int(), LOC, W),
    "starts_wrong": ("ms_deform_attn", "level_start_index must", V, SH, ST + 1, LOC, W),
    "starts_wrong_list": ("ms_deform_attn", "level_start_index must", V, FLAT, ST * 2, LOC, W),
    "list_odd": ("ms_deform_attn", "spatial_shapes must", V, FLAT[:5], None, LOC, W),
    "list_sum": ("ms_deform_attn", "spatial_shapes must", V, [*FLAT[:4], 2, 3], None, LOC, W),
    "locations_dtype": ("ms_deform_attn", "sampling_locations must", V, SH, ST, LOC.double(), W),
    "locations_levels": ("ms_deform_attn", "sampling_locations must", V, SH, ST, LOC[:, :, :, :2], W[:, :, :, :2]),
    "weights_shape": ("ms_deform_attn", "attention_weights must", V, SH, ST, LOC, W[:, :, :, :2]),
    "weights_dtype": ("ms_deform_attn", "attention_weights must", V, SH, ST, LOC, W.half()),
    "grad_shape": ("ms_deform_attn_backward", "grad must", GRAD[..., :5], V, SH, ST, LOC, W),
    "grad_dtype": ("ms_deform_attn_backward", "grad must", GRAD.double(), V, SH, ST, LOC, W),
    "offsets_rank": ("ms_deform_attn_fused", "offsets must", V, SH, ST, REF, OFF[0], LOG),
    "offsets_dtype": ("ms_deform_attn_fused", "offsets must", V, SH, ST, REF, OFF.half(), LOG.half()),
    "logits_dtype": ("ms_deform_attn_fused", "logits must", V, SH, ST, REF, OFF, LOG.half()),
    "logits_shape": ("ms_deform_attn_fused", "logits must", V, SH, ST, REF, OFF, LOG[..., :4]),
    "reference_batch": ("ms_deform_attn_fused", "reference_points must", V, SH, ST, REF.repeat(2, 1, 1, 1), OFF, LOG),
    "reference_columns": ("ms_deform_attn_fused", "reference_points must", V, SH, ST, REF[..., :1], OFF, LOG),
    "reference_dtype": ("ms_deform_attn_fused", "reference_points must", V, SH, ST, REF.half(), OFF, LOG),
    "mask_shape": ("ms_deform_attn_fused", "padding_mask must", V, SH, ST, REF, OFF, LOG, V[:, :3, 0, 0] > 0),
    "mask_dtype": ("ms_deform_attn_fused", "padding_mask must", V, SH, ST, REF, OFF, LOG, V[:, :, 0, 0]),
}


@needs_library
@pytest.mark.parametrize("case", RAW_ERRORS)
def test_raw_errors(case):
    op, rule, *args = RAW_ERRORS[case]
    expect(RuntimeError, op, rule, getattr(raw, op), *args)


@needs_library
def test_contents_of_tensors_are_checked_through_the_public_function():
    expect(RuntimeError, "ms_deform_attn", "spatial_shapes must", call, spatial_shapes=C["spatial_shapes"] + 1)
    expect(RuntimeError, "ms_deform_attn", "level_start_index must", call, level_start_index=STARTS + 1)
