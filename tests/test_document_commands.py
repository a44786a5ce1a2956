"""Every command that a document shows can be typed as it stands (tests/command_lines.py).

The lines of `sh` blocks are commands and nothing else; other commands stand behind the `$ ` of
`console` blocks, in indented blocks, `in code` of a sentence, and in the help of the commands.
"""

import importlib
import re

import pytest

from tests.command_lines import READERS, check_line, check_mention
from tests.test_documents import DOCUMENTS, label
from tools.cli import COMMANDS

PROGRAMS = ("pairmill", "python", "make", "sbatch", "torchrun", "deepspeed")
BEGINS = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{'|'.join(PROGRAMS)}) ")


def outside_and_fences(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Return what stands outside the fenced blocks, and (language, content) of each."""
    outside, fences, language = [], [], None
    for line in text.split("\n"):
        if not line.startswith("```"):
            (outside if language is None else fences[-1][1]).append(line)
        elif language is None:
            language = (line.removeprefix("```").split() or [""])[0]
            fences.append((language, []))
        else:
            language = None
    return "\n".join(outside), [(a, "\n".join(b)) for a, b in fences]


def whole_lines(block: str) -> list[str]:
    return [line for line in re.sub(r"\\\n\s*", "", block).split("\n") if line.strip()]


def lines_of(text: str) -> list[str]:
    """Return the command lines of a document that are whole."""
    outside, fences = outside_and_fences(text)
    found = []
    for language, block in fences:
        if language == "sh":
            found += whole_lines(block)
        elif language == "console":
            found += [line[2:] for line in whole_lines(block) if line.startswith("$ ")]
        elif language == "":
            assert not [x for x in whole_lines(block) if BEGINS.match(x)], "a block for `sh`"
    indented = [line.strip() for line in whole_lines(outside) if line.startswith("    ")]
    return [*found, *(line for line in indented if BEGINS.match(line))]


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """The folder of a reader with his own files."""
    for name, parent in READERS.items():
        (tmp_path / name).write_text(f"extends: {parent}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", DOCUMENTS, ids=label)
def test_every_command_can_be_typed_as_it_stands(path, reader):
    text = path.read_text(encoding="utf-8")
    earlier = [] if path.name != "pretrain.md" else [path.parent / "curate.md"]
    for document in (*earlier, path):
        found = outside_and_fences(document.read_text(encoding="utf-8"))[1]
        for language, block in found:
            name = re.match(r"# ([\w-]+\.yaml)\n", block)
            if language == "yaml" and name:
                (reader / name[1]).write_text(block)
    for line in lines_of(text):
        if "seeed" not in line:  # the mistake that the document shows
            check_line(line)
    outside = outside_and_fences(text)[0]
    for mention in re.findall(r"`([^`]+)`", outside):
        if BEGINS.match(mention):
            check_mention(" ".join(mention.split()))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_examples_of_a_commands_help_can_be_typed(command, reader):
    own = {"curate": "curate", "score": "scores", "pretrain": "run", "submit": "run"}
    if command in own:
        (reader / "my.yaml").write_text(f"extends: {READERS[f'my_{own[command]}.yaml']}\n")
    epilog = importlib.import_module(f"tools.commands.{command}").EPILOG
    lines = [line for line in epilog.split("\n") if BEGINS.match(line.strip())]
    for line in lines:
        check_line(re.split(r"\s{2,}", line.strip())[0])
    assert len(lines) > 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("pairmill curate demo/curate seeed=1", "did you mean 'seed'"),
        ("pairmill curate demo/curate --dryrun", "exit code 2"),
        ("pairmill pretrain nowhere.yaml", "nowhere.yaml"),
        ("make demos", "demo"),
        ("sbatch --nodes=2 slurm/train.sbatch demo/curate", "train.sbatch"),
        ("sbatch slurm/curate.sbatch demo/curate rule=1", "did you mean 'rules'"),
        ("python -m tools.glyph_pool pool --limits 4", "exit code 2"),
        ("python -m tools.glyphs pool", "no module tools.glyphs"),
        ("torchrun --nproc-per-node=2 -m tools.cli pretrain demo/pretrain sample=1", "'samples'"),
        ("torchrun --nproc=2 --no-pythons pairmill pretrain demo/pretrain", "exit code 2"),
        ("pairmil doctor", "what is pairmil"),
    ],
)
def test_what_cannot_be_typed_is_found(line, message, reader):
    with pytest.raises(AssertionError, match=re.escape(message)):
        check_line(line)


def test_a_mention_of_what_is_not_there_is_found():
    check_mention("pairmill export --form=huggingface")
    for text in (
        "pairmill exprt",
        "pairmill export --from=x",
        "python -m tools.conformance|nothing",
    ):
        with pytest.raises(AssertionError):
            check_mention(text)
