# SPDX-License-Identifier: Apache-2.0
"""Pictures of a trace: which patches every layer processes, and which were merged into one token."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

_BORDER = np.array([1.0, 1.0, 1.0])


def _pixels(image: Tensor) -> np.ndarray:
    """[3, H, W] in 0..1 -> float array [H, W, 3]."""
    return image.detach().float().cpu().permute(1, 2, 0).numpy()


def _per_pixel(values: np.ndarray, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Patch values [n] -> the value of every pixel [H, W]."""
    rows = np.minimum(np.arange(size[0]) * grid[0] // size[0], grid[0] - 1)
    columns = np.minimum(np.arange(size[1]) * grid[1] // size[1], grid[1] - 1)
    return values.reshape(grid)[rows[:, None], columns[None]]


def kept_patches(image: Tensor, kept: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """The picture with dropped patches faded to grey.

    Args:
        image: ``[3, H, W]`` in 0..1.
        kept: bool ``[n]``, one per patch of the grid.
        grid: ``(rows, columns)``.

    Returns:
        Array ``[H, W, 3]``.
    """
    pixels = _pixels(image)
    mask = _per_pixel(kept.cpu().numpy().astype(bool), grid, pixels.shape[:2])[..., None]
    faded = 0.25 * pixels.mean(-1, keepdims=True) + 0.7
    return np.where(mask, pixels, faded)


def merged_regions(image: Tensor, parent: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """The picture painted with the mean colour of every token, borders between different tokens in white.

    Args:
        image: ``[3, H, W]`` in 0..1.
        parent: int ``[n]``: the token of every patch; -1 = dropped (painted faded).
        grid: ``(rows, columns)``.

    Returns:
        Array ``[H, W, 3]``.
    """
    pixels = _pixels(image)
    label = _per_pixel(parent.cpu().numpy().astype(np.int64), grid, pixels.shape[:2])
    flat, colours = label.reshape(-1) + 1, pixels.reshape(-1, 3)
    count = np.maximum(np.bincount(flat), 1)
    means = np.stack([np.bincount(flat, colours[:, channel]) / count for channel in range(3)], 1)
    painted = means[flat].reshape(pixels.shape)
    painted = np.where((label < 0)[..., None], 0.25 * painted + 0.7, painted)
    border = np.zeros(label.shape, bool)
    border[1:] |= label[1:] != label[:-1]
    border[:, 1:] |= label[:, 1:] != label[:, :-1]
    return np.where(border[..., None], 0.6 * _BORDER + 0.4 * painted, painted)


def draw_rows(image: Tensor, rows: Sequence[tuple[str, Sequence[tuple[str, np.ndarray]]]], path: str | Path) -> Path:
    """Write a figure: the input at the left, one row of panels per method.

    Args:
        image: ``[3, H, W]`` in 0..1.
        rows: ``(title, [(panel title, picture [H, W, 3]), ...])`` per method.
        path: file to write (its folder is made).

    Returns:
        The path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 1 + max(len(panels) for _, panels in rows)
    figure = Figure(figsize=(2.1 * columns, 2.45 * len(rows)), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)  # no display is needed, and the caller's matplotlib backend stays as it is
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (title, panels) in zip(grid, rows, strict=True):
        for axis in axes:
            axis.set_axis_off()
        axes[0].imshow(_pixels(image))
        axes[0].set_title(title, fontsize=10, fontweight="bold", loc="left")
        for axis, (subtitle, picture) in zip(axes[1:], panels, strict=False):
            axis.imshow(picture.clip(0, 1))
            axis.set_title(subtitle, fontsize=9)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
