# SPDX-License-Identifier: Apache-2.0
"""What is behind ``tokenprune convert``: a checkpoint as safetensors."""

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from .._errors import UserError
from ..checkpoints import read_checkpoint, sources
from ..checkpoints._base import find_weights
from .classification.build import Wanted
from .classification.setting import Setting, turned

__all__ = ["Options", "convert"]


@dataclass(frozen=True)
class Options:
    """Arguments of ``tokenprune convert``, see its help."""

    checkpoint: str
    out: str | None = None
    model: str | None = None
    method: str | None = None
    options: dict = field(default_factory=dict)
    resolution: int | None = None
    source: str | None = None
    force: bool = False


def convert(options: Options) -> dict:
    """Read a checkpoint, check it against a model where one is named, and write it.

    Returns:
        Plain object; keys in docs/outputs.md.

    Raises:
        UserError: unreadable file, weights that do not fit, or an output that is there.
    """
    target = Path(options.out or Path(options.checkpoint).with_suffix(".safetensors"))
    if target.exists() and not options.force:
        raise UserError(f"{target} is there already: give another OUT, or --force")
    if target.suffix != ".safetensors":  # readers go by it
        raise UserError(f"OUT must end in .safetensors, got {target}")
    if options.model is None and (options.method or options.options or options.resolution):
        raise UserError("--method, --option and --resolution say which --model: give it too")
    if options.model is not None:
        state, names = _of_model(options), options.model
    else:
        state, names = _as_it_is(options), "the file"
    _write(state, target, {"format": "pt", "model": options.model or ""})
    return {
        "checkpoint": options.checkpoint,
        "file": str(target),
        "model": options.model,
        "names": names,
        "tensors": len(state),
        "parameters": sum(tensor.numel() for tensor in state.values()),
    }


def _of_model(options):
    from ..checkpoints import load_checkpoint

    method = None if options.method == "none" else options.method
    wanted = Wanted(options.model, method, options.options, image_size=options.resolution)
    model = Setting(wanted, options.resolution).build()
    return turned(lambda: load_checkpoint(model, options.checkpoint, options.source)).state_dict()


def _as_it_is(options):
    if options.source is not None:
        raise UserError("--source says how to name the weights: give --model too")
    state = turned(lambda: find_weights(read_checkpoint(options.checkpoint), options.checkpoint))
    for layout in sources().values():
        turned(lambda layout=layout: layout.matches(state))  # refuses by name what no model of ours has
    return state


def _write(state: dict[str, Tensor], target: Path, metadata: dict[str, str]) -> None:
    """Tensors that share memory (tied parameters) are written once per name, so that the file loads strictly."""
    from safetensors.torch import save_file

    copies, seen = {}, set()
    for name, tensor in state.items():
        place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape))
        whole = tensor.is_contiguous() and tensor.numel() == tensor.untyped_storage().nbytes() // tensor.element_size()
        copies[name] = tensor if whole and place not in seen else tensor.clone().contiguous()
        seen.add(place)
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(copies, part, metadata)
        part.replace(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)
