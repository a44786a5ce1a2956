"""The typefaces and how a glyph of theirs becomes a picture.

The fonts are those inside matplotlib: DejaVu and STIX, which map real Unicode code points. Left out
are the last-resort font (placeholders), the Computer Modern and STIXNonUnicode fonts (their code
points are not the characters that they draw) and the 20 glyphs of DejaVu Serif Display. Text layout
is Pillow's basic one, so that no shaping library changes a picture; what remains of the platform is
the FreeType inside Pillow.
"""

from __future__ import annotations

import functools
import hashlib
import io
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from configs.errors import DataError

# Two glyphs are "the same drawing" where their ink is equal at this size: large enough for a small
# accent to show, small enough to draw every glyph in seconds.
CANONICAL_SIZE_PIXELS = 96

# General categories with a picture of their own: letters, numbers, punctuation, symbols. Combining
# marks (M) need a base, Z and C draw nothing; Sk are spacing accents, which differ by height alone.
_DRAWN_CATEGORIES = frozenset(
    "Lu,Ll,Lt,Lm,Lo,Nd,Nl,No,Pc,Pd,Ps,Pe,Pi,Pf,Po,Sm,Sc,So".split(",")  # noqa: SIM905
)


@dataclass(frozen=True)
class Face:
    """One font file: its family, and the words that a caption has for its style."""

    stem: str
    family: str
    style: str
    is_serif_family: bool = False


_STYLES = {"": "", "Bold": "bold", "Oblique": "italic", "BoldOblique": "bold italic"}
_SERIF_STYLES = {"": "", "Bold": "bold", "Italic": "italic", "BoldItalic": "bold italic"}
_STIX_STYLES = {"": "", "Bol": "bold", "Italic": "italic", "BolIta": "bold italic"}
_STIX_SIZES = {
    "One": ("Reg", "Bol"),
    "Two": ("Reg", "Bol"),
    "Three": ("Reg", "Bol"),
    "Four": ("Reg", "Bol"),
    "Five": ("Reg",),
}


def _words(*words: str) -> str:
    return " ".join(word for word in words if word) or "plain"


def _faces() -> tuple[Face, ...]:
    faces = []
    for suffix, style in _STYLES.items():
        end = f"-{suffix}" if suffix else ""
        faces.append(Face(f"DejaVuSans{end}", "DejaVu Sans", _words(style)))
        faces.append(Face(f"DejaVuSansMono{end}", "DejaVu Sans Mono", _words(style, "monospace")))
    for suffix, style in _STIX_STYLES.items():
        faces.append(Face(f"STIXGeneral{suffix}", "STIX General", _words(style, "roman")))
    faces.append(Face("DejaVuSansDisplay", "DejaVu Sans Display", "display size"))
    for size, suffixes in _STIX_SIZES.items():
        for suffix in suffixes:
            style = "bold display size" if suffix == "Bol" else "display size"
            faces.append(Face(f"STIXSiz{size}Sym{suffix}", f"STIX Size {size}", style))
    for suffix, style in _SERIF_STYLES.items():
        end = f"-{suffix}" if suffix else ""
        faces.append(Face(f"DejaVuSerif{end}", "DejaVu Serif", _words(style), is_serif_family=True))
    return tuple(faces)


FACES = _faces()
TRAINING_FACES = tuple(face for face in FACES if not face.is_serif_family)
SERIF_FACES = tuple(face for face in FACES if face.is_serif_family)
FACE_OF_STEM = {face.stem: face for face in FACES}


@functools.cache
def _folder() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def font_path(face: Face) -> Path:
    """Return the font's file; raise DataError where this matplotlib does not ship it."""
    path = _folder() / f"{face.stem}.ttf"
    if not path.is_file():
        raise DataError(
            f"the font {path.name} is not in matplotlib's font folder {_folder()}. The glyph pool "
            "needs the DejaVu and STIX fonts of matplotlib: reinstall it (pip install matplotlib)."
        )
    return path


@functools.lru_cache(maxsize=512)
def _sized(stem: str, size_pixels: int) -> ImageFont.FreeTypeFont:
    path = font_path(FACE_OF_STEM[stem])
    return ImageFont.truetype(str(path), size_pixels, layout_engine=ImageFont.Layout.BASIC)


def draw_ink(face: Face, codepoint: int, size_pixels: int) -> tuple[Image.Image, int] | None:
    """Return the glyph's ink (grey levels, cropped) and its top's pixels above the baseline.

    None where the glyph is empty.
    """
    font, text = _sized(face.stem, size_pixels), chr(codepoint)
    left, top, right, bottom = (round(edge) for edge in font.getbbox(text, anchor="ls"))
    canvas = Image.new("L", (max(1, right - left), max(1, bottom - top)), 0)
    ImageDraw.Draw(canvas).text((-left, -top), text, fill=255, font=font, anchor="ls")
    box = canvas.getbbox()
    if box is None:
        return None
    return canvas.crop(box), -(top + box[1])


def scan(face: Face) -> dict[int, bytes]:
    """Return code point -> digest of its canonical drawing, for each character fit for the pool.

    A drawing is the ink alone: where it stands on the line does not count, since pictures vary it.
    """
    with TTFont(font_path(face), lazy=True) as font:
        codepoints = sorted(font.getBestCmap())
    drawings = {}
    for codepoint in codepoints:
        character = chr(codepoint)
        if unicodedata.category(character) not in _DRAWN_CATEGORIES:
            continue
        if not unicodedata.name(character, ""):
            continue
        drawn = draw_ink(face, codepoint, CANONICAL_SIZE_PIXELS)
        if drawn is not None:
            ink = drawn[0]
            content = f"{ink.width}x{ink.height}:".encode() + ink.tobytes()
            drawings[codepoint] = hashlib.blake2b(content, digest_size=16).digest()
    return drawings


@dataclass(frozen=True)
class Look:
    """How one picture is drawn; every field comes from a hash of its uid.

    `side_pixels` of the square picture; `em` the font size, `shift_x` and `shift_y` the
    displacement, each as a fraction of the side; `paper` and `ink` grey levels, 0 black.
    """

    side_pixels: int
    em: float
    shift_x: float
    shift_y: float
    paper: int
    ink: int


def draw_picture(face: Face, codepoint: int, look: Look) -> bytes:
    """Return a PNG (8-bit grey, square) of one glyph, dark on light, wholly inside the picture."""
    side = look.side_pixels
    room = side - 2
    size = max(6, round(look.em * side))
    drawn = draw_ink(face, codepoint, size)
    if drawn is not None and max(drawn[0].size) > room:
        size = max(1, size * room // max(drawn[0].size))
        drawn = draw_ink(face, codepoint, size)
    picture = Image.new("L", (side, side), look.paper)
    if drawn is not None:
        mask, above_baseline = drawn
        # The line, not the ink, is centred, so that a comma stays low and a small letter small.
        baseline = 0.5 * side + 0.36 * size + look.shift_y * side
        x = round(0.5 * (side - mask.width) + look.shift_x * side)
        y = round(baseline) - above_baseline
        x = min(max(x, 1), max(1, side - 1 - mask.width))
        y = min(max(y, 1), max(1, side - 1 - mask.height))
        picture.paste(look.ink, (x, y), mask)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()
