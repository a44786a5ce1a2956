"""Golden cases of curation: MetaCLIP 1 and 2 matching, counts, probabilities, thresholds; WFPP.

Files are found by their names' form, with any SET of captions and any t in them:

    standin_metadata.json (or any *metadata.json)      the entries
    metaclip_captions.json                             captions with ids, and by those ids
        metaclip_expected_matches*.json, metaclip2_expected_matches*.json
        metaclip_expected_entry_counts*.json, wfpp_encode_text_*.json
    metaclip_SET_captions.json                         captions, and over them
        metaclip_SET_entry_counts.json, metaclip_balance_SET_t*.json
        wfpp_SET_counter.json, wfpp_SET_pdrop_t*.json
    wfpp_SET_scores_t*.json                            captions and scores
    metaclip2_threshold_case*.json                     counts and thresholds
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from configs import draws
from curation.balancing.base import entry_probability, keep_probability
from curation.balancing.matching import EntryMatcher, Spacing, space_text
from curation.balancing.metaclip2 import tail_share, threshold_of_tail_share
from curation.global_rules.wfpp import WORD_COUNT, merge_counts, prune_probability, score_captions
from curation.global_rules.wfpp_words import byte_encoded, hashed_words, word_hash, words_of
from tools.conformance.table import Row, Verdict, compare, equal

# The golden probabilities are rounded to nine decimals.
_ROUNDED = 0.5000001e-9
_EXACT = 1e-12
_SIGMAS = 4.0
_MIN_COUNT = 5
_MAX_WORDS = 30


class Golden:
    """A folder of golden files; what several cases need is computed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._matched: dict[str, pa.Array] = {}

    def load(self, name: str) -> Any:
        """Return the content of one file; None where it is not there."""
        path = self.folder / name
        return json.loads(path.read_text()) if path.is_file() else None

    def find(self, pattern: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Yield (file name, groups) of the files whose whole name fits a regular expression."""
        for path in sorted(self.folder.iterdir()):
            found = re.fullmatch(pattern, path.name)
            if found:
                yield path.name, found.groups()

    @cached_property
    def entries(self) -> list[str] | None:
        """The metadata."""
        names = ["standin_metadata.json", *(name for name, _ in self.find(r".*metadata\.json"))]
        return next((found for name in names if (found := self.load(name)) is not None), None)

    @cached_property
    def captions(self) -> dict[str, str] | None:
        """Id -> caption."""
        rows = self.load("metaclip_captions.json")
        return rows and {row["id"]: row["text"] for row in rows}

    def texts(self, name: str) -> list[str] | None:
        """Return the captions of a set."""
        content = self.load(f"metaclip_{name}_captions.json")
        return content and list(content["texts"])

    def match(self, captions: list[str], key: str, spacing: Spacing = "v1") -> pa.Array:
        """Return the matches of some captions, remembered by `key`."""
        if key not in self._matched:
            assert self.entries is not None
            self._matched[key] = EntryMatcher(self.entries, spacing).match(captions)
        return self._matched[key]


def check(folder: Path) -> Iterator[Row]:
    """Yield a row for each quantity of each golden file in the folder."""
    golden = Golden(folder)
    for case in (
        _matches,
        _tricky_counts,
        _set_counts,
        _balance,
        _thresholds,
        _words,
        _wfpp,
        _scores,
    ):
        yield from case(golden)


def _lacking(case: str, what: str) -> Row:
    return Row(case, "-", 0, np.nan, np.nan, "not built", f"{what} is not in the folder")


def _matches(golden: Golden) -> Iterator[Row]:
    for case, (version, _) in golden.find(r"metaclip(2?)_expected_matches(.*)\.json"):
        if golden.captions is None or golden.entries is None:
            yield _lacking(case, "the metadata or metaclip_captions.json")
            continue
        expected = {row["id"]: row for row in golden.load(case)}
        captions = {i: text for i, text in golden.captions.items() if i in expected}
        spacing: Spacing = "v2" if version else "v1"
        found = golden.match(list(captions.values()), f"{case} {spacing}", spacing).to_pylist()
        ours = dict(zip(captions, found, strict=True))
        wrong = sum(ours.get(i) != row["matched_ids"] for i, row in expected.items())
        yield equal(case, "captions with the same matched ids", len(expected), wrong)
        named = {i: row for i, row in expected.items() if "matched" in row}
        if named:
            entries = golden.entries
            wrong = sum(
                [entries[e] for e in ours.get(i, [])] != r["matched"] for i, r in named.items()
            )
            yield equal(case, "captions with the same matched strings", len(named), wrong)
        spaced = {i: row["spaced"] for i, row in expected.items() if row.get("spaced") is not None}
        if spaced:
            wrong = sum(space_text(captions.get(i, "")) != text for i, text in spaced.items())
            yield equal(case, "spaced texts", len(spaced), wrong)


def _compare_counts(
    golden: Golden, case: str, captions: list[str], key: str, expected: dict[str, int]
) -> Row:
    assert golden.entries is not None
    ids = golden.match(captions, key).flatten().to_numpy()
    counts = np.bincount(ids, minlength=len(golden.entries))
    ours = {golden.entries[i]: int(counts[i]) for i in np.flatnonzero(counts)}
    names = ours.keys() | expected.keys()
    wrong = sum(ours.get(name, 0) != expected.get(name, 0) for name in names)
    return equal(case, "entry counts", len(names), wrong)


def _tricky_counts(golden: Golden) -> Iterator[Row]:
    for case, _ in golden.find(r"metaclip_expected_entry_counts(.*)\.json"):
        if golden.captions is None or golden.entries is None:
            yield _lacking(case, "the metadata or metaclip_captions.json")
            continue
        captions = list(golden.captions.values())
        yield _compare_counts(golden, case, captions, "captions", golden.load(case))


def _set_counts(golden: Golden) -> Iterator[Row]:
    for case, (name,) in golden.find(r"metaclip_(?!expected_)(.+)_entry_counts\.json"):
        texts = golden.texts(name)
        if texts is None or golden.entries is None:
            yield _lacking(case, f"the metadata or metaclip_{name}_captions.json")
            continue
        yield _compare_counts(golden, case, texts, name, golden.load(case))


def _balance(golden: Golden) -> Iterator[Row]:
    for case, (name, _) in golden.find(r"metaclip_balance_(.+)_t([^_]+)\.json"):
        texts, expected = golden.texts(name), golden.load(case)
        if texts is None or golden.entries is None:
            yield _lacking(case, f"the metadata or metaclip_{name}_captions.json")
            continue
        matched = golden.match(texts, name)
        counts = np.bincount(matched.flatten().to_numpy(), minlength=len(golden.entries))
        keep = keep_probability(matched, entry_probability(counts, expected["t"]))
        yield compare(case, "keep probabilities", keep, expected["keep_prob"], atol=_ROUNDED)
        total = float(keep.sum())
        yield compare(
            case,
            "sum of keep probabilities",
            total,
            expected["expected_keep_sum"],
            atol=0,
            rtol=1e-9,
        )
        sigma = max(float(np.sqrt((keep * (1 - keep)).sum())), 1e-12)
        ours = [
            int((draws.uniform(s, "conformance", np.arange(len(keep))) < keep).sum())
            for s in range(3)
        ]
        kept = {key: len(v) for key, v in expected.items() if key.endswith("_kept")}
        for sampler, number in [
            *kept.items(),
            *((f"our draw, seed {s}", n) for s, n in enumerate(ours)),
        ]:
            z = abs(number - total) / sigma
            verdict: Verdict = "pass" if z <= _SIGMAS else "FAIL"
            yield Row(case, f"{sampler}: sigmas from the sum", len(keep), z, _SIGMAS, verdict)


def _thresholds(golden: Golden) -> Iterator[Row]:
    for case, _ in golden.find(r"metaclip2_threshold_case(.*)\.json"):
        content = golden.load(case)
        english, other = np.array(content["en_counts"]), np.array(content["other_counts"])
        share = tail_share(english, content["t_en"])
        yield compare(case, "tail share of the reference", share, content["p_en"], atol=_EXACT)
        t = threshold_of_tail_share(np.sort(other), share)
        yield compare(case, "t of the other language", t, content["t_other"], atol=0)
        ours = entry_probability(other, t) if t else np.zeros(len(other))
        yield compare(case, "entry probabilities", ours, content["probs_other"], atol=_EXACT)


def _words(golden: Golden) -> Iterator[Row]:
    for case, _ in golden.find(r"wfpp_encode_text_(.*)\.json"):
        if golden.captions is None:
            yield _lacking(case, "metaclip_captions.json")
            continue
        rows, captions = golden.load(case), golden.captions
        wrong = sum(
            [byte_encoded(word) for word in words_of(captions.get(row["id"], ""))] != row["words"]
            for row in rows
        )
        yield equal(case, "captions with the same words", len(rows), wrong)


class _Table:
    """Words of some captions with their counts, as the WFPP rule sums them."""

    def __init__(self, captions: list[str]) -> None:
        self.hashes = hashed_words(captions)
        values, counts = np.unique(self.hashes.flatten().to_numpy(), return_counts=True)
        records = np.zeros(len(values), WORD_COUNT)
        records["hash"], records["count"] = values, counts
        # In two halves: sums must be associative.
        summed = merge_counts([records[::2], records[1::2]])
        self.table = summed[summed["count"] >= _MIN_COUNT]
        self.total = int(self.table["count"].sum())
        self._names = {word_hash(w): byte_encoded(w) for c in captions for w in words_of(c)}

    def named(self, values: npt.ArrayLike) -> dict[str, float]:
        """Return word -> value."""
        names = [self._names[h] for h in self.table["hash"].tolist()]
        return dict(zip(names, np.asarray(values).tolist(), strict=True))

    def scores(self, t: float) -> npt.NDArray[np.float64]:
        """Return the released code's scores of the captions."""
        first = [words[:_MAX_WORDS] for words in self.hashes.to_pylist()]
        lengths = np.array([len(words) for words in first], np.int64)
        flat = np.array([h for words in first for h in words], np.uint64)
        found = prune_probability(self.table["count"], self.total, t)
        found = np.where(found < 0, 1.0, found)
        at = np.minimum(np.searchsorted(self.table["hash"], flat), len(found) - 1)
        known = self.table["hash"][at] == flat
        return score_captions(np.where(known, found[at], 1.0), lengths, True)


def _wfpp(golden: Golden) -> Iterator[Row]:
    tables: dict[str, _Table] = {}
    for case, (name, kind, t) in golden.find(r"wfpp_(.+)_(counter|pdrop)(?:_t([^_]+))?\.json"):
        texts = golden.texts(name)
        if texts is None:
            yield _lacking(case, f"metaclip_{name}_captions.json")
            continue
        table = tables.setdefault(name, _Table(texts))
        expected = golden.load(case)
        counts = table.table["count"]
        values = counts if kind == "counter" else prune_probability(counts, table.total, float(t))
        ours = table.named(values)
        missing = len(ours.keys() ^ expected.keys())
        yield equal(case, "words counted often enough", len(expected), missing)
        common = sorted(ours.keys() & expected.keys())
        quantity, atol = ("counts", 0.0) if kind == "counter" else ("probabilities", _EXACT)
        yield compare(
            case, quantity, [ours[w] for w in common], [expected[w] for w in common], atol=atol
        )


def _scores(golden: Golden) -> Iterator[Row]:
    for case, (name, _) in golden.find(r"wfpp_(.+)_scores_t([^_]+)\.json"):
        content = golden.load(case)
        rows = content["rows_in_original_sorted_order"]
        texts = golden.texts(name)
        pool = _Table(texts) if texts is not None else None
        own = _Table([row[1] for row in rows])
        if pool is not None:  # the pool's counts, the rows' captions
            own.table, own.total = pool.table, pool.total
        ours = own.scores(content["threshold"])
        expected = np.array([np.nan if row[2] is None else row[2] for row in rows], np.float64)
        yield compare(case, "scores", ours, expected, atol=_EXACT)
        ranked = ours[np.argsort(-ours, kind="stable")]
        yield compare(case, "scores in sorted order", ranked, expected, atol=_EXACT)
