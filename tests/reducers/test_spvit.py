# SPDX-License-Identifier: Apache-2.0
"""SPViT: gathered = masked = loops over single images, package tokens, empty and ragged batches, training."""

from itertools import pairwise

import pytest
import torch
from tokenprune_ext import reducers
from tokenprune_ext.nn import TokenState, run_block
from tokenprune_ext.reducers import package_token
from tokenprune_ext.reducers._predictors import ImageMean
from torch import nn

from .common import DEPTH, HEADS, WIDTH, dense, pack_ragged, split, tiny_blocks, tokens, walk

FACTS = {"depth": DEPTH, "embed_dim": WIDTH, "num_heads": HEADS, "num_prefix": 1}
LAYERS = [1, 2, 3]


def make(**options):
    torch.manual_seed(5)
    reducer = reducers.create("spvit", FACTS, **{"layers": LAYERS, **options}).double().eval()
    for linear in (module for module in reducer.modules() if isinstance(module, nn.Linear)):
        nn.init.normal_(linear.weight, std=0.5)
    return reducer


def loops(blocks, image, reducer, noise):
    """One image [N, C] through blocks and stages, everything written out."""
    prefix, patches = image[:1], image[1:]
    place, packages = torch.arange(len(patches)), image[:0]
    for layer, block in enumerate(blocks):
        if layer in reducer.layers:
            stage = reducer.layers.index(layer)
            rest = torch.cat([patches, packages])
            score, probability = (t[0] for t in reducer.selectors[stage](rest[None], ImageMean()))
            score = score + noise[layer][torch.cat([place, len(image) - 1 + torch.arange(len(packages))])]
            keep = (score[:, 0] >= score[:, 1])[: len(patches)]
            weight = probability[: len(patches), 0] * ~keep
            weighted = (patches * weight[:, None]).sum(0, keepdim=True)
            mean_of = weighted / weight.sum() if bool((~keep).any()) else torch.full_like(weighted, 1e-6)
            token = {"sum": weighted, "norm": mean_of, "accum": mean_of}[reducer.package]
            if reducer.package == "accum" and len(packages):
                packages = packages + token
            else:
                packages = torch.cat([packages, token])
            patches, place = patches[keep], place[keep]
        y = block(torch.cat([prefix, patches, packages])[None])[0]
        prefix, patches, packages = y.split([1, len(patches), len(packages)])
    return torch.cat([prefix, patches, packages]), place


def random_noise(count, batch, seed=9):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda made: torch.randn(batch, count + made, 2, generator=generator, dtype=torch.float64)
    return {f"noise.{layer}": draw(stage) for stage, layer in enumerate(LAYERS)}


