# SPDX-License-Identifier: Apache-2.0
"""Kinds of SPViT, DynamicViT and SViT for classification."""

import torch
from tokenprune_ext import features, load_checkpoint, patch
from tokenprune_ext.checkpoints import dynamicvit as dynamicvit_files
from tokenprune_ext.checkpoints import spvit as spvit_files
from tokenprune_ext.checkpoints import svit as svit_files
from tokenprune_ext.integrations import timm as adapter
from tokenprune_ext.models.deit import deit
from tokenprune_ext.models.lvvit import LVViT
from tokenprune_ext.nn import TokenState, run_block
from tokenprune_ext.reducers import MlpSelector, create, package_token
from tokenprune_ext.reducers._gates import gumbel_choice, straight_through
from tokenprune_ext.reducers._predictors import HeadSelector, ImageMean, TokenPredictor
from tokenprune_ext.tasks.classification import losses
from torch import nn

from tests.golden.harness import kind

NETWORK = {
    "B": int,
    "C": int,
    "K": int,
    "block_ln_eps": float,
    "depth": int,
    "heads": int,
    "img": (int, [int]),
    "loc": [int],
    "mlp_ratio": float,
    "patch": int,
    "ratio": [float],
}
WEIGHTS = {"clf_weight": float, "ratio_weight": float, "distill_weight": float, "keep_ratio_target": [float]}
STAGED = NETWORK | WEIGHTS | {"mode": ("eval", "train"), "qkv_bias": bool, "selector_ln_eps": float}


def network(config, lv=False):
    """The dense model of a file."""
    size = config["img"] if isinstance(config["img"], int) else tuple(config["img"])
    options = {
        "img_size": size,
        "patch_size": config["patch"],
        "embed_dim": config["C"],
        "depth": config["depth"],
        "num_heads": config["heads"],
        "mlp_ratio": config["mlp_ratio"],
        "num_classes": config["K"],
        "block_eps": config["block_ln_eps"],
    }
    if lv:
        qkv_bias = config.get("qkv_bias", False)
        return LVViT(stem="naive", skip_lam=config.get("skip_lam", 2.0), qkv_bias=qkv_bias, **options)
    return deit(norm_eps=config.get("final_ln_eps", config["block_ln_eps"]), qkv_bias=True, **options)


def loaded(golden, model):
    """The file's weights, through our loader; training or evaluation as the file says."""
    load_checkpoint(model, golden.group("param"))
    return model.to(golden.device).train(golden.config["mode"] == "train")


def forward(golden, model, layers):
    """``(images, features, state)`` with the file's noise."""
    images = golden.leaf("in.img")
    noise = {f"noise.{layer}": golden[f"in.gumbel_{s}"] for s, layer in enumerate(layers) if f"in.gumbel_{s}" in golden}
    return images, *features(model, images, carry=noise)


def gradients(golden, loss, model, images, rename):
    """Every ``grad.*`` of the file, by its official name."""
    names = [name.removeprefix("grad.") for name in golden.tensors if name.startswith("grad.")]
    if not names:
        return {}
    own = dict(model.named_parameters())
    leaves = [images if name == "img" else own[rename(name)] for name in names]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return {
        f"grad.{name}": torch.zeros_like(leaf) if grad is None else grad
        for name, leaf, grad in zip(names, leaves, found, strict=True)
    }


def check_predictors(model, config):
    eps = {m.eps for m in model.token_reducer.modules() if isinstance(m, nn.LayerNorm)}
    assert eps == {config["selector_ln_eps"]}


