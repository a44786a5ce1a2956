"""The tars of the pool (docs/formats.md): img2dataset's layout to train, CLIP_benchmark's to test.

Every picture is a pure function of its glyph: its uid is a hash of face and code point, and all
that varies in it is drawn from the uid, so tars do not depend on who writes them or in which order.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator
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


def _draw(glyph: Glyph, purpose: str) -> float:
    uid = hashlib.blake2b(f"{glyph[0]}\0U+{glyph[1]:04X}".encode(), digest_size=16).digest()
    return float(draws.uniform(SEED, f"glyph_pool/{purpose}", *draws.uid_words([uid]))[0])


def look_of(glyph: Glyph, *, may_be_thumbnail: bool) -> Look:
    """Return how the picture of `glyph` is drawn."""
    side = 32 + int(33 * _draw(glyph, "side"))
    if may_be_thumbnail and _draw(glyph, "thumbnail") < THUMBNAIL_FRACTION:
        side = 12 + int(8 * _draw(glyph, "side"))
    return Look(
        side_pixels=side,
        em=0.68 + 0.22 * _draw(glyph, "em"),
        shift_x=0.14 * (_draw(glyph, "shift_x") - 0.5),
        shift_y=0.14 * (_draw(glyph, "shift_y") - 0.5),
        paper=215 + int(41 * _draw(glyph, "paper")),
        ink=int(61 * _draw(glyph, "ink")),
    )


def caption_of(glyph: Glyph, *, may_be_code: bool) -> str:
    """Return the caption of the picture of `glyph`."""
    stem, codepoint = glyph
    if may_be_code and _draw(glyph, "code_caption") < CODE_CAPTION_FRACTION:
        return code_caption(codepoint)
    return describe(codepoint, FACE_OF_STEM[stem].style, _draw(glyph, "phrasing"))


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
    for number, (glyph, caption) in enumerate(zip(job.glyphs, job.texts, strict=True)):
        key = f"{shard}{number:04d}"
        look = look_of(glyph, may_be_thumbnail=True)
        picture = draw_picture(FACE_OF_STEM[glyph[0]], glyph[1], look)
        metadata = _metadata(glyph, caption, key, look.side_pixels, picture)
        yield f"{key}.png", picture
        yield f"{key}.txt", caption.encode()
        yield f"{key}.json", json.dumps(metadata).encode()


def _evaluation_members(job: TarJob, extension: str) -> Iterator[Member]:
    for number, (glyph, text) in enumerate(zip(job.glyphs, job.texts, strict=True), job.first):
        key = f"{number:06d}"
        look = look_of(glyph, may_be_thumbnail=False)
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
