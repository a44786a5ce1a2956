"""Matching captions with metadata: our matcher against bare engines, on equal terms.

`python -m tools.benchmark.matching [--entries 500000] [--captions 20000]`

Ours is the whole work: spacing, search, each entry once a caption, counts over the metadata. An
engine is the bare search of captions that are spaced already, all overlapping matches, and nothing
done with them; both kinds of call of ahocorasick_rs are shown, a call a caption and one for many.
The text is synthetic and seeded: words by Zipf's law, captions of about 60 characters; --metadata
and --texts take real ones.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ahocorasick_rs import AhoCorasick, BytesAhoCorasick

from curation.balancing.matching import EntryMatcher, space_entry, space_text
from curation.balancing.metadata import load_metadata
from tools.benchmark.ratio import alternate, seconds
from tools.build_metadata.files import lines_of

_WANTED = 0.70
_VOCABULARY = 60_000


def make_text(num_entries: int, num_captions: int) -> tuple[list[str], list[str]]:
    """Return entries of 1 to 4 words and captions of up to 60 characters."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = list(
        {"".join(rng.choice(letters, rng.integers(2, 10))): None for _ in range(_VOCABULARY)}
    )

    def phrase(length: int) -> str:
        ranks = np.minimum((len(words) ** rng.random(length)).astype(int) - 1, len(words) - 1)
        return " ".join(words[rank] for rank in ranks)

    entries = dict.fromkeys(words[:num_entries])
    while len(entries) < num_entries:
        entries[phrase(int(rng.integers(1, 5)))] = None
    return list(entries), [
        phrase(11)[:60] + rng.choice(["", ".", ", x"]) for _ in range(num_captions)
    ]


def engines(entries: list[str], captions: list[str]) -> dict[str, Callable[[], object]]:
    """Return name -> a search of all captions by a bare engine."""
    patterns, texts = [space_entry(e) for e in entries], [space_text(c) for c in captions]
    raw = [text.encode() for text in texts]
    find = AhoCorasick(patterns, store_patterns=False).find_matches_as_indexes
    find_bytes = BytesAhoCorasick([p.encode() for p in patterns]).find_matches_as_indexes
    joined = [b"\n".join(raw[i : i + 1000]) for i in range(0, len(raw), 1000)]
    found: dict[str, Callable[[], object]] = {
        "ahocorasick_rs, a call a caption": lambda: [find(t, overlapping=True) for t in texts],
        "ahocorasick_rs (bytes), a call a caption": lambda: [
            find_bytes(t, overlapping=True) for t in raw
        ],
        "ahocorasick_rs (bytes), a call for 1,000 captions": lambda: [
            find_bytes(t, overlapping=True) for t in joined
        ],
        "token n-grams in a dict (pure Python)": _token_ngrams(entries, texts),
    }
    try:
        import ahocorasick  # pyahocorasick: no dependency of ours, compared where it is installed
    except ModuleNotFoundError:
        return found
    automaton: Any = ahocorasick.Automaton(ahocorasick.STORE_INTS)
    for number, pattern in enumerate(patterns):
        automaton.add_word(pattern, number)
    automaton.make_automaton()
    found["pyahocorasick, a call a caption"] = lambda: [list(automaton.iter(t)) for t in texts]
    return found


def _token_ngrams(entries: list[str], texts: list[str]) -> Callable[[], object]:
    ids = {tuple(entry.split(" ")): number for number, entry in enumerate(entries)}
    longest = max(map(len, ids))

    def search(text: str) -> list[int]:
        tokens = text.split(" ")[1:-1]
        grams = (
            tuple(tokens[i:j])
            for i in range(len(tokens))
            for j in range(i + 1, min(i + longest, len(tokens)) + 1)
        )
        return [ids[gram] for gram in grams if gram in ids]

    return lambda: [search(text) for text in texts]


def main() -> int:
    """Print the table; return 1 where ours is too slow."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--entries", type=int, default=500_000)
    parser.add_argument("--captions", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--metadata", type=Path, help="a metadata list instead")
    parser.add_argument("--texts", type=Path, help="a file with one caption a line instead")
    options = parser.parse_args()
    entries, captions = make_text(options.entries, options.captions)
    if options.metadata:
        entries = load_metadata(options.metadata)
    if options.texts:
        captions = list(lines_of(options.texts))[: options.captions]
    build = seconds(lambda: EntryMatcher(entries))
    matcher = EntryMatcher(entries)

    def ours() -> int:
        ids = matcher.match(captions).flatten().to_numpy()
        np.bincount(ids, minlength=len(entries))
        return len(ids)

    print(
        f"{len(entries):,} entries (built in {build:.1f} s, once a worker), {len(captions):,} "
        f"captions of {np.mean([len(c) for c in captions]):.0f} characters, "
        f"{ours() / len(captions):.1f} entries each; ours first"
    )
    is_short = False
    for name, search in engines(entries, captions).items():
        found = alternate(name, ours, search, repeats=options.repeats)
        print(
            f"{found.line(_WANTED)}   {len(captions) / found.ours_s:,.0f} against "
            f"{len(captions) / found.theirs_s:,.0f} captions/s"
        )
        is_short |= found.ratio < _WANTED
    return int(is_short)


if __name__ == "__main__":
    raise SystemExit(main())
