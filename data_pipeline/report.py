"""report.html: one file that shows what was kept, what was not, and why."""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.filters import Limits
from data_pipeline.journal import Row, read_data
from data_pipeline.prepare_config import PrepareConfig
from videodiff.config import to_dict
from videodiff.pages import write_page

_SHOWN: tuple[str, ...] = (
    "motion",
    "motion_window",
    "sharpness",
    "brightness",
    "static",
    "black",
    "letterbox",
    "source_fps",
    "source_side",
)
_SHOWN += ("words", "clip_similarity", "aesthetic")
_OPERATIONAL = ("workers", "video_seconds", "clip_seconds")  # they change no result
_BINS = 40
_KEPT, _REJECTED = 24, 8  # pictures on a sheet: of the kept clips, and of those with one reason
_LISTED = 2000  # files that gave no clip


def write_report(path: Path, clips: Sequence[Row], passed: Mapping[str, Row], config: PrepareConfig) -> None:
    """Write the page, whole or not at all. ``clips`` are rows of the table, with where their ``strip`` lies; passed:
    ending -> "count" and "first" of the files that are no source."""
    write_page(path, Path(__file__).parent / "report.html.jinja", passed=passed, **_facts(clips, config))


def _facts(clips: Sequence[Row], config: PrepareConfig) -> dict[str, Any]:
    kept = [clip for clip in clips if clip["kept"]]
    reasons = Counter(clip["reason"] for clip in clips if not clip["kept"])
    sources = {clip["source_key"]: clip for clip in clips}
    readers = Counter(
        (c.get("decoder") or "none", c.get("codec") or "", c.get("container") or "") for c in sources.values()
    )
    failed = [clip for clip in clips if clip["place"][1] < 0]
    lost = _lost(clips)
    sheets = [("kept", _sheet(kept, _KEPT))]
    sheets += [(reason, _sheet([c for c in clips if c["reason"] == reason], _REJECTED)) for reason in sorted(reasons)]
    return {
        "num_sources": len(sources),
        "num_clips": len(clips) - len(failed),
        "num_kept": len(kept),
        "num_failed": len(failed),
        "hours": sum(clip["seconds"] for clip in kept) / 3600,
        "source_hours": sum(clip.get("source_seconds") or 0.0 for clip in sources.values()) / 3600,
        "reasons": reasons.most_common(),
        "readers": sorted(readers.items()),
        "histograms": [h for h in (_histogram(name, clips, config) for name in _SHOWN) if h],
        "sheets": [(title, pictures) for title, pictures in sheets if pictures],
        "every": [_told(rows) for rows in itertools.islice(_by_source(clips).values(), _LISTED)],
        "lost": lost[:_LISTED],
        "num_lost": len(lost),
        "settings": {name: value for name, value in to_dict(config).items() if name not in _OPERATIONAL},
    }


def _lost(clips: Sequence[Row]) -> list[dict[str, str]]:
    """Of every source that has no clip among the kept: its name, what read it, and why."""
    lost = []
    for rows in _by_source(clips).values():
        if any(clip["kept"] for clip in rows):
            continue
        reasons = Counter(clip["reason"] for clip in rows)
        details = dict.fromkeys(clip["detail"] for clip in rows if clip["detail"])
        lost.append(
            {
                "source": rows[0]["source"],
                "decoder": rows[0].get("decoder") or "none",
                "reason": ", ".join(f"{count} {name}" if len(rows) > 1 else name for name, count in reasons.items()),
                "detail": next(iter(details), ""),
            }
        )
    return lost


def _by_source(clips: Sequence[Row]) -> dict[str, list[Row]]:
    of_source: dict[str, list[Row]] = {}
    for clip in clips:
        of_source.setdefault(clip["source_key"], []).append(clip)
    return of_source


def _told(rows: Sequence[Row]) -> dict[str, Any]:
    """A source in a line: what read it, what it is, and what became of its clips."""
    first = rows[0]
    return {
        "source": first["source"],
        "decoder": first.get("decoder") or "none",
        "codec": first.get("codec") or "",
        "kept": sum(clip["kept"] for clip in rows),
        "clips": sum(clip["place"][1] >= 0 for clip in rows),
    }


def _sheet(clips: Sequence[Row], most: int) -> list[dict[str, Any]]:
    """A sample of clips, always the same, each with its pictures and measures."""
    chosen = sorted(clips, key=lambda clip: hashlib.sha256(clip["key"].encode()).digest())
    pictures = []
    for clip in chosen:
        strip = read_data(clip["strip"][0], "strips", clip["strip"][1]) if clip.get("strip") else None
        if strip:
            values = [f"{name} {clip[name]:.3g}" for name in _SHOWN if clip.get(name) is not None]
            image = base64.b64encode(strip).decode()
            pictures.append({"clip": clip, "image": image, "measured": ", ".join(values)})
        if len(pictures) == most:
            break
    return pictures


def _histogram(name: str, clips: Sequence[Row], config: PrepareConfig) -> dict[str, Any] | None:
    """Bars of kept and rejected clips, as heights in percent of the highest; the outermost hold what lies beyond."""
    known = [(clip[name], clip["kept"]) for clip in clips if clip.get(name) is not None]
    if not known:
        return None
    values, kept = np.array([value for value, _ in known], np.float64), np.array([flag for _, flag in known])
    low, high = np.percentile(values, [0.5, 99.5])
    if high <= low:
        low, high = low - 0.5, high + 0.5
    within = np.clip(values, low, high)
    counts = [np.histogram(within[chosen], _BINS, (low, high))[0] for chosen in (kept, ~kept)]
    highest = max(1, int((counts[0] + counts[1]).max()))
    limits = getattr(config.filters, name, None)
    marks = [value for value in (limits.min, limits.max) if value is not None] if isinstance(limits, Limits) else []
    return {
        "name": name,
        "low": float(low),
        "high": float(high),
        "median": float(np.median(values)),
        "bars": [(100 * a / highest, 100 * b / highest, int(a), int(b)) for a, b in zip(*counts, strict=True)],
        "marks": [100 * (value - low) / (high - low) for value in marks if low <= value <= high],
    }
