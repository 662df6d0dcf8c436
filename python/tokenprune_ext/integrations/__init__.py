# SPDX-License-Identifier: Apache-2.0
"""Adapters to other libraries, one file each. A file added to this folder is found by itself.

An adapter offers ``find(model) -> [(name, module)]``: the parts it can patch; ``facts(module, owner) -> dict``: what
reducers may want to know (``owner``: the module that the part lies in, or None); ``check(module, owner)``: raises ValueError
for a component that it does not know; ``methods(module) -> dict``: the functions to put on the module, by name; and
``forward(module, images, *, record, trace, carry, each) -> (features, state)``: the features with the reducer in
``module.token_reducer``.
"""

from importlib import import_module
from pkgutil import iter_modules


def adapters() -> list:
    """The adapter modules."""
    return [
        import_module(f"{__name__}.{info.name}") for info in iter_modules(__path__) if not info.name.startswith("_")
    ]
