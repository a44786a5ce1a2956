from __future__ import annotations

import hashlib
import io
import os
import struct
import tarfile
import tracemalloc
import warnings
import zlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import xxhash
from PIL import Image

from configs.errors import DataError, UsageError
from curation.image_header import MAX_IMAGE_BYTES, read_image_size
from curation.index import index_path, read_index, read_index_info, remove_index_leftovers
from curation.manifest import manifest_of_tars
from curation.scan import InputShard, ScanTask, scan_shard
from curation.sources import find_shards


def scan(path: Path, **changes):
    shard = InputShard(source="s", shard=path.name, path=str(path), index=index_path(path))
    return scan_shard(ScanTask(input=shard, **changes))


def encoded(format: str, size=(37, 23)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (10, 200, 30)).save(file, format)
    return file.getvalue()


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + bytes(50)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_width_and_height_come_from_the_header(format):
    data = encoded(format)
    assert read_image_size(lambda n: data[:n], len(data), 10_000) == ((37, 23), None)
    assert read_image_size(lambda n: data[:n], len(data), 100) == ((37, 23), "too many pixels")


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 50}])
def test_webp_of_either_kind_is_read_without_pillow(options):
    file = io.BytesIO()
    Image.new("RGB", (300, 77)).save(file, "WEBP", **options)
    data = file.getvalue()
    assert read_image_size(lambda n: data[:n], len(data), 10**6) == ((300, 77), None)


def test_a_long_exif_block_before_the_size_is_read_over():
    exif = Image.Exif()
    exif[0x010E] = "x" * 30_000
    file = io.BytesIO()
    Image.new("RGB", (64, 48)).save(file, "JPEG", exif=exif, icc_profile=bytes(60_000))
    data = file.getvalue()
    assert read_image_size(lambda n: data[:n], len(data), 10**6) == ((64, 48), None)


def test_a_pixel_bomb_is_refused_from_its_header_without_a_warning():
    data = png_header(60_000, 60_000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        size, problem = read_image_size(lambda n: data[:n], len(data), 100_000_000)
    assert (size, problem) == ((60_000, 60_000), "too many pixels")
    assert Image.MAX_IMAGE_PIXELS is not None


def test_every_unreadable_sample_has_a_row_that_says_why(tars, tmp_path):
    good = tars.png()
    members = [
        *tars.sample("good", "a cat"),
        ("noimage.txt", b"text"),
        ("nocaption.png", good),
        ("latin.png", good), ("latin.txt", "caf\xe9".encode("latin-1")),
        ("empty.png", b""), ("empty.txt", b"t"),
        ("bad.jpg", b"this is no picture"), ("bad.txt", b"t"),
        ("bomb.png", png_header(60_000, 60_000)), ("bomb.txt", b"t"),
        ("badjson.png", good), ("badjson.json", b"{"),
        ("fromjson.png", good), ("fromjson.json", b'{"caption": "from the json"}'),
        ("surrogate.png", good), ("surrogate.json", b'{"caption": "\\ud800"}'),
        ("long.png", good), ("long.txt", b"x" * (1 << 20) + b"x"),
        ("../up.png", good), ("/abs.txt", b"x"),
    ]  # fmt: skip
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE):
        link = tarfile.TarInfo("link.txt")
        link.type, link.linkname = kind, "/etc/passwd"
        members.append(link)
    path = tars.write(tmp_path / "a.tar", members, tarfile.GNU_FORMAT)
    info = scan(path).info
    rows = {row["key"]: row for row in read_index(path).to_pylist()}
    problems = {key: row["problem"] for key, row in rows.items()}
    assert problems == {
        "good": None,
        "noimage": "no image",
        "nocaption": "no caption",
        "latin": "caption not utf-8",
        "empty": "empty image",
        "bad": "bad image header",
        "bomb": "too many pixels",
        "badjson": "bad json",
        "fromjson": None,
        "surrogate": "caption not utf-8",
        "long": "caption too long",
    }
    assert rows["fromjson"]["caption"] == "from the json"
    assert info.num_samples == len(rows)
    assert sum(info.unreadable.values()) == len(rows) - 2
    assert info.ignored_members == 5
    assert info.damage is None


