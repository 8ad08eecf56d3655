"""The raters' page in a real browser, by keyboard and by touch, from file:// and with the network watched.

Needs Chromium on the PATH (`apt-get install --no-install-recommends chromium`), and is skipped without. It is driven
through its own pipe (--remote-debugging-pipe), so no driver and no package is needed beside it.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.study import build
from stages.study_answers import read_answers, read_key, votes
from tests.test_study import write_videos

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
PATIENCE = 60.0  # seconds for anything: a busy machine is no failure
CODES = {"Enter": 13, "Tab": 9, "ArrowLeft": 37, "ArrowRight": 39, " ": 32}


class Browser:
    """One tab of a headless Chromium, spoken to by the DevTools protocol: JSON, each message ended by a zero byte."""

    def __init__(self, folder: Path) -> None:
        self.downloads = folder / "downloads"
        (read, self._to), (self._from, write) = os.pipe(), os.pipe()
        # The browser reads from descriptor 3 and writes to 4; high numbers don't get in their way.
        read, write = (fcntl.fcntl(descriptor, fcntl.F_DUPFD, 20) for descriptor in (read, write))
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-extensions",
            "--mute-audio",
        ]
        flags += ["--disable-background-networking", f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe"]
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{read} 4>&{write}', str(CHROMIUM), *flags, "about:blank"]
        with open(folder / "chromium.log", "wb") as log:
            self._process = subprocess.Popen(command, pass_fds=(read, write), stdout=log, stderr=log)
        os.close(read), os.close(write)
        self._rest, self._number, self._session = b"", 0, None
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network"):
            self.send(f"{domain}.enable")
        self.send("Page.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._receive(deadline)
            if answer.get("method") == "Network.requestWillBeSent":
                self.requests.append(answer["params"]["request"]["url"])
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                return dict(answer["result"])

    def open(self, url: str, width: int = 1280, height: int = 800, phone: bool = False) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=url)
        self.until("document.readyState === 'complete' && !document.getElementById('welcome')?.hidden")

    def run(self, expression: str) -> Any:
        told = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in told, told
        return told["result"].get("value")

    def until(self, expression: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not self.run(expression):
            assert time.monotonic() < deadline, (expression, self.run("document.body.innerText"))
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        for key in keys:
            told = {"key": key, "windowsVirtualKeyCode": CODES.get(key, ord(key[0].upper()))}
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else None)
            self.send("Input.dispatchKeyEvent", type="keyDown", **told, **({"text": text} if text else {}))
            self.send("Input.dispatchKeyEvent", type="keyUp", **told)

    def tap(self, selector: str) -> None:
        """Touch the middle of an element, which must be where nothing covers it."""
        spot = self.run(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
            " const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": spot[0], "y": spot[1]}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def saved(self, name: str) -> Path:
        deadline = time.monotonic() + PATIENCE
        while not (self.downloads / name).is_file():
            assert time.monotonic() < deadline, list(self.downloads.iterdir()) if self.downloads.exists() else "nothing"
            time.sleep(0.05)
        return (self.downloads / name).rename(self.downloads / f"{self._number}-{name}")  # the next may be called alike

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)
        os.close(self._to), os.close(self._from)

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self._from, 2**20) if ready else b""
            assert chunk, "the browser is silent or gone"
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


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
