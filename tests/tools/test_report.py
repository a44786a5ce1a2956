"""The HTML report: what it says, and that nothing foreign can speak for it."""

import base64
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from configs.errors import DataError, UsageError
from tools.report import build_report, report_on
from tools.report.charts import Axis, Series, histogram, line_chart, short_number
from tools.report.html import element, text
from tools.report.pictures import MAX_SIDE_PIXELS, small_data_uri
from tools.report.scorecard import metric_label, percent
from tools.report.sources import read_run

HOSTILE = (
    "</figcaption><script>alert(1)</script><img src=http://evil/x.png onerror=a> {c} %s \u202e"
)


def png(color=0, size=(20, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, color).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """A dataset of six samples, a run of three steps, results of a model and the baseline."""
    picture = png(7)
    (tmp_path / "00000.tar").write_bytes(b"x" * 100 + picture)
    sample = {"shard": str(tmp_path / "00000.tar"), "uid": "00", "key": "0", "image_ext": "png"}
    sample |= {"image_offset": 100, "image_size": len(picture), "width": 20, "height": 20}
    nowhere = sample | {"image_offset": None, "image_size": None, "key": "9"}
    words = {"num_words": 9, "num_distinct": 3, "top": [["a", 5], [HOSTILE, 3]]}
    words["curve"] = [[1, 5], [2, 3], [3, 1]]
    report = {
        "version": 1,
        "name": "tiny",
        "seed": 0,
        "config_digest": "ab",
        "created_by": "pairmill 0",
        "num_read": 6,
        "num_kept": 3,
        "num_dropped": 2,
        "num_unreadable": 1,
        "dropped": {"caption_length/too few words": 2},
        "unreadable": {"no image": 1},
        "funnel": [
            {"rule": "read", "remaining": 5, "dropped": {"no image": 1}},
            {"rule": "caption_length", "remaining": 3, "dropped": {"too few words": 2}},
        ],
        "sources": {
            HOSTILE: {
                "num_read": 6,
                "num_kept": 3,
                "num_unreadable": 1,
                "dropped": {"caption_length": 2},
                "weight": 0.5,
                "cap": 9,
            }
        },
        "words": {"before": words, "after": words},
        "entries": None,
        "histograms": {
            "caption_words": {"edges": [0, 1, 2], "before": [0, 2, 4], "after": [0, 1, 3]}
        },
        "samples": {
            "kept": [sample | {"caption": HOSTILE}],
            "caption_length/too few words": [sample | {"caption": "short", "key": "2"}],
            "no image": [nowhere | {"caption": None}],
        },
        "duplicates": {
            "dedup": {
                "num_dropped": 12,
                "groups": [
                    {
                        "best": sample | {"caption": HOSTILE, "outcome": HOSTILE},
                        "num_dropped": 11,
                        "dropped": [sample | {"caption": HOSTILE, "key": "3"}],
                    }
                ],
            }
        },
        "captions": {
            "caption_count": [{"caption": HOSTILE, "count": 7, "outcomes": {HOSTILE: 4, "kept": 3}}]
        },
        "shards": {"num_read": 1, "num_bytes": 1, "damaged": [], "quarantined": []},
    }
    report["shards"]["damaged"] = [{"shard": "1.tar", "why": "short block"}]
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset/report.json").write_text(json.dumps(report))
    (tmp_path / "pretrain").mkdir()
    steps = [
        {"step": n, "samples_seen": 100 * n, "loss": 3.0 / n, "samples_per_second": 50 + n}
        for n in (1, 2, 3)
    ]
    steps[1]["loss"] = float("nan")
    lines = [json.dumps(step | {"seconds": 2.0}) for step in steps]
    (tmp_path / "pretrain/metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 4, "sam')
    write_results(tmp_path / "results", picture)
    return tmp_path


def write_results(folder: Path, picture: bytes) -> None:
    folder.mkdir()
    row = {
        "checkpoint": "runs/x",
        "checkpoint_digest": "cc",
        "samples_seen": 300,
        "dataset": "letters",
        "method": "zero_shot",
        "metric": "top1",
        "value": 0.59,
        "interval": [0.55, 0.63],
        "chance": 0.02,
        "n": 364,
        "seed": 0,
        "metric_definition": "share of images",
        "prompt_digest": "p",
        "data_digest": "d",
        "config_digest": "e",
        "version": "0",
        "seconds": 1.0,
    }
    baseline = row | {"checkpoint": "pixel-1nn", "value": 0.175, "interval": [0.15, 0.2]}
    (folder / "results.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(baseline) + "\n")
    image = {"key": "1", "png": base64.b64encode(picture).decode()}
    broken = {"key": "2", "png": 'not base64 "><script>'}
    found = [{**image, "score": 0.9, "right": True}, {**broken, "score": 0.5, "right": False}]
    answers = [{"text": HOSTILE, "score": 0.8, "right": True}]
    example = {"checkpoint": "runs/x", "dataset": "unseen", "task": "retrieval"}
    example["text_to_image"] = [{"text": HOSTILE, "images": found}]
    example["image_to_text"] = [{"image": image, "own_texts": [HOSTILE], "texts": answers}]
    (folder / "examples.json").write_text(json.dumps([example]))


class Page(HTMLParser):
    """Collects what a browser would see, and checks that every tag is closed in its place."""

    VOID = frozenset({"img", "meta", "br", "hr"})

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags, self.attributes, self.said, self.open = [], [], [], []
        self.feed(content)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)


def page_of(folder: Path) -> Page:
    return Page(report_on([folder], folder / "report.html").read_text(encoding="utf-8"))


def test_a_hostile_caption_is_shown_as_text_and_adds_no_tag(folder):
    page = page_of(folder)
    assert "script" not in page.tags
    assert HOSTILE in page.said
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_the_page_loads_nothing_from_anywhere(folder):
    page = page_of(folder)
    assert {"link", "iframe", "object", "base"}.isdisjoint(page.tags)
    sources = [value for name, value in page.attributes if name in {"src", "href", "xlink:href"}]
    assert sources
    assert all(value.startswith("data:image/") for value in sources)
    policies = [v for name, v in page.attributes if name == "content" and "default-src" in v]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    style = (Path(__file__).resolve().parents[2] / "tools/report/page.css").read_text()
    assert "url(" not in style
    assert "@import" not in style


def test_every_number_of_the_account_is_on_the_page(folder):
    said = page_of(folder).said
    assert "6 read = 3 kept + 2 dropped + 1 unreadable" in said
    assert "Dropped: caption_length/too few words (2 samples, 1 shown)" in said
    assert "Unreadable: no image (1 samples, 1 shown)" in said
    assert "short block" in said


def test_duplicates_and_frequent_captions_say_what_became_of_them(folder):
    said = page_of(folder).said
    assert "dedup: 12 dropped, 1 groups shown" in said
    assert f"11 went for the first one, which is out itself: {HOSTILE}" in said
    assert "The 1 most frequent captions (caption_count)" in said
    assert {"7", "3 "} <= set(said)


def test_results_stand_beside_chance_interval_and_baseline(folder):
    said = page_of(folder).said
    for expected in (
        "59.0\u00a0%",
        "55.0\u00a0% to 63.0\u00a0%",
        "2.0\u00a0%",
        "17.5\u00a0%",
        "364",
    ):
        assert expected in said
    assert said.count("✓ right") == 2


def test_an_account_that_does_not_add_up_is_called_out(folder):
    path = folder / "dataset/report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_read": 9}))
    assert any("3 samples are unaccounted for" in said for said in page_of(folder).said)


