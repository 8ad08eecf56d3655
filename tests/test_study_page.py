"""The raters' page in a real browser, by keyboard and by touch, from file:// and with the network watched.

Needs Chromium on the PATH (`apt-get install --no-install-recommends chromium`), and is skipped without.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.study import build
from stages.study_answers import read_answers, read_key, votes
from tests.browser import CHROMIUM, Browser
from tests.test_study import write_videos

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds a study of two pairs with these options; gives its folder."""
    folders = [write_videos(tmp_path_factory.mktemp(name) / name, 2, noise) for name, noise in (("a", 0), ("b", 30))]

    def study(**options: Any) -> Path:
        out = tmp_path_factory.mktemp("study")
        build(*folders, out, **{"seed": 1, "raters": 2, **options})
        return out

    return study


def watch(browser: Browser) -> None:
    browser.until("seen")


def test_a_rater_answers_everything_by_keyboard_and_goes_on_after_a_reload(
    browser: Browser, make: Callable[..., Path]
) -> None:
    out = make()
    browser.requests.clear()
    browser.open(f"file://{out}/study.html#2")
    assert browser.run("document.activeElement.textContent") == "Start"
    browser.press("Enter")
    browser.until("document.querySelector('#trial').dataset.started")
    assert browser.run("document.querySelector('#count').textContent") == "1 of 4"
    assert browser.run("document.querySelector('#prompt').hidden")  # the look is judged without the text
    # Both play, together and again from the start.
    times = "[...document.querySelectorAll('video')].map(v => v.currentTime)"
    browser.until(f"{times}.every(t => t > 0.2)")
    first, second = browser.run(times)
    assert abs(first - second) < 0.2
    browser.until(f"{times}.every(t => t < 0.15)")
    browser.press("p")
    browser.until("[...document.querySelectorAll('video')].every(v => v.paused)")
    assert browser.run("document.querySelector('#pause').innerText").startswith("Play")
    browser.press("r")
    browser.until("[...document.querySelectorAll('video')].every(v => !v.paused)")
    # Neither a choice without a reason nor a reason without a choice goes on.
    browser.press("Enter")
    assert "two videos" in browser.run("document.querySelector('#missing').textContent")
    browser.press("1", "Enter")
    assert "one reason" in browser.run("document.querySelector('#missing').textContent")
    browser.press("a", "d", "b", "b")
    browser.run("seen = false")  # nor does what was not watched
    browser.press("Enter")
    assert "to the end" in browser.run("document.querySelector('#missing').textContent")
    watch(browser)
    browser.press("Enter")
    assert browser.run("document.querySelector('#count').textContent") == "2 of 4"
    browser.open(f"file://{out}/study.html#2")
    browser.press("Enter")
    assert browser.run("document.querySelector('#count').textContent") == "2 of 4"
    watch(browser)
    browser.press("ArrowRight", "e", "Enter")
    # The question changes; the same place shows the text now.
    assert not browser.run("document.querySelector('#part').hidden")
    browser.press("Enter")
    assert not browser.run("document.querySelector('#prompt').hidden")
    key = read_key(out / "key.json")
    prompts = [key["pairs"][trial["pair"]]["prompt"] for trial in key["raters"][1]]
    assert browser.run("document.querySelector('#prompt').textContent") == prompts[2]
    for keys in (("2", "a", "Enter"), ("1", "b", "a", "Enter")):
        watch(browser)
        browser.press(*keys)
    assert not browser.run("document.querySelector('#end').hidden")
    browser.press("Tab", "Enter")
    ((sheet,), left_out) = read_answers(key, [browser.saved("answers-2.json")])
    assert sheet.rater == 2
    assert not left_out
    assert [answer.choice for answer in sheet.answers] == ["left", "right", "right", "left"]
    assert sheet.answers[0].reasons == ("pixel sharpness", "frame consistency")
    assert sheet.answers[3].reasons == ("spatial text alignment", "temporal text alignment")
    assert all(answer.milliseconds >= 0 for answer in sheet.answers)
    assert {url.partition(":")[0] for url in browser.requests} <= {"file", "blob", "about"}


def test_what_is_on_the_left_is_what_the_key_says(browser: Browser, make: Callable[..., Path]) -> None:
    """The noise of B's videos is seen in the browser's own pixels, for both raters."""
    out = make(questions=("faithfulness",))
    key = read_key(out / "key.json")
    grain = """(() => { const v = document.querySelectorAll('video')[0], c = document.createElement('canvas');
        c.width = v.videoWidth; c.height = v.videoHeight; const p = c.getContext('2d'); p.drawImage(v, 0, 0);
        const d = p.getImageData(0, 0, c.width, 4).data; let sum = 0;
        for (let i = 4; i < d.length; i += 4) sum += Math.abs(d[i] - d[i - 4]); return sum * 4 / d.length; })()"""
    for rater in (1, 2):
        browser.open(f"file://{out}/study.html#{rater}")
        for trial in key["raters"][rater - 1]:
            browser.press("Enter")
            browser.until("document.querySelector('#trial').dataset.started")
            assert (browser.run(grain) > 4) == (trial["left"] == "B")
            browser.press("1", "a")
            watch(browser)
        browser.press("Enter", "Tab", "Enter")
        ((sheet,), _) = read_answers(key, [browser.saved(f"answers-{rater}.json")])
        cast = votes(key, [sheet])
        assert [vote.system for vote in cast] == [trial["left"] for trial in key["raters"][rater - 1]]


def test_a_phone_by_touch_with_the_videos_in_a_folder_and_a_change_of_mind(
    browser: Browser, make: Callable[..., Path]
) -> None:
    out = make(questions=("quality",), page_mb=0)
    browser.open(f"file://{out}/study/study.html", 390, 844, phone=True)
    browser.run("document.querySelector('#rater').value = '1'")
    browser.tap("#start button")
    browser.until("document.querySelector('#trial').dataset.started")
    assert browser.run("document.documentElement.scrollWidth") <= 390
    sizes = browser.run("[...document.querySelectorAll('.reason')].map(r => r.getBoundingClientRect().height)")
    assert min(sizes) >= 44
    for choice, reason in ((".side:nth-of-type(2) video", 1), (".side:nth-of-type(1) video", 3)):
        browser.tap(choice)
        browser.tap(f".reason:nth-of-type({reason})")
        watch(browser)
        browser.tap("#next")
    browser.tap("#again")
    assert browser.run("document.querySelector('[value=left]').checked")
    browser.tap(".side:nth-of-type(2) video")
    browser.tap("#next")
    told = json.loads(browser.run("document.querySelector('#copy').value"))
    assert [answer["choice"] for answer in told["answers"]] == ["right", "right"]
    browser.tap("#save")
    ((sheet,), _) = read_answers(read_key(out / "key.json"), [browser.saved("answers-1.json")])
    assert sheet.answers[1].reasons == ("recognizable objects or scenes",)
