"""`pairmill submit` on a real Slurm: the chain from one command, and how it stops."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs.load import SHIPPED
from tests.command_lines import form
from tests.slurm.conftest import ROOT, VARIABLES
from tests.test_documents import blocks

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.distributed, pytest.mark.slurm]

PATIENCE = 600.0
GUIDE = ROOT / "docs/slurm.md"
NUM_PAIRS = 1_000
DATASETS = ("serif-letters-digits", "unseen")  # one for each task of the array


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A small pool of the demo and its chain, shortened, writing below a folder."""
    folder = tmp_path_factory.mktemp("chain")
    words = ["-m", "tools.glyph_pool", str(folder / "pool"), "--limit", str(NUM_PAIRS)]
    subprocess.run([sys.executable, *words], check=True, capture_output=True)

    def make(name: str) -> Path:
        tree = yaml.safe_load((SHIPPED / "slurm/demo.yaml").read_text())
        tree["output"] = name
        tree["curate"]["sbatch"]["cpus-per-task"] = 1
        pool, dataset, run = folder / "pool", f"{name}/dataset", f"{name}/pretrain"
        tree["curate"]["overrides"] = [
            f"output={dataset}", f"sources.0.shards={pool}/train",
            f"rules.2.metadata={pool}/metadata.txt",
        ]  # fmt: skip
        tree["pretrain"]["overrides"] = [
            f"output={run}", f"data.manifest={dataset}", "samples=640", "data.num_workers=0",
            "global_batch_size=64", "optimizer.warmup_samples=64", "engine.num_threads=1",
        ]  # fmt: skip
        tree["evaluate"]["overrides"] = [
            f"output={name}/results", f"baseline.reference={dataset}", "num_bootstrap=100",
            f"cache={name}/features",
            f"datasets=[{', '.join(f'{{path: {pool}/eval/{part}}}' for part in DATASETS)}]",
        ]  # fmt: skip
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return make


def submit(cluster, cwd: Path, *words: str, **variables: str):
    """Run `pairmill submit` on the login host."""
    line = [sys.executable, "-W", "ignore", "-m", "tools.cli", "submit", *words]
    shell = {k: v for k, v in VARIABLES.items() if k != "PAIRMILL_PYTHON"} | {"TMPDIR": "/tmp"}
    return cluster.run(*line, cwd=cwd, timeout=PATIENCE, **(shell | variables))


def site(folder: Path, **changes: object) -> str:
    path = folder / "site.yaml"
    setup = ["export PAIRMILL_WAS_SET_UP=yes TMPDIR=/mnt"]
    path.write_text(yaml.safe_dump({"setup": setup, "pretrain": {"comment": "ours"}, **changes}))
    return str(path)


def start(cluster, config: Path, where: dict[str, str], *flags: str) -> list[tuple[str, Path]]:
    """Submit a chain; return (job, record) of its stages."""
    done = submit(cluster, config.parent, "pipeline", config.name, *flags, **where)
    assert done.returncode == 0, done.stderr
    stages = [line.split() for line in done.stdout.splitlines()]
    assert [stage[1] for stage in stages] == ["curate", "pretrain", "evaluate"]
    return [(job, Path(record)) for job, _, record in stages]


@pytest.fixture(scope="module")
def bad(cluster, chain, tmp_path_factory):
    """A chain whose first stage fails in its preflight: its folder, its site, its stages."""
    unmet = {"PAIRMILL_MIN_FREE_GB": "1_000_000"}
    where = {"PAIRMILL_SITE": site(tmp_path_factory.mktemp("site"), environment=unmet)}
    config = chain("bad")
    return config.parent, where, start(cluster, config, where)


