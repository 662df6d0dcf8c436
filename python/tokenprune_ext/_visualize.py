# SPDX-License-Identifier: Apache-2.0
"""Pictures of a trace: which patches every layer processes, and which were merged into one token."""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._patch import LayerTrace, _patched, layer_traces

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


def group_colours(count: int) -> Tensor:
    """Border colours of the groups in :func:`source_picture`, the same in every run: float64 ``[count, 3]`` in 0..1."""
    draw = random.Random(0).random
    return torch.tensor([[draw() for _ in range(3)] for _ in range(count)], dtype=torch.float64).view(count, 3)


def source_picture(image: Tensor, source: Tensor, patch_size: int, *, class_token: bool = True) -> Tensor:
    """The picture that ToMe's authors draw: every group in its mean colour, with a border of a colour of its own.

    Args:
        image: uint8 ``[h, w, 3]``.
        source: ``[1, groups, tokens]``, 1 where a token belongs to a group; or the group of every token, int
            ``[1, tokens]`` (``state.carry["parent"]``).
        patch_size: side of a patch in pixels.
        class_token: whether the first token is a class token; it is left out.

    Returns:
        uint8 ``[h, w, 3]``.

    Raises:
        ValueError: more than one image, or not one token per patch.
    """
    height, width, _ = image.shape
    rows, columns = height // patch_size, width // patch_size
    group = source.argmax(1) if source.dim() == 3 else source.long()
    group = group[:, int(class_token) :]
    if tuple(group.shape) != (1, rows * columns):
        raise ValueError(
            f"source_picture: source must be of 1 image with {rows} x {columns} patches, got {tuple(group.shape)}"
        )
    count = int(group.max()) + 1
    # Labels below 2**53 pass through the float interpolation unchanged.
    label = F.interpolate(group.view(1, 1, rows, columns).double(), size=(height, width), mode="nearest")[0, 0].long()
    pixels, flat = image.double() / 255, label.flatten()
    total = pixels.new_zeros(count, 3).index_add(0, flat, pixels.flatten(0, 1))
    colour = total / flat.bincount(minlength=count).clamp(min=1)[:, None]
    framed = F.pad(label, (1, 1, 1, 1), value=-1)
    neighbours = (framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:])
    inside = torch.stack([label == other for other in neighbours]).all(0)[..., None]
    painted = torch.where(inside, colour[label], group_colours(count).to(image.device)[label])
    return (painted * 255).to(torch.uint8)


def kept_mask(step: LayerTrace, patches: int, image: int = 0) -> Tensor:
    """Bool ``[patches]``: which patches of one image a layer processed."""
    if step.cu_seqlens is None:
        index = step.index[image]
    else:
        start, end = step.cu_seqlens[image : image + 2].tolist()
        index = step.index[start:end]
    kept = torch.zeros(patches, dtype=torch.bool)
    kept[index[index >= 0].long().cpu()] = True
    return kept


def _merges(step: LayerTrace, num_prefix: int) -> bool:
    """Whether a token of the layer stands for several patches (a token fused from dropped ones does not count)."""
    patches = step.parent.shape[1] - num_prefix
    rows = step.parent[0, num_prefix:][kept_mask(step, patches).to(step.parent.device)]
    shared = torch.isin(step.parent[0, num_prefix:], rows[rows >= 0]).sum().item()
    return shared > rows.shape[0]


def _walk(model, images):
    """What every layer did: the records of the trace, and the states behind the layers."""
    adapter, part = _patched("visualize", model)
    record, after = [], []
    with torch.no_grad():
        adapter.forward(part, images, record=record, trace=True, each=lambda layer, x, state: after.append(state))
    return record, after


def _groups(state, layer: int, head: int, patches: int) -> Tensor | None:
    """Which group of queries every patch belongs to, int ``[patches]``, where a method groups them."""
    for name in (f"act.q_groups.{layer}", f"smyrf.q_clusters.{layer}"):
        if name in state.carry:
            ids = state.carry[name][0]
            if not 0 <= head < ids.shape[0]:
                raise ValueError(f"panels: head must lie between 0 and {ids.shape[0] - 1}, got {head}")
            return ids[head, -patches:]
    return None


def panels(
    model: nn.Module, images: Tensor, picture: Tensor, layers: Sequence[int] | None = None, *, head: int = 0
) -> tuple[str, list[tuple[str, np.ndarray]]]:
    """What a patched model does to one image, drawn for some layers.

    Args:
        model: patched vision transformer.
        images: ``[1, 3, H, W]``, as the model takes them.
        picture: the same crop in 0..1, ``[3, H, W]``.
        layers: default: four, evenly spread.
        head: whose groups are drawn, in methods that group the queries of every head.

    Returns:
        ``(what is drawn, [(panel title, picture [H, W, 3]), ...])``: merged regions where tokens stand for several
        patches, groups of queries where those share attention, kept patches otherwise.

    Raises:
        ValueError: the model is not patched, a layer or head that it does not have, or no grid of patches.
    """
    return panels_of(*_walk(model, images), picture, layers, head=head)


