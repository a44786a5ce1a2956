"""The metadata builder: sources, thresholds, order."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.balancing.metadata import load_metadata
from tools.build_metadata.__main__ import STYLES, main, merge, ranked
from tools.build_metadata.bigrams import bigrams_by_pmi
from tools.build_metadata.files import (
    count_words,
    is_word,
    read_page_views,
    read_wordnet,
    tokens_of,
)

DIGITS = [str(n) for n in range(100)]


def test_a_list_has_its_sources_in_order_each_entry_once(tmp_path, capsys):
    (tmp_path / "names.json").write_text(json.dumps(["cat", "New York", "!", "7"]))
    (tmp_path / "a.txt").write_text("New York, the cat. the dog\nthe New York\n")
    with gzip.open(tmp_path / "b.txt.gz", "wt") as file:
        file.write("the dog barks\n")
    (tmp_path / "views").write_text(
        "en Main_Page 60 1\nen Main_Page 49 1\nen Talk:Cat 900 1\nde Katze 90 1\nen Dog 80 1\n"
        "en Main_Page 50 1\nen cat 99 1\nbroken\n"
    )
    line = ["--wordnet", tmp_path / "names.json", "--texts", tmp_path / "a.txt",
            tmp_path / "b.txt.gz", "--titles", tmp_path / "views", "--min-count", "2",
            "--min-pmi", "1.7", "--min-bigram-count", "2"]  # fmt: skip
    written = []
    for output in (tmp_path / "out" / "list.json.gz", tmp_path / "out" / "again.txt"):
        assert main([str(output), *map(str, line)]) == 0
        written.append(load_metadata(output))
    # the: 4; New, York and dog: 2. PMI of "New York": log2(2 * 12 / 4) = 2.58, of "the dog" (2):
    # log2(2 * 12 / 8) = 1.58. Views: cat 99 is there already, Main Page 60 + 50, Dog 80.
    expected = [*DIGITS, "cat", "New York", "the", "New", "York", "dog", "Main Page", "Dog"]
    assert written == [expected, expected]
    about = json.loads((tmp_path / "out" / "list.json.gz.about.json").read_text())
    assert about["added"] == {"digits": 100, "wordnet": 2, "unigrams": 4, "bigrams": 0, "titles": 2}
    assert "108 entries" in capsys.readouterr().out
    first = (tmp_path / "out" / "list.json.gz").read_bytes()
    assert main([str(tmp_path / "out" / "list.json.gz"), *map(str, line)]) == 0
    assert (tmp_path / "out" / "list.json.gz").read_bytes() == first


@settings(max_examples=25, deadline=None)
@given(
    lines=st.lists(st.text(st.sampled_from("ab ,"), max_size=14), max_size=8),
    size=st.integers(1, 9),
)
def test_bigrams_by_pmi_equal_the_formula_however_small_the_runs(lines, size, tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    paths = [folder / f"{i}.txt" for i in range(2)]
    for i, path in enumerate(paths):
        path.write_text("\n".join(lines[i::2]))
    counts = count_words(paths)
    pairs: Counter[str] = Counter()
    for line in lines:
        tokens = tokens_of(line)
        pairs.update(f"{a} {b}" for a, b in pairwise(tokens)
                     if is_word(a) and is_word(b))  # fmt: skip
    total = counts.total()
    expected = {}
    for pair, n in pairs.items():
        a, b = pair.split(" ")
        expected[pair] = math.log2(n * total / (counts[a] * counts[b]))
    found = bigrams_by_pmi(paths, counts, min_pmi=-99, min_count=1, pairs_a_run=size)
    assert found == pytest.approx(expected)


def test_wordnet_is_read_from_its_database(tmp_path):
    licence = "  1 This software and database is being provided to you\n"
    row = "00001740 03 {} 01 {} 0 003 ~ 00001930 n 0000 | a gloss\n"
    for part, names in {
        "noun": ["ice_cream"],
        "verb": [],
        "adj": ["galore(ip)"],
        "adv": [],
    }.items():
        lines = [row.format(part[0], name) for name in names]
        (tmp_path / f"data.{part}").write_text(licence + "".join(lines))
    assert read_wordnet(tmp_path) == ["ice cream", "galore"]


def test_the_styles_choose_as_metaclip_1_and_2_do():
    sources = [("a", ["b", "!", "!?", "c", "b", "x" * 257, ""])]
    assert merge(sources, STYLES["metaclip"])[0] == ["b", "!?", "c", "x" * 257]
    assert merge(sources, STYLES["metaclip2"]) == (["b", "c"], {"a": 2})
    assert ranked({"b": 2, "a": 2, "c": 3, "Z": 2}) == ["c", "Z", "a", "b"]


def test_a_share_of_the_vocabulary_is_the_most_of_metaclip_2(tmp_path):
    (tmp_path / "counts").write_text("".join(f"w{i} {100 + i}\n" for i in range(30)))
    line = [str(tmp_path / "l.txt"), "--unigrams", str(tmp_path / "counts")]
    assert main([*line, "--style", "metaclip2"]) == 0
    assert load_metadata(tmp_path / "l.txt")[100:] == ["w29", "w28", "w27"]
    assert main([*line, "--max-unigrams", "4", "--min-count", "127"]) == 0
    assert load_metadata(tmp_path / "l.txt")[100:] == ["w29", "w28", "w27"]


def test_what_is_wrong_is_said(tmp_path, capsys):
    (tmp_path / "counts").write_text("word x\n")
    for line, message in (
        (["l.txt", "--unigrams", str(tmp_path / "counts")], "line 1: expected `word count`"),
        (["l.txt", "--texts", str(tmp_path / "none")], "none cannot be read"),
        (["l.csv"], "must end in .json or .txt"),
    ):
        assert main([str(tmp_path / line[0]), *line[1:]]) in (1, 2)
        assert message in capsys.readouterr().err
    (tmp_path / "views").write_text("en A 50\n")
    assert read_page_views([tmp_path / "views"], "en", 50) == {"A": 50}
