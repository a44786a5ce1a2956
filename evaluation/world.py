"""Ranks that share the images: started by torchrun or srun, they meet through gloo.

Rank r encodes batches r, r + W, r + 2W, ... of one fixed grid of batches, so that what a batch
holds, and with it every bit of a feature, does not depend on the number of ranks. Rank 0 alone runs
the methods and writes results.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from configs.errors import DataError
from configs.launcher import is_launched

_PATIENCE = timedelta(hours=24)  # rank 0 may search hyperparameters while the others wait


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int = 0
    size: int = 1

    def together(self, error: Exception | None = None) -> None:
        """Wait for all ranks; raise everywhere where one of them has an error."""
        if self.size == 1:
            if error is not None:
                raise error
            return
        reasons: list[str | None] = [None] * self.size
        dist.all_gather_object(reasons, None if error is None else str(error))
        if error is not None:
            raise error
        failed = [(rank, reason) for rank, reason in enumerate(reasons) if reason is not None]
        if failed:
            raise DataError(f"rank {failed[0][0]} stopped: {failed[0][1]}")

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank."""
        if self.size == 1:
            return flag
        flags = [False] * self.size
        dist.all_gather_object(flags, flag)
        return any(flags)


@contextmanager
def joined() -> Iterator[World]:
    """Meet the other ranks that the launcher tells of; alone where it tells of none.

    A half-set launcher environment raises UsageError (configs/launcher.py).
    """
    if not is_launched() or os.environ["WORLD_SIZE"] == "1":
        yield World()
        return
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
