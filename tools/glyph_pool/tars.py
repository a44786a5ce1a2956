"""The tars of the pool (docs/formats.md): img2dataset's layout to train, CLIP_benchmark's to test.

Every picture is a pure function of its glyph: its uid is a hash of face and code point, and all
that varies in it is drawn from the uid, so tars do not depend on who writes them or in which order.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs import draws
from tools.glyph_pool.captions import character_name, code_caption, describe
from tools.glyph_pool.fonts import FACE_OF_STEM, Look, draw_picture
from tools.glyph_pool.split import SEED, Glyph

THUMBNAIL_FRACTION = 0.03  # sides of 12 to 19 pixels, others 32 to 64
CODE_CAPTION_FRACTION = 0.02

Member = tuple[str, bytes]


@dataclass(frozen=True)
class TarJob:
    """One tar to be written: `kind` says what stands beside each picture.

    `texts` has one entry a glyph: the caption (train), the label (class), or the captions, one a
    line (retrieval). `first` numbers the first sample of an evaluation tar within its dataset.
    """

    path: Path
    kind: str
    glyphs: tuple[Glyph, ...]
    texts: tuple[str, ...]
    first: int = 0


def _draws(glyphs: Sequence[Glyph], *purposes: str) -> Iterator[tuple[float, ...]]:
    """Yield the draws of each glyph, one a purpose."""
    names = [f"{stem}\0U+{codepoint:04X}".encode() for stem, codepoint in glyphs]
    words = draws.uid_words([hashlib.blake2b(name, digest_size=16).digest() for name in names])
    columns = [draws.uniform(SEED, f"glyph_pool/{purpose}", *words) for purpose in purposes]
    return zip(*(column.tolist() for column in columns), strict=True)


def looks_of(glyphs: Sequence[Glyph], *, may_be_thumbnails: bool) -> list[Look]:
    """Return how the picture of each glyph is drawn."""
    looks = []
    purposes = ("side", "thumbnail", "em", "shift_x", "shift_y", "paper", "ink")
    for side, thumbnail, em, shift_x, shift_y, paper, ink in _draws(glyphs, *purposes):
        is_thumbnail = may_be_thumbnails and thumbnail < THUMBNAIL_FRACTION
        look = Look(
            side_pixels=12 + int(8 * side) if is_thumbnail else 32 + int(33 * side),
            em=0.68 + 0.22 * em,
            shift_x=0.14 * (shift_x - 0.5),
            shift_y=0.14 * (shift_y - 0.5),
            paper=215 + int(41 * paper),
            ink=int(61 * ink),
        )
        looks.append(look)
    return looks


def captions_of(glyphs: Sequence[Glyph], *, may_be_codes: bool) -> list[str]:
    """Return the caption of the picture of each glyph."""
    captions = []
    drawn = _draws(glyphs, "code_caption", "phrasing")
    for (stem, codepoint), (code, phrasing) in zip(glyphs, drawn, strict=True):
        if may_be_codes and code < CODE_CAPTION_FRACTION:
            captions.append(code_caption(codepoint))
        else:
            captions.append(describe(codepoint, FACE_OF_STEM[stem].style, phrasing))
    return captions


def _metadata(glyph: Glyph, caption: str, key: str, side: int, picture: bytes) -> dict[str, object]:
    face = FACE_OF_STEM[glyph[0]]
    return {
        "caption": caption,
        "url": f"glyph://{glyph[0]}/U+{glyph[1]:04X}",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": side,
        "height": side,
        "original_width": side,
        "original_height": side,
        "exif": "{}",
        "sha256": hashlib.sha256(picture).hexdigest(),
        "codepoint": glyph[1],
        "character_name": character_name(glyph[1]),
        "font": face.family,
        "style": face.style,
    }


def _train_members(job: TarJob) -> Iterator[Member]:
    shard = job.path.stem
    looks = looks_of(job.glyphs, may_be_thumbnails=True)
    for number, (glyph, caption, look) in enumerate(zip(job.glyphs, job.texts, looks, strict=True)):
        key = f"{shard}{number:04d}"
        picture = draw_picture(FACE_OF_STEM[glyph[0]], glyph[1], look)
        metadata = _metadata(glyph, caption, key, look.side_pixels, picture)
        yield f"{key}.png", picture
        yield f"{key}.txt", caption.encode()
        yield f"{key}.json", json.dumps(metadata).encode()


def _evaluation_members(job: TarJob, extension: str) -> Iterator[Member]:
    looks = looks_of(job.glyphs, may_be_thumbnails=False)
    samples = zip(job.glyphs, job.texts, looks, strict=True)
    for number, (glyph, text, look) in enumerate(samples, job.first):
        key = f"{number:06d}"
        yield f"{key}.png", draw_picture(FACE_OF_STEM[glyph[0]], glyph[1], look)
        yield f"{key}.{extension}", text.encode()


def _write_tar(path: Path, members: Iterable[Member]) -> int:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            header = tarfile.TarInfo(
                name
            )  # time, owner and group stay 0: the same bytes every time
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path.stat().st_size


def write_tar(job: TarJob) -> tuple[int, int]:
    """Write one tar; return its number of samples and of bytes."""
    if job.kind == "train":
        members = _train_members(job)
    else:
        members = _evaluation_members(job, {"class": "cls", "retrieval": "txt"}[job.kind])
    return len(job.glyphs), _write_tar(job.path, members)
