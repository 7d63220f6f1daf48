"""The chat page in a real headless Chromium: what a reader does and sees, in English and in Chinese."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from liaoyuan.data.tokenizer import Tokenizer
from liaoyuan.serving import About, Access, build_app
from liaoyuan.serving import Keys as ServerKeys
from tests.serving.conftest import ScriptedRunner, chat_tokens, scripted, serving

selenium = pytest.importorskip("selenium")
from selenium import webdriver  # noqa: E402
from selenium.common.exceptions import WebDriverException  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.expected_conditions import alert_is_present  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="Debian's chromium and chromium-driver are not installed"),
    # Once more only if Chromium itself died, as on a busy machine it may: that says nothing of the page.
    pytest.mark.flaky(reruns=1, only_rerun=["InvalidSessionIdException", "tab crashed"]),
]
FLAGS = "headless=new no-sandbox disable-gpu no-first-run disable-background-networking disable-component-update"
FLAGS += " disable-sync disable-quic disable-dev-shm-usage"
PATIENCE = 30  # seconds to wait for what should happen at once, on a busy machine
QUESTION = "What is 17 + 25?"
ABOUT = About(
    about={"en": "It adds.", "zh": "会做加法。"},
    cannot={"en": "It knows no history.", "zh": "不懂历史。"},
    examples=[QUESTION, {"en": "One more", "zh": "再来一题"}],
)
ANSWER = "7 + 5 = 12</think>The answer is **42**.\n\n<img src=x onerror=alert(1)>"

Browser = Any


@pytest.fixture(scope="module")
def open_browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Browser]]:
    """Return a function (language) -> browser; each language's browser is started once, and again if it has died."""
    opened: dict[str, Browser] = {}

    def browser(language: str) -> Browser:
        if language in opened and not _is_alive(opened[language]):
            with contextlib.suppress(WebDriverException):
                opened.pop(language).quit()
        if language not in opened:
            opened[language] = _start(language, tmp_path_factory.mktemp("profile"))
        return opened[language]

    yield browser
    for each in opened.values():
        each.quit()


def _is_alive(browser: Browser) -> bool:
    try:
        return bool(browser.execute_script("return true"))
    except WebDriverException:
        return False


def _start(language: str, profile: Path) -> Browser:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS.split(), f"user-data-dir={profile}", f"lang={language}", "window-size=1000,800"]:
        options.add_argument("--" + flag)
    options.add_experimental_option("prefs", {"intl.accept_languages": language})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


@pytest.fixture
def browser(open_browser: Callable[[str], Browser]) -> Browser:
    return open_browser("en-US")


@pytest.fixture(scope="module")
def said(tokenizer: Tokenizer) -> Iterator[tuple[str, ScriptedRunner]]:
    with scripted(tokenizer, ANSWER, pace=0.002, about=ABOUT) as serving:
        yield serving


@pytest.fixture(scope="module")
def endless(tokenizer: Tokenizer) -> Iterator[tuple[str, ScriptedRunner]]:
    with scripted(tokenizer, "First</think>" + "1 + 2 + 1 = 4. " * 300, pace=0.01, about=ABOUT) as serving:
        yield serving


def find(browser: Browser, selector: str) -> Any:
    return browser.find_element(By.CSS_SELECTOR, selector)


def open_page(browser: Browser, url: str) -> None:
    """Load the page afresh and wait until it knows its model."""
    browser.get_log("browser")
    browser.get(url)
    browser.execute_script("localStorage.clear()")
    browser.refresh()
    wait_for(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".example"))


def wait_for(browser: Browser, condition: Callable[[], Any]) -> Any:
    return WebDriverWait(browser, PATIENCE, poll_frequency=0.02).until(lambda _: condition())


def wait_for_answer(browser: Browser, number: int = 1) -> Any:
    """Return the view of answer `number`, once it is whole."""
    done = '.answered[aria-busy="false"]'
    return wait_for(browser, lambda: browser.find_elements(By.CSS_SELECTOR, done)[number - 1 : number])[0]


def type_question(browser: Browser, *keys: str) -> None:
    find(browser, "#question").send_keys(*keys)


def test_an_example_is_answered_and_the_thought_folded_away(browser: Browser, said: tuple[str, Any]) -> None:
    open_page(browser, said[0])
    assert "It adds." in find(browser, "#about").text and "no history" in find(browser, "#cannot").text
    find(browser, ".example").click()
    answer = wait_for_answer(browser)
    assert find(browser, ".asked").text == QUESTION
    assert find(browser, ".answered .text strong").text == "42"
    assert "<img src=x onerror=alert(1)>" in answer.text
    assert not browser.find_elements(By.CSS_SELECTOR, ".answered img")
    fold = find(browser, ".fold")
    thought = len(said[1].requests[-1].prompt) and fold.find_element(By.TAG_NAME, "summary")
    assert thought.text.startswith("Thought for ") and fold.get_attribute("open") is None
    assert not find(browser, ".thought").is_displayed()
    thought.click()
    assert find(browser, ".thought").text == "7 + 5 = 12"
    assert "tokens" in find(browser, ".speed").text
    assert "Written by an AI" in find(browser, ".note").text