OPTIONS = [
    {"selector": selector, "package": package, "mode": mode}
    for selector, package, mode in (
        ("senet", "sum", "threshold"),
        ("senet", "sum", "sample"),
        ("multihead", "norm", "sample"),
        ("multihead", "accum", "threshold"),
        ("single", "accum", "sample"),
    )
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
def test_gathered_equals_masked_equals_loops(options):
    blocks, x = tiny_blocks(), tokens(3)
    noise = random_noise(16, 3)
    with torch.no_grad():
        state = TokenState(num_prefix=1, carry=dict(noise)).with_trace(x)
        y, gathered = walk(blocks, x, make(**options), state)
        z, masked = walk(blocks, x, make(**options, dense=True), state)
        for row, part in enumerate(split(y, gathered)):
            given = {layer: noise[f"noise.{layer}"][row] * (options["mode"] == "sample") for layer in LAYERS}
            expected, place = loops(blocks, x[row], make(**options), given)
            torch.testing.assert_close(part, expected, atol=1e-10, rtol=1e-10)
            kept = gathered.carry["keep"][row].nonzero()[:, 0]
            assert torch.equal(kept, place)
            index = gathered.index.split(gathered.cu_seqlens.diff().tolist())[row]
            made = len(part) - 1 - len(kept)
            assert index.tolist() == [-1, *kept.tolist(), *[-1] * made]
            rows = torch.cat([torch.tensor([0]), 1 + kept, torch.arange(z.shape[1] - made, z.shape[1])])
            torch.testing.assert_close(z[row, rows], expected, atol=1e-10, rtol=1e-10)
    for layer in LAYERS:
        assert torch.equal(gathered.carry[f"keep.{layer}"], masked.carry[f"keep.{layer}"])
    assert gathered.carry["keep"].sum() < 48


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
def test_ragged_batch_equals_single_images(options):
    blocks = tiny_blocks()
    images = [tokens(1, count, seed=count) for count in (17, 2, 12)]
    x, state = pack_ragged(images)
    noise = random_noise(16, 3)
    reducer = make(**options)
    with torch.no_grad():
        y, after = walk(blocks, x, reducer, state.replace(carry=noise))
        for row, part in enumerate(split(y, after)):
            own = {name: value[row : row + 1] for name, value in noise.items()}
            alone, _ = walk(blocks, images[row], reducer, TokenState(num_prefix=1, carry=own))
            torch.testing.assert_close(part, alone, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("package", ["sum", "norm", "accum"])
@pytest.mark.parametrize("masked", [False, True])
def test_an_image_may_lose_everything_or_nothing(package, masked):
    blocks, x = tiny_blocks(), tokens(2)
    noise = {name: torch.zeros_like(value) for name, value in random_noise(16, 2).items()}
    for value in noise.values():
        value[0, :, 1], value[1, :, 0] = 1e3, 1e3  # image 0 drops all, image 1 keeps all
    reducer = make(package=package, mode="sample", dense=masked)
    with torch.no_grad():
        y, state = walk(blocks, x, reducer, TokenState(num_prefix=1, carry=dict(noise)).with_trace(x))
    assert torch.isfinite(y).all()
    assert state.carry["keep"].sum(1).tolist() == [0, 16]
    made = 1 if package == "accum" else 3
    if not masked:
        assert state.cu_seqlens.diff().tolist() == [1 + made, 17 + made]
    first = state.carry["parent"][0, 1:]
    assert bool((first == (17 if masked else 1)).all())  # all went to the first package token
    assert torch.equal(state.carry["parent"][1], torch.arange(17, dtype=torch.int32))


def test_nothing_dropped_adds_zero_tokens():
    """With everything kept the method is the dense model beside tokens that start as zero."""
    blocks, x = tiny_blocks(), tokens(2)
    noise = {name: torch.zeros_like(value) for name, value in random_noise(16, 2).items()}
    for value in noise.values():
        value[..., 0] = 1e3
    with torch.no_grad():
        y, state = walk(blocks, x, make(mode="sample"), TokenState(num_prefix=1, carry=noise))
        z = x
        for layer, block in enumerate(blocks):
            z = block(torch.cat([z, torch.zeros_like(z[:, :1])], 1) if layer in LAYERS else z)
    torch.testing.assert_close(y.view(z.shape), z, atol=1e-10, rtol=1e-10)
    assert state.carry["keep"].all()


def test_training_step():
    """The gates learn; straight-through masks are exactly 0 or 1; the loss is what the masks say."""
    blocks, x = tiny_blocks(), tokens()
    reducer = make(keep=0.7).train()
    y, state = walk(blocks, x, reducer)
    assert y.shape == (2, 17 + 3, WIDTH)
    keeps = [state.carry[f"keep.{layer}"] for layer in LAYERS]
    assert all(set(keep.detach().unique().tolist()) <= {0.0, 1.0} for keep in keeps)
    assert all(bool((later <= earlier).all()) for earlier, later in pairwise(keeps))
    expected = sum((keep.mean() - 0.7 ** (s + 1)) ** 2 for s, keep in enumerate(keeps)) / 3
    torch.testing.assert_close(reducer.losses(state)["ratio"], expected)
    reducer.ratio_per_sample = True
    assert reducer.losses(state)["ratio"] >= expected
    (y.square().mean() + expected).backward()
    for name, parameter in reducer.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_training_matches_a_written_out_step():
    """Value and gradients of masked training against plain PyTorch, with the key policy written out."""
    blocks, x = tiny_blocks(2), tokens().requires_grad_()
    reducer = make(layers=[1], eps=1e-3).train()
    noise = random_noise(16, 2)["noise.1"]
    y, _ = walk(blocks, x, reducer, TokenState(num_prefix=1, carry={"noise.1": noise}))

    def attend(block, z, policy):
        q, k, v = block.qkv(block.norm1(z)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
        count = z.shape[1]
        eye = torch.eye(count, dtype=z.dtype)
        visible = policy[:, None, None] + (1 - policy[:, None, None]) * eye
        weights = (logits - logits.amax(-1, keepdim=True)).exp() * visible
        weights = (weights + 1e-3 / count) / (weights.sum(-1, keepdim=True) + 1e-3)
        return block.feed(z + block.proj(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)))

    leaf = x.detach().requires_grad_()
    z = attend(blocks[0], leaf, torch.ones(2, 17, dtype=x.dtype))
    patches = z[:, 1:]
    score, probability = reducer.selectors[0](patches, ImageMean())
    soft = (score + noise).softmax(-1)[..., 0]
    keep = (soft >= 0.5).to(soft) - soft.detach() + soft
    token = (patches * (probability[..., 0] * (1 - keep))[..., None]).sum(1, keepdim=True)
    one = torch.ones(2, 1, dtype=x.dtype)
    expected = attend(blocks[1], torch.cat([z, token], 1), torch.cat([one, keep, one], 1))
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
    weight = torch.randn_like(y)
    leaves = [*reducer.parameters(), *blocks.parameters()]
    ours = torch.autograd.grad((y * weight).sum(), [x, *leaves])
    theirs = torch.autograd.grad((expected * weight).sum(), [leaf, *leaves])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


def test_noise_is_drawn_once_and_reproducible():
    blocks, x = tiny_blocks(), tokens()
    outputs = []
    for _ in range(2):
        reducer = make(mode="sample", generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            outputs.append(walk(blocks, x, reducer)[0])
    assert torch.equal(*outputs)


def test_restore_gives_every_patch_a_value():
    blocks, x = tiny_blocks(), tokens()
    with torch.no_grad():
        y, gathered = walk(blocks, x, make(), TokenState(num_prefix=1).with_trace(x))
        full = make().restore(torch.cat([part[1:] for part in split(y, gathered)]), gathered)
        y, masked = walk(blocks, x, make(dense=True), TokenState(num_prefix=1).with_trace(x))
        torch.testing.assert_close(make().restore(y[:, 1:], masked), full, atol=1e-10, rtol=1e-10)
    keep = masked.carry["keep"] > 0
    torch.testing.assert_close(full[keep], y[:, 1:17][keep], atol=1e-10, rtol=1e-10)
    with pytest.raises(ValueError, match="must be traced"):
        make().restore(y[:, 1:], TokenState(num_prefix=1))


def test_gradients_reach_kept_and_packaged_tokens():
    """Gathered tokens differentiate too: a dropped token still speaks through its package."""
    blocks, x = tiny_blocks(), tokens().requires_grad_()
    y, state = walk(blocks, x, make(layers=[1]))
    y[state.cu_seqlens[:-1].long()].square().sum().backward()
    assert bool((x.grad.abs().sum(-1) > 0).all())


@pytest.mark.parametrize("kind", ["sum", "norm", "accum", "mean"])
def test_package_token_gradients(kind):
    torch.manual_seed(0)
    x, old = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 1, 3, dtype=torch.float64)
    probability = torch.rand(2, 5, dtype=torch.float64)
    dropped = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 0, 0, 0]], dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (x, probability, dropped, old)]
    function = lambda x, p, d, old: package_token(x, p, d, kind, old)
    assert torch.autograd.gradcheck(function, leaves)


