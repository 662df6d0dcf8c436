# SPDX-License-Identifier: Apache-2.0
"""DeiT files (facebookresearch/deit), whose names are timm's; EViT's have the same layout.

For a patched model with learned parts they are start weights: those parts keep their initial values.
"""

import warnings

from torch import Tensor, nn

__all__ = ["convert", "matches", "with_own_selectors"]


def matches(state: dict[str, Tensor]) -> bool:
    """Whether the keys are those of a plain DeiT."""
    plain = {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= state.keys()
    extra = ("score_predictor.", "token_reducer.", "aux_head.", "patch_embed.conv1.")
    return plain and not any(key.startswith(extra) for key in state)


def convert(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official names are the model's names."""
    return with_own_selectors(state, model)


def with_own_selectors(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Start weights for training: the learned parts of a patched model keep what they have, with a warning."""
    own = {key: value for key, value in model.state_dict().items() if key.startswith("token_reducer.")}
    if own:
        warnings.warn(
            f"load_checkpoint: the file has weights of the backbone only; the {len(own)} tensors of "
            f"{type(model.token_reducer).__name__}'s selectors keep their initial values (train them)",
            stacklevel=4,
        )
    return own | state
