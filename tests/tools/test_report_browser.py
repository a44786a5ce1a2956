"""The page in a real browser: headless Chromium opens it in light, dark, narrow and printed."""

import os
import shutil
import time

import pytest

from tests.tools.report_folder import make_folder, make_long_run
from tools.report import report_on

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
NUM_ROWS = 100_000
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not CHROMIUM and os.environ.get("PAIRMILL_TEST_CHROMIUM") != "required",
        reason="there is no chromium, chromium-browser or google-chrome (apt-get install chromium)",
    ),
]
FLAGS = (
    *(
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
    ),
    *("--disable-background-networking", "--disable-component-update"),
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The four kinds: a dataset, a run of 100,000 rows, results, and several of each."""
    folder = make_folder(tmp_path_factory.mktemp("pages"))
    run = make_long_run(folder / "long/run", NUM_ROWS)
    other = make_long_run(folder / "other/run", 300)
    short = make_long_run(folder / "short/run", 400)
    kinds = {
        "dataset": [folder / "dataset"],
        "run": [run],
        "results": [folder / "results"],
        "comparison": [folder, folder / "dataset", short, other],
    }
    return {kind: report_on(of, folder / f"{kind}.html") for kind, of in kinds.items()}


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


def opened(browser, path, *, scheme="light", width=1280):
    """Return the page and what its console says."""
    page = browser.new_context(
        color_scheme=scheme, viewport={"width": width, "height": 900}
    ).new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url))
    page.goto(path.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    return page, [line for line in said if line != path.as_uri() and not line.startswith("data:")]


@pytest.mark.parametrize("kind", ["dataset", "run", "results", "comparison"])
def test_a_page_says_nothing_in_the_console_loads_nothing_and_fits_a_phone(pages, browser, kind):
    page, said = opened(browser, pages[kind], width=360)
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth)")
    page.set_viewport_size({"width": 1280, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_names_contrast_and_structure_pass_axe(pages, browser, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    for kind in ("dataset", "comparison") if scheme == "light" else ("comparison",):
        page, _ = opened(browser, pages[kind], scheme=scheme)
        found = axe.Axe().run(page).response["violations"]
        assert [(v["id"], v["help"], v["nodes"][0]["html"][:300]) for v in found] == []
        page.context.close()


def test_the_search_box_finds_words_in_any_order_and_counts(pages, browser):
    page, said = opened(browser, pages["dataset"])
    page.get_by_label("Search these captions").fill("haus ROTES")
    shown = page.locator("[data-search] tbody tr:visible")
    assert shown.count() == 1
    assert "Ein rotes Haus" in shown.inner_text()
    assert page.locator("[data-search] output").inner_text() == "1 of 3 captions"
    page.keyboard.press("Enter")  # sends no form
    assert page.url == pages["dataset"].as_uri()
    assert said == []
    page.context.close()


def test_a_run_of_a_hundred_thousand_rows_opens_at_once_and_shows_its_spike(pages, browser):
    assert pages["run"].stat().st_size < 2_000_000
    started = time.perf_counter()
    page, _ = opened(browser, pages["run"])
    assert time.perf_counter() - started < 5  # 0.2 s on an idle machine
    charts = page.locator("figure.plot", has_text="Loss")
    assert "100,000 rows, drawn as the least and largest" in charts.first.inner_text()
    spike = charts.first.locator("g.dot title", has_text="to 9.0")
    assert spike.count() == 1
    # What is under the pointer at the spike's place is the dot that says so.
    circle = spike.locator("xpath=..").locator("circle.hit")
    circle.hover()
    assert circle.evaluate("e => getComputedStyle(e.previousElementSibling).opacity") == "1"
    page.context.close()


def test_the_page_prints_in_black_on_white_even_where_the_screen_is_dark(pages, browser):
    page, _ = opened(browser, pages["comparison"], scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    line = page.locator("polyline.line.s1").first
    assert line.evaluate("e => getComputedStyle(e).stroke") == "rgb(11, 98, 196)"  # as on light
    assert page.pdf()[:5] == b"%PDF-"
    page.context.close()


@pytest.mark.parametrize("kind", ["dataset", "run", "results", "comparison"])
def test_nothing_is_wider_than_a_sheet_of_paper(kind, pages, browser):
    """Paper does not scroll: A4 less its margins is 186 mm, 703 pixels of CSS."""
    page, _ = opened(browser, pages[kind], width=703)
    page.emulate_media(media="print")
    wide = page.evaluate(
        "[...document.querySelectorAll('table, figure, p')].filter(e => e.checkVisibility() && "
        "e.getBoundingClientRect().right > 704).map(e => e.innerText.slice(0, 200))"
    )
    assert wide == []
    page.context.close()
