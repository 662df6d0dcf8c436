# SPDX-License-Identifier: Apache-2.0
"""The command ``tokenprune``. Mistakes of the user give one clear line and exit code 2."""

import sys
from typing import Annotated

import typer

from . import commands
from ._command import JsonOption, console_for, write_json
from ._errors import UserError
from ._version import __version__
from .tasks import register_commands

app = typer.Typer(
    name="tokenprune",
    help="Faster vision transformers by processing fewer tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ModelOption = Annotated[str, typer.Option(help="A timm vision transformer.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Faster vision transformers by processing fewer tokens."""


@app.command()
def demo(
    image: Annotated[
        str | None, typer.Option(help="Photograph to classify; default: the one that scikit-image ships.")
    ] = None,
    model: ModelOption = "deit_small_patch16_224",
    pretrained: Annotated[
        bool,
        typer.Option("--pretrained", help="Download timm's weights; without a network seeded weights serve."),
    ] = False,
    checkpoint: Annotated[
        str | None, typer.Option(help="File with weights of the model (.pth or .safetensors).")
    ] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: all cores.")] = None,
    device: Annotated[str, typer.Option(help="auto (a GPU when there is one), cpu or cuda.")] = "auto",
    batch: Annotated[int, typer.Option(help="Copies of the photograph per forward pass.")] = 1,
    seconds: Annotated[float, typer.Option(help="Time spent on measuring.")] = 10.0,
    out: Annotated[str, typer.Option(help="Picture to write.")] = "out/demo.png",
    json_file: JsonOption = None,
) -> None:
    """Run a ViT on a photograph: dense, with ToMe, EViT and threshold selection; print a table and write a
    picture.

    The table shows the tokens of every layer, GFLOPs (multiply-adds, as papers count), the latency of each,
    the measured and the FLOPs-ideal speed-up over the dense model (which uses the same fused attention), and
    the cosine similarity of the outputs. Without --pretrained or --checkpoint the weights are seeded random
    numbers: speed is the same, but the outputs mean nothing.
    """
    from . import demo as demo_module

    console = console_for(json_file)
    options = demo_module.Options(image, model, pretrained, checkpoint, dtype, threads, device, batch, seconds, out)
    result = demo_module.run(options, say=console.print)
    demo_module.show(result, console)
    write_json(result, json_file)


@app.command()
def env(json_file: JsonOption = None) -> None:
    """Versions, loaded libraries or the reason why not, CPU capability, CUDA archs."""
    from .collect_env import collect, render

    info = collect()
    if json_file != "-":
        print(render(info))
    write_json(info, json_file)


evaluations = typer.Typer(help="Accuracy and throughput on data sets.", no_args_is_help=True)
app.add_typer(evaluations, name="eval")
register_commands(app, evaluations)
commands.add_to(app)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    # The common base of typer's usage errors, without naming typer's private module.
    usage_errors = typer.BadParameter.__mro__[2]
    try:
        code = app(arguments, standalone_mode=False)
    except UserError as error:
        message = " ".join(str(error).split())
    except usage_errors as error:
        message = " ".join(error.format_message().split())
    except (KeyboardInterrupt, typer.Abort):
        print("tokenprune: interrupted", file=sys.stderr)
        return 130
    else:
        return code if isinstance(code, int) else 0
    if message:  # empty when the help was shown because no command was given
        print(f"tokenprune: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
