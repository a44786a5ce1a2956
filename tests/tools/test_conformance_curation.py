"""Golden cases of curation: all pass, parts of a folder and other sets work, an error is seen."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from curation.balancing.matching import space_entry, space_text
from curation.global_rules.wfpp_words import byte_encoded, words_of
from tools.conformance.curation import check

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "curation"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "golden" / "curation"


def verdicts(folder: Path) -> Counter[str]:
    return Counter(row.verdict for row in check(folder))


def test_every_golden_case_passes():
    rows = list(check(GOLDEN))
    assert {row.verdict for row in rows} == {"pass"}
    assert {row.case for row in rows} == {p.name for p in GOLDEN.glob("*_*.json")} - {
        "metaclip_captions.json"
    }
    assert min(row.n for row in rows if row.quantity.startswith("captions")) == 423


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the golden folder {SHARED} is not there")
def test_every_golden_case_over_ten_thousand_captions_passes():
    rows = list(check(SHARED))
    assert {row.verdict for row in rows} == {"pass"}
    assert len({row.case for row in rows}) >= 13


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


@pytest.fixture
def other(tmp_path):
    """Another set of captions with another t, its expected values by the plainest code."""
    entries = json.loads((GOLDEN / "metadata.json").read_text())[::7]
    texts = [r["text"] for r in json.loads((GOLDEN / "metaclip_captions.json").read_text())][::3]
    texts += ["a cat in the snow", "the dog of the house"] * 4
    matched = [
        [i for i, e in enumerate(entries) if space_entry(e) in space_text(text)] for text in texts
    ]
    counts = Counter(i for ids in matched for i in ids)
    write(tmp_path, "my_metadata.json", entries)
    write(tmp_path, "metaclip_mine_captions.json", {"texts": texts})
    write(tmp_path, "metaclip_mine_entry_counts.json", {entries[i]: n for i, n in counts.items()})
    keep = [1 - np.prod([1 - 3 / max(counts[i], 3) for i in ids]) for ids in matched]
    balance = {"t": 3, "keep_prob": [round(float(k), 9) for k in keep]}
    balance |= {
        "expected_keep_sum": float(sum(keep)),
        "numpy_seed0_kept": list(range(round(sum(keep)))),
    }
    write(tmp_path, "metaclip_balance_mine_t3.json", balance)
    words = Counter(byte_encoded(w) for text in texts for w in words_of(text))
    frequent = {w: n for w, n in words.items() if n >= 5}
    total = sum(frequent.values())
    prune = {w: 1 - np.sqrt(1e-5 * total / n) for w, n in frequent.items()}
    write(tmp_path, "wfpp_mine_counter.json", frequent)
    write(tmp_path, "wfpp_mine_pdrop_t1e-5.json", prune)
    rows = []
    for number, text in enumerate(texts):
        first = [byte_encoded(w) for w in words_of(text)][:30]
        p = [prune[w] if prune.get(w, -1) >= 0 else 1.0 for w in first]
        score = (1 - np.prod(p)) / len(p) if p else float("nan")
        rows.append([f"{number}.jpg", text, score])
    rows.sort(key=lambda row: (np.isnan(row[2]), -row[2]))
    write(
        tmp_path,
        "wfpp_mine_scores_t1e-5.json",
        {"threshold": 1e-5, "rows_in_original_sorted_order": rows},
    )
    return tmp_path


def test_other_captions_and_other_t_in_the_names_work(other):
    rows = list(check(other))
    assert {(row.verdict, row.note) for row in rows} == {("pass", "")}
    assert len({row.case for row in rows}) == 5


def test_a_folder_with_some_of_the_files_checks_those_and_says_what_is_lacking(other):
    (other / "my_metadata.json").unlink()
    found = verdicts(other)
    assert found["FAIL"] == 0
    assert found["not built"] == 2
    assert found["pass"] >= 5
    for path in other.glob("*_mine_captions.json"):
        path.unlink()
    (other / "wfpp_mine_counter.json").unlink()
    assert verdicts(other)["pass"] == 2  # the scores carry their own captions


@pytest.mark.parametrize(
    "name", sorted(p.name for p in GOLDEN.glob("*_*.json") if p.name != "metaclip_captions.json")
)
def test_any_changed_value_fails(name, tmp_path):
    folder = tmp_path / "golden"
    shutil.copytree(GOLDEN, folder)
    content = json.loads((folder / name).read_text())
    if isinstance(content, list):
        last = next(row for row in reversed(content) if row.get("matched_ids") or row.get("words"))
        for key in ("matched_ids", "words"):
            if key in last:
                last[key] = last[key][:-1]
    elif "t_other" in content:
        content["t_other"] += 1
    else:
        content["cat"] += 1
    write(folder, name, content)
    assert verdicts(folder)["FAIL"] == 1
