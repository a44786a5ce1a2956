"""The command: help that teaches, exit codes, errors in one paragraph."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs.load import SHIPPED, load_config, validate
from tests import warm
from tools.cli import COMMANDS, build_parser, main

ROOT = Path(__file__).resolve().parents[2]
SHIPPED_CONFIGS = sorted(
    str(path.relative_to(SHIPPED).with_suffix(""))
    for folder in ("demo", "curation", "score", "pretrain", "evaluation")
    for path in (SHIPPED / folder).rglob("*.yaml")
    if path.parent.name != "descriptions"
)


def pairmill(*words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return warm.run("tools.cli", list(words), cwd=cwd)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_teaches_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert f"pairmill {command} " in text


def test_help_lists_the_commands_and_a_bare_call_is_wrong_usage(capsys):
    assert main([]) == 2
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


def test_no_flags_creep_in():
    """A run is a file plus overrides: a new flag is a decision, made here."""
    actions = build_parser()._subparsers._group_actions[0].choices
    flags = {
        name: sorted(f for f in p._option_string_actions if f.startswith("--"))
        for name, p in actions.items()
    }
    run = ["--dry-run", "--help", "--print-config"]
    assert flags == {
        "curate": run, "score": run, "pretrain": run,
        "evaluate": sorted([*run, "--cache-info", "--lint", "--list", "--part"]),
        "index": ["--help"], "export": ["--form", "--help"], "doctor": ["--help"],
        "report": ["--export", "--help", "--output"],
        "submit": ["--dry-run", "--help"], "completion": ["--help"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["curate", "nowhere.yaml"], 2, "there is no configuration 'nowhere.yaml'"),
        (
            ["curate", "demo/curate", "seeed=1"],
            2,
            "seeed: there is no such key, did you mean 'seed'?",
        ),
        (["curate", "demo/curate", "sources.0.shards=/nowhere"], 2, "/nowhere"),
        (["score", "score/demo", "manifest=/nowhere"], 1, "there is no checkpoint"),
        (["pretrain", "demo/pretrain", "data.manifest=/nowhere"], 1, "/nowhere"),
        (
            ["pretrain", "demo/pretrain", "objective.name=clap"],
            2,
            "got 'clap', did you mean 'clip'?",
        ),
        (["evaluate", "demo/evaluate"], 2, "expected CHECKPOINT... CONFIG"),
        (["evaluate", "/nowhere", "demo/evaluate"], 1, "/nowhere"),
        (["export", "/nowhere", "out"], 1, "there is no folder /nowhere"),
        (["index", "/nowhere"], 2, "/nowhere"),
        (["report", "/nowhere"], 2, "/nowhere"),
    ],
)
def test_a_mistake_is_one_paragraph_and_an_exit_code(words, code, message, tmp_path):
    done = pairmill(*words, cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr
    assert message in done.stderr
    assert done.stdout == ""


def test_a_traceback_comes_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PAIRMILL_TRACEBACK", "1")
    assert "Traceback" in pairmill("curate", "nowhere.yaml", cwd=tmp_path).stderr


def test_print_config_prints_yaml_that_loads_again(tmp_path):
    done = pairmill("pretrain", "demo/pretrain", "seed=5", "--print-config", cwd=tmp_path)
    assert done.returncode == 0
    (tmp_path / "again.yaml").write_text(done.stdout)
    assert pairmill("pretrain", "again.yaml", "--print-config", cwd=tmp_path).stdout == done.stdout
    assert "seed: 5" in done.stdout


@pytest.mark.parametrize("name", SHIPPED_CONFIGS)
def test_every_shipped_configuration_loads(name):
    from curation.config import CurateConfig
    from evaluation.config import EvaluateConfig
    from pretrain.config import PretrainConfig
    from tools.score.config import ScoreConfig

    schemas = {"pretrain": PretrainConfig, "evaluat": EvaluateConfig, "score/": ScoreConfig}
    schema = next((s for part, s in schemas.items() if part in name), CurateConfig)
    assert load_config(name, schema)


@pytest.mark.parametrize(
    "path", sorted((SHIPPED / "evaluation/descriptions").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_shipped_description_of_a_dataset_loads(path):
    from evaluation.description import DescriptionConfig

    assert validate(yaml.safe_load(path.read_text()), DescriptionConfig, label=path.name)


def completions(line: str, folder: Path) -> list[str]:
    """Return what a shell is told at the end of `line`."""
    found = folder / "found"
    environment = {
        **os.environ,
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_SHELL": "bash",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(found), "COMP_LINE": line, "COMP_POINT": str(len(line)),
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tools.cli"],
        env=environment, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [word.strip() for word in found.read_text().split("\n")]


def test_a_shell_completes_commands_configurations_and_keys(tmp_path):
    (tmp_path / "demolition.yaml").write_text("{}")
    assert completions("pairmill pre", tmp_path) == ["pretrain"]
    found = completions("pairmill curate dem", tmp_path)
    assert {"demo/curate", "demo/pretrain", "demolition.yaml"} <= set(found)
    keys = completions("pairmill pretrain demo/pretrain optimizer.", tmp_path)
    assert {"optimizer.learning_rate=", "optimizer.beta2="} <= set(keys)


# What a shell does at <TAB>: its completer of pairmill is asked. (Outside its line editor zsh can
# not show candidates: they are printed where it would.)
ASKS = {
    "bash": (
        ["bash", "--norc"],
        'source {file}; COMP_LINE="{line}" COMP_POINT={length} COMP_TYPE=9\n'
        "$(complete -p pairmill | sed 's/.*-F \\([^ ]*\\).*/\\1/') pairmill\n"
        'printf "%s\\n" "${{COMPREPLY[@]}}"',
    ),
    "zsh": (
        ["zsh", "-f"],
        "autoload -U compinit && compinit -D -u && source {file}\n"
        '_describe() {{ print -l "${{(@P)2}}" }}\n'
        'words=({line}) BUFFER="{line}" CURSOR={length}; $_comps[pairmill]',
    ),
    "fish": (["fish", "--no-config"], 'source {file}; complete -C "{line}"'),
}


@pytest.mark.parametrize("shell", ASKS)
def test_a_shell_that_reads_what_completion_prints_completes(shell, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    file = tmp_path / "completion"
    file.write_text(capsys.readouterr().out)
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here; what is printed was not read by it")
    (tmp_path / "pairmill").write_text(f'#!/bin/sh\nexec {sys.executable} -m tools.cli "$@"\n')
    (tmp_path / "pairmill").chmod(0o755)
    words, ask = ASKS[shell]
    line = "pairmill curate demo/cu"
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        [*words, "-c", ask.format(file=file, line=line, length=len(line))],
        cwd=tmp_path, env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert [word.strip().rstrip(":") for word in done.stdout.split()] == ["demo/curate"], done


def test_help_needs_neither_torch_nor_ray_nor_the_completer(tmp_path):
    code = (
        "import sys, tools.cli\ntry: tools.cli.main(['--help'])\nexcept SystemExit: pass\n"
        "never = ('torch', 'ray', 'numpy', 'pydantic', 'argcomplete')\n"
        "print([m for m in never if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
