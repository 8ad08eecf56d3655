"""What raters sent back: the key of a study, and their answers held against it. What can't be used is left out by name.

The page draws a checksum over the answers, so a file that was changed or cut off after it was saved shows. It is no
secret: who wants to forge answers can.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stages.study import KEY_FORMAT, SIDES
from videodiff.errors import UserError

ANSWERS_FORMAT = 1


class Answer(NamedTuple):
    """To one trial: the side that was chosen, why, and after how long."""

    trial: int
    choice: str
    reasons: tuple[str, ...]
    milliseconds: int


@dataclass(frozen=True)
class Sheet:
    """All that one rater answered, trials in order from the first; fewer than the study has where they stopped."""

    file: str
    rater: int
    answers: tuple[Answer, ...]


class Vote(NamedTuple):
    """An answer with what the key says of it: which system it is for."""

    rater: int
    pair: int
    question: str
    system: str
    side: str
    reasons: tuple[str, ...]
    repeat: bool


def read_key(path: Path) -> dict[str, Any]:
    """The key of a study; UserError for any other file."""
    try:
        key = json.loads(path.read_text(encoding="utf-8"))
        fits = key["format"] == KEY_FORMAT and isinstance(key["study"], str) and bool(key["raters"])
        names, last = set(key["questions"]), len(key["pairs"]) - 1
        trials = [(t["pair"], t["question"], t["left"], t["repeat"]) for own in key["raters"] for t in own]
        fits = fits and all(0 <= t[0] <= last and t[1] in names and t[2] in ("A", "B") for t in trials)
        fits = fits and all(isinstance(row["prompt"], str) for row in key["pairs"])
        fits = fits and all("folder" in key["systems"][name] for name in "AB")
    except OSError as error:
        raise UserError(f"{path}: the key can't be read ({error.strerror}); check the path") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise UserError(
            f"{path}: not a key that this version's `videodiff study build` wrote; give the key.json of the study "
            "first, then the answers"
        )
    return dict(key)


def read_answers(key: Mapping[str, Any], files: Iterable[Path]) -> tuple[list[Sheet], list[tuple[str, str]]]:
    """The sheets by rater, and (file, why) of each that is left out.

    Of two files of a rater the longer one counts where it goes on from the other. UserError where they contradict, and
    where nothing is left.
    """
    sheets: dict[int, Sheet] = {}
    left_out = []
    for path in files:
        sheet = _read(key, path)
        if isinstance(sheet, str):
            left_out.append((str(path), sheet))
            continue
        if (other := sheets.get(sheet.rater)) is not None:
            short, long = sorted((other, sheet), key=lambda s: len(s.answers))
            if long.answers[: len(short.answers)] != short.answers:
                raise UserError(
                    f"{other.file} and {sheet.file}: both are of rater {sheet.rater} and contradict each other; ask "
                    "who of them had the number, and leave one file out"
                )
            left_out.append((short.file, f"all of it is in {long.file} too"))
            sheet = long
        sheets[sheet.rater] = sheet
    if not sheets:
        why = "; ".join(f"{file}: {reason}" for file, reason in left_out)
        raise UserError(f"no answers to this study ({why or 'no file was given'}); give the raters' answers-*.json")
    return [sheets[rater] for rater in sorted(sheets)], left_out


def votes(key: Mapping[str, Any], sheets: Iterable[Sheet]) -> list[Vote]:
    """Every answer as a vote for A or B."""
    found = []
    for sheet in sheets:
        for answer in sheet.answers:
            trial = key["raters"][sheet.rater - 1][answer.trial]
            system = trial["left"] if answer.choice == "left" else "AB"[trial["left"] == "A"]
            where = sheet.rater, trial["pair"], trial["question"]
            found.append(Vote(*where, system, answer.choice, answer.reasons, trial["repeat"]))
    return found


def checksum(study: str, rater: int, answers: Sequence[Answer]) -> str:
    """FNV-1a of 32 bits over the answers as compact JSON, as the page computes it."""
    rows = [[a.trial, a.choice, list(a.reasons), a.milliseconds] for a in answers]
    value = 0x811C9DC5
    for byte in json.dumps([study, rater, rows], separators=(",", ":")).encode():
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return f"{value:08x}"


def _read(key: Mapping[str, Any], path: Path) -> Sheet | str:
    """A file's sheet, or why there is none."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        study, rater, given, written = told["study"], told["rater"], told["answers"], told["checksum"]
        answers = tuple(Answer(a["trial"], a["choice"], tuple(a["reasons"]), a["milliseconds"]) for a in given)
        form = told["format"]
    except OSError as error:
        raise UserError(f"{path}: the answers can't be read ({error.strerror}); check the path") from None
    except (ValueError, KeyError, TypeError):
        return "not a file of answers, or cut off"
    if form != ANSWERS_FORMAT:
        return f"format {form!r}, this program reads {ANSWERS_FORMAT}"
    if study != key["study"]:
        return "answers to another study"
    if type(rater) is not int or not 1 <= rater <= len(key["raters"]):
        return f"of rater {str(rater)[:20]}, the study has 1 to {len(key['raters'])}"
    trials = key["raters"][rater - 1]
    if written != checksum(study, rater, answers) or not _possible(key, trials, answers):
        return "changed after it was saved"
    return Sheet(str(path), rater, answers) if answers else "holds no answer"


def _possible(key: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], answers: Sequence[Answer]) -> bool:
    """Whether the page can have written this: trials in order, a side, reasons of the question."""
    if [answer.trial for answer in answers] != list(range(len(answers))) or len(answers) > len(trials):
        return False
    return all(
        answer.choice in SIDES
        and answer.reasons
        and len(set(answer.reasons)) == len(answer.reasons)
        and set(answer.reasons) <= set(key["questions"][trial["question"]])
        and type(answer.milliseconds) is int
        for answer, trial in zip(answers, trials, strict=False)
    )
