"""What a job was submitted with: the code's revision, packages' versions, variables that matter."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

# By name or beginning. Nothing else: an environment holds tokens and passwords.
_ALLOWED = (
    "CUDA_", "GLOO_", "LOADEDMODULES", "NCCL_", "OMP_NUM_THREADS", "PAIRMILL_", "SBATCH_",
    "SLURM_CLUSTER_NAME", "SLURM_CONF", "TMPDIR", "TORCH_", "VIRTUAL_ENV",
)  # fmt: skip
_SECRET = ("TOKEN", "SECRET", "PASSWORD", "KEY")


def git_revision(folder: Path) -> dict[str, Any] | None:
    """Return the revision of a checkout and whether files in it differ from it; else None."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, check=False
            )
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    revision = git("rev-parse", "HEAD")
    if revision is None:
        return None
    return {"revision": revision, "modified": bool(git("status", "--porcelain"))}


def environment() -> dict[str, str]:
    """Return the variables that may matter to a job."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_ALLOWED) and not any(secret in name for secret in _SECRET)
    }


def provenance() -> dict[str, Any]:
    """Return all of it as plain JSON."""
    installed = {d.name: d.version for d in importlib.metadata.distributions()}
    return {
        "git": git_revision(Path(__file__).resolve().parent),
        "python": platform.python_version(),
        "versions": dict(sorted(installed.items(), key=lambda item: item[0].lower())),
        "environment": environment(),
        "host": platform.node(),
        "folder": os.getcwd(),
    }
