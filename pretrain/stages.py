"""The stages of a run on the clock of samples: where each starts and ends, and its learning rate.

A run without `stages` is one stage. Samples are numbered through the whole run, so that data,
crops and masks are drawn by one clock; the schedule counts from the start of its stage. Each stage
is rounded down to whole batches. Every stage ends with a checkpoint, which is that stage's: what
the next one changes happens after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pretrain.config import PretrainConfig
from pretrain.schedule import Schedule, learning_rate


@dataclass(frozen=True)
class Stage:
    """One stage; `config` is the run's with the changes of the stage merged in."""

    number: int
    name: str
    config: PretrainConfig
    first_step: int
    first_sample: int
    keep_optimizer: bool
    data_since: int  # samples seen when its data began: 0, or the start of a stage

    @property
    def batch(self) -> int:
        """Samples of one step, over all ranks."""
        return self.config.global_batch_size

    @property
    def num_steps(self) -> int:
        """Steps of this stage."""
        return self.config.samples // self.batch

    @property
    def last_step(self) -> int:
        """Finished steps of the run when the stage ends."""
        return self.first_step + self.num_steps

    @property
    def last_sample(self) -> int:
        """Samples seen by the run when the stage ends."""
        return self.first_sample + self.num_steps * self.batch

    def samples_at(self, step: int) -> int:
        """Return the samples seen by the run after `step` finished steps, one of this stage."""
        return self.first_sample + (step - self.first_step) * self.batch

    def skipped(self, num_samples: int | None) -> tuple[tuple[int, int], ...]:
        """Return the positions left out so that a stage with data of its own, a dataset of
        `num_samples`, starts an epoch of it; none where that is not known.
        """
        if not num_samples or self.data_since % num_samples == 0:
            return ()
        epochs = -(-self.data_since // num_samples)
        return ((self.data_since, epochs * num_samples),)

    @cached_property
    def _schedule(self) -> Schedule:
        schedule: Schedule = self.config.optimizer.schedule.build()
        return schedule

    def learning_rate(self, samples_seen: int) -> float:
        """Return the learning rate of the step that starts at `samples_seen` of the run."""
        optimizer = self.config.optimizer
        return learning_rate(
            self._schedule,
            samples_seen - self.first_sample,
            peak=optimizer.learning_rate,
            batch=self.batch,
            warmup=optimizer.warmup_samples,
            total=self.num_steps * self.batch,
        )


@dataclass(frozen=True)
class Stages:
    """All stages of a run, in order."""

    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, config: PretrainConfig) -> Stages:
        """Lay out the stages of a configuration."""
        if not config.stages:
            return cls((Stage(0, "", config, 0, 0, False, 0),))
        stages: list[Stage] = []
        for number, section in enumerate(config.stages):
            step, sample = (stages[-1].last_step, stages[-1].last_sample) if stages else (0, 0)
            in_stage = config.in_stage(number)
            since = sample
            if stages and _places(stages[-1].config) == _places(in_stage):
                since = stages[-1].data_since
            stages.append(
                Stage(
                    *(number, section.name, in_stage, step, sample),
                    keep_optimizer=section.keep_optimizer,
                    data_since=since,
                )
            )
        return cls(tuple(stages))

    def at(self, step: int) -> Stage:
        """Return the stage that `step` finished steps end in: at a boundary the earlier one."""
        return next((s for s in self.stages if step <= s.last_step), self.stages[-1])

    def after(self, stage: Stage) -> Stage | None:
        """Return the next stage, None after the last."""
        return self.stages[stage.number + 1] if stage.number + 1 < len(self.stages) else None

    @property
    def num_steps(self) -> int:
        """Steps of the run."""
        return self.stages[-1].last_step

    @property
    def num_samples(self) -> int:
        """Samples seen at the end of the run."""
        return self.stages[-1].last_sample


def _places(config: PretrainConfig) -> object:
    data = config.data
    return data.manifest, data.mixture, data.urls
