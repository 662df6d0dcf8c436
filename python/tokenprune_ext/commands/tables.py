# SPDX-License-Identifier: Apache-2.0
"""``tokenprune tables``."""

from typing import Annotated

import typer

from .._command import JsonOption, console_for, write_json


def tables(
    only: Annotated[
        str | None, typer.Option(metavar="PATTERN", help="Ids to show, with wildcards: 'expedit-swag/*'.")
    ] = None,
    trace: Annotated[
        bool, typer.Option("--trace/--no-trace", help="Count our models too (a minute for all rows).")
    ] = True,
    measured: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="JSON of 'tokenprune bench' or 'tokenprune eval' to put beside the published results."
        ),
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Published figures beside ours: GFLOPs by the rule of each table and traced, speed, accuracy, parameters.

    Nothing is stored but the published numbers: ours come from the token counts of our models (of the published sizes,
    where there is no model yet) by the closed form that each table's authors used, and from a trace of our models.
    """
    from rich.console import Console
    from rich.progress import track

    from ..tasks import tables as task

    def progress(rows):
        return track(rows, "Counting", console=Console(stderr=True), transient=True, disable=not trace)

    rows = task.collect(only=only, trace=trace, measured=measured or (), progress=progress)
    task.show(rows, console_for(json_file, wide=True))
    write_json(rows, json_file)


def add_to(app: typer.Typer) -> None:
    """Put the command on an application."""
    app.command()(tables)
