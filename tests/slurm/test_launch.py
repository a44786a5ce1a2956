"""The launcher of a node, on real processes without torch; what the scripts promise of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slurm.network import interface_towards
from tests.pretrain.test_killed import is_running
from tests.slurm.conftest import ROOT, SCRIPTS

# Says that it listens, saves at SIGUSR1, ends with 75; rank 1 takes longer over it.
TRAINER = """
import os, signal, sys, time
def save(number, frame):
    time.sleep(0.5 * int(os.environ["RANK"]))
    os.write(1, b"saved\\n")
    sys.exit(75)
signal.signal(signal.SIGUSR1, save)
os.write(1, f"pid {os.getpid()}\\n".encode())
time.sleep(60)
"""


def launch(tmp_path: Path, code: str, *, grace: float = 10.0, **variables: str) -> subprocess.Popen:
    """Start two ranks of a piece of Python."""
    start = f"import sys, slurm.launch as l; l._GRACE_SECONDS = {grace}; sys.exit(l.main())"
    words = ["--processes=2", f"--exit-file={tmp_path / 'exit'}", "--", "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", start, *words],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def pids(process: subprocess.Popen) -> list[int]:
    return [int(process.stdout.readline().split()[1]) for _ in range(2)]


def test_ranks_are_static_by_node(tmp_path):
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"]
    line = f"' '.join(os.environ[name] for name in {names}) + '\\n'"
    code = f"import os; os.write(1, ({line}).encode())"
    process = launch(tmp_path, code, SLURM_NODEID="2", SLURM_STEP_NUM_NODES="3")
    printed, _ = process.communicate(timeout=60)
    assert sorted(printed.splitlines()) == ["4 0 6 2", "5 1 6 2"]
    assert process.returncode == 0
    assert not (tmp_path / "exit").exists()


def test_the_first_failure_ends_the_others_and_is_the_exit_code(tmp_path):
    code = "import os, sys, time; sys.exit(7) if os.environ['RANK'] == '1' else time.sleep(60)"
    process = launch(tmp_path, code, grace=0.3)
    started = time.monotonic()
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - started < 30
    assert process.returncode == 7
    assert "local rank 1 ended with exit code 7" in said
    assert (tmp_path / "exit").read_text().startswith("7 ")


def test_a_signal_reaches_all_ranks_and_a_slow_one_may_finish_saving(tmp_path):
    process = launch(tmp_path, TRAINER, grace=0.1)
    pids(process)
    process.send_signal(signal.SIGUSR1)
    printed, _ = process.communicate(timeout=60)
    assert printed.split() == ["saved", "saved"]
    assert process.returncode == 0, "a code would let srun kill the other nodes, which still save"
    assert (tmp_path / "exit").read_text().startswith("75 ")


def test_ranks_that_could_not_yet_listen_are_stopped_not_failed(tmp_path):
    process = launch(tmp_path, TRAINER.replace("signal.signal(signal.SIGUSR1, save)", ""))
    pids(process)
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert "SIGUSR1 before it had anything to save" in (tmp_path / "exit").read_text()


def test_the_first_node_to_fail_says_why(tmp_path):
    (tmp_path / "exit").write_text("3 n9: it was me\n")
    process = launch(tmp_path, "raise SystemExit(1)")
    process.communicate(timeout=60)
    assert process.returncode == 1
    assert (tmp_path / "exit").read_text() == "3 n9: it was me\n"


def test_a_killed_launcher_leaves_no_rank_behind(tmp_path):
    process = launch(tmp_path, TRAINER)
    ranks = pids(process)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 20
    while any(map(is_running, ranks)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, ranks))


def test_the_interface_towards_an_address_is_found():
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("not an address") is None


def test_the_scripts_pass_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not beside this Python; `make setup` puts it there")
    scripts = [*SCRIPTS.glob("*.sbatch"), SCRIPTS / "job.sh", ROOT / "tests/slurm/machine.sh"]
    assert len(scripts) == 5
    done = subprocess.run(
        [shellcheck, "--external-sources", *scripts],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
