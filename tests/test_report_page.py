"""An evaluation's page in a real browser at the width of a desk and of a phone, from file://, the network watched.

Needs Chromium on the PATH (`apt-get install --no-install-recommends chromium`), and is skipped without.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.evaluation.command import Request, main
from tests.browser import CHROMIUM, Browser
from tests.test_evaluate_checkpoints import add_checkpoint

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the PATH")
# What a page is wider than its window, and elements that reach out of it and can't be scrolled to.
OVERFLOW = "document.documentElement.scrollWidth - window.innerWidth"
OUTSIDE = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre, svg') && e.checkVisibility()
    && e.getBoundingClientRect().right > window.innerWidth + 1)
    .map(e => e.tagName + ' ' + e.textContent.slice(0, 40))"""
SMALL = """[...document.querySelectorAll('td, th, p, figcaption, span, caption')].filter(e => e.checkVisibility()
    && e.textContent.trim() && parseFloat(getComputedStyle(e).fontSize) < 11).length"""


@pytest.fixture(scope="module")
def page(toy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints judged on the same three prompts."""
    folder = tmp_path_factory.mktemp("page")
    for step, noise in ((20, 0.3), (40, 0.0)):
        add_checkpoint(folder / "run", toy_model, step, noise)
    main(Request(str(folder / "run"), "all", 3, 3, folder / "out", 1, checkpoints="all"))
    return folder / "out/report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("browser"))
    yield opened
    opened.close()


@pytest.mark.parametrize(("width", "height", "phone"), [(1280, 900, False), (390, 844, True)], ids=["desk", "phone"])
def test_it_can_be_read(browser: Browser, page: Path, width: int, height: int, phone: bool) -> None:
    browser.requests.clear()
    browser.open(f"file://{page}", width, height, phone)
    assert browser.run("window.innerWidth") == width
    assert browser.run(OVERFLOW) <= 0
    assert browser.run(OUTSIDE) == []
    assert browser.run(SMALL) == 0
    asked = {url for url in browser.requests if not url.startswith(("data:", "about:"))}
    assert asked == {f"file://{page}"}
    # Every picture is whole, the videos play by themselves, and again.
    browser.until("[...document.querySelectorAll('video')].length > 5")
    browser.until("[...document.querySelectorAll('video')].every(v => v.readyState >= 2 && !v.error)")
    assert browser.run("[...document.querySelectorAll('img')].every(i => i.naturalWidth > 0)")
    seen = "document.querySelector('video')"
    browser.run(f"{seen}.scrollIntoView()")
    browser.until(f"{seen}.currentTime > 0")
    assert browser.run(f"{seen}.loop && {seen}.muted")
    # Details open, and don't burst the page either.
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run(OVERFLOW) <= 0
    assert browser.run(OUTSIDE) == []


def test_curves_have_a_point_for_each_checkpoint(browser: Browser, page: Path) -> None:
    browser.open(f"file://{page}")
    assert browser.run("document.querySelectorAll('svg').length") > 5
    assert browser.run("[...document.querySelectorAll('svg')].every(s => s.querySelectorAll('circle').length === 2)")
