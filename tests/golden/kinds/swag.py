# SPDX-License-Identifier: Apache-2.0
"""Kinds of the SWAG vision transformer, and the model that the kinds of its methods share."""

from dataclasses import dataclass

import pytest
import torch
from tokenprune_ext.nn import TokenState
from torch import Tensor, nn

from tests.golden.harness import Golden, kind

# What every SWAG file's configuration says about the network.
NETWORK = {
    "image_size": int,
    "patch_size": int,
    "num_layers": int,
    "num_heads": int,
    "hidden_dim": int,
    "mlp_dim": int,
    "num_classes": int,
}
RATES = {"dropout_rate": int, "attention_dropout_rate": int}


@dataclass(frozen=True)
class SwagRun:
    """A forward pass: logits, the tokens and their state behind every block, and what can be differentiated."""

    logits: Tensor
    layers: list[tuple[Tensor, TokenState]]
    leaves: dict[str, Tensor]

    @property
    def state(self) -> TokenState:
        return self.layers[-1][1]

    def results(self, golden: Golden) -> dict[str, Tensor]:
        """Logits and the gradients that the file wants."""
        return {"out.logits": self.logits} | golden.gradients({"logits": self.logits}, self.leaves)

    def outputs(self) -> dict[str, Tensor]:
        """``mid.layer_#.out`` in the layout [N, B, D]."""
        return {f"mid.layer_{i}.out": x.transpose(0, 1) for i, (x, _) in enumerate(self.layers)}


class Probe(nn.Module):
    """A model whose forward also returns what happened behind every block."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, trace, carry):
        from tokenprune_ext.integrations import timm as adapter

        layers = []
        x, state = adapter.forward(
            self.model, images, trace=trace, carry=carry, each=lambda layer, x, state: layers.append((x, state))
        )
        return self.model.forward_head(self.model.token_reducer.pool(x, state)), layers


def run_swag(golden: Golden, method="tome", *, trace=False, carry=None, **options) -> SwagRun:
    """The file's network with its weights and a method, on the file's image.

    The weights go through the checkpoint loader; gradients come back under the official names, because the loader's
    renaming is part of the graph.
    """
    pytest.importorskip("timm")
    from tokenprune_ext import load_checkpoint, patch
    from tokenprune_ext.checkpoints import swag as source
    from tokenprune_ext.models.swag import swag_vit

    config = golden.config
    network = {key: config[key] for key in (*NETWORK, *RATES, "classifier") if key in config}
    model = swag_vit(**network).to(golden.device).eval()
    patch(model, method, **options)
    weights = golden.group("param")
    load_checkpoint(model, weights)
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    leaves["image"] = golden.leaf("in.image")
    converted = source.convert({n: t for n, t in leaves.items() if n != "image"}, model)
    parameters = {f"model.{name}": value for name, value in converted.items()}
    arguments = (leaves["image"], trace, carry)
    logits, layers = torch.func.functional_call(Probe(model), parameters, arguments)
    return SwagRun(logits, layers, leaves)


@kind("swag/swag", NETWORK | RATES | {"classifier": ("token", "gap"), "model": ("swag_vit",)})
def swag_dense(golden):
    from tokenprune_ext.reducers import Reducer

    return run_swag(golden, Reducer()).results(golden)


@kind(
    "swag/pos_embed_resize",
    {
        "align_corners": (True,),
        "class_token": (True,),
        "mode": ("bicubic",),
        "new_grid": int,
        "old_grid": int,
        "op": ("swag_pos_embed_resize",),
    },
)
def pos_embed_resize(golden):
    from tokenprune_ext.checkpoints.swag import resize_pos_embedding

    embedding = golden["in.pos_embedding"]
    assert embedding.shape[0] == golden.config["old_grid"] ** 2 + 1
    return {"out.pos_embedding": resize_pos_embedding(embedding, (golden.config["new_grid"],) * 2)}


@kind(
    "swag/hourglass_swag",
    NETWORK
    | RATES
    | {
        "classifier": ("token",),
        "cluster_after_output": bool,
        "cluster_iters": int,
        "cluster_temperture": float,
        "cluster_window_size": int,
        "clustering_location": int,
        "model": ("hourglass_swag_vit",),
        "num_classes": (int, None),
        "num_cluster": (int, [int]),
    },
)
def hourglass_swag(golden):
    config = golden.config
    location, clusters = config["clustering_location"], config["num_cluster"]
    named = {"cluster_iters": "iters", "cluster_temperture": "temperature", "cluster_window_size": "window"}
    run = run_swag(
        golden,
        "hourglass",
        # Behind the output of a layer is in front of the next one.
        layer=location + int(config["cluster_after_output"]) if location >= 0 else -1,
        clusters=tuple(clusters) if isinstance(clusters, list) else clusters,
        **{named[key]: config[key] for key in named if key in config},
    )
    result = run.results(golden)
    if "centers" in run.state.carry:
        side = config["image_size"] // config["patch_size"]
        result["mid.cluster_centers"] = run.state.carry["centers"]
        result["mid.cluster_input_map"] = run.state.carry["features"].transpose(1, 2).unflatten(2, (side, side))
    return result
