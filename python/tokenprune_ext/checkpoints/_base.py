# SPDX-License-Identifier: Apache-2.0
"""Read a checkpoint file, find the weights in it, name them as the model does, and load them strictly."""

import argparse
import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Mapping
from importlib import import_module
from pkgutil import iter_modules

import torch
from torch import Tensor, nn

# Where trainers put the weights, best first. Averaged weights serve when there are no others.
_WRAPPERS = (
    "model",
    "state_dict",
    "model_state_dict",
    "module",
    "net",
    "weights",
    "model_ema",
    "state_dict_ema",
    "ema",
)
# Put in front of every key by data-parallel and compiled wrappers.
_PREFIXES = ("module.", "_orig_mod.")
_SHOWN = 5


def load_checkpoint(
    model: nn.Module, file_or_state_dict: str | os.PathLike | Mapping, source: str | None = None
) -> nn.Module:
    """Load official weights, strictly: every key of the file is used and every parameter of the model is filled.

    Args:
        model: built by :func:`tokenprune_ext.create_model`, or any model that a source knows; patched or not.
        file_or_state_dict: ``.pth``, ``.torch`` or ``.safetensors`` file, or what is in one. Wrapper keys
            (``model``, ``state_dict``, ``module.`` ...) are found by themselves.
        source: layout of the file, a name of :func:`sources`; default: recognised from its keys.

    Returns:
        ``model``.

    Raises:
        ValueError: unreadable or damaged file, unknown source, missing or unexpected keys, other shapes.
    """
    target = _unwrapped(model)
    if isinstance(file_or_state_dict, Mapping):
        name, content = "the given state dict", file_or_state_dict
    else:
        name, content = os.fspath(file_or_state_dict), read_checkpoint(file_or_state_dict)
    state = find_weights(content, name)
    known = sources()
    if source is not None and source not in known:
        raise ValueError(f"load_checkpoint: source must be one of {sorted(known)}, got {source!r}")
    layout = known[source] if source else next((one for one in known.values() if one.matches(state)), None)
    converted = state if layout is None else layout.convert(state, target)
    problems = _differences(converted, target)
    if problems:
        kind = layout.__name__.rpartition(".")[2] if layout else "the model's own names"
        raise ValueError(
            f"load_checkpoint: {name} (layout: {kind}) must fit {type(target).__name__}, got {'; '.join(problems)}"
        )
    target.load_state_dict(converted, strict=True)
    return model


def sources() -> dict:
    """Layouts of official files: name to module."""
    package = __name__.rpartition(".")[0]
    names = [info.name for info in iter_modules(import_module(package).__path__) if not info.name.startswith("_")]
    return {name: import_module(f"{package}.{name}") for name in sorted(names)}


def read_checkpoint(file: str | os.PathLike) -> object:
    """The content of a file, on the CPU. Nothing in it is executed (``weights_only``).

    Raises:
        ValueError: missing, truncated, or no checkpoint.
    """
    path = pathlib.Path(file)
    if not path.is_file():
        raise ValueError(f"load_checkpoint: file must exist, got {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"load_checkpoint: file must hold weights, got the empty {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_harmless()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise _damaged(path, error) from None
        raise ValueError(
            f"load_checkpoint: {path} must hold tensors and plain values only, got a {named[1]}; nothing is executed "
            "from a file: save its state dict on its own, where you trust it"
        ) from None
    except (RuntimeError, EOFError, OSError, KeyError, ValueError, IndexError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from None
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # its module may not be there to name it
            raise
        raise _damaged(path, error) from None


def _harmless():
    """Plain values that trainers save beside the weights: arguments, paths, numbers of numpy."""
    allowed = [argparse.Namespace, pathlib.PosixPath]
    try:
        import numpy as np
        from numpy._core import multiarray
    except ModuleNotFoundError:  # torch works without numpy, and numpy 1 has it elsewhere
        return allowed
    scalars = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    return [*allowed, np.dtype, *scalars, multiarray.scalar, (multiarray.scalar, "numpy.core.multiarray.scalar")]


def find_weights(content: object, name: str = "the given object") -> dict[str, Tensor]:
    """The state dict in a checkpoint, without wrappers and without prefixes that all keys share.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"load_checkpoint: {name} must hold a state dict, got {type(content).__name__}")
    if content and all(isinstance(value, Tensor) for value in content.values()):
        state = dict(content)
        for prefix in _PREFIXES:
            while all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
        return state
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), Mapping) and content[wrapper]:
            return find_weights(content[wrapper], name)
    found = sorted(str(key) for key in content)[:_SHOWN]
    raise ValueError(f"load_checkpoint: {name} must hold weights, got only {found or 'an empty dict'}")


def _damaged(path, error):
    # The first sentence: torch goes on to advise what would execute a foreign file.
    reason = f"{type(error).__name__}: {error}".splitlines()[0].partition(". ")[0].strip(": ")
    return ValueError(
        f"load_checkpoint: {path} must be a complete checkpoint, got a damaged or foreign file ({reason})"
    )


def _unwrapped(model):
    """The model inside of torch.compile's and data-parallel wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def _differences(state, model):
    """What keeps a state dict from fitting, in words; empty when it fits."""
    own = model.state_dict()
    shapes = [
        f"{key} {tuple(state[key].shape)} where the model has {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    parts = (
        ("missing keys", [key for key in own if key not in state]),
        ("unexpected keys", [key for key in state if key not in own]),
        ("other shapes", shapes),
    )
    return [f"{len(found)} {what}: {_shown(found)}" for what, found in parts if found]


def _shown(names):
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
