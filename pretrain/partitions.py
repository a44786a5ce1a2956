"""What of the model and the optimizer's state lies on this rank, by parameter name.

A partition is a run of elements of one flattened parameter: its fp32 master weights and, beside
them, the optimizer's element-wise state, as views. Written by name and start, the state of a run
does not depend on the ZeRO stage or the number of ranks that wrote it (checkpoints, EMA weights).

    stage 0     every rank holds everything; rank r owns the r-th part of each parameter
    stage 1, 2  DeepSpeed cuts each group of parameters, flattened, into one part a rank
    stage 3     DeepSpeed cuts each parameter into one part a rank, the last ones padded

These are private attributes of DeepSpeed; `Partitions` names the missing one where a version has
not got it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.errors import TrainingError


@dataclass(frozen=True)
class Partition:
    """Elements [start, start + n) of the flattened parameter `name`."""

    name: str
    start: int
    weight_n: Tensor  # fp32 master weights; of what is not learned, the weights themselves
    flat: Tensor | None = None  # what the optimizer calls its parameter; None: not learned
    offset: int = 0  # of the first element in `flat`

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Return the optimizer's element-wise state [n] by its own names; empty before a step."""
        return {
            key: value.view(-1)[self.offset : self.offset + self.weight_n.numel()]
            for key, value in self._state(optimizer).items()
            if self.flat is not None and _is_elementwise(value, self.flat)
        }

    def scalars(self, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Return the rest of the optimizer's state, such as Adam's `step`."""
        return {
            key: float(value)
            for key, value in self._state(optimizer).items()
            if self.flat is not None and not _is_elementwise(value, self.flat)
        }

    def prepare(self, optimizer: torch.optim.Optimizer, keys: Iterable[str]) -> None:
        """Make the element-wise state `keys` where the optimizer has taken no step yet."""
        if self.flat is None:
            return
        state = optimizer.state[self.flat]
        for key in keys:
            if key not in state:
                state[key] = torch.zeros_like(self.flat, requires_grad=False)

    def set_scalars(self, optimizer: torch.optim.Optimizer, scalars: dict[str, float]) -> None:
        """Set what `scalars` returned, as torch's optimizers keep it."""
        if self.flat is None:
            return
        # Alike in all groups, which hold no parameters between steps at stage 3.
        on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
        device = self.flat.device if on_device else torch.device("cpu")
        for key, value in scalars.items():
            optimizer.state[self.flat][key] = torch.tensor(
                value, dtype=torch.float32, device=device
            )

    def _state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {} if self.flat is None else optimizer.state.get(self.flat, {})


def _is_elementwise(value: Any, flat: Tensor) -> bool:
    return torch.is_tensor(value) and value.dim() > 0 and value.numel() == flat.numel()


class Partitions:
    """The partitions of a DeepSpeed engine on this rank."""

    def __init__(self, engine: Any, zero_stage: int) -> None:
        """Find them. Raises TrainingError where DeepSpeed is not as it was."""
        self._zero = engine.optimizer
        self._stage = zero_stage
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        module: nn.Module = engine.module
        self._buffers = dict(_persistent_buffers(module))
        self.device: torch.device = engine.device
        self.parameters: dict[str, bool] = {}  # whether each is learned
        self.shapes: dict[str, list[int]] = {}
        self.owned: list[Partition] = []  # over all ranks, every element once
        self.held: list[Partition] = []  # every element that this rank keeps a copy of
        self.optimizer: torch.optim.Optimizer = getattr(self._zero, "optimizer", self._zero)
        try:
            for name, parameter in module.named_parameters():
                self.parameters[name] = parameter.requires_grad
                self.shapes[name] = list(getattr(parameter, "ds_shape", parameter.shape))
                self._find(name, parameter)
        except AttributeError as error:
            raise TrainingError(
                f"this version of DeepSpeed is not known here: {error}. Install the one that "
                "constraints.txt pins."
            ) from error
        for name, buffer in self._buffers.items():  # the same on every rank
            self.shapes[name] = list(buffer.shape)
            whole = Partition(name, 0, buffer.data.view(-1))
            self.held.append(whole)
            if self._rank == 0:
                self.owned.append(whole)

    @property
    def learned(self) -> list[Partition]:
        """What this rank owns of the parameters that are learned."""
        return [partition for partition in self.owned if partition.flat is not None]

    def _find(self, name: str, parameter: nn.Parameter) -> None:
        if self._stage == 0 or (self._stage < 3 and not parameter.requires_grad):
            flat = parameter if parameter.requires_grad else None
            whole = parameter.data.view(-1)
            self.held.append(Partition(name, 0, whole, flat))
            part = math.ceil(whole.numel() / self._size)
            self._own(name, self._rank * part, whole[self._rank * part :][:part], flat)
        elif self._stage < 3:
            found = self._zero_1_or_2(name, parameter)
            self.owned += found
            self.held += found
        else:
            partition = self._zero_3(name, parameter)
            self.owned += [partition] if partition.weight_n.numel() else []
            self.held += [partition] if partition.weight_n.numel() else []

    def _own(self, name: str, start: int, weight_n: Tensor, flat: Tensor | None) -> None:
        if weight_n.numel():
            self.owned.append(Partition(name, start, weight_n, flat, start))

    def _zero_1_or_2(self, name: str, parameter: Any) -> list[Partition]:
        mapping = parameter._hp_mapping
        if mapping is None:
            return []  # all of it lies on other ranks
        flats = getattr(self._zero, "single_partition_of_fp32_groups", None)
        if flats is None:  # DeepSpeed's optimizer for bf16 with fp32 gradients at stage 1
            flats = self._zero.fp32_groups_flat_partition
        start, count = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        offset = mapping.hp_fragment_address.start
        flat = flats[mapping.param_group_index]
        return [Partition(name, start, flat.data[offset : offset + count], flat, offset)]

    def _zero_3(self, name: str, parameter: Any) -> Partition:
        count = parameter.ds_tensor.ds_numel
        start = self._rank * count
        count = max(0, min(count, parameter.ds_numel - start))  # less the padding
        if not parameter.requires_grad:
            return Partition(name, start, parameter.ds_tensor.data.view(-1)[:count])
        zero = self._zero
        group, offset, _ = zero.grad_position[zero.get_param_id(parameter)]
        flat = zero.fp32_partitioned_groups_flat[group]
        return Partition(name, start, flat.data[offset : offset + count], flat, offset)

    def publish_weights(self) -> None:
        """Give the model the master weights; every rank must call it after they have been set."""
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            zero = self._zero
            with torch.no_grad():
                for group in range(len(zero.fp32_partitioned_groups_flat)):
                    zero._reassign_or_swap_out_partitioned_parameters(group)
            if zero.persistent_parameters:
                zero.persistent_parameters[0].partition(zero.persistent_parameters)
            zero.checkpoint_event_epilogue()


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    written = module.state_dict().keys()
    return ((name, buffer) for name, buffer in module.named_buffers() if name in written)
