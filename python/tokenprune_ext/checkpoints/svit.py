# SPDX-License-Identifier: Apache-2.0
"""SViT classification files (uzh-rpg/svit): blocks under the names of torch's ``TransformerEncoderLayer``."""

from torch import Tensor, nn

__all__ = ["convert", "export", "matches", "rename"]

# Official parts -> the model's. Within a block of the file everything sits below "TransformerEncoderLayer.".
_PARTS = (
    ("TransformerEncoderLayer.self_attn.in_proj_", "attn.qkv."),
    ("TransformerEncoderLayer.self_attn.out_proj.", "attn.proj."),
    ("TransformerEncoderLayer.linear1.", "mlp.fc1."),
    ("TransformerEncoderLayer.linear2.", "mlp.fc2."),
    ("TransformerEncoderLayer.norm1.", "norm1."),
    ("TransformerEncoderLayer.norm2.", "norm2."),
    ("selective_modules.", "token_reducer.selectors."),
)


def matches(state: dict[str, Tensor]) -> bool:
    """Whether the keys are those of an SViT for classification."""
    wanted = {"cls_token", "head.weight", "blocks.0.TransformerEncoderLayer.self_attn.in_proj_weight"}
    return wanted <= state.keys() and any(key.startswith("selective_modules.") for key in state)


def convert(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official names -> the model's."""
    return {rename(key): value for key, value in state.items()}


def rename(key: str) -> str:
    """The model's name of an official one."""
    for official, ours in _PARTS:
        key = key.replace(official, ours)
    return key


def export(model: nn.Module) -> dict[str, Tensor]:
    """Weights of a patched model under the official names."""
    state = {}
    for key, value in model.state_dict().items():
        in_block = key.startswith("blocks.")
        for official, ours in _PARTS:
            if in_block == official.startswith("Transformer"):
                key = key.replace(ours, official)
        state[key] = value
    return state
