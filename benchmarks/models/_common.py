# SPDX-License-Identifier: Apache-2.0
"""Whole models: dense and reduced on the same weights and engine, in the same run, with the speed-up to be expected.

Speed-up: over our own dense model (same fused attention). Ideal: ratio of multiply-adds at the real token counts.
Expected: the dense model's time by part (linear, convolution, attention, other), each scaled by its own ratio, because
parts run at different rates; "other" scales with the number of token visits. Weights are random and the photograph is
real: the counts of methods that choose by content are those of these weights, and ideal and expected follow them.
"""

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import tokenprune_ext
import torch
from tokenprune_ext import _flops, _library, _variants, reducers
from tokenprune_ext._images import load_photo, preprocess
from tokenprune_ext.integrations import timm as timm_vit
from tokenprune_ext.nn import PackedPatches
from tokenprune_ext.profiling import LayerTokens, time_parts, total_macs, vit_macs
from tokenprune_ext.reducers import smyrf
from torch import Tensor, nn

from benchmarks.core import Case, Context, Peer, Prepared, Target
from benchmarks.ops.methods import DIM, smyrf_rows

DENSE = "dense (ours)"
TIMM, COMPILED, FROZEN = "dense timm", "dense timm, torch.compile", "dense timm, torch.compile + freezing"
_DRAWS = re.compile(r"noise\.|act\.\w_(projection|offset)\.|smyrf\.(alpha|beta)\.")


@dataclass(frozen=True)
class Backbone:
    """A dense model.

    Attributes:
        label: in names of cases.
        build: makes it; weights do not matter.
        patient: too large for many rounds and for a float64 reference.
    """

    label: str
    build: Callable[[], nn.Module]
    patient: bool = False


@dataclass(frozen=True)
class Row:
    """One setting of one method.

    Attributes:
        key: in names of cases.
        method, text: for the table.
        apply: patches a model in place.
        ideal_share, efficiency: promised shares of the FLOPs-ideal and of the expected speed-up.
        headline: also at larger batches, with ``--quick`` and in the short table.
        published: id of the row of the published table.
        peers: ``(dense model, images) -> {name: function}``, the method in other hands.
    """

    key: str
    method: str
    text: str
    apply: Callable[[nn.Module], nn.Module]
    ideal_share: float | None = None
    efficiency: float | None = None
    headline: bool = False
    published: str | None = None
    peers: Callable[[nn.Module, Tensor], dict[str, Callable]] = lambda model, images: {}


@dataclass(frozen=True)
class Place:
    """Where a row is measured; models of the same place share everything."""

    backbone: Backbone
    dtype: torch.dtype
    packed: bool
    batch: int


def settings(context: Context, backbone: Backbone, dtypes, batches) -> Iterator[Place]:
    """Places in an order that changes the weights as seldom as possible."""
    for dtype in dtypes:
        for packed in (False, True) if context.device.type == "cpu" else (False,):
            for batch in batches:
                yield Place(backbone, dtype, packed, batch)


def case_of(context: Context, place: Place, row: Row | None) -> Case:
    """A row, or with None the dense model beside timm's."""
    name = f"{place.backbone.label}_{'dense' if row is None else row.key}_b{place.batch}"
    name += "_packed" if place.packed else ""
    make = functools.partial(_dense_case, context, place) if row is None else lambda: _row_case(context, place, row)
    return Case(name, place.dtype, make, headline=place.batch == 1 and (row is None or row.headline))


# ---------------------------------------------------------------- models


@torch.no_grad()
def _randomise(model: nn.Module) -> nn.Module:
    """Seeded weights that keep activations of order one, with attention as peaked as that of a trained model."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.named_parameters():
        if "norm" in name:
            value.normal_(1.0 if name.endswith("weight") else 0.0, 0.1, generator=generator)
        elif name.endswith("weight"):
            value.normal_(0.0, value[0].numel() ** -0.5, generator=generator)
        else:
            value.normal_(0.0, 0.02, generator=generator)
        if name.endswith("qkv.weight"):
            value[: value.shape[1]] *= 4
        value.copy_(value.bfloat16())  # the same weights in every dtype
    return model


@functools.lru_cache(maxsize=1)
def _plain(backbone: Backbone, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The only large model that is held: one backbone in one dtype."""
    with torch.device("meta"):
        model = backbone.build().eval()
    with torch.inference_mode(False):
        return _randomise(model.to_empty(device="cpu").requires_grad_(False)).to(device, dtype)


