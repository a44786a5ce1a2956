"""`pairmill doctor`: every look at the machine, and what it says where something is wrong."""

import os
import re
import resource
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from tools.doctor import Level, engines, machine, packages


def doctor(folder, prepare=None, **environment):
    """Run the command in a process of its own; return its exit code and lines."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.cli", "doctor", str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        preexec_fn=prepare,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


@pytest.mark.slow
@pytest.mark.ray
def test_the_doctor_finds_what_development_needs_and_leaves_nothing_behind(tmp_path):
    def few_files():
        resource.setrlimit(resource.RLIMIT_NOFILE, (2_048, 4_096))

    code, shown = doctor(tmp_path / "not" / "yet", few_files, PYTHONDONTWRITEBYTECODE="1")
    assert code == 0, shown
    for what in ("python", "base", "pretrain", "evaluate", "cpu", "disk", "workers", "ray"):
        assert re.search(rf"^(ok|note) +{what} ", shown, re.MULTILINE), (what, shown)
    assert re.search(r"^note +open files +2,048 .*\n +-> ulimit -n 65536", shown, re.MULTILINE)
    assert "PYTHONDONTWRITEBYTECODE" in shown
    assert "ran a task in another process (3 of 3)" in shown
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_is_not_installed_is_a_note_and_a_base_that_is_not_is_a_problem():
    wanted = [Requirement("numpy>=1"), Requirement("no-such-package>=1")]
    found = packages._part("pretrain", "packages", wanted)
    assert found.level is Level.NOTE
    assert "no-such-package" in found.found
    assert found.advice.endswith("pip install 'pairmill[pretrain]'")
    assert packages._part("base", "packages", wanted).level is Level.PROBLEM


def test_a_version_outside_of_its_bounds_is_a_problem():
    found = packages._part("pretrain", "packages", [Requirement("numpy>=99")])
    assert found.level is Level.PROBLEM
    assert "expected >=99" in found.found


def test_a_half_set_launcher_is_a_problem(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    [found] = packages.check_environment()
    assert found.level is Level.PROBLEM
    assert "WORLD_SIZE" in found.found


def test_a_folder_that_takes_no_file_is_a_problem():
    [found] = machine.check_disk(machine.Path("/proc/self"))
    assert found.level is Level.PROBLEM
    assert "cannot be written" in found.found


def test_a_ray_that_does_not_answer_is_a_problem(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    [found] = engines.check_ray()
    assert found.level is Level.PROBLEM
    assert "RAY_ADDRESS=127.0.0.1:1 does not answer" in found.found


def test_the_file_system_of_a_folder_is_that_of_its_nearest_mount_point():
    assert machine._file_system(machine.Path("/proc/self")) == "proc"
