"""Averaged weights: an exponential moving average of the fp32 master weights, sharded over ranks.

    average <- average * d + weight * (1 - d),   d = 0.5 ** (batch / half_life), after each step

The horizon is in samples, so that it does not change with the batch. Each rank averages what it
owns; the average is saved by name and cut anew when a run goes on with other ranks or another
ZeRO stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.partitions import Partitions
from pretrain.state_files import StateReader


class Ema:
    """This rank's part of the average."""

    def __init__(
        self,
        partitions: Partitions,
        half_life_samples: int,
        averages: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Start at the weights as they are, or at whole `averages` by parameter name."""
        self._half_life = half_life_samples
        self._partitions = partitions
        self._owned = partitions.learned
        self._weights = [partition.weight_n for partition in self._owned]
        self._averages = [weight_n.clone() for weight_n in self._weights]
        for partition, average_n in zip(self._owned, self._averages, strict=True):
            if averages is not None:
                start = partition.start
                whole = averages[partition.name].view(-1)
                average_n.copy_(whole[start : start + average_n.numel()])

    @torch.no_grad()
    def update(self, num_samples: int) -> None:
        """Move the average towards the weights after a step of `num_samples` over all ranks."""
        if self._weights:
            decay = 0.5 ** (num_samples / self._half_life)
            torch._foreach_lerp_(self._averages, self._weights, 1.0 - decay)

    def tensors(self) -> dict[str, tuple[int, Tensor]]:
        """Return by name the first element and the elements that this rank has the average of."""
        return {
            partition.name: (partition.start, average_n)
            for partition, average_n in zip(self._owned, self._averages, strict=True)
        }

    def whole(self) -> dict[str, Tensor]:
        """Return the averages by parameter name, whole, on the host; every rank must call it."""
        mine = self.tensors()
        found = {}
        for name, learned in self._partitions.parameters.items():
            shape = self._partitions.shapes[name]
            if not learned:
                continue
            whole = torch.zeros(math.prod(shape), device=self._partitions.device)
            if name in mine:
                start, average_n = mine[name]
                whole[start : start + average_n.numel()] = average_n
            dist.all_reduce(whole)
            found[name] = whole.view(shape).cpu()
        return found

    def load(self, reader: StateReader) -> None:
        """Take this rank's part of a saved average."""
        for partition, average_n in zip(self._owned, self._averages, strict=True):
            saved_n = reader.read("ema", partition.name, partition.start, average_n.numel())
            average_n.copy_(saved_n)
