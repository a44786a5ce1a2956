"""The thirty-odd mistakes that are made most: each message says what, got, expected and what to do.

`pytest -s tests/tools/test_mistakes.py` prints them for review.
"""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import pytest
from PIL import Image

from tests.pretrain.conftest import write_tar
from tools.cli import main

CURATE = "name: x\noutput: out\nsources: [{name: a, shards: raw}]\n"
RULES = "rules: [{name: metaclip, metadata: words.txt, t: 2}, {name: image_size, min_side: 8}]\n"
PRETRAIN = "extends: demo/pretrain\noutput: run\ndata: {manifest: raw}\n"
SUITE = "name: s\ndatasets: [{path: pets}]\noutput: results\n"
FILES = {
    "curate.yaml": CURATE,
    "last.yaml": CURATE + RULES,
    "broken.yaml": "name: x\n  output: [out\n",
    "list.yaml": "- name: x\n",
    "empty.yaml": "",
    "circle.yaml": "extends: circle.yaml\n",
    "run.yaml": PRETRAIN,
    "suite.yaml": SUITE,
    "words.txt": "red\nblue\n",
    "other/note.txt": "mine\n",
    "nothing/readme": "",
}
# The line; the exit code; what the message must say: what was got, and what to do.
MISTAKES: list[tuple[str, int, list[str]]] = [
    ("train demo/pretrain", 2, ["did you mean 'pretrain'?", "--help"]),
    ("curate", 2, ["the following arguments are required: CONFIG\n", "has examples"]),
    ("curate nowhere.yaml", 2, ["no configuration 'nowhere.yaml'", "Give the path", "demo/{"]),
    ("curate demo/curat", 2, ["did you mean 'demo/curate'?"]),
    ("curate curate.yaml --epochs=3", 2, ["--epochs=3", "have no dashes: epochs=3"]),
    ("curate curate.yaml seed", 2, ["'seed'", "expected key.path=value"]),
    ("curate curate.yaml seeed=1", 2, ["did you mean 'seed'?"]),
    ("curate curate.yaml seed=many", 2, ["seed", "integer", "(got 'many')\n"]),
    ("pretrain run.yaml samples=12.8e6", 2, ["'12.8e6'", "write 1.0e-3 and 12_800_000_000"]),
    ("curate curate.yaml rules.3.t=5", 2, ["no list 'rules'", "rules=[...]"]),
    ("curate last.yaml rules.3.t=5", 2, ["'3' is not a position in a list of 2"]),
    ("curate broken.yaml", 2, ["broken.yaml is not valid YAML", "line 2"]),
    ("curate list.yaml", 2, ["expected `key: value` lines, got a list", "configs/demo"]),
    ("curate empty.yaml", 2, ["3 problems", "name", "output", "sources"]),
    ("curate circle.yaml", 2, ["goes in a circle", "Take one of them out"]),
    (
        "curate curate.yaml sources.0.shards=/nowhere --dry-run",
        2,
        ["/nowhere", "Expected a folder"],
    ),
    ("curate curate.yaml sources.0.shards=nothing --dry-run", 2, ["'nothing'", ".tar files"]),
    ("curate last.yaml --dry-run", 2, ["Move rules.0 (metaclip) to the end"]),
    ("curate curate.yaml 'rules=[{name: languge}]'", 2, ["did you mean 'language'?", "Known: "]),
    ("curate curate.yaml 'rules=[{name:language}]'", 2, ["needs a `name`", "`name: X`"]),
    ("curate curate.yaml 'rules=[{name: language, keep: [english]}]'", 2, ["'english'", "Known: "]),
    ("curate curate.yaml 'rules=[{name: regex, keep: [\"(\"]}]'", 2, ["regex"]),
    ("curate curate.yaml 'rules=[{name: metaclip, metadata: no.txt, t: 2}]'", 2, ["no.txt"]),
    ("curate curate.yaml output=other", 2, ["other is not empty", "Give a new folder"]),
    ("index /nowhere", 2, ["/nowhere", "Expected a folder"]),
    ("pretrain run.yaml data.manifest=/nowhere", 1, ["/nowhere", "pairmill curate"]),
    ("pretrain run.yaml objective.name=clap", 2, ["got 'clap', did you mean 'clip'?", "Known: "]),
    ("pretrain run.yaml model=ViT-B-61 --dry-run", 2, ["ViT-B-61", "did you mean 'ViT-B-16'?"]),
    ("pretrain run.yaml global_batch_size=0", 2, ["global_batch_size", "greater than 0", "got 0"]),
    ("pretrain run.yaml 'evaluation={suite: no}'", 2, ["evaluation.interval_samples", "required"]),
    ("evaluate suite.yaml", 2, ["expected CHECKPOINT... CONFIG", "for example"]),
    ("evaluate /nowhere suite.yaml", 1, ["no checkpoint '/nowhere'", "Expected a run folder"]),
    ("evaluate nothing suite.yaml", 1, ["nothing is not a checkpoint", "open_clip_config.json"]),
    ("evaluate ViT-B-23/openai suite.yaml", 1, ["did you mean 'ViT-B-32'?", "ViT-B-32/openai"]),
    ("evaluate raw suite.yaml --part=9/8", 2, ["'9/8'", "expected I/N"]),
    ("export /nowhere out", 1, ["no folder /nowhere", "Expected a run folder"]),
    ("export raw out", 1, ["raw", "checkpoint"]),
    ("export raw out --form=onnx", 2, ["'onnx'", "huggingface"]),
    ("report /nowhere", 2, ["/nowhere is not a folder", "Give a dataset"]),
    ("report nothing", 2, ["report.json", "metrics.jsonl", "results.jsonl"]),
    ("submit train run.yaml", 2, ["did you mean 'pretrain'?"]),
    ("completion tcsh", 2, ["'tcsh'", "bash"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    (folder / "raw").mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(picture, "PNG")
    pair = {"png": picture.getvalue(), "txt": b"a red square"}
    write_tar(folder / "raw/0.tar", [(str(i), pair) for i in range(300)])
    return folder


def message_of(line: str, folder: Path, capsys, monkeypatch) -> tuple[int, str]:
    monkeypatch.chdir(folder)
    try:
        code = main(shlex.split(line))
    except SystemExit as done:
        code = int(done.code or 0)
    printed = capsys.readouterr()
    assert printed.out == ""
    return code, printed.err


@pytest.mark.parametrize(("line", "code", "said"), MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_told_in_words_with_what_to_do(
    line, code, said, folder, capsys, monkeypatch, request
):
    got, message = message_of(line, folder, capsys, monkeypatch)
    if request.config.option.capture == "no":
        with capsys.disabled():
            print(f"\n$ pairmill {line}\n{message.rstrip()}\n[exit {got}]")
    assert got == code
    for words in said:
        assert words in message
    assert "Traceback" not in message
