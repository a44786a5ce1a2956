"""What a trainer that is killed leaves behind: nothing."""

import os
import subprocess
import sys
import time


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return (
                file.read().rpartition(")")[2].split()[0] not in "ZX"
            )  # ended, not yet waited for
    except OSError:
        return False


def test_a_killed_trainer_leaves_no_worker_and_no_fork_server(dataset):
    line = [sys.executable, "-m", "tests.pretrain.scripts.consume", str(dataset.folder)]
    trainer = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    try:
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(pids) == 4, "two workers, the fork server, the resource tracker"
        assert all(map(is_running, pids))
    finally:
        trainer.kill()
        trainer.wait()
    deadline = time.monotonic() + 20
    while (left := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        os.kill(pid, 9)
    assert not left
