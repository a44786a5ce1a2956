"""DeepSpeed: construction, one step, its state. The only file that imports it.

One CPU process, several gloo processes, or NCCL: the launcher's environment says which (torchrun
sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); without it this is a run of one
process. Nothing is compiled at start: the optimizer is torch's own, and DeepSpeed's shared-memory
operator for CPU communication (a minute of compiling) is switched off before it is asked for.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.errors import UsageError
from pretrain.config import PretrainConfig
from pretrain.model.clip import ClipModel
from pretrain.model.features import Features
from pretrain.model.geometries import LOG_CURVATURE_LIMITS, Lorentz

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger as deepspeed_logger
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def start_processes(num_threads: int | None) -> torch.device:
    """Join the other ranks (or be the only one), set the threads, and return this rank's device.

    A half-set launcher environment raises UsageError: guessing would hang waiting for peers.
    """
    found = [name for name in _LAUNCHER_VARIABLES if name in os.environ]
    if found and len(found) < len(_LAUNCHER_VARIABLES):
        missing = [name for name in _LAUNCHER_VARIABLES if name not in os.environ]
        raise UsageError(
            f"the launcher's environment is half set: {', '.join(found)} are there, "
            f"{', '.join(missing)} are not. Start with torchrun, or unset them for one process."
        )
    if not found:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ.update(zip(_LAUNCHER_VARIABLES, ("0", "1", "0", "127.0.0.1", port), strict=True))
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed_logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)
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


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split parameters: gains, biases, scalars, class token and positions do not decay (FLIP)."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        excluded = parameter.ndim < 2 or "positional_embedding" in name or "class_embedding" in name
        (plain if excluded else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


class Engine:
    """A ClipModel under DeepSpeed: forward, backward, step, and the state to resume from."""

    def __init__(self, model: ClipModel, config: PretrainConfig, device: torch.device) -> None:
        self.device = device
        self._logit_limits = (config.logit.min_scale, config.logit.max_scale)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, config.optimizer.weight_decay),
            lr=config.optimizer.learning_rate,
            betas=(config.optimizer.beta1, config.optimizer.beta2),
            eps=config.optimizer.eps,
            fused=device.type == "cuda",
        )
        self._engine, *_ = deepspeed.initialize(
            model=model.to(device), optimizer=optimizer, config=_deepspeed_config(config)
        )
        self._zero_stage = config.engine.zero_stage

    @property
    def model(self) -> ClipModel:
        """The wrapped model."""
        model: ClipModel = self._engine.module
        return model

    def forward(self, *inputs: Any, **named: Any) -> Features:
        """Encode the local batch; the arguments are ClipModel.forward's."""
        features: Features = self._engine(*inputs, **named)
        return features

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients and average them over the ranks."""
        self._engine.backward(loss)

    def step(self, learning_rate: float) -> Tensor | float:
        """Clip, update the weights, clamp the logit scale; return the gradient norm before
        clipping.

        The norm stays on the device, so that only a step that logs it waits for it.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._stage_0_norm() if self._zero_stage == 0 else None
        self._engine.step()
        self._clamp_scalars()
        reported: Tensor | float = self._engine.get_global_grad_norm() if norm is None else norm
        return reported

    def _stage_0_norm(self) -> Tensor:
        # At stage 0 in fp32 DeepSpeed reports no norm; its gradients are the parameters' own then.
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _clamp_scalars(self) -> None:
        low, high = self._logit_limits
        clamped = {self.model.clip.logit_scale: (math.log(low) if low else None, math.log(high))}
        if isinstance(self.model.similarity, Lorentz):
            clamped[self.model.similarity.log_curvature] = LOG_CURVATURE_LIMITS
        for scalar, limits in clamped.items():
            if not scalar.requires_grad:
                continue
            if self._zero_stage > 0:  # the master copy is what the next step starts from
                master = safe_get_full_fp32_param(scalar).clamp_(*limits)
                safe_set_full_fp32_param(scalar, master)
            scalar.data.clamp_(*limits)

    def weights(self) -> dict[str, Tensor]:
        """Return the fp32 weights by parameter name; every rank must call it."""
        parameters = dict(self.model.named_parameters())
        if self._zero_stage == 0:
            return {name: parameter.detach() for name, parameter in parameters.items()}
        # What is not learned has no master copy.
        return {
            name: safe_get_full_fp32_param(p) if p.requires_grad else p.detach()
            for name, p in parameters.items()
        }

    def gradients(self) -> dict[str, Tensor]:
        """Return the averaged gradients by parameter name, between backward and step."""
        get = deepspeed.utils.safe_get_full_grad
        return {n: get(p) for n, p in self.model.named_parameters() if p.requires_grad}

    def save(self, folder: Path) -> None:
        """Write the sharded training state into `folder`; every rank must call it."""
        self._engine.save_checkpoint(str(folder), tag="state", save_latest=False)

    def close(self) -> None:
        """Let go of the model and what DeepSpeed holds of it; nothing can be called afterwards."""
        self._engine.destroy()

    def load(self, folder: Path) -> None:
        """Read the training state back; same number of ranks, or ZeRO stage 0."""
        self._engine.load_checkpoint(str(folder), tag="state")


def _deepspeed_config(config: PretrainConfig) -> dict[str, Any]:
    return {
        "train_batch_size": config.global_batch_size,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": config.engine.zero_stage},
        "bf16": {"enabled": config.engine.precision == "bf16"},
        "gradient_clipping": config.optimizer.max_gradient_norm,
        "steps_per_print": 10**9,
    }