def training_outputs(golden, model, run, rename, lv):
    """Outputs, losses and gradients of a training file of SPViT or DynamicViT."""
    config, reducer = golden.config, model.token_reducer
    images, x, state = run
    patches = model.patch_embed.num_patches
    tokens, keeps = x[:, 1 : 1 + patches], [state.carry[f"keep.{layer}"] for layer in reducer.layers]
    tokens = model.aux_logits(tokens) if lv else tokens
    mask, logits = keeps[-1].detach(), model.head(x[:, 0])
    parts = losses.distillation_loss(
        logits,
        golden["in.target"],
        keeps,
        config["keep_ratio_target"],
        tokens=tokens,
        mask=mask,
        teacher_logits=golden["in.teacher_logits"],
        teacher_tokens=golden["in.teacher_tokens"],
        token_kind="mse" if config["mse_token"] else "kl",
        ratio_per_sample=reducer.ratio_per_sample,
        cls_weight=config["clf_weight"],
        ratio_weight=config["ratio_weight"],
        distill_weight=config["distill_weight"],
    )
    ratio = reducer.losses(state)["ratio"] * len(keeps)
    torch.testing.assert_close(ratio, parts.ratio_sum)
    result = {"out.logits": logits, "out.features": tokens, "out.mask": mask}
    result |= {f"out.keep_{s}": keep for s, keep in enumerate(keeps)} | loss_outputs(parts)
    return result | gradients(golden, parts.total, model, images, rename)


def loss_outputs(parts):
    named = {"": parts.total, "_cls": parts.cls, "_kl": parts.kl, "_token": parts.token, "_ratio_sum": parts.ratio_sum}
    return {f"out.loss{name}": value[None] for name, value in named.items()}


# ---------------------------------------------------------------- DynamicViT


def dynamicvit(golden, lv):
    config = golden.config
    train = config["mode"] == "train"
    assert config["attn_eps"] == "plain softmax" or train
    model = network(config, lv)
    eps = {"eps": config["attn_eps"]} if train else {}
    patch(model, "dynamicvit", layers=config["loc"], keep=config["ratio"], **eps)
    model = loaded(golden, model)
    check_predictors(model, config)
    run = forward(golden, model, config["loc"])
    if train:
        assert config["distill"]
        return training_outputs(golden, model, run, dynamicvit_files.rename, lv)
    images, _, state = run
    result = {"out.logits": model(images)}
    for stage, layer in enumerate(config["loc"]):
        keep = state.carry[f"keep.{layer}"]
        result[f"out.keep_idx_sorted_{stage}"] = keep.nonzero()[:, 1].view(keep.shape[0], -1)
    return result


DYNAMICVIT = STAGED | {
    "attn_eps": ("plain softmax", float),
    "distill": (True,),
    "ratio_mean_over": ("tokens per image, then squared, then batch mean",),
}


@kind("classification/dynamicvit", DYNAMICVIT | {"kind": ("vit",), "mse_token": (True,), "qkv_bias": (True,)})
def dynamicvit_deit(golden):
    return dynamicvit(golden, False)


@kind(
    "classification/dynamicvit_lvvit",
    DYNAMICVIT
    | {
        "kind": ("lv",),
        "mse_token": (False,),
        "qkv_bias": (False,),
        "img": int,
        "head": str,
        "p_emb": ("naive",),
        "skip_lam": float,
    },
)
def dynamicvit_lvvit(golden):
    return dynamicvit(golden, True)


@kind(
    "classification/dynamicvit_predictor",
    {"B": int, "N": int, "embed_dim": int, "gelu": ("erf",), "layernorm_eps": float},
)
def dynamicvit_predictor(golden):
    predictor = TokenPredictor(golden.config["embed_dim"])
    predictor.load_state_dict(golden.group("param"))
    predictor.to(golden.device)
    assert predictor.in_conv[0].eps == golden.config["layernorm_eps"]
    x, policy = golden.leaf("in.x"), golden.leaf("in.policy")
    score, _ = predictor(x, ImageMean(policy[..., 0]))
    leaves = dict(predictor.named_parameters()) | {"x": x, "policy": policy}
    return {"out.score": score} | golden.gradients({"score": score}, leaves)


# ---------------------------------------------------------------- SPViT

# selector and package token of the published model files
VARIANTS = {
    "senet": ("senet", "sum"),
    "lv_senet": ("senet", "sum"),
    "3keep": ("multihead", "norm"),
    "l2": ("multihead", "accum"),
}