@functools.lru_cache(maxsize=1)
def _packed(backbone: Backbone, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A twin with packed weights; the plain ones are shared."""
    plain = _plain(backbone, dtype, device)
    with torch.inference_mode(False):
        return tokenprune_ext.pack(copy.deepcopy(plain, {id(value): value for value in plain.parameters()}))


def _model(context: Context, place: Place) -> nn.Module:
    if place.packed:
        return _packed(place.backbone, place.dtype, context.device)
    _packed.cache_clear()
    return _plain(place.backbone, place.dtype, context.device)


def _images(model: nn.Module, batch: int) -> Tensor:
    """A photograph and its shifted and mirrored copies, float32 on the CPU."""
    image = preprocess(load_photo()[0], model)[0]
    images = [image.roll(97 * place, 3).flip(3) if place % 2 else image.roll(61 * place, 2) for place in range(batch)]
    return torch.cat(images)


# ---------------------------------------------------------------- what is computed


def _layers(model: nn.Module, images: Tensor) -> list[LayerTokens]:
    depth, start = len(model.blocks), model.patch_embed.num_patches + model.num_prefix_tokens
    plan = model.token_reducer.plan(depth, start)
    if plan is not None:
        return [LayerTokens((before,), (after,)) for before, after in plan]
    counts = ((step.attention_tokens.tolist(), step.tokens.tolist()) for step in tokenprune_ext.trace(model, images))
    return [LayerTokens(tuple(before), tuple(after)) for before, after in counts]


def _own_attention(model: nn.Module, images: Tensor, layers: list[LayerTokens], macs: dict) -> dict:
    """Correct the counts of layers in which a method replaces attention by its own."""
    reducer, width = model.token_reducer, model.embed_dim
    name = type(reducer).__name__.lower()
    if name not in ("act", "smyrf", "ats") or not reducer.layers:
        return macs
    carry = tokenprune_ext.features(model, images)[1].carry if name == "act" else {}
    for layer in reducer.layers:
        n, m = (sum(counts) / len(counts) for counts in (layers[layer].attention, layers[layer].mlp))
        pairs = n * n
        if name == "act":
            pairs = n * ((carry[f"act.q_groups.{layer}"].amax(-1) + 1).float().mean().item())
        elif name == "smyrf":
            pairs = n * reducer.rounds * reducer.cluster_size
        elif reducer.per_image:
            pairs = n * m
        macs["attention"] += 2 * width * (pairs - n * n)
        if name == "ats":  # only kept rows leave the attention
            macs["linear"] -= width * width * (n - m)
    return macs


def _work(model: nn.Module, images: Tensor) -> tuple[dict[str, float], list[float]]:
    """Multiply-adds per image by part, and mean tokens per layer."""
    layers = _layers(model, images)
    macs = _own_attention(model, images, layers, vit_macs(model, layers))
    if isinstance(model.patch_embed.proj, PackedPatches):  # runs, and is timed, as a linear layer
        macs["linear"], macs["conv"] = macs["linear"] + macs["conv"], 0.0
    return macs, [layer.mean for layer in layers]


def _overhead(model: nn.Module, images: Tensor, macs: dict[str, float]) -> float | None:
    """Multiply-adds per image that the method adds; None where counting them would need the data."""
    try:
        traced = _flops.traced_flops(model, images.shape, images.dtype)
    except Exception:  # the counter follows no data-dependent shapes; the column then stays empty
        return None
    return max(sum(traced.values()) / 2 / images.shape[0] - total_macs(macs), 0.0)


_shares: dict = {}  # place and threads -> share of every part of the dense model's time


def _dense_shares(context: Context, place: Place, dense, macs: dict[str, float]) -> dict[str, float]:
    key = (place.backbone.label, place.dtype, place.packed, place.batch, context.threads)
    if key not in _shares:
        rounds = (2 if context.quick else 3) if place.backbone.patient else 9
        parts = time_parts(dense, device=context.device, rounds=rounds, clock=context.clock)
        whole = sum(parts.values())
        shares = {part: parts[part] / whole for part in ("linear", "conv", "attention")}
        _shares[key] = shares | {"other": 1 - sum(shares.values())}
    return _shares[key]


def _expected(shares: dict[str, float], dense: dict[str, float], reduced: dict[str, float]) -> float:
    """Speed-up if every part of the dense model shrank as its own work does."""
    return 1 / sum(share * (reduced[part] / dense[part] if dense[part] else 1) for part, share in shares.items())


# ---------------------------------------------------------------- checking

_references: dict = {}  # backbone, row and dtype -> features of the class token, and the draws they belong to
_FLOOR = {torch.float32: 2e-3, torch.bfloat16: 3e-2}  # relative error that is always granted, as a norm
_FLIPS = 5e-3  # what a few choices of plain PyTorch in float32 amount to


def _checked_features(model: nn.Module, images: Tensor, carry: dict | None, large: bool) -> tuple[Tensor, dict]:
    """Features of the first image's class token, and the draws of the forward pass.

    In large models with hashed groups (ACT, SMYRF) all tokens behind the first layer that forms them instead: one hash
    that crosses its boundary by round-off changes what all later layers do, in plain PyTorch too.
    """
    hashed = large and isinstance(model.token_reducer, (reducers.get("act"), reducers.get("smyrf")))
    first = min(model.token_reducer.layers) if hashed else -1
    behind = {}

    def each(layer, x, state):
        if layer == first:
            behind[layer] = x

    features, state = timm_vit.forward(model, images, carry=carry, each=each)
    draws = {name: value for name, value in state.carry.items() if _DRAWS.match(name)}
    checked = behind[first][0] if hashed else features.reshape(-1, features.shape[-1])[0]
    return checked.flatten().double().cpu(), draws


def _plain_smyrf(q, k, v, q_order, k_order, *, q_size, scale, **rest):
    """One list of clusters; the reference of the general op would take them one by one, tens of thousands of them."""
    q = q * (scale * DIM**0.5)  # smyrf_rows scales for heads of its own width
    return smyrf_rows(q, k, v, q_order, k_order, q_size)


@contextlib.contextmanager
def _plain_ops(large: bool):
    """Ops by their PyTorch reference."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(_library, "has_kernels", lambda device: False))
        if large:
            stack.enter_context(mock.patch.object(smyrf, "smyrf_attention", _plain_smyrf))
        yield


def _in_plain_pytorch(plain: nn.Module, place: Place, row: Row, dtype: torch.dtype, draws: dict | None):
    """The first image on the CPU through the reference ops; see :func:`_checked_features`."""
    key = (place.backbone.label, row.key, dtype)
    if key not in _references:
        first = next(plain.parameters())
        with torch.inference_mode(False), torch.no_grad():
            ready = first.device.type == "cpu" and first.dtype == dtype
            model = plain if ready else copy.deepcopy(plain).cpu().to(dtype)
            model = row.apply(_variants.share(model)).eval()
            torch.manual_seed(0)
            image, stat = _images(plain, 1).to(dtype), torch.float64 if dtype == torch.float64 else torch.float32
            draws = None if draws is None else {name: value.to(stat) for name, value in draws.items()}
            with _plain_ops(place.backbone.patient):
                _references[key] = _checked_features(model, image, draws, place.backbone.patient)
    return _references[key]


def _error(got: Tensor, want: Tensor) -> float:
    return ((got.double().cpu() - want).norm() / want.norm()).item()


def _verify(plain: nn.Module, reduced: nn.Module, place: Place, row: Row):
    """Features of the first image (:func:`_checked_features`) against float64 (large models: float32).

    Round-off flips choices between nearly equal tokens, in plain PyTorch as in ours, so that ours may err twice as much as
    plain PyTorch in the same dtype, plus a floor.
    """
    want, draws = _in_plain_pytorch(plain, place, row, torch.float32 if place.backbone.patient else torch.float64, None)
    other = _error(_in_plain_pytorch(plain, place, row, place.dtype, draws)[0], want)
    if place.backbone.patient:  # a float32 reference has made flips of its own, which nothing tells
        other = max(other, _FLIPS)
    allowed = 2 * other + _FLOOR[place.dtype]
    device = next(plain.parameters()).device

    def verify(output) -> str | None:
        if output.shape[0] != place.batch or not output.isfinite().all():
            return f"the output has shape {tuple(output.shape)}, or is not finite"
        carry = {name: value.to(device, torch.float32) for name, value in draws.items()}
        image = _images(plain, 1).to(device, place.dtype)
        error = _error(_checked_features(reduced, image, carry, place.backbone.patient)[0], want)
        return None if error <= allowed else f"features are off by {error:.1e} (allowed {allowed:.1e})"

    return verify


def _verify_dense(plain: nn.Module, place: Place, images: Tensor):
    """Logits of the first image against timm in float64 (large models: float32); see :func:`_verify`."""

    @functools.cache
    def errors_of_timm() -> tuple[Tensor, float]:
        precise = torch.float32 if place.backbone.patient else torch.float64
        with torch.inference_mode(False), torch.no_grad():
            model = copy.deepcopy(plain).cpu().to(precise)
            want = model(_images(plain, 1).to(precise)).double()
            return want, _error(plain(images[:1].clone()), want)

    def verify(output) -> str | None:
        want, other = errors_of_timm()
        error, allowed = _error(output[:1], want), 2 * other + _FLOOR[place.dtype] / 20
        return None if error <= allowed else f"logits are off by {error:.1e} (allowed {allowed:.1e})"

    return verify


# ---------------------------------------------------------------- cases


def _fields(place: Place, method: str, text: str) -> dict:
    packed = ", packed weights" if place.packed else ""
    fields = {"model": place.backbone.label, "method": method, "setting": text + packed, "batch": place.batch}
    return fields | {"packed": place.packed}


def _rounds(context: Context, place: Place) -> int:
    return 3 if place.backbone.patient else 5


def _dense_case(context: Context, place: Place) -> Prepared:
    model, plain = _model(context, place), _plain(place.backbone, place.dtype, context.device)
    images = _images(plain, place.batch).to(context.device, place.dtype)
    dense = _variants.dense(model).model
    compiled = torch.compile(_variants.share(plain), dynamic=False)
    peers = {TIMM: Peer(lambda: plain(images)), COMPILED: Peer(lambda: compiled(images), slow=True)}
    if place.packed:
        frozen = torch.compile(_variants.share(plain), dynamic=False, options={"freezing": True})
        peers[FROZEN] = Peer(lambda: frozen(images), slow=True)
    macs = vit_macs(plain, [LayerTokens((_start(plain),), (_start(plain),))] * len(plain.blocks))

    def extra(samples) -> dict:
        ours_ms = samples["ours"].median_ms
        even = dict.fromkeys(("speedup", "ideal_speedup", "expected_speedup", "efficiency"), 1.0)
        shares = _dense_shares(context, place, lambda: dense(images), macs)
        parts = {part: share * ours_ms for part, share in shares.items()}
        return _fields(place, "dense", "ours") | even | {"dense_ms": ours_ms, "parts_ms": parts}

    # torch.compile first; --quick leaves it out, so that eager timm is the opponent there.
    targets = (Target(COMPILED, 1.0), Target(TIMM, 1.0)) if context.device.type == "cpu" else ()
    return Prepared(
        ours=lambda: dense(images),
        peers=peers,
        flops=2 * total_macs(macs) * place.batch,
        bytes=sum(value.numel() * value.element_size() for value in plain.parameters()),
        targets=targets,
        verify=_verify_dense(plain, place, images),
        extra=extra,
        min_rounds=_rounds(context, place),
    )


def _start(model: nn.Module) -> int:
    return model.patch_embed.num_patches + model.num_prefix_tokens


def _row_case(context: Context, place: Place, row: Row) -> Prepared:
    model, plain = _model(context, place), _plain(place.backbone, place.dtype, context.device)
    images = _images(plain, place.batch).to(context.device, place.dtype)
    torch.manual_seed(0)
    with torch.inference_mode(False):  # weights made in that mode cannot be packed: nothing counts their changes
        reduced, dense = row.apply(_variants.share(model)).eval(), _variants.dense(model).model
    verify = _verify(plain, reduced, place, row)
    macs, tokens = _work(reduced, images)
    whole = vit_macs(plain, [LayerTokens((_start(plain),), (_start(plain),))] * len(plain.blocks))
    ideal = total_macs(whole) / total_macs(macs)
    overhead = None if place.packed else _overhead(reduced, images, macs)

    def extra(samples) -> dict:
        dense_ms, ours_ms = samples[DENSE].median_ms, samples["ours"].median_ms
        shares = _dense_shares(context, place, lambda: dense(images), whole)
        expected = _expected(shares, whole, macs)
        return _fields(place, row.method, row.text) | {
            "published": row.published,
            "dense_ms": dense_ms,
            "speedup": dense_ms / ours_ms,
            "ideal_speedup": ideal,
            "ideal_target": row.ideal_share,
            "expected_speedup": expected,
            "efficiency": dense_ms / ours_ms / expected,
            "efficiency_target": row.efficiency if context.device.type == "cpu" else None,
            "parts_ms": {part: share * dense_ms for part, share in shares.items()},
            "tokens": tokens,
            "gmacs": total_macs(macs) / 1e9,
            "gmacs_overhead": None if overhead is None else overhead / 1e9,
        }

    others = {name: Peer(function, same=False) for name, function in row.peers(plain, images).items()}
    promised = row.ideal_share is not None and context.device.type == "cpu"
    return Prepared(
        ours=lambda: reduced(images),
        peers={DENSE: Peer(lambda: dense(images), same=False)} | others,
        flops=2 * total_macs(macs) * place.batch,
        bytes=sum(value.numel() * value.element_size() for value in plain.parameters()),
        targets=(Target(DENSE, row.ideal_share * ideal if promised else None),),
        verify=verify,
        extra=extra,
        min_rounds=_rounds(context, place),
    )
