"""The section on a curated dataset: rule funnel, words before and after, sizes, contact sheets."""

from __future__ import annotations

from collections.abc import Sequence

from tools.report.captions import language_parts, search_part
from tools.report.charts import Axis, Series, histogram, line_chart
from tools.report.html import Html, details, element, join, table
from tools.report.outliers import outlier_parts
from tools.report.pictures import sample_picture
from tools.report.scores import score_parts
from tools.report.sources import CurationReport, Dataset, Entries, SampleReference

NUM_TOP_ROWS = 20
NUM_CAPTION_ROWS = 20
_KEPT = "kept"
_HISTOGRAM_TITLES = {
    "image_shorter_side": ("Shorter side of the images", "pixels"),
    "image_longer_side": ("Longer side of the images", "pixels"),
    "image_aspect": ("Aspect ratio of the images", "width / height"),
    "caption_words": ("Length of the captions in words", "words"),
    "caption_characters": ("Length of the captions in characters", "characters"),
}


def dataset_section(dataset: Dataset, heading: str) -> Html:
    """Return the section of one dataset."""
    report = dataset.report
    return element(
        "section",
        element("h2", heading),
        _account(report),
        _warnings(report),
        _funnel(report),
        _sources(report),
        _troubled_shards(report),
        element("h3", "Words before and after"),
        _frequencies(report),
        *_captions(report),
        *_duplicates(report),
        *outlier_parts(report, _card),
        *language_parts(report),
        search_part(report),
        *score_parts(report, _card),
        element("h3", "Sizes before and after"),
        _histograms(report),
        element("h3", "Samples, kept and dropped"),
        element("p", "Chosen by hash, not by hand. Each picture is read from its source tar."),
        _contact_sheets(report),
        details("Configuration", element("pre", dataset.config)) if dataset.config else None,
    )


def _account(report: CurationReport) -> Html:
    total = report.num_kept + report.num_dropped + report.num_unreadable
    said = (
        f"{report.num_read:,} read = {report.num_kept:,} kept + {report.num_dropped:,} dropped + "
        f"{report.num_unreadable:,} unreadable"
    )
    if total != report.num_read:
        said += f". These do not add up: {report.num_read - total:,} samples are unaccounted for!"
    return element("p", element("strong", said), class_="account")


def _warnings(report: CurationReport) -> Html | None:
    """What came out of a global rule other than was asked for."""
    said = [
        element("li", "warning: ", element("bdi", label), f": {text}")
        for label, values in report.solutions.items()
        for text in values.get("warnings", ())
    ]
    return element("ul", *said, class_="warnings") if said else None


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}\u00a0%" if whole else "0\u00a0%"


def _funnel(report: CurationReport) -> Html:
    rows: list[Sequence[object]] = [
        (
            "in the shards",
            f"{report.num_read:,}",
            _bar(report.num_read, report.num_read),
            _percent(1, 1),
            "",
        )
    ]
    for step in report.funnel:
        label = "readable" if step.rule == "read" else step.rule
        reasons = [
            element("span", f"{count:,} ", element("bdi", reason), class_="reason")
            for reason, count in sorted(step.dropped.items(), key=lambda r: (-r[1], r[0]))
        ]
        share = _percent(step.remaining, report.num_read)
        bar = _bar(step.remaining, report.num_read)
        rows.append((label, f"{step.remaining:,}", bar, share, join(reasons) or "none"))
    header = ("after", "samples left", "", "of all", "dropped here, by reason")
    return table(header, rows, caption="Rule funnel: what each rule left")


def _sources(report: CurationReport) -> Html:
    """One row a source: read, kept, its share of the dataset, and what each rule dropped."""
    rules = [step.rule for step in report.funnel if step.rule != "read"]
    rows = []
    for name, source in report.sources.items():
        wanted = [f"weight {source.weight:g}"] if source.weight is not None else []
        wanted += [f"cap {source.cap:,}"] if source.cap is not None else []
        rows.append(
            (
                element("bdi", name),
                ", ".join(wanted),
                f"{source.num_read:,}",
                f"{source.num_unreadable:,}",
                *(f"{source.dropped.get(rule, 0):,}" for rule in rules),
                f"{source.num_kept:,}",
                _percent(source.num_kept, source.num_read),
                _percent(source.num_kept, report.num_kept),
            )
        )
    header = ("source", "wanted", "read", "unreadable", *rules, "kept", "of it", "of the dataset")
    return table(header, rows, caption="Sources: samples read, dropped by each rule, and kept")