def test_every_picture_has_an_alternative_text_and_the_page_a_language(folder):
    page = page_of(folder)
    attributes = [name for name, _ in page.attributes]
    assert attributes.count("alt") == page.tags.count("img") > 0
    assert ("lang", "en") in page.attributes
    assert page.tags.count("h1") == 1
    assert "title" in page.tags


def test_the_same_input_gives_the_same_bytes(folder, tmp_path_factory):
    first = report_on([folder], folder / "report.html").read_bytes()
    other = tmp_path_factory.mktemp("other") / "again.html"
    assert report_on([folder], other).read_bytes() == first


def test_a_run_alone_makes_a_page_and_its_cut_line_is_counted(folder):
    out = build_report(runs=[folder / "pretrain"], output=folder / "run.html", title="run")
    said = Page(out.read_text(encoding="utf-8")).said
    assert "Pretraining" in said
    assert "Scorecard" not in said
    assert any("1 lines of metrics.jsonl cannot be read" in words for words in said)


def test_lines_of_a_run_that_are_no_numbers_are_counted_and_separators_cut_none(folder):
    good = json.dumps({"samples_seen": 1, "loss": 2.0, "note": "a\u2028b"}, ensure_ascii=False)
    huge = '{"samples_seen": 1, "loss": 1' + "0" * 400 + "}"
    (folder / "pretrain/metrics.jsonl").write_text(f"{good}\n{huge}\n{'[' * 5000}\n")
    run = read_run(folder / "pretrain")
    assert (len(run.rows), run.num_broken_lines) == (1, 2)


def test_the_baseline_is_said_in_words(folder):
    said = page_of(folder).said
    assert "nearest training picture's caption" in said
    assert not any("nearest neighbour" in words for words in said)


def test_a_tar_that_is_gone_leaves_a_card_without_a_picture(folder):
    (folder / "00000.tar").unlink()
    assert page_of(folder).said.count("picture not readable") == 6


