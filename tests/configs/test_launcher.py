"""What a launcher sets is all there or not at all, for the trainer and the evaluation alike."""

from __future__ import annotations

import re

import pytest

from configs.errors import UsageError
from configs.launcher import LAUNCHER_VARIABLES, is_launched


@pytest.fixture(autouse=True)
def _without_launcher(monkeypatch):
    for name in (*LAUNCHER_VARIABLES, "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def join_training():
    from pretrain.engine import start_processes

    start_processes(1)


def join_evaluation():
    from evaluation.world import joined

    with joined():
        pass


def test_all_of_the_variables_are_a_launcher_and_none_is_one_process(monkeypatch):
    assert not is_launched()
    for name in LAUNCHER_VARIABLES:
        monkeypatch.setenv(name, "1")
    assert is_launched()


@pytest.mark.parametrize("start", [is_launched, join_training, join_evaluation])
def test_a_half_set_environment_is_refused_with_what_is_missing(monkeypatch, start):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    wanted = "half set: got RANK, WORLD_SIZE, expected LOCAL_RANK, MASTER_ADDR, MASTER_PORT as well"
    with pytest.raises(UsageError, match=wanted):
        start()


@pytest.mark.parametrize("start", [is_launched, join_training, join_evaluation])
def test_tasks_of_srun_without_a_launcher_are_refused_with_the_variables(monkeypatch, start):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    wanted = f"one of 4 tasks of a Slurm step, and none of {', '.join(LAUNCHER_VARIABLES)} is set"
    with pytest.raises(UsageError, match=re.escape(wanted)):
        start()
