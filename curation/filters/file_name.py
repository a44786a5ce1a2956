"""Drop captions that are a file's name, a date, a number or a placeholder, and say nothing.

About a fifth of the titles that people's photographs have on the web are what the camera called the
file. What is recognised does not depend on a language: the names that cameras and phones give
(JEITA CP-3461, "DCF": a stem and a number), dates and times, counters, hashes, and the
placeholder that a program writes in the user's language.
"""

from __future__ import annotations

import re
from typing import Annotated

import pyarrow as pa
from pydantic import Field

from curation.filters.base import Filter, Judgement, filters

PLACEHOLDER = "placeholder"
CAMERA = "camera file name"
NUMBER = "number or date"
HASH = "hash"
NUMBERED = "numbered or dated name"
EXTENSION = "file extension"
STEM = "stem and number"

# What the names of the common makers begin with: Canon, Apple, Android (IMG, MG, MVI, VID), Sony
# (DSC, MAH), Nikon (DSCN), Fujifilm (DSCF), Panasonic, Olympus (P), Pentax (IMGP), Samsung (SAM),
# Kodak (DCP, DCIM, PICT), GoPro (GOPR, GP); an underscore first means Adobe RGB.
_MAKERS = "IMG|IMGP|IMGA|MG|DSC|DSCN|DSCF|DSCI|DSCS|SAM|P|PICT|PIC|DCP|DCIM|GOPR|GP|MVI|VID|MAH"
_CAMERA = re.compile(rf"_?(?:{_MAKERS})[-_ ]?\d{{3,}}(?![^\W_])", re.IGNORECASE)
_ENDING = (
    r"\.(?:jpe?g|jpe|jfif|png|gif|webp|bmp|tiff?|hei[cf]|avif|svg|psd|raw|cr[23]|nef|arw|dng|orf)"
)
_IMAGE_ENDING = re.compile(rf"{_ENDING}$", re.IGNORECASE)
_EXTENSION = re.compile(rf"\S+{_ENDING}", re.IGNORECASE)
# "2014-06-13 12.59.01", "2012-11-16T08-49-25", "02 (3)": no letters but those of a time.
_NUMBER = re.compile(r"[\W\d_]*\d(?:T(?=\d)|[\W\d_])*")
_HASH = re.compile(
    r"(?=.*\d)(?=.*[a-f])[0-9a-f]{12,}"  # a digest
    r"|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"  # a UUID
    r"|\d{6,}_[0-9a-f]{8,}(?:_\w)?",  # Flickr's own
    re.IGNORECASE,
)
# A number first and then nothing but words, blanks, dots and hyphens: so one names files.
_PLAIN = re.compile(r"\d[\w\s.\-]*")
# A date or a counter, not an amount: "20130921_", "2014-12-31", "2008 06 07", "130218", "09 ".
_DATED = re.compile(r"0\d|\d{5,}|\d+[-_]|\d{1,4}[. ] ?\d{1,2}[. ] ?\d{1,4}\b|(?:19|20)\d\d \w+ -")
# A number first and another one last: "67 Flight to Cusco Peru 091140", "2011 Meeting 10".
_COUNTED = re.compile(r"\d.*[\s_\-](?!(?:19|20)\d\d$)\d{3,}|(?:19|20)\d\d\b.*[\s_\-]\d+")
_STEM = re.compile(r"[^\W\d]+\d{0,3}[-_]?\d{3,}(?:[-_.]\w+)*")
_NUMBERING = re.compile(r"[\s_\-]*(?:\d+|\(\d+\)|#\d+)$")
_PLACEHOLDERS = frozenset(
    {
        "untitled", "no title", "notitle", "title", "unnamed", "no name", "noname", "unknown",
        "image", "images", "img", "photo", "photos", "picture", "pictures", "pic", "foto", "bild",
        "null", "none", "nan", "n/a", "default", "thumbnail", "placeholder", "no description",
        "sin título", "sin titulo", "sans titre", "ohne titel", "unbenannt", "senza titolo",
        "sem título", "sem titulo", "zonder titel", "naamloos", "uden titel", "utan titel",
        "namnlös", "uten tittel", "nimetön", "bez tytułu", "bez názvu", "bez nazwy", "fără titlu",
        "cím nélkül", "névtelen", "без названия", "без назви", "без имени", "без заглавие",
        "χωρίς τίτλο", "başlıksız", "adsız", "isimsiz", "ללא כותרת", "بدون عنوان", "بلا عنوان",
        "शीर्षकहीन", "无题", "無題", "无标题", "無標題", "未命名", "名称未設定", "제목 없음", "무제",
        "ไม่มีชื่อ", "không có tiêu đề", "tanpa judul", "be pavadinimo", "bez nosaukuma", "pealkirjata",
    }
)  # fmt: skip


def why_file_name(caption: str, *, max_numbered_words: int = 4, broad: bool = False) -> str | None:
    """Return why a caption counts as a file's name, None where it does not; see `file_name`."""
    text = caption.strip()
    stem = _IMAGE_ENDING.sub("", text)
    if _CAMERA.match(text):
        return CAMERA
    if not stem or _NUMBERING.sub("", stem).casefold() in _PLACEHOLDERS:
        return PLACEHOLDER
    if _HASH.fullmatch(stem):
        return HASH
    if _NUMBER.fullmatch(stem):
        return NUMBER
    if _PLAIN.fullmatch(text) and (
        _DATED.match(text) or _COUNTED.fullmatch(stem) or len(text.split()) <= max_numbered_words
    ):
        return NUMBERED
    if broad and _EXTENSION.fullmatch(text):
        return EXTENSION
    if broad and _STEM.fullmatch(stem):
        return STEM
    return None


@filters.register("file_name")
def file_name(
    *, max_numbered_words: Annotated[int, Field(ge=0)] = 4, broad: bool = False
) -> Filter:
    """Drop captions that are the name of a file, and say why.

    camera file name        IMG_1234.jpg, DSC00398, P1010981: a common maker's name at the start
    number or date          2014-06-13 12.59.01, 215/216: no letters but a digit
    hash                    a hexadecimal digest, a UUID
    placeholder             empty, "Untitled", in 40 languages, also with a number
    numbered or dated name  20130921_075259_Hanoi, 014 Lake Titicaca 3062: starts with a date or a
                            counter and has no punctuation. One of up to max_numbered_words words
                            is dropped whatever the number means, "2014 Aruba", but "3 chinchillas"
                            too; 0 keeps those

    With `broad` also, which costs some titles:

    file extension          web_japan08.jpg: one word that ends like an image
    stem and number         WP_20150804_21, IMAG0815, epl114_2226915: one word, letters and a number
    """

    def judge(samples: pa.Table) -> Judgement:
        why = [
            why_file_name(caption, max_numbered_words=max_numbered_words, broad=broad)
            for caption in samples["caption"].to_pylist()
        ]
        return Judgement({}, pa.array(why, pa.string()))

    return judge
