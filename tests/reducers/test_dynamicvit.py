# SPDX-License-Identifier: Apache-2.0
"""DynamicViT: fixed counts at inference, gathered = masked = loops, ragged batches, training."""

import math

import pytest
import tokenprune_ext
import torch
from tokenprune_ext import reducers
from tokenprune_ext.nn import TokenState
from tokenprune_ext.reducers._predictors import ImageMean
from torch import nn

from .common import DEPTH, WIDTH, pack_ragged, split, tiny_blocks, tokens, walk

FACTS = {"depth": DEPTH, "embed_dim": WIDTH, "num_prefix": 1}
LAYERS = [1, 2, 3]


def make(**options):
    torch.manual_seed(5)
    reducer = reducers.create("dynamicvit", FACTS, **{"layers": LAYERS, **options}).double().eval()
    for linear in (module for module in reducer.modules() if isinstance(module, nn.Linear)):
        nn.init.normal_(linear.weight, std=0.5)
    return reducer


def loops(blocks, image, reducer):
    """One image [N, C]: the best tokens of every stage, everything written out."""
    prefix, patches, place = image[:1], image[1:], torch.arange(len(image) - 1)
    for layer, block in enumerate(blocks):
        if layer in reducer.layers:
            stage = reducer.layers.index(layer)
            score = reducer.selectors[stage](patches[None], ImageMean())[0][0, :, 0]
            count = math.floor((len(image) - 1) * reducer.keep[stage])
            best = score.argsort(descending=True)[:count].sort().values
            patches, place = patches[best], place[best]
        prefix, patches = block(torch.cat([prefix, patches])[None])[0].split([1, len(patches)])
    return torch.cat([prefix, patches]), place


def test_gathered_equals_masked_equals_loops():
    blocks, x = tiny_blocks(), tokens(3)
    with torch.no_grad():
        state = TokenState(num_prefix=1).with_trace(x)
        y, gathered = walk(blocks, x, make(), state)
        z, masked = walk(blocks, x, make(dense=True), state)
        for row in range(3):
            expected, place = loops(blocks, x[row], make())
            torch.testing.assert_close(y[row], expected, atol=1e-10, rtol=1e-10)
            assert gathered.index[row].tolist() == [-1, *place.tolist()]
            torch.testing.assert_close(z[row, [0, *(1 + place).tolist()]], expected, atol=1e-10, rtol=1e-10)
    for layer in LAYERS:
        assert torch.equal(gathered.carry[f"keep.{layer}"], masked.carry[f"keep.{layer}"])
    # The mask hides rows that the gathered form has not; both say where every patch is.
    kept = gathered.carry["keep"] > 0
    assert torch.equal(masked.carry["parent"][:, 1:] >= 0, kept)
    assert torch.equal(gathered.carry["parent"][:, 1:] >= 0, kept)


def test_ragged_batch_equals_single_images():
    blocks, reducer = tiny_blocks(), make()
    images = [tokens(1, count, seed=count) for count in (17, 6, 12)]
    x, state = pack_ragged(images)
    with torch.no_grad():
        y, after = walk(blocks, x, reducer, state.with_trace(x))
        for image, part in zip(images, split(y, after)):
            alone, _ = walk(blocks, image, reducer)
            torch.testing.assert_close(part, alone[0], atol=1e-10, rtol=1e-10)


def test_one_packed_image_keeps_the_share_of_its_own_tokens():
    """However far away the bound of the lengths is."""
    blocks, image = tiny_blocks(), tokens(1, 17)
    x, state = pack_ragged([image])
    with torch.no_grad():
        y, _ = walk(blocks, image, make())
        z, after = walk(blocks, x, make(), state.replace(max_seqlen=40))
    assert after.cu_seqlens.tolist() == [0, y.shape[1]]
    torch.testing.assert_close(z, y[0], atol=1e-10, rtol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True])
def test_packed_weights_change_nothing_but_rounding(packed):
    blocks, reducer, x, state = tiny_blocks(), make(), tokens(2), None
    if packed:
        x, state = pack_ragged([tokens(1, count, seed=count) for count in (17, 6, 12)])
    y, _ = walk(blocks, x, reducer, state)
    z, _ = walk(tokenprune_ext.pack(blocks), x, tokenprune_ext.pack(reducer), state)
    torch.testing.assert_close(z, y, atol=1e-10, rtol=1e-10)