def test_one_command_curates_pretrains_and_evaluates(cluster, chain, tmp_path, bad):
    config = chain("good")
    folder = config.parent
    quick = {"PAIRMILL_PREFLIGHT": "off"}  # the bad chain, which runs beside this one, has it on
    where = {"PAIRMILL_SITE": site(tmp_path, environment=quick)}
    shown = submit(cluster, folder, "pipeline", config.name, "--dry-run", **where)
    assert shown.returncode == 0, shown.stderr
    assert not (folder / "good").exists()
    jobs, records = zip(*start(cluster, config, where, "--qos=normal"), strict=True)

    status = submit(cluster, folder, "status", "good", **where)
    assert status.stdout.count("PENDING") + status.stdout.count("RUNNING") >= 2, status.stdout
    for job, record in zip(jobs, records, strict=True):
        ended = cluster.wait(job, PATIENCE)
        logs = "\n".join(path.read_text() for path in record.glob("*.log"))
        assert ended.state == "COMPLETED", ended.text + logs
    rows = [json.loads(line) for line in (folder / "good/results/results.jsonl").open()]
    assert {row["dataset"] for row in rows} == set(DATASETS)
    assert (folder / "good/dataset/manifest.json").is_file()
    assert len(list(records[2].glob("evaluate-*_[01].log"))) == 2

    status = submit(cluster, folder, "status", "good", **where)
    assert status.stdout.count("COMPLETED") == 3, status.stdout
    assert "newest checkpoint: " in status.stdout
    said = re.sub(r"\S*\bgood/", "runs/demo/", status.stdout).splitlines()
    (guide,) = re.findall(r"in the end:\n\n```\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    assert [as_ended(line) for line in said] == [as_ended(line) for line in guide.splitlines()]
    # What was shown is what was run, but for the jobs' numbers and the flag that was added.
    submitted = json.loads((records[1] / "submit.json").read_text())
    line = next(line for line in shown.stdout.splitlines() if "pretrain.sbatch" in line)
    ran = [w.replace(jobs[0], "<curate>") if "depend" in w else w for w in submitted["sbatch"]]
    ran.remove("--qos=normal")
    assert shlex.split(line)[-len(ran) :] == ran
    assert submitted["git"]["revision"]
    assert submitted["versions"]["torch"]
    assert "--comment=ours" in submitted["sbatch"]
    assert yaml.safe_load((records[1] / "config.yaml").read_text())["samples"] == 640


def as_ended(line: str) -> str:
    """A line of the status without numbers, times and which nodes there were."""
    line = re.sub(r"\d+-\d+-\d+T[\d:]+|\d+:\d+:\d+", "TIME", line)
    return form(re.sub(r"\bn\[?\d[\d,-]*\]?", "n0", line))


def test_the_guides_commands_print_what_stands_below_them(cluster, tmp_path):
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")
    number = 0
    for language, info, block in blocks(GUIDE):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            assert (language, info) == ("console", "slurm")
            command, *expected = part.rstrip("\n").split("\n")
            found = cluster.check("bash", "-c", command, cwd=tmp_path).splitlines()
            assert [as_ended(line) for line in found] == [as_ended(line) for line in expected]
            number += 1
    assert number == 2


def test_a_failing_stage_stops_the_chain_and_the_status_says_which(cluster, bad, tmp_path):
    folder, where, stages = bad
    record = stages[0][1]
    states = [cluster.wait(job, PATIENCE).state for job, _ in stages]
    assert states == ["FAILED", "CANCELLED", "CANCELLED"]
    log = next(record.glob("curate-*.log")).read_text()
    for node in ("n1", "n2"):
        assert f"preflight: {node}: " in log
    assert "GB free, expected at least 1e+06 (PAIRMILL_MIN_FREE_GB)" in log

    status = submit(cluster, folder, "status", "bad", **where).stdout
    assert "failed in preflight" in status
    assert status.count("CANCELLED") == 2, status
    assert "DependencyNeverSatisfied" in status, status
    # Where neither scontrol nor sacct knows: what the jobs themselves noted.
    forgotten = subprocess.run(
        [sys.executable, "-m", "tools.cli", "submit", "status", "bad"],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": str(tmp_path)},
    )  # fmt: skip
    assert forgotten.returncode == 0, forgotten.stderr
    assert forgotten.stdout.count("forgotten") == 3
    assert "failed in preflight" in forgotten.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["pretrain", "demo/pretrain", "seeed=1"], "did you mean 'seed'"),
        (["status", "nowhere"], "nothing was submitted for nowhere"),
        (["pipeline", "slurm/demo"], "not submitted: `pairmill curate ... --dry-run`"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_not_submitted(words, message, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tools.cli", "submit", *words],
        cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []
