"""Checks a command line that a document shows, without running it.

The real parsers take it; the configurations that it names load, with its overrides, as the schema
of the command; scripts, modules and make's targets exist.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import runpy
import shlex
import sys
from pathlib import Path

from configs.load import load_config
from curation.config import CurateConfig
from evaluation.config import EvaluateConfig
from pretrain.config import PretrainConfig
from slurm.pipeline import PipelineConfig
from tools.cli import COMMANDS, build_parser, parse
from tools.score.config import ScoreConfig

ROOT = Path(__file__).resolve().parents[1]
SCHEMAS = {
    "curate": CurateConfig, "score": ScoreConfig, "pretrain": PretrainConfig,
    "evaluate": EvaluateConfig, "pipeline": PipelineConfig,
}  # fmt: skip
# What a reader has: files that documents call his own.
READERS = {
    "my_curate.yaml": "demo/curate", "my_scores.yaml": "score/demo", "my_run.yaml": "demo/pretrain",
    "my_suite.yaml": "demo/evaluate", "my_chain.yaml": "slurm/demo",
}  # fmt: skip
# Programs of others, which are not checked.
OTHERS = {
    "git", "cd", "source", "mkdir", "cp", "squeue", "sinfo", "pip", "head", "true", "$EDITOR",
    "exit", "python3", ".venv/bin/pip",
}  # fmt: skip
ASSIGNMENT = re.compile(r"[A-Za-z_]+=\S*$")


class _ParsedError(Exception):
    """A module's parser has taken the line; nothing behind it is run."""


def simple_commands(line: str) -> list[list[str]]:
    """Return the commands of a shell line, each as words, comments and redirections left out."""
    found: list[list[str]] = []
    for one in (line, *re.findall(r"\$\((.*?)\)", line)):
        bare = re.sub(r"\s\d?>(&\d|\s*\S+)", "", re.sub(r"(^|\s)#\s.*$", "", one))
        lexer = shlex.shlex(bare, posix=True, punctuation_chars=";|&")
        lexer.whitespace_split, lexer.commenters = True, ""
        found.append([])
        for word in lexer:
            if set(word) <= set(";|&"):
                found.append([])
            elif found[-1] or not ASSIGNMENT.match(word):
                found[-1].append(word)
    return [words for words in found if words]


def check_line(line: str) -> None:
    """Raise AssertionError where a line of a shell block could not be typed."""
    for program, *words in simple_commands(line):
        try:
            _check(program, words)
        except SystemExit as end:
            if end.code:
                raise AssertionError(f"{line}: exit code {end.code}") from end
        except Exception as error:
            raise AssertionError(f"{line}: {error}") from error


def _check(program: str, words: list[str]) -> None:
    if program == "pairmill":
        _check_pairmill(words)
    elif program == "python" and words[0] != "-c":
        assert words[0] == "-m", words
        _check_module(words[1], words[2:])
    elif program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words) <= set(targets), targets
    elif program == "sbatch":
        script = next(i for i, word in enumerate(words) if not word.startswith("--"))
        assert (ROOT / words[script]).is_file(), words[script]
        _check_pairmill([Path(words[script]).stem, *words[script + 1 :]])
    elif program in ("torchrun", "deepspeed"):
        _check_launched(program, words)
    else:
        assert program in {"python", *OTHERS} or program.startswith("$("), f"what is {program}?"


def _check_pairmill(words: list[str]) -> None:
    options = parse(build_parser(), words)
    names, overrides = [getattr(options, "config", None)], getattr(options, "overrides", [])
    kind = options.command
    if kind in ("evaluate", "submit"):
        overrides = [word for word in options.words if "=" in word]
        names = [word for word in options.words if "=" not in word]
    if kind == "submit":
        kind = options.kind
    if kind not in SCHEMAS or getattr(options, "cache_info", False):
        return
    if kind == "evaluate" and not (options.__dict__.get("list") or options.__dict__.get("lint")):
        assert len(names) >= 2, f"CHECKPOINT... CONFIG, not {names}"
    if names:
        load_config(names[-1], SCHEMAS[kind], overrides)


def _check_module(name: str, words: list[str]) -> None:
    found = importlib.util.find_spec(name)
    assert found is not None, f"no module {name}"
    if name == "tools.cli":
        _check_pairmill(words)
        return
    if found.submodule_search_locations is not None:
        found = importlib.util.find_spec(f"{name}.__main__")
    assert found is not None, f"{name} is a package without a command"
    assert found.origin is not None
    if not name.startswith("tools.") or "parse_args(" not in Path(found.origin).read_text():
        return
    argv, parse_args = sys.argv, argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser, *arguments: object) -> object:
        parse_args(parser, *arguments)
        raise _ParsedError

    sys.argv = [name, *words]
    argparse.ArgumentParser.parse_args = stop
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=False)
    except _ParsedError:
        pass
    finally:
        sys.argv, argparse.ArgumentParser.parse_args = argv, parse_args


def _check_launched(program: str, words: list[str]) -> None:
    """What a launcher starts; torchrun's own flags are parsed by torchrun's parser, too."""
    if program == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(words)
        assert options.module != options.no_python, "-m MODULE, or --no-python PROGRAM"
        launched = [options.training_script, *options.training_script_args]
        _check("python" if options.module else launched[0],
               ["-m", *launched] if options.module else launched[1:])  # fmt: skip
    else:
        assert "--module" in words, words
        at = words.index("--module") + 1
        _check_module(words[at], words[at + 1 :])


def form(line: str) -> str:
    """Return what a line says without which numbers and how wide the columns are."""
    return " ".join(re.sub(r"\d[\d,.]*", "0", line).split())


def check_mention(text: str) -> None:
    """Raise AssertionError where a command in a sentence does not exist, or has no such flag.

    What a sentence leaves out (`pairmill export --form=huggingface`) may be missing.
    """
    for alternatives in re.findall(r"[\w]+(?:\s?\|\s?[\w]+)+", text):
        for one in re.split(r"\s?\|\s?", alternatives):
            check_mention(text.replace(alternatives, one))
        return
    for program, *words in simple_commands(text):
        flags = [word.split("=")[0] for word in words if word.startswith("--")]
        if program == "pairmill" and words[0] != "COMMAND":
            assert words[0] in COMMANDS, text
            actions = build_parser()._subparsers._group_actions[0].choices[words[0]]
            if words[0] != "submit":
                assert set(flags) <= set(actions._option_string_actions), text
        elif program == "python" and "SUBJECT" not in text:
            assert importlib.util.find_spec(words[1]) is not None, text
        elif program == "make":
            _check(program, words)
