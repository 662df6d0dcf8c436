# SPDX-License-Identifier: Apache-2.0
"""What the adapters share: the loop over the blocks, and checks that name the component they refuse."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..nn import BlockParts, TokenState, run_block, split_prefix
from ..reducers import Reducer

NORMS = (
    "Identity",
    "LayerNorm",
    "LayerNormFp32",
    "RMSNorm",
    "RmsNorm",
    "RmsNormFp32",
    "SimpleNorm",
    "SimpleNormFp32",
)


def start(
    x: Tensor,
    grid: tuple[int, int] | None,
    num_prefix: int,
    *,
    index: bool = False,
    trace: bool = False,
    carry: dict[str, Tensor] | None = None,
) -> TokenState:
    """The state of tokens ``x [B, N, C]`` in front of the first block.

    Args:
        x: the tokens.
        grid: of the patches.
        num_prefix: tokens in front of them.
        index: follow the tokens' places (the model's attention needs them).
        trace: follow all of them.
        carry: entries that the method finds in ``state.carry``.
    """
    state = TokenState(grid=grid, num_prefix=num_prefix, carry=dict(carry or {}))
    state = state.with_index(x) if index else state
    return state.with_trace(x) if trace else state


def walk(
    model: nn.Module,
    x: Tensor,
    state: TokenState,
    blocks: Iterable[BlockParts],
    *,
    saving: bool = False,
    record: list | None = None,
    each: Callable | None = None,
) -> tuple[Tensor, TokenState]:
    """Tokens through all blocks with the model's reducer.

    Args:
        model: patched.
        x, state: from :func:`start`.
        blocks: the parts of every block. A list where they are cheap: made one after another, they cost half as much as
            between the layers, whose weights push the interpreter out of the cache.
        saving: gradient checkpointing.
        record: see :func:`tokenprune_ext.nn.run_block`.
        each: called with ``(layer, x, state)`` after every block.
    """
    reducer = model.token_reducer
    x, state = reducer.begin(x, state)
    for layer, block in enumerate(blocks):
        if saving:
            step = partial(run_block, block, layer=layer, reducer=reducer, record=record)
            x, state = checkpoint(step, x, state, use_reentrant=False)
        else:
            x, state = run_block(block, x, state, layer, reducer, record)
        if each is not None:
            each(layer, x, state)
    return x, state


def saves(model: nn.Module, wanted: bool) -> bool:
    """Whether blocks are to run again in the backward pass."""
    return wanted and torch.is_grad_enabled()


def full_map(model: nn.Module, x: Tensor, state: TokenState) -> tuple[Tensor, Tensor]:
    """Prefix tokens ``[B, P, C]`` and the values of all patches ``[B, N0, C]``, as far as the method can restore them.

    Raises:
        ValueError: the method does not restore.
    """
    front, rest = split_prefix(x, state)
    patches = model.token_reducer.restore(rest, state)
    wanted = None if state.grid is None else state.grid[0] * state.grid[1]
    if patches.dim() != 3 or (wanted is not None and patches.shape[1] != wanted):
        raise ValueError(
            f"maps of all patches: the method must restore reduced tokens, and {type(model.token_reducer).__name__} "
            "does not"
        )
    return front, patches


def pools(model: nn.Module) -> bool:
    """Whether the method wants to change what the model's pooling sees."""
    return type(model.token_reducer).pool is not Reducer.pool


def present(module: nn.Module | None) -> nn.Module | None:
    """None for an identity."""
    return None if isinstance(module, nn.Identity) else module


def same(x: Tensor) -> Tensor:
    """``x``: the norm in front of a branch whose norm lies behind it."""
    return x


def must_be(name: str, module: nn.Module, kinds: tuple[str, ...]) -> None:
    """Refuse a module whose class has another name.

    Raises:
        ValueError: names the module.
    """
    if type(module).__name__ not in kinds:
        raise ValueError(f"patch: {name} must be one of {list(kinds)}, got {type(module).__name__}")


def must_run(name: str, module: nn.Module, classes: tuple[type, ...], library: str) -> None:
    """Refuse a module that does not run the forward of one of the library's classes.

    Raises:
        ValueError: names the module.
    """
    if type(module).forward not in [cls.forward for cls in classes] or "forward" in vars(module):
        names = " or ".join(cls.__name__ for cls in classes)
        raise ValueError(f"patch: {name} must be a {library} {names}, got {type(module).__name__}")


def must_keep(model: nn.Module, cls: type, names: tuple[str, ...], library: str) -> None:
    """Refuse a model with overridden methods.

    Raises:
        ValueError: names the method.
    """
    for name in names:
        if getattr(type(model), name) is not getattr(cls, name) or name in vars(model):
            raise ValueError(
                f"patch: model must use {library}'s {name}, got an overridden one in {type(model).__name__}"
            )


def no_more_parts(name: str, block: nn.Module, known: tuple[str, ...]) -> None:
    """Refuse submodules that a block of the library does not have (adapters).

    Raises:
        ValueError: names the part.
    """
    for part, module in block.named_children():
        if part not in known:
            raise ValueError(f"patch: {name} must have known parts only, got {part} ({type(module).__name__})")
