# SPDX-License-Identifier: Apache-2.0
"""What the commands share: options, and where tables and JSON go."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ._errors import UserError

JsonOption = Annotated[
    str | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write the rows as JSON; '-' is standard output, with nothing else on it.",
    ),
]


def write_json(data: object, target: str | None) -> None:
    """Write JSON to a file or, for ``-``, to standard output; None writes nothing."""
    if target is None:
        return
    text = json.dumps(data, indent=1)
    if target == "-":
        print(text)
        return
    try:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(text + "\n")
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None


_PLAIN_WIDTH = 160  # of wide tables where there is no terminal to ask


def console_for(target: str | None, wide: bool = False) -> Console:
    """Where tables go: to standard error when the JSON takes standard output.

    Args:
        target: of the JSON.
        wide: do not fold the table to 80 columns where the output is no terminal.
    """
    # Names of files and classes are shown as they are: no [markup], no :emoji:.
    console = Console(stderr=target == "-", markup=False, emoji=False)
    if wide and not console.is_terminal:
        console.width = _PLAIN_WIDTH
    return console


def parse_options(pairs: list[str] | None) -> dict:
    """``["r=13", "mode=topk"]`` -> ``{"r": 13, "mode": "topk"}``; values are JSON where that parses.

    Raises:
        UserError: an entry without ``=``.
    """
    parsed = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--option must have the form NAME=VALUE, got {pair!r}")
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = value
    return parsed
