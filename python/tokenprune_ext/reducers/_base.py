# SPDX-License-Identifier: Apache-2.0
"""The protocol of token-reduction methods, and their registry."""

import inspect
import operator
from collections.abc import Iterable
from importlib import import_module
from pkgutil import iter_modules

from torch import Tensor, nn

from ..nn import TokenState

_registry: dict[str, type] = {}


class Reducer(nn.Module):
    """A token-reduction method: everything it does is a map ``(x, state) -> (x, state)`` at one of these places.

    Tokens ``x`` are ``[B, N, C]``, or ``[T, C]`` when ``state.cu_seqlens`` is set. Nothing is stored on modules and
    nothing is changed in place. Learned gates are parameters of the reducer.

    A constructor takes keywords only. It may name facts of the model it will serve, which are then filled in by
    ``create``: ``depth``, ``embed_dim``, ``num_heads``, ``num_prefix``, ``class_token``, ``distill_token``,
    ``pooling`` (what the classifier reads: "token", "avg", ...).
    """

    restore_at = "features"
    own_attention = False
    """Whether the method replaces the attention itself, between the branch's projections."""

    @property
    def active(self) -> bool:
        """Whether any layer reduces. False: idle layers (``run.idle``) are the model's own blocks, bit for bit."""
        return True

    def begin(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Once per forward: random draws, packing, first entries of the carry."""
        return x, state

    def block(self, x: Tensor, state: TokenState, layer: int, run) -> tuple[Tensor, TokenState]:
        """Around a block. ``run(x, state)`` is the block, ``run.original(x, state)`` the model's own one.

        ``run.idle(x, state)`` is the one to call in layers that the method leaves alone: it takes the faster way.
        """
        return run(x, state)

    def attention(self, x: Tensor, state: TokenState, layer: int, branch) -> tuple[Tensor, TokenState]:
        """Around sub-layer 1, residual included."""
        return branch.add(x, state), state

    def mlp(self, x: Tensor, state: TokenState, layer: int, branch) -> tuple[Tensor, TokenState]:
        """Around sub-layer 2, residual included."""
        return branch.add(x, state), state

    def pool(self, x: Tensor, state: TokenState) -> Tensor:
        """Features as the model's pooling shall see them, once behind the last norm."""
        return x

    def restore(self, y: Tensor, state: TokenState) -> Tensor:
        """Values aligned with the current patch tokens -> the full grid ``[B, N0, ...]``."""
        return y

    def losses(self, state: TokenState) -> dict[str, Tensor]:
        """Training terms by name, unweighted."""
        return {}

    def plan(self, depth: int, n: int) -> list[tuple[int, int]] | None:
        """Tokens that enter ``(attention, MLP)`` of each layer when ``n`` (prefix included) come in.

        None when the counts depend on the data.
        """
        return None


def register(name: str):
    """Class decorator: make a method known under ``name``.

    Raises:
        ValueError: the name is taken by another class.
    """

    def decorate(cls):
        if _registry.get(name, cls).__qualname__ != cls.__qualname__:
            raise ValueError(
                f"reducers.register: name must be new, got {name!r} (taken by {_registry[name].__qualname__})"
            )
        _registry[name] = cls
        return cls

    return decorate


def discover(package: str, path: Iterable[str]) -> dict[str, object]:
    """Import every method file of a package; returns their public names."""
    public = {}
    for info in iter_modules(path):
        if not info.name.startswith("_"):
            method = import_module(f"{package}.{info.name}")
            public.update({name: getattr(method, name) for name in getattr(method, "__all__", ())})
    return public


def names() -> list[str]:
    """Names of all methods."""
    return sorted(_registry)


def get(name: str) -> type:
    """Class of a method.

    Raises:
        ValueError: no method has this name.
    """
    if not isinstance(name, str) or name not in _registry:
        raise ValueError(f"reducers: method must be one of {names()}, got {name!r}")
    return _registry[name]


def create(method: str | Reducer | type, facts: dict | None = None, **options) -> Reducer:
    """Build a method.

    Args:
        method: its name, its class, or a finished reducer (returned as it is).
        facts: what is known about the model; only what the constructor names is handed over.
        options: the method's own options; they win over the facts.

    Raises:
        ValueError: unknown method or option, an option of another type, or options for a finished reducer.
    """
    if isinstance(method, Reducer):
        if options:
            raise ValueError(f"reducers.create: a finished reducer must come without options, got {sorted(options)}")
        return method
    if isinstance(method, type) and not issubclass(method, Reducer):
        raise ValueError(f"reducers.create: method must be a name, a Reducer or its class, got {method.__name__}")
    cls = method if isinstance(method, type) else get(method)
    accepted = inspect.signature(cls).parameters
    unknown = [name for name in options if name not in accepted]
    if unknown:
        raise ValueError(f"{cls.__name__}: options must be among {sorted(accepted)}, got {unknown}")
    _check_layers(cls.__name__, options.get("layers"))
    known = {name: value for name, value in (facts or {}).items() if name in accepted}
    try:
        return cls(**known | options)
    except TypeError as error:  # an option that cannot be compared, counted or iterated; a fact that is missing
        raise ValueError(f"{cls.__name__}: options must be of the documented types, got {options} ({error})") from error


def _check_layers(method, layers):
    """Layers are whole numbers in every method."""
    try:
        layers is None or [operator.index(layer) for layer in layers]
    except TypeError:
        raise ValueError(f"{method}: layers must be a list of whole numbers, got {layers!r}") from None
