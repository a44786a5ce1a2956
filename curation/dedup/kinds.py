"""The kinds of links: by what samples meet in a bucket, and when two of a bucket are linked.

image    equal image files (xxh3-128)             exact
url      equal URLs                               exact
caption  equal normalised captions                exact
phash    perceptual hashes within a distance      near: the hash is cut into distance + 1 bands,
dhash    difference hashes within a distance      and hashes within it agree in one at least
text     captions of similar shingles (Jaccard)   near: MinHash-LSH (text.py)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import xxhash

from curation.dedup.links import BoolArray, IntArray, Linked, link_equal, link_near
from curation.dedup.text import NearTexts, UInt64Array, normalize_caption, num_rows, text_bands

KindName = Literal["image", "url", "caption", "phash", "dhash", "text"]
PIXEL_KINDS = ("phash", "dhash")
HASH_BITS = 64
COLORS = "colors"
COLOR_BYTES = 48


class Records(NamedTuple):
    """One record for each (sample, band): the sample's row, its bucket, and what is compared."""

    row: IntArray
    high: UInt64Array  # (high, low) names the bucket
    low: UInt64Array
    item: pa.Array | None  # None: all of a bucket are linked


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One kind of links."""

    name: str
    reason: str
    needs: frozenset[str]  # columns that the scan must compute
    columns: tuple[str, ...]  # columns of the index
    num_bands: int
    records: Callable[[pa.Table], Records]
    near: Callable[[pa.Array], Callable[[IntArray, IntArray], BoolArray]] | None

    def link(
        self, bucket: IntArray, rank: IntArray, item: pa.Array | None, *, max_band: int
    ) -> Linked:
        """Link the records of some buckets; `item` as in Records."""
        if self.near is None or item is None:
            return Linked(link_equal(bucket, rank), np.zeros(0, np.int64))
        encoded = item.dictionary_encode()
        codes = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        near = self.near(encoded.dictionary)
        return link_near(bucket, rank, codes, near, max_band=max_band)


def make_kind(
    name: KindName,
    *,
    distance: int,
    max_color: float | None,
    min_jaccard: float,
    shingle: int,
    url_column: str,
) -> Kind:
    """Return a kind of links with its parameters."""
    if name == "image":
        return _exact(name, "image_hash", True, lambda value: bytes(value))
    if name == "url":
        return _exact(name, url_column, True, _url_digest)
    if name == "caption":
        return _exact(name, "caption", False, caption_digest)
    if name == "text":
        rows = num_rows(min_jaccard)
        bands = text_bands([""], shingle, rows).shape[1]
        return Kind(
            name=name,
            reason="similar caption",
            needs=frozenset(),
            columns=("caption",),
            num_bands=bands,
            records=lambda samples: _text_records(samples, shingle, rows),
            near=lambda texts: NearTexts(texts.to_pylist(), shingle, min_jaccard),
        )
    return Kind(
        name=name,
        reason="similar image",
        needs=frozenset({name, COLORS}),
        columns=(name, COLORS),
        num_bands=distance + 1,
        records=lambda samples: _hash_records(samples, name, distance),
        near=lambda items: _near_hashes(items, distance, max_color),
    )


def caption_digest(caption: str) -> bytes | None:
    """Return the xxh3-128 of a normalised caption; None of an empty one, which equals no other."""
    text = normalize_caption(caption)
    return xxhash.xxh3_128_digest(text.encode("utf-8", "replace")) if text else None


def _url_digest(url: str) -> bytes | None:
    text = url.strip().split("#", 1)[0]
    return xxhash.xxh3_128_digest(text.encode("utf-8", "replace")) if text else None


def _exact(name: str, column: str, is_computed: bool, digest: Callable[[Any], Any]) -> Kind:
    def records(samples: pa.Table) -> Records:
        values = samples[column].to_pylist()
        digests = [None if value is None else digest(value) for value in values]
        rows = np.array([i for i, d in enumerate(digests) if d is not None], np.int64)
        high, low = digest_words([d for d in digests if d is not None])
        return Records(rows, high, low, None)

    return Kind(
        name=name,
        reason=f"same {name}",
        needs=frozenset({column} if is_computed else ()),
        columns=(column,),
        num_bands=1,
        records=records,
        near=None,
    )


def digest_words(digests: Sequence[bytes]) -> tuple[UInt64Array, UInt64Array]:
    """Return the two halves of 128-bit digests."""
    words = np.frombuffer(b"".join(digests), ">u8").reshape(-1, 2).astype(np.uint64)
    return words[:, 0], words[:, 1]


def band_edges(num_bands: int) -> IntArray:
    """Return the bits at which a hash is cut: [num_bands + 1], from 0 to 64, as even as can be."""
    return np.linspace(0, HASH_BITS, num_bands + 1).round().astype(np.int64)


def _hash_records(samples: pa.Table, column: str, distance: int) -> Records:
    some = samples.filter(samples[column].is_valid())
    rows = np.flatnonzero(samples[column].is_valid().to_numpy()).astype(np.int64)
    hashes = some[column].to_numpy()
    edges = band_edges(distance + 1)
    bands = [
        (hashes >> np.uint64(start)) & np.uint64((1 << int(end - start)) - 1)
        for start, end in pairwise(edges)
    ]
    number = np.repeat(np.arange(distance + 1, dtype=np.uint64), len(hashes))
    # What is compared: the hash, 8 bytes, and the colours.
    packed = hashes.astype(">u8").tobytes()
    items = [packed[8 * i : 8 * i + 8] + c for i, c in enumerate(some[COLORS].to_pylist())]
    item = pa.array(items * (distance + 1), pa.binary(8 + COLOR_BYTES))
    return Records(np.tile(rows, distance + 1), number, np.concatenate(bands), item)


def _near_hashes(
    items: pa.Array, distance: int, max_color: float | None
) -> Callable[[IntArray, IntArray], BoolArray]:
    raw = np.frombuffer(b"".join(items.to_pylist()), np.uint8).reshape(-1, 8 + COLOR_BYTES)
    hashes = np.ascontiguousarray(raw[:, :8]).view(">u8").reshape(-1).astype(np.uint64)
    colors = raw[:, 8:].astype(np.int16)

    def near(a: IntArray, b: IntArray) -> BoolArray:
        is_near: BoolArray = np.bitwise_count(hashes[a][:, None] ^ hashes[b][None, :]) <= distance
        if max_color is not None:
            rows, columns = np.nonzero(is_near)
            difference = np.abs(colors[a[rows]] - colors[b[columns]]).mean(axis=1)
            is_near[rows, columns] = difference <= max_color
        return is_near

    return near


def _text_records(samples: pa.Table, shingle: int, rows: int) -> Records:
    captions = [normalize_caption(caption) for caption in samples["caption"].to_pylist()]
    some = np.array([i for i, text in enumerate(captions) if text], np.int64)
    texts = pa.array([captions[i] for i in some], pa.string())
    encoded = texts.dictionary_encode()  # captions repeat: each is hashed once
    bands = text_bands(encoded.dictionary.to_pylist(), shingle, rows)
    num_bands = bands.shape[1]
    of_text = encoded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    number = np.repeat(np.arange(num_bands, dtype=np.uint64), len(some))
    item = pa.chunked_array([texts] * num_bands, pa.string()).combine_chunks()
    return Records(np.tile(some, num_bands), number, bands[of_text].T.reshape(-1), item)
