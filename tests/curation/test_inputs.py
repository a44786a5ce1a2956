"""What a source may be: gzips, remote storage, layouts of other tools; where captions may be."""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import ConfigError, UsageError
from curation.captions import parse_place
from curation.index import index_path, read_index
from curation.job import curate, dry_run, index
from curation.scan import InputShard, ScanTask, scan_shard
from curation.shards import read_batches, read_members
from curation.sources import find_shards, split_list
from curation.spans import open_tar
from tests.s3 import s3_server


def scan(path: Path, **changes):
    shard = InputShard(source="s", shard=path.name, path=str(path), index=index_path(path))
    return scan_shard(ScanTask(input=shard, **changes))


def data_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("*.tar"))}


@pytest.fixture(scope="module")
def s3(pool):
    """The pool in a real S3 server: (its folder's URL, options that reach it, the server)."""
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as server:
        url = server.upload(pool / "train", "pool/train")
        options = {"endpoint_url": server.endpoint, "key": "test", "secret": "test"}
        yield url, options, server


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
class TestJobs:
    def test_shards_in_s3_give_the_bytes_that_local_ones_do(
        self, finished, configure, s3, tmp_path
    ):
        url, options, server = s3
        source = {"name": "pool", "shards": f"{url}/{{00000..00005}}.tar"}
        config = configure(
            tmp_path, sources=[{**source, "storage_options": options}], index_dir=None
        )
        assert "6 shards" in dry_run(config)
        curate(config)
        assert data_of(config.output_dir) == data_of(finished[0].output_dir)
        text = (config.output_dir / "config.yaml").read_text()
        assert "s3://pool" in text
        assert "storage_options" not in text
        indexes = list((config.work_dir / "indexes").rglob("*.parquet"))
        assert len(indexes) == 6
        assert server.fetched

    def test_a_finished_prefix_in_s3_that_changed_is_scanned_again(
        self, configure, s3, tars, tmp_path
    ):
        _, options, server = s3
        folder = tmp_path / "in"
        tars.write(folder / "a.tar", tars.sample("a", "one red"))
        url = server.upload(folder, "pool/changing")
        sources = [{"name": "pool", "shards": url, "storage_options": options}]
        config = configure(tmp_path, sources=sources, rules=[], index_dir=None, stages=["scan"])
        assert curate(config).counts["num_read"] == 1
        tars.write(folder / "a.tar", [*tars.sample("a", "one"), *tars.sample("b", "two")])
        server.upload(folder, "pool/changing")
        assert curate(config).counts["num_read"] == 2

    def test_gzipped_shards_give_the_samples_that_plain_ones_do(
        self, finished, configure, pool, tmp_path
    ):
        packed = tmp_path / "in"
        packed.mkdir()
        for path in (pool / "train").glob("*.tar"):
            (packed / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        # A gzip that says it is a tar is one all the same.
        (packed / "00003.tar.gz").rename(packed / "00003.tar")
        config = configure(tmp_path, sources=[{"name": "pool", "shards": str(packed)}], rules=[])
        report = curate(config)
        assert report.counts["num_kept"] == 240
        captions, pictures = [], set()
        for shard in report.manifest.shards:
            content = shard.path.read_bytes()
            for row in read_index(shard.path).to_pylist():
                captions.append(row["caption"])
                offset = row["image_offset"]
                pictures.add(content[offset : offset + row["image_size"]])
        expected = [
            caption for path in (pool / "train").glob("*.tar") for caption in texts_of(path)
        ]
        assert sorted(captions) == sorted(expected)
        assert all(picture.startswith(b"\x89PNG") for picture in pictures)
        assert not list(config.work_dir.glob("plan-*/unpacked"))
        (config.output_dir / "00001.tar").unlink()
        before = data_of(config.output_dir)
        curate(config)
        assert before.items() < data_of(config.output_dir).items()

    def test_a_global_shuffle_mixes_all_shards_whatever_the_block(self, configure, tmp_path):
        outputs = []
        for number in (2, 5):
            folder = tmp_path / str(number)
            layout = {"samples_per_shard": 60, "shards_per_block": number, "shuffle": "global"}
            config = configure(folder, rules=[], write=layout)
            manifest = curate(config).manifest
            assert manifest.samples_per_shard.tolist() == [60] * 4
            outputs.append(data_of(config.output_dir))
            uids = read_index(manifest.path(0))["uid"].to_pylist()
            where = {
                path.stem
                for path in (config.work_dir / "decisions").rglob("*.parquet")
                if set(uids) & set(read_uids(path))
            }
            assert len(where) == 6
        assert outputs[0] == outputs[1]

    def test_several_captions_reach_the_dataset(self, configure, tars, tmp_path):
        fields = {"caption": "from json", "alt": ["one", "two", "a cat"]}
        members = [
            ("a.jfif", tars.png()), ("a.txt", b"a cat"), ("a.json", json.dumps(fields).encode()),
            ("b.input.PNG", tars.png(9, 9)), ("b.txt", b"a dog"),
        ]  # fmt: skip
        tars.write(tmp_path / "in" / "0.tar", members)
        config = configure(
            tmp_path,
            sources=[{"name": "in", "shards": str(tmp_path / "in")}],
            rules=[],
            captions=["txt|json:caption", "json:alt"],
        )
        rows = read_index(curate(config).manifest.path(0)).to_pylist()
        found = {row["key"]: (row["caption"], row["captions"]) for row in rows}
        assert found == {"a": ("a cat", ["a cat", "one", "two"]), "b": ("a dog", None)}
        assert {row["image_ext"] for row in rows} == {"jfif", "input.png"}


def texts_of(path: Path) -> list[str]:
    with tarfile.open(path) as tar:
        return [
            tar.extractfile(member).read().decode()
            for member in tar.getmembers()
            if member.name.endswith(".txt")
        ]


def read_uids(path: Path):
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=["uid"])["uid"].to_pylist()


