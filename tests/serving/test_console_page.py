"""The console's page in a real headless Chromium: runs compared as curves, rollouts browsed, hostile text shown."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from liaoyuan.runs import Folder
from liaoyuan.serving.console import build_console
from tests.runs.making import HOSTILE, make_run, rollout, row, write_rollouts
from tests.serving.conftest import serving

pytest.importorskip("selenium")
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from tests.serving.test_page import find, open_browser, pytestmark, wait_for  # noqa: F401

Browser = Any
FAINT = """
  const behind = (element) => {
    for (let each = element; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (!/, 0\\)$/.test(colour)) return colour;
    }
  };
  const part = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const light = (colour) => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map((each) => part(each / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const hasText = (each) => [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  return [...document.querySelectorAll('body *')]
    .filter((each) => hasText(each) && each.checkVisibility() && !each.closest('.other, :disabled, svg'))
    .map((each) => {
      const [a, b] = [light(getComputedStyle(each).color), light(behind(each))];
      return [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), each.className, each.textContent.slice(0, 20)];
    }).filter(([ratio]) => ratio < 4.5);
"""
WIDEST = "return Math.max(...[...document.querySelectorAll('body *')].map(each => each.getBoundingClientRect().right))"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_run(folder / "first", 40, groups=20)
    make_run(folder / "second", 30, total=60)
    long = "y" * 60_000 + HOSTILE
    rows = [rollout(40, 0, 0, text=HOSTILE, thought=long, question=HOSTILE, reason=HOSTILE, flaw=HOSTILE, task=HOSTILE)]
    write_rollouts(folder / "second", 30, rows)
    findings = {"step": 2, "name": "entropy", "severity": "warning", "what": "Entropy fell.", "do": "Raise it."}
    (folder / "second" / "findings.jsonl").write_text(json.dumps(findings) + "\n")
    (folder / "second" / "result.json").write_text('{"steps": 30, "accuracy": {"start": {"greedy": 0.25}}}')
    return folder


@pytest.fixture(scope="module")
def url(runs: Path) -> Iterator[str]:
    with serving(build_console(Folder(runs))) as address:
        yield address


@pytest.fixture
def browser(open_browser: Callable[[str], Browser]) -> Browser:  # noqa: F811
    return open_browser("en-US")


def go(browser: Browser, url: str, place: str = "") -> None:
    browser.get("about:blank")
    browser.get_log("browser")
    browser.get(f"{url}/{place}")
    wait_for(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".run"))


def all_of(browser: Browser, selector: str) -> list[Any]:
    return browser.find_elements(By.CSS_SELECTOR, selector)


def texts(browser: Browser, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(each => each.textContent)", selector
    )


def focused(browser: Browser) -> str | None:
    """Return the number of the group that has the focus; asked in one piece, for the page may draw anew any time."""
    group: str | None = browser.execute_script("return document.activeElement.dataset.group")
    return group


def press(browser: Browser, key: str) -> None:
    browser.switch_to.active_element.send_keys(key)


def test_runs_are_drawn_over_each_other_each_in_its_colour(browser: Browser, url: str) -> None:
    go(browser, url, "#/curves?run=first")
    wait_for(browser, lambda: len(texts(browser, ".chart")) == 2)
    assert texts(browser, ".chart h3") == ["Reward", "Entropy"]
    find(browser, 'input[data-run="second"]').click()
    wait_for(browser, lambda: len(texts(browser, ".chart:first-child .line")) == 2)
    assert "run=first&run=second" in browser.current_url
    colours = browser.execute_script(
        "return [...document.querySelectorAll('.chart:first-child .line')].map(each => getComputedStyle(each).stroke)"
    )
    assert len(set(colours)) == 2
    assert find(browser, ".chart:first-child .plot").get_attribute("aria-label").startswith("Reward. first: 0.")
    find(browser, 'input[data-run="first"]').click()
    wait_for(browser, lambda: len(texts(browser, ".chart:first-child .line")) == 1)
    colour = browser.execute_script("return getComputedStyle(document.querySelector('.chart .line')).stroke")
    assert colour == colours[1], "a run keeps its colour"


def test_axis_figures_smoothing_and_range_are_in_the_link(browser: Browser, url: str) -> None:
    go(browser, url, "#/curves?run=first&axis=cpu_seconds&smooth=0&figure=entropy&range=5~10")
    wait_for(browser, lambda: texts(browser, ".chart h3") == ["Entropy"])
    assert texts(browser, ".plot .x")[0] == "5" and not all_of(browser, ".plot .raw")
    find(browser, 'input[value="step"]').click()
    wait_for(browser, lambda: texts(browser, ".plot .x")[0] == "0")
    assert browser.current_url.endswith("#/curves?run=first&smooth=0&figure=entropy")
    browser.back()
    wait_for(browser, lambda: texts(browser, ".plot .x")[0] == "5")


def test_the_keyboard_reads_values_of_a_curve(browser: Browser, url: str) -> None:
    go(browser, url, "#/curves?run=first&smooth=0&figure=reward")
    wait_for(browser, lambda: all_of(browser, ".plot .line"))
    plot = find(browser, ".plot")
    browser.execute_script("arguments[0].focus()", plot)
    plot.send_keys(Keys.HOME)
    plot.send_keys(Keys.ARROW_RIGHT)
    assert find(browser, "#spoken").get_attribute("textContent") == f"1: first {row(1)['reward']:.3f}"


def test_rollouts_are_browsed_by_step_group_and_filter(browser: Browser, url: str) -> None:
    go(browser, url, "#/rollouts?run=first")
    wait_for(browser, lambda: all_of(browser, ".group"))
    assert find(browser, ".stepper input[type=number]").get_property("value") == "39", "the newest step"
    press(browser, Keys.ARROW_LEFT)
    wait_for(browser, lambda: texts(browser, ".question")[0] == "0+38=?")
    group = texts(browser, ".group")[0]
    for part in ("2 of 4 right", "addition", "Level 2", "✓ 1", "A +1", "7 tokens", "carry 0", "38", "not 38"):
        assert part in group, part
    press(browser, "j")
    press(browser, "j")
    assert focused(browser) == "1"
    find(browser, 'label[data-verdict="wrong"]').click()
    wait_for(browser, lambda: len(all_of(browser, ".sample.other")) == 16)
    find(browser, ".pager button:last-child").click()
    wait_for(browser, lambda: texts(browser, ".where") == ["groups 9–16 of 20"])
    press(browser, "/")
    browser.switch_to.active_element.send_keys("17+38")
    wait_for(browser, lambda: texts(browser, ".question") == ["17+38=?"])
    assert texts(browser, "mark") == ["17+38"] and "words=17%2B38" in browser.current_url


def test_a_link_leads_to_its_group_and_a_search_over_all_steps_to_a_rollout(browser: Browser, url: str) -> None:
    go(browser, url, "#/rollouts?run=first&step=5&group=17")
    wait_for(browser, lambda: focused(browser) == "17")
    go(browser, url, "#/rollouts?run=first&everywhere=1&words=19%2B12%3D")
    wait_for(browser, lambda: texts(browser, ".hit .excerpt") == ["19+12=?"])
    find(browser, ".hit").click()
    wait_for(browser, lambda: focused(browser) == "19")
    assert "step=12&group=19" in browser.current_url.replace("group=19&step=12", "step=12&group=19")


def test_hostile_rollouts_are_text_and_harm_nothing(browser: Browser, url: str) -> None:
    go(browser, url, "#/rollouts?run=second&step=30")
    wait_for(browser, lambda: all_of(browser, ".group"))
    body = texts(browser, "#view")[0]
    assert "<script>alert(2)</script>" in body and "␛[31mred" in body and "⟨U+202E⟩gnp.exe" in body
    assert not all_of(browser, "#view img, #view script, #view textarea")
    while more := all_of(browser, ".thought .small"):
        before = len(texts(browser, ".thought")[0])
        more[0].click()
        wait_for(browser, lambda before=before: len(texts(browser, ".thought")[0]) != before)
    assert "y" * 60_000 in texts(browser, ".thought")[0] and "{{constructor}}" in texts(browser, ".thought")[0]
    assert browser.get_log("browser") == [], "no alert, and nothing breaks the content security policy"
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(loaded) > 10 and all(name.startswith(url) for name in loaded)


def test_a_run_s_findings_and_result_are_shown(browser: Browser, url: str) -> None:
    go(browser, url, "#/details?run=second")
    wait_for(browser, lambda: all_of(browser, ".finding"))
    assert "warning" in find(browser, ".finding").text and "Raise it." in find(browser, ".finding").text
    assert find(browser, "td").text == "0.25" and "1 warning" in find(browser, ".runs").text


def test_what_is_written_or_removed_while_it_is_looked_at(browser: Browser, url: str, runs: Path) -> None:
    make_run(runs / "passing", 3)
    go(browser, url, "#/rollouts?run=passing")
    wait_for(browser, lambda: texts(browser, ".question")[:1] == ["0+2=?"])
    make_run(runs / "passing", 4)
    wait_for(browser, lambda: texts(browser, ".question")[:1] == ["0+3=?"])
    for path in sorted((runs / "passing").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    find(browser, ".stepper .icon").click()
    wait_for(browser, lambda: "passing" not in find(browser, ".runs").text)
    wait_for(browser, lambda: "not there any more" in find(browser, "#view").text)
    assert not all_of(browser, ".group")


def test_the_page_s_arithmetic(browser: Browser, url: str) -> None:
    go(browser, url)
    code = """const done = arguments[0];
      Promise.all([import('/page/scale.js'), import('/page/place.js')]).then(([scale, place]) => {
        const there = {...place.START, view: 'rollouts', runs: ['a/b', 'c&d=e#'], step: 0, group: 7, words: 'x?y',
          figures: ['loss'], range: [1, 2.5], smooth: 0, level: '3', log: true};
        done({
          ticks: [scale.ticks(0, 119, 5), scale.ticks(0.402, 0.83, 4), scale.ticks(3, 3, 4)],
          log: scale.logTicks(0.001, 12),
          smoothed: scale.smoothed([2, 2, 2], 0.9).map((each) => Number(each.toFixed(9))),
          nearest: [scale.nearest([1, 4, 9], 6), scale.nearest([1, 4, 9], 7), scale.nearest([], 1)],
          bounds: [scale.bounds([]), scale.bounds([5, 5]), scale.bounds([0])],
          short: [0, 0.7345, 12345, 1.5e6, 3.1e-7, -2, 100, 0.0500].map((each) => scale.short(each)),
          percent: scale.short(0.6789, true),
          again: JSON.stringify(place.readPlace(place.placeHash(there))) === JSON.stringify(there),
          nonsense: JSON.stringify(place.readPlace('#/moon?axis=x&smooth=900&step=-1&range=5~1&run=')),
          start: JSON.stringify({...place.START, runs: ['']}),
        });
      });"""
    found = browser.execute_async_script(code)
    assert found["ticks"] == [[0, 20, 40, 60, 80, 100], [0.5, 0.6, 0.7, 0.8], [3]]
    assert found["log"] == [0.001, 0.01, 0.1, 1, 10]
    assert found["smoothed"] == [2, 2, 2] and found["nearest"] == [1, 2, -1]
    assert found["bounds"] == [[0, 1], [4.5, 5.5], [-1, 1]]
    assert found["short"] == ["0", "0.735", "12.3k", "1.5M", "3.1e-7", "-2", "100", "0.05"]
    assert found["percent"] == "67.9%" and found["again"] and found["nonsense"] == found["start"]


@pytest.mark.parametrize("width", [320, 390, 1400])
@pytest.mark.parametrize("view", ["curves", "rollouts", "details"])
def test_the_page_fits_its_window_and_speaks_chinese(browser: Browser, url: str, view: str, width: int) -> None:
    size = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        go(browser, url, f"#/{view}?run=second&run=first")
        wait_for(browser, lambda: all_of(browser, ".card"))
        for _ in range(2):
            widest = (
                "return Math.max(...[...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right))"
            )
            assert browser.execute_script(widest) <= width
            find(browser, "#language").click()
        if view == "details":
            wait_for(browser, lambda: "What the doctor found" in find(browser, "#view").text)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_text_has_the_contrast_that_is_asked_for_by_light_and_by_dark(browser: Browser, url: str) -> None:
    """WCAG 2.1: at least 4.5 between text and what is behind it."""
    for scheme in ("light", "dark"):
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        for view in ("curves", "rollouts", "details"):
            go(browser, url, f"#/{view}?run=second&run=first&step=20")
            wait_for(browser, lambda: all_of(browser, ".card"))
            assert browser.execute_script(FAINT) == [], (scheme, view)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_every_control_has_a_name(browser: Browser, url: str) -> None:
    code = """return [...document.querySelectorAll('button, a, input, select, [tabindex="0"]')].filter((each) =>
        !(each.getAttribute('aria-label') || each.textContent.trim() || each.closest('label')?.textContent.trim()))
        .map((each) => each.outerHTML)"""
    for view in ("curves", "rollouts", "details"):
        go(browser, url, f"#/{view}?run=second&run=first&step=20")
        wait_for(browser, lambda: all_of(browser, ".card"))
        assert browser.execute_script(code) == []
