# SPDX-License-Identifier: Apache-2.0
"""DynamicViT files (raoyongming/DynamicViT) of DeiT and LV-ViT. The keep rate is not in them."""

from torch import Tensor, nn

__all__ = ["convert", "export", "matches", "rename"]

_OFFICIAL, _OURS = "score_predictor.", "token_reducer.selectors."


def matches(state: dict[str, Tensor]) -> bool:
    """Whether the keys are those of a DynamicViT.

    Raises:
        ValueError: the file is of DynamicCNN or DynamicSwin, which work on feature maps and are not supported.
    """
    _refuse_feature_maps(state)
    return "score_predictor.0.in_conv.0.weight" in state


def convert(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Official names -> the model's.

    Raises:
        ValueError: as :func:`matches`.
    """
    _refuse_feature_maps(state)
    return {rename(key): value for key, value in state.items()}


def rename(key: str) -> str:
    """The model's name of an official one."""
    return _OURS + key.removeprefix(_OFFICIAL) if key.startswith(_OFFICIAL) else key


def export(model: nn.Module) -> dict[str, Tensor]:
    """Weights of a patched model under the official names."""
    return {_OFFICIAL + k.removeprefix(_OURS) if k.startswith(_OURS) else k: v for k, v in model.state_dict().items()}


def _refuse_feature_maps(state):
    if any(".score_predictor." in key or ".fastmlp." in key for key in state):
        raise _refused("DynamicSwin (dynamicswin_*)")
    if "downsample_layers.0.0.weight" in state and any("fast_path" in key for key in state):
        raise _refused("DynamicCNN (dynamiccnn_*, ConvNeXt)")


def _refused(what):
    return ValueError(
        f"load_checkpoint: the file must be of a DynamicViT on DeiT or LV-ViT, got one of {what}: a hierarchical "
        "network that prunes feature maps, which this package does not have"
    )