def panels_of(record, after, picture, layers=None, *, head=0):
    """:func:`panels` of a walk that was already made (records, and states behind the layers)."""
    state = record[0].state
    grid, prefix, depth = state.grid, state.num_prefix, len(record)
    if grid is None:
        raise ValueError("panels: model must have a grid of patches, got one without")
    layers = sorted({depth // 4, depth // 2, 3 * depth // 4, depth - 1}) if layers is None else layers
    if any(not 0 <= layer < depth for layer in layers):
        raise ValueError(f"panels: layers must lie between 0 and {depth - 1}, got {list(layers)}")
    steps, patches = layer_traces(record, after), grid[0] * grid[1]
    merging = any(_merges(step, prefix) for step in steps)
    grouping, drawn = False, []
    for layer in layers:
        step, groups = steps[layer], _groups(after[layer], layer, head, patches)
        title = f"layer {layer}: {int(step.tokens[0])} tokens"
        if groups is not None:
            grouping = True
            painted = merged_regions(picture, groups, grid)
            title = f"layer {layer}: {len(groups.unique())} groups"
        elif merging:
            painted = merged_regions(picture, step.parent[0, prefix:], grid)
        else:
            painted = kept_patches(picture, kept_mask(step, patches), grid)
        drawn.append((title, painted))
    if grouping:
        return f"groups of head {head}", drawn
    return "merged regions" if merging else "kept patches", drawn


def visualize(model: nn.Module, images: Tensor, path: str | Path, *, layers: Sequence[int] | None = None) -> Path:
    """Write a picture of what a patched model does to an image.

    Args:
        model: patched.
        images: ``[B, 3, H, W]``, normalised as the model expects; the first one is drawn.
        path: file to write.
        layers: default: four, evenly spread.

    Returns:
        The path.
    """
    config = getattr(model, "pretrained_cfg", {})
    mean, std = (
        torch.tensor(config.get(key, default)).view(3, 1, 1)
        for key, default in (("mean", (0.5,) * 3), ("std", (0.5,) * 3))
    )
    picture = (images[0].float().cpu() * std + mean).clamp(0, 1)
    return draw_method(model, images[:1], picture, path, layers=layers)[0]


def draw_method(
    model: nn.Module,
    images: Tensor,
    picture: Tensor,
    path: str | Path,
    *,
    layers: Sequence[int] | None = None,
    head: int = 0,
    title: str | None = None,
) -> tuple[Path, dict]:
    """Write one row: the input, what the method does to it in some layers, and the tokens of every layer as a curve.

    Args:
        model: patched vision transformer.
        images: ``[1, 3, H, W]``, as the model takes them.
        picture: the same crop in 0..1, ``[3, H, W]``.
        path: file to write, ``.png`` or ``.jpg`` (its folder is made).
        layers, head: see :func:`panels`.
        title: default: name of the method.

    Returns:
        ``(path, {"drawn": what is shown, "layers": [...], "tokens": per layer, "tokens_mlp": per layer})``.
    """
    record, after = _walk(model, images)
    what, drawn = panels_of(record, after, picture, layers, head=head)
    counts = [[int(getattr(step, part)[0]) for step in record] for part in ("attention", "mlp")]
    name = type(_patched("visualize", model)[1].token_reducer).__name__ if title is None else title
    figure, axes = _figure(1, len(drawn) + 2)
    _fill_row(axes[0], picture, f"{name}: {what}", drawn)
    _draw_curve(axes[0][-1], *counts)
    shown = [int(text.split(":")[0].split()[1]) for text, _ in drawn]
    return _save(figure, path), {"drawn": what, "layers": shown, "tokens": counts[0], "tokens_mlp": counts[1]}


def _draw_curve(axis, attention, mlp):
    """Tokens in the attention and in the MLP of every layer, beside those of the dense model."""
    axis.set_axis_on()
    layers = range(len(attention))
    axis.step(layers, [attention[0]] * len(attention), where="mid", color="0.7", label="dense")
    axis.step(layers, attention, where="mid", color="tab:blue", label="attention")
    if mlp != attention:
        axis.step(layers, mlp, where="mid", color="tab:orange", linestyle="--", label="MLP")
    axis.set_ylim(0, 1.08 * attention[0])
    axis.set_title("tokens per layer", fontsize=9)
    axis.set_xticks(range(0, len(attention), max(len(attention) // 4, 1)))
    axis.tick_params(labelsize=7)
    axis.legend(fontsize=7, loc="lower left", frameon=False)


def draw_rows(image: Tensor, rows: Sequence[tuple[str, Sequence[tuple[str, np.ndarray]]]], path: str | Path) -> Path:
    """Write a figure: the input at the left, one row of panels per method.

    Args:
        image: ``[3, H, W]`` in 0..1.
        rows: ``(title, [(panel title, picture [H, W, 3]), ...])`` per method.
        path: file to write (its folder is made).

    Returns:
        The path.
    """
    figure, grid = _figure(len(rows), 1 + max(len(panels) for _, panels in rows))
    for axes, (title, panels) in zip(grid, rows, strict=True):
        _fill_row(axes, image, title, panels)
    return _save(figure, path)


def _figure(rows, columns):
    """A figure with empty axes ``[rows][columns]``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.1 * columns, 2.45 * rows), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)  # no display is needed, and the caller's matplotlib backend stays as it is
    grid = figure.subplots(rows, columns, squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    return figure, grid


def _fill_row(axes, image, title, panels):
    """The input with the title of the row, then the panels."""
    axes[0].imshow(_pixels(image))
    axes[0].set_title(title, fontsize=10, fontweight="bold", loc="left")
    for axis, (subtitle, picture) in zip(axes[1:], panels, strict=False):
        axis.imshow(picture.clip(0, 1))
        axis.set_title(subtitle, fontsize=9)


def _save(figure, path):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
