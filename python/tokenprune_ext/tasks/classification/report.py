# SPDX-License-Identifier: Apache-2.0
"""The table of ``tokenprune eval classification``."""

from rich.console import Console
from rich.table import Table


def show(result: dict, console: Console) -> None:
    """Print the figures of :func:`.evaluate.evaluate`."""
    method = f" with {result['method']}" if result["method"] not in (None, "none") else ""
    given = " ".join(f"{name}={value}" for name, value in result["options"].items())
    table = Table(title=f"{result['model']}{method} {given}".strip(), show_header=False)
    table.add_column()
    table.add_column(justify="right", overflow="fold")
    rows = [
        ("images", f"{result['images']} of {result['classes']} classes"),
        ("top-1", f"{result['top1']:.3f} %  ({result['correct']['top1']})"),
        ("top-5", f"{result['top5']:.3f} %  ({result['correct']['top5']})"),
        ("loss", "-" if result["loss"] is None else f"{result['loss']:.4f}"),
        ("model", f"{result['model_images_per_s']:.1f} images/s per process"),
    ]
    if result["images_per_s"] is not None:
        rows.append(("with loading", f"{result['images_per_s']:.1f} images/s, {result['processes']} process(es)"))
    if result["resumed_images"]:
        rows.append(("from the state file", f"{result['resumed_images']} images"))
    if result["not_finite"]:
        rows.append(("not finite", f"{result['not_finite']} images have infinite or NaN logits and count as wrong"))
    if result["tokens"] is not None:
        rows.append(("tokens per layer", " ".join(f"{count:.0f}" for count in result["tokens"])))
        if result["tokens_mlp"] != result["tokens"]:
            rows.append(("in the MLPs", " ".join(f"{count:.0f}" for count in result["tokens_mlp"])))
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if result["weights"] == "seeded":
        console.print(
            "Seeded random weights: the accuracy means nothing (--checkpoint FILE or --pretrained).", soft_wrap=True
        )
