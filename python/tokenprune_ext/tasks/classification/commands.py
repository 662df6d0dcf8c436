# SPDX-License-Identifier: Apache-2.0
"""Commands about classification: ``eval classification``, ``predict``, ``visualize``."""

from typing import Annotated

import typer

from ..._command import JsonOption, console_for, parse_options, write_json
from ..._errors import UserError

Model = Annotated[str, typer.Option("--model", "-m", help="Name of a model, here or in timm.")]
Method = Annotated[
    str | None,
    typer.Option("--method", help="Token-reduction method to put into the model; published names bring their own."),
]
OptionPairs = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-o", metavar="NAME=VALUE", help="Option of the method, or keyword of the published model."
    ),
]
Checkpoint = Annotated[str | None, typer.Option(help="Official file with weights (.pth, .torch, .safetensors ...).")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Download timm's weights.")]
ImageSize = Annotated[
    int | None,
    typer.Option("--image-size", "--resolution", "-r", help="Side of the input; default: the model's own."),
]
NumClasses = Annotated[int | None, typer.Option(help="Outputs of the model; default: its own.")]
Pack = Annotated[bool, typer.Option("--pack", help="Packed weights: faster linear layers on the CPU.")]
Location = Annotated[
    int | None,
    typer.Option("--clustering_location", "-l", help="Of hourglass_vit_*: layers in front of the clustering."),
]
Clusters = Annotated[int | None, typer.Option("--num_cluster", "-n", help="Of hourglass_vit_*: number of clusters.")]


def _wanted(model, method, option, checkpoint, pretrained, image_size, num_classes, location=None, clusters=None):
    from .build import Wanted

    options = parse_options(option)
    for name, value in (("clustering_location", location), ("num_cluster", clusters)):
        if value is not None and name in options:
            raise UserError(f"options must be given once, got {name} twice")
        if value is not None:
            options[name] = value
    return Wanted(model, method, options, checkpoint, pretrained, image_size, num_classes)


def _evaluate(
    data: Annotated[
        str, typer.Option(help="ImageNet folder (val/ or img_val/ in it), or any folder with one folder per class.")
    ],
    model: Model = "deit_small_patch16_224",
    method: Method = None,
    option: OptionPairs = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    image_size: ImageSize = None,
    num_classes: NumClasses = None,
    clustering_location: Location = None,
    num_cluster: Clusters = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", help="Images per forward pass.")] = 64,
    split: Annotated[str | None, typer.Option(help="val or train; default: val where there is one.")] = None,
    crop_pct: Annotated[float | None, typer.Option(help="Share of the central crop; default: as published.")] = None,
    interpolation: Annotated[str | None, typer.Option(help="Of the resizing; default: as published.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    amp: Annotated[bool, typer.Option("--amp", help="Autocast to --dtype; the weights stay float32.")] = False,
    packed: Pack = False,
    device: Annotated[str, typer.Option(help="auto (a GPU when there is one), cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that load images, per process.")] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate so many images, evenly spread.")] = None,
    seed: Annotated[int, typer.Option(help="Of methods that draw.")] = 0,
    state: Annotated[
        str | None, typer.Option(metavar="FILE", help="Keep what is done here; a killed run goes on where it stopped.")
    ] = None,
    json_file: JsonOption = None,
) -> None:
    """Top-1 and top-5 accuracy, throughput and tokens per layer on a folder of images.

    Several processes: torchrun --nproc-per-node 2 -m tokenprune_ext.cli eval classification ... (every image counts
    once; all numbers but the times are those of one process).
    """
    from . import evaluate as module
    from .report import show

    console = console_for(json_file)
    wanted = _wanted(
        model, method, option, checkpoint, pretrained, image_size, num_classes, clustering_location, num_cluster
    )
    options = module.Options(
        data,
        wanted,
        split,
        batch_size,
        crop_pct,
        interpolation,
        dtype,
        amp,
        packed,
        device,
        threads,
        workers,
        limit,
        seed,
        state,
    )
    result = module.evaluate(options, console)
    if module.is_first_process():
        show(result, console)
        write_json(result, json_file)


def _predict(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Pictures.")],
    model: Model = "deit_small_patch16_224",
    method: Method = None,
    option: OptionPairs = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    image_size: ImageSize = None,
    num_classes: NumClasses = None,
    top: Annotated[int, typer.Option(help="Classes per image.")] = 5,
    classes: Annotated[
        str | None, typer.Option(metavar="FILE", help="Names of the classes, one per line; default: ImageNet's.")
    ] = None,
    packed: Pack = False,
    json_file: JsonOption = None,
) -> None:
    """The most likely classes of single images."""
    from . import predict as module

    wanted = _wanted(model, method, option, checkpoint, pretrained, image_size, num_classes)
    result = module.predict(module.Options(images, wanted, top, classes, packed))
    module.show(result, console_for(json_file))
    write_json(result, json_file)


def _visualize(
    image: Annotated[str | None, typer.Argument(help="Picture; default: the one that scikit-image ships.")] = None,
    model: Model = "deit_small_patch16_224",
    method: Method = None,
    option: OptionPairs = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    image_size: ImageSize = None,
    layers: Annotated[str | None, typer.Option(help="Layers to draw, such as 3,6,9; default: four.")] = None,
    head: Annotated[int, typer.Option(help="Whose groups are drawn, in act and smyrf.")] = 0,
    out: Annotated[str, typer.Option(help="Picture to write, .jpg or .png.")] = "out/visualize.jpg",
    json_file: JsonOption = None,
) -> None:
    """Draw what a method does to a picture: merged regions, kept patches or groups, and the tokens of every layer."""
    from . import visualize as module

    console = console_for(json_file)
    wanted = _wanted(model, method, option, checkpoint, pretrained, image_size, None)
    result = module.visualize(module.Options(image, wanted, layers, head, out))
    console.print(f"{result['drawn']}, layers {', '.join(map(str, result['layers']))}: {result['picture']}")
    console.print("tokens per layer: " + " ".join(map(str, result["tokens"])), highlight=False)
    if result["weights"] == "seeded":
        console.print(
            "Seeded random weights: what is kept or merged means little (--checkpoint FILE or --pretrained).",
            soft_wrap=True,
        )
    write_json(result, json_file)


def register(app: typer.Typer, evaluations: typer.Typer) -> None:
    """Add the commands.

    Args:
        app: the command line.
        evaluations: its group ``eval``.
    """
    evaluations.command("classification")(_evaluate)
    app.command("predict")(_predict)
    app.command("visualize")(_visualize)
