"""All the looks, in the order in which a reader wants them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tools.doctor import engines, machine, packages
from tools.doctor.findings import Finding


def examine(folder: Path) -> Iterator[Finding]:
    """Yield what was found, as it is found; `folder` is where runs are to be written.

    Raises nothing: what goes wrong is a finding.
    """
    looks: list[Callable[[], Iterable[Finding]]] = [
        packages.check_python,
        packages.check_packages,
        packages.check_environment,
        machine.check_processors,
        machine.check_limits,
        lambda: machine.check_disk(folder),
        machine.check_workers,
        engines.check_torch,
        engines.check_ray,
        engines.check_slurm,
    ]
    for look in looks:
        yield from look()