def test_nothing_breaks_the_content_security_policy(browser: Browser, said: tuple[str, Any]) -> None:
    open_page(browser, said[0])
    find(browser, ".example").click()
    wait_for_answer(browser)
    find(browser, "#theme").click()
    find(browser, "#language").click()
    assert browser.get_log("browser") == []
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert len(loaded) > 4 and all(name.startswith(said[0]) for name in loaded)


def test_the_answer_streams_and_stop_ends_it(browser: Browser, endless: tuple[str, ScriptedRunner]) -> None:
    url, runner = endless
    open_page(browser, url)
    type_question(browser, "Count", Keys.ENTER)
    grown = wait_for(browser, lambda: len(find(browser, ".answered .text").text) > 3 and find(browser, ".text").text)
    wait_for(browser, lambda: len(find(browser, ".answered .text").text) > len(grown))
    assert "tokens/s" in wait_for(browser, lambda: find(browser, ".speed").text)
    assert runner.open == 1 and not find(browser, "#send").is_displayed()
    find(browser, "#stop").click()
    assert "stopped" in wait_for_answer(browser).text
    wait_for(browser, lambda: runner.open == 0)
    assert find(browser, "#send").is_displayed() and runner.aborted


def test_the_keyboard_and_the_conversation(
    browser: Browser, said: tuple[str, ScriptedRunner], tokenizer: Tokenizer
) -> None:
    open_page(browser, said[0])
    type_question(browser, "one", Keys.SHIFT + Keys.ENTER)
    type_question(browser, "two")
    assert find(browser, "#question").get_property("value") == "one\ntwo"
    type_question(browser, Keys.ENTER)
    wait_for_answer(browser)
    find(browser, "#thinking label:nth-child(2)").click()
    type_question(browser, "three", Keys.ENTER)
    wait_for_answer(browser, 2)
    request = said[1].requests[-1]
    expected = [
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": ANSWER.partition("</think>")[2]},
    ]
    assert list(request.prompt) == tokenizer.render([*expected, {"role": "user", "content": "three"}], thinking=False)
    find(browser, "#new-chat").click()
    assert not browser.find_elements(By.CSS_SELECTOR, ".turn") and find(browser, "#welcome").is_displayed()


def test_an_answer_can_be_tried_again(browser: Browser, said: tuple[str, ScriptedRunner]) -> None:
    open_page(browser, said[0])
    find(browser, ".example").click()
    wait_for_answer(browser)
    before = len(said[1].requests)
    find(browser, ".again").click()
    wait_for(browser, lambda: len(said[1].requests) == before + 1)
    wait_for_answer(browser)
    assert len(browser.find_elements(By.CSS_SELECTOR, ".answered")) == 1
    first, second = said[1].requests[-2:]
    assert first.prompt == second.prompt and first.sampling.seed != second.sampling.seed


def test_errors_are_said_in_words(browser: Browser, said: tuple[str, ScriptedRunner]) -> None:
    open_page(browser, said[0])
    said[1].busy = True
    try:
        find(browser, ".example").click()
        wait_for_answer(browser)
        assert "server is busy" in find(browser, ".error").text
    finally:
        said[1].busy = False
    find(browser, ".again").click()
    wait_for(browser, lambda: browser.find_elements(By.CSS_SELECTOR, ".answered .text strong"))


def test_the_page_speaks_the_browsers_language(open_browser: Callable[[str], Browser], said: tuple[str, Any]) -> None:
    browser = open_browser("zh-CN")
    open_page(browser, said[0])
    assert find(browser, "html").get_attribute("lang") == "zh-Hans"
    assert find(browser, "#about").text == "会做加法。" and find(browser, "#new-chat").text == "新对话"
    browser.find_elements(By.CSS_SELECTOR, ".example")[1].click()
    wait_for_answer(browser)
    assert find(browser, ".asked").text == "再来一题"
    assert find(browser, ".fold summary").text.startswith("思考了 ")
    find(browser, "#language").click()
    assert find(browser, ".fold summary").text.startswith("Thought for ")
    assert find(browser, "#new-chat").text == "New chat"
    browser.refresh()
    wait_for(browser, lambda: find(browser, "#about").text == "It adds.")


@pytest.mark.parametrize("width", [320, 390, 1400])
def test_the_page_fits_its_window(browser: Browser, said: tuple[str, Any], width: int) -> None:
    size = {"width": width, "height": 700, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        open_page(browser, said[0])
        find(browser, ".example").click()
        wait_for_answer(browser)
        widest = (
            "return Math.max(...[...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right))"
        )
        assert browser.execute_script(widest) <= width
        assert browser.execute_script("return document.documentElement.scrollHeight") <= 700
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_the_page_asks_for_a_key_where_the_server_does(open_browser, tokenizer: Tokenizer) -> None:
    runner = ScriptedRunner(lambda request: chat_tokens(tokenizer, ANSWER))
    access = Access(keys=ServerKeys({"reader": "secret-of-reader"}))
    with serving(build_app(runner, tokenizer, "scripted", 4096, ABOUT, access=access)) as url:
        browser = open_browser("en")
        browser.get(url)
        for given in ("wrong-key", "secret-of-reader"):
            WebDriverWait(browser, PATIENCE).until(alert_is_present())
            browser.switch_to.alert.send_keys(given)
            browser.switch_to.alert.accept()
        WebDriverWait(browser, PATIENCE).until(lambda page: page.find_element(By.ID, "model").text == "scripted")
