"""What is kept of how steady a run is: skipped and clipped steps, spikes of the loss.

A step that is not finite on any rank is skipped on all (engine.py). `max_skipped_steps` of them in
a row mean that skipping does not help: the run then goes back to the checkpoint before them and
past their data (train.py). A loss far above the running mean is a spike: it is written, with the
keys of its batch, to spikes-RANK.jsonl. All numbers here are those of all ranks together, so every
rank comes to the same conclusion, and the state is in the checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.publish import publish_text
from pretrain.config import StabilityConfig

_PATTERN = "spikes-*.jsonl"
_DECAY = 0.99  # of the running mean and variance of the loss
_FIRST_SPIKE = 100  # steps before a spike can be told from the start of a run


class Stability:
    """Counts and running statistics; one `note` a step."""

    def __init__(self, section: StabilityConfig) -> None:
        self._section = section
        self.skipped_steps = 0  # since the run began, rolled back ones included
        self.skipped_in_a_row = 0
        self.clipped_steps = 0  # since the run began
        self._loss_mean = 0.0
        self._loss_variance = 0.0
        self._num_losses = 0

    def note(self, loss: float, *, skipped: bool, clipped: bool) -> bool:
        """Take in the mean loss of a step; return whether the step is one to write down."""
        self.clipped_steps += clipped
        if skipped or not math.isfinite(loss):
            self.skipped_steps += skipped
            self.skipped_in_a_row += skipped
            return True
        self.skipped_in_a_row = 0
        deviation = math.sqrt(self._loss_variance)
        spike = loss > self._loss_mean + self._section.spike_deviations * max(deviation, 1e-12)
        is_one = spike and self._num_losses >= _FIRST_SPIKE
        self._num_losses += 1
        weight = max(1 - _DECAY, 1 / self._num_losses)  # the plain mean at first
        before = self._loss_mean
        self._loss_mean += weight * (loss - before)
        self._loss_variance = (1 - weight) * (self._loss_variance + weight * (loss - before) ** 2)
        return is_one

    @property
    def must_go_back(self) -> bool:
        """Whether so many steps in a row were skipped that skipping does not help."""
        return self.skipped_in_a_row >= self._section.max_skipped_steps

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as JSON has it."""
        return {name: value for name, value in vars(self).items() if name != "_section"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state back."""
        vars(self).update(state)


class SpikeLog:
    """spikes-RANK.jsonl: one line a step that stood out, with the keys of this rank's batch."""

    def __init__(self, folder: Path, *, rank: int) -> None:
        self._path = folder / _PATTERN.replace("*", str(rank))

    def write(
        self, *, samples_seen: int, loss: float, gradient_norm: float, keys: Sequence[str]
    ) -> None:
        """Append a line. `loss` is null where it was not finite, and so is the norm."""
        row = {
            "samples_seen": samples_seen,
            "loss": loss if math.isfinite(loss) else None,
            "gradient_norm": gradient_norm if math.isfinite(gradient_norm) else None,
            "keys": list(keys),
        }
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def drop_spikes_after(folder: Path, samples_seen: int) -> None:
    """Remove the lines of steps that a resumed run will come to again."""
    for path in folder.glob(_PATTERN):
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _samples_of(line) <= samples_seen]
        publish_text(path, "".join(f"{line}\n" for line in kept))


def _samples_of(line: str) -> float:
    try:
        return float(json.loads(line)["samples_seen"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut by a kill