@pytest.mark.parametrize(
    ("places", "captions", "problem"),
    [
        (["txt"], ["line one\nline two"], None),
        (["txt#lines"], ["line one", "line two"], None),
        (["json:caption"], ["C"], None),
        (["json:deep.er", "txt"], ["D", "line one\nline two"], None),
        (["json:list"], ["x", "y"], None),
        (["json:missing|json:caption"], ["C"], None),
        (["json:missing"], [], "no caption"),
        (["alt.txt"], ["other"], None),
        (["json:number"], [], "no caption"),
        (["missing|txt#lines", "json:caption"], ["line one", "line two", "C"], None),
    ],
)
def test_captions_are_found_where_a_job_says(tars, tmp_path, places, captions, problem):
    fields = {"caption": "C", "deep": {"er": "D"}, "list": ["x", 1, "y", "x"], "number": 3}
    members = [
        ("a.png", tars.png()),
        ("a.txt", b"line one\nline two"),
        ("a.alt.txt", b"other"),
        ("a.json", json.dumps(fields).encode()),
    ]
    path = tars.write(tmp_path / "a.tar", members)
    scan(path, captions=tuple(places))
    (row,) = read_index(path).to_pylist()
    found = row["captions"] or ([] if row["caption"] is None else [row["caption"]])
    assert (found, row["problem"]) == (captions, problem)


@pytest.mark.parametrize("text", ["", "json:", ":x", "txt#words", "txt#lines:x"])
def test_what_is_no_place_of_captions_is_refused(text, configure, tmp_path):
    with pytest.raises(UsageError, match="a place of captions"):
        parse_place(text)
    with pytest.raises(ConfigError, match="captions"):
        configure(tmp_path, captions=[text])


def test_lists_of_open_clip_are_split_and_chained_urls_are_not(tars, tmp_path):
    assert split_list("a/{0..9}.tar::b.tar.gz::c") == ["a/{0..9}.tar", "b.tar.gz", "c"]
    assert split_list("simplecache::s3://b/a.tar") == ["simplecache::s3://b/a.tar"]
    for name in ("a/0.tar", "a/1.tar", "b/0.tar"):
        tars.write(tmp_path / name, [])
    found = find_shards("s", [f"{tmp_path}/a/{{0..1}}.tar::{tmp_path}/b/0.tar"])
    assert [shard.shard for shard in found] == ["a/0.tar", "a/1.tar", "b/0.tar"]


