"""The report in a real browser: nothing in an answer runs, nothing is asked of any server, and the keyboard is enough.

Needs Chromium (Debian: `apt-get install chromium`) and the package playwright, which drives it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_parts import HOSTILE, run_of_two_arms, with_hostile_answers

from online_dpo.report.answers import readable
from online_dpo.report.reporting import report_runs

pytestmark = pytest.mark.slow

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTHS = (320, 390, 1280)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium that is on this machine."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    driver = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    with driver.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run whose every answer is hostile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        root = tmp_path_factory.mktemp("browser") / "run"
        with_hostile_answers(run_of_two_arms(root))
        _, [html, *_] = report_runs([root], root / "report")
    return html


class Opened:
    """The page in a window, with what it said to the console and what it asked for."""

    def __init__(self, browser: Any, file: Path, **options: Any) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page = browser.new_page(**options)
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(file.as_uri())

    def on(self, script: str) -> Any:
        return self.page.evaluate(script)


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Opened]:
    found = Opened(browser, report)
    yield found
    found.page.close()


def test_no_answer_runs_and_nothing_is_asked_of_a_server(opened: Opened, report: Path) -> None:
    """Every prompt is looked at, in all rounds: texts stand there as they are, and nothing in them was carried out."""
    page = opened.page
    page.select_option("#rounds", "all")
    seen = set()
    for number in range(12):
        page.select_option("#prompt", index=number)
        seen |= set(opened.on("[...document.querySelectorAll('.answer .said')].map((one) => one.textContent)"))
    assert seen == {readable(text) for text in HOSTILE}
    assert opened.on("window.hacked") is None
    assert opened.on("document.querySelectorAll('#shown img, #shown script, #shown svg, #shown a').length") == 0
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith("data:")] == [report.as_uri()]


def test_the_pages_own_policy_stops_a_script_all_the_same(opened: Opened) -> None:
    """The second wall: were a script to get into the page, it would not run."""
    opened.on(
        "(() => { const bad = document.createElement('script'); bad.textContent = 'window.hacked = 2';"
        " document.body.append(bad); })()"
    )
    assert opened.on("window.hacked") is None
    assert any("Content Security Policy" in line for line in opened.said)


def test_the_keyboard_alone_reaches_and_turns_the_answers(opened: Opened) -> None:
    page = opened.page
    page.keyboard.press("Tab")
    assert opened.on("document.activeElement.textContent") == "Skip to the report"
    page.keyboard.press("Enter")
    for _ in range(300):
        page.keyboard.press("Tab")
        if opened.on("document.activeElement.id") == "next":
            break
    assert opened.on("document.activeElement.id") == "next"
    assert opened.on("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.inner_text("#position") == "Prompt 2 of 12"
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#position") == "Prompt 3 of 12"
    page.keyboard.press("Tab")  # to the answers themselves
    assert opened.on("document.activeElement.id") == "shown"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text("#position") == "Prompt 1 of 12"
    assert opened.on("document.getElementById('previous').disabled")


def test_prompts_are_found_by_what_their_answers_hold(opened: Opened) -> None:
    page = opened.page
    page.fill("#search", "ONERROR")
    assert page.inner_text("#position") == "Prompt 1 of 2"  # two of twelve prompts have the third hostile answer
    page.fill("#search", "no such words anywhere")
    assert page.inner_text("#position") == "No prompt and no answer holds these words."
    assert opened.on("document.getElementById('shown').childElementCount") == 0
    page.fill("#search", "")
    assert page.inner_text("#position") == "Prompt 1 of 12"


def test_orders_put_the_largest_first(opened: Opened) -> None:
    """By the stored figures themselves, of the seed and the rounds that are shown."""
    page = opened.page
    stored = opened.on("JSON.parse(document.getElementById('data').textContent)")
    own = [one for one in stored["columns"] if one["seed"] == 0 and one["round"] in (0, 2)]
    tokens = [max(stored["sets"][one["set"]]["tokens"][place] for one in own) for place in range(12)]
    page.select_option("#order", "longest")
    order = [int(one) for one in opened.on("[...document.querySelectorAll('#prompt option')].map((one) => one.value)")]
    assert [tokens[place] for place in order] == sorted(tokens, reverse=True)

    def change(place: int) -> float:
        found = [-1.0]
        for one in own:
            start = next(o for o in own if o["arm"] == one["arm"] and o["round"] == 0)
            before, after = (stored["sets"][o["set"]]["reward"][place] for o in (start, one))
            if one["round"] and None not in (before, after):
                found.append(abs(after - before))
        return max(found)

    page.select_option("#order", "change")
    order = [int(one) for one in opened.on("[...document.querySelectorAll('#prompt option')].map((one) => one.value)")]
    assert [change(place) for place in order] == sorted(map(change, range(12)), reverse=True)
    page.select_option("#order", "abstained")
    assert opened.on("document.getElementById('prompt').value") == "1"
    assert "The judge abstained" in page.inner_text("#shown")


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_never_scrolls_sideways(browser: Any, report: Path, width: int) -> None:
    found = Opened(browser, report, viewport={"width": width, "height": 800})
    try:
        for order in ("file", "longest"):
            found.page.select_option("#order", order)
            found.on("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
            assert found.on("document.documentElement.scrollWidth") <= width
    finally:
        found.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_on_paper_and_in_figures(browser: Any, report: Path, scheme: str) -> None:
    """WCAG's contrast of text (4.5) in the page and of the axes' text in the figures, by the system's scheme and by the
    switch."""
    found = Opened(browser, report, color_scheme=scheme)
    other = "light" if scheme == "dark" else "dark"
    try:
        for chosen in ("", other):
            found.page.select_option("#scheme", chosen)
            for selector in ("p", "#curves .plot svg text", ".note", "nav a", "td"):
                ratio = found.on(CONTRAST.replace("SELECTOR", selector))
                assert ratio >= 4.5, (scheme, chosen, selector, ratio)
    finally:
        found.page.close()


CONTRAST = """(() => {
  const element = document.querySelector('SELECTOR');
  const style = getComputedStyle(element);
  const numbers = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
  const light = (colour) => numbers(colour).map((one) => one / 255)
    .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4))
    .reduce((sum, one, place) => sum + one * [0.2126, 0.7152, 0.0722][place], 0);
  const text = light(element instanceof SVGElement ? style.fill : style.color);
  const paper = light(getComputedStyle(document.body).backgroundColor);
  return (Math.max(text, paper) + 0.05) / (Math.min(text, paper) + 0.05);
})()"""
