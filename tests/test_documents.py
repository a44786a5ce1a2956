"""What the documents say: links exist, configurations load, examples work, commands print what
stands below them.

A `console` block holds lines `$ COMMAND` and what it prints on stdout; `...` stands for anything,
on a line of its own for any lines. Blocks of one document run in order, in one folder; a `yaml`
block that begins with `# FILE.yaml` is written there first. `console walk` trains and evaluates: CI
requires it (.ci/run); a plain `make test` leaves it out. `console slurm` is typed on a real Slurm
(tests/slurm/test_pipeline.py).
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from configs.load import SHIPPED, find_config
from configs.registry import Registry
from evaluation.methods import catalogue
from evaluation.result import Result, table
from pretrain.model.features import Features
from pretrain.model.geometries import Cosine
from pretrain.objectives import registry as objectives_registry
from pretrain.objectives.group import Solo
from tests import warm

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "*/README.md", "*/*/README.md")
    for path in ROOT.glob(pattern)
    if not {"runs", "shared"} & set(path.relative_to(ROOT).parts)
    and not path.relative_to(ROOT).parts[0].startswith(".")
)
BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
WALK = ("curate.md", "pretrain.md")  # the second goes on from what the first made


def blocks(path: Path) -> list[tuple[str, str, str]]:
    """Return the fenced blocks of a document: (language, what stands behind it, content)."""
    return [(a, b.strip(), c) for a, b, c in BLOCK.findall(path.read_text(encoding="utf-8"))]


def label(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=label)
def test_every_link_leads_to_a_file(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=label)
def test_every_file_and_configuration_that_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`((?:demo|curation|pretrain|evaluation)/[\w/]+)`", text):
        folder, _, last = name.partition("/")
        if folder in ("demo",) or (SHIPPED / folder / last).with_suffix(".yaml").exists():
            assert find_config(name)
    for language, _, content in blocks(path):
        if language == "yaml":
            assert yaml.safe_load(content), content


def printed(command: str, folder: Path, *, walk: bool) -> str:
    """Run a line of a document in `folder`; return its stdout.

    In the walk, a line that needs no shell is forked from a process that has imported torch.
    """
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    program, *words = shlex.split(command)
    if walk and not set("|&;<>$") & set(command):
        module = "tools.cli" if program == "pairmill" else words[1]
        words = words if program == "pairmill" else words[2:]
        done = warm.run(module, words, cwd=folder, timeout=1200, **own)
    else:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=folder, env={**os.environ, **own, "PATH": path},
            capture_output=True, text=True, check=False, timeout=1200,
        )  # fmt: skip
    assert done.returncode == 0, f"$ {command}\n{done.stdout}\n{done.stderr[-3000:]}"
    return done.stdout


def as_pattern(expected: list[str]) -> re.Pattern[str]:
    lines = [
        r"(?:[^\n]*\n)*?" if line.strip() == "..." else
        re.escape(line.rstrip()).replace(r"\.\.\.", r"[^\n]*") + r"[ ]*\n"
        for line in expected
    ]  # fmt: skip
    return re.compile("".join(lines))


def run_console(content: str, folder: Path, *, walk: bool) -> int:
    """Run the commands of a block and compare what each prints; return how many there were."""
    parts = re.split(r"^\$ ", content, flags=re.MULTILINE)[1:]
    for part in parts:
        command, *expected = part.rstrip("\n").split("\n")
        found = printed(command, folder, walk=walk)
        assert as_pattern(expected).fullmatch(found), f"$ {command}\n{found}\nnot:\n{expected}"
    return len(parts)


def run_document(path: Path, folder: Path, *, walk: bool) -> int:
    number = 0
    for language, info, content in blocks(path):
        name = re.match(r"# ([\w-]+\.yaml)\n", content)
        if language == "yaml" and name:
            (folder / name[1]).write_text(content)
        if language == "console" and info in ("", "walk" if walk else ""):
            number += run_console(content, folder, walk=walk)
        if language == "python" and walk and path.name == "curate.md":
            run_tables(content, folder)
    return number


def run_tables(code: str, folder: Path) -> None:
    """Run an example of reading the decisions; DuckDB, Polars and pandas must say the same."""
    found: dict = {}
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(compile(code, "curate.md", "exec"), found)
    finally:
        os.chdir(before)
    if "dropped" in found:
        assert found["dropped"] == [
            ("metaclip/balanced away", 178),
            ("caption_length/too few words", 167),
            ("image_size/side too short", 46),
        ]
    elif "verdicts" in found:
        assert found["verdicts"].rows() == [("dropped", 391), ("kept", 3609)]
        assert found["words_kept"].item() == pytest.approx(6.449155, abs=1e-6)
    else:
        assert found["reasons"].to_list() == [3609, 178, 167, 46]


def test_the_scorecard_of_the_readme_has_the_form_of_the_table_that_is_printed():
    text = (ROOT / "README.md").read_text()
    (block,) = re.findall(r"calibration; shortened:\n\n```\n(.*?)```", text, re.DOTALL)
    suite = yaml.safe_dump(yaml.safe_load((SHIPPED / "evaluation/demo.yaml").read_text()))
    rows = []
    for line in block.splitlines()[1:]:
        dataset, said, metric, value, interval, chance, _, n = re.split(r"\s{2,}", line)
        method, _, shots = said.removesuffix("-shot").partition(" ")
        for name in (dataset, *method.split("/")):
            assert re.search(rf"\b{name}\b", suite), name
        ends = [] if interval == "-" else [fraction(part) for part in interval.split(" - ")]
        rows.append(
            Result(
                dataset=dataset, method=method, shots=int(shots) if shots else None, metric=metric,
                value=fraction(value), interval=tuple(ends) or None,
                chance=None if chance == "-" else fraction(chance), n=int(n.replace(",", "")),
                checkpoint="runs/demo/pretrain", checkpoint_digest="", samples_seen=None, seed=0,
                metric_definition="", prompt_digest=None, data_digest="", config_digest="",
                version="", seconds=0.0,
            )
        )  # fmt: skip
    _, printed = table(rows).split("\n", 1)
    assert sorted(printed.splitlines()) == sorted(block.splitlines())


def fraction(said: str) -> float:
    return float(said.removesuffix(" %")) / 100


@pytest.mark.parametrize("path", DOCUMENTS, ids=label)
def test_quick_commands_print_what_the_document_says(path, tmp_path):
    if any(a == "console" and b == "" for a, b, _ in blocks(path)):
        run_document(path, tmp_path, walk=False)


@pytest.mark.skipif(
    os.environ.get("PAIRMILL_TEST_WALK") != "required",
    reason="a minute of CPU, which CI spends: PAIRMILL_TEST_WALK=required runs it here",
)
@pytest.mark.slow
@pytest.mark.ray
def test_the_walk_through_the_documents_works_command_by_command(tmp_path):
    walked = [run_document(ROOT / "docs" / name, tmp_path, walk=True) for name in WALK]
    assert min(walked) >= 3


def test_the_example_of_an_objective_works_as_it_stands(monkeypatch):
    text = (ROOT / "pretrain/objectives/README.md").read_text()
    indented = text.split("One file:\n")[1].split("\nand one row of")[0]
    code = "\n".join(line[4:] for line in indented.splitlines())
    fresh = Registry("objective", base=objectives_registry.Term)
    monkeypatch.setattr(objectives_registry, "objectives", fresh)
    exec(compile(code, "alignment.py", "exec"), {"__name__": "alignment"})
    objective = fresh.section("alignment").model_validate({"name": "alignment"}).build()
    features = Features(
        image_bD=torch.tensor([[2.0, 0.0], [0.0, 1.0]]),
        text_bD=torch.tensor([[1.0, 0.0], [3.0, 0.0]]),
        logit_scale=torch.tensor(1.0),
    )
    # Unit vectors: the first pair is the same, the second at right angles: |a - b|^2 = 0 and 2.
    loss = objective.loss(features, similarity=Cosine(), group=Solo())
    assert float(loss) == pytest.approx(1.0)


def test_the_example_of_an_evaluation_method_works_as_it_stands(monkeypatch):
    code, factory = [c for a, _, c in blocks(ROOT / "docs/extending.md") if a == "python"]
    module = ModuleType("evaluation.methods.ambiguity")
    exec(compile(code, "ambiguity.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    fresh = Registry("method")
    monkeypatch.setattr(catalogue, "methods", fresh)
    exec(compile(factory, "catalogue.py", "exec"), catalogue.__dict__.copy())
    method = fresh.section("ambiguity").model_validate({"name": "ambiguity", "margin": 0.2}).build()
    odds = np.array([[0.5, 0.4, 0.1], [0.8, 0.1, 0.1], [0.45, 0.15, 0.4], [0.6, 0.3, 0.1]])
    subject = SimpleNamespace(test_logits=torch.from_numpy(odds).log())
    (outcome,) = method.run(subject)
    assert outcome.method == "ambiguity"
    assert [metric.value for metric in outcome.metrics] == [0.5]
