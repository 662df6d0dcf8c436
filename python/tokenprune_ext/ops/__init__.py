# SPDX-License-Identifier: Apache-2.0
"""Public ops. Each family is one file; every name in a family's ``__all__`` is importable from here."""

from importlib import import_module
from pkgutil import iter_modules

__all__ = []
for _info in iter_modules(__path__):
    if not _info.name.startswith("_"):
        _family = import_module(f"{__name__}.{_info.name}")
        globals().update({_name: getattr(_family, _name) for _name in _family.__all__})
        __all__ += _family.__all__
