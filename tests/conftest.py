"""The order of the test files: the longest first, so that two at a time end together."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
LONGEST_FIRST = (
    "slurm/test_pretraining.py",
    "test_chain.py",
    "slurm/test_pipeline.py",
    "slurm/test_curation.py",
    "pretrain/test_train.py",
    "pretrain/test_checkpoints.py",
    "pretrain/test_chaos.py",
    "curation/test_reruns.py",
    "curation/test_faults.py",
    "curation/test_inputs.py",
    "curation/test_fuzz.py",
    "curation/test_global_rules_job.py",
    "tools/test_cli.py",
    "pretrain/test_objectives.py",
    "pretrain/test_loader.py",
    "pretrain/test_remote.py",
    "pretrain/test_tokenizer.py",
    "evaluation/test_queue.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the files above to the front (with xdist's --no-loadscope-reorder)."""
    place = {ROOT / name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
