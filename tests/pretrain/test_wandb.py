"""Weights & Biases: the real library, offline."""

import json
import struct
import sys
from pathlib import Path

import pytest

from configs.errors import ConfigError
from pretrain.config import WandbConfig
from pretrain.wandb_log import WandbLog, check_wandb
from tests.pretrain.conftest import make_config
from tests.pretrain.test_train import train

pytest.importorskip("wandb", reason="needs the extra pairmill[wandb]")
pytestmark = pytest.mark.filterwarnings("ignore")


def records(file: Path) -> list:
    """The records of an offline run: LevelDB's log format, blocks of 32 KiB, protobuf inside."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, found, parts = file.read_bytes(), 7, [], b""
    while position + 7 <= len(data):
        left = 32_768 - position % 32_768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += 7
        parts += data[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or the last of several
            found.append(Record.FromString(parts))
            parts = b""
    return found


def history(run: Path) -> list[dict[str, float]]:
    """The logged rows of all parts of the run, in order."""
    rows = []
    for folder in sorted((run / "wandb").glob("offline-run-*")):
        for record in records(next(folder.glob("run-*.wandb"))):
            items = record.history.item if record.WhichOneof("record_type") == "history" else ()
            row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
            rows += [row] if row else []
    return rows


@pytest.mark.distributed
@pytest.mark.slow
def test_a_continued_run_goes_on_in_the_same_run_of_wandb_with_every_row(
    dataset, model_file, tmp_path
):
    config = make_config(dataset, model_file, tmp_path / "run", samples=96,
                         telemetry={"wandb": {"project": "p", "mode": "offline"}})  # fmt: skip
    run = train(config, stops=(3, 0))
    identity = (run / "wandb_id").read_text().strip()
    folders = sorted((run / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(folder.name.endswith(identity) for folder in folders)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    sent = history(run)
    assert [row["samples_seen"] for row in sent] == [16, 32, 48, 64, 80, 96]
    for row, expected in zip(sent, logged, strict=True):
        assert {name: row[name] for name in expected} == expected


def test_what_wandb_does_not_take_is_said_once_and_does_not_stop_training(tmp_path, capsys):
    (tmp_path / "wandb_id").write_text("no id: it has spaces/and slashes\n")
    log = WandbLog(tmp_path, "name", {}, WandbConfig(mode="offline"))
    log.log({"loss": 1.0, "samples_seen": 16})
    log.close()
    said = capsys.readouterr().err
    assert said.count("WARNING: W&B gets no more rows") == 1
    assert "metrics.jsonl has every row" in said


def test_without_the_extra_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    check_wandb(None)
    with pytest.raises(ConfigError, match=r"pip install 'pairmill\[wandb\]'"):
        check_wandb(WandbConfig())
