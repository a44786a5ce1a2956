"""Read what metadata is made of: lists, WordNet's database, texts, counts, page views."""

from __future__ import annotations

import gzip
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from configs.errors import DataError, UsageError
from configs.progress import progress
from curation.balancing.matching import space_text
from curation.balancing.metadata import load_metadata

_WORDNET_PARTS = ("noun", "verb", "adj", "adv")


def lines_of(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 text, which may be gzip, without their ends.

    Raises:
        UsageError: it cannot be read. DataError: it is not UTF-8 or not whole.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as file:
            for line in file:
                yield line.rstrip("\r\n")
    except (UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
        raise DataError(f"{path} cannot be read: {error}. Expected UTF-8 text.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).") from None


def read_wordnet(path: Path) -> list[str]:
    """Return the name (first lemma) of each synset, "_" as a space, in the order of the files.

    `path`: WordNet's `dict` folder (data.noun, data.verb, data.adj, data.adv), or a list of names
    (.json or .txt, also .gz).
    """
    if not path.is_dir():
        return load_metadata(path)
    names = []
    for part in _WORDNET_PARTS:
        for line in lines_of(path / f"data.{part}"):
            if line.startswith("  "):  # the licence, at the top
                continue
            fields = line.split(" ", 5)
            if len(fields) < 6:
                raise DataError(f"{path / f'data.{part}'}: not a line of WordNet: {line[:60]!r}.")
            # An adjective may say where it stands: "galore(ip)".
            names.append(fields[4].split("(")[0].replace("_", " "))
    return names


def is_word(token: str) -> bool:
    """Return whether a token has a letter or a digit."""
    return any(character.isalnum() for character in token)


def tokens_of(line: str) -> list[str]:
    """Return what stands between spaces in a text, in the form that captions are looked up in
    (curation/balancing/matching.py): words, and marks between them.
    """
    return space_text(line).split()


def count_words(paths: Sequence[Path]) -> Counter[str]:
    """Count the words of some texts."""
    counts: Counter[str] = Counter()
    with progress("words", total=len(paths), unit="files") as bar:
        for path in paths:
            for line in lines_of(path):
                counts.update(filter(is_word, tokens_of(line)))
            bar.advance(1)
    return counts


def read_counts(path: Path) -> Counter[str]:
    """Return the counts of a file with `word count` in each line, separated by space or tab."""
    counts: Counter[str] = Counter()
    for number, line in enumerate(lines_of(path), 1):
        if not line.strip():
            continue
        word, _, count = line.replace("\t", " ").rstrip().rpartition(" ")
        if not word or not count.isdecimal():
            raise DataError(f"{path}, line {number}: expected `word count`, got {line[:60]!r}.")
        counts[word] += int(count)
    return counts


def read_page_views(paths: Sequence[Path], project: str, min_row: int) -> Counter[str]:
    """Sum Wikimedia's hourly page views: lines of `project title views bytes`.

    A row counts only from `min_row` views on; titles with ":" (other namespaces) are left out.
    """
    views: Counter[str] = Counter()
    with progress("page views", total=len(paths), unit="files") as bar:
        for path in paths:
            for line in lines_of(path):
                fields = line.split(" ")
                if len(fields) < 3 or fields[0] != project or not fields[2].isdecimal():
                    continue
                if int(fields[2]) >= min_row and ":" not in fields[1]:
                    views[fields[1].replace("_", " ")] += int(fields[2])
            bar.advance(1)
    return views
