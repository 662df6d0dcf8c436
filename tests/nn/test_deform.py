# SPDX-License-Identifier: Apache-2.0
"""The deformable attention module and the reference points of the ViT-Adapter."""

import math

import pytest
import torch
from tokenprune_ext.nn import MSDeformAttn, deform_inputs, grid_reference_points

from tests.ops.test_deform import oracle_classic

SHAPES = [(6, 8), (3, 4)]


def make(d_model=24, n_levels=2, n_heads=4, n_points=3, ratio=1.0, seed=0):
    torch.manual_seed(seed)
    module = MSDeformAttn(d_model, n_levels, n_heads, n_points, ratio)
    for parameter in module.parameters():  # away from the initialisation, where all weights are alike
        parameter.data += 0.1 * torch.randn_like(parameter)
    return module


def inputs(batch=2, queries=7, d_model=24, seed=1):
    rng = torch.Generator().manual_seed(seed)
    tokens = sum(h * w for h, w in SHAPES)
    return torch.randn(batch, queries, d_model, generator=rng), torch.randn(batch, tokens, d_model, generator=rng)


def by_hand(module, query, reference, values, mask=None):
    """Section 4.1 of the paper, step by step, in float64."""
    module, query, reference, values = module.double(), query.double(), reference.double(), values.double()
    batch, queries, _ = query.shape
    m, levels, p = module.n_heads, module.n_levels, module.n_points
    v = module.value_proj(values)
    v = v if mask is None else v.masked_fill(mask[..., None], 0.0)
    offsets = module.sampling_offsets(query).view(batch, queries, m, levels, p, 2)
    weights = module.attention_weights(query).view(batch, queries, m, -1).softmax(-1)
    reference = reference[:, :, None, :, None]
    if reference.shape[-1] == 2:
        size = torch.tensor([[w, h] for h, w in SHAPES]).view(levels, 1, 2)
        locations = reference + offsets / size
    else:
        locations = reference[..., :2] + offsets / p * reference[..., 2:] * 0.5
    out = oracle_classic(
        v.view(batch, v.shape[1], m, -1), SHAPES, None, locations, weights.view(batch, queries, m, levels, p)
    )
    return module.output_proj(out)


@pytest.mark.parametrize("ratio", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_forward(ratio, levels, columns, masked, device):
    module, (query, values) = make(ratio=ratio).to(device), inputs()
    reference = torch.rand(2, 7, levels, columns, generator=torch.Generator().manual_seed(2))
    mask = torch.rand(2, values.shape[1]) < 0.3 if masked else None
    actual = module(
        query.to(device),
        reference.to(device),
        values.to(device),
        SHAPES,
        None,
        None if mask is None else mask.to(device),
    )
    expected = by_hand(module.cpu(), query, reference, values, mask)
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_shapes_as_tensors_and_as_a_list(device):
    module, (query, values) = make().to(device), inputs()
    query, values = query.to(device), values.to(device)
    reference = torch.rand(1, 7, 1, 2, device=device)
    shapes, starts = torch.tensor(SHAPES, device=device), torch.tensor([0, 48], device=device)
    byte_mask = torch.zeros(2, 60, dtype=torch.uint8, device=device)
    expected = module(query, reference, values, SHAPES)
    assert torch.equal(module(query, reference, values, shapes, starts), expected)
    assert torch.equal(module(query, reference, values, shapes, starts, byte_mask), expected)


def test_everything_gets_a_gradient(device):
    module, (query, values) = make().to(device), inputs()
    leaves = [t.to(device).requires_grad_() for t in (query, torch.rand(2, 7, 2, 4), values)]
    module(*leaves, SHAPES).square().sum().backward()
    assert all(t.grad is not None and t.grad.any() for t in [*leaves, *module.parameters()])


def test_state_dict_has_the_official_names():
    shapes = {n: tuple(t.shape) for n, t in MSDeformAttn(32, 3, 4, 2, 0.5).state_dict().items()}
    assert shapes == {
        "sampling_offsets.weight": (48, 32),
        "sampling_offsets.bias": (48,),
        "attention_weights.weight": (24, 32),
        "attention_weights.bias": (24,),
        "value_proj.weight": (16, 32),
        "value_proj.bias": (16,),
        "output_proj.weight": (32, 16),
        "output_proj.bias": (32,),
    }


def test_initial_offsets_lie_on_rays():
    module = MSDeformAttn(48, 2, 6, 3)
    bias = module.sampling_offsets.bias.view(6, 2, 3, 2)
    for head in range(6):
        angle = 2 * math.pi * head / 6
        ray = torch.tensor([math.cos(angle), math.sin(angle)])
        for point in range(3):
            step = (point + 1) * ray / ray.abs().max()
            torch.testing.assert_close(bias[head, :, point], step.expand(2, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"d_model": 25}, "d_model must"),
        ({"d_model": 0}, "d_model must"),
        ({"ratio": 0.3}, "ratio must"),
        ({"ratio": 0.0}, "ratio must"),
        ({"n_points": 0}, "n_points must"),
        ({"n_levels": 0}, "n_levels must"),
        ({"n_heads": 0}, "n_heads must"),
    ],
)
def test_errors_of_the_constructor(arguments, message):
    with pytest.raises(ValueError, match=message):
        MSDeformAttn(**{"d_model": 24, "n_levels": 1, "n_heads": 4, "n_points": 2, **arguments})


