# SPDX-License-Identifier: Apache-2.0
"""Kinds of SMYRF."""

from tokenprune_ext.reducers.smyrf import smyrf_attention, smyrf_hashes, smyrf_order, smyrf_transform

from tests.golden.harness import kind


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
    q, k, v = leaves.values()
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
