# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention in both call forms and both forms of the shapes."""

import torch
from tokenprune_ext import ops

from tests.conformance import Conformance, OpSpec, Sample

raw = torch.ops.tokenprune

_CLASSIC = "Tensor sampling_locations, Tensor attention_weights"
_FUSED = "Tensor reference_points, Tensor offsets, Tensor logits"
_LEVELS = {
    "": "Tensor spatial_shapes, Tensor level_start_index",
    ".list": "SymInt[] spatial_shapes, Tensor? level_start_index",
}
SCHEMAS = [
    schema
    for overload, levels in _LEVELS.items()
    for schema in (
        f"ms_deform_attn{overload}(Tensor value, {levels}, {_CLASSIC}, SymInt im2col_step=64) -> Tensor",
        f"ms_deform_attn_backward{overload}(Tensor grad, Tensor value, {levels}, {_CLASSIC}) -> "
        "(Tensor grad_value, Tensor grad_locations, Tensor grad_weights)",
        f"ms_deform_attn_fused{overload}(Tensor value, {levels}, {_FUSED}, Tensor? padding_mask=None) -> Tensor",
        f"ms_deform_attn_fused_backward{overload}(Tensor grad, Tensor value, {levels}, {_FUSED}, "
        "Tensor? padding_mask, bool want_reference) -> "
        "(Tensor grad_value, Tensor grad_reference, Tensor grad_offsets, Tensor grad_logits)",
    )
]


# ---------------------------------------------------------------- samples

PYRAMID = ((5, 7), (3, 4), (2, 2))


def normal(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=torch.float64)


def off_the_edges(pixel):
    """Pixel coordinates moved away from whole numbers, where the derivative jumps and round-off decides."""
    return pixel.floor() + (pixel - pixel.floor()).clamp(0.02, 0.98)


def sizes_of(shapes):
    """(W, H) of every level, [L, 1, 2]; 1 for an empty one, which nothing reads."""
    return torch.tensor([[w, h] for h, w in shapes], dtype=torch.float64).view(-1, 1, 2).clamp(min=1)


def pixels(rng, batch, queries, heads, shapes, points):
    """Coordinates inside, across the borders and outside of every level."""
    unit = torch.rand(batch, queries, heads, len(shapes), points, 2, generator=rng, dtype=torch.float64)
    return off_the_edges((unit * 1.6 - 0.3) * sizes_of(shapes))


def levels(shapes, as_list):
    if as_list:
        return {}, {"spatial_shapes": shapes, "level_start_index": None}
    rows = torch.tensor(shapes, dtype=torch.int64).view(-1, 2)
    starts = rows.prod(1).cumsum(0) - rows.prod(1)
    return {"spatial_shapes": rows, "level_start_index": starts}, {}


def make_classic(rng, batch, queries, heads, dim, shapes, points, as_list=False):
    shapes = [tuple(s) for s in shapes]
    value = normal(rng, batch, sum(h * w for h, w in shapes), heads, dim)
    at = pixels(rng, batch, queries, heads, shapes, points)
    tensors, options = levels(shapes, as_list)
    locations = ((at + 0.5) / sizes_of(shapes)).float().double()  # all dtypes see the same points
    weights = torch.rand(batch, queries, heads, len(shapes), points, generator=rng, dtype=torch.float64)
    return Sample(
        {"value": value, **tensors, "sampling_locations": locations, "attention_weights": weights.float().double()},
        options,
    )


def make_fused(
    rng, batch, queries, heads, dim, shapes, points, as_list=False, columns=2, per_level=False, shared=False, mask=False
):
    shapes = [tuple(s) for s in shapes]
    tokens, count = sum(h * w for h, w in shapes), len(shapes)
    tensors, options = levels(shapes, as_list)
    reference = torch.rand(
        1 if shared else batch, queries, count if per_level else 1, columns, generator=rng, dtype=torch.float64
    )
    reference = (reference * 0.9 + 0.05).float().double()
    at, size = pixels(rng, batch, queries, heads, shapes, points), sizes_of(shapes)
    wide = reference[:, :, None, :, None]
    if columns == 2:
        offsets = at + 0.5 - wide * size
    else:
        offsets = ((at + 0.5) / size - wide[..., :2]) / wide[..., 2:] * 2 * points
    inputs = {
        "value": normal(rng, batch, tokens, heads, dim),
        **tensors,
        "reference_points": reference,
        "offsets": offsets.float().double(),
        "logits": normal(rng, batch, queries, heads, count * points).float().double(),
    }
    if mask:
        inputs["padding_mask"] = torch.rand(batch, tokens, generator=rng) < 0.3
    return Sample(inputs, options)


# ---------------------------------------------------------------- oracle: four corners, one after another


def pairs(shapes):
    return [tuple(s) for s in (shapes.tolist() if isinstance(shapes, torch.Tensor) else shapes)]


