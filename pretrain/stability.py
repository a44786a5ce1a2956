"""What is kept of how steady a run is: skipped and clipped steps, spikes of the loss.

A step that is not finite on any rank is skipped on all (engine.py). `max_skipped_steps` of them in
a row, or any at the end of a stage, mean that skipping does not help: the run then goes back to the
last checkpoint, none being made while steps are skipped, and leaves out the data since (train.py).
A loss far above the running mean is a spike: it is written, with the
keys of its batch, to spikes-RANK.jsonl. All numbers here are those of all ranks together, so every
rank comes to the same conclusion, and the state is in the checkpoint.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import TrainingError
from configs.publish import publish_text
from pretrain.config import StabilityConfig
from pretrain.data.order import positions_of

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
        self.rollbacks = 0
        self.skipped_ranges: list[tuple[int, int]] = []  # positions in the order of data
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

    def must_go_back(self, *, at_end: bool) -> bool:
        """Whether so many steps in a row were skipped that skipping does not help.

        `at_end` of a stage any are too many: what it leaves is to be sound.
        """
        limit = 1 if at_end else self._section.max_skipped_steps
        return self.skipped_in_a_row >= limit

    def check_can_go_back(self, has_checkpoint: bool, samples_seen: int, output: str) -> None:
        """Raise TrainingError where there is no checkpoint, or the run went back too often."""
        limit = self._section.max_rollbacks
        if has_checkpoint and self.rollbacks < limit:
            return
        reason = "the run went back too often" if has_checkpoint else "there is no checkpoint yet"
        raise TrainingError(
            f"training diverged by {samples_seen:,} samples: the last {self.skipped_in_a_row} "
            f"steps were not finite, and {reason} ({self.rollbacks} of stability.max_rollbacks = "
            f"{limit} times). Nothing of it was saved. Their batches are named in "
            f"{output}/{_PATTERN}; lower optimizer.learning_rate or change optimizer.clipping, in "
            "another `output`."
        )

    def position(self, samples_seen: int) -> int:
        """Return the position in the order of data of the next sample."""
        consumed = np.asarray([samples_seen], dtype=np.int64)
        return int(positions_of(consumed, self.skipped_ranges)[0])

    def go_back(self, samples_seen: int, diverged_at: int) -> tuple[int, int]:
        """Leave out the data between two numbers of samples seen; return their positions."""
        left_out = self.position(samples_seen), self.position(diverged_at - 1) + 1
        self.skipped_ranges = [*self.skipped_ranges, left_out]
        self.rollbacks += 1
        self.skipped_in_a_row = 0
        return left_out

    def state_dict(self) -> dict[str, Any]:
        """Return the state, as JSON has it."""
        return {name: value for name, value in vars(self).items() if name != "_section"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state back."""
        vars(self).update(state)
        self.skipped_ranges = [(first, last) for first, last in state["skipped_ranges"]]


class SpikeLog:
    """spikes-RANK.jsonl: one line a step that stood out, with the keys of this rank's batch."""

    def __init__(self, folder: Path, *, rank: int) -> None:
        self._path = folder / _PATTERN.replace("*", str(rank))

    def write(
        self,
        *,
        samples_seen: int,
        position: int,
        loss: float,
        gradient_norm: float,
        keys: Sequence[str],
    ) -> None:
        """Append a line. `position` is that of the global batch's first sample in the order of
        data. `loss` is null where it was not finite, and so is the norm.
        """
        row = {
            "samples_seen": samples_seen,
            "position": position,
            "loss": loss if math.isfinite(loss) else None,
            "gradient_norm": gradient_norm if math.isfinite(gradient_norm) else None,
            "keys": list(keys),
        }
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def drop_spikes_after(folder: Path, position: int) -> None:
    """Remove the lines of batches that a resumed run will come to again."""
    for path in folder.glob(_PATTERN):
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _position(line) < position]
        publish_text(path, "".join(f"{line}\n" for line in kept))


def _position(line: str) -> float:
    try:
        return float(json.loads(line)["position"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut by a kill