@kind(
    "classification/spvit",
    STAGED
    | {
        "attn_eps": float,
        "mse_token": bool,
        "noise": ("gumbel", "zero (deterministic argmax)"),
        "ratio_mean_over": ("batch and tokens",),
        "variant": tuple(VARIANTS),
    },
)
def spvit(golden):
    config = golden.config
    selector, package = VARIANTS[config["variant"]]
    train, sampled, lv = config["mode"] == "train", config["noise"] == "gumbel", config["variant"] == "lv_senet"
    options = {
        "layers": config["loc"],
        "keep": config["ratio"],
        "selector": selector,
        "package": package,
        "mode": "sample" if sampled else "threshold",
    }
    model = network(config, lv)
    # Evaluation was masked; gathered tokens give the same logits, checked below.
    patch(model, "spvit", dense=True, **options, **({"eps": config["attn_eps"]} if train else {}))
    assert train or config["attn_eps"] == 0
    model = loaded(golden, model)
    check_predictors(model, config)
    run = _, x, state = forward(golden, model, config["loc"])
    keeps = [state.carry[f"keep.{layer}"] for layer in config["loc"]]
    result = {f"out.kept_count_{s}": keep.sum(1).to(torch.int32) for s, keep in enumerate(keeps)}
    if train:
        return result | training_outputs(golden, model, run, spvit_files.rename, lv)
    result |= {f"out.keep_{s}": keep for s, keep in enumerate(keeps)}
    result["out.logits"] = (
        model.forward_tokens(x, state) if lv else model.forward_head(model.token_reducer.pool(x, state))
    )
    made = [1] * len(keeps) if package == "accum" else range(1, len(keeps) + 1)
    zeros = [int((keep == 0).sum()) for keep in keeps]
    rest = [keep.numel() + keep.shape[0] * (1 + m) - z for keep, m, z in zip(keeps, made, zeros)]
    result["out.zero_nonzero"] = torch.tensor(list(zip(zeros, rest)))
    model.token_reducer.dense = False
    _, y, gathered = forward(golden, model, config["loc"])
    for layer, keep in zip(config["loc"], keeps):
        assert torch.equal(gathered.carry[f"keep.{layer}"], keep)
    torch.testing.assert_close(y[gathered.cu_seqlens[:-1].long()], x[:, 0], atol=1e-5, rtol=1e-4)
    return result


SELECTOR = {"B": int, "N": int, "embed_dim": int, "gelu": ("erf",), "layernorm_eps": float, "num_heads": int}


@kind("classification/spvit_selector", SELECTOR)
def spvit_selector(golden):
    config, given = golden.config, golden.group("param")
    selector = HeadSelector(config["embed_dim"], config["num_heads"], weighted="senet.0.weight" in given)
    official = {f"score_predictor.0.{name}": value for name, value in given.items()}
    converted = spvit_files.convert(official, selector)
    start = spvit_files.rename("score_predictor.0.")
    selector.load_state_dict({name.removeprefix(start): value for name, value in converted.items()})
    selector.to(golden.device)
    assert selector.in_conv[0].eps == config["layernorm_eps"]
    x, policy = golden.leaf("in.x"), golden.leaf("in.policy")
    score, probability = selector(x, ImageMean(policy[..., 0]))
    own = dict(selector.named_parameters())
    names = [n.removeprefix("grad.") for n in golden.tensors if n.startswith("grad.")]
    leaves = {"x": x, "policy": policy} | {
        n: own[spvit_files.rename(f"score_predictor.0.{n}").removeprefix(start)]
        for n in names
        if n not in ("x", "policy")
    }
    outputs = {"score": score, "softmax_score": probability}
    return {f"out.{n}": t for n, t in outputs.items()} | golden.gradients(outputs, leaves)


@kind(
    "classification/spvit_package_token",
    {"B": int, "C": int, "N": int, "edge_last_sample_nothing_dropped": bool, "nan_fill_norm": (1e-6,)},
)
def spvit_package_token(golden):
    result = {}
    for name in ("sum", "norm", "accum", "mean"):
        leaves = {n: golden.leaf(f"in.{n}") for n in ("spatial_x", "keep_score", "prev_keep", "keep")}
        x, score, before, keep = (leaf if n == "spatial_x" else leaf[..., 0] for n, leaf in leaves.items())
        token = package_token(x, score, before - keep, name, golden["in.old_package"])
        result[f"out.{name}"] = token
        if f"in.grad_out.{name}" in golden:
            grads = torch.autograd.grad((token * golden[f"in.grad_out.{name}"]).sum(), list(leaves.values()))
            result |= {f"grad.{name}.{n}": grad for n, grad in zip(leaves, grads, strict=True)}
    return result


