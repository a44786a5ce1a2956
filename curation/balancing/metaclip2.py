"""MetaCLIP 2 balancing (Chuang et al., arXiv:2507.22062): one metadata list a language.

A caption is matched with the list of its language, with script-aware spacing (matching.py). The
threshold t of the reference language (English) fixes the share of its matches that the tail has,

    p = sum of count_e over its entries with count_e < t  /  sum of count_e over its entries,

and every other language gets the threshold at which its own tail has that share: with its counts
ascending, t_l is the count at which their running sum is nearest to p of the total. Then as
MetaCLIP, entry by entry. Two things of the released code are mended: a language whose t_l comes
out as 0 (nothing of its tail is so small) gets 1, else all its captions would be dropped; and where
the code draws one of several captions before the balancing, ours balances the caption of the index.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from configs.errors import UsageError, did_you_mean
from curation.balancing.base import ENTRIES, Balancer, FloatArray, IntArray, balancers
from curation.balancing.matching import EntryMatcher
from curation.balancing.metaclip import Size, Threshold, check_threshold
from curation.balancing.metadata import find_languages, load_metadata, metadata_digest
from curation.global_rules.base import ShardPart

NO_METADATA = "no metadata for its language"
LIST = "metadata"
# Automata that a worker holds at once, by entries: about 180 bytes each.
_MAX_ENTRIES_IN_MEMORY = 8_000_000


def tail_share(counts: IntArray, t: float) -> float:
    """Return the share of all matches that entries with count < t have; 0 without matches."""
    total = counts.sum()
    return float(counts[counts < t].sum() / total) if total else 0.0


def threshold_of_tail_share(ascending: IntArray, share: float) -> int:
    """Return the count at which the running sum of ascending counts is nearest to the share.

    Of two that are equally near it is the smaller. 0 where there are no counts.
    """
    if not len(ascending) or not ascending[-1]:
        return 0
    running = np.cumsum(ascending)
    fractions = running / running[-1]
    at = min(int(np.searchsorted(fractions, share)), len(fractions) - 1)
    if at and abs(fractions[at - 1] - share) <= abs(fractions[at] - share):
        at -= 1
    return int(ascending[at])


class _Matchers:
    """The automata of a worker, the least recently used given up first."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[str, str], tuple[int, EntryMatcher]] = OrderedDict()

    def get(self, path: str, digest: str) -> EntryMatcher:
        key = (path, digest)
        if key not in self._held:
            entries = load_metadata(path)
            while self._held and self._size() + len(entries) > _MAX_ENTRIES_IN_MEMORY:
                self._held.popitem(last=False)
            self._held[key] = (len(entries), EntryMatcher(entries, "v2"))
        self._held.move_to_end(key)
        return self._held[key][1]

    def _size(self) -> int:
        return sum(size for size, _ in self._held.values())


_matchers = _Matchers()


@lru_cache(maxsize=4)
def _sizes(files: tuple[tuple[str, str], ...], digest: str) -> tuple[int, ...]:
    return tuple(len(load_metadata(path)) for _, path in files)


