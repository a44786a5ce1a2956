"""Build HTML so that nothing is ever escaped by hand: what is not `Html` already is text.

Captions, class names and paths are hostile: a text cannot close a tag, open one, or turn the
direction of the page around it (pass `dir="auto"` for foreign text).
"""

from __future__ import annotations

import html
from collections.abc import Iterable

_VOID = frozenset(
    {"img", "meta", "br", "hr", "line", "rect", "circle", "polyline", "path", "input"}
)


class Html(str):
    """A piece of HTML. Made by `element` and `join` only."""

    __slots__ = ()


def text(value: object) -> Html:
    """Return `value` as escaped text; control characters and lone surrogates become U+FFFD."""
    if isinstance(value, Html):
        return value
    clean = "".join(c if _is_printable(c) else "\ufffd" for c in str(value))
    return Html(html.escape(clean, quote=True))


def _is_printable(character: str) -> bool:
    code = ord(character)
    return character in "\t\n" or (code >= 0x20 and not 0x7F <= code < 0xA0 and code >> 11 != 27)


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """Return `<name attributes>children</name>`.

    Children: None is left out, `Html` stands as it is, anything else is escaped. Attributes: a
    trailing "_" is removed, other "_" become "-"; None and False are left out, True has no value.
    """
    written = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = key.rstrip("_").replace("_", "-")
        written.append(label if value is True else f'{label}="{text(value)}"')
    if name in _VOID and not children:
        return Html(f"<{' '.join(written)}>" if name in _HTML_VOID else f"<{' '.join(written)}/>")
    return Html(f"<{' '.join(written)}>{join(children)}</{name}>")


_HTML_VOID = frozenset({"img", "meta", "br", "hr", "input"})


def join(parts: Iterable[object]) -> Html:
    """Return the parts one after another, escaped where they are not `Html`."""
    return Html("".join(text(part) for part in parts if part is not None))


def table(header: Iterable[object], rows: Iterable[Iterable[object]], *, caption: str) -> Html:
    """Return a table with column headers; the first cell of a row is its header.

    It scrolls sideways on its own where the screen is narrow.
    """
    head = element("tr", *(_header(cell) for cell in header))
    body = []
    for row in rows:
        first, *others = row
        cells = [element("th", first, scope="row"), *(element("td", cell) for cell in others)]
        body.append(element("tr", *cells))
    content = element(
        "table", element("caption", caption), element("thead", head), element("tbody", *body)
    )
    return element("div", content, class_="scroll", tabindex="0", role="region", aria_label=caption)


def _header(cell: object) -> Html:
    return element("th", cell, scope="col") if cell else element("td")


def details(summary: object, *children: object, is_open: bool = False) -> Html:
    """Return a part that can be folded."""
    return element("details", element("summary", summary), *children, open=is_open)
