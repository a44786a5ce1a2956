"""The ranks that share a global batch, as an objective sees them: rank, size, differentiable
gather and ring.

The contract (DESIGN section 5): an objective gets the *local* rows of every rank, gets what it
needs of the others through the group, and returns the mean over its own rows. The gradient of a
gather is the sum over ranks of the gradients of the own rows, so that the average of parameter
gradients over ranks (what DeepSpeed computes) equals the gradient of the one-process loss over the
global batch. Every rank must make the same calls in the same order.

Legend: b local rows, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
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

    def ring(self, local_bD: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield each rank and its rows [b, D], the own first; one block is held at a time.

        Differentiable: the gradients travel back around the ring.
        """
        ...


class Solo:
    """One process: the global batch is the local one."""

    rank = 0
    size = 1

    def gather(self, local_bD: Tensor) -> Tensor:
        """Return the rows themselves."""
        return local_bD

    def ring(self, local_bD: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the own rows."""
        yield 0, local_bD


class World:
    """All ranks of torch.distributed's default group."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def gather(self, local_bD: Tensor) -> Tensor:
        """Gather the rows of all ranks; the backward sums over ranks and keeps the own rows."""
        gathered: Tensor = _Gather.apply(local_bD, self.rank, self.size)  # type: ignore[no-untyped-call]
        return gathered

    def ring(self, local_bD: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the blocks as they arrive from the rank before this one."""
        block_bD = local_bD
        for hop in range(self.size):
            yield (self.rank - hop) % self.size, block_bD
            if hop < self.size - 1:
                block_bD = _Hop.apply(block_bD, self.rank, self.size)  # type: ignore[no-untyped-call]


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


class _Hop(torch.autograd.Function):
    """Every rank hands its block to the next one; the gradient goes back to where it came from."""

    @staticmethod
    def forward(context: Any, block_bD: Tensor, rank: int, size: int) -> Tensor:
        context.rank, context.size = rank, size
        return _exchange(block_bD, to=(rank + 1) % size, source=(rank - 1) % size)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        rank, size = context.rank, context.size
        back = _exchange(gradients[0], to=(rank - 1) % size, source=(rank + 1) % size)
        return back, None, None


def _exchange(block_bD: Tensor, *, to: int, source: int) -> Tensor:
    received = torch.empty_like(block_bD, memory_format=torch.contiguous_format)
    transfers = [
        dist.P2POp(dist.isend, block_bD.contiguous(), to),
        dist.P2POp(dist.irecv, received, source),
    ]
    for request in dist.batch_isend_irecv(transfers):
        request.wait()
    return received


def world_or_solo() -> Group:
    """Return the group of this process: all ranks where torch.distributed runs with several."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return World()
    return Solo()
