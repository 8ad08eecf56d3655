"""All journals of a folder decide what is kept; the kept clips become shards with an index, a table and a report.

Shards are named after what is in them, so new ones lie beside old ones until the index, written last, names them: at
any moment the folder holds a whole data set, or says that it is unfinished.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from data_pipeline.cutting import is_unchanged
from data_pipeline.filters import duplicates, verdict
from data_pipeline.journal import Journal, Row, forget, locked, read_data, read_rows
from data_pipeline.making import clip_key, cut_missing, is_excluded, known, pool, read_exclusions, source_of
from data_pipeline.measures import MEASURES
from data_pipeline.prepare_config import PrepareConfig
from data_pipeline.progress import bar
from data_pipeline.report import write_report
from data_pipeline.shards import INDEX, PLAN, read_sample, scan_shard, write_index, write_shard
from data_pipeline.source import Source
from data_pipeline.tables import read_columns, utf8, write_table
from videodiff.errors import UserError

WORK_FOLDER = "work"
TABLE, REPORT = "clips.parquet", "report.html"
PASSED_OVER = "passed-over.json"  # in the folder of a part: what lay among the sources and is none

_KINDS = {
    "string": "key reason detail duplicate_of shard source source_key path caption captions licence origin decoder "
    "container codec pixel_format hash sha256",
    "bool": "kept audio damaged",
    "int64": "sample scene frames passed_over width height source_width source_height source_side rotation words bytes",
    "double": f"start seconds fps source_fps source_seconds aspect {' '.join(MEASURES)} clip_similarity aesthetic",
}
COLUMNS = {name: kind for kind, names in _KINDS.items() for name in names.split()}


def publish(out: Path, config: PrepareConfig, progress: bool = False) -> str:
    """Decide, cut what is newly accepted, and write shards, table and report. Returns what there is to say.

    Done again for the same, it changes nothing. One process at a time may do it, see `alone`. Raises UserError where a
    part is unfinished, nothing is kept, or a video is gone of which a clip is newly accepted.
    """
    folders = _folders(out)
    excluded = read_exclusions(config)
    while True:  # what fails to be cut may have been why something else was a duplicate
        clips = _gather(folders, config)
        _decide(clips, config, excluded)
        published = _published(out)
        kept = [clip for clip in clips if clip["kept"]]
        missing = {clip["place"] for clip in kept if not _available(clip, published)}
        if not missing:
            break
        _cut(out, folders, config, missing, progress)
        folders = _folders(out)
    counts = Counter(clip["reason"] for clip in clips if not clip["kept"])
    told = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
    if not kept and (out / INDEX).is_file():
        raise UserError(f"{out}: these filters keep none of {len(clips)} clips ({told}); nothing was changed")
    shards = _grouped(kept, config.shard_mb)
    digest = _digest(shards)
    names = _pack(out, shards, digest, published, progress)
    write_table(out / TABLE, COLUMNS, clips)
    passed = _passed_over(folders[0])
    write_report(out / REPORT, clips, passed, config)
    if not kept:
        raise UserError(f"{out}: none of {len(clips)} clips is kept ({told}); see {out / REPORT}, then data filter")
    said = {"source": "prepare", "clips": digest, "hours": sum(clip["seconds"] for clip in kept) / 3600}
    if not _is_index(out, digest):
        write_index(out, names, said)
    for old in (*out.glob("clips-*.tar"), *out.glob(".clips-*.tar"), out / PLAN):
        if old.name not in names:
            old.unlink(missing_ok=True)
    for folder in folders:
        forget(folder, "clips")
    jumping = len({clip["source_key"] for clip in clips if clip.get("passed_over")})
    damaged = len({clip["source_key"] for clip in clips if clip.get("damaged")})
    beside = ", ".join(f"{found['count']} {ending}" for ending, found in passed.items())
    return (
        f"{out}: kept {len(kept)} of {len(clips)} clips ({said['hours']:.3g} h) in {len(names)} shards"
        + (f"; rejected: {told}" if told else "")
        + (f"; {jumping} videos have frames whose times don't go on, which were left out" if jumping else "")
        + (f"; {damaged} videos are damaged further on, and were cut up to there" if damaged else "")
        + (f"; passed over, as neither video nor caption: {beside}" if beside else "")
    )


def alone(out: Path) -> AbstractContextManager[None]:
    """Nobody else publishes in the folder meanwhile: UserError where another process does."""
    return locked(out / WORK_FOLDER / "publish.lock")


# --- what there is ----------------------------------------------------------------------------------------------------


def _folders(out: Path) -> list[Path]:
    """The journals: of all parts, then of what was cut later. UserError where a part is unfinished or is of others."""
    work = out / WORK_FOLDER
    plans = {path.parent: json.loads(path.read_text(encoding="utf-8")) for path in sorted(work.glob("*/plan.json"))}
    if not plans:
        raise UserError(f"{out}: nothing was prepared here yet; run `videodiff data prepare SOURCE --out {out}`")
    if len({json.dumps(plan, sort_keys=True) for plan in plans.values()}) > 1:
        raise UserError(f"{out}: its parts were made of different sources or numbers of parts; prepare them again")
    parts = next(iter(plans.values()))["parts"]
    folders = [work / f"{number}-of-{parts}" for number in range(1, parts + 1)]
    for number, folder in enumerate(folders, 1):
        if not (folder / "done.json").is_file():
            raise UserError(f"{out}: part {number}/{parts} is not done; run `videodiff data prepare` for it again")
    return folders + sorted(work.glob("later-*"), key=lambda path: int(path.name.partition("-")[2]))


def _passed_over(folder: Path) -> dict[str, dict[str, Any]]:
    """Each part has seen all of it; what was begun by an older version has not counted it."""
    path = folder / PASSED_OVER
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def _gather(folders: list[Path], config: PrepareConfig) -> list[Row]:
    """A row for every clip, and for every source that gave none, in the order of the sources."""
    looks: dict[int, Row] = {}
    cuts: dict[tuple[int, int], Row] = {}
    for folder in folders:
        rows = list(read_rows(folder))
        _check_count(folder, len(rows))
        for row in rows:
            if "source" in row:  # a later one replaces an earlier one
                looks[row["source"]["number"]] = row
            else:
                cuts[row["clip"][0], row["clip"][1]] = {**row, "folder": folder}
    return [clip for _, row in sorted(looks.items()) for clip in _clips_of(row, cuts, config)]


def _check_count(folder: Path, rows: int) -> None:
    """UserError where rows are lost of a part that was done: what a failing machine or disk took is no verdict."""
    done = folder / "done.json"
    expected = json.loads(done.read_text(encoding="utf-8")).get("rows", rows) if done.is_file() else rows
    if rows != expected:
        part = folder.name.replace("-of-", "/")
        raise UserError(
            f"{folder}: {rows} rows where {expected} were written; run `videodiff data prepare` for part {part} again"
        )


def _clips_of(row: Row, cuts: dict[tuple[int, int], Row], config: PrepareConfig) -> Iterator[Row]:
    source, look = source_of(row), row.get("look")
    base: Row = {
        "source": source.name, "source_key": source.key, "path": source.path, "captions": json.dumps(source.captions),
        "caption": source.captions[0] if source.captions else None, "licence": _text(source.meta.get("licence")),
        "origin": _text(source.meta.get("origin")), "of": source,
    }  # fmt: skip
    if look is None:
        place = (source.number, -1)
        yield {**base, "place": place, "key": source.key, "reason": row["problem"], "detail": row["detail"]}
        return
    base |= {name: look[name] for name in ("decoder", "container", "codec", "pixel_format", "rotation", "audio")}
    base |= {"source_width": look["width"], "source_height": look["height"], "source_seconds": look["seconds"]}
    for index, clip in enumerate(look["clips"]):
        cut = cuts.get((source.number, index), {})
        yield {
            **base,
            **known(source, look, clip),
            **cut.get("measures", {}),
            "place": (source.number, index),
            "key": clip_key(source, index),
            "reason": clip["problem"] or cut.get("problem", ""),
            "detail": cut.get("detail", "") or look.get("damaged", ""),
            "passed_over": look.get("passed_over", 0),
            "damaged": bool(look.get("damaged")),
            "start": clip["start"],
            "scene": clip["scene"],
            "frames": config.clip.frames,
            "fps": config.clip.fps,
            "seconds": config.clip.frames / config.clip.fps,
            "sha256": cut.get("sha256"),
            "bytes": cut["clips"][1] if "clips" in cut else None,
            "stored": (cut["folder"], cut["clips"]) if "clips" in cut else None,
            "strip": (cut["folder"], cut["strips"]) if "strips" in cut else None,
        }


def _decide(clips: list[Row], config: PrepareConfig, excluded: set[str]) -> None:
    """Give each clip its reason, or keep it."""
    for clip in clips:
        source, index = clip["of"], clip["place"][1]
        if not clip["reason"] and is_excluded(source, index, excluded):
            clip["reason"] = "excluded"
        clip["reason"] = clip["reason"] or verdict(config.filters, clip)
    bits = config.filters.duplicate_bits
    hashes = [(clip["key"], clip["hash"]) for clip in clips if not clip["reason"] and clip.get("hash")]
    twins = duplicates(hashes, bits) if bits is not None else {}
    for clip in clips:
        if clip["key"] in twins:
            clip["reason"], clip["duplicate_of"] = "near-duplicate", twins[clip["key"]]
        clip["kept"] = not clip["reason"]


# --- the bytes of clips -----------------------------------------------------------------------------------------------


def _published(out: Path) -> dict[str, tuple[str, int]]:
    """Key -> (shard, number in it) of all that lies in shards already."""
    if not (out / TABLE).is_file():
        return {}
    rows = read_columns(out / TABLE, ("key", "shard", "sample"))
    present = {path.name for path in out.glob("clips-*.tar")}
    return {key: (shard, sample) for key, shard, sample in rows if shard in present}


def _available(clip: Row, published: dict[str, tuple[str, int]]) -> bool:
    if clip["sha256"] is None:
        return False
    return clip["key"] in published or (clip["stored"][0] / "clips.data").is_file()


def _cut(out: Path, folders: list[Path], config: PrepareConfig, missing: set[tuple[int, int]], progress: bool) -> None:
    """Cut clips that were accepted before they were ever encoded, or whose bytes were given up as rejected.

    Raises UserError before anything is noted where their videos are not there as they were: a verdict would be for
    good, and a disk that isn't mounted is none.
    """
    numbers = {number for number, _ in missing}
    rows = [row for folder in folders for row in read_rows(folder) if "source" in row]
    rows = [row for row in rows if row["source"]["number"] in numbers]
    if gone := [row["source"]["name"] for row in rows if not is_unchanged(source_of(row), row["look"]["state"])]:
        raise UserError(
            f"{out}: {len(gone)} videos are gone or changed of which these filters accept more clips "
            f"({', '.join(map(utf8, gone[:3]))}{', ...' if gone[3:] else ''}); bring them back, or filter otherwise; "
            "nothing was changed"
        )
    last = folders[-1] if folders[-1].name.startswith("later-") else None
    # A journal whose bytes were deleted is closed.
    number = 1 if last is None else int(last.name.partition("-")[2]) + (not (last / "clips.data").is_file())
    with (
        Journal(out / WORK_FOLDER / f"later-{number}") as journal,
        pool(config) as helpers,
        bar(progress, "videos", len(rows)) as advance,
    ):
        shown = ((row, advance(1))[0] for row in rows)
        cut_missing(helpers, journal, shown, config, set(), missing.__contains__)


def _bytes_of(out: Path, clip: Row, published: dict[str, tuple[str, int]], shards: dict[str, Any]) -> bytes:
    def is_whole(content: bytes | None) -> bool:
        return content is not None and hashlib.sha256(content).hexdigest() == clip["sha256"]

    content = None
    if clip["stored"] is not None:
        content = read_data(clip["stored"][0], "clips", clip["stored"][1])
    if not is_whole(content) and clip["key"] in published:  # forgotten bytes are zeros where others came after them
        name, number = published[clip["key"]]
        if name not in shards:
            shards.clear()
            shards[name] = scan_shard(out / name)
        content = read_sample(shards[name], number).video
    if content is None or not is_whole(content):
        raise UserError(f"{out}: the bytes of clip {clip['key']} are damaged; delete {out} and prepare it again")
    return content


# --- shards -----------------------------------------------------------------------------------------------------------


def _grouped(kept: list[Row], shard_mb: float) -> list[list[Row]]:
    """The clips of each shard."""
    shards: list[list[Row]] = []
    size = 0.0
    for clip in kept:
        mine = clip["bytes"] + len(_meta(clip)["captions"][0]) + 3072  # what tar adds: headers, and filling up
        if not shards or size + mine > shard_mb * 1e6:
            shards.append([])
            size = 0.0
        shards[-1].append(clip)
        size += mine
    return shards


def _pack(
    out: Path, shards: list[list[Row]], digest: str, published: dict[str, tuple[str, int]], progress: bool
) -> list[str]:
    """Write the shards that are not there yet, note in each clip where it lies, and return their names in order."""
    names = [f"clips-{digest[:8]}-{number:06d}.tar" for number in range(len(shards))]
    opened: dict[str, Any] = {}
    with bar(progress, "shards", len(shards)) as advance:
        for name, clips in zip(names, shards, strict=True):
            if not (out / name).exists():  # whole, since it was renamed into place
                samples = ((c["key"], _bytes_of(out, c, published, opened), _meta(c)) for c in clips)
                write_shard(out / name, samples)
            for number, clip in enumerate(clips):
                clip["shard"], clip["sample"] = name, number
            advance(1)
    return names


def _meta(clip: Row) -> Row:
    """What a sample's JSON says: all that came with the source, then what is known of the clip."""
    source: Source = clip["of"]
    said = {name: clip[name] for name in ("start", "fps", "frames", "width", "height", "seconds", "source_fps")}
    names = (*MEASURES, "hash", "clip_similarity", "aesthetic")
    measures = {name: clip[name] for name in names if clip.get(name) is not None}
    return {**source.meta, **said, "source": utf8(source.name), "captions": list(source.captions), "measures": measures}


def _digest(shards: list[list[Row]]) -> str:
    """A name for these clips in these shards: shards are named after it, and the same name is the same bytes."""
    digest = hashlib.sha256()
    for clips in shards:
        digest.update(f"{len(clips)}\n".encode())
        for clip in clips:
            digest.update(json.dumps([clip["key"], clip["sha256"], _meta(clip)], sort_keys=True).encode())
    return digest.hexdigest()


def _is_index(out: Path, digest: str) -> bool:
    try:
        return bool(json.loads((out / INDEX).read_text(encoding="utf-8")).get("clips") == digest)
    except (OSError, ValueError):
        return False


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)
