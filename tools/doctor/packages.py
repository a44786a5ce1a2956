"""Python, and the packages of each part at the versions that pyproject.toml asks for."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from tools.doctor.findings import Finding, note, ok, problem

_PARTS = {"": "curate, submit", "pretrain": "pretrain", "evaluate": "evaluate"}
_EXTRAS = ("vectors", "remote", "wandb", "ocr", "demo")  # each for one thing alone


def check_python() -> Iterator[Finding]:
    """Look at the interpreter and what it is told."""
    yield ok("python", f"{platform.python_version()} at {sys.executable}")
    if sys.flags.dont_write_bytecode:
        yield note(
            "python",
            "compiled modules are not kept (PYTHONDONTWRITEBYTECODE, or -B)",
            "unset it: each process compiles what it imports, ten seconds a process with torch",
        )


def check_packages() -> Iterator[Finding]:
    """Look at what each part requires; an extra that is not there at all is a note."""
    try:
        wanted = [Requirement(text) for text in metadata.requires("pairmill") or ()]
    except metadata.PackageNotFoundError:
        yield problem(
            "pairmill",
            f"not installed for {sys.executable}",
            "pip install . in the checkout (or make setup), and run that environment's pairmill",
        )
        return
    yield ok("pairmill", f"{metadata.version('pairmill')}")
    for part, commands in _PARTS.items():
        yield _part(part or "base", f"packages of {commands}", _of_part(wanted, part))
    for extra in _EXTRAS:
        yield _part(extra, f"packages of the extra [{extra}]", _of_part(wanted, extra))


def _of_part(wanted: list[Requirement], part: str) -> list[Requirement]:
    """Return what a part asks for beside what the base asks for."""

    def is_for(requirement: Requirement, extra: str) -> bool:
        marker = requirement.marker
        return marker is None or marker.evaluate({"extra": extra})

    return [r for r in wanted if is_for(r, part) and (not part or not is_for(r, ""))]


def _part(part: str, what: str, wanted: list[Requirement]) -> Finding:
    missing, other = [], []
    for requirement in wanted:
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            missing.append(requirement.name)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            other.append(f"{requirement.name} {version} (expected {requirement.specifier})")
    if not missing and not other:
        return ok(part, f"{what}: all {len(wanted)} there")
    found = [f"without {', '.join(missing)}"] if missing else []
    found += [f"with {', '.join(other)}"] if other else []
    extra = "" if part == "base" else f"[{part}]"
    advice = f"pip install 'pairmill{extra}'"
    if part == "base" or other:
        return problem(part, f"{what}: {'; '.join(found)}", advice)
    return note(part, f"{what}: {'; '.join(found)}", f"where it is wanted: {advice}")


def check_environment() -> Iterator[Finding]:
    """Look at the environment variables that a launcher sets all or none of."""
    from configs.errors import UsageError
    from configs.launcher import is_launched

    try:
        launched = is_launched()
    except UsageError as error:
        yield problem("launcher", str(error), "see docs/slurm.md, `Without Slurm`")
        return
    words = "this is one rank of several" if launched else "one process, no launcher"
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    yield ok("launcher", f"{words}; OMP_NUM_THREADS {threads}")
