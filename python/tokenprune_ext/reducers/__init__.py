# SPDX-License-Identifier: Apache-2.0
"""Token-reduction methods, one file each. A file added to this folder is found by itself."""

from importlib import import_module
from pkgutil import iter_modules

from ._base import Reducer, create, get, names, register

for _info in iter_modules(__path__):
    if not _info.name.startswith("_"):
        _method = import_module(f"{__name__}.{_info.name}")
        globals().update({_name: getattr(_method, _name) for _name in getattr(_method, "__all__", ())})

__all__ = ["Reducer", "create", "get", "names", "register"]
