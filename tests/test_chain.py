"""The whole chain on a small pool, by the commands of the demo.

And its control with shuffled captions.
"""

import json
import re
from pathlib import Path

import pytest

from configs.load import SHIPPED
from tests import warm
from tests.command_lines import form
from tools.demo import done_line, steps

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.distributed]

NUM_PAIRS = 6_000
SHORTER = {
    "pretrain": [
        "samples=12_800",
        "global_batch_size=128",
        "optimizer.warmup_samples=2_560",
        "data.num_workers=0",
        "engine.num_threads=1",
    ],
    "evaluate": ["num_bootstrap=200"],
}


def run_chain(
    folder: Path, *pool_options: str, num_steps: int = 5, printed: list[str] | None = None
) -> dict:
    """Run the steps of the demo, shortened; return the model's results by dataset and metric."""
    model = json.loads((SHIPPED / "models/glyph-vit-s.json").read_text())
    for tower in (model["vision_cfg"], model["text_cfg"]):
        tower["layers"] //= 2
    (folder / "half-as-deep.json").write_text(json.dumps(model))
    for _, words in steps(folder)[:num_steps]:
        module, *arguments = words
        if module == "tools.glyph_pool":
            arguments += ["--limit", str(NUM_PAIRS), *pool_options]
        else:
            arguments += SHORTER.get(arguments[0], [])
            if arguments[0] == "pretrain":
                arguments.append(f"model={folder / 'half-as-deep.json'}")
            if pool_options and arguments[0] == "evaluate":  # the control needs no baseline
                arguments = [word for word in arguments if not word.startswith("baseline")]
                arguments.append("baseline=null")
        done = warm.run(module, arguments)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        # A log file gets plain lines: no colours, no bars that rewrite themselves.
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", done.stdout + done.stderr), words
        if printed is not None:
            printed += done.stdout.splitlines()
    rows = [
        json.loads(line) for line in (folder / "results/results.jsonl").read_text().splitlines()
    ]
    return {(r["dataset"], r["metric"]): r for r in rows if r["checkpoint"] != "pixel-1nn"}


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chain")
    printed: list[str] = []
    return folder, run_chain(folder, printed=printed), printed


def test_every_sample_read_is_kept_dropped_or_unreadable(chain):
    counts = json.loads((chain[0] / "dataset/report.json").read_text())
    assert counts["num_read"] == NUM_PAIRS
    dropped, unreadable = sum(counts["dropped"].values()), sum(counts["unreadable"].values())
    assert counts["num_kept"] + dropped + unreadable == counts["num_read"]
    assert 0 < counts["num_kept"] < counts["num_read"]
    manifest = json.loads((chain[0] / "dataset/manifest.json").read_text())
    assert manifest["num_samples"] == counts["num_kept"]


def test_the_model_learns_from_real_pairs(chain):
    results = chain[1]
    for dataset, metric, times in (("serif", "top1", 3), ("unseen", "t2i_recall@10", 1.5)):
        row = results[dataset, metric]
        assert row["interval"][0] > times * row["chance"], row
    for row in (row for row in results.values() if row["interval"] is not None):
        low, high = row["interval"]
        assert 0 <= low <= row["value"] <= high <= 1
        assert row["n"] > 0


def test_the_readme_shows_what_the_chain_prints(chain):
    folder, _, printed = chain
    printed = [*printed, done_line(338.0, folder / "report.html").strip()]
    found = iter(form(line.replace(str(folder), "runs/demo")) for line in printed)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (shown,) = re.findall(r"shortened, it printed:\n\n```\n(.*?)```", readme, re.DOTALL)
    lines = [line for line in shown.splitlines() if line]
    assert len(lines) == 12
    for line in lines:  # in this order; the README leaves some out
        assert form(line) in found, f"{line}\nis not what the chain prints:\n{printed}"


def test_the_control_with_shuffled_captions_stays_at_chance(tmp_path):
    results = run_chain(tmp_path, "--shuffle-captions", num_steps=4)
    for (dataset, metric), row in results.items():
        if metric in {"top1", "t2i_recall@10", "i2t_recall@10"}:
            assert row["value"] <= 3 * row["chance"], (dataset, metric, row["value"], row["chance"])


def test_the_report_is_one_page_that_needs_no_network(chain):
    page = (chain[0] / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert page.count("data:image/png;base64,") >= 40


def test_a_second_run_makes_nothing_again(chain):
    folder = chain[0]
    files = ("dataset/manifest.json", "pretrain/checkpoints/latest", "pool/pool.json")
    before = {name: (folder / name).stat().st_mtime_ns for name in files}
    run_chain(folder, num_steps=3)
    assert {name: (folder / name).stat().st_mtime_ns for name in files} == before
