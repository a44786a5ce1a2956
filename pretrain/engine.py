"""The engine: a ClipModel under DeepSpeed. Forward, backward, one step, and the state of them.

One CPU process, several gloo processes, or NCCL: the launcher's environment says which (torchrun
sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); without it this is a run of one
process. Nothing is compiled at start: the optimizer is torch's own. What is private to DeepSpeed
stands in adapter.py, which of the parameters learn how fast in optimizer.py.

A step: forward, backward (accumulation.py has the loop over micro-batches), `step`. Its gradient
norm is known to all ranks before the weights move: a step that is not finite on any rank is skipped
on all, otherwise the clipping gets the norm and says where to clip.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.errors import ConfigError
from configs.launcher import LAUNCHER_VARIABLES, is_launched
from pretrain import adapter
from pretrain.config import EngineConfig, PretrainConfig
from pretrain.model.clip import ClipModel
from pretrain.model.features import Features
from pretrain.model.geometries import LOG_CURVATURE_LIMITS, Lorentz
from pretrain.optimizer import build_optimizer, lock
from pretrain.partitions import Partitions
from pretrain.stability import Stability


def start_processes(num_threads: int | None) -> torch.device:
    """Join the other ranks (or be the only one), set the threads, and return this rank's device.

    A half-set launcher environment raises UsageError (configs/launcher.py).
    """
    if not is_launched():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        alone = ("0", "1", "0", "127.0.0.1", port)
        os.environ.update(zip(LAUNCHER_VARIABLES, alone, strict=True))
    on_gpu = torch.cuda.is_available()
    adapter.init_distributed("nccl" if on_gpu else "gloo")
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    torch.set_num_threads(num_threads or max(1, len(os.sched_getaffinity(0)) // local_ranks))
    if not on_gpu:
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def stop_processes() -> None:
    """Leave the group of ranks at the end of the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


class StepReport(NamedTuple):
    """What a step did. The numbers are the same on every rank."""

    gradient_norm: float  # before clipping; inf where it was not finite
    threshold: float | None  # that of the clipping; None where it had none, or the step is skipped
    skipped: bool  # not finite on some rank: the weights stay, on all

    @property
    def clipped(self) -> bool:
        """Whether the gradients were made smaller."""
        return self.threshold is not None and self.gradient_norm > self.threshold


