"""Samples of WebDataset tars, found by their headers: where each member's bytes are.

Images are not read here, so that a dataset of any size can be listed, and each of its images read
by offset in any process. Links, devices and paths that leave the tar are ignored (docs/formats.md,
Shard).
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath

from configs.errors import DataError

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "gif", "bmp", "tif", "tiff")
MAX_TEXT_BYTES = 1 << 20
MAX_IMAGE_BYTES = 1 << 28
_BLOCK = 512
# What tarfile raises on headers that are damaged or made to hurt: numbers that are none, sizes
# beyond any file, headers that announce headers without end.
_HEADER_ERRORS = (
    tarfile.TarError,
    OSError,
    ValueError,
    IndexError,
    OverflowError,
    MemoryError,
    RecursionError,
)


@dataclass(frozen=True, slots=True)
class Span:
    """A byte range of a tar: the data of one member."""

    tar: Path
    offset: int
    num_bytes: int

    def read(self) -> bytes:
        """Return the bytes."""
        with open(self.tar, "rb") as file:
            data = os.pread(file.fileno(), self.num_bytes, self.offset)
        if len(data) < self.num_bytes:
            raise DataError(
                f"{self.tar} became shorter while it was read: expected {self.num_bytes:,} bytes "
                "at "
                f"{self.offset:,}, got {len(data):,}. Copy the dataset again."
            )
        return data


@dataclass(slots=True)
class TarSample:
    """The members of one key, by lower-cased extension."""

    key: str
    members: dict[str, Span] = field(default_factory=dict)

    @property
    def images(self) -> list[Span]:
        """The image members."""
        return [span for ext, span in self.members.items() if ext in IMAGE_EXTENSIONS]

    def text(self, extension: str) -> str | None:
        """Return a small text member, or None where the sample has none."""
        span = self.members.get(extension)
        if span is None:
            return None
        where = f"{span.tar}: {self.key}.{extension}"
        if span.num_bytes > MAX_TEXT_BYTES:
            raise DataError(
                f"{where} has {span.num_bytes:,} bytes; expected a text of at most "
                f"{MAX_TEXT_BYTES:,}."
            )
        try:
            return span.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not UTF-8 ({error}); write the file again.") from None


def _key_and_extension(name: str) -> tuple[str, str] | None:
    path = PurePosixPath(name)
    stem, dot, extension = path.name.partition(".")
    if not dot or not stem or path.is_absolute() or ".." in path.parts:
        return None
    return str(path.with_name(stem)), extension.lower()


def scan_tar(path: Path, *, may_repeat_keys: bool = False) -> list[TarSample]:
    """Return the samples of a tar in the order of their first members.

    A member that comes twice starts a new sample where training data `may_repeat_keys`. A byte of
    a name that is not UTF-8 is written out ("\\xff"). Raises DataError where the tar is damaged or
    cut off, a member is sparse, or a member comes twice and may not.
    """
    status = path.stat()
    return list(_scan(path, may_repeat_keys, status.st_size, status.st_mtime_ns))


@lru_cache(maxsize=16)  # two datasets may ask different things of the same tars
def _scan(
    path: Path, may_repeat_keys: bool, num_bytes: int, mtime_ns: int
) -> tuple[TarSample, ...]:
    samples: list[TarSample] = []
    newest: dict[str, TarSample] = {}  # by key
    end = 0
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="backslashreplace") as tar:
            for member in tar:
                if member.issparse():
                    raise DataError(
                        f"{path}: {member.name} is stored sparse (GNU), with parts left out; "
                        "expected plain members. Write the tar again without --sparse."
                    )
                end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                name = _key_and_extension(member.name)
                if not member.isreg() or name is None:
                    continue
                key, extension = name
                sample = newest.get(key)
                if sample is not None and extension in sample.members:
                    if not may_repeat_keys:
                        raise DataError(
                            f"{path}: {key}.{extension} comes twice; keys of an evaluation dataset "
                            "are unique."
                        )
                    sample = None
                if sample is None:
                    sample = newest[key] = TarSample(key)
                    samples.append(sample)
                sample.members[extension] = Span(path, member.offset_data, member.size)
    except _HEADER_ERRORS as error:
        raise DataError(
            f"{path} is not a readable tar ({error}). Expected an uncompressed tar; copy it again."
        ) from None
    _check_end(path, end)
    return tuple(samples)


def _check_end(path: Path, end: int) -> None:
    """Refuse a tar that stops in the middle.

    tarfile takes a broken header, and the end of the file, for the end of the tar; a whole one ends
    with blocks of zeros (POSIX: two).
    """
    with open(path, "rb") as file:
        file.seek(end)
        block = file.read(_BLOCK)
    if any(block):
        raise DataError(
            f"{path} is damaged at byte {end:,}: expected a member or the end of the tar. Copy it "
            "again."
        )
    if len(block) < _BLOCK:
        raise DataError(
            f"{path} is cut off at byte {end + len(block):,}: expected another member, or the "
            "block of zeros that ends a tar. Copy it again."
        )


def digest_files(paths: Iterable[Path], root: Path) -> str:
    """Return the sha256 over `relative path NUL size NUL sha256 LF` of the files, in order."""
    total = hashlib.sha256()
    for path in paths:
        digest = file_sha256(path)
        line = f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0{digest}\n"
        total.update(line.encode())
    return total.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 (hex) of a file; read once a run, unless its size or time changes."""
    status = path.stat()
    return _sha256(str(path.resolve()), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1 << 16)
def _sha256(path: str, num_bytes: int, mtime_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
