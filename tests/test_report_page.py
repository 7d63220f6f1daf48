"""The report in a real headless Chromium, opened as a file: language, light and dark, narrow screens, no network."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from liaoyuan.report import (
    Bar,
    Bars,
    Code,
    Figure,
    Interval,
    Intervals,
    KeyFigures,
    Line,
    Lines,
    Noted,
    Page,
    Paragraph,
    Plot,
    Point,
    Points,
    Sample,
    Samples,
    Section,
    Table,
    Text,
)

pytest.importorskip("selenium")
from selenium import webdriver
from selenium.webdriver.common.by import By

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Debian's chromium and chromium-driver are not installed"),
]
FLAGS = "headless=new no-sandbox disable-gpu no-first-run disable-background-networking disable-dev-shm-usage"
EN, ZH = "A long enough name", "足够长的名字"
WORDS = Text(EN, ZH)


def page() -> Page:
    """Return a page with every kind of part."""
    lines = Lines(WORDS, WORDS, [Line(WORDS, [1, 2, 3], [1.0, 2.0, 1.5])] * 2)
    dots = Intervals(WORDS, [WORDS] * 3, [WORDS] * 2, [[Interval(0.5, 0.4, 0.6)] * 3] * 2)
    parts = [
        Paragraph(WORDS),
        KeyFigures([Figure("+17.9", WORDS, WORDS)] * 4),
        Table([WORDS] * 4, [[WORDS, *[Noted("78.1", WORDS)] * 3]] * 3),
        Plot(WORDS, lines),
        Plot(WORDS, Bars(WORDS, [Bar(WORDS, 2.0, "2.0", strong=True)])),
        Plot(WORDS, dots, WORDS, wide=True),
        Plot(WORDS, Points(WORDS, WORDS, [Point(WORDS, 1.0, 10.0), Point(WORDS, 20.0, 300.0)], lines.lines)),
        Samples([Sample("1" * 300, "2", "before " * 60, "after", False, True)], WORDS, WORDS),
        Code(WORDS, "key = 1\n" * 20 + "x" * 300),
    ]
    return Page(WORDS, [Section(WORDS, parts)], WORDS)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser whose reader prefers Chinese."""
    folder: Path = tmp_path_factory.mktemp("report")
    (folder / "report.html").write_text(page().html(), encoding="utf-8")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"user-data-dir={folder / 'profile'}", "window-size=1200,900"]:
        options.add_argument("--" + flag)
    options.add_experimental_option("prefs", {"intl.accept_languages": "zh-CN,en"})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.get((folder / "report.html").as_uri())
    yield driver
    driver.quit()


def test_the_reader_s_language_is_shown_and_the_switch_changes_all_of_it(browser):
    seen = {}
    for language in ("zh", "en"):
        assert browser.find_element(By.TAG_NAME, "html").get_attribute("lang") == language
        seen[language] = browser.find_element(By.TAG_NAME, "body").text
        browser.find_element(By.ID, "language").click()
    assert ZH in seen["zh"] and EN not in seen["zh"]
    assert EN in seen["en"] and ZH not in seen["en"]
    assert seen["zh"].count(ZH) == seen["en"].count(EN) > 30, "texts inside plots among them"


def test_the_page_asks_for_nothing_and_complains_of_nothing(browser):
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.get_log("browser") == []


def test_plots_are_drawn_in_the_colours_of_light_and_dark(browser):
    script = """const bar = document.querySelector('svg path[style*="fill: var(--series-0)"]');
        return [getComputedStyle(bar).fill, getComputedStyle(document.body).backgroundColor]"""
    seen = []
    for scheme in ("light", "dark"):
        features = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
        seen.append(browser.execute_script(script))
    assert seen[0][0] != seen[1][0] and seen[0][1] != seen[1][1]
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width)"
    )
    assert len(sizes) == 4 and min(sizes) > 300


@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_runs_over_the_edge_of_the_screen(browser, width):
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.execute_script("document.querySelectorAll('details').forEach(each => { each.open = true })")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