class Engine:
    """A ClipModel under DeepSpeed: forward, backward, step, and the state to resume from."""

    def __init__(self, model: ClipModel, config: PretrainConfig, device: torch.device) -> None:
        self.device = device
        self.clipping = config.optimizer.clipping.build()
        self.stability = Stability(config.stability)
        self._logit_limits = (config.logit.min_scale, config.logit.max_scale)
        if config.engine.precision == "fp16" and device.type == "cpu":
            raise ConfigError(
                "engine.precision: fp16 needs a GPU, DeepSpeed has none on CPUs; use bf16 or fp32."
            )
        model = prepared(model, config.engine).to(device)
        lock(model, config)
        optimizer = build_optimizer(model, config)
        mean, std = model.mean, model.std
        self._deepspeed = adapter.DeepSpeed(model, optimizer, deepspeed_config(config))
        model.mean, model.std = mean, std  # pixels are normalized in fp32 in every precision
        self.zero_stage = config.engine.zero_stage

    @property
    def model(self) -> ClipModel:
        """The wrapped model."""
        model = self._deepspeed.module
        assert isinstance(model, ClipModel)
        return model

    def forward(self, *inputs: Any, **named: Any) -> Features:
        """Encode local rows; the arguments are ClipModel.forward's."""
        features: Features = self._deepspeed.forward(*inputs, **named)
        return features

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add gradients; the `last` backward of a step averages them over the ranks."""
        self._deepspeed.backward(loss, last=last)

    def step(self, learning_rate: float) -> StepReport:
        """Clip, update the weights, clamp the logit scale; or skip, where not all is finite."""
        for group in self._deepspeed.optimizer_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        norm = self._deepspeed.gradient_norm()
        if not math.isfinite(norm):
            self._deepspeed.discard()
            return StepReport(norm, None, skipped=True)
        threshold = self.clipping.threshold(norm)
        self._deepspeed.step(threshold)
        self._clamp_scalars()
        return StepReport(norm, threshold, skipped=False)

    def _clamp_scalars(self) -> None:
        low, high = self._logit_limits
        log_low = math.log(low) if low else None
        if self.model.clip.logit_scale.requires_grad:
            self._deepspeed.clamp(self.model.clip.logit_scale, log_low, math.log(high))
        similarity = self.model.similarity
        if isinstance(similarity, Lorentz) and similarity.log_curvature.requires_grad:
            self._deepspeed.clamp(similarity.log_curvature, *LOG_CURVATURE_LIMITS)

    def weights(self) -> dict[str, Tensor]:
        """Return the fp32 weights by parameter name; every rank must call it."""
        found = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                found[name] = self._deepspeed.master_weight(parameter)
            else:  # it has no master copy
                with self._deepspeed.full_parameters([parameter]):
                    found[name] = parameter.detach().clone()
        return found

    def full_parameters(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
        """Return a context in which parameters can be read whole; every rank must call it."""
        return self._deepspeed.full_parameters(parameters)

    @cached_property
    def partitions(self) -> Partitions:
        """What of the model and the optimizer's state lies on this rank."""
        return self._deepspeed.partitions()

    def gradients(self) -> dict[str, Tensor]:
        """Return the averaged gradients by parameter name, between the last backward and step.

        Parameters that the loss does not depend on are left out at stages that tell.
        """
        found = {
            name: self._deepspeed.gradient(parameter)
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def extra_state(self) -> dict[str, Any]:
        """Return what DeepSpeed does not know of, as JSON has it; the same on every rank."""
        return {
            "clipping": self.clipping.state_dict(),
            "stability": self.stability.state_dict(),
            "loss_scaler": self._deepspeed.scaler_state(),
        }

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.clipping.load_state_dict(state["clipping"])
        self.stability.load_state_dict(state["stability"])
        self._deepspeed.load_scaler_state(state["loss_scaler"])

    def close(self) -> None:
        """Let go of the model and what DeepSpeed holds of it; nothing can be called afterwards."""
        self._deepspeed.close()


def prepared(model: ClipModel, section: EngineConfig) -> ClipModel:
    """Switch on what trades computation for memory, or start-up time for speed."""
    if section.activation_checkpointing:
        model.clip.set_grad_checkpointing(True)
    if section.compile:
        for tower in (model.clip.visual.transformer, model.clip.transformer):
            for block in tower.resblocks:  # in place: names and state stay; equal blocks share code
                block.compile()
    return model


def deepspeed_config(config: PretrainConfig) -> dict[str, Any]:
    """Return DeepSpeed's JSON: `engine.deepspeed`, and what the other sections decide."""
    section = config.engine
    passed = dict(section.deepspeed)
    bf16, fp16 = ({"enabled": section.precision == p} for p in ("bf16", "fp16"))
    accumulated = {} if section.precision == "fp32" else {"grad_accum_dtype": "fp32"}
    return {
        **passed,
        # Samples are our clock, and accumulation.py sets the boundary: these say nothing.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {**passed.get("zero_optimization", {}), "stage": section.zero_stage},
        "bf16": {**passed.get("bf16", {}), **bf16},
        "fp16": {**passed.get("fp16", {}), **fp16},
        "data_types": {**accumulated, **passed.get("data_types", {})},
        # Its default, 1, would clip silently: the clipping is ours (adapter.py).
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,  # torch's SGD, which it does not list
        "zero_force_ds_cpu_optimizer": False,  # offloaded, torch's fused AdamW is as it is on CPUs
    }
