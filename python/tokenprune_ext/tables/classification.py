# SPDX-License-Identifier: Apache-2.0
"""GFLOPs of DeiT and LV-ViT with DynamicViT, SPViT, EViT and SViT, and the rules behind the published ones.

All count multiply-adds of convolutions, linear layers and attention products; no norms, softmax, biases or gathers. Where a
table follows an estimator instead of a trace, that estimator is the rule.
"""

import math
from functools import partial

from torch import nn

from .. import reducers
from ..models.lvvit import SIZES, LVViT
from ._base import GIGA, Estimate, Row, meta_model, read, without_memory
from ._vit import Counts, Dims, Layer, dims_of, is_swag, linear_weights, matmul_macs, planned, uniform

FILES = ("classification_flops",)
MATMUL = "multiply-adds of convolutions, linear layers and attention products"
DYNAMICVIT = "DynamicViT's estimator: predictors as 5/8 N C^2 + N C/2, counts rounded stage by stage"
SPVIT = f"{MATMUL}, selectors and package tokens included"
SVIT = f"{MATMUL}, selectors included"

# Their attention is not that of all kept tokens with one another.
_OWN_ATTENTION = ("act", "ats", "smyrf")
_MODELS = {
    ("DynamicViT", "DeiT-256"): "dynamicvit_deit_256",
    ("DynamicViT", "DeiT-S"): "dynamicvit_deit_s",
    ("DynamicViT", "DeiT-B"): "dynamicvit_deit_b",
    ("DynamicViT", "LV-ViT-S"): "dynamicvit_lvvit_s",
    ("DynamicViT", "LV-ViT-M"): "dynamicvit_lvvit_m",
    ("SPViT", "DeiT-T"): "spvit_deit_tiny",
    ("SPViT", "DeiT-S"): "spvit_deit_small",
    ("SPViT", "DeiT-B"): "spvit_deit_base",
    ("SPViT", "LV-ViT-S"): "spvit_lvvit_s",
    ("SPViT", "LV-ViT-M"): "spvit_lvvit_m",
    ("EViT", "DeiT-S"): "deit_small_patch16_shrink_base",
    ("SViT-cls", "SViT-S"): "svit_s",
    ("dense baseline", "DeiT-T"): "deit_tiny_patch16_224",
    ("dense baseline", "DeiT-S"): "deit_small_patch16_224",
    ("dense baseline", "DeiT-B"): "deit_base_patch16_224",
}


def serves(model: nn.Module) -> bool:
    """Whether this is a plain ViT; SWAG models are counted otherwise."""
    return dims_of(model) is not None and not is_swag(model)


def rule(model: nn.Module, counts: Counts) -> Estimate | None:
    """The rule of the model's papers; for other methods the plain multiply-adds at the token counts."""
    dims, reducer = dims_of(model), getattr(model, "token_reducer", None)
    if dims is None or any(isinstance(reducer, reducers.get(name)) for name in _OWN_ATTENTION):
        return None
    if isinstance(reducer, reducers.get("dynamicvit")):
        return Estimate(dynamicvit_estimator(dims, reducer) / GIGA, DYNAMICVIT)
    macs, text = matmul_macs(dims, counts.layers), MATMUL
    if isinstance(reducer, reducers.get("spvit")):
        macs, text = macs + sum(_spvit_selectors(dims, reducer, counts.layers)), SPVIT
    elif isinstance(reducer, reducers.get("svit")):
        macs, text = macs + sum(_svit_selectors(dims, reducer)), SVIT
    return Estimate(macs / GIGA, text)


def dynamicvit_estimator(dims: Dims, reducer: nn.Module) -> float:
    """What DynamicViT's tables state: a predictor without its first layer, and shares compounded with rounding."""
    n, share, macs, counts = dims.tokens, 1.0, 0, []
    for layer in range(dims.depth):
        if layer in reducer.layers:
            keep = reducer.keep[reducer.layers.index(layer)]
            macs += _forgetful_predictor(dims, n)
            n, share = int((n - 1) * round(keep / share, 9)) + 1, keep
        counts.append(n)
    return macs + matmul_macs(dims, uniform(counts))


