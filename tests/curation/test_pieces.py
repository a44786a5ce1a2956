from __future__ import annotations

import errno
import os

import pytest
import xxhash

from configs.errors import DataError
from curation import pieces
from curation.pieces import Piece, PieceWriter, SourceTar, SourceTars
from curation.spans import open_tar


@pytest.fixture
def sources(tmp_path):
    """Three files of random bytes: two by path, one by URL; and what is in them."""
    contents = [os.urandom(n << 10) for n in (300, 5000, 700)]
    tars = []
    for number, content in enumerate(contents):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(content)
        name = f"file://{path}" if number == 1 else str(path)
        with open_tar(name) as reader:
            tars.append(SourceTar(name, reader.num_bytes, reader.fingerprint()))
    return tuple(tars), contents


def pieces_of(contents):
    """Pieces of all files in turn, small and large, some of them with a header."""
    found = []
    for number in range(200):
        tar = number % 3
        start = number * 512 % (len(contents[tar]) - 512)
        end = min(len(contents[tar]), start + (1 << 20 if number % 50 == 1 else 5120))
        found.append(Piece(tar, start, end, b"header" if number % 7 == 0 else b""))
    return found


@pytest.mark.parametrize("batch_bytes", [1, 100_000, 8 << 20])
def test_pieces_of_files_and_urls_come_in_the_order_asked_for(
    sources, tmp_path, monkeypatch, batch_bytes
):
    tars, contents = sources
    monkeypatch.setattr(pieces, "_BATCH_BYTES", batch_bytes)
    monkeypatch.setattr(pieces, "_FLUSH_BYTES", 1 << 20)
    wanted = b"begin" + b"".join(
        p.header + contents[p.tar][p.start : p.end] for p in pieces_of(contents)
    )
    with (tmp_path / "out").open("wb") as file, PieceWriter(file) as writer:
        writer.append(b"begin")
        assert writer.num_bytes == 5
        with SourceTars(tars) as opened:
            writer.copy(opened, pieces_of(contents))
        assert writer.num_bytes == writer.finish() == len(wanted)
    assert (tmp_path / "out").read_bytes() == wanted
    assert writer.digest() == f"xxh3-128:{xxhash.xxh3_128_hexdigest(wanted)}"


def test_no_more_tars_are_open_than_may_be(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "_MAX_OPEN_TARS", 4)
    tars, wanted = [], b""
    for number in range(20):
        path = tmp_path / f"{number}.tar"
        path.write_bytes(bytes([number]) * 512)
        with open_tar(path) as reader:
            tars.append(SourceTar(str(path), 512, reader.fingerprint()))
    order = [Piece(n * 7 % 20, 0, 512, b"") for n in range(60)]
    wanted = b"".join(bytes([piece.tar]) * 512 for piece in order)
    before = len(os.listdir("/proc/self/fd"))
    with (tmp_path / "out").open("wb") as file, PieceWriter(file) as writer:
        with SourceTars(tuple(tars)) as opened:
            writer.copy(opened, order)
            assert len(os.listdir("/proc/self/fd")) <= before + 1 + 4
        writer.finish()
    assert (tmp_path / "out").read_bytes() == wanted


def test_only_the_padding_of_the_last_member_may_be_missing(sources, tmp_path):
    tars, contents = sources
    end = len(contents[0])
    with (tmp_path / "out").open("wb") as file, PieceWriter(file) as writer:
        with SourceTars(tars) as opened:
            writer.copy(opened, [Piece(0, end - 512, end + 511, b"")])
            with pytest.raises(DataError, match="shrank while it was copied"):
                writer.copy(opened, [Piece(0, end - 512, end + 512, b"")])
        writer.finish()
    assert (tmp_path / "out").read_bytes()[: 512 + 511] == contents[0][-512:] + bytes(511)


def test_an_error_of_the_disk_while_it_writes_behind_is_not_lost(sources, tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    tars, _ = sources
    monkeypatch.setattr(pieces, "_FLUSH_BYTES", 1)
    monkeypatch.setattr(pieces.os, "fsync", fail)

    def copy():
        with (
            (tmp_path / "out").open("wb") as file,
            PieceWriter(file) as writer,
            SourceTars(tars) as opened,
        ):
            writer.copy(opened, [Piece(1, 0, 3 << 20, b"")])
            writer.finish()

    with pytest.raises(OSError, match="Input/output error"):
        copy()
