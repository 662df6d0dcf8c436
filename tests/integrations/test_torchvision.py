# SPDX-License-Identifier: Apache-2.0
"""``patch`` on torchvision's VisionTransformer."""

import copy
import io

import pytest
import tokenprune_ext as tp
import torch
from torch import nn

torchvision = pytest.importorskip("torchvision")

from tokenprune_ext._patch import features, patched  # noqa: E402
from tokenprune_ext.integrations import torchvision as adapter  # noqa: E402

from . import common  # noqa: E402


def small(**options):
    """A seeded small model."""
    torch.manual_seed(0)
    sizes = {"image_size": 64, "patch_size": 16, "num_layers": 3, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96}
    return common.liven(torchvision.models.VisionTransformer(**sizes, num_classes=7, **options))


def images(batch=2):
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("options", [{}, {"representation_size": 24}])
def test_identities(options):
    model, x = small(**options), images()
    common.hold_identities(model, lambda: model(x), adapter)


def test_gradients():
    model, x = small().double(), images().double()
    common.hold_gradients(model, lambda: model(x))
    common.hold_gradients(model.train(), lambda: model(x))


def test_compile():
    common.hold_compile(small(), images)


def test_autocast():
    model, x = small(), images()
    common.hold_autocast(model, lambda: model(x))


def test_half_precision():
    model, x = small().bfloat16(), images().bfloat16()
    with torch.no_grad(), patched(model, "tome", r=3):
        assert model(x).dtype == torch.bfloat16


def test_checkpointing_of_the_whole_model():
    """torchvision has no switch of its own."""
    model, x = small(), images().requires_grad_()
    tp.patch(model, "tome", r=3)
    gradients = []
    for run in (model, lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)):
        gradients.append(torch.autograd.grad(run(x).square().sum(), x)[0])
    torch.testing.assert_close(*gradients)


def test_dropout_while_training():
    """Dropout behind attention and MLP is the model's; dropped attention weights are refused."""
    model, x = small(dropout=0.2).train(), images(1)  # one image: torch's attention transposes batches in memory
    outputs = []
    for method in (None, "tome"):
        if method:
            tp.patch(model, method, r=0, fast_idle=False)
        torch.manual_seed(0)
        outputs.append(model(x))
    torch.testing.assert_close(*outputs)
    model = small(attention_dropout=0.1)
    tp.patch(model, "tome", r=3)
    model(x)
    with pytest.raises(ValueError, match="attn_drop must be 0"):
        model.train()(x)


def test_trace_and_features():
    model, x = small(), images()
    tp.patch(model, "tome", r=[2, 3, 0])
    assert [step.tokens.tolist() for step in tp.trace(model, x)] == [[15, 15], [12, 12], [12, 12]]
    y, state = features(model, x)
    assert y.shape == (2, 12, 48) and state.grid == (4, 4)


def test_profile_and_picture(tmp_path):
    model, x = small(), images()
    assert tp.profile(model, x, budget_s=0.01)["tokens"] is None
    tp.patch(model, "tome", r=[2, 3, 0])
    assert tp.profile(model, x, budget_s=0.01)["tokens"] == [17, 15, 12]
    assert tp.visualize(model, x, tmp_path / "layers.png").stat().st_size > 0


def test_copies_and_pickles_work_on_their_own():
    model, x = small(), images()
    tp.patch(model, "tome", r=3)
    with torch.no_grad():
        expected = model(x)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert torch.equal(other(x), expected)
            other.encoder.ln.weight.zero_()
            assert not torch.equal(other(x), expected)
        assert torch.equal(model(x), expected)


def _changed(change):
    model = small()
    change(model)
    return model


def _other_attention(model):
    model.encoder.layers[1].self_attention = nn.Linear(48, 48)


def _sequence_first(model):
    model.encoder.layers[1].self_attention = nn.MultiheadAttention(48, 3)


def _batch_norm(model):
    model.encoder.layers[0].ln_2 = nn.BatchNorm1d(48)


def _more(model):
    model.encoder.layers[0].adapter = nn.Linear(48, 48)


def _own_forward(model):
    model.forward = lambda x: x


def _other_block(model):
    model.encoder.layers[0] = nn.Identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_attention, "encoder_layer_1.self_attention must be a torch MultiheadAttention, got Linear"),
        (_sequence_first, "encoder_layer_1.self_attention must be batch_first"),
        (_batch_norm, "encoder_layer_0.ln_2 must be one of .*got BatchNorm1d"),
        (_more, "encoder_layer_0 must have known parts only, got adapter"),
        (_own_forward, "torchvision's forward, got an overridden one"),
        (_other_block, "encoder_layer_0 must be a torchvision EncoderBlock, got Identity"),
    ],
)
def test_refusals_name_the_component(change, message):
    with pytest.raises(ValueError, match=message):
        tp.patch(_changed(change), "tome")
