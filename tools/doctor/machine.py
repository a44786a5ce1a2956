"""Processors, memory, open files, disks."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import resource
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from tools.doctor.findings import Finding, note, ok, problem

_WANTED_FILES = 4_096
_WANTED_SHARED_GB = 1.0
_WANTED_FREE_GB = 5.0
_SLOW_MB_PER_SECOND = 100.0
_PROBE_BYTES = 64 * 2**20
_CGROUP = Path("/sys/fs/cgroup")


def check_processors() -> Iterator[Finding]:
    """Look at how many CPUs and how much memory this process may use."""
    usable, there = len(os.sched_getaffinity(0)), os.cpu_count() or 1
    quota = _cgroup_cpus()
    shown = f"{usable} CPUs" + (f" of {there}" if usable != there else "")
    if quota is not None and quota < usable:
        yield note(
            "cpu",
            f"{shown}, but the container may use {quota:.1f} of them at once",
            f"set engine.num_threads and OMP_NUM_THREADS to {max(1, int(quota))}",
        )
    else:
        yield ok("cpu", shown)
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _number(_CGROUP / "memory.max")
    yield ok("memory", f"{min(pages, limit or pages) / 2**30:.1f} GiB")


def _cgroup_cpus() -> float | None:
    try:
        quota, period = (_CGROUP / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def check_limits() -> Iterator[Finding]:
    """Look at the limit of open files and at shared memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = f"{soft:,} may be open at once"
    if soft < _WANTED_FILES:
        at_most = f"{hard:,}" if hard != resource.RLIM_INFINITY else "no limit"
        yield note(
            "open files",
            f"{shown} (hard limit {at_most})",
            f"ulimit -n {_WANTED_FILES * 16}: Ray and data workers open hundreds each",
        )
    else:
        yield ok("open files", shown)
    shared = Path("/dev/shm")
    free = shutil.disk_usage(shared).free / 1e9 if shared.exists() else 0.0
    if free < _WANTED_SHARED_GB:
        yield problem(
            "shared memory",
            f"/dev/shm has {free:.2f} GB free",
            "in a container: --shm-size=8g, or --ipc=host; batches travel through it",
        )
    else:
        yield ok("shared memory", f"/dev/shm has {free:.1f} GB free")


def _answer(pipe: multiprocessing.connection.Connection) -> None:
    pipe.send(os.getpid())


def check_workers() -> Iterator[Finding]:
    """Start a process as the data loader does, by a fork server, and have it answer."""
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe(duplex=False)
    started = time.monotonic()
    process = context.Process(target=_answer, args=(there,), daemon=True)
    process.start()
    answered = here.poll(60)
    process.join(5)
    if answered:
        yield ok(
            "workers", f"a fork server's process answered in {time.monotonic() - started:.1f} s"
        )
    else:
        yield problem(
            "workers",
            "a process of a fork server does not answer in 60 s",
            "run with data.num_workers=0, and look at what the environment preloads (LD_PRELOAD)",
        )


def check_disk(folder: Path) -> Iterator[Finding]:
    """Write, flush, read and rename in a folder, as every stage does with its files."""
    where = folder.absolute()
    while not where.exists():
        where = where.parent
    probe = where / f".pairmill-doctor-{os.getpid()}"
    try:
        yield from _probe(where, probe)
    except OSError as error:
        yield problem(
            "disk",
            f"{where} cannot be written: {error.strerror}",
            "name the folder that your runs go to: pairmill doctor FOLDER",
        )
    finally:
        probe.unlink(missing_ok=True)


def _probe(where: Path, probe: Path) -> Iterator[Finding]:
    started = time.monotonic()
    with open(probe, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(os.urandom(_PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
    speed = _PROBE_BYTES / 1e6 / (time.monotonic() - started)
    renamed = probe.with_suffix(".renamed")
    os.rename(probe, renamed)
    renamed.unlink()
    usage = shutil.disk_usage(where)
    shown = (
        f"{where} ({_file_system(where)}): {usage.free / 1e9:,.0f} GB free, "
        f"{speed:,.0f} MB/s written and flushed"
    )
    if usage.free / 1e9 < _WANTED_FREE_GB:
        yield note("disk", shown, "free some, or give `output` and `index_dir` elsewhere")
    elif speed < _SLOW_MB_PER_SECOND:
        yield note("disk", shown, "slow: checkpoints are written in the background; shards are not")
    else:
        yield ok("disk", shown)


def _file_system(where: Path) -> str:
    """Return the kind of the file system that a folder is on: that of its nearest mount point."""
    nearest, kind = "", "unknown"
    for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines():
        _, mounted, name, *_ = line.split()
        point = mounted.replace("\\040", " ")
        if where.is_relative_to(point) and len(point) >= len(nearest):
            nearest, kind = point, name
    return kind
