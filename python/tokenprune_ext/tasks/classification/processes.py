# SPDX-License-Identifier: Apache-2.0
"""The processes that torchrun starts, as far as an evaluation needs them: who am I, and gather plain objects."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta


@dataclass(frozen=True)
class Processes:
    """One of ``world`` processes."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process talks to the user."""
        return self.rank == 0

    def gather(self, value: object) -> list:
        """The value of every process, in the order of their ranks."""
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        values: list = [None] * self.world
        dist.all_gather_object(values, value)
        return values


@contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes of torchrun (gloo: only counts travel); without torchrun there is one."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1 or "RANK" not in os.environ:
        yield Processes()
        return
    import torch.distributed as dist

    # The slowest process may need hours longer than the first to finish.
    dist.init_process_group("gloo", timeout=timedelta(days=1))
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))
    finally:
        dist.destroy_process_group()