def _bar(count: int, total: int) -> Html:
    width = 100 * count / total if total else 0
    fill = element("span", class_="fill", style=f"width:{width:.2f}%")
    return element("span", fill, class_="track", aria_hidden="true")


def _troubled_shards(report: CurationReport) -> Html | None:
    troubles = [("quarantined", shard) for shard in report.shards.quarantined]
    troubles += [("damaged, salvaged up to there", shard) for shard in report.shards.damaged]
    if not troubles:
        return None
    rows = [(shard.shard, what, shard.why) for what, shard in troubles]
    return table(("shard", "what", "why"), rows, caption="Shards that could not be read whole")


def _frequencies(report: CurationReport) -> Html:
    words = report.words
    charts = [
        _curves(
            f"Words of the captions: {words.before.num_distinct:,} different before, "
            f"{words.after.num_distinct:,} after",
            "word",
            words.before.curve,
            words.after.curve,
        )
    ]
    tables = []
    if report.entries is not None:
        entries = report.entries
        title = (
            f"Entries of the balancer ({entries.balancer.get('name', 'unnamed')}): "
            f"{entries.before.num_matched:,} of {entries.num_entries:,} matched before, "
            f"{entries.after.num_matched:,} after"
        )
        charts.append(_curves(title, "entry", entries.before.curve, entries.after.curve))
        tables += [_imbalance(entries), _head_and_tail(entries), _top_entries(entries)]
    tables.append(_top_words(report))
    return join([element("div", *charts, class_="charts"), *tables])


def _curves(
    title: str, what: str, before: list[tuple[int, int]], after: list[tuple[int, int]]
) -> Html:
    return line_chart(
        title,
        [Series("before", before), Series("after", after)],
        Axis(f"rank of the {what} (1 = most frequent)", is_log=True),
        Axis(f"times the {what} occurs", is_log=True),
    )


def _imbalance(entries: Entries) -> Html:
    """How uneven the concepts are, before and after."""
    before, after = entries.before, entries.after
    shares = [
        (f"{entries.num_head:,} head entries (above t)", before.head_share, after.head_share),
        ("tail entries", before.tail_share, after.tail_share),
        ("the 1 % most frequent entries", before.top_percent_share, after.top_percent_share),
    ]
    rows = [
        (f"share of the matches: {name}", f"{100 * a:.1f}\u00a0%", f"{100 * b:.1f}\u00a0%")
        for name, a, b in shares
    ]
    rows.append(("Gini coefficient of the matches", f"{before.gini:.3f}", f"{after.gini:.3f}"))
    rows.append(("matches", f"{before.num_matches:,}", f"{after.num_matches:,}"))
    caption = "Head and tail of the concepts: how uneven they are"
    return table(("", "before", "after"), rows, caption=caption)


def _head_and_tail(entries: Entries) -> Html:
    rows = [
        (
            f"from {row.lower:,}",
            f"{row.entries_before:,}",
            f"{row.entries_after:,}",
            f"{row.matches_before:,}",
            f"{row.matches_after:,}",
            _percent(row.matches_after, row.matches_before),
        )
        for row in entries.histogram
    ]
    caption = "Entries by the number of samples that have them"
    header = ("samples", "entries before", "after", "their matches before", "after", "left")
    return details(caption, table(header, rows, caption=caption))


def _top_entries(entries: Entries) -> Html:
    rows = [
        (element("bdi", entry), f"{before:,}", f"{after:,}", _percent(after, before))
        for entry, before, after in entries.top[:NUM_TOP_ROWS]
    ]
    caption = f"The {len(rows)} most frequent entries"
    return details(caption, table(("entry", "before", "after", "left"), rows, caption=caption))


