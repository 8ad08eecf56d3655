"""Arbitrary videos become shards that train, with a verdict on every clip: `videodiff data prepare | merge | filter`.

Two halves. Making (data_pipeline/making.py): every source is looked at and its clips are cut into a journal; a part of
the sources has a journal of its own, so that the jobs of an array share one folder. Publishing (data_pipeline/
publish.py): all journals together decide what is kept, near-duplicates among it, and the kept clips become shards. So
merging parts is publishing, and so is filtering by other limits: what is newly accepted is cut then, all else is only
decided anew.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.journal import Journal, read_rows
from data_pipeline.making import make
from data_pipeline.prepare_config import CONFIG, PrepareConfig, load_config
from data_pipeline.publish import PASSED_OVER, WORK_FOLDER, alone, publish
from data_pipeline.shards import PLAN
from data_pipeline.source import PassedOver, Source
from data_pipeline.sources import find_sources, fingerprint
from videodiff import config as configs
from videodiff.errors import UserError
from videodiff.video_io import atomic_path, write_json

LISTED, MARK = "sources.marks", 16  # in the folder of a part: so many bytes of each source's fingerprint, in order


def prepare(
    location: str,
    out: Path,
    config: PrepareConfig,
    part: tuple[int, int] = (1, 1),
    progress: bool = False,
    retry: Sequence[str] = (),
) -> str:
    """Turn the videos at ``location`` into shards in ``out``, or do part i of n of it, which `merge` then completes.

    The same arguments go on where a killed run stopped, and end with the same bytes; ``retry`` names problems
    ("deadline", "crash", "unreadable", ...) whose videos and clips are tried again. Returns what there is to say.
    Raises UserError where ``out`` holds something else or can't be written, and where nothing can be read.
    """
    number, parts = part
    if not 1 <= number <= parts:
        raise UserError(f"--part {number}/{parts}: i/n is part i of n, from 1/{parts} to {parts}/{parts}")
    _claim(out, config)
    for known in _plans(out):
        if known["parts"] != parts:
            raise UserError(
                f"{out}: was begun in {known['parts']} parts, not in {parts}; go on with --part "
                f"i/{known['parts']}, or choose another folder"
            )
    folder = out / WORK_FOLDER / f"{number}-of-{parts}"
    with Journal(folder) as journal:
        mine, later = _planned(location, folder, config, part)
        make(journal, mine, config, progress, retry)
        journal.sync()
    write_json(folder / "done.json", {"sources": len(mine), "rows": sum(1 for _ in read_rows(folder))})
    came = f"; {later} sources came after the work was begun and are left out" if later else ""
    if parts > 1:
        return f"part {number}/{parts} is done{came}; when all are, run: videodiff data merge {out}"
    with alone(out):
        return publish(out, config, progress) + came


def parse_part(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found:
        raise UserError(f"--part {text}: i/n is part i of n, such as 1/8")
    return int(found[1]), int(found[2])


def merge(out: Path, progress: bool = False) -> str:
    """Publish what all parts have made. Raises UserError where a part is missing or was made of other sources."""
    config = load_config(out)
    with alone(out):
        return publish(out, config, progress)


def refilter(out: Path, overrides: Sequence[str], progress: bool = False) -> str:
    """Publish again with other ``filters``, ``exclude`` or ``shard_mb``. Raises UserError for any other change."""
    old = load_config(out)
    new = configs.load(PrepareConfig, out / CONFIG, overrides)
    free = ("filters", "exclude", "shard_mb")
    for difference in configs.differences(old, new):
        if not difference.operational and difference.path.split(".")[0] not in free:
            raise UserError(f"{difference}: only {', '.join(free)} can change here; prepare again into another folder")
    with alone(out):
        said = publish(out, new, progress)
        configs.save(new, out / CONFIG)
    return said


def _claim(out: Path, config: PrepareConfig) -> None:
    """Make the folder, or see that it is the one of this configuration."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        there = sorted(path.name for path in out.iterdir() if path.name[0] != ".")  # another part may be writing
        if CONFIG in there:
            _same(out, config)
            return
        if there:
            raise UserError(f"{out}: holds other files ({there[0]}); choose an empty folder")
        write_json(out / PLAN, {"source": "prepare"})  # shards without their index are refused meanwhile
        configs.save(config, out / CONFIG)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); check folder, rights and disk space") from None


def _same(out: Path, config: PrepareConfig) -> None:
    changed = [difference for difference in configs.differences(load_config(out), config) if not difference.operational]
    if changed:
        told = "; ".join(map(str, changed))
        raise UserError(
            f"{out}: was begun with other settings ({told}); see `videodiff data filter`, or choose another"
        )


def _planned(location: str, folder: Path, config: PrepareConfig, part: tuple[int, int]) -> tuple[list[Source], int]:
    """The sources of this part, and how many are there that came after the work was begun: those are left out. All are
    listed, so that each part knows that they are the same ones."""
    number, parts = part
    digest, mine, seen = hashlib.sha256(), [], bytearray()
    passed = PassedOver()
    out = folder.parent.parent
    planned, later = _listed(out), 0
    for source in find_sources(config.sources, location, passed):
        mark = fingerprint(replace(source, number=0))[:MARK]
        if planned is not None and mark not in planned:
            later += 1
            continue
        source = source if planned is None else replace(source, number=planned[mark])
        seen += mark
        digest.update(fingerprint(source))
        if source.number % parts == number - 1:
            mine.append(source)
    total = len(seen) // MARK
    plan = {"sources": total, "fingerprint": digest.hexdigest(), "parts": parts}
    for known in _plans(out):  # of any part: none may begin what merge would refuse
        if known != plan:
            raise UserError(
                f"{location}: not what it was when {out} was begun ({known['sources']} sources then, {total} of them "
                "now, or other captions); undo the change or choose another folder"
            )
    if not (folder / "plan.json").is_file():
        write_json(folder / PASSED_OVER, passed.endings)
        with atomic_path(folder / LISTED) as temporary:
            temporary.write_bytes(seen)
        write_json(folder / "plan.json", plan)
    return mine, later


def _listed(out: Path) -> dict[bytes, int] | None:
    """Mark of a source -> its number, as they were listed when the work was begun; None where it was not yet, or by an
    older version."""
    for path in sorted((out / WORK_FOLDER).glob(f"*/{LISTED}")):
        marks = path.read_bytes()
        return {marks[place : place + MARK]: number for number, place in enumerate(range(0, len(marks), MARK))}
    return None


def _plans(out: Path) -> list[dict[str, Any]]:
    """What the parts that were begun are parts of."""
    paths = sorted((out / WORK_FOLDER).glob("*/plan.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]
