"""The HTML report: what it says, and that nothing foreign can speak for it."""

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from configs.errors import DataError, UsageError
from tests.tools.report_folder import HOSTILE, make_folder, make_long_run, png
from tools.report import build_report, report_on
from tools.report.charts import Axis, Series, histogram, line_chart, short_number
from tools.report.html import element, text
from tools.report.maps import principal_axes, share_shown
from tools.report.pictures import MAX_SIDE_PIXELS, small_data_uri
from tools.report.runs import read_run
from tools.report.scorecard import metric_label, percent


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


class Page(HTMLParser):
    """Collects what a browser would see, and checks that every tag is closed in its place."""

    VOID = frozenset({"img", "meta", "br", "hr", "input"})

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
    assert page.tags.count("script") == 1  # the search box's
    assert HOSTILE in page.said
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_the_page_loads_nothing_from_anywhere(folder):
    page = page_of(folder)
    assert {"link", "iframe", "object", "base"}.isdisjoint(page.tags)
    sources = [value for name, value in page.attributes if name in {"src", "href", "xlink:href"}]
    assert sources
    assert all(value.startswith("data:image/") for value in sources)
    policies = [v for name, v in page.attributes if name == "content" and "default-src" in v]
    script = (Path(__file__).resolve().parents[2] / "tools/report/search.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    allowed = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src "
    assert policies == [f"{allowed}'sha256-{digest}'"]
    assert script in page.said
    style = (Path(__file__).resolve().parents[2] / "tools/report/page.css").read_text()
    assert "url(" not in style
    assert "@import" not in style


def test_every_number_of_the_account_is_on_the_page(folder):
    said = page_of(folder).said
    assert "6 read = 3 kept + 2 dropped + 1 unreadable" in said
    assert "Dropped: caption_length/too few words (2 samples, 1 shown)" in said
    assert "Unreadable: no image (1 samples, 1 shown)" in said
    assert "short block" in said


def test_what_a_rule_warns_of_stands_before_the_funnel(folder):
    said = "".join(page_of(folder).said)
    assert said.index(f"m4: {HOSTILE}") < said.index("Rule funnel")


def test_duplicates_and_frequent_captions_say_what_became_of_them(folder):
    said = page_of(folder).said
    assert "dedup: 12 dropped, 1 groups shown" in said
    assert f"11 went for the first one, which is out itself: {HOSTILE}" in said
    assert "The 1 most frequent captions (caption_count)" in said
    assert {"7", "3 "} <= set(said)
    assert "poison.score: the 2 highest" in said
    assert {"12.35, ", HOSTILE, "2, ", "kept"} <= set(said)


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
    assert page_of(folder).said.count("picture not readable") == 8


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
    assert element("input", disabled=True, checked=False, value=None) == "<input disabled>"


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


@example([(0.0, 5e-324)], False, False)
@example([(0.0, 5e-324)], False, True)
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
    assert chart.count('class="dot') <= 97
    assert "to 10,000, y" in chart
    assert "10,001 rows, drawn as the least and largest" in chart


def test_long_labels_of_a_histogram_stand_apart():
    edges = [round(-0.4082 + 0.0278 * n, 4) for n in range(40)]
    chart = histogram("t", edges, [1] * 40, [1] * 40, "clip_score")
    places = {f"{edge:,}": edge for edge in edges}
    found = re.findall(r'x="([\d.]+)" y="[\d.]+" text-anchor="middle">(-?[\d.]+)</text>', chart)
    labels = [(float(x), said) for x, said in found if said in places]
    assert len(labels) > 4
    for (x, said), (following, other) in pairwise(labels):
        assert following - x > 6.5 * (len(said) + len(other)) / 2


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
    shown = [short_number(v) for v in (0, 1500, 2e7, 0.004, 0.00075, -3e-5)]
    assert shown == ["0", "1.5k", "20M", "0.004", "7.5e-4", "-3e-5"]
    assert [percent(v) for v in (0.0, 0.0005, 0.5)] == ["0.0\u00a0%", "0.05\u00a0%", "50.0\u00a0%"]
    assert metric_label("t2i_recall@10") == "text to image R@10"
    assert metric_label("something_new") == "something_new"


def test_a_spike_of_one_row_in_a_hundred_thousand_is_drawn(tmp_path):
    points = [(float(n), 1.0) for n in range(100_000)]
    points[31_415] = (31_415.0, 9.0)
    chart = line_chart("t", [Series("s", points)], Axis("x"), Axis("y", starts_at_zero=True))
    heights = [
        float(pair.split(",")[1]) for pair in chart.split('points="')[1].split('"')[0].split()
    ]
    assert sum(height < 50 for height in heights) == 1  # of a plot that is 230 high
    assert len(heights) <= 4 * 384
    assert "y 1 to 9 (" in chart


def test_what_happened_on_the_way_is_marked(tmp_path):
    run = make_long_run(tmp_path / "run", 400)
    said = Page(build_report(runs=[run], output=tmp_path / "r.html", title="r").read_text()).said
    assert "run: stage 1 begins" in said
    assert any(words.startswith("run: 1 steps skipped before 26,112") for words in said)
    assert any(words.startswith("run: resume at 51,200 samples, 2 ranks") for words in said)
    assert any(words.startswith("run: went back at 76,800 samples") for words in said)
    for title in (
        "Logit scale",
        "Peak memory of rank 0",
        "Zero-shot top-1 accuracy while training",
    ):
        assert title in said
    assert " clipped since the row before" in said
    assert said.count("the axes show ") == 0
    assert sum("of the variance" in words for words in said) == 6  # of ten evaluations


def test_the_map_keeps_its_axes_so_that_what_stays_stays():
    rng = np.random.default_rng(1)
    last = rng.normal(size=(50, 6)) * [9, 4, 1, 1, 1, 1]
    mean, axes = principal_axes(last)
    assert np.allclose(axes @ axes.T, np.eye(2))
    assert np.abs(axes[0, 0]) > 0.9
    assert np.abs(axes[1, 1]) > 0.9
    spread = ((last - mean) @ axes.T).var(axis=0)
    assert spread[0] > spread[1] > 1
    whole = ((last - mean) ** 2).sum() / 50
    assert share_shown(last, axes) == pytest.approx(spread.sum() / whole)
    assert share_shown(np.ones((5, 6)), axes) == 0  # all in one place


@pytest.mark.parametrize("content", ["{}", '{"labels": ["a"]}', "\x00"])
def test_a_probe_set_that_is_not_one_is_a_clear_error(tmp_path, content):
    run = make_long_run(tmp_path / "run", 5)
    (run / "probe/letters/images.json").write_text(content)
    with pytest.raises(DataError, match=r"probe.letters is not a probe set"):
        read_run(run)


def test_two_runs_and_two_datasets_stand_beside_each_other(folder):
    (folder / "b").mkdir()
    (folder / "b/dataset").mkdir()
    report = json.loads((folder / "dataset/report.json").read_text())
    (folder / "b/dataset/report.json").write_text(json.dumps(report | {"name": "other"}))
    make_long_run(folder / "b/run", 5)
    make_long_run(folder / "c/run", 6)
    folders = [folder / "dataset", folder / "b", folder / "c"]
    said = Page(report_on(folders, folder / "both.html").read_text(encoding="utf-8")).said
    assert "Datasets beside each other" in said
    assert "1 to below 2" not in said
    assert "2 and above" in said  # the median of the captions' words
    assert "What their configurations differ in" in said
    start = said.index("What their configurations differ in")
    assert said[start + 1 : start + 8] == ["key", "b/run", "c/run", "samples", "5", "6", "Loss"]


def test_a_configuration_that_is_no_yaml_is_a_clear_error_where_it_is_compared(folder):
    runs = [make_long_run(folder / f"{name}/run", 5) for name in "bc"]
    (runs[1] / "config.yaml").write_text("a: [1")
    with pytest.raises(DataError, match=r"config\.yaml of c/run is not valid YAML"):
        build_report(runs=runs, output=folder / "r.html", title="r")


def test_languages_and_the_sample_of_captions_are_on_the_page(folder):
    said = page_of(folder).said
    assert "Languages of the captions, before and after" in said
    assert "Search a sample of 3 captions, kept and dropped, chosen by hash" in said
    assert {"Ein rotes Haus", "80.0\u00a0%", "100.0\u00a0%"} <= set(said)


def test_a_rule_that_judges_by_a_number_shows_its_values_its_limit_and_both_ends(folder):
    path = folder / "dataset" / "report.json"
    report = json.loads(path.read_text())
    sample = report["samples"]["kept"][0] | {"caption": HOSTILE, "value": 0.21, "outcome": HOSTILE}
    report["scores"] = {
        "score": {"column": "clip_score", "num_scored": 4, "num_left": 3, "left": [0.2, 0.3],
                  "dropped": [0.1, 0.1], "lowest": [sample | {"value": 0.1}], "highest": [sample],
                  "histogram": {"edges": [0.1, 0.2], "before": [1, 3], "after": [0, 3]}},
        "score_2": {"column": "blur", "num_scored": 0, "num_left": 0, "left": None,
                    "dropped": None, "lowest": [], "highest": [],
                    "histogram": {"edges": [], "before": [], "after": []}},
    }  # fmt: skip
    path.write_text(json.dumps(report))
    page = report_on([folder], folder / "page.html").read_text()
    assert "score: 3 of 4 left, from 0.2 to 0.3" in page
    assert "the least that stays: 0.2" in page
    assert "the most that stays" not in page
    assert "score: highest clip_score" in page
    assert "blur" not in page
    assert "<script>alert" not in page
