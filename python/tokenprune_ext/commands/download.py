# SPDX-License-Identifier: Apache-2.0
"""``tokenprune download``."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from .._command import JsonOption, console_for, write_json
from .._errors import UserError


def download(
    names: Annotated[list[str] | None, typer.Argument(metavar="NAME...", help="What to fetch, see --list.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="Show what there is.")] = False,
    folder: Annotated[str, typer.Option("--out", help="Folder for the files.")] = "downloads",
    json_file: JsonOption = None,
) -> None:
    """Fetch official weights (SWAG, DeiT, LV-ViT, DynamicViT, EViT) and COCO from their authors' servers.

    Checksums are compared where they were published; an interrupted download goes on where it stopped.
    """
    from .. import downloads

    console = console_for(json_file)
    if listed:
        rows = [_row(item) for item in downloads.items().values()]
        _show(rows, console)
        write_json(rows, json_file)
        return
    if not names:
        raise UserError("download needs a name (tokenprune download --list shows them)")
    found = [item for name in names for item in downloads.find(name)]
    done = []
    for item in found:
        path = _one(item, folder, console)
        checked = "checksum right" if item.checksum else "no checksum was published"
        console.print(f"{path} ({path.stat().st_size / 1e6:.0f} MB, {checked})", highlight=False)
        done.append({**_row(item), "path": str(path), "bytes": path.stat().st_size})
    write_json(done, json_file)


def _one(item, folder, console):
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from .. import downloads

    columns = (TextColumn(item.name), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(item.name, total=None)
        return downloads.download(
            item, folder, progress=lambda have, total: bar.update(task, completed=have, total=total)
        )


def _row(item):
    return {
        "name": item.name,
        "what": item.what,
        "models": item.models,
        "url": item.page,
        "file": item.file,
        "checksum": item.checksum,
    }


def _show(rows: list[dict], console: Console) -> None:
    table = Table("name", "what", "for", "checksum")
    for row in rows:
        checksum = "none published" if row["checksum"] is None else row["checksum"].partition(":")[0]
        table.add_row(row["name"], row["what"], row["models"], checksum)
    console.print(table)


def add_to(app: typer.Typer) -> None:
    """Put the command on an application."""
    app.command()(download)
