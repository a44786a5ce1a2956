"""One real Slurm for the session; where none can be booted the tests are skipped and say why."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_not

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "slurm"
# As a user would have them in his shell. One thread a process: the machine has few cores.
VARIABLES = {
    "PAIRMILL_PYTHON": sys.executable,
    "PYTHONPATH": str(ROOT),
    "PYTHONWARNINGS": "ignore",
    "OMP_NUM_THREADS": "1",
    "TMPDIR": "/mnt",
    "RAY_worker_niceness": "0",  # Ray's 15 would starve its workers beside another test
}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Five nodes and a login host. In CI (.ci/run installs the packages) it must boot."""
    reason = why_not()
    if reason:
        if os.environ.get("PAIRMILL_TEST_SLURM") == "required":
            pytest.fail(f"this run must test on a real Slurm: {reason}")
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="pairmill-slurm-"))
    try:
        with Cluster(folder, num_nodes=5) as booted:
            yield booted
    finally:
        shutil.rmtree(folder, ignore_errors=True)
