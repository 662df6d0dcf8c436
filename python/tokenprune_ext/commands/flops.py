# SPDX-License-Identifier: Apache-2.0
"""``tokenprune flops``."""

from typing import Annotated

import typer

from .._command import JsonOption, console_for, parse_options, write_json
from . import _options as opt


def flops(
    model: opt.ModelArgument = None,
    model_option: opt.ModelOption = None,
    method: opt.MethodOption = None,
    option: opt.PairsOption = None,
    resolution: opt.ResolutionOption = None,
    location: opt.LocationOption = None,
    clusters: opt.ClusterOption = None,
    iters: opt.ItersOption = None,
    temperature: opt.TemperatureOption = None,
    window: opt.WindowOption = None,
    tome_r: opt.MergeOption = None,
    image: Annotated[str | None, typer.Option(help="Photograph, for methods that choose by content.")] = None,
    checkpoint: opt.CheckpointOption = None,
    json_file: JsonOption = None,
) -> None:
    """Tokens of every layer and GFLOPs, dense and reduced: the trace, and the rule of the published tables.

    A multiply-add is counted once, as in papers. The trace counts every linear layer, convolution and matrix product that
    really runs; what the method adds (selection, matching, merging) has its own column. Nothing is computed where the
    counts are fixed; methods that choose by content run once on a photograph. Options without a method (-o r=13) mean
    ToMe.
    """
    from ..tasks.classification import flops as task
    from ..tasks.classification.setting import resolve

    setting = resolve(
        opt.named(model, model_option),
        method,
        parse_options(option),
        resolution=resolution,
        published=opt.published(location, clusters, iters, temperature, window, tome_r),
        checkpoint=checkpoint,
    )
    result = task.compare(setting, image=image)
    task.show(result, console_for(json_file, wide=True))
    write_json(result, json_file)


def add_to(app: typer.Typer) -> None:
    """Put the command on an application."""
    app.command()(flops)
