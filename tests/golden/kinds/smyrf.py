# SPDX-License-Identifier: Apache-2.0
"""Kinds of SMYRF."""

from tokenprune_ext.reducers.smyrf import smyrf_attention, smyrf_hashes, smyrf_order, smyrf_transform

from tests.golden.harness import kind
from tests.golden.kinds.act import plugged
from tests.golden.kinds.swag import NETWORK, run_swag


@kind(
    "swag_methods/smyrf_attention",
    {
        "BH": int,
        "Nk": int,
        "Nq": int,
        "head_dim": int,
        "k_cluster_size": int,
        "method": ("smyrf_attention",),
        "n_hashes": int,
        "norm_factor": float,
        "q_cluster_size": int,
        "r": int,
    },
)
def attention(golden):
    config = golden.config
    leaves = {name: golden.leaf(f"in.{name}") for name in "qkv"}
    q, k, _ = leaves.values()
    alpha, beta = golden["in.alpha"], golden["in.beta"]
    assert alpha.shape[1] == config["n_hashes"]
    orders = [smyrf_order(hashes) for hashes in smyrf_hashes(q, k, alpha, beta)]
    y = smyrf_attention(
        *leaves.values(),
        *orders,
        q_size=config["q_cluster_size"],
        k_size=config["k_cluster_size"],
        scale=1 / config["norm_factor"],
        per_row=False,
    )
    transformed = smyrf_transform(q, k)
    result = {"out.q_positions": orders[0], "out.k_positions": orders[1], "out.y": y}
    result |= {"mid.q_xbox": transformed[0], "mid.k_xbox": transformed[1]}
    return result | golden.gradients({"y": y}, leaves)


@kind(
    "swag_methods/smyrf_vit",
    NETWORK
    | {
        "batch": int,
        "method": ("smyrf",),
        "seed": int,
        "smyrf_k_cluster_size": int,
        "smyrf_layers": [int],
        "smyrf_n_hashes": int,
        "smyrf_plug_in_index": int,
        "smyrf_plug_out_index": int,
        "smyrf_q_cluster_size": int,
    },
)
def smyrf_vit(golden):
    config = golden.config
    layers = plugged(config, "smyrf", config["num_layers"])
    assert layers == config["smyrf_layers"]
    # Queries and keys are equally many, so that other sizes would not make as many clusters of both.
    assert config["smyrf_q_cluster_size"] == config["smyrf_k_cluster_size"]
    carry = {
        f"smyrf.{name}.{layer}": golden[f"in.layer_{layer}.{name}"] for layer in layers for name in ("alpha", "beta")
    }
    options = {"rounds": config["smyrf_n_hashes"], "cluster_size": config["smyrf_q_cluster_size"]}
    run = run_swag(golden, "smyrf", carry=carry, layers=layers, per_row=False, **options)
    return run.results(golden) | run.outputs()
