# SPDX-License-Identifier: Apache-2.0
"""Commands of ``tokenprune``, one file each. A file added to this folder is found by itself.

It offers ``add_to(app)``, which puts its command on the typer application. What takes long to import (torch models, timm)
is imported when the command runs.
"""

from importlib import import_module
from pkgutil import iter_modules

import typer


def add_to(app: typer.Typer) -> None:
    """Put all commands of this folder on an application."""
    for info in iter_modules(__path__):
        if not info.name.startswith("_"):
            import_module(f"{__name__}.{info.name}").add_to(app)