def test_package_token_of_nothing_has_finite_gradients():
    x = torch.randn(1, 4, 3, requires_grad=True)
    dropped = torch.zeros(1, 4, requires_grad=True)
    package_token(x, torch.rand(1, 4), dropped, "norm").sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isfinite(dropped.grad).all()


def test_masked_tokens_must_be_equally_many():
    x, state = pack_ragged([tokens(1, 17), tokens(1, 5)])
    with pytest.raises(ValueError, match="images of equal length"):
        make().train().begin(x, state)


def test_one_token_at_batch_one():
    blocks, x = tiny_blocks(), tokens(1, 2)
    with torch.no_grad():
        y, _ = walk(blocks, x, make())
        assert torch.isfinite(y).all()
        empty, _ = run_block(blocks[0].parts(), x[:0], TokenState(num_prefix=1), 0, make(layers=[]))
    assert empty.shape == (0, 2, WIDTH)
    assert dense(blocks, x).shape == x.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selector": "mlp"}, "selector must be one of"),
        ({"package": "max"}, "package must be one of"),
        ({"mode": "topk"}, "mode must be one of"),
        ({"layers": [2, 1]}, "layers must rise"),
        ({"layers": [9]}, "layers must rise and lie"),
        ({"keep": [0.5]}, "3 rates"),
        ({"keep": 1.5}, "rates in"),
        ({"eps": -1.0}, "eps must be"),
        ({"num_heads": 5}, "even number"),
        ({"num_heads": 1}, "at least 2"),
        ({"pooling": "avg"}, "class token"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        reducers.create("spvit", FACTS, **{"layers": LAYERS, **options})
