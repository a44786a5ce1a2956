"""Memory of processes: what each would free by ending."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def pss_of(pid: int) -> int:
    """Return the proportional set size of a process in bytes; 0 where it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def workers_below(pid: int) -> list[int]:
    """Return the processes below one that run tasks of Ray."""
    parents: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            parents.setdefault(int(status[1]), []).append(int(folder.name))
    found, below = [], [pid]
    while below:
        below = [child for parent in below for child in parents.get(parent, [])]
        for child in below:
            with suppress(OSError):
                if Path(f"/proc/{child}/cmdline").read_bytes().startswith(b"ray::"):
                    found.append(child)
    return found
