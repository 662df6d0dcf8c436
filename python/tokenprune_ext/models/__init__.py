# SPDX-License-Identifier: Apache-2.0
"""Published systems, one file each, under their published names. A file added to this folder is found by itself.

Importing this package registers every model in timm too: ``timm.create_model("hourglass_vit_l16_in1k")``.
"""

from importlib import import_module
from pkgutil import iter_modules

try:
    import timm  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("tokenprune_ext.models needs timm: pip install 'tokenprune-ext[cli]'") from error

from ._base import create_model, entry_points, list_models, register

__all__ = ["create_model", "entry_points", "list_models", "register"]

for _info in iter_modules(__path__):
    if not _info.name.startswith("_"):
        import_module(f"{__name__}.{_info.name}")