def test_published_counts():
    """floor(196 * rate), the powers in double precision: 0.7 ** 2 is a little less than 0.49."""
    for base, counts in ((0.7, [137, 96, 67]), (0.5, [98, 49, 24]), (1.0, [196, 196, 196])):
        reducer = reducers.create("dynamicvit", depth=12, embed_dim=16, keep=base)
        assert reducer.layers == [3, 6, 9]
        assert [after - 1 for _, after in reducer.plan(12, 197)][3::3] == counts
    exact = reducers.create("dynamicvit", depth=4, embed_dim=16, layers=[1, 2], keep=[0.7, 0.49])
    assert exact.plan(4, 101)[1:3] == [(71, 71), (50, 50)]
    x, record = tokens(2, 17), []
    with torch.no_grad():
        walk(tiny_blocks(), x, make(keep=0.6), record=record)
    assert [step.mlp.tolist() for step in record] == [[17, 17], [10, 10], [6, 6], [4, 4]]


def test_nothing_kept():
    blocks, x = tiny_blocks(), tokens(2, 3)
    with torch.no_grad():
        y, state = walk(blocks, x, make(keep=[0.4, 0.3, 0.2]))
        z, _ = walk(blocks, x, make(keep=[0.4, 0.3, 0.2], dense=True))
    assert y.shape == (2, 1, WIDTH) and not state.carry["keep"].any()
    torch.testing.assert_close(z[:, :1], y, atol=1e-10, rtol=1e-10)


def test_ties_and_nan_scores():
    reducer = make(layers=[1], keep=0.5)
    nn.init.zeros_(reducer.selectors[0].out_conv[4].weight)  # all scores are equal: the first stay
    with torch.no_grad():
        _, state = walk(tiny_blocks(), tokens(), reducer)
    assert state.index[0].tolist() == list(range(-1, 8))
    nn.init.constant_(reducer.selectors[0].out_conv[4].weight, float("nan"))
    with torch.no_grad():
        y, _ = walk(tiny_blocks(), tokens(), reducer)
    assert y.shape == (2, 9, WIDTH) and torch.isfinite(y).all()


def test_training_step():
    blocks, x = tiny_blocks(), tokens()
    reducer = make(keep=0.7).train()
    y, state = walk(blocks, x, reducer)
    assert y.shape == x.shape
    keeps = [state.carry[f"keep.{layer}"] for layer in LAYERS]
    expected = sum(((keep.mean(1) - 0.7 ** (s + 1)) ** 2).mean() for s, keep in enumerate(keeps)) / 3
    torch.testing.assert_close(reducer.losses(state)["ratio"], expected)
    reducer.ratio_per_sample = False
    assert reducer.losses(state)["ratio"] <= expected
    (y.square().mean() + expected).backward()
    for name, parameter in reducer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_an_image_that_loses_everything_while_training():
    blocks, x = tiny_blocks(), tokens()
    noise = {f"noise.{layer}": torch.zeros(2, 16, 2, dtype=x.dtype) for layer in LAYERS}
    noise["noise.1"][0, :, 1] = 1e3
    reducer = make().train()
    y, state = walk(blocks, x, reducer, TokenState(num_prefix=1, carry=noise))
    y.square().sum().backward()
    assert torch.isfinite(y).all() and all(torch.isfinite(p.grad).all() for p in reducer.parameters())
    assert state.carry["keep"][0].sum() == 0


def test_restore():
    blocks, x = tiny_blocks(), tokens()
    with torch.no_grad():
        y, state = walk(blocks, x, make(), TokenState(num_prefix=1).with_trace(x))
        full = make().restore(y[:, 1:], state)
    kept = state.carry["keep"] > 0
    assert torch.equal(full[kept], y[:, 1:].flatten(0, 1)) and not full[~kept].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": [0.5, 0.6, 0.4]}, "must not rise"),
        ({"keep": [0.5]}, "3 rates"),
        ({"layers": [1, 1]}, "layers must rise"),
        ({"pooling": "avg"}, "class token"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        reducers.create("dynamicvit", FACTS, **{"layers": LAYERS, **options})