def _forgetful_predictor(dims, n):
    return 5 / 8 * n * dims.width**2 + n * dims.width / 2


def _spvit_selectors(dims, reducer, layers):
    """Every selector sees the patches, and the package tokens made before."""
    for place, module in zip(reducer.layers, reducer.selectors):
        heads = getattr(module, "num_heads", 1)
        shared = linear_weights(module.in_conv) + linear_weights(module.out_conv)
        weigher = linear_weights(module.senet) if getattr(module, "senet", None) is not None else 0
        yield (_entering(dims, layers, place) - dims.prefix) * (heads * shared + weigher)


def _entering(dims, layers, place):
    return layers[place - 1].mlp if place else dims.tokens


def _svit_selectors(dims, reducer):
    for place, module in zip(reducer.layers, reducer.selectors):
        prefix = dims.prefix if place in reducer.candidate_prefix else 0
        yield (dims.patches + prefix) * linear_weights(module)


def counted(file: str) -> list[Row]:
    """The rows of ``classification_flops.json``."""
    return [_row(f"{file}/{place:03d}", row) for place, row in enumerate(read(file)["rows"])]


def _row(name, row):
    system, backbone = row["system"], row["model"]
    model, options = _MODELS.get((system, backbone)), _options(row)
    build = None if model else partial(_lvvit, backbone[-1].lower())
    network = meta_model(model, **options) if model else without_memory(build)
    counts, given = _counts(row, network)
    estimate = rule(network, counts)
    others = {}
    if system == "SPViT":
        others["DynamicViT's estimator"] = _spvit_by_estimator(dims_of(network), network.token_reducer, row) / GIGA
    return Row(
        id=name,
        system=system,
        method="" if system.startswith("dense") else system,
        backbone=backbone,
        setting="dense" if row["setting"] == "-" else row["setting"],
        estimate=Estimate(estimate.gflops, estimate.rule, given),
        published_gflops=row["published_G"],
        others=others,
        model=model,
        options=options,
        build=build,
        note=row["provenance"],
    )


def _options(row):
    if row["system"] == "DynamicViT":
        return {"base_rate": float(row["setting"].removeprefix("rho="))}
    if row["system"] == "SPViT":
        return {"keep": row["keep_fraction"]}
    if row["system"] == "EViT":
        keep, fuse = (part.split("=")[1] for part in row["setting"].split())
        return {"base_keep_rate": float(keep), "fuse_token": fuse == "True"}
    return {}


def _lvvit(size):
    width, heads, depth = SIZES[size]
    return LVViT(embed_dim=width, num_heads=heads, depth=depth)


def _counts(row, model):
    """Tokens per layer: planned, or at the shares that the row states."""
    dims, reducer = dims_of(model), getattr(model, "token_reducer", None)
    if row["system"] == "SPViT":
        stages = [math.floor(dims.patches * keep) + 1 + stage + 1 for stage, keep in enumerate(row["keep_fraction"])]
        return Counts(_staged(dims, reducer.layers, stages), {}), {"keep_shares": row["keep_fraction"]}
    if row["system"] == "SViT-cls":
        shares = [reducer.keep.get(layer, 1.0) for layer in range(dims.depth)]
        layers = uniform([dims.prefix + dims.patches * share for share in shares])
        return Counts(tuple(layers), {}), {"keep_shares": sorted(set(reducer.keep.values()), reverse=True)}
    return Counts(tuple(planned(model)), {}), None


def _staged(dims, places, stages):
    counts, now = [], dims.tokens
    for layer in range(dims.depth):
        now = stages[places.index(layer)] if layer in places else now
        counts.append(Layer(now, now))
    return tuple(counts)


def _spvit_by_estimator(dims, reducer, row):
    """SPViT's own numbers: DynamicViT's predictors, package tokens forgotten."""
    stages = [math.floor(dims.patches * keep) + 1 for keep in row["keep_fraction"]]
    layers = _staged(dims, reducer.layers, stages)
    predictors = sum(_forgetful_predictor(dims, _entering(dims, layers, place)) for place in reducer.layers)
    return predictors + matmul_macs(dims, layers)
