"""DeepSpeed behind one door: the only file that imports it and knows its insides.

What is private there and needed here: the global norm of the averaged gradients *before* the step
(each ZeRO stage keeps them elsewhere), and the threshold that the step clips to. The versions that
this was tested with are listed; whatever the version, a hook that is missing ends the run at its
start, by name. Everything else goes through DeepSpeed's documented calls.

Stages: 0 leaves the averaged gradients in the parameters; 1 and 2 (DeepSpeedZeroOptimizer) and 3
(DeepSpeedZeroOptimizer_Stage3) in partitions; stage 1 in bf16 with gradients summed in fp32 is
BF16_Optimizer.
"""

from __future__ import annotations

import io
import logging
import math
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.errors import UsageError
from pretrain.partitions import Partitions

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import deepspeed
    import deepspeed.ops
    from deepspeed.runtime import utils as deepspeed_utils
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from deepspeed.utils import logger as deepspeed_logger
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_grad,
        safe_get_local_fp32_param,
    )

# DeepSpeed's business: torch renamed what it calls; a run's log need not say so once a rank.
warnings.filterwarnings("ignore", r".*all_gather_into_tensor.* is deprecated", FutureWarning)

TESTED_VERSIONS = ("0.19.8",)

# The hooks of each kind of optimizer; what they are for is said where they are used.
_HOOKS: dict[type, tuple[str, ...]] = {
    DeepSpeedZeroOptimizer: (
        "scaled_global_norm", "clip_grad", "loss_scale", "check_grad_overflow", "overflow",
    ),
    DeepSpeedZeroOptimizer_Stage3: (
        "_get_norm_groups", "clip_grad", "loss_scale", "overflow", "persistent_parameters",
    ),
    BF16_Optimizer: ("get_grads_for_norm", "clip_grad", "overflow"),
}  # fmt: skip
_PARAMETER_HOOKS = {0: (), 1: ("_hp_mapping",), 2: ("_hp_mapping",), 3: ("ds_tensor", "ds_status")}
_FUNCTIONS = ("combine_grad_norm_groups", "get_global_norm_of_tensors")


def missing_hooks(owner: object, names: Sequence[str]) -> list[str]:
    """Return `OWNER.NAME` of every name that `owner` has not."""
    label = getattr(owner, "__name__", type(owner).__name__)
    return [f"{label}.{name}" for name in names if not hasattr(owner, name)]


def init_distributed(backend: str) -> None:
    """Start torch.distributed as DeepSpeed wants it, without compiling anything."""
    if backend == "gloo":
        # Its shared-memory operator for CPUs takes a minute to compile.
        absent = missing_hooks(deepspeed.ops, ["__compatible_ops__"])
        _refuse(absent)
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed_logger.setLevel(logging.ERROR)
    if deepspeed.__version__ not in TESTED_VERSIONS:
        print(
            f"WARNING: DeepSpeed {deepspeed.__version__} is not among the tested versions "
            f"({', '.join(TESTED_VERSIONS)}); its hooks are checked before the first step.",
            file=sys.stderr,
        )
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def _refuse(absent: Sequence[str]) -> None:
    if absent:
        raise UsageError(
            f"DeepSpeed {deepspeed.__version__} lacks what gradient clipping needs: "
            f"{', '.join(absent)}. Install a tested version: {', '.join(TESTED_VERSIONS)}."
        )


