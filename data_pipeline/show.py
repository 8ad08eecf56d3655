"""A page to look at a data set by: samples with their frames, captions and measures, in one HTML file."""

from __future__ import annotations

import base64
import io
import json
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.check import PREVIEW
from data_pipeline.clips import Preview
from data_pipeline.decoders import ClipError
from data_pipeline.decoding import DecodePool
from data_pipeline.index import Shard, open_shards
from data_pipeline.samples import RawSample, SampleError, try_sample
from videodiff.errors import UserError
from videodiff.video_io import atomic_path, contact_sheet

_STYLE = """
body { font: 14px system-ui, sans-serif; margin: 2em auto; max-width: 72em; color: #222; background: #fff }
section { border-top: 1px solid #ccc; padding: 1em 0 } h2 { font-size: 1em; margin: 0 0 .5em }
img { max-width: 100% } ul { margin: .5em 0; padding-left: 1.2em } table { border-spacing: 1em 0; margin-left: -1em }
td:first-child { color: #777 } .bad { color: #b00 }
"""


def write_page(
    location: str, out: Path, num_samples: int, frames: int, height: int, workers: int, deadline_seconds: float
) -> int:
    """Write the page of ``num_samples`` samples, spread over all of the shards at ``location``; each shows ``frames``
    of its frames, ``height`` pixels high. Returns how many there are.

    Raises UserError where shards can't be opened, hold no pictures, or the file can't be written.
    """
    shards = open_shards(location)
    if any(shard.encoding for shard in shards):
        raise UserError(f"{location}: encoded shards hold no pictures; show those of the videos")
    places = [(shard, number) for shard in shards for number in range(len(shard.offsets))]
    chosen = [places[i] for i in np.linspace(0, len(places) - 1, min(num_samples, len(places))).astype(int).tolist()]
    told: list[RawSample | SampleError] = []
    jobs = ({**job, "frames": frames, "height": height} if job else None for job in _jobs(chosen, told))
    with DecodePool(workers, deadline_seconds, PREVIEW) as pool, atomic_path(out) as temporary:
        sections = [
            _section(shard, told[row], result)
            for row, ((shard, _), result) in enumerate(zip(chosen, pool.map(jobs), strict=True))
        ]
        temporary.write_text(_page(location, len(places), sections), encoding="utf-8")
    return len(chosen)


def _jobs(chosen: list[tuple[Shard, int]], told: list[RawSample | SampleError]) -> Any:
    for shard, number in chosen:
        raw = try_sample(shard, number)
        told.append(raw)
        yield None if isinstance(raw, SampleError) else {"video": raw.video, "suffix": raw.suffix}


def _section(shard: Shard, raw: RawSample | SampleError, result: Any) -> str:
    if isinstance(raw, SampleError):
        return f'<section><h2>{_text(raw.key or "?")}</h2><p class="bad">{_text(str(raw))}</p></section>'
    rows: dict[str, Any] = {"shard": shard.path.name, "size": f"{len(raw.video):,} bytes of {raw.suffix}"}
    if isinstance(result, Preview):
        picture = f'<img alt="{len(result.frames)} frames" src="{_picture(result.frames)}">'
        rows["picture"] = f"{result.width} x {result.height}, read by {result.decoder}"
        if result.fps:
            rows["length"] = f"{result.total} frames, {result.fps:.3g} a second, {result.total / result.fps:.2f} s"
    else:
        assert isinstance(result, ClipError)
        picture = f'<p class="bad">{_text(str(result))}</p>'
    for name, value in raw.meta.items():
        if name not in ("captions", "caption"):
            rows[name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    table = "".join(f"<tr><td>{_text(name)}</td><td>{_text(str(value))}</td></tr>" for name, value in rows.items())
    captions = "".join(f"<li>{_text(caption)}</li>" for caption in raw.captions)
    return f"<section><h2>{_text(raw.key)}</h2>{picture}<ul>{captions}</ul><table>{table}</table></section>"


def _picture(frames: npt.NDArray[np.uint8]) -> str:
    """The frames in a row, as the address of a JPEG that holds itself."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(contact_sheet(list(frames), columns=len(frames))).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _page(location: str, total: int, sections: list[str]) -> str:
    title = f"{len(sections)} of {total} samples of {_text(location)}"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"</head><body><h1>{title}</h1>{''.join(sections)}</body></html>\n"
    )


def _text(text: str) -> str:
    """Text as such: a caption can't put anything into the page; what is no text (lone surrogates) becomes "?"."""
    return escape(text.encode("utf-8", "replace").decode())
