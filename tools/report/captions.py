"""Captions of a dataset: which languages there are, and a sample of them to be searched."""

from __future__ import annotations

from tools.report.html import Html, details, element, table
from tools.report.sources import CurationReport

MAX_LANGUAGES = 12


def language_parts(report: CurationReport) -> list[Html]:
    """Return the table of languages; nothing where no caption was sampled."""
    found = report.languages
    if found is None or not found.before:
        return []
    totals = sum(found.before.values()), sum(found.after.values())
    codes = list(found.before)
    rows = [_row(code, found.before[code], found.after.get(code, 0), totals)
            for code in codes[:MAX_LANGUAGES]]  # fmt: skip
    if len(codes) > MAX_LANGUAGES:
        others = codes[MAX_LANGUAGES:]
        before, after = (sum(of.get(c, 0) for c in others) for of in (found.before, found.after))
        rows.append(_row(f"{len(others)} others", before, after, totals))
    said = (
        f"Of {totals[0]:,} captions chosen by hash, {totals[1]:,} of them kept, by fastText's "
        f"lid.176.ftz; unclear: confidence below {found.min_confidence:g}. Captions of a few words "
        "can be of many languages: expect an error in ten."
    )
    header = ("language", "captions before", "of all", "captions after", "of all")
    return [
        element("h3", "Languages"),
        element("p", said),
        table(header, rows, caption="Languages of the captions, before and after"),
    ]


def _row(code: str, before: int, after: int, totals: tuple[int, int]) -> tuple[object, ...]:
    return (
        element("bdi", code),
        f"{before:,}",
        _percent(before, totals[0]),
        f"{after:,}",
        _percent(after, totals[1]),
    )


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}\u00a0%" if whole else "0\u00a0%"


def search_part(report: CurationReport) -> Html | None:
    """Return the sample of captions with its search box; without scripts it is a plain list."""
    if not report.caption_sample:
        return None
    rows = [
        (element("bdi", caption), element("bdi", outcome), language)
        for caption, outcome, language in report.caption_sample
    ]
    label = element("label", "Search these captions ", element("input", type="search"))
    count = element("output", f"{len(rows):,} captions", aria_live="polite")
    listed = table(("caption", "what became of it", "language"), rows, caption="Captions")
    title = f"Search a sample of {len(rows):,} captions, kept and dropped, chosen by hash"
    return details(
        title,
        element(
            "div",
            element("form", label, " ", count, hidden=True, role="search"),
            element("div", listed, class_="long"),
            data_search="",
        ),
    )
