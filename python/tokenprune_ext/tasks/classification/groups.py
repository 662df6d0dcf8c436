# SPDX-License-Identifier: Apache-2.0
"""Parameter groups of the published recipes: who learns at which rate, who decays, who never moves."""

from torch import nn
from torch.optim import Optimizer

__all__ = ["parameter_groups", "set_rates"]

_SELECTORS = "token_reducer."
_EMBEDDINGS = ("cls_token", "pos_embed")


def parameter_groups(model: nn.Module, recipe: str, weight_decay: float = 0.05) -> list[dict]:
    """Groups for AdamW; each carries its ``"role"``, ``"selectors"`` or ``"backbone"``, for :func:`set_rates`.

    * ``"spvit"``: selectors all decay, biases and norms too; of the backbone only matrices do. Class token and position
      embedding are in no group: they are never updated.
    * ``"dynamicvit"``: vectors (biases, norms) never decay, selectors' included; class token and position embedding are
      never updated.
    * ``"svit"``, ``"evit"``: vectors, class token and position embedding do not decay; everything learns.

    While the backbone rests its rate is 0 and AdamW moves nothing of it (decay is multiplied by the rate), but the
    running statistics of an LV-ViT's BatchNorms keep following the batches.

    Args:
        model: patched.
        recipe: one of the above.
        weight_decay: of the groups that decay.

    Raises:
        ValueError: unknown recipe.
    """
    if recipe not in ("spvit", "dynamicvit", "svit", "evit"):
        raise ValueError(f"parameter_groups: recipe must be 'spvit', 'dynamicvit', 'svit' or 'evit', got {recipe!r}")
    groups: dict[tuple[str, float], list] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = "selectors" if name.startswith(_SELECTORS) else "backbone"
        vector = parameter.dim() == 1 or name.endswith(".bias")
        if name in _EMBEDDINGS:
            if recipe in ("spvit", "dynamicvit"):
                continue
            vector = True
        decays = not vector or (recipe == "spvit" and role == "selectors")
        groups.setdefault((role, weight_decay if decays else 0.0), []).append(parameter)
    return [{"params": parameters, "weight_decay": decay, "role": role} for (role, decay), parameters in groups.items()]


def set_rates(optimizer: Optimizer, selectors: float, backbone: float) -> None:
    """Give the groups of :func:`parameter_groups` their learning rates."""
    rates = {"selectors": selectors, "backbone": backbone}
    for group in optimizer.param_groups:
        group["lr"] = rates[group["role"]]