def _top_words(report: CurationReport) -> Html:
    before, after = report.words.before.top, report.words.after.top
    rows = []
    for rank in range(min(NUM_TOP_ROWS, max(len(before), len(after)))):
        row: list[object] = [f"{rank + 1}"]
        for top in (before, after):
            word, count = top[rank] if rank < len(top) else ("", 0)
            row += [element("bdi", word), f"{count:,}" if word else ""]
        rows.append(row)
    caption = f"The {len(rows)} most frequent words"
    header = ("rank", "before", "times", "after", "times")
    return details(caption, table(header, rows, caption=caption))


def _captions(report: CurationReport) -> list[Html]:
    """Return the most frequent captions and what became of their samples."""
    parts = []
    for label, captions in report.captions.items():
        rows = []
        for found in captions[:NUM_CAPTION_ROWS]:
            ordered = sorted(found.outcomes.items(), key=lambda o: (-o[1], o[0]))
            outcomes = [
                element("span", f"{count:,} ", element("bdi", outcome), class_="reason")
                for outcome, count in ordered
            ]
            rows.append((element("bdi", found.caption), f"{found.count:,}", join(outcomes)))
        if rows:
            caption = f"The {len(rows)} most frequent captions ({label})"
            parts.append(
                table(("caption", "samples", "what became of them"), rows, caption=caption)
            )
    return [element("h3", "Captions that many samples have"), *parts] if parts else []


def _duplicates(report: CurationReport) -> list[Html]:
    """Return the groups of duplicates, the best sample of each first."""
    parts = []
    for label, found in report.duplicates.items():
        groups = []
        for group in found.groups:
            outcome = group.best.outcome
            said = f"{group.num_dropped:,} went for the first one"
            said += "" if outcome == _KEPT else f", which is out itself: {outcome}"
            cards = [_card(sample) for sample in (group.best, *group.dropped)]
            sheet = element("div", *cards, class_="group-cards")
            groups.append(element("div", sheet, element("p", said), class_="group"))
        if groups:
            title = f"{label}: {found.num_dropped:,} dropped, {len(found.groups)} groups shown"
            parts.append(details(title, element("div", *groups, class_="groups"), is_open=True))
    return [element("h3", "Duplicates"), *parts] if parts else []


def _histograms(report: CurationReport) -> Html:
    charts = []
    for name, counts in report.histograms.items():
        title, unit = _HISTOGRAM_TITLES.get(name, (name, "value"))
        charts.append(histogram(title, counts.edges, counts.before, counts.after, unit))
    return element("div", *charts, class_="charts")


def _contact_sheets(report: CurationReport) -> Html:
    counts = {_KEPT: report.num_kept, **report.dropped, **report.unreadable}
    names = sorted(report.samples, key=lambda name: (name != _KEPT, -counts.get(name, 0), name))
    sheets = []
    for name in names:
        samples = report.samples[name]
        label = (
            "Kept"
            if name == _KEPT
            else f"Dropped: {name}"
            if "/" in name
            else f"Unreadable: {name}"
        )
        title = f"{label} ({counts.get(name, len(samples)):,} samples, {len(samples)} shown)"
        cards = [_card(sample) for sample in samples]
        sheets.append(details(title, element("div", *cards, class_="sheet"), is_open=True))
    return join(sheets)


def _card(sample: SampleReference) -> Html:
    caption = sample.caption if sample.caption is not None else "(no caption)"
    uri = sample_picture(sample)
    if uri is None:
        picture = element("div", "picture not readable", class_="missing")
    else:
        picture = element("img", src=uri, alt=f"picture of sample {sample.key}", decoding="async")
    size = f"{sample.width} × {sample.height}" if sample.width and sample.height else ""
    return element(
        "figure",
        element("div", picture, class_="frame"),
        element(
            "figcaption", element("span", caption, dir="auto", class_="caption", title=caption)
        ),
        element("small", size),
        class_="card",
    )
