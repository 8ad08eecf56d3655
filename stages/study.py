"""`videodiff study build`: two folders of videos become a page for raters and a key that stays with the researcher.

The protocol is JUICE (Girdhar et al. 2023, Emu Video): two videos, one question, and a choice that must be justified
by at least one of the question's reasons. Raters take a number. Who sees what on which side is drawn here and stands in
the page and in the key, so that both agree for sure; raters 1 and 2, 3 and 4, ... see every pair mirrored, so that over
them no system has the better side. The page only knows a first and a second clip of a pair: whose they are was decided
by a coin that follows from the key's seed.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.progress import bar
from data_pipeline.world import rng
from stages.study_videos import Folder, Video, match, read_folder, read_pair
from videodiff.errors import UserError
from videodiff.video_io import atomic_path, encode_video, write_json

KEY_FORMAT = 1
KEY, PAGE, FOLDER = "key.json", "study.html", "study"
TEMPLATE = Path(__file__).parent / "study_page.html"
SIDES = ("left", "right")
_MARK = "/* the study, as JSON */"
_NAMED = 5  # files of a kind that are named on the screen; the key has all
_REPEATED = 0.1  # share of the pairs that come twice, and at least two of them

# Asked in this order: whoever judges the look has not read the text yet.
QUESTIONS: dict[str, dict[str, Any]] = {
    "quality": {
        "text": "Which video has the better quality?",
        "hint": "Judge how it looks and moves, not what it shows.",
        "reasons": {
            "pixel sharpness": "the picture is sharper",
            "motion smoothness": "it moves more smoothly",
            "recognizable objects or scenes": "it is easier to tell what it is",
            "frame consistency": "things keep their look from frame to frame",
            "amount of motion": "it moves more, or more fittingly",
        },
    },
    "faithfulness": {
        "text": "Which video follows the text better?",
        "hint": "Judge only how well it fits the text, not how good it looks.",
        "reasons": {
            "spatial text alignment": "what is there, and where, fits the text",
            "temporal text alignment": "what happens, and when, fits the text",
        },
    },
}


class Trial(NamedTuple):
    """What a rater answers: a question on a pair, with its second clip on the left where `flipped`."""

    pair: int
    question: str
    flipped: bool
    repeat: bool


@dataclass(frozen=True)
class Built:
    """What was made: the files, how many pairs and trials of each rater, what is to be said about them."""

    page: Path
    key: Path
    pairs: int
    trials: int
    remarks: list[str]


def build(
    first: Path,
    second: Path,
    out: Path,
    *,
    questions: Sequence[str] = tuple(QUESTIONS),
    num_pairs: int | None = None,
    seed: int | None = None,
    raters: int = 5,
    repeats: bool = False,
    as_made: bool = False,
    page_mb: float = 100.0,
    progress: bool = False,
) -> Built:
    """Write the page (study.html, or study/ where that would exceed page_mb) and then key.json into `out`.

    seed decides all that is drawn; without one it is drawn anew, since raters could guess one. num_pairs: as many,
    drawn from all. as_made keeps differences of size, rate and length within a pair. UserError for folders that don't
    match, and an `out` that holds a study already: its answers could not be read any more.
    """
    if (out / KEY).exists():
        raise UserError(f"{out}: holds a study already, whose answers need its {KEY}; name another folder with --out")
    folders = read_folder(first), read_folder(second)
    matched = match(*folders, (str(first), str(second)))
    if num_pairs is not None and num_pairs > len(matched):
        raise UserError(f"--num-pairs {num_pairs}: only {len(matched)} videos of {first} have a partner in {second}")
    seed = secrets.randbits(63) if seed is None else seed
    if num_pairs is not None:
        matched = [matched[n] for n in sorted(rng("study pairs", seed).permutation(len(matched))[:num_pairs])]
    kept, clips, differ, same = _clips(matched, as_made, progress)
    if repeats and len(kept) < 2:
        raise UserError(f"--repeats: a pair comes again after others, and there is only {len(kept)}; leave it out")
    # Which system's clip the page calls first, and where a clip lies among all: both only follow from the seed.
    coins = rng("study coins", seed).integers(2, size=len(kept)).tolist()
    places = rng("study places", seed).permutation(2 * len(kept)).tolist()
    pairs = [{"A": places[2 * n], "B": places[2 * n + 1]} for n in range(len(kept))]
    trials = assign(len(kept), questions, raters, repeats, seed)
    told = {
        "questions": {name: QUESTIONS[name] for name in questions},
        "pairs": [
            {"prompt": video.prompt if "faithfulness" in questions else "", "clips": _by_coin(pair, coin)}
            for (video, _), pair, coin in zip(kept, pairs, coins, strict=True)
        ],
        "raters": [[[t.pair, t.question, int(t.flipped)] for t in own] for own in trials],
    }
    placed = dict(zip(places, clips, strict=True))
    page, study = _write_page(out, told, [placed[n] for n in range(len(clips))], page_mb)
    systems = ([videos[side] for videos in kept] for side in (0, 1))
    key = {
        "format": KEY_FORMAT,
        "study": study,
        "seed": seed,
        "systems": {name: _system(path, v) for name, path, v in zip("AB", (first, second), systems, strict=True)},
        "questions": {name: list(QUESTIONS[name]["reasons"]) for name in questions},
        "pairs": [_row(videos, coin) for videos, coin in zip(kept, coins, strict=True)],
        "raters": [[_told(trial, coins) for trial in own] for own in trials],
        "as_made": as_made,
        "left_out": {name: f.left_out for name, f in zip("AB", folders, strict=True)} | {"same": same},
    }
    write_json(out / KEY, key)
    return Built(page, out / KEY, len(kept), len(trials[0]), _remarks(folders, (first, second), same, differ, as_made))


def assign(num_pairs: int, questions: Sequence[str], raters: int, repeats: bool, seed: int) -> list[list[Trial]]:
    """Every rater's trials in order: questions one after the other, pairs shuffled, sides balanced and then mirrored.

    Repeated pairs come from the first quarter, with sides exchanged, amid the second half of the same question.
    """
    found = []
    for rater in range(raters):
        own: list[Trial] = []
        for question in questions:
            # By number, not by order, so that the next rater sees just these pairs mirrored.
            sides = rng("study sides", seed, question, rater // 2).permutation(num_pairs) % 2
            flips = [bool(side) != bool(rater % 2) for side in sides]
            draw = rng("study order", seed, question, rater)
            block = [Trial(n, question, flips[n], False) for n in draw.permutation(num_pairs).tolist()]
            if repeats:
                count = min(num_pairs // 2, max(2, round(_REPEATED * num_pairs)))
                early = block[: max(count, num_pairs // 4)]
                again = [early[n]._replace(repeat=True) for n in draw.permutation(len(early))[:count].tolist()]
                late = block[num_pairs // 2 :] + [trial._replace(flipped=not trial.flipped) for trial in again]
                block = block[: num_pairs // 2] + [late[n] for n in draw.permutation(len(late)).tolist()]
            own += block
        found.append(own)
    return found


def describe(names: Mapping[str, Sequence[str]], where: str) -> list[str]:
    """A line for each reason: how many, the first few by name."""
    lines = []
    for why, files in names.items():
        more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
        lines.append(f"{where}: {len(files)} left out, {why}: {', '.join(files[:_NAMED])}{more}")
    return lines


def _clips(
    matched: Sequence[tuple[Video, Video]], as_made: bool, progress: bool
) -> tuple[list[tuple[Video, Video]], list[bytes], int, list[str]]:
    """The pairs that can be compared, their clips in turns (A, B, A, ...), how many differed, which were the same.

    All are encoded anew: the comment in a video of `videodiff generate` names the model that made it.
    """
    kept, clips, differ, same = [], [], 0, []
    with bar(progress, "pairs", len(matched)) as advance:
        for videos in matched:
            one, other, differed = read_pair(videos[0].path, videos[1].path, as_made)
            if one.frames.shape == other.frames.shape and (one.frames == other.frames).all():
                same.append(videos[0].path.name)
            else:
                kept.append(videos)
                clips += [encode_video(clip.frames, clip.fps) for clip in (one, other)]
                differ += differed
            advance(1)
    if not kept:
        folders = " and ".join(str(video.path.parent) for video in matched[0])
        raise UserError(f"{folders}: each pair shows the same frames twice; there is nothing to choose between")
    return kept, clips, differ, same


def _write_page(out: Path, told: dict[str, Any], clips: Sequence[bytes], page_mb: float) -> tuple[Path, str]:
    """One file while it is small enough, or a folder of the page and numbered videos; and the study's name."""
    digest = hashlib.sha256(json.dumps(told).encode())
    for clip in clips:
        digest.update(hashlib.sha256(clip).digest())
    study = digest.hexdigest()[:16]
    before, mark, after = TEMPLATE.read_text(encoding="utf-8").partition(_MARK)
    assert mark, TEMPLATE
    single = sum(4 * -(-len(clip) // 3) for clip in clips) <= page_mb * 1e6
    page = out / PAGE if single else out / FOLDER / PAGE
    sources = [f"{number:04d}.mp4" for number in range(len(clips))]
    if single:
        sources = [base64.b64encode(clip).decode() for clip in clips]
    else:
        for name, clip in zip(sources, clips, strict=True):
            with atomic_path(page.parent / name) as temporary:
                temporary.write_bytes(clip)
    text = json.dumps({"study": study, **told, "inside": single, "clips": sources})
    with atomic_path(page) as temporary:  # a prompt must not end the element that holds it
        temporary.write_text(before + text.replace("<", "\\u003c") + after, encoding="utf-8")
    return page, study


def _by_coin(pair: Mapping[str, int], coin: int) -> list[int]:
    return [pair["B"], pair["A"]] if coin else [pair["A"], pair["B"]]


def _system(folder: Path, videos: Sequence[Video]) -> dict[str, Any]:
    return {"folder": str(folder), "models": sorted({video.model for video in videos} - {""})}


def _row(videos: tuple[Video, Video], coin: int) -> dict[str, Any]:
    prompt, seed, sample = videos[0].key
    files = {name: video.path.name for name, video in zip("AB", videos, strict=True)}
    return {"prompt": prompt, "seed": seed, "sample": sample, **files, "first": "AB"[coin]}


def _told(trial: Trial, coins: Sequence[int]) -> dict[str, Any]:
    left = "AB"[coins[trial.pair] ^ trial.flipped]
    return {"pair": trial.pair, "question": trial.question, "left": left, "repeat": trial.repeat}


def _remarks(
    folders: tuple[Folder, Folder], paths: tuple[Path, Path], same: list[str], differ: int, as_made: bool
) -> list[str]:
    lines = [line for f, path in zip(folders, paths, strict=True) for line in describe(f.left_out, str(path))]
    if same:
        lines += describe({"the same frames in both": same}, "pairs")
    if differ and as_made:
        lines.append(f"pairs that differ in size, rate or length: {differ}; raters may tell the systems apart by that")
    elif differ:
        lines.append(f"pairs that differed in size, rate or length: {differ}; both are shown with the smaller of each")
    return lines
