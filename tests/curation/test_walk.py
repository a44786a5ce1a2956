"""The compiled walk along headers finds what a reader of one header after the other finds."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import types
from numba.core.caching import CacheImpl

from curation import shards, spans
from curation.compiled import compiled
from curation.shards import TarDamageError, read_batches
from curation.spans import open_tar
from curation.tar_headers import BLOCK, check_end, padded, read_member
from curation.xxh3 import MIN_BYTES, xxh3_128

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
NAMES = ["a.jpg", "dir/b.txt", "n" * 120 + ".json", "d/" * 60 + "c.png", "ä.txt", "folder/"]


def with_sum(header: bytes, *, signed: bool = False) -> bytes:
    """A header with the check sum of what is in it."""
    header = header[:148] + b" " * 8 + header[156:]
    total = sum(byte - 256 if signed and byte > 127 else byte for byte in header)
    return header[:148] + b"%06o\0 " % (total % 8**6) + header[156:]


def base_256(header: bytes) -> bytes:
    size = int(header[124:135], 8)
    return with_sum(header[:124] + b"\x80" + size.to_bytes(11, "big") + header[136:])


def spaces_in_the_size(header: bytes) -> bytes:
    size = int(header[124:135], 8)
    return with_sum(header[:124] + (b"%o " % size).rjust(12) + header[136:])


def of_kind(flag: bytes):
    return lambda header: with_sum(header[:156] + flag + header[157:])


CHANGES = {
    "none": lambda header: header,
    "base 256": base_256,
    "spaces": spaces_in_the_size,
    "signed sum": lambda header: with_sum(b"\xc3" + header[1:], signed=True),
    "old magic": lambda header: with_sum(header[:257] + bytes(8) + header[265:]),
    "contiguous": of_kind(b"7"),
    "NUL": of_kind(b"\0"),
    "link": of_kind(b"1"),
    "no name": lambda header: with_sum(bytes(100) + header[100:]),
    "wrong sum": lambda header: header[:5] + bytes([header[5] ^ 1]) + header[6:],
    "no number": lambda header: with_sum(header[:124] + b"0000009" + header[131:]),
}
MEMBERS = st.lists(
    st.tuples(
        st.sampled_from(NAMES),
        st.sampled_from(FORMATS),
        st.sampled_from([0, 1, 511, 512, 513, *range(700, 5000, 150), 700_000, 1_300_000]),
        st.sampled_from(["none"] * 8 + list(CHANGES)),
    ),
    max_size=9,
)


def write(path: Path, members, end: bytes = bytes(1024)) -> None:
    with path.open("wb") as file:
        for number, (name, form, size, change) in enumerate(members):
            info = tarfile.TarInfo(name)
            info.size = size
            is_long = len(name) > 100 and "/" not in name  # which ustar cannot write
            header = info.tobuf(tarfile.PAX_FORMAT if is_long else form)
            file.write(header[:-BLOCK] + CHANGES[change](header[-BLOCK:]))
            file.write(bytes([number + 1]) * size + bytes(-size % BLOCK))
        file.write(end)


def one_by_one(path):
    """What read_member says of each header, and what it makes of damage."""
    found, at = [], 0
    with open_tar(path) as reader:
        try:
            while True:
                header = reader.read(at, BLOCK)
                if not header:
                    raise TarDamageError(f"ends at byte {at} without an end-of-archive block")
                if len(header) == BLOCK and not any(header):
                    check_end(reader, at)
                    return found, None
                found.append(read_member(reader, at))
                last = found[-1]
                if last.is_truncated:
                    return found, "truncated"
                at = last.offset + padded(last.size)
        except TarDamageError as error:
            return found, str(error)


def in_batches(path, **how):
    found, damage, data = [], None, path.read_bytes()
    with open_tar(path) as reader:
        try:
            for batch in read_batches(reader, **how):
                members = list(batch.members())
                for row, member in enumerate(members):
                    content = data[member.offset : member.offset + member.size]
                    size = min(member.size, max(0, batch.limits[row] - batch.positions[row]))
                    kept = batch.data[batch.positions[row] :][:size].tobytes()
                    assert kept == content[:size]
                    if row in batch.digests:
                        assert batch.digests[row] == xxhash.xxh3_128_digest(content)
                    elif how.get("digests") and member.size > 5000 and not member.is_truncated:
                        raise AssertionError("a large member was not hashed")
                found += members
        except TarDamageError as error:
            damage = "truncated" if found and found[-1].is_truncated else str(error)
    return found, damage


@settings(deadline=None, max_examples=60)
@given(members=MEMBERS, cut=st.integers(0, 4000), few=st.booleans())
def test_the_compiled_walk_and_the_careful_one_find_the_same(tmp_path_factory, members, cut, few):
    path = tmp_path_factory.mktemp("w") / "a.tar"
    write(path, members)
    if cut < 1500:
        os.truncate(path, max(0, path.stat().st_size - cut))
    expected = one_by_one(path)
    with pytest.MonkeyPatch.context() as patch:
        if few:
            patch.setattr(shards, "_MAX_MEMBERS", 2)
        for how in ({}, {"digests": True}, {"whole": True}):
            assert in_batches(path, **how) == expected
    path.unlink()


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_plain_is_handed_over(change, tmp_path):
    path = tmp_path / "a.tar"
    plain = [(f"{n}.jpg", tarfile.USTAR_FORMAT, 700 * n, "none") for n in range(4)]
    write(path, [*plain, ("x.txt", tarfile.USTAR_FORMAT, 300, change), *plain])
    expected = one_by_one(path)
    # A link has no data, whatever its size says: what follows is no header.
    assert len(expected[0]) == {"wrong sum": 4, "no number": 4, "link": 5}.get(change, 9)
    for how in ({}, {"digests": True}, {"whole": True}):
        assert in_batches(path, **how) == expected


@settings(deadline=None, max_examples=200)
@given(
    size=st.one_of(st.integers(MIN_BYTES, 3000), st.integers(MIN_BYTES, 200_000)),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_compiled_hash_is_that_of_xxhash(size, seed):
    data = np.random.default_rng(seed).integers(0, 256, size + 1, np.uint8)[1:]  # not aligned
    high, low = xxh3_128(data.ctypes.data, size, np.empty(8, np.uint64))
    assert int(high).to_bytes(8, "big") + int(low).to_bytes(8, "big") == xxhash.xxh3_128_digest(
        data
    )


def test_a_hashed_walk_is_many_batches_and_may_be_left_after_any_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_MAX_MEMBERS", 5)
    path = tmp_path / "a.tar"
    members = [(f"{n}.jpg", FORMATS[n % 3], 3000 + n, "none") for n in range(40)]
    write(path, members)
    assert in_batches(path, digests=True) == one_by_one(path)
    num_threads = threading.active_count()
    for num_taken in (1, 3):
        with open_tar(path) as reader, closing(read_batches(reader, digests=True)) as batches:
            for _ in range(num_taken):
                assert len(next(batches).hashed_rows) == 5
        assert threading.active_count() == num_threads


@pytest.mark.parametrize(
    ("kernel_reads_ahead", "is_announced"), [(128 << 10, True), (8 << 20, False)]
)
def test_the_disk_is_asked_ahead_only_where_the_kernel_does_not_read_far_ahead(
    tmp_path, monkeypatch, kernel_reads_ahead, is_announced
):
    path, announced = tmp_path / "a.tar", []
    write(path, [(f"{n}.jpg", tarfile.USTAR_FORMAT, 1_300_000, "none") for n in range(3)])
    monkeypatch.setattr(spans, "read_ahead_bytes", lambda device: kernel_reads_ahead)
    monkeypatch.setattr(
        spans.LocalReader, "will_need", lambda self, offset, size: announced.append(offset)
    )
    assert in_batches(path, digests=True) == one_by_one(path)
    assert bool(announced) == is_announced


def double(number: int) -> int:
    return 2 * number


def test_where_machine_code_cannot_be_kept_a_loop_is_compiled_all_the_same(monkeypatch):
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    looped = compiled(types.int64(types.int64))(double)
    assert looped(4) == 8
    assert looped.nopython_signatures


def test_numba_comes_without_scipy():
    code = "import sys, curation.kernels; print('scipy' in sys.modules, 'numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "False True\n", done.stderr
