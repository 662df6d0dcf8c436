# SPDX-License-Identifier: Apache-2.0
"""What is done with the models: one folder per task. A folder with a ``commands.py`` is found by itself."""

from importlib import import_module
from importlib.util import find_spec
from pkgutil import iter_modules


def register_commands(app, evaluations) -> None:
    """Let every task add its commands.

    Args:
        app: the command line (typer).
        evaluations: its group ``eval``.
    """
    for info in iter_modules(__path__):
        if info.ispkg and find_spec(f"{__name__}.{info.name}.commands") is not None:
            import_module(f"{__name__}.{info.name}.commands").register(app, evaluations)
