"""The keep policy: which of linked samples is the best.

A rank is a string of bytes, and the smaller the better: the wanted properties in order, then the
uid, so that no two samples share one and the last 16 bytes say whose it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.dedup.links import IntArray

Policy = Literal["resolution", "caption_length", "key"]
RANK_COLUMNS = ("uid", "key", "caption", "width", "height")
UID_BYTES = 16
_TOP = 1 << 63


def _most_pixels(samples: pa.Table) -> list[bytes]:
    width, height = samples["width"].to_pylist(), samples["height"].to_pylist()
    return [(_TOP - w * h).to_bytes(8, "big") for w, h in zip(width, height, strict=True)]


def _longest_caption(samples: pa.Table) -> list[bytes]:
    return [(_TOP - len(caption)).to_bytes(8, "big") for caption in samples["caption"].to_pylist()]


def _first_key(samples: pa.Table) -> list[bytes]:
    # A key holds no NUL (shards.split_name), so that the end of one sorts before any more of it.
    return [key.encode() + b"\0" for key in samples["key"].to_pylist()]


_POLICIES: dict[str, Callable[[pa.Table], list[bytes]]] = {
    "resolution": _most_pixels,
    "caption_length": _longest_caption,
    "key": _first_key,
}


def make_ranks(samples: pa.Table, keep: Sequence[Policy]) -> pa.Array:
    """Return the rank of each sample: binary, the smaller the better."""
    return join_ranks([rank_part(samples, policy) for policy in keep], samples)


def rank_part(samples: pa.Table, policy: Policy) -> list[bytes]:
    """Return what one policy says of each sample: bytes, the smaller the better."""
    return _POLICIES[policy](samples)


def join_ranks(parts: Sequence[list[bytes]], samples: pa.Table) -> pa.Array:
    """Return the ranks made of the parts, in order, and the uid."""
    parts = [*parts, samples["uid"].to_pylist()]
    return pa.array(map(b"".join, zip(*parts, strict=True)), pa.binary())


def rank_positions(ranks: pa.Array) -> IntArray:
    """Return the position of each rank when all are sorted; equal ranks are of one sample."""
    positions: IntArray = pc.rank(ranks, tiebreaker="dense").to_numpy().astype(np.int64) - 1
    return positions
