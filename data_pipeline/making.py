"""Sources are looked at and their clips cut, by helper processes; each result goes into a journal at once.

The journal has two kinds of rows: a source's says what the video is and which clips lie in it, a clip's what was
measured. A ``problem`` in either is a verdict for good, deadlines among them, unless that is asked to be tried again.
What the filters say is not noted: it is decided anew whenever clips are published, and here only saves the encoding of
what they reject.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipeline.cutting import WORK, Cut
from data_pipeline.decoders import ClipError
from data_pipeline.decoding import DecodePool
from data_pipeline.filters import verdict
from data_pipeline.journal import Journal, Row, read_rows
from data_pipeline.prepare_config import PrepareConfig, ScoresConfig
from data_pipeline.progress import bar
from data_pipeline.source import Source
from videodiff.errors import UserError

Place = tuple[int, int]  # number of a source, and of a clip in it


def make(
    journal: Journal, sources: list[Source], config: PrepareConfig, progress: bool, retry: Sequence[str] = ()
) -> None:
    """Look at every source and cut every clip of which the journal has nothing yet, or a problem among ``retry``."""
    looked: dict[int, Row] = {}
    done: set[Place] = set()
    for row in read_rows(journal.folder):  # a later row replaces an earlier one
        if "source" in row:
            looked[row["source"]["number"]] = row
        else:
            place = (row["clip"][0], row["clip"][1])
            (done.discard if row.get("problem") in retry else done.add)(place)
    looked = {number: row for number, row in looked.items() if row["problem"] not in retry}
    excluded = read_exclusions(config)
    if config.scores is not None:
        _scorer(config.scores)  # weights that are missing are told before anything else
    rest = iter(sources)
    # Sources that are looked at before their clips are cut: several for each helper, or some would wait at every end.
    size = max(64, 8 * _workers(config))
    with pool(config) as helpers, bar(progress, "videos", len(sources)) as advance:
        while window := list(itertools.islice(rest, size)):
            new = [source for source in window if source.number not in looked]
            results = helpers.map(_looks(new, config), config.video_seconds)
            for source, result in zip(new, results, strict=True):
                looked[source.number] = journal.append(_source_row(source, result))
            rows = [looked.pop(source.number) for source in window]
            cut_missing(helpers, journal, rows, config, excluded, lambda place: place not in done)
            advance(len(window))


def pool(config: PrepareConfig) -> DecodePool:
    """The helper processes."""
    return DecodePool(_workers(config), config.clip_seconds, WORK)


def _workers(config: PrepareConfig) -> int:
    """One for each core that this process may use, which are a job's where the machine has more."""
    if config.workers is not None:
        return config.workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cut_missing(
    helpers: DecodePool,
    journal: Journal,
    rows: Iterable[Row],
    config: PrepareConfig,
    excluded: set[str],
    missing: Callable[[Place], bool],
) -> None:
    """Cut the ``missing`` clips of sources' rows into the journal; what is rejected already is noted undecoded."""
    waiting: list[tuple[Place, Source]] = []
    score = None if config.scores is None else _scorer(config.scores)

    def jobs() -> Iterator[dict[str, Any] | None]:
        for row in rows:
            source = source_of(row)
            for index, clip in enumerate(row["look"]["clips"] if "look" in row else ()):
                if not missing((source.number, index)):
                    continue
                said = known(source, row["look"], clip)
                rejected = clip["problem"] or is_excluded(source, index, excluded) or verdict(config.filters, said)
                waiting.append(((source.number, index), source))
                yield None if rejected else _cut_job(source, row["look"], clip, said, config)

    for number, result in enumerate(helpers.map(jobs())):
        place, source = waiting[number]
        row, data = _clip_row(place, result)
        if score is not None and isinstance(result, Cut) and result.first is not None:
            row["measures"] |= score(result.first, source.captions)
        journal.append(row, **data)


@lru_cache(maxsize=1)
def _scorer(config: ScoresConfig) -> Callable[[Any, Sequence[str]], dict[str, float]]:
    """What gives first frames their scores, in this process: torch and weights are loaded where they are asked for."""
    from videodiff.networks.clip_score import ClipScorer

    return ClipScorer(config.name, config.path, config.aesthetic, config.device)


def _looks(sources: Iterable[Source], config: PrepareConfig) -> Iterator[dict[str, Any] | None]:
    for source in sources:
        job = {"task": "look", "source": source, "scenes": config.scenes, "clip": config.clip}
        yield None if source.problem else job


def _cut_job(source: Source, look: Row, clip: Row, said: Row, config: PrepareConfig) -> dict[str, Any]:
    return {
        "task": "cut", "source": source, "decoder": look["decoder"], "state": look["state"], "start": clip["start"],
        "said": said, "clip": config.clip, "filters": config.filters, "strip_size": config.strip,
        "first_frame": config.scores is not None,
    }  # fmt: skip


def _source_row(source: Source, result: Any) -> Row:
    row: Row = {"source": asdict(source), "problem": source.problem, "detail": source.detail}
    if isinstance(result, ClipError):
        row |= {"problem": result.reason, "detail": result.detail}
    elif result is not None:
        row["look"] = result
    return row


def _clip_row(place: Place, result: Cut | ClipError | None) -> tuple[Row, dict[str, bytes]]:
    """A clip's row, and the bytes that go with it."""
    row: Row = {"clip": list(place)}
    if isinstance(result, ClipError):
        return {**row, "problem": result.reason, "detail": result.detail}, {}
    if result is None:
        return row, {}
    row["measures"] = result.measures
    if result.video:
        row["sha256"] = hashlib.sha256(result.video).hexdigest()
    return row, {"clips": result.video, "strips": result.strip}


# --- what is known without decoding -----------------------------------------------------------------------------------


def source_of(row: Row) -> Source:
    """The source of a row of the journal."""
    said = row["source"]
    extent = tuple(said["extent"]) if said["extent"] else None
    return Source(**{**said, "captions": tuple(said["captions"]), "extent": extent})


def clip_key(source: Source, index: int) -> str:
    """The key of a clip, in shards and tables."""
    return f"{source.key}-{index:04d}"


def known(source: Source, look: Row, clip: Row) -> Row:
    """What filters may ask of a clip that was not decoded."""
    return {
        "source_fps": clip["source_fps"],
        "source_side": min(look["width"], look["height"]),
        "source_seconds": look["seconds"],
        "aspect": look["width"] / look["height"],
        "words": max((len(caption.split()) for caption in source.captions), default=0),
    }


def read_exclusions(config: PrepareConfig) -> set[str]:
    """The lines of the exclude list."""
    if config.exclude is None:
        return set()
    try:
        lines = Path(config.exclude).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"exclude={config.exclude}: cannot be read ({error.strerror}); check the path") from None
    return {line.strip() for line in lines if line.strip()}


def is_excluded(source: Source, index: int, excluded: set[str]) -> bool:
    """Whether the list has the clip's key, its source's, or its source's name."""
    return not excluded.isdisjoint((clip_key(source, index), source.key, source.name))
