# SPDX-License-Identifier: Apache-2.0
"""Deformable attention in place of the module of transformers: by its argument order, and in a whole detector."""

import pytest
import torch
from tokenprune_ext.integrations.transformers import (
    MultiScaleDeformableAttention,
    patch_deformable_attention,
    unpatch_deformable_attention,
)
from torch import nn

from tests.ops.test_deform import PYRAMID, USUAL, make_classic, oracle_classic


def sample():
    inputs = make_classic(torch.Generator().manual_seed(0), **USUAL).inputs
    return {n: t.float() if t.is_floating_point() else t for n, t in inputs.items()}


class Attention(nn.Module):
    """The shape of a transformers attention module, for patching without transformers."""

    def __init__(self):
        super().__init__()
        self.attn = type("MultiScaleDeformableAttention", (nn.Module,), {"forward": stand_in})()

    def forward(self, *args):
        return self.attn(*args)


def stand_in(
    self,
    value,
    value_spatial_shapes,
    value_spatial_shapes_list,
    level_start_index,
    sampling_locations,
    attention_weights,
    im2col_step,
):
    return oracle_classic(value, value_spatial_shapes_list, level_start_index, sampling_locations, attention_weights)


def test_argument_order():
    value, shapes, starts, locations, weights = sample().values()
    module = MultiScaleDeformableAttention()
    expected = oracle_classic(value, PYRAMID, starts, locations, weights)
    for listed in (list(PYRAMID), None):
        torch.testing.assert_close(module(value, shapes, listed, starts, locations, weights, 64), expected)
    assert not list(module.parameters()) and not module.state_dict()


def test_patch_and_unpatch():
    value, shapes, starts, locations, weights = sample().values()
    model = nn.Sequential(Attention(), nn.ModuleList([Attention(), Attention()])).eval()
    originals = [m.attn for m in model.modules() if isinstance(m, Attention)]
    expected = model[0](value, shapes, list(PYRAMID), starts, locations, weights, 64)
    assert patch_deformable_attention(model) == 3
    assert isinstance(model[0].attn, MultiScaleDeformableAttention) and not model[0].attn.training
    actual = model[0](value, shapes, list(PYRAMID), starts, locations, weights, 64)
    torch.testing.assert_close(actual, expected)
    with pytest.raises(ValueError, match="model must have"):
        patch_deformable_attention(model)
    assert unpatch_deformable_attention(model) == 3
    assert [m.attn for m in model.modules() if isinstance(m, Attention)] == originals


def test_nothing_to_patch():
    with pytest.raises(ValueError, match="model must have a MultiScaleDeformableAttention"):
        patch_deformable_attention(nn.Linear(2, 2))


def test_other_arguments_are_refused():
    model = Attention()
    type(model.attn).forward = lambda self, value, shapes, locations, weights: value
    with pytest.raises(ValueError, match="attn must take"):
        patch_deformable_attention(model)


def test_a_deformable_detr_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.DeformableDetrConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=9,
        num_feature_levels=2,
        encoder_n_points=3,
        decoder_n_points=3,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage1", "stage2"]
        ),
    )
    torch.manual_seed(0)
    model = transformers.DeformableDetrModel(config).eval()
    images = torch.randn(2, 3, 64, 96)
    mask = torch.ones(2, 64, 96, dtype=torch.long)
    mask[1, :, 64:] = 0
    with torch.no_grad():
        expected = model(images, pixel_mask=mask)
        assert patch_deformable_attention(model) == 2
        actual = model(images, pixel_mask=mask)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        actual.encoder_last_hidden_state, expected.encoder_last_hidden_state, rtol=1e-4, atol=1e-4
    )
