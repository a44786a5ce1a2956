"""Imports in workers that are cancelled while they import."""

from __future__ import annotations

import _thread
import importlib
import signal
import sys
import threading

import pytest

from curation.lean import whole_imports


@pytest.fixture
def heard():
    """SIGINT as Python has it: a shell starts what it puts in the background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted_import(folder, name, monkeypatch):
    """Import a module that takes 0.3 s, interrupted in the middle as Ray cancels a task."""
    (folder / f"{name}.py").write_text("import time\ntime.sleep(0.3)\nwhole = True\n")
    monkeypatch.syspath_prepend(folder)
    timer = threading.Timer(0.1, _thread.interrupt_main)
    timer.start()
    try:
        importlib.import_module(name)
    finally:
        timer.join()


@pytest.mark.usefixtures("heard")
def test_a_cancelled_task_leaves_no_import_half_done(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        interrupted_import(tmp_path, "slow_to_import_1", monkeypatch)
    with whole_imports():
        interrupted_import(tmp_path, "slow_to_import_2", monkeypatch)
    assert sys.modules["slow_to_import_2"].whole
    with pytest.raises(KeyboardInterrupt):  # afterwards it comes through again
        interrupted_import(tmp_path, "slow_to_import_3", monkeypatch)