def test_the_index_gives_the_bytes_of_every_member_and_the_documented_uid(tars, tmp_path):
    path = tars.write(tmp_path / "a.tar", tars.sample("k", "a cat"))
    scan(path)
    (row,) = read_index(path).to_pylist()
    data = path.read_bytes()
    assert data[row["image_offset"] :][: row["image_size"]] == tars.png()
    spans = zip(row["member_ext"], row["member_offset"], row["member_size"], strict=True)
    contents = {ext: data[offset : offset + size] for ext, offset, size in spans}
    assert contents["txt"] == b"a cat"
    assert row["uid"] == hashlib.blake2b(b"s\0a.tar\0k\x000", digest_size=16).digest()
    assert (row["width"], row["height"], row["image_ext"]) == (32, 32, "png")


def test_a_truncated_sample_is_a_row_and_the_damage_is_named(tars, tmp_path):
    path = tars.write(tmp_path / "a.tar", [*tars.sample("a", "one"), *tars.sample("b", "two")])
    with tarfile.open(path) as tar:
        cut = tar.getmember("b.txt").offset_data + 1
    path.write_bytes(path.read_bytes()[:cut])
    info = scan(path).info
    assert read_index(path)["problem"].to_pylist() == [None, "truncated"]
    assert "truncated at byte" in info.damage


def test_a_second_scan_makes_nothing_and_a_changed_tar_is_scanned_again(tars, tmp_path):
    path = tars.write(tmp_path / "a.tar", tars.sample("a", "one"))
    first = scan(path)
    written = index_path(path).stat().st_mtime_ns
    assert scan(path) == first
    assert index_path(path).stat().st_mtime_ns == written
    tars.write(
        path, [*tars.sample("a", "one"), *(s for k in "bcde" for s in tars.sample(k, "two"))]
    )
    assert scan(path).num_samples == 5
    index_path(path).write_bytes(b"rubbish")
    assert scan(path).num_samples == 5
    assert scan(path, max_image_pixels=10).info.unreadable == {"too many pixels": 5}


def test_what_is_not_a_tar_is_quarantined_with_the_reason(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"<html>not found</html>" * 100)
    assert "not a tar" in scan(path).quarantined
    assert not index_path(path).exists()
    assert "No such file" in scan(tmp_path / "b.tar").quarantined


def test_reading_an_index_that_is_not_there_says_how_to_make_one(tmp_path):
    with pytest.raises(DataError, match="pairmill index"):
        read_index(tmp_path / "a.tar")
    assert read_index_info(tmp_path / "a.index.parquet") is None


def test_a_side_that_no_column_holds_is_too_many_pixels(tars, tmp_path):
    members = [("a.png", png_header(2**32 - 1, 1)), ("a.txt", b"t")]
    path = tars.write(tmp_path / "a.tar", members)
    assert scan(path, max_image_pixels=10**12).info.unreadable == {"too many pixels": 1}
    assert read_index(path).select(["width", "height"]).to_pylist() == [
        {"width": None, "height": None}
    ]


def test_another_tar_of_the_same_size_gets_its_own_index(tars, tmp_path):
    path = tars.write(tmp_path / "a.tar", tars.sample("a", "one"))
    first = scan(path)
    tars.write(path, tars.sample("a", "two"))
    second = scan(path)
    assert first.info.num_bytes == second.info.num_bytes
    assert first.info.fingerprint != second.info.fingerprint
    assert read_index(path)["caption"].to_pylist() == ["two"]