def test_half_precision_keeps_coordinates(device):
    """References stay float32 in a bfloat16 module, and under autocast."""
    module, (query, values) = make().to(device), inputs()
    reference = torch.rand(1, 7, 1, 2, device=device)
    expected = module(query.to(device), reference, values.to(device), SHAPES)
    half = make().to(device).bfloat16()(query.to(device).bfloat16(), reference, values.to(device).bfloat16(), SHAPES)
    with torch.autocast(device.type, torch.bfloat16):
        cast = module(query.to(device), reference, values.to(device), SHAPES)
    assert half.dtype == cast.dtype == torch.bfloat16
    for actual in (half, cast):
        torch.testing.assert_close(actual.float(), expected, rtol=0.1, atol=0.1)


# ---------------------------------------------------------------- reference points


def test_reference_points_are_the_centres_of_the_cells(device):
    points = grid_reference_points([(2, 3), (1, 2)], device)
    assert points.dtype == torch.float32 and points.shape == (1, 8, 1, 2)
    rows = [((j + 0.5) / 3, (i + 0.5) / 2) for i in range(2) for j in range(3)] + [(0.25, 0.5), (0.75, 0.5)]
    torch.testing.assert_close(points[0, :, 0].cpu(), torch.tensor(rows))


def test_adapter_inputs(device):
    injector, extractor = deform_inputs(64, 96, device)
    assert injector.spatial_shapes == ((8, 12), (4, 6), (2, 3)) and injector.level_start_index == (0, 96, 120)
    assert extractor.spatial_shapes == ((4, 6),) and extractor.level_start_index == (0,)
    assert injector.reference_points.shape == (1, 24, 1, 2) and extractor.reference_points.shape == (1, 126, 1, 2)
    assert torch.equal(injector.reference_points, extractor.reference_points[:, 96:120])


@pytest.mark.parametrize("size", [(64, 80), (0, 32), (33, 64), (-32, 32)])
def test_adapter_inputs_need_sides_of_32(size):
    with pytest.raises(ValueError, match="multiples of 32"):
        deform_inputs(*size)


@pytest.mark.parametrize("part", [0, 1])
def test_the_module_takes_the_adapter_inputs(part, device):
    at = deform_inputs(64, 32, device)[part]
    module = make(n_levels=len(at.spatial_shapes)).to(device)
    tokens = sum(h * w for h, w in at.spatial_shapes)
    query = torch.randn(2, at.reference_points.shape[1], 24, device=device)
    out = module(query, at.reference_points, torch.randn(2, tokens, 24, device=device), at.spatial_shapes)
    assert out.shape == query.shape
