"""The words of a caption as WFPP counts them: those of CLIP's tokenizer before it cuts them up."""

from __future__ import annotations

import html
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

# Contractions, runs of letters, single digits, runs of other marks (Radford et al., CLIP).
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@lru_cache(maxsize=1)
def _word_pattern() -> Any:
    import regex  # not at the top: a job without this rule does not wait for it

    return regex.compile(_WORD, regex.IGNORECASE)


def clean_caption(caption: str) -> str:
    """Return the caption mended (ftfy), unescaped twice, with single spaces, in lower case."""
    # Nothing in plain printable ASCII is there to mend; ftfy takes ten times as long as the rest.
    if not (caption.isascii() and caption.isprintable() and "&" not in caption):
        import ftfy  # as regex

        caption = html.unescape(html.unescape(ftfy.fix_text(caption)))
    return " ".join(caption.split()).lower()


def words_of(caption: str) -> list[str]:
    """Return the words of a caption in order, as often as they stand there."""
    words: list[str] = _word_pattern().findall(clean_caption(caption))
    return words


def byte_encoded(word: str) -> str:
    """Return the word as the released code spells it: a printable character for each byte."""
    table = _byte_table()
    return "".join(table[byte] for byte in word.encode())


@lru_cache(maxsize=1)
def _byte_table() -> list[str]:
    """Bytes that print stand for themselves, the others for U+0100, U+0101, ... (GPT-2)."""
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printed]
    return [
        chr(byte) if byte in printed else chr(0x100 + hidden.index(byte)) for byte in range(256)
    ]


@lru_cache(maxsize=1 << 18)
def word_hash(word: str) -> int:
    """Return the 64 bits that stand for a word in tables of the whole pool."""
    return xxhash.xxh3_64_intdigest(word.encode())


def hashed_words(captions: list[str]) -> pa.ListArray:
    """Return the words of each caption as list<uint64> of hashes."""
    lists = [[word_hash(word) for word in words_of(caption)] for caption in captions]
    offsets = np.cumsum([0, *map(len, lists)])
    hashes: npt.NDArray[np.uint64] = np.fromiter(
        (value for words in lists for value in words), np.uint64, int(offsets[-1])
    )
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(hashes))