def test_pictures_first_and_captions_after_are_paired_and_a_repeated_key_never_is(tars, tmp_path):
    a, b = tars.png(8, 8), tars.png(9, 9)
    members = [("k.png", a), ("z.png", b), ("k.txt", b"of k"), ("z.txt", b"of z")]
    scan(tars.write(tmp_path / "a.tar", members))
    rows = read_index(tmp_path / "a.tar").to_pylist()
    assert [(r["width"], r["caption"]) for r in rows] == [(8, "of k"), (9, "of z")]
    members = [("k.txt", b"A"), ("k.json", b"{}"), ("z.txt", b"Z"), ("k.png", b), ("k.txt", b"B")]
    scan(tars.write(tmp_path / "b.tar", members))
    rows = read_index(tmp_path / "b.tar").to_pylist()
    found = [(r["width"], r["caption"], r["problem"]) for r in rows]
    assert found == [(None, "A", "no image"), (None, "Z", "no image"), (9, "B", None)]


def test_captions_beyond_a_shards_budget_are_too_long(tars, tmp_path, monkeypatch):
    monkeypatch.setattr("curation.rows.MAX_SHARD_CAPTIONS", 12)
    members = [
        (f"{i}.{e}", d) for i in range(3) for e, d in (("png", tars.png()), ("txt", b"12345"))
    ]
    assert scan(tars.write(tmp_path / "a.tar", members)).info.unreadable == {"caption too long": 1}
    path = tars.write(tmp_path / "b.tar", [("a.png", tars.png()), ("a.json", long_json())])
    assert scan(path).info.unreadable == {"caption too long": 1}


def long_json() -> bytes:
    return b'{"caption": "' + b"x" * (1 << 20) + b'x"}'


def test_failing_storage_is_an_error_and_no_quarantine(tmp_path):
    path = tmp_path / "a.tar"
    path.symlink_to("/proc/self/mem")  # opens, and every read from its start is an I/O error
    if not path.exists():
        pytest.skip("needs /proc/self/mem")
    with pytest.raises(DataError, match=r"a\.tar cannot be read now \(Input/output error\)"):
        scan(path)


def test_a_path_that_is_not_utf_8_is_refused_by_name(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.tar")).write_bytes(b"")
    with pytest.raises(UsageError, match=r"caf\\xe9\.tar: the path is not UTF-8"):
        find_shards("s", [str(tmp_path)])
    with pytest.raises(UsageError, match="not UTF-8"):
        manifest_of_tars(tmp_path)


def test_unfinished_indexes_of_killed_runs_are_removed_once_they_are_old(tmp_path):
    old, new = (tmp_path / f".{n}.index.parquet.tmp-1-ab" for n in "ab")
    other = tmp_path / ".thesis.tex"
    for path in (old, new, other):
        path.touch()
    os.utime(old, (0, 0))
    os.utime(other, (0, 0))
    remove_index_leftovers([tmp_path, tmp_path / "nowhere"])
    assert set(tmp_path.iterdir()) == {new, other}


@pytest.mark.parametrize("columns", [("image_hash",), ("decodable", "image_hash", "phash")])
def test_an_image_too_large_for_memory_is_hashed_by_pieces_and_does_not_decode(tmp_path, columns):
    size = MAX_IMAGE_BYTES + 512
    path, picture = tmp_path / "0.tar", encoded("JPEG")
    info, text = tarfile.TarInfo("a.jpg"), tarfile.TarInfo("a.txt")
    info.size, text.size = size, 4
    with open(path, "wb") as file:  # with a hole where the picture's zeros are
        file.write(info.tobuf() + picture)
        file.seek(512 + size)
        file.write(text.tobuf() + b"text" + bytes(508) + bytes(1024))
    expected = xxhash.xxh3_128(picture)
    for start in range(len(picture), size, 1 << 20):
        expected.update(bytes(min(1 << 20, size - start)))
    tracemalloc.start()
    try:
        scan(path, columns=columns)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()
    [row] = pq.read_table(index_path(path)).to_pylist()
    assert row["image_hash"] == expected.digest()
    assert (row.get("decodable"), row.get("phash")) == (False if len(columns) > 1 else None, None)
