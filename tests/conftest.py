"""The order of the test files: the longest first, so that some at a time end together."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent
LONGEST_FIRST = (
    "test_chain.py",
    "pretrain/test_engine.py",
    "slurm/test_pretraining.py",
    "slurm/test_pipeline.py",
    "slurm/test_curation.py",
    "test_peers.py",
    "test_documents.py",
    "pretrain/test_train.py",
    "pretrain/test_checkpoints.py",
    "pretrain/test_stages.py",
    "pretrain/test_objectives.py",
    "pretrain/test_attentive.py",
    "curation/test_reruns.py",
    "test_wheel.py",
    "tools/test_doctor.py",
    "tools/test_glyph_pool.py",
    "test_architecture.py",
    "pretrain/test_chaos.py",
    "curation/test_faults.py",
    "curation/test_inputs.py",
    "curation/test_fuzz.py",
    "curation/test_global_rules_job.py",
    "tools/test_cli.py",
    "evaluation/test_methods.py",
    "evaluation/test_suite.py",
    "pretrain/test_loader.py",
    "pretrain/test_remote.py",
    "pretrain/test_tokenizer.py",
    "evaluation/test_queue.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the files above to the front (with xdist's --no-loadscope-reorder)."""
    place = {ROOT / name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))