def test_a_run_that_has_not_logged_yet_is_reported_as_such(folder):
    (folder / "pretrain/metrics.jsonl").write_text("")
    assert "no step logged yet" in page_of(folder).said


def test_a_folder_with_nothing_is_a_usage_error_that_names_the_files(tmp_path):
    with pytest.raises(UsageError, match=r"report\.json.*metrics\.jsonl.*results\.jsonl"):
        report_on([tmp_path], tmp_path / "report.html")
    with pytest.raises(UsageError, match="not a folder"):
        report_on([tmp_path / "missing"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    "name", ["dataset/report.json", "results/examples.json", "results/results.jsonl"]
)
@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"num_read": "many"}', "\ufeff\x00"])
def test_a_file_that_is_not_what_it_should_be_is_a_clear_error(folder, name, content):
    (folder / name).write_text(content)
    if (name, content) == ("results/results.jsonl", ""):
        assert "Scorecard" not in page_of(folder).said
        return
    with pytest.raises(DataError, match=Path(name).name.replace(".", r"\.")):
        report_on([folder], folder / "report.html")


@given(st.text())
def test_any_text_survives_escaping_or_becomes_a_replacement(value):
    page = Page(element("p", value, title=value))
    shown = "".join(page.said)
    shown.encode("utf-8")
    assert page.tags == ["p"]
    assert len(shown) == len(value)
    assert all(a == b or b == "\ufffd" for a, b in zip(value, shown, strict=True))


def test_html_is_not_escaped_twice():
    assert element("b", element("i", "a & b")) == "<b><i>a &amp; b</i></b>"
    assert text(text("<")) == "&lt;"
    assert element("input", disabled=True, checked=False, value=None) == "<input disabled></input>"


def test_a_straight_line_on_log_axes_is_straight():
    # y = 1000 / x at x = 1, 10, 100: equal steps right, equal steps down.
    points = [(1.0, 1000.0), (10.0, 100.0), (100.0, 10.0)]
    chart = line_chart("t", [Series("s", points)], Axis("x", is_log=True), Axis("y", is_log=True))
    drawn = chart.split('points="')[1].split('"')[0]
    places = np.array([[float(v) for v in pair.split(",")] for pair in drawn.split()])
    steps = np.diff(places, axis=0)
    assert np.allclose(steps[0], steps[1], atol=0.2)
    assert (steps > 0).all()


finite = st.floats(-1e12, 1e12)
anything = st.one_of(finite, st.sampled_from([float("nan"), float("inf"), 0.0]))


@given(st.lists(st.tuples(anything, anything), max_size=30), st.booleans(), st.booleans())
def test_any_points_make_a_chart_that_stays_in_its_frame(points, log_x, log_y):
    chart = line_chart("t", [Series("s", points)], Axis("x", log_x), Axis("y", log_y))
    Page(chart)
    assert "nan" not in chart.split("<svg")[-1].lower()
    if 'points="' in chart:
        drawn = chart.split('points="')[1].split('"')[0]
        places = [float(v) for pair in drawn.split() for v in pair.split(",")]
        assert all(0 <= v <= 460 for v in places)


def test_a_long_run_is_thinned_and_keeps_its_last_point():
    points = [(float(n), float(n)) for n in range(10_001)]
    chart = line_chart("t", [Series("s", points)], Axis("x"), Axis("y"))
    assert chart.count('class="dot') <= 242
    assert "x 10,000, y 10,000" in chart


def test_a_histogram_says_the_counts_of_each_used_bin():
    chart = histogram("t", [0, 10, 20], [0, 4, 6], [0, 2, 6], "pixels")
    assert "10 to below 20: 4 before, 2 after" in chart
    assert "20 and above: 6 before, 6 after" in chart
    assert "0 to below 10" not in chart


def test_pictures_are_made_small_and_broken_ones_refused():
    uri = small_data_uri(png(size=(400, 200)))
    shown = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert shown.size == (MAX_SIDE_PIXELS, MAX_SIDE_PIXELS // 2)
    assert small_data_uri(b"\x89PNG broken") is None
    assert small_data_uri(png()[:40]) is None


def test_a_picture_with_a_huge_header_is_refused_before_it_is_decoded():
    bomb = bytearray(png())
    bomb[16:24] = (50_000).to_bytes(4, "big") * 2
    assert small_data_uri(bytes(bomb)) is None


def test_numbers_are_written_for_people():
    assert [short_number(v) for v in (0, 1500, 2e7, 0.004)] == ["0", "1.5k", "20M", "0.004"]
    assert [percent(v) for v in (0.0, 0.0005, 0.5)] == ["0.0\u00a0%", "0.05\u00a0%", "50.0\u00a0%"]
    assert metric_label("t2i_recall@10") == "text to image R@10"
    assert metric_label("something_new") == "something_new"
