# SPDX-License-Identifier: Apache-2.0
"""``tokenprune convert``."""

from typing import Annotated

import typer

from .._command import JsonOption, console_for, parse_options, write_json
from . import _options as opt


def convert(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Official file (.pth, .torch, .safetensors).")
    ],
    out: Annotated[
        str | None, typer.Argument(metavar="[OUT]", help="File to write; default: CHECKPOINT with .safetensors.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model that the weights must fit, and whose names they get; default: the file's own names."),
    ] = None,
    method: opt.MethodOption = None,
    option: opt.PairsOption = None,
    resolution: opt.ResolutionOption = None,
    source: Annotated[str | None, typer.Option(help="Layout of the file; default: recognised from its keys.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
    json_file: JsonOption = None,
) -> None:
    """Write the weights of a checkpoint as safetensors, without running anything that is in the file.

    With --model every key must be used and every parameter filled, and the file is named as our model is.
    """
    from ..tasks import convert as task

    options = parse_options(option)
    result = task.convert(task.Options(checkpoint, out, model, method, options, resolution, source, force))
    console_for(json_file).print(
        f"{result['tensors']} tensors ({result['parameters'] / 1e6:.1f}M numbers, names of {result['names']}) -> "
        f"{result['file']}",
        highlight=False,
    )
    write_json(result, json_file)


def add_to(app: typer.Typer) -> None:
    """Put the command on an application."""
    app.command()(convert)