@kind(
    "classification/loss",
    {
        "B": int,
        "C": int,
        "K": int,
        "N": int,
        "clf_weight": float,
        "distill_weight": float,
        "keep_ratio": [float],
        "mse_token": bool,
        "ratio_mean": ("per image", "whole batch"),
        "ratio_weight": float,
        "stages": int,
    },
)
def loss(golden):
    config = golden.config
    leaves = {n: golden.leaf(f"in.{n}") for n in ("pred", *(f"keep_{s}" for s in range(config["stages"])))}
    distilled = {}
    if "in.token_pred" in golden:
        leaves["token_pred"] = golden.leaf("in.token_pred")
        distilled = {
            "tokens": leaves["token_pred"],
            "mask": golden["in.mask"],
            "teacher_logits": golden["in.teacher_logits"],
            "teacher_tokens": golden["in.teacher_tokens"],
            "token_kind": "mse" if config["mse_token"] else "kl",
            "distill_weight": config["distill_weight"],
        }
    parts = losses.distillation_loss(
        leaves["pred"],
        golden["in.target"],
        [leaves[f"keep_{s}"] for s in range(config["stages"])],
        config["keep_ratio"],
        ratio_per_sample=config["ratio_mean"] == "per image",
        cls_weight=config["clf_weight"],
        ratio_weight=config["ratio_weight"],
        **distilled,
    )
    grads = torch.autograd.grad(parts.total, list(leaves.values()), allow_unused=True)
    pairs = zip(leaves.items(), grads, strict=True)
    return loss_outputs(parts) | {f"grad.{n}": torch.zeros_like(t) if g is None else g for (n, t), g in pairs}


# ---------------------------------------------------------------- SViT


@kind(
    "classification/svit",
    NETWORK
    | {
        "final_ln_eps": float,
        "ids": [int],
        "inherit_mask": (True,),
        "last_version": int,
        "mode": ("eval", "inference", "train"),
        "ratio_loss_lambda": float,
        "ratio_per_sample": (True,),
        "selector_hidden": int,
        "selector_ln_eps": float,
        "selector_versions": [int],
        "tau": float,
        "version": int,
    },
)
def svit(golden):
    config = golden.config
    layers = [place - 1 for place in config["loc"]]  # the file counts blocks from 1
    gates = [layer for place, layer in enumerate(layers) if config["ids"][place] not in config["ids"][:place]]
    versions = [config["version"]] * (len(gates) - 1) + [config["last_version"]]
    assert config["selector_versions"] == versions and set(versions) <= {0, 1}
    model = network(config)
    options = {
        "layers": layers,
        "share": config["ids"],
        "inherit": config.get("inherit_mask", False),
        "keep": config["ratio"],
        "candidate_prefix": [gate for gate, version in zip(gates, versions) if version == 0],
        "hidden": config["selector_hidden"],
        "tau": config["tau"],
        "ratio_per_sample": config.get("ratio_per_sample", False),
        "mode": "threshold" if config["mode"] == "inference" else "sample",
    }
    model = loaded(golden, patch(model, "svit", dense=True, **options))
    check_predictors(model, config)
    images, x, state = forward(golden, model, gates)
    logits, ratio = model.forward_head(x), model.token_reducer.losses(state)["ratio"]
    result = {"out.logits": logits, "out.loss_ratio": ratio[None]}
    for layer in layers:
        result[f"out.used_mask_block{layer}"] = state.carry[f"decisions.{layer}"].int()
    if not config.get("inherit_mask", False):
        result |= {f"out.select_{j}": result[f"out.used_mask_block{gate}"] for j, gate in enumerate(gates)}
    else:
        result |= raw_selections(golden, model, gates)
    if "in.target" in golden:
        total = losses.svit_loss(logits, golden["in.target"], ratio, config["ratio_loss_lambda"])
        result |= {
            "out.loss": total[None],
            "out.loss_cls": losses.soft_cross_entropy(logits, golden["in.target"])[None],
        }
        result |= gradients(golden, total, model, images, svit_files.rename)
    if config["mode"] != "train":
        model.token_reducer.dense = False
        with torch.no_grad():
            torch.testing.assert_close(forward(golden, model, gates)[1], x, atol=1e-5, rtol=1e-4)
    return result


