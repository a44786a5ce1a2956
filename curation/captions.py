"""Where the captions of a sample are: its `.txt`, keys of its `.json`, or several of those.

    "txt"              the whole text of the member with that extension
    "txt#lines"        every line of it is a caption
    "json:caption"     a key of a JSON: a text, or a list of texts; `json:a.b` is b in the object a
    "txt|json:caption" the first of several places that has any

A configuration lists such places. The captions of a sample are all that they have, in that order,
each text once; the first is *the* caption.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from configs.errors import UsageError

DEFAULT_PLACES = ("txt|json:caption",)
# A caption or a JSON beyond these is an attack or a mistake, and must not fill a worker's memory.
MAX_CAPTION_BYTES = 1 << 20
MAX_JSON_BYTES = 16 << 20

NO_CAPTION, BAD_JSON = "no caption", "bad json"
TOO_LONG, NOT_UTF_8 = "caption too long", "caption not utf-8"

# The bytes of the member with a number, the first n of them.
Content = Callable[[int, int], bytes]


class Place(NamedTuple):
    """One place: members of an extension; of a JSON the key, of a text perhaps line by line."""

    extension: str
    key: str | None
    is_lines: bool


def parse_place(text: str) -> Place:
    """Read one alternative of a place.

    Raises:
        UsageError: it is none.
    """
    name, colon, key = text.strip().partition(":")
    extension, sharp, how = name.partition("#")
    extension = extension.lower().removeprefix(".")
    is_good = extension and bool(key) == bool(colon) and (how == "lines") == bool(sharp)
    if not is_good or (sharp and colon):
        raise UsageError(
            f"a place of captions: got {text!r}, expected EXTENSION, EXTENSION#lines, or "
            'EXTENSION:KEY for a key of a JSON, such as "txt" or "json:caption".'
        )
    return Place(extension, key or None, bool(sharp))


class CaptionFinder:
    """Finds the captions of samples in the places of a configuration."""

    def __init__(self, places: Iterable[str]) -> None:
        self._groups = [[parse_place(one) for one in text.split("|")] for text in places]
        first = self._groups[0][0]
        # The usual case: one place, and a text at that, which most samples have.
        is_simple = len(self._groups) == 1 and first.key is None and not first.is_lines
        self.simple = first.extension if is_simple else None
        self.extensions = frozenset(place.extension for group in self._groups for place in group)

    def find(
        self, members: Sequence[tuple[str, int]], sizes: Sequence[int], content: Content
    ) -> tuple[list[str], str | None]:
        """Return the captions of a sample, and why there is none.

        `members`: (extension, number) of its whole members; `sizes` are in bytes, by number.
        """
        if self.simple is not None:
            for extension, number in members:
                if extension == self.simple:
                    return _texts(self._groups[0][0], number, sizes[number], content, {})
        numbers: dict[str, int] = {}
        for extension, number in members:
            numbers.setdefault(extension, number)
        parsed: dict[int, Any] = {}
        captions: dict[str, None] = {}
        first_problem = None
        for group in self._groups:
            problem: str | None = NO_CAPTION
            for place in group:
                found_number = numbers.get(place.extension)
                if found_number is None:
                    continue
                read = _texts if place.key is None else _values
                found, problem = read(place, found_number, sizes[found_number], content, parsed)
                captions.update(dict.fromkeys(found))
                if problem != NO_CAPTION:  # it has one, or should have and is broken
                    break
            first_problem = first_problem or problem
        return list(captions), None if captions else first_problem


def _texts(
    place: Place, number: int, size: int, content: Content, parsed: dict[int, Any]
) -> tuple[list[str], str | None]:
    if size > MAX_CAPTION_BYTES:
        return [], TOO_LONG
    try:
        text = content(number, size).decode()
    except UnicodeDecodeError:
        return [], NOT_UTF_8
    if not place.is_lines:
        return [text], None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    lines = [line for line in lines if line.strip()]
    return lines, None if lines else NO_CAPTION


def _values(
    place: Place, number: int, size: int, content: Content, parsed: dict[int, Any]
) -> tuple[list[str], str | None]:
    if number not in parsed:
        parsed[number] = _parse(content(number, size)) if size <= MAX_JSON_BYTES else None
    tree = parsed[number]
    if not isinstance(tree, dict):
        return [], BAD_JSON
    assert place.key is not None
    value = look_up(tree, place.key)
    texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    found = []
    for text in texts:
        if not isinstance(text, str):
            continue
        try:
            if len(text.encode()) > MAX_CAPTION_BYTES:
                return [], TOO_LONG
        except UnicodeEncodeError:  # half of a surrogate pair, written as \\ud800
            return [], NOT_UTF_8
        found.append(text)
    return found, None if found else NO_CAPTION


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def look_up(content: Any, key: str) -> Any:
    """Return the value of a key: as it is written, else of `a.b` the key b of the object a."""
    if not isinstance(content, dict):
        return None
    if key in content:
        return content[key]
    first, dot, rest = key.partition(".")
    return look_up(content.get(first), rest) if dot else None
