# SPDX-License-Identifier: Apache-2.0
"""SPViT files (PeiyanFlying/SPViT). No pruned model was published; the layout is what its training script saves.

A selector's MLP is one module under one name per head: the file holds a copy per head, the model one.
"""

import re
import warnings

import torch
from torch import Tensor, nn

from . import dynamicvit

__all__ = ["convert", "export", "matches", "rename"]

_COPY = re.compile(r"(score_predictor\.\d+\.(?:in|out)_conv)\.(\d+)\.(\d+\.\w+)$")


def matches(state: dict[str, Tensor]) -> bool:
    """Whether the keys are those of an SPViT with a multi-head selector."""
    return "score_predictor.0.in_conv.0.0.weight" in state


def convert(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official names -> the model's. Of unequal copies the last one counts, as in the original, with a warning.

    Raises:
        ValueError: a copy is missing or has another shape.
    """
    converted, copies = {}, {}
    for key, value in state.items():
        found = _COPY.match(key)
        if found:
            copies.setdefault(rename(key), {})[int(found[2])] = value
        else:
            converted[rename(key)] = value
    heads = {len(values) for values in copies.values()} | {max(values) + 1 for values in copies.values()}
    if len(heads) > 1:
        raise ValueError(
            f"load_checkpoint: every selector weight must have one copy per head, got {sorted(heads)} copies"
        )
    unequal = []
    for name, values in copies.items():
        last = values[max(values)]
        if any(value.shape != last.shape for value in values.values()):
            raise ValueError(f"load_checkpoint: the heads' copies of {name} must have one shape, got several")
        if any(not torch.equal(value, last) for value in values.values()):
            unequal.append(name)
        converted[name] = last
    if unequal:
        warnings.warn(
            f"load_checkpoint: the heads' copies of {len(unequal)} selector weights differ ({unequal[0]}, ...); the last "
            "head's are taken",
            stacklevel=4,
        )
    return converted


def rename(key: str) -> str:
    """The model's name of an official one; all heads' copies have the same."""
    found = _COPY.match(key)
    return dynamicvit.rename(f"{found[1]}.{found[3]}" if found else key)


def export(model: nn.Module) -> dict[str, Tensor]:
    """Weights of a patched model under the official names, one copy per head."""
    state, heads = {}, model.blocks[0].attn.num_heads
    for key, value in dynamicvit.export(model).items():
        found = re.match(r"(score_predictor\.\d+\.(?:in|out)_conv)\.(.*)$", key)
        state |= {f"{found[1]}.{head}.{found[2]}": value for head in range(heads)} if found else {key: value}
    return state