class DeepSpeed:
    """A module and its optimizer under DeepSpeed, at any ZeRO stage."""

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]
    ) -> None:
        """Hand the module over; raise UsageError where this DeepSpeed lacks a hook."""
        self.stage = int(config["zero_optimization"]["stage"])
        with redirect_stdout(io.StringIO()):  # it prints its memory; stdout is for results
            self._engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=config
            )
        self._norm: Tensor | None = None  # scaled, of the step that is under way
        self._kind = next((k for k in _HOOKS if isinstance(self._engine.optimizer, k)), None)
        if (self._kind is None) != (self.stage == 0):
            _refuse([f"a known optimizer at stage {self.stage}"])
        if self._kind is not None:
            _refuse(missing_hooks(self._engine.optimizer, _HOOKS[self._kind]))
        _refuse(missing_hooks(deepspeed_utils, _FUNCTIONS))
        learned = next(p for p in module.parameters() if p.requires_grad)
        _refuse(missing_hooks(learned, _PARAMETER_HOOKS[self.stage]))
        self._learned = [p for p in module.parameters() if p.requires_grad]
        self._averages_alone = self.stage == 0 and dist.get_world_size() == 1
        if self._averages_alone:  # it would copy all gradients there and back
            _refuse(missing_hooks(self._engine, ["enable_backward_allreduce"]))
            self._engine.enable_backward_allreduce = False
        self._measure_once()
        self._gather_scalars()

    def _gather_scalars(self) -> None:
        # At stage 3 small parameters stay whole on every rank, but only once a step has been taken;
        # an objective reads those of its geometry outside of the forward pass, at the first step.
        if self._kind is DeepSpeedZeroOptimizer_Stage3:
            small = self._engine.optimizer.persistent_parameters
            if small:
                small[0].all_gather(small)

    @property
    def module(self) -> nn.Module:
        """The module that was handed over."""
        module: nn.Module = self._engine.module
        return module

    @property
    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The parameter groups, whose `lr` the next step takes."""
        groups: list[dict[str, Any]] = self._engine.optimizer.param_groups
        return groups

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by, in fp16; 1 elsewhere."""
        return float(getattr(self._engine.optimizer, "loss_scale", 1.0))

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Call the module."""
        return self._engine(*inputs, **named)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of a scalar; with `last`, they are averaged over the ranks.

        The boundary is set explicitly before each backward: without it stages 1 and 2 reduce, and
        forget, what earlier backward passes of the step left.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)
        if last and self._averages_alone:  # as where it averages: what has no gradient has zeros
            for parameter in self._learned:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)

    def gradient_norm(self) -> float:
        """Return the norm of the averaged gradients, after the last backward of a step.

        The same number on every rank; inf where any gradient on any rank is not finite.
        """
        optimizer = self._engine.optimizer
        if self._kind is DeepSpeedZeroOptimizer:
            self._norm = self._original_norm()
        elif self._kind is DeepSpeedZeroOptimizer_Stage3:
            self._norm = deepspeed_utils.combine_grad_norm_groups(self._original_norm())
        elif self._kind is BF16_Optimizer:
            gradients, _ = optimizer.get_grads_for_norm()
            self._norm = deepspeed_utils.get_global_norm_of_tensors(input_tensors=gradients)
        else:
            self._norm = torch.nn.utils.get_total_norm(self._own_gradients())
        norm = float(self._norm) / self.loss_scale
        return norm if math.isfinite(norm) and norm >= 0 else math.inf  # -1 is its mark for both

    def _own_gradients(self) -> list[Tensor]:
        return [p.grad for p in self._learned if p.grad is not None]

    def _measure_once(self) -> None:
        # DeepSpeed's step measures the norm itself; it is told the one that was just measured.
        optimizer = self._engine.optimizer
        if self._kind is DeepSpeedZeroOptimizer:
            self._original_norm = original = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = lambda *a: (
                original(*a) if self._norm is None else self._norm
            )
        elif self._kind is DeepSpeedZeroOptimizer_Stage3:
            self._original_norm = groups = optimizer._get_norm_groups
            optimizer._get_norm_groups = lambda: groups() if self._norm is None else [self._norm]

    def step(self, threshold: float | None) -> None:
        """Clip to `threshold` and update the weights; `gradient_norm` was finite."""
        limit = 0.0 if threshold is None else max(threshold, 1e-30)  # 0: no clipping, to DeepSpeed
        if self._kind is None:
            if threshold is not None:
                assert self._norm is not None, "gradient_norm comes first"
                torch.nn.utils.clip_grads_with_norm_(self._learned, limit, self._norm)
        else:
            self._engine.optimizer.clip_grad = limit
        self._engine.step()
        self._norm = None

    def discard(self) -> None:
        """Drop the gradients of a step whose norm is not finite, and leave all else as it is."""
        if self._kind is None:
            self._engine.zero_grad()
        else:
            self._engine.optimizer.clip_grad = 0.0
            if self._kind is DeepSpeedZeroOptimizer:
                self._engine.optimizer.check_grad_overflow = True
            self._engine.step()  # sees it too, drops them, and lowers the loss scale of fp16
            assert self._engine.optimizer.overflow, "a step that is not finite was taken"
            self._gather_scalars()
        self._norm = None

    def full_parameters(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
        """Return a context in which whole parameters can be read at stage 3; a collective call."""
        if self.stage < 3:
            return nullcontext()
        # The small ones are whole already; gathered again, they would be cut up at the end, which
        # the order of fetching that DeepSpeed has recorded does not expect.
        status: Any = ZeroParamStatus.AVAILABLE
        cut: list[Any] = [p for p in parameters if getattr(p, "ds_status", None) != status]
        context: AbstractContextManager[object] = deepspeed.zero.GatheredParameters(cut)
        return context

    def master_weight(self, parameter: nn.Parameter) -> Tensor:
        """Return the fp32 values of a learned parameter, whole; every rank must call it."""
        if self.stage == 0:
            return parameter.detach()
        master: Tensor = safe_get_full_fp32_param(parameter)
        return master

    @torch.no_grad()
    def clamp(self, parameter: nn.Parameter, low: float | None, high: float | None) -> None:
        """Clamp a learned parameter where it lies: each rank its own part, no communication."""
        held: Any = parameter
        parts = [parameter.data]  # empty where it is not gathered
        if self.stage == 3:
            parts += [held.ds_tensor.data, safe_get_local_fp32_param(parameter)]
        elif self.stage > 0 and held._hp_mapping is not None:
            parts.append(held._hp_mapping.get_hp_fragment().data)
        for part in parts:
            part.clamp_(low, high)

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the averaged gradient, whole, between the last backward and the step."""
        gradient: Tensor | None = safe_get_full_grad(parameter)
        return gradient

    def close(self) -> None:
        """Let go of everything; nothing can be called afterwards."""
        self._engine.destroy()

    def partitions(self) -> Partitions:
        """Return what of the model and the optimizer's state lies on this rank."""
        return Partitions(self._engine, self.stage)

    def scaler_state(self) -> dict[str, float]:
        """Return the numbers of fp16's loss scaler; empty in other precisions at stage 0."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        numbers = vars(scaler).items() if scaler is not None else ()
        return {name: value for name, value in numbers if isinstance(value, int | float)}

    def load_scaler_state(self, state: dict[str, float]) -> None:
        """Take back what `scaler_state` returned, where there is a loss scaler."""
        scaler = getattr(self._engine.optimizer, "loss_scaler", None)
        if scaler is not None:
            vars(scaler).update(state)
