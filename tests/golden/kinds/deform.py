# SPDX-License-Identifier: Apache-2.0
"""Kinds of multi-scale deformable attention: the op, the module, its initialisation, the adapter's reference points."""

import torch
from tokenprune_ext import ops
from tokenprune_ext.nn import MSDeformAttn, deform_inputs

from tests.golden.harness import kind


@kind(
    "svit_detection/ms_deform_attn",
    {
        "batch": int,
        "channels": int,
        "dtype": ("float32", "float64"),
        "heads": int,
        "im2col_step": int,
        "levels": [[int]],
        "points": int,
        "queries": int,
    },
)
def ms_deform_attn(golden):
    config, shapes = golden.config, golden["in.spatial_shapes"]
    assert shapes.tolist() == config["levels"]
    names = ("value", "sampling_locations", "attention_weights")
    leaves = {n: golden.leaf(f"in.{n}") for n in names}
    assert all(str(t.dtype) == f"torch.{config['dtype']}" for t in leaves.values())
    value, locations, weights = leaves.values()
    assert value.shape[2:] == (config["heads"], config["channels"])
    output = ops.ms_deform_attn(
        value, shapes, golden["in.level_start_index"], locations, weights, config["im2col_step"]
    )
    listed = ops.ms_deform_attn(value, config["levels"], None, locations, weights)
    assert torch.equal(output, listed), "the two forms of the shapes differ"
    return {"out.output": output} | golden.gradients({"output": output}, leaves)


@kind(
    "svit_detection/msda_module",
    {
        "d_model": int,
        "levels": [[int]],
        "n_heads": int,
        "n_levels": int,
        "n_points": int,
        "padding_mask": bool,
        "query_grids": [[int]],
        "ratio": float,
        "reference": ("box", "full2", "grid"),
    },
)
def msda_module(golden):
    config = golden.config
    module = MSDeformAttn(*(config[n] for n in ("d_model", "n_levels", "n_heads", "n_points", "ratio")))
    module.load_state_dict(golden.group("param"))
    module.to(golden.device, golden["in.query"].dtype)
    query, values = golden.leaf("in.query"), golden.leaf("in.input_flatten")
    mask = golden["in.input_padding_mask"].bool() if config["padding_mask"] else None
    output = module(
        query,
        golden["in.reference_points"],
        values,
        golden["in.spatial_shapes"],
        golden["in.level_start_index"],
        mask,
    )
    leaves = {"query": query, "input_flatten": values, **dict(module.named_parameters())}
    return {"out.output": output} | golden.gradients({"output": output}, leaves)


@kind("svit_detection/msda_init", {"cases": list})
def msda_init(golden):
    result = {}
    for case in golden.config["cases"]:
        assert set(case) == {"d_model", "n_heads", "n_levels", "n_points"}
        module = MSDeformAttn(**case)
        zero = (
            module.sampling_offsets.weight,
            module.attention_weights.weight,
            module.attention_weights.bias,
            module.value_proj.bias,
            module.output_proj.bias,
        )
        assert not any(t.any() for t in zero)
        name = "d{d_model}_h{n_heads}_l{n_levels}_p{n_points}".format(**case)
        result[f"out.sampling_offsets_bias.{name}"] = module.sampling_offsets.bias
    return result


@kind("svit_detection/deform_inputs", {"image_sizes": [[int]]})
def adapter_inputs(golden):
    result = {}
    for height, width in golden.config["image_sizes"]:
        for part, inputs in zip(("injector", "extractor"), deform_inputs(height, width), strict=True):
            name = f"out.{part}.{height}x{width}"
            result |= {
                f"{name}.reference_points": inputs.reference_points,
                f"{name}.spatial_shapes": torch.tensor(inputs.spatial_shapes),
                f"{name}.level_start_index": torch.tensor(inputs.level_start_index),
            }
    return result
