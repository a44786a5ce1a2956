"""Where a gradient is clipped: a threshold of its global norm, from the norms before it.

    norm       plain clipping to max_norm
    zclip      ZClip (arXiv:2504.02507): spikes, found by a z-score against running statistics
    autoclip   AutoClip (arXiv:2007.14469): a percentile of all norms so far
    none       no clipping

The engine asks for the threshold with the norm of the averaged gradients, the same number on every
rank, once a step, and multiplies the gradients by threshold / (norm + 1e-6) where that is below 1.
A norm that is not finite never comes here: such a step is skipped (engine.py). The state is in the
checkpoint. No torch: a configuration is read without it.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Protocol

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from configs.registry import Registry

State = dict[str, Any]  # numbers and lists of them: kept as JSON
Decay = Annotated[float, Field(gt=0, lt=1)]
Percentile = Annotated[float, Field(gt=0, le=100)]


class Clipping(Protocol):
    """A threshold a step; `state_dict` is all that the next threshold depends on."""

    def threshold(self, norm: float) -> float | None:
        """Return the norm to clip to, None for no clipping; `norm` (finite) enters the history."""
        ...

    def state_dict(self) -> State:
        """Return the state, as JSON has it; later steps do not change what was returned."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Take a state back; the next thresholds are those of the run that it came from."""
        ...


clippings: Registry[Clipping] = Registry("clipping")


class Constant:
    """The same threshold at every step."""

    def __init__(self, max_norm: float | None) -> None:
        self.max_norm = max_norm

    def threshold(self, norm: float) -> float | None:
        """Return max_norm."""
        return self.max_norm

    def state_dict(self) -> State:
        """Return nothing: there is no history."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Take nothing."""


class ZClip:
    """ZClip as released (bluorion-com/ZClip), with the clip value as the released code has it.

    With running mean m and variance v of the norms g: z = (g - m) / (sqrt(v) + eps). A step with
    z > z_threshold is clipped to c = factor * (m + z_threshold * sqrt(v) * z_threshold / z), or to
    c = m (`spike: mean`). In `mode: percentile` every step is clipped to
    m + z_threshold * sqrt(v). m and v then take in c where the step was clipped, g elsewhere (the
    variance with the new mean). During the warmup norms are collected; max_norm is a plain limit
    on top, at every step, that m and v do not see.
    """

    def __init__(
        self,
        *,
        alpha: float,
        z_threshold: float,
        warmup_steps: int,
        max_norm: float | None,
        mode: str,
        spike: str,
        factor: float,
        skip_spikes: bool,
        eps: float,
    ) -> None:
        self._alpha, self._z_threshold, self._eps = alpha, z_threshold, eps
        self._warmup_steps, self._max_norm = warmup_steps, max_norm
        self._mode, self._spike, self._factor = mode, spike, factor
        self._skip_spikes = skip_spikes
        self.warmup_norms: list[float] = []
        self.mean: float | None = None  # None during the warmup
        self.variance: float | None = None
        self.last_spike: float | None = None  # clip value of the last step, None where ordinary

    def threshold(self, norm: float) -> float | None:
        """Return the lower of the adaptive threshold and max_norm."""
        self.last_spike = self._spike_threshold(norm)
        limits = [x for x in (self.last_spike, self._max_norm) if x is not None]
        return min(limits, default=None)

    def _spike_threshold(self, norm: float) -> float | None:
        """Take the norm in; return the clip value of a spike, None for an ordinary step."""
        if self.mean is None or self.variance is None:
            self._warm_up(norm)
            return None
        deviation = math.sqrt(self.variance)
        z = (norm - self.mean) / (deviation + self._eps)
        clip = None
        if self._mode == "percentile":
            limit = self.mean + self._z_threshold * deviation
            clip = limit if norm > limit else None
        elif z > self._z_threshold:
            shrunk = self._z_threshold * deviation * (self._z_threshold / z)
            clip = self.mean if self._spike == "mean" else self._factor * (self.mean + shrunk)
        if not (clip is not None and self._skip_spikes):
            self._take_in(norm if clip is None else clip)
        return clip

    def _warm_up(self, norm: float) -> None:
        self.warmup_norms.append(norm)
        if len(self.warmup_norms) >= self._warmup_steps:
            self.mean = float(np.mean(self.warmup_norms))
            self.variance = float(np.var(self.warmup_norms))
            self.warmup_norms = []

    def _take_in(self, norm: float) -> None:
        assert self.mean is not None
        assert self.variance is not None
        a = self._alpha
        self.mean = a * self.mean + (1 - a) * norm
        self.variance = a * self.variance + (1 - a) * (norm - self.mean) ** 2

    def state_dict(self) -> State:
        """Return mean, variance, the norms of an unfinished warmup, and the last clip value."""
        return {
            "mean": self.mean,
            "variance": self.variance,
            "warmup_norms": list(self.warmup_norms),
            "last_spike": self.last_spike,
        }

    def load_state_dict(self, state: State) -> None:
        """Take them back."""
        self.mean, self.variance = state["mean"], state["variance"]
        self.warmup_norms = list(state["warmup_norms"])
        self.last_spike = state["last_spike"]


class AutoClip:
    """The percentile of the norms of the last `window` steps, the present one among them."""

    def __init__(self, percentile: float, window: int) -> None:
        self._percentile, self._window = percentile, window
        self.norms: list[float] = []  # before clipping, oldest first

    def threshold(self, norm: float) -> float | None:
        """Return the percentile, interpolated linearly between norms."""
        self.norms.append(norm)
        del self.norms[: -self._window]
        return float(np.percentile(self.norms, self._percentile))

    def state_dict(self) -> State:
        """Return the norms of the window."""
        return {"norms": list(self.norms)}

    def load_state_dict(self, state: State) -> None:
        """Take them back."""
        self.norms = list(state["norms"])


@clippings.register("none")
def none() -> Clipping:
    """No clipping, as in FLIP and CLIPA."""
    return Constant(None)


@clippings.register("norm")
def norm(*, max_norm: PositiveFloat = 1.0) -> Clipping:
    """Clipping of the global norm (Pascanu et al., arXiv:1211.5063)."""
    return Constant(max_norm)


@clippings.register("zclip")
def zclip(
    *,
    alpha: Decay = 0.97,
    z_threshold: PositiveFloat = 2.5,
    warmup_steps: PositiveInt = 25,
    max_norm: PositiveFloat | None = None,
    mode: Literal["zscore", "percentile"] = "zscore",
    spike: Literal["adaptive_scaling", "mean"] = "adaptive_scaling",
    factor: PositiveFloat = 1.0,
    skip_spikes: bool = False,
    eps: NonNegativeFloat = 1.0e-6,
) -> Clipping:
    """ZClip (arXiv:2504.02507), its constants.

    Its max_norm of 1 is for language models: norms of CLIP at a logit scale of 100 lie above it, so
    that the plain limit alone would act. Here there is none by default.
    """
    return ZClip(
        alpha=alpha,
        z_threshold=z_threshold,
        warmup_steps=warmup_steps,
        max_norm=max_norm,
        mode=mode,
        spike=spike,
        factor=factor,
        skip_spikes=skip_spikes,
        eps=eps,
    )


@clippings.register("autoclip")
def autoclip(*, percentile: Percentile = 10.0, window: PositiveInt = 10_000) -> Clipping:
    """AutoClip (arXiv:2007.14469); its history is unbounded, here it is that of `window` steps."""
    return AutoClip(percentile, window)
