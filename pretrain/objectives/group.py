"""The ranks that share a global batch, as an objective sees them: rank, size, differentiable
gather.

The contract (DESIGN section 5): an objective gets the *local* rows of every rank, gathers what it
needs through the group, and returns the mean over its own rows. The gradient of the gather is the
sum over ranks of the gradients of the own rows, so that the average of parameter gradients over
ranks (what DeepSpeed computes) equals the gradient of the one-process loss over the global batch.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Group(Protocol):
    """Ranks with equally many rows each."""

    rank: int
    size: int

    def gather(self, local_bD: Tensor) -> Tensor:
        """Return the rows of all ranks [b * size, D] in rank order, differentiable."""
        ...


class Solo:
    """One process: the global batch is the local one."""

    rank = 0
    size = 1

    def gather(self, local_bD: Tensor) -> Tensor:
        """Return the rows themselves."""
        return local_bD


class World:
    """All ranks of torch.distributed's default group."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def gather(self, local_bD: Tensor) -> Tensor:
        """Gather the rows of all ranks; the backward sums over ranks and keeps the own rows."""
        gathered: Tensor = _Gather.apply(local_bD, self.rank, self.size)  # type: ignore[no-untyped-call]
        return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, local_bD: Tensor, rank: int, size: int) -> Tensor:
        context.rank, context.rows = rank, local_bD.shape[0]
        gathered = local_bD.new_empty((size * local_bD.shape[0], *local_bD.shape[1:]))
        dist.all_gather_into_tensor(gathered, local_bD.contiguous())
        return gathered

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient_BD = gradients[0].contiguous().clone()
        dist.all_reduce(gradient_BD)
        start = context.rank * context.rows
        return gradient_BD[start : start + context.rows], None, None


def world_or_solo() -> Group:
    """Return the group of this process: all ranks where torch.distributed runs with several."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return World()
    return Solo()
