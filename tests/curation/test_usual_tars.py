"""Tars of the usual kind are read in a faster way than others: the outcome is the same."""

from __future__ import annotations

import io
import random

import numpy as np
import pyarrow as pa
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from curation import rows
from curation.image_header import quick_jpeg_sizes, quick_size
from curation.index import SCHEMA, read_index_file
from curation.scan import InputShard, ScanTask, scan_shard
from tests.curation import test_fuzz as fuzz

NAMES = ["a", "b", "b.seg", "ab", "dir/a", "dir.x/b", "./c", "../up", "/abs", "ä", "x" * 90]
ENDINGS = ["jpg", "JPG", "txt", "json", "png", "seg.png", "cls", "e" * 20, ""]


def index_of(path, folder, columns=()):
    index = folder / f"{path.name}.parquet"
    index.unlink(missing_ok=True)
    shard = InputShard(source="s", shard=path.name, path=str(path), index=index)
    scanned = scan_shard(ScanTask(input=shard, columns=columns))
    return scanned, None if scanned.quarantined else read_index_file(index)


def both_ways(path, folder, columns=()):
    found = index_of(path, folder, columns)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "split_names", lambda *_: None)
        expected = index_of(path, folder, columns)
    assert found == expected
    return found


@pytest.mark.parametrize("make", fuzz.TARS, ids=lambda make: make.__name__)
def test_damaged_tars_give_the_same_index_both_ways(make, tmp_path):
    rng = random.Random(fuzz.SEED)
    for number in range(6):
        path = tmp_path / f"{number}.tar"
        make(rng, path, number)
        for columns in ((), ("image_hash",), ("decodable",)):
            both_ways(path, tmp_path, columns)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(NAMES), st.sampled_from(ENDINGS), st.integers(0, 3)), max_size=12
    ),
    st.integers(0, 10**6),
)
def test_any_names_give_the_same_index_both_ways(tmp_path_factory, members, seed):
    folder, rng = tmp_path_factory.mktemp("t"), random.Random(seed)
    contents = [fuzz.picture("JPEG", 1), b"text", "ä".encode(), rng.randbytes(3000)]
    path = folder / "a.tar"
    fuzz.write(path, [(f"{name}.{end}", contents[which]) for name, end, which in members])
    both_ways(path, folder)
    both_ways(path, folder, ("image_hash",))


@pytest.mark.parametrize("num_samples", [1, 700])
def test_a_usual_tar_needs_no_python_loop_over_its_names(num_samples, tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("the grouper was asked")

    rng, members = random.Random(3), []
    for n in range(num_samples):
        caption = rng.choice(["plain", "schön", ""]).encode()
        size = rng.choice([0, 300, 30_000, 700_000 if n % 50 == 0 else 10])
        picture = fuzz.picture("JPEG", n % 5) + bytes([n % 251]) * size
        members += [(f"{n:05d}.jpg", picture), (f"{n:05d}.json", b"{}"), (f"{n:05d}.txt", caption)]
    path = tmp_path / "a.tar"
    fuzz.write(path, members)
    scanned, table = both_ways(path, tmp_path, ("image_hash",))
    monkeypatch.setattr(rows.SampleGrouper, "add_names", refuse)
    assert index_of(path, tmp_path, ("image_hash",)) == (scanned, table)
    assert table.schema.names == [*SCHEMA.names, "image_hash"]
    assert table["caption"].to_pylist() == [data.decode() for _, data in members[2::3]]
    wanted = [xxhash.xxh3_128_digest(data) for _, data in members[::3]]
    assert table["image_hash"].to_pylist() == wanted
    assert set(table["width"].to_pylist()) == {48}
    assert isinstance(table, pa.Table)


def test_a_tar_of_other_captions_or_pictures_with_long_headers_is_read_the_same(tmp_path):
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "long " * 2000
    Image.new("RGB", (64, 32)).save(file, "JPEG", exif=exif)
    members = []
    for n in range(600):
        members += [(f"{n}.jpg", file.getvalue()), (f"{n}.json", b'{"caption": "from json"}')]
        if n % 3 == 0:
            members.append((f"{n}.txt", b"\xff" if n % 2 else b"text"))
    path = tmp_path / "a.tar"
    fuzz.write(path, members)
    scanned, table = both_ways(path, tmp_path, ("image_hash",))
    assert scanned.info.unreadable == {"caption not utf-8": 100}
    assert table["caption"].to_pylist()[:4] == ["text", "from json", "from json", None]
    assert set(table["width"].to_pylist()) == {64}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 900), st.integers(0, 255)), max_size=9))
def test_sizes_of_many_jpegs_are_those_of_each(changes):
    images = []
    for shade, at, value in changes:
        data = bytearray(fuzz.picture("JPEG", shade))
        data[at % len(data)] = value
        images.append(bytes(data[: max(at, 2)] if value % 4 == 0 else data))
    joined = b"".join(images)
    ends = np.cumsum([len(i) for i in images], dtype=np.int64)
    starts = ends - np.array([len(i) for i in images], np.int64)
    expected = [(quick_size(i) if i[:2] == b"\xff\xd8" else None) or (0, 0) for i in images]
    found = quick_jpeg_sizes(np.frombuffer(joined, np.uint8), starts, ends)
    assert list(map(tuple, found.tolist())) == expected