class MetaClip2(Balancer):
    """Balances captions over the lists of their languages; a group is a language."""

    def __init__(
        self,
        metadata: Path,
        t: float | None,
        target_size: int | None,
        *,
        language: str,
        reference: str,
        other: str | None,
        languages: Mapping[str, str],
    ) -> None:
        super().__init__(t, target_size)
        self._files = find_languages(metadata)
        self._folder, self._digest = metadata, metadata_digest(metadata)
        self._column, self._reference = language, reference
        self._other, self._merged = other, dict(languages)
        for key, name in (("reference", reference), ("other", other), *languages.items()):
            if name is not None and name not in self._files:
                raise UsageError(
                    f"metaclip2: {key}: {name!r} has no list in {metadata}"
                    f"{did_you_mean(name, self._files)} There are: {', '.join(self._files)}."
                )

    @property
    def emit_digest(self) -> str:
        """Digest of the lists, and of which list a language gets."""
        return (
            f"metaclip2 {self._digest} {self._column} {self._other} {sorted(self._merged.items())}"
        )

    @property
    def solve_digest(self) -> str:
        """See GlobalRule."""
        return f"{super().solve_digest} {self._reference}"

    @property
    def starts(self) -> IntArray:
        """Lists lie behind each other, in alphabetical order of their languages."""
        files = tuple((name, str(path)) for name, path in self._files.items())
        return np.concatenate([[0], np.cumsum(_sizes(files, self._digest))]).astype(np.int64)

    def match(self, samples: pa.Table) -> dict[str, pa.Array]:
        """Return the entries of each caption in the list of its language, and that list."""
        if self._column not in samples.column_names:
            raise UsageError(
                f"metaclip2 needs the language of each caption, but there is no column "
                f"{self._column!r}{did_you_mean(self._column, samples.column_names)} Put a rule "
                "before it that names it (`- name: language`), or set language: COLUMN."
            )
        captions = np.array(samples["caption"].to_pylist(), dtype=object)
        lists = np.array([self._list_of(v) for v in samples[self._column].to_pylist()], object)
        starts = dict(zip(self._files, self.starts[:-1].tolist(), strict=True))
        order: list[npt.NDArray[np.int64]] = []
        found: list[pa.Array] = []
        for name in self._files:
            rows = np.flatnonzero(lists == name)
            if len(rows):
                matcher = _matchers.get(str(self._files[name]), self._digest)
                order.append(rows)
                found.append(_shift(matcher.match(captions[rows].tolist()), starts[name]))
        rest = np.array([i for i, name in enumerate(lists) if name is None], np.int64)
        order.append(rest)
        found.append(pa.array([[]] * len(rest), pa.list_(pa.int32())))
        back = np.argsort(np.concatenate(order), kind="stable")
        entries = pa.concat_arrays(found).take(pa.array(back))
        return {ENTRIES: entries, LIST: pa.array(lists.tolist(), pa.string())}

    def _list_of(self, language: str | None) -> str | None:
        name = self._merged.get(language, language) if language is not None else None
        return name if name in self._files else self._other

    def scale(self, counts: IntArray) -> Callable[[float], FloatArray]:
        """Return a function from the reference's t to the thresholds of all languages."""
        starts = self.starts
        ascending = [np.sort(counts[a:b]) for a, b in pairwise(starts)]
        reference = list(self._files).index(self._reference)

        def thresholds(t: float) -> FloatArray:
            share = tail_share(ascending[reference], t)
            of_all = [float(max(1, threshold_of_tail_share(a, share))) for a in ascending]
            of_all[reference] = t
            return np.array(of_all)

        return thresholds

    def entry_table(self) -> pa.Table:
        """Return the entries and the languages of their lists."""
        tables = [
            pa.table({"entry": entries, "language": pa.repeat(name, len(entries))})
            for name, path in self._files.items()
            for entries in [pa.array(load_metadata(path), pa.string())]
        ]
        return pa.concat_tables(tables).combine_chunks()

    def describe(self) -> str:
        """Return how many lists and entries."""
        return f"{self.starts[-1]:,} entries of {len(self._files):,} languages in {self._folder}"

    def reasons_without_entry(self, part: ShardPart) -> list[tuple[str, npt.NDArray[np.bool_]]]:
        """Tell a caption whose language has no list."""
        missing = part.emitted(LIST)[LIST].combine_chunks().is_null()
        return [(NO_METADATA, missing.to_numpy(zero_copy_only=False))]


def _shift(matched: pa.ListArray, by: int) -> pa.ListArray:
    ids = matched.flatten().to_numpy(zero_copy_only=False) + by
    return pa.ListArray.from_arrays(matched.offsets, pa.array(ids, pa.int32()))


@balancers.register("metaclip2")
def metaclip2(
    *,
    metadata: Path,
    t: Threshold | None = None,
    target_size: Size | None = None,
    language: str = "language.code",
    reference: str = "en",
    other: str | None = None,
    languages: Mapping[str, str] = {},
) -> MetaClip2:
    """Balance captions over the metadata lists of their languages.

    `metadata` is a folder with one list a language, LANGUAGE.json or LANGUAGE.txt (also .gz; see
    metadata.py). `language` is the column with the language of a caption: the value of a rule
    before (`language.code`) or a column of the index. `languages` says which list stands for a
    language that has none of its own (`{zh-cn: zh}`), `other` which for all the rest; without it
    those captions are dropped. `t` is the threshold of the `reference` language (170,000 in the
    paper); the others follow. `target_size` instead of `t` solves it (target.py).
    """
    check_threshold("metaclip2", t, target_size)
    return MetaClip2(
        metadata,
        t,
        target_size,
        language=language,
        reference=reference,
        other=other,
        languages=languages,
    )
