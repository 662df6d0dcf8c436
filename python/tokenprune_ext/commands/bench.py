# SPDX-License-Identifier: Apache-2.0
"""``tokenprune bench``: one command per task."""

from typing import Annotated

import typer

from .._command import JsonOption, console_for, parse_options, write_json
from . import _options as opt


def classification(
    model: opt.ModelArgument = None,
    model_option: opt.ModelOption = None,
    method: opt.MethodOption = None,
    option: opt.PairsOption = None,
    resolution: opt.ResolutionOption = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", help="Images of the throughput; default: 8, on a GPU 200.")
    ] = None,
    location: opt.LocationOption = None,
    clusters: opt.ClusterOption = None,
    iters: opt.ItersOption = None,
    temperature: opt.TemperatureOption = None,
    window: opt.WindowOption = None,
    tome_r: opt.MergeOption = None,
    checkpoint: opt.CheckpointOption = None,
    image: Annotated[
        str | None, typer.Option(help="Photograph, for the GFLOPs of methods that choose by content.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="auto (a GPU when there is one), cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
    seconds: Annotated[float, typer.Option(help="Time spent on measuring.")] = 10.0,
    json_file: JsonOption = None,
) -> None:
    """GFLOPs, FPS at batch 1, throughput and parameters of a classifier, as the original scripts print them.

    tokenprune bench classification hourglass_vit_l16_in1k -r 512 -l 12 -n 23x23 -b 8
    """
    from ..tasks.classification import bench as task
    from ..tasks.classification.setting import resolve

    setting = resolve(
        opt.named(model, model_option),
        method,
        parse_options(option),
        resolution=resolution,
        published=opt.published(location, clusters, iters, temperature, window, tome_r),
        checkpoint=checkpoint,
    )
    result = task.run(setting, task.Run(batch_size, dtype, device, threads, seconds, image))
    task.show(result, console_for(json_file, wide=True))
    write_json(result, json_file)


def add_to(app: typer.Typer) -> None:
    """Put the group and its commands on an application."""
    group = typer.Typer(help="Speed and GFLOPs, as the original scripts print them.", no_args_is_help=True)
    group.command()(classification)
    app.add_typer(group, name="bench")
