"""The training state between memory and files: a snapshot on the host, and its way back.

A snapshot is what one rank owns of weights, optimizer state and averages, and its random states. It
is taken while training stands still and written while training goes on. Buffers on the host are
made once and used again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.ema import Ema
from pretrain.model.attentive import MeanTower
from pretrain.partitions import Partitions
from pretrain.state_files import Layout, StateReader, state_file, write_state

_NOT_OF_THE_OPTIMIZER = {"weight", "ema", "mean", "random"}


@dataclass
class Snapshot:
    """Copies on the host of what one rank owns."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    layout: Layout = field(default_factory=lambda: Layout({}, {}, {}))

    def take(
        self, partitions: Partitions, ema: Ema | None, mean_tower: MeanTower | None = None
    ) -> None:
        """Copy everything as it is now; the buffers of the last snapshot are used again."""
        wanted: dict[str, tuple[int, Tensor]] = {}
        scalars: dict[str, dict[str, float]] = {}
        optimizer = partitions.optimizer
        for partition in partitions.owned:
            name, start = partition.name, partition.start
            wanted[f"weight/{name}"] = (start, partition.weight_n)
            for key, state_n in partition.state(optimizer).items():
                wanted[f"{key}/{name}"] = (start, state_n)
            if found := partition.scalars(optimizer):
                scalars[name] = found
        if ema is not None:
            wanted |= {f"ema/{name}": found for name, found in ema.tensors().items()}
        if mean_tower is not None:
            wanted |= _own_parts(mean_tower)
        self._copy({key: tensor.detach() for key, (_, tensor) in wanted.items()})
        self.layout = Layout(
            {key: start for key, (start, _) in wanted.items()}, partitions.shapes, scalars
        )
        self.tensors["random/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            self.tensors["random/cuda"] = torch.cuda.get_rng_state()

    def _copy(self, wanted: dict[str, Tensor]) -> None:
        on_device = any(tensor.is_cuda for tensor in wanted.values())
        kept = {}
        for key, tensor in wanted.items():
            buffer = self.tensors.get(key)
            if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
                buffer = torch.empty_like(tensor, device="cpu", pin_memory=on_device)
            kept[key] = buffer.copy_(tensor, non_blocking=on_device)
        if on_device:
            torch.cuda.synchronize()
        self.tensors = kept

    def write(self, folder: Path, rank: int) -> str:
        """Write the file of this rank; return its digest."""
        return write_state(state_file(folder, rank), self.tensors, self.layout)


def _own_parts(mean_tower: MeanTower) -> dict[str, tuple[int, Tensor]]:
    """Return this rank's part of what every rank has: the r-th run of each tensor's elements."""
    rank, size, found = dist.get_rank(), dist.get_world_size(), {}
    for name, average in mean_tower.named_averages().items():
        part = math.ceil(average.numel() / size)
        if rank * part < average.numel():
            found[f"mean/{name}"] = (rank * part, average.view(-1)[rank * part :][:part])
    return found


def load_state(
    folder: Path,
    partitions: Partitions,
    ema: Ema | None,
    rank: int,
    mean_tower: MeanTower | None = None,
) -> bool:
    """Read this rank's part of the state; every rank must call it.

    Returns whether the random states of this rank were there too (not where it is a new rank).
    Raises CheckpointError where the state is of another model.
    """
    reader, optimizer = StateReader(folder), partitions.optimizer
    with torch.no_grad():
        for partition in partitions.held:
            name, size = partition.name, partition.weight_n.numel()
            partition.weight_n.copy_(reader.read("weight", name, partition.start, size))
            keys = sorted(reader.kinds(name) - _NOT_OF_THE_OPTIMIZER)
            partition.prepare(optimizer, keys)
            state = partition.state(optimizer)
            for key in keys if partition.flat is not None else ():
                state[key].copy_(reader.read(key, name, partition.start, size))
            partition.set_scalars(optimizer, reader.scalars.get(name, {}))
    partitions.publish_weights()
    if ema is not None:
        ema.load(reader)
    if mean_tower is not None:
        means = mean_tower.named_averages()
        mean_tower.load({n: reader.read("mean", n, 0, mean.numel()) for n, mean in means.items()})
    random = reader.random(rank)
    if "cpu" in random:
        torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    return "cpu" in random


def whole_weights(folder: Path, *, averaged: bool = False) -> dict[str, Tensor]:
    """Return the weights of a checkpoint's state by parameter name, put together from all ranks.

    `averaged`: the moving average, of what is learned; the rest as it is.
    """
    reader = StateReader(folder)
    means = reader.names("ema") if averaged else set()
    return {
        name: reader.whole("ema" if name in means else "weight", name)
        for name in sorted(reader.names("weight"))
    }
