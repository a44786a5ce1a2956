"""Columns of the index that only some rules need: hashes, pixels, fields of the `.json`.

A rule names what it needs in `needs` (filters/base.py: `needing`); the scan computes it for the
samples that have no problem, and the index keeps it for every later job:

    image_hash   binary(16)  xxh3-128 of the image file's bytes
    decodable    bool        the whole image decodes: nothing is missing or broken in it
    dhash        uint64      difference hash, 64 bits
    phash        uint64      perceptual hash, 64 bits
    colors       binary(48)  mean colours of 4 x 4 parts, in which gray hashes are blind
    json.KEY     string      KEY of the sample's `.json`: a string as it is, anything else as JSON;
                             `json.a.b` is the key b of the object a

Null: the sample has a problem, the image does not decode, the `.json` has no such key.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from PIL import Image

from configs.errors import UsageError, did_you_mean
from curation.captions import MAX_JSON_BYTES, look_up
from curation.image_header import FORMATS, MAX_IMAGE_BYTES, no_pillow_limit
from curation.spans import SpanReader

JSON_PREFIX = "json."
HASH_ALONE = ("image_hash",)
_HASH_SIDE = 8
_DCT_SIDE = 32
_COLOR_SIDE = 4
_PIECE_BYTES = 4 << 20  # of a file that is too large to stand in memory


def decode_image(data: bytes) -> Image.Image | None:
    """Decode a whole image to RGB, transparent parts on white; None: it does not.

    JPEGs are decoded at the scale that is still enough for the hashes, which reads all of the file
    all the same. Only the first picture of an animation counts.
    """
    with no_pillow_limit():  # pixels were limited by the header already
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                image.draft("RGB", (2 * _DCT_SIDE, 2 * _DCT_SIDE))
                image.load()
                if image.has_transparency_data:
                    rgba = image.convert("RGBA")
                    white = Image.new("RGBA", rgba.size, "white")
                    return Image.alpha_composite(white, rgba).convert("RGB")
                return image.convert("RGB")
        except Exception:  # a hostile image may raise anything in a decoder: each is "no image"
            return None


def colors(image: Image.Image) -> bytes:
    """Return the mean colours of 4 x 4 equal parts: 48 bytes, row by row, red, green, blue."""
    return image.resize((_COLOR_SIDE, _COLOR_SIDE), Image.Resampling.BOX).tobytes()


def dhash(image: Image.Image) -> int:
    """Return the difference hash: in a gray 9 x 8 thumbnail, is a pixel brighter than its left?

    N. Krawetz, "Kind of Like That" (2013). 64 bits, row by row, the first is the highest.
    """
    size = (_HASH_SIDE + 1, _HASH_SIDE)
    pixels = np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS), dtype=np.int16)
    return _pack(pixels[:, 1:] > pixels[:, :-1])


def phash(image: Image.Image) -> int:
    """Return the perceptual hash: in a gray 32 x 32 thumbnail, is a low frequency above the median?

    N. Krawetz, "Looks Like It" (2011): DCT-II over rows and columns, the 8 x 8 lowest frequencies.
    64 bits, row by row, the first is the highest. What is left of a flat image is rounding, which
    must not decide a bit.
    """
    size = (_DCT_SIDE, _DCT_SIDE)
    pixels = np.asarray(image.convert("L").resize(size, Image.Resampling.LANCZOS), dtype=np.float64)
    low = np.round(_DCT @ pixels @ _DCT.T, 6)
    return _pack(low > np.median(low))


def _dct_rows() -> npt.NDArray[np.float64]:
    """Return the 8 lowest rows of the unnormalised DCT-II of 32 points."""
    frequency, point = np.arange(_HASH_SIDE)[:, None], np.arange(_DCT_SIDE)[None, :]
    rows: npt.NDArray[np.float64] = 2 * np.cos(
        np.pi * frequency * (2 * point + 1) / (2 * _DCT_SIDE)
    )
    return rows


_DCT = _dct_rows()


def _pack(bits: npt.NDArray[np.bool_]) -> int:
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _image_hash(data: bytes) -> bytes:
    return xxhash.xxh3_128_digest(data)


_OF_BYTES: dict[str, tuple[pa.DataType, Callable[[bytes], Any]]] = {
    "image_hash": (pa.binary(16), _image_hash)
}
# `decodable` of what does not decode is false, the others are null.
_OF_PIXELS: dict[str, tuple[pa.DataType, Callable[[Image.Image], Any]]] = {
    "colors": (pa.binary(3 * _COLOR_SIDE**2), colors),
    "decodable": (pa.bool_(), lambda image: True),
    "dhash": (pa.uint64(), dhash),
    "phash": (pa.uint64(), phash),
}


def type_of(name: str) -> pa.DataType:
    """Return the type of a column that the scan can compute, or raise UsageError."""
    if name.startswith(JSON_PREFIX) and len(name) > len(JSON_PREFIX):
        return pa.string()
    if name in _OF_BYTES or name in _OF_PIXELS:
        return {**_OF_BYTES, **_OF_PIXELS}[name][0]
    known = [*_OF_BYTES, *_OF_PIXELS, JSON_PREFIX + "KEY"]
    raise UsageError(
        f"no scan makes a column {name!r}{did_you_mean(name, known)} Known: {', '.join(known)}."
    )


def needs_json(name: str) -> bool:
    """Tell whether a column comes of the `.json` of a sample."""
    return name.startswith(JSON_PREFIX)


def needs_image(name: str) -> bool:
    """Tell whether a column comes of all bytes of the image file."""
    return not needs_json(name)


def find_values(data: Any, names: Iterable[str]) -> dict[str, Any]:
    """Return the values of some columns from the bytes that they come of.

    `data` is an image file, or a JSON where the names are those of its keys.
    """
    if names == HASH_ALONE:  # the one that must keep up with reading
        return {"image_hash": xxhash.xxh3_128_digest(data)}
    names = list(names)
    return _of_json(data, names) if needs_json(names[0]) else _of_image(data, names)


def read_values(
    reader: SpanReader, offset: int, num_bytes: int, names: Iterable[str]
) -> dict[str, Any]:
    """Return the values of some columns of the image file at `offset`.

    One above MAX_IMAGE_BYTES never stands in memory whole: it is hashed by pieces, and counts as
    one that does not decode.
    """
    if num_bytes <= MAX_IMAGE_BYTES:
        return find_values(reader.read(offset, num_bytes), names)
    names = list(names)
    found: dict[str, Any] = {}
    if "image_hash" in names:
        hasher = xxhash.xxh3_128()
        for start in range(0, num_bytes, _PIECE_BYTES):
            hasher.update(reader.fetch(offset + start, min(_PIECE_BYTES, num_bytes - start)))
        found["image_hash"] = hasher.digest()
    if any(name in _OF_PIXELS for name in names):
        found["decodable"] = False
    return found


def columns_of(values: Sequence[Mapping[str, Any]], names: Iterable[str]) -> dict[str, pa.Array]:
    """Return the columns `names` from one mapping a sample; what is not in it is null."""
    return {name: pa.array([v.get(name) for v in values], type_of(name)) for name in names}


def compute_columns(
    reader: SpanReader, samples: pa.Table, names: Iterable[str]
) -> dict[str, pa.Array]:
    """Return the columns `names`, sorted, for the samples of an index; `reader` reads its tar.

    One image at a time is in memory. Images are read only where a name asks for them.
    """
    names = sorted(set(names))
    for name in names:
        type_of(name)  # says so now where no scan makes it
    of_image, of_json = list(filter(needs_image, names)), list(filter(needs_json, names))
    wanted = ["problem", "image_offset", "image_size", "member_ext", "member_offset", "member_size"]
    values: list[dict[str, Any]] = []
    for batch in samples.select(wanted).to_batches(max_chunksize=1000):
        for row in batch.to_pylist():
            values.append({})
            if row["problem"] is None and of_image:
                span = row["image_offset"], row["image_size"]
                values[-1] |= read_values(reader, *span, of_image)
            if row["problem"] is None and of_json and "json" in row["member_ext"]:
                at = row["member_ext"].index("json")
                offset, size = row["member_offset"][at], row["member_size"][at]
                if size <= MAX_JSON_BYTES:
                    values[-1] |= find_values(reader.read(offset, size), of_json)
    return columns_of(values, names)


def _of_image(data: Any, names: list[str]) -> dict[str, Any]:
    found = {name: _OF_BYTES[name][1](data) for name in names if name in _OF_BYTES}
    of_pixels = [name for name in names if name in _OF_PIXELS]
    if of_pixels:
        image = decode_image(data)
        if image is None:
            return {**found, "decodable": False}
        found |= {name: _OF_PIXELS[name][1](image) for name in of_pixels}
    return found


def _of_json(data: bytes, names: list[str]) -> dict[str, str | None]:
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return {name: _text(look_up(content, name.removeprefix(JSON_PREFIX))) for name in names}


def _text(value: Any) -> str | None:
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    # Half of a surrogate pair, written as \ud800: Parquet holds UTF-8 only.
    return text.encode("utf-8", "replace").decode()
