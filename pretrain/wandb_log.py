"""Weights & Biases: the rows of metrics.jsonl in a run of theirs, by the extra `pairmill[wandb]`.

    telemetry: {wandb: {project: pairmill}}        # mode: offline writes to OUTPUT/wandb alone

One id a run folder (OUTPUT/wandb_id): a run that is continued goes on in the same run of theirs,
and a run that was cut off writes the rows since its checkpoint again, at the same samples_seen with
the same values. One call a row. Whatever goes wrong there is said once, and training goes on:
metrics.jsonl has it all.
"""

from __future__ import annotations

import importlib.util
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.publish import publish_text
from pretrain.config import WandbConfig


def check_wandb(section: WandbConfig | None) -> None:
    """Raise ConfigError where W&B is asked for and not installed."""
    if section is not None and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            "telemetry.wandb: the wandb package is not installed: pip install 'pairmill[wandb]', "
            "or leave telemetry.wandb out (metrics.jsonl and TensorBoard need nothing)."
        )


class WandbLog:
    """A run of W&B, on rank 0."""

    def __init__(
        self, folder: Path, name: str, config: Mapping[str, Any], section: WandbConfig
    ) -> None:
        """Open the run of a run folder, or go on with it."""
        import wandb

        path = folder / "wandb_id"
        if not path.exists():
            publish_text(path, uuid.uuid4().hex[:16] + "\n")
        quiet = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False)
        self._failed = False
        self._run: Any = None
        try:
            self._run = wandb.init(
                project=section.project,
                entity=section.entity,
                mode=section.mode,
                id=path.read_text(encoding="utf-8").strip(),
                resume="allow",
                name=name,
                config=dict(config),
                dir=str(folder),
                settings=quiet,
            )
            self._run.define_metric("samples_seen")
            self._run.define_metric("*", step_metric="samples_seen")
        except Exception as error:
            self._give_up(error)

    def log(self, row: Mapping[str, float | None]) -> None:
        """Write one row."""
        if self._failed:
            return
        try:
            self._run.log({name: value for name, value in row.items() if value is not None})
        except Exception as error:
            self._give_up(error)

    def close(self) -> None:
        """Hand over what is left and close the run."""
        if self._failed:
            return
        try:
            self._run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._failed = True
        print(
            f"WARNING: W&B gets no more rows: {type(error).__name__}: {error}. Training goes on; "
            "metrics.jsonl has every row.",
            file=sys.stderr,
            flush=True,
        )
