"""Is the data or the model the limit? A few seconds of each alone, on this machine.

The data are measured with the run's own workers, batches and transforms, as one rank would see
them; the model where there is a device, with a batch that is already there.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch

from configs.errors import PairmillError
from pretrain.build import Batches, build_dataset, build_model, open_batches
from pretrain.config import PretrainConfig
from pretrain.data.batch import Batch
from pretrain.data.dataset import Sources
from pretrain.data.streaming import Stream
from pretrain.inputs import forward_inputs
from pretrain.model.attentive import MeanTower
from pretrain.model.clip import ClipModel, Json
from pretrain.objectives.group import Solo
from pretrain.reduction.image import AttentivePatches
from pretrain.run_tokenizer import count_tokens, make_tokenizer, with_tokenizer
from pretrain.teacher import Teacher

_NUM_CAPTIONS = 10_000  # for a stand-in of the run's vocabulary
_ENDLESS = 1 << 40  # samples: epochs follow each other


@dataclass(frozen=True)
class Throughput:
    """Samples a second of one rank; `model` is None where there is no device."""

    data: float
    model: float | None
    num_workers: int
    num_cores: int
    ranks_a_node: int

    def advice(self) -> str:
        """Say which side is the limit and what to change."""
        measured = f"data alone {self.data:,.0f} samples/s ({_count(self.num_workers, 'worker')})"
        if self.model is None:
            return (
                f"{measured} a rank, model not measured: no device here. The data are the limit "
                f"for a model faster than that; {self._more_data(None)}"
            )
        measured += f", model alone {self.model:,.0f} samples/s a rank"
        if self.data < self.model:
            return f"{measured}: the data are the limit: {self._more_data(self.model)}"
        return (
            f"{measured}: the model is the limit, with data for {self.data / self.model:.1f} times "
            "its speed. A larger local batch, bf16 or a stronger reduction make it faster."
        )

    def _more_data(self, wanted: float | None) -> str:
        cores = max(1, self.num_cores // self.ranks_a_node)
        share = self.data / max(1, self.num_workers)
        if self.num_workers < cores:
            needed = cores if wanted is None else min(cores, int(wanted / share) + 1)
            said = f"raise data.num_workers from {self.num_workers} to {needed}"
            if wanted is not None and needed * share < wanted:
                said += f" (all that {_count(self.num_cores, 'core')} give) and use smaller images"
            return f"{said}."
        return (
            f"all {_count(self.num_cores, 'core')} are used: store smaller images (about twice the "
            "training size decodes fastest), train at fewer pixels, or add cores."
        )


def measure(
    config: PretrainConfig, data: Sources | Stream, model_config: Json, *, seconds: float
) -> Throughput:
    """Run the loader alone, then the model alone, for some `seconds` each.

    Raises the PairmillError that making a batch ends with.
    """
    few = min(_NUM_CAPTIONS, config.tokenizer.num_captions)
    section = config.tokenizer.model_copy(update={"num_captions": few})
    tokenizer = make_tokenizer(section, data, model_config["text_cfg"]["context_length"])
    if config.text_reduction.name == "frequency":
        tokenizer.token_counts = count_tokens(section, data, tokenizer)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    teacher, on_device = None, torch.cuda.is_available()
    with torch.random.fork_rng(), torch.device("cpu" if on_device else "meta"):
        if config.teacher is not None and on_device:
            teacher = Teacher(config.teacher.checkpoint)
        model = build_model(config, with_tokenizer(model_config, tokenizer), teacher)
    dataset = build_dataset(config, data, tokenizer, model, rank=0, world_size=world_size)
    num_workers = config.data.num_workers
    source = open_batches(dataset, first=0, last=_ENDLESS, num_workers=num_workers)
    rate, batch = _rate_of_data(source, seconds, num_workers)
    return Throughput(
        data=rate,
        model=_rate_of_model(config, model, teacher, batch, seconds) if on_device else None,
        num_workers=num_workers,
        num_cores=len(os.sched_getaffinity(0)),
        ranks_a_node=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    )


def _rate_of_data(source: Batches, seconds: float, num_workers: int) -> tuple[float, Batch]:
    """Return samples a second after the workers have started, and a batch."""
    for _ in range(1 + 5 * num_workers):  # the workers start; what they made before we looked
        batch = _next(source)
    start, samples = time.perf_counter(), 0
    while samples == 0 or time.perf_counter() - start < seconds:
        batch = _next(source)
        samples += len(batch.key)
    return samples / (time.perf_counter() - start), batch


def _next(source: Batches) -> Batch:
    batch = next(source)
    if isinstance(batch, PairmillError):
        raise batch
    return batch


def _rate_of_model(
    config: PretrainConfig, model: ClipModel, teacher: Teacher | None, batch: Batch, seconds: float
) -> float:
    """Return samples a second of forward, loss and backward on the device, one rank's batch."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    half = config.engine.precision == "bf16"
    mean_tower, reduction = None, config.reduction.build()
    if isinstance(reduction, AttentivePatches):
        mean_tower = MeanTower(model, reduction, config.engine.precision).to(device)
    model = model.to(device, torch.bfloat16 if half else torch.float32).train()
    objective = config.total
    teacher = None if teacher is None else teacher.to(device)

    def step() -> None:
        features = model(**forward_inputs(batch, objective, model, teacher, mean_tower))
        loss = objective(features, similarity=model.similarity, group=Solo()).loss
        loss.backward()  # type: ignore[no-untyped-call]
        model.zero_grad(set_to_none=True)

    step()
    torch.cuda.synchronize()
    start, samples = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        step()
        torch.cuda.synchronize()
        samples += len(batch.key)
    return samples / (time.perf_counter() - start)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
