"""One process at a time trains into a run folder."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from configs.errors import UsageError
from pretrain.config import PretrainConfig
from pretrain.ranks import on_first_rank


def lock_folder(folder: Path) -> IO[str]:
    """Return the open lock file of a run folder; UsageError where another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "w", encoding="utf-8")  # noqa: SIM115 (held as long as the run)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UsageError(
            f"another process is training into {folder}. Wait for it, stop it, or choose another "
            "`output`."
        ) from None
    return lock


def lock_run(config: PretrainConfig) -> IO[str] | None:
    """Lock the run folder, before anything in it is looked at; the lock is with rank 0."""
    lock: list[IO[str]] = []  # an open file does not travel to the other ranks
    on_first_rank(lambda: lock.append(lock_folder(Path(config.output))))
    return lock[0] if lock else None
