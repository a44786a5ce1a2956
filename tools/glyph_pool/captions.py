"""What is said of a glyph: its Unicode name in a few natural phrasings; the words of all names."""

from __future__ import annotations

import unicodedata

# `{c}` is the class name. The phrasings of the captions without a style, so that a prompt looks
# like what the model read.
TEMPLATES = ("{c}", "a {c}", "the sign {c}", "the character {c}")

_PLAIN = ("{name}", "{article} {name}", "the sign {name}", "the character {name}")
_STYLED = ("{article} {name} in {style}", "{name}, {style}", "the sign {name}, {style}")


def character_name(codepoint: int) -> str:
    """Return the lower-cased Unicode name: "white chess queen"."""
    return unicodedata.name(chr(codepoint)).lower()


def describe(codepoint: int, style: str, draw: float) -> str:
    """Return the caption of a glyph in a style ("bold italic").

    `draw` from [0, 1) chooses the phrasing: four without the style, three with it.
    """
    phrasings = _PLAIN + _STYLED
    phrasing = phrasings[int(draw * len(phrasings))]
    name = character_name(codepoint)
    article = "an" if name[0] in "aeio" or name.startswith("up") else "a"
    return phrasing.format(name=name, article=article, style=style)


def code_caption(codepoint: int) -> str:
    """Return the caption that says nothing: the code, as web pages often title such pictures."""
    return f"U+{codepoint:04X}"


def name_words() -> list[str]:
    """Return the distinct words of all Unicode names of this Python, lower-cased and sorted.

    Words are parted by spaces. A name that ends in its own code ("cjk unified ideograph-4e00")
    loses that code: a number is not a word.
    """
    words = set()
    for codepoint in range(0x110000):
        name = unicodedata.name(chr(codepoint), "")
        if name:
            words.update(name.removesuffix(f"-{codepoint:04X}").lower().split())
    return sorted(words)
