# SPDX-License-Identifier: Apache-2.0
"""DeiT and LV-ViT with the token reductions that were trained for them: DynamicViT, SPViT, SViT and EViT.

Names and keywords follow the published scripts and files. Every option of the backbone and of the reducer can be given
too (:func:`.deit.deit`, :class:`.lvvit.LVViT`, ``tokenprune_ext.reducers``).

Published settings worth knowing:
    * DynamicViT: ``base_rate=0.7`` (LV-ViT-S also 0.5); evaluation keeps fixed counts. DeiT-B trains with stochastic
      depth 0.2, all others without.
    * SPViT: targets are powers of ``base_rate``; ``keep=[0.617, 0.369, 0.137]`` is what the last commit of its script
      hard-codes. Its reported accuracies come from masked, sampled evaluation: ``mode="sample", dense=True``.
    * SViT: gates sample in evaluation too; ``mode="threshold"`` is the deterministic rule.
    * EViT: the classifying ``..._shrink_base`` names of its repository, 0.7 with a fused token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature

from torch import nn

from .. import reducers
from .._patch import patch
from ._base import check_options, register
from .deit import SIZES as DEIT_SIZES
from .deit import deit
from .lvvit import SIZES as LV_SIZES
from .lvvit import LVViT

__all__: list[str] = []

# What a reducer learns from the model, not from the caller.
_FACTS = {"depth", "embed_dim", "num_heads", "num_prefix", "class_token", "pooling"}
# Keywords of the published scripts -> options of the reducers.
_KEYWORDS = {
    "base_rate": "keep",
    "base_keep_rate": "keep",
    "token_ratio": "keep",
    "keep_ratio": "keep",
    "pruning_loc": "layers",
    "drop_loc": "layers",
    "inherit_mask": "inherit",
    "select_model_id": "share",
}


@dataclass(frozen=True)
class _Backbone:
    build: Callable[..., nn.Module]
    setting: dict


def _deit(size, **setting):
    width, heads = DEIT_SIZES[size]
    return _Backbone(deit, {"embed_dim": width, "num_heads": heads} | setting)


def _lvvit(size):
    width, heads, depth = LV_SIZES[size]
    return _Backbone(LVViT, {"embed_dim": width, "num_heads": heads, "depth": depth})


# name -> backbone, reducer, the reducer's published options
_MODELS = {
    "dynamicvit_deit_256": (_deit("256"), "dynamicvit", {"keep": 0.7}),
    "dynamicvit_deit_s": (_deit("small"), "dynamicvit", {"keep": 0.7}),
    "dynamicvit_deit_b": (_deit("base", drop_path_rate=0.2), "dynamicvit", {"keep": 0.7}),
    "dynamicvit_lvvit_s": (_lvvit("s"), "dynamicvit", {"keep": 0.7}),
    "dynamicvit_lvvit_m": (_lvvit("m"), "dynamicvit", {"keep": 0.7}),
    "spvit_deit_tiny": (_deit("tiny"), "spvit", {"keep": 0.7}),
    "spvit_deit_small": (_deit("small"), "spvit", {"keep": 0.7}),
    "spvit_deit_base": (_deit("base"), "spvit", {"keep": 0.7}),
    "spvit_lvvit_s": (_lvvit("s"), "spvit", {"keep": 0.7}),
    "spvit_lvvit_m": (_lvvit("m"), "spvit", {"keep": 0.7}),
    # LayerNorm eps 1e-5 inside the blocks: those of torch's TransformerEncoderLayer. Only "s" was published.
    "svit_s": (_deit("small", block_eps=1e-5, drop_path_rate=0.1), "svit", {}),
    "svit_t": (_deit("tiny", block_eps=1e-5, drop_path_rate=0.1), "svit", {}),
    "deit_small_patch16_shrink_base": (_deit("small", drop_path_rate=0.1), "evit", {"keep": 0.7}),
    "deit_base_patch16_shrink_base": (_deit("base", drop_path_rate=0.1), "evit", {"keep": 0.7}),
}


def _register(name, backbone, method, published):
    own = set(signature(backbone.build).parameters)
    gates = [option for option in signature(reducers.get(method)).parameters if option not in _FACTS]
    words = [word for word, option in _KEYWORDS.items() if option in gates]

    def build(**options):
        check_options(name, options, [*own, *gates, *words])
        chosen = dict(published)
        for key in [key for key in options if key not in own]:
            option = _KEYWORDS.get(key, key)
            if option != key and option in options:
                raise ValueError(f"{name}: {key} must not be given beside {option}, which is the same")
            chosen[option] = options.pop(key)
        return patch(backbone.build(**backbone.setting | options), method, **chosen)

    kind = "LV-ViT" if backbone.build is LVViT else "DeiT"
    build.__doc__ = f"{kind} with method ``{method}``. Options: of the backbone, and of the method."
    build.__module__ = __name__
    register(name)(build)


for _name, _parts in _MODELS.items():
    _register(_name, *_parts)