def oracle_classic(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    batch, _, heads, dim = value.shape
    out = value.new_zeros(batch, sampling_locations.shape[1], heads, dim)
    image = torch.arange(batch)[:, None, None, None]
    head = torch.arange(heads)[None, None, :, None]
    start = 0
    for level, (height, width) in enumerate(pairs(spatial_shapes)):
        at = sampling_locations[:, :, :, level]
        x, y = at[..., 0] * width - 0.5, at[..., 1] * height - 0.5
        for dy in (0, 1):
            for dx in (0, 1):
                column, row = x.floor() + dx, y.floor() + dy
                weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                if not inside.any():
                    continue
                pixel = start + (row * width + column).long().clamp(0, height * width - 1)
                corner = value[image, torch.where(inside, pixel, start), head]  # [B, Q, M, P, D]
                weight = torch.where(inside, weight * attention_weights[:, :, :, level], 0)
                out = out + (weight[..., None] * corner).sum(3)
        start += height * width
    return out.flatten(2)


def oracle_fused(value, spatial_shapes, level_start_index, reference_points, offsets, logits, padding_mask=None):
    batch, queries, heads, count, points, _ = offsets.shape
    reference = reference_points[:, :, None, :, None]
    size = sizes_of(pairs(spatial_shapes)).to(offsets)
    if reference.shape[-1] == 2:
        locations = reference + offsets / size
    else:
        locations = reference[..., :2] + offsets / max(points, 1) * reference[..., 2:] * 0.5
    weights = logits.softmax(-1)
    if padding_mask is not None:
        value = torch.where(padding_mask[..., None, None], 0, value)
    weights = weights.view(batch, queries, heads, count, points)
    return oracle_classic(value, spatial_shapes, level_start_index, locations, weights)


# ---------------------------------------------------------------- specs

USUAL = {"batch": 2, "queries": 6, "heads": 3, "dim": 16, "shapes": PYRAMID, "points": 4}
CASES = {
    "usual": USUAL,
    "width_8": {**USUAL, "dim": 8},
    "width_12": {**USUAL, "dim": 12, "points": 3},
    "width_32": {**USUAL, "dim": 32, "points": 2},
    "width_64": {**USUAL, "dim": 64, "shapes": ((9, 6),)},
    "width_100": {**USUAL, "dim": 100, "batch": 1, "queries": 3},
    "width_1": {**USUAL, "dim": 1},
    "sixteen": {**USUAL, "shapes": (*PYRAMID, (1, 3))},
    "one_point": {**USUAL, "shapes": ((6, 6),), "points": 1},
    "many_points": {**USUAL, "batch": 1, "queries": 2, "points": 37},
    "five_levels": {**USUAL, "shapes": (*PYRAMID, (1, 1), (4, 1)), "points": 1},
    "many_queries": {**USUAL, "batch": 1, "queries": 700, "heads": 2},
    "many_heads": {**USUAL, "batch": 1, "queries": 2, "heads": 40, "dim": 4},
    "empty_level": {**USUAL, "shapes": ((5, 7), (0, 4), (2, 2))},
    "no_queries": {**USUAL, "queries": 0},
    "no_images": {**USUAL, "batch": 0},
    "no_heads": {**USUAL, "heads": 0},
    "no_width": {**USUAL, "dim": 0},
    "no_points": {**USUAL, "points": 0},
    "no_levels": {**USUAL, "shapes": ()},
}
SMALL = {"batch": 2, "queries": 3, "heads": 2, "dim": 3, "shapes": ((3, 4), (2, 2)), "points": 2}
FUZZ = {
    "batch": (0, 2),
    "queries": (0, 9),
    "heads": (1, 4),
    "dim": (1, 70),
    "shapes": [((3, 4),), PYRAMID, ((8, 1), (1, 9)), ((2, 2), (0, 3), (5, 3), (4, 4))],
    "points": (1, 6),
}
CLASSIC = ("value", "sampling_locations", "attention_weights")
FUSED = ("value", "reference_points", "offsets", "logits")


def classic_spec(name, **extra):
    return OpSpec(
        name,
        ops.ms_deform_attn,
        oracle_classic,
        make_classic,
        {n: {**c, **extra} for n, c in CASES.items()},
        lambda n: {**USUAL, "queries": n, **extra},
        {**FUZZ, **{k: [v] for k, v in extra.items()}},
        {**SMALL, **extra},
        CLASSIC,
        frozenset(CLASSIC[1:]),
        frozenset({"value"}),
        inductor=not extra,
    )


def fused_spec(name, **extra):
    return OpSpec(
        name,
        ops.ms_deform_attn_fused,
        oracle_fused,
        make_fused,
        {n: {**c, **extra} for n, c in CASES.items()},
        lambda n: {**USUAL, "queries": n, **extra},
        {**FUZZ, **{k: [v] for k, v in extra.items()}},
        {**SMALL, **extra},
        FUSED,
        frozenset(FUSED[1:]),
        frozenset({"value"}),
        inductor="mask" in extra,
    )


SPECS = [
    classic_spec("ms_deform_attn"),
    classic_spec("ms_deform_attn_list", as_list=True),
    fused_spec("ms_deform_attn_fused"),
    fused_spec("ms_deform_attn_fused_list_shared", as_list=True, shared=True),
    fused_spec("ms_deform_attn_fused_levels_mask", per_level=True, mask=True),
    fused_spec("ms_deform_attn_fused_boxes", columns=4, per_level=True, as_list=True, mask=True),
]


class TestBattery(Conformance):
    specs = SPECS


def test_corners_outside_of_a_level_read_nothing():
    """Points over the edges of one level, whose neighbours in memory are NaN."""
    rng = torch.Generator().manual_seed(0)
    shapes, queries, heads, dim = [(2, 3), (3, 4), (2, 2)], 40, 2, 40
    value = torch.full((1, 22, heads, dim), torch.nan)
    value[:, 6:18] = normal(rng, 1, 12, heads, dim)
    locations = 1.6 * torch.rand(1, queries, heads, 1, 3, 2, generator=rng) - 0.3
    weights = torch.rand(1, queries, heads, 1, 3, generator=rng)
    alone = ops.ms_deform_attn(value[:, 6:18], shapes[1:2], None, locations, weights)
    outside = torch.full_like(locations, -9.0)
    locations = torch.cat([outside, locations, outside], 3)
    weights = torch.cat([torch.full_like(weights, torch.inf), weights, torch.full_like(weights, torch.nan)], 3)
    assert torch.equal(ops.ms_deform_attn(value, shapes, None, locations, weights), alone)
    assert alone.isfinite().all() and (alone != 0).any()
