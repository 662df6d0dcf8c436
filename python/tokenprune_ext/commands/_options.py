# SPDX-License-Identifier: Apache-2.0
"""Options that the commands around classifiers share."""

from typing import Annotated

import typer

from .._errors import UserError

MODEL = "deit_small_patch16_224"

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Name of ours (hourglass_vit_l16_in1k ...) or of timm, or the id of a published row (expedit-swag/003).",
        show_default=False,
    ),
]
ModelOption = Annotated[str | None, typer.Option("--model", help="The same as MODEL.", hidden=True)]
MethodOption = Annotated[
    str | None,
    typer.Option(help="Token-reduction method, 'none' for the dense model; default: what the model has built in."),
]
PairsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        "-o",
        metavar="NAME=VALUE",
        help="Option of the method (r=13, keep=0.7) or, without --method, keyword of the model (base_keep_rate=0.8).",
    ),
]
ResolutionOption = Annotated[
    int | None, typer.Option("--resolution", "--image-size", "-r", help="Side of the square input.")
]
CheckpointOption = Annotated[str | None, typer.Option(help="Official weights (.pth, .torch or .safetensors).")]
# Spelled as in the published scripts.
LocationOption = Annotated[
    int | None, typer.Option("--clustering_location", "-l", help="Hourglass: first layer on clusters, -1 for none.")
]
ClusterOption = Annotated[
    str | None, typer.Option("--num_cluster", "-n", help="Hourglass: number of clusters, a square, or ROWSxCOLUMNS.")
]
ItersOption = Annotated[int | None, typer.Option("--cluster_iters", help="Hourglass: iterations of the clustering.")]
TemperatureOption = Annotated[
    float | None, typer.Option("--cluster_temperture", help="Hourglass: factor of the squared distances.")
]
WindowOption = Annotated[
    int | None, typer.Option("--cluster_window_size", help="Hourglass: side of the neighbourhood of cells.")
]
MergeOption = Annotated[int | None, typer.Option("--tome_r", help="ToMe: merges per layer.")]


def published(location, clusters, iters, temperature, window, tome_r) -> dict:
    """The published options as keywords of the hub functions."""
    return {
        "clustering_location": location,
        "num_cluster": None if clusters is None else _clusters(clusters),
        "cluster_iters": iters,
        "cluster_temperture": temperature,
        "cluster_window_size": window,
        "tome_r": tome_r,
    }


def _clusters(text):
    try:
        numbers = [int(part) for part in text.lower().split("x")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2):
        raise UserError(f"--num_cluster must be a number or ROWSxCOLUMNS, got {text!r}")
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


def named(argument: str | None, option: str | None, default: str = MODEL) -> str:
    """The model, from whichever way it was given."""
    if argument is not None and option is not None and argument != option:
        raise UserError(f"MODEL and --model must not differ, got {argument!r} and {option!r}")
    return argument or option or default
