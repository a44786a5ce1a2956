"""What differs from site to site, in one small YAML: accounts, partitions, modules, containers.

    PAIRMILL_SITE=FILE, else ~/.config/pairmill/site.yaml; without one sbatch's own defaults hold.

`configs/slurm/site_example.yaml` shows every key.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from configs.load import load_config
from configs.registry import Config, Tagged, Variant
from slurm.containers import Container, containers

Kind = Literal["curate", "pretrain", "evaluate"]
Flags = dict[str, str | int | bool]


class SiteConfig(Config):
    """One site. Flags of sbatch by their long names: `gpus-per-node: 8` is --gpus-per-node=8."""

    sbatch: Flags = Field(default_factory=dict)  # for every job
    curate: Flags = Field(default_factory=dict)  # and for each kind, over those
    pretrain: Flags = Field(default_factory=dict)
    evaluate: Flags = Field(default_factory=dict)
    setup: tuple[str, ...] = ()  # lines of shell that a job runs first: `module load cuda`
    python: str | None = None  # on the nodes; the one that submits by default
    processes_per_node: Annotated[int, Field(ge=1)] | None = None  # its GPUs, or 1
    max_requeues: Annotated[int, Field(ge=0)] = 100
    environment: dict[str, str] = Field(default_factory=dict)  # NCCL_SOCKET_IFNAME: ib0
    container: Annotated[Variant, Tagged(containers)] | None = None

    @field_validator("sbatch", "curate", "pretrain", "evaluate")
    @classmethod
    def _long_names(cls, flags: Flags) -> Flags:
        wrong = [name for name in flags if name.startswith("-") or len(name) < 2]
        if wrong:
            raise ValueError(f"flags go by their long names without dashes, got {', '.join(wrong)}")
        return flags

    def flags(self, kind: Kind) -> list[str]:
        """Return the site's flags for a kind of job."""
        return flag_words({**self.sbatch, **getattr(self, kind)})

    def variables(self) -> dict[str, str]:
        """Return what the scripts read from the environment (slurm/job.sh)."""
        container: Container = self.container.build() if self.container else Container()
        found = {
            "PAIRMILL_PYTHON": self.python,
            "PAIRMILL_PROCESSES_PER_NODE": self.processes_per_node,
            "PAIRMILL_MAX_REQUEUES": self.max_requeues,
            "PAIRMILL_SRUN": " ".join(container.srun),
            "PAIRMILL_PREFIX": " ".join(container.prefix),
        }
        known = {name: str(value) for name, value in found.items() if value not in (None, "")}
        return {**known, **self.environment}


def flag_words(flags: Mapping[str, str | int | bool]) -> list[str]:
    """Write flags as sbatch takes them; true is a flag without value, false is left out."""
    words = []
    for name, value in flags.items():
        if value is True:
            words.append(f"--{name}")
        elif value is not False:
            words.append(f"--{name}={value}")
    return words


def find_site() -> Path | None:
    """Return the site's file: PAIRMILL_SITE, else that of the user, else None."""
    named = os.environ.get("PAIRMILL_SITE")
    if named:
        return Path(named)
    own = Path.home() / ".config/pairmill/site.yaml"
    return own if own.is_file() else None


def load_site() -> SiteConfig:
    """Load the site's file; a ConfigError names what is wrong in it. Without one: the defaults."""
    path = find_site()
    return SiteConfig() if path is None else load_config(path, SiteConfig)
