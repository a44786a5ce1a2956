"""Build a metadata list for `metaclip` and `metaclip2`: python -m tools.build_metadata OUT ...

MetaCLIP's own list may not be used commercially and cannot be made again (its order was that of a
Python set). This makes one from files of yours by the same rules (Xu et al., arXiv:2309.16671):

    0 ... 99                                                          always first
    --wordnet    synset names                                         all of them
    --texts      unigrams counted --min-count times (paper: 100)      the most frequent first
    --texts      bigrams with a PMI of --min-pmi (paper: 30)          the highest PMI first
    --titles     page titles with --min-views (paper: 70)             the most viewed first

An entry stands where it comes first; ties are in the order of code points. So the same files give
the same list. An entry that is one punctuation mark is left out; case is kept.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import string
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import PairmillError, UsageError
from configs.publish import published_file
from tools.build_metadata.bigrams import bigrams_by_pmi
from tools.build_metadata.files import count_words, read_counts, read_page_views, read_wordnet

# The largest numbers of entries that the released lists have of each source.
_PAPER_SIZES = {"unigrams": 251_465, "bigrams": 100_646, "titles": 61_235}
_MAX_CHARACTERS = 256
_EPILOG = """examples:
  python -m tools.build_metadata metadata.json.gz --wordnet dict/ --texts wiki-*.txt.gz \\
      --titles pageviews-*.gz
  python -m tools.build_metadata lists/de.txt --style metaclip2 --texts de/*.txt --project de \\
      --titles pageviews-*.gz

Texts: plain UTF-8, one article or sentence a line, also .gz. For a language without spaces between
words, cut the texts into words first. --unigrams takes counts that are already made."""


@dataclass(frozen=True)
class Style:
    """How MetaCLIP 1 and 2 choose among what is above the thresholds."""

    max_shares: Mapping[str, float]  # of what there is of a source
    drops_punctuation: bool  # all entries of marks only, else single ASCII marks
    max_characters: int | None


STYLES = {
    "metaclip": Style({}, False, None),
    # min(251,465, 10 % of the vocabulary), min(61,235, 76 % of the titles); arXiv:2507.22062.
    "metaclip2": Style({"unigrams": 0.10, "titles": 0.76}, True, _MAX_CHARACTERS),
}


def ranked(values: Mapping[str, float]) -> list[str]:
    """Return the keys by descending value, ties in the order of code points."""
    return sorted(values, key=lambda key: (-values[key], key))


def merge(
    sources: Iterable[tuple[str, Sequence[str]]], style: Style
) -> tuple[list[str], dict[str, int]]:
    """Return the entries in order, each once, and how many each source added."""
    entries: dict[str, None] = {}
    added: dict[str, int] = {}
    for name, source in sources:
        before = len(entries)
        entries.update((entry, None) for entry in source if _is_entry(entry, style))
        added[name] = len(entries) - before
    return list(entries), added


def _is_entry(entry: str, style: Style) -> bool:
    if not entry or (style.max_characters and len(entry) > style.max_characters):
        return False
    if style.drops_punctuation:
        return any(character.isalnum() for character in entry)
    return not (len(entry) == 1 and entry in string.punctuation)


def build(options: argparse.Namespace) -> tuple[list[str], dict[str, int]]:
    """Return the entries and how many each source added."""
    style = STYLES[options.style]
    sources: list[tuple[str, Sequence[str]]] = [("digits", [str(n) for n in range(100)])]
    if options.wordnet:
        sources.append(("wordnet", read_wordnet(options.wordnet)))
    counts = count_words(options.texts) if options.texts else Counter()
    unigrams = read_counts(options.unigrams) if options.unigrams else counts
    frequent = {word: n for word, n in unigrams.items() if n >= options.min_count}
    sources.append(("unigrams", _first("unigrams", frequent, len(unigrams), style, options)))
    if options.texts:
        found = bigrams_by_pmi(
            options.texts, counts, min_pmi=options.min_pmi, min_count=options.min_bigram_count
        )
        sources.append(("bigrams", _first("bigrams", found, len(found), style, options)))
    if options.titles:
        views = read_page_views(options.titles, options.project, options.min_row_views)
        viewed = {title: n for title, n in views.items() if n >= options.min_views}
        sources.append(("titles", _first("titles", viewed, len(viewed), style, options)))
    return merge(sources, style)


def _first(
    name: str, values: Mapping[str, float], num_all: int, style: Style, options: argparse.Namespace
) -> list[str]:
    size = getattr(options, f"max_{name}")
    if name in style.max_shares:
        size = min(size, int(num_all * style.max_shares[name]))
    return ranked(values)[:size]


def write(path: Path, entries: Sequence[str], about: dict[str, Any]) -> None:
    """Publish the list, and beside it OUT.about.json with what it was made of."""
    names = path.name.removesuffix(".gz")
    if names.endswith(".json"):
        text = json.dumps(entries, ensure_ascii=False, indent=0)
    elif names.endswith(".txt"):
        broken = [entry for entry in entries if "\n" in entry or "\r" in entry or not entry.strip()]
        if broken:
            raise UsageError(f"{broken[0]!r} cannot be a line of {path}; write a .json.")
        text = "\n".join(entries) + "\n"
    else:
        raise UsageError(f"{path}: the name must end in .json or .txt, also with .gz behind.")
    data = text.encode()
    with published_file(path) as file:
        file.write(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    with published_file(path.with_name(f"{path.name}.about.json"), "w") as file:
        file.write(json.dumps(about, indent=1, ensure_ascii=False) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.build_metadata",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("output", type=Path, help="the list to write: .json or .txt, also .gz")
    parser.add_argument("--wordnet", type=Path, help="WordNet's dict folder, or a list of names")
    parser.add_argument("--texts", type=Path, nargs="+", default=[], help="texts to count")
    parser.add_argument(
        "--unigrams", type=Path, help="counts instead of the texts' own: `word count`"
    )
    parser.add_argument("--titles", type=Path, nargs="+", default=[], help="hourly page views")
    parser.add_argument("--project", default="en", help="project of the page views (default: en)")
    parser.add_argument("--style", choices=tuple(STYLES), default="metaclip")
    for name, default, what in (
        ("min-count", 100, "samples of a unigram at least"),
        ("min-bigram-count", 1, "samples of a bigram at least"),
        ("min-views", 70, "page views of a title at least"),
        ("min-row-views", 50, "page views that an hour counts from"),
        *((f"max-{name}", size, f"{name} at most") for name, size in _PAPER_SIZES.items()),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} ({default:,})")
    parser.add_argument("--min-pmi", type=float, default=30.0, help="PMI of a bigram at least (30)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Build one list; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.texts and options.unigrams:
            print("counts come from --unigrams, bigrams from --texts", file=sys.stderr)
        entries, added = build(options)
        inputs = [p for p in (options.wordnet, options.unigrams) if p]
        about = {
            "num_entries": len(entries),
            "added": added,
            "style": options.style,
            "options": {k: v for k, v in vars(options).items() if isinstance(v, int | float)},
            "files": [p.name for p in (*inputs, *options.texts, *options.titles)],
            "sha256": hashlib.sha256(
                "\0".join(entries).encode("utf-8", "surrogatepass")
            ).hexdigest(),
        }
        write(options.output, entries, about)
    except PairmillError as error:
        print(f"build_metadata: {error}", file=sys.stderr)
        return error.exit_code
    for name, number in added.items():
        print(f"{name:<10} {number:>9,}")
    print(f"{options.output}: {len(entries):,} entries")
    return 0


if __name__ == "__main__":
    sys.exit(main())
