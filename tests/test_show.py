"""The page holds the pictures themselves and, of captions, nothing but text."""

from __future__ import annotations

import base64
import html
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_shards import clip, picture, tar

from data_pipeline.shards import write_shard, write_world_shards
from data_pipeline.show import write_page
from videodiff.errors import UserError


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_a_page_shows_samples_with_captions_and_measures(tmp_path: Path) -> None:
    video, meta = clip(200, 48, 32, frames=6)
    evil = '<script>alert("x")</script>'
    write_shard(tmp_path / "a.tar", [("s0", video, {**meta, "captions": [evil, "second"], "motion": 0.25}),
                                     ("s1", b"junk", {"captions": ["broken"]})])  # fmt: skip
    tar(tmp_path / "b.tar", [("i.png", picture(9, 20, 20)), ("i.txt", b"a picture"), ("n.png", picture(9, 20, 20))])
    out = tmp_path / "page.html"
    assert write_page(str(tmp_path), out, 9, frames=3, height=24, workers=0, deadline_seconds=60) == 4
    text = out.read_text()
    page = Tags()
    page.feed(text)
    assert {tag for tag, _ in page.tags} & {"script", "link", "iframe"} == set()
    assert all((attributes.get("src") or "data:").startswith("data:") for _, attributes in page.tags)
    words = "\n".join(page.words)
    for wanted in (evil, "second", "a picture", "48 x 32", "6 frames, 8 a second, 0.75 s", "0.25", "undecodable",
                   "sample n has no caption", "20 x 20"):  # fmt: skip
        assert wanted in words
    sheets = [base64.b64decode(data) for data in re.findall(r'src="data:image/jpeg;base64,([^"]*)"', text)]
    assert len(sheets) == 2
    strip = np.asarray(Image.open(io.BytesIO(sheets[0])))
    assert strip.shape[1] >= 3 * 36
    assert abs(int(strip[12, 12, 0]) - 200) < 8
    assert html.escape(evil) in text


def test_samples_are_spread_over_the_set(tmp_path: Path) -> None:
    world = write_world_shards(tmp_path, 9, size=32, frames=2, fps=8, seed=0, samples_per_shard=3).parent
    assert write_page(str(world), tmp_path / "p" / "page.html", 3, 2, 16, 0, 60) == 3
    assert re.findall(r"world-00000\d.tar", (tmp_path / "p" / "page.html").read_text()) == [
        f"world-00000{n}.tar" for n in range(3)
    ]
    with pytest.raises(UserError, match="cannot be written"):
        write_page(str(world), world / "index.json" / "x.html", 3, 2, 16, 0, 60)
