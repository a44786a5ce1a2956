"""Learning rate schedules: pure functions of the samples that a stage has seen.

    schedule: {name: cosine}                                       open_clip, FLIP, CLIPA
    schedule: {name: cosine_restarts, cycles: 10}                  CLOOB's CC3M recipe
    schedule: {name: constant, cooldown_samples: 12_800_000}       open_clip's const-cooldown
    schedule: {name: rsqrt, timescale_samples: 10_000_000}         big_vision

Every one follows a linear warmup. A new one is a factory here: keywords in, a function of the
samples since the warmup and the samples between warmup and end out, which gives a share of the
peak.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from configs.registry import Registry

Schedule = Callable[[int, int], float]
Share = Annotated[float, Field(ge=0, le=1)]
Cycles = Annotated[int, Field(ge=1)]
Samples = Annotated[int, Field(ge=0)]
Timescale = Annotated[int, Field(gt=0)]
Power = Annotated[float, Field(gt=0)]

schedules: Registry[Schedule] = Registry("schedule")


def learning_rate(
    schedule: Schedule, samples_seen: int, *, peak: float, batch: int, warmup: int, total: int
) -> float:
    """Return the learning rate of the step that starts at `samples_seen` of a stage.

    It rises linearly from peak * batch / warmup to the peak over `warmup` samples, as open_clip's
    (peak * (step + 1) / warmup_steps), then follows the schedule to `total` samples.
    """
    if samples_seen < warmup:
        return peak * min(1.0, (samples_seen + batch) / warmup)
    return peak * schedule(samples_seen - warmup, max(1, total - warmup))


@schedules.register("cosine")
def cosine(*, final_fraction: Share = 0.0) -> Schedule:
    """Half a cosine from the peak to `final_fraction` of it (SGDR, arXiv:1608.03983, one cycle)."""
    return lambda seen, total: _half_cosine(seen / total, final_fraction)


@schedules.register("cosine_restarts")
def cosine_restarts(*, cycles: Cycles = 10, final_fraction: Share = 0.0) -> Schedule:
    """`cycles` half cosines of equal length, each from the peak (SGDR; CLOOB, arXiv:2110.11316)."""

    def share(seen: int, total: int) -> float:
        if seen >= total:
            return final_fraction
        return _half_cosine(cycles * seen % total / total, final_fraction)

    return share


@schedules.register("constant")
def constant(
    *, cooldown_samples: Samples = 0, power: Power = 1.0, final_fraction: Share = 0.0
) -> Schedule:
    """The peak, then over the last `cooldown_samples` down to `final_fraction` of it.

    The way down is (share of the cooldown that is left)^power, as open_clip's const-cooldown.
    """

    def share(seen: int, total: int) -> float:
        left = max(0, total - seen)
        if left >= cooldown_samples:
            return 1.0
        return final_fraction + (1.0 - final_fraction) * math.pow(left / cooldown_samples, power)

    return share


@schedules.register("rsqrt")
def rsqrt(*, timescale_samples: Timescale, cooldown_samples: Samples = 0) -> Schedule:
    """1 / sqrt(1 + samples / timescale), times a linear cooldown to 0 (big_vision's `rsqrt`).

    It does not depend on the budget but for the cooldown, so that a run can be made longer
    (Zhai et al., arXiv:2106.04560).
    """

    def share(seen: int, total: int) -> float:
        cooled = min(1.0, max(0, total - seen) / cooldown_samples) if cooldown_samples else 1.0
        return cooled / math.sqrt(1.0 + seen / timescale_samples)

    return share


def _half_cosine(progress: float, final_fraction: float) -> float:
    share = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return final_fraction + (1.0 - final_fraction) * share
