"""A run that is killed, signalled, damaged, filled up and cut off, and started again by the same
line each time, ends with the same weights and the same log as one that was left alone.

`make soak` does 20 faults; PAIRMILL_TEST_SEED=N repeats one choice of them.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

from configs.load import to_yaml
from pretrain.checkpoint import read_record, usable_checkpoints
from tests import warm
from tests.pretrain.conftest import make_config, make_dataset
from tests.pretrain.test_train import equal, rows, weights
from tests.s3 import s3_server

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
SAVE_PLACES = {"write": 2, "report": 2, "export": 1, "seal": 1, "rename": 1}  # ranks that pass it
KILLED, STOPPED = -signal.SIGKILL, 75
STOP = {"kind": "signal", "number": signal.SIGTERM, "rank": 0, "step": 4}


def seed() -> int:
    return int(os.environ.get("PAIRMILL_TEST_SEED") or random.SystemRandom().randrange(10**6))


def start(config: Path, fault: dict) -> tuple[list[int], str]:
    """Run both ranks with a fault; return their exit codes and what the rank that it hit said.

    Where one has gone, the others have 60 seconds to notice, as under a launcher.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        warm.start("tests.pretrain.scripts.chaos", [str(config), json.dumps(fault)], **common,
                   RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in range(2)
    ]  # fmt: skip
    hit = ranks[fault.get("rank", 0)]
    said = hit.communicate(timeout=600)[0]
    codes = []
    for rank in ranks:
        try:
            codes.append(rank.wait(timeout=60))
        except subprocess.TimeoutExpired:
            rank.send_signal(signal.SIGKILL)
            codes.append(rank.wait())
    return codes, said


def damage(run: Path, rng: random.Random, how: str) -> str:
    """Cut a file of the newest checkpoint, or turn one of its bits; return its name."""
    newest = usable_checkpoints(run / "checkpoints")[0]
    name = rng.choice(sorted(read_record(newest).files))
    data = bytearray((newest / name).read_bytes())
    if how == "cut":
        data = data[: len(data) // 2]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    (newest / name).write_bytes(data)
    return newest.name


def faults(rng: random.Random, number: int) -> list[dict]:
    """`number` faults in random order; of 20 at least 3 of each kind of kill."""

    def kill_in_save() -> dict:
        place = rng.choice(sorted(SAVE_PLACES))
        return {"kind": "save", "place": place, "rank": rng.randrange(SAVE_PLACES[place])}

    def signalled(signum: int, **more: object) -> dict:
        return {"kind": "signal", "number": signum, "rank": rng.randrange(2),
                "step": rng.randrange(1, 4), **more}  # fmt: skip

    every = [
        *(kill_in_save() for _ in range(4)),
        *({"kind": "latest", "rank": 0} for _ in range(3)),
        *({"kind": "fetch", "rank": rng.randrange(2), "step": rng.randrange(2)} for _ in range(3)),
        *(signalled(signal.SIGKILL) for _ in range(3)),
        signalled(signal.SIGTERM), signalled(signal.SIGTERM, again=True),
        signalled(signal.SIGUSR1),
        {"kind": "damage", "how": "cut"}, {"kind": "damage", "how": "bit"},
        {"kind": "damage", "how": "bit"},
        {"kind": "fill", "rank": 0, "step": 2},
    ]  # fmt: skip
    if number < len(every):  # in CI: in a save, or before `latest`, or in a fetch, and two others
        return rng.sample(every[:10], 1) + rng.sample(every[10:19], number - 1)
    rng.shuffle(every)
    return every


def check_outcome(fault: dict, codes: list[int], said: str) -> None:
    hit = codes[fault.get("rank", 0)]
    if fault["kind"] == "signal" and fault["number"] != signal.SIGKILL:
        assert codes == [STOPPED, STOPPED], said
    elif fault["kind"] == "fill":
        assert "No space left on device" in said
    else:
        assert hit == KILLED, said
        assert 0 not in codes


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 MiB; a folder where this is not root's machine."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    is_mounted = os.geteuid() == 0 and subprocess.run(command, check=False).returncode == 0
    yield folder, is_mounted
    if is_mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def disturb(number: int, steps: int, model_file, tmp_path, small_disk, monkeypatch) -> None:
    chosen = seed()
    print(f"PAIRMILL_TEST_SEED={chosen}")
    rng, (disk, is_mounted) = random.Random(chosen), small_disk
    manifest = make_dataset(tmp_path / "dataset", [12] * 8)
    with s3_server(monkeypatch) as s3:
        url = s3.upload(manifest.folder, "bucket/dataset")
        cache = tmp_path / "cache"
        data = {"manifest": url, "window_shards": 2, "num_workers": 0,
                "remote": {"folder": str(cache)}}  # fmt: skip
        settings = {
            "data": data, "samples": 16 * steps, "ema": {"half_life_samples": 64},
            "engine": {"zero_stage": rng.randrange(3), "num_threads": 1},
            "intervals": {"log_samples": 16, "checkpoint_samples": 32, "keep_checkpoints": 2},
        }  # fmt: skip
        paths = {}
        for name, folder in {"whole": tmp_path / "whole", "run": disk / "run"}.items():
            config = make_config(manifest, model_file, folder, **settings)
            paths[name] = tmp_path / f"{name}.yaml"
            paths[name].write_text(to_yaml(config))
        codes, said = start(paths["whole"], {"kind": "none"})
        assert codes == [0, 0], said
        run, damaged, last = disk / "run", set(), None
        for fault in faults(rng, number):
            began = time.monotonic()
            shutil.rmtree(cache, ignore_errors=True)
            if fault["kind"] == "fill" and not is_mounted:
                print(fault, "left out: no disk of its own can be mounted here")
                continue
            if fault["kind"] == "damage":
                # A start has to meet the last damage, and to find a checkpoint before this one.
                if last == "damage" or len(usable_checkpoints(run / "checkpoints")) < 2:
                    check_outcome(STOP, *start(paths["run"], STOP))
                damaged.add(damage(run, rng, fault["how"]))
            else:
                codes, said = start(paths["run"], fault)
                check_outcome(fault, codes, said)
                (run / "filler").unlink(missing_ok=True)
            last = fault["kind"]
            print(f"{fault} in {time.monotonic() - began:.0f} s")
        codes, said = start(paths["run"], {"kind": "none"})
        assert codes == [0, 0], said
    set_aside = {path.name for path in (run / "checkpoints").glob("damaged-*")}
    assert all(any(name in aside for aside in set_aside) for name in damaged)
    assert equal(weights(run), weights(tmp_path / "whole"))
    newest = usable_checkpoints(run / "checkpoints")[0]
    assert (run / "checkpoints/latest").read_text().strip() == newest.name
    whole = tmp_path / "whole/checkpoints" / newest.name
    assert equal(weights(newest / "model_ema"), weights(whole / "model_ema"))
    assert rows(run) == rows(tmp_path / "whole")
    assert rows(run)[-1]["skipped_steps"] == 1  # the one that is not finite


def test_a_disturbed_run_ends_as_an_undisturbed_one(model_file, tmp_path, small_disk, monkeypatch):
    disturb(3, 12, model_file, tmp_path, small_disk, monkeypatch)


@pytest.mark.soak
def test_twenty_faults_later_a_run_ends_as_an_undisturbed_one(
    model_file, tmp_path, small_disk, monkeypatch
):
    disturb(20, 60, model_file, tmp_path, small_disk, monkeypatch)