def raw_selections(golden, model, gates):
    """The gates' own choices, before the inherited mask: seen by watching the selectors."""
    scores, reducer = [], model.token_reducer
    hooks = [s.register_forward_hook(lambda module, args, out: scores.append(out)) for s in reducer.selectors]
    forward(golden, model, gates)
    for hook in hooks:
        hook.remove()
    result = {}
    for j, (gate, logs) in enumerate(zip(gates, scores, strict=True)):
        front = 0 if gate in reducer.candidate_prefix else 1
        logs = logs[:, front:]
        sampled = reducer.mode == "sample" or model.training
        choice = gumbel_choice(logs, golden[f"in.gumbel_{j}"])[1] if sampled else logs[..., 0] > logs[..., 1]
        result[f"out.select_{j}"] = torch.cat([choice.new_ones(choice.shape[0], front), choice], 1).int()
    return result


@kind(
    "classification/svit_selective_block",
    {"B": int, "C": int, "L": int, "heads": int, "ln_eps": float, "mlp_ratio": float},
)
def svit_selective_block(golden):
    from functools import partial

    from timm.models.vision_transformer import Block

    config, start = golden.config, "TransformerEncoderLayer."
    norm = partial(nn.LayerNorm, eps=config["ln_eps"])
    block = Block(config["C"], config["heads"], mlp_ratio=config["mlp_ratio"], qkv_bias=True, norm_layer=norm)
    names = {name: svit_files.rename(name) for name in golden.group("param")}
    assert all(name.startswith(start) for name in names)
    block.load_state_dict({names[name]: value for name, value in golden.group("param").items()})
    block.to(golden.device).train()
    x, select = golden.leaf("in.x"), golden.leaf("in.select")
    # The decision itself is the score: above one half selects, and its gradient is the decision's.
    reducer = create(
        "threshold",
        depth=1,
        layers=[0],
        mode="threshold",
        selector=lambda _: select[..., 0],
        candidate_prefix=[0],
        dense=True,
    )
    y, _ = run_block(adapter.parts(block), x, TokenState(num_prefix=1), 0, reducer)
    own = dict(block.named_parameters())
    leaves = {"x": x, "select": select} | {name: own[ours] for name, ours in names.items()}
    return {"out.y": y} | golden.gradients({"y": y}, leaves)


@kind(
    "classification/svit_selector",
    {"B": int, "C": int, "L": int, "hidden": int, "ln_eps": float, "tau": float, "version": (0, 1)},
)
def svit_selector(golden):
    config = golden.config
    front = config["version"]  # version 1: the class token is no candidate
    selector = MlpSelector(config["C"], config["hidden"])
    selector.load_state_dict(golden.group("param"))
    selector.to(golden.device)
    assert selector.norm.eps == config["ln_eps"]
    x = golden.leaf("in.x")
    logs = selector(x)[:, front:]
    soft, choice = gumbel_choice(logs, golden["in.gumbel"], config["tau"])
    decision = straight_through(choice, soft)[..., None]
    first = choice.new_ones(choice.shape[0], front)
    result = {
        "out.diff_selector": decision,
        "out.selector": torch.cat([first, choice], 1).int(),
        "out.selector_inference": torch.cat([first, logs[..., 0] > logs[..., 1]], 1).int(),
        "mid.logp": logs,
    }
    leaves = dict(selector.named_parameters()) | {"x": x}
    return result | golden.gradients({"diff_selector": decision}, leaves)
