from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from configs.errors import DataError, UsageError
from curation.manifest import Shard, manifest_of_tars, read_index, read_manifest, write_manifest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tars, tmp_path):
    for number in range(3):
        members = [s for i in range(number + 1) for s in tars.sample(f"{i}", f"caption {i}")]
        tars.write(tmp_path / "data" / f"{number:05d}.tar", members)
    return tmp_path / "data"


def test_tars_that_others_wrote_get_indexes_and_a_manifest_in_place(folder):
    before = {p.name: p.read_bytes() for p in folder.glob("*.tar")}
    made = manifest_of_tars(folder)
    manifest = read_manifest(folder)
    assert manifest == made
    assert (manifest.num_shards, manifest.num_samples) == (3, 6)
    assert manifest.samples_per_shard.tolist() == [1, 2, 3]
    assert {p.name: p.read_bytes() for p in folder.glob("*.tar")} == before
    for shard in manifest.shards:
        assert read_index(shard.path, ["key"]).num_rows == shard.num_samples
        assert shard.digest == f"xxh3-128:{xxhash.xxh3_128_hexdigest(shard.path.read_bytes())}"
    assert manifest.path(1) == folder / "00001.tar"
    assert manifest.shards[-1] == manifest.shards[1:][-1] == list(manifest.shards)[2]


def test_a_manifest_reads_back_as_written_and_its_digest_follows_its_shards(tmp_path):
    shards = [
        Shard(tmp_path / "a.tar", 3, 10, "xxh3-128:00"),
        Shard(Path("/far/b.tar"), 4, 20, "x"),
    ]
    written = write_manifest(tmp_path, shards, name="n", config_digest="c", parents=["p"])
    read = read_manifest(tmp_path, check_files=False)
    assert read == written
    assert list(read.shards) == shards
    other = write_manifest(tmp_path, shards[::-1], name="n")
    assert other.digest != written.digest


def test_what_is_wrong_with_a_dataset_folder_is_said(folder, tmp_path):
    with pytest.raises(DataError, match="no such dataset folder"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"no manifest\.json"):
        read_manifest(folder)
    manifest_of_tars(folder)
    path = folder / "manifest.json"
    good = json.loads(path.read_text())
    path.write_text("[]")
    with pytest.raises(DataError, match="not a manifest"):
        read_manifest(folder)
    path.write_text(json.dumps({**good, "version": 2}))
    with pytest.raises(DataError, match="version 2"):
        read_manifest(folder)
    path.write_text(json.dumps({**good, "num_samples": 7}))
    with pytest.raises(DataError, match="do not belong together"):
        read_manifest(folder)
    path.write_text(json.dumps(good))
    shard = folder / "00001.tar"
    shard.write_bytes(shard.read_bytes() + b"more")
    with pytest.raises(DataError, match=r"00001\.tar: .* bytes"):
        read_manifest(folder)
    shard.unlink()
    with pytest.raises(DataError, match="No such file"):
        read_manifest(path)
    with pytest.raises(UsageError, match=r"no \.tar"):
        manifest_of_tars(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("curation.manifest", "ray"),
        ("curation.shards", "ray"),
        ("curation.manifest", "torch"),
        ("curation.job", "torch"),
    ],
)
def test_imports_stay_light(module, unwanted):
    code = f"import sys, {module}; sys.exit({unwanted!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