def test_the_layouts_of_img2dataset_and_datacomp_are_folders_of_tars(tars, tmp_path):
    for name in ("00000.tar", "00001.tar", "sub/00002.tar"):
        tars.write(tmp_path / name, tars.sample("a", "x"))
    for name in ("00000.parquet", "00000_stats.json", "sub/00002.npz", "sample_ids.npy"):
        (tmp_path / name).touch()
    found = [shard.shard for shard in find_shards("s", [str(tmp_path)])]
    assert found == ["00000.tar", "00001.tar", "sub/00002.tar"]


def test_patterns_of_remote_storage_mean_what_local_ones_do(s3, tmp_path):
    url, options, _ = s3
    expected = [f"{n:05d}.tar" for n in range(6)]
    for pattern in (url, f"{url}/*.tar", f"{url}/{{00000..00005}}.tar"):
        found = find_shards("s", [pattern], index_dir=tmp_path, storage=options)
        assert [shard.shard for shard in found] == expected
        assert {shard.path for shard in found} == {f"{url}/{name}" for name in expected}
    cases = [
        (f"{url}/{{00004..00007}}.tar", "names 2 shards that are not there"),
        (f"{url}/none/*.tar", "nothing matches"),
        ("nonsense://a/b.tar", "cannot be read here"),
        ("pipe:aws s3 cp s3://b/a.tar -", "is a command"),
    ]
    for pattern, message in cases:
        with pytest.raises(UsageError, match=message):
            find_shards("s", [pattern], index_dir=tmp_path, storage=options)
    with pytest.raises(UsageError, match="mixes local paths and URLs"):
        find_shards("s", [url, str(tmp_path)], index_dir=tmp_path, storage=options)
    with pytest.raises(UsageError, match="needs a local folder"):
        find_shards("s", [url], storage=options)
    with pytest.raises(UsageError, match="is a URL"):
        index([url])


def test_a_dataset_is_not_written_to_a_url(configure, tmp_path):
    with pytest.raises(ConfigError, match="written to a folder"):
        configure(tmp_path, output="s3://bucket/dataset")


def test_a_lost_remote_shard_is_quarantined(s3, tmp_path):
    url, options, _ = s3
    task = ScanTask(
        input=InputShard(
            source="s",
            shard="x.tar",
            path=f"{url}/x.tar",
            index=tmp_path / "x.parquet",
            storage=tuple(options.items()),
        )
    )
    assert "No such file" in scan_shard(task).quarantined


SIZES = st.lists(st.integers(0, 3_000_000) | st.integers(0, 9000), max_size=6)


@given(sizes=SIZES, long=st.booleans(), packed=st.booleans())
def test_all_ways_to_read_a_tar_find_the_same_members_and_bytes(
    tmp_path_factory, tars, sizes, long, packed
):
    folder = tmp_path_factory.mktemp("t")
    name = "n" * 150 if long else "n"
    contents = [bytes([n + 65]) * size for n, size in enumerate(sizes)]
    members = [(f"{name}{n}.bin", data) for n, data in enumerate(contents)]
    path = tars.write(folder / "a.tar", members, tarfile.PAX_FORMAT)
    with open_tar(path) as reader:
        expected = list(read_members(reader))
    if packed:
        path = folder / "a.tar.gz"
        path.write_bytes(gzip.compress((folder / "a.tar").read_bytes(), 1))
    with open_tar(path) as reader:
        found = []
        for batch in read_batches(reader, whole=True):
            found += batch.members()
            for row, member in enumerate(batch.members()):
                position, size = batch.positions[row], batch.sizes[row]
                assert position + size <= batch.limits[row]
                data = bytes(batch.data[position : position + size])
                assert data == contents[len(found) - len(batch.names) + row], member.name
    assert found == expected
    shutil.rmtree(folder)
