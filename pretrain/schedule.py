"""Learning rate as a function of samples seen."""

from __future__ import annotations

import math


def warmup_cosine(
    samples_seen: int, *, peak: float, batch: int, warmup_samples: int, total_samples: int
) -> float:
    """Return the learning rate of the step that starts at `samples_seen`.

    Linear from peak * batch / warmup to the peak over `warmup_samples`, then half a cosine to zero
    at `total_samples` (open_clip's and FLIP's schedule, with the clock in samples).
    """
    if samples_seen < warmup_samples:
        return peak * min(1.0, (samples_seen + batch) / warmup_samples)
    progress = (samples_seen - warmup_samples) / max(1, total_samples - warmup_samples)
    return peak * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
