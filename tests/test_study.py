"""`videodiff study`: what the page and the key hold, who sees what, and scores against numbers worked out by hand."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from stages import cli_study
from stages.study import QUESTIONS, assign, build
from stages.study_answers import Answer, checksum, read_answers, read_key
from stages.study_score import score
from stages.study_videos import Clip, alike, read_folder
from videodiff.errors import UserError
from videodiff.metrics.scores import fleiss_kappa
from videodiff.video_io import read_metadata, read_video, write_json, write_video

SYSTEM = typer.Typer()
SYSTEM.command("build")(cli_study.build)
SYSTEM.command("score")(cli_study.score)


def write_videos(folder: Path, count: int, noise: int = 0, size: int = 32, fps: float = 8, samples: int = 1) -> Path:
    """A square that moves over grey, with grain that tells the systems apart; 8 frames, side-cars as generate's."""
    for number in range(count):
        for sample in range(samples):
            frames = np.full((8, size, size, 3), 128, np.uint8)
            for t in range(8):
                frames[t, 10 + sample : 20, 2 + 2 * t : 12 + 2 * t] = 40 * (number % 7)
            grain = np.random.default_rng(number).normal(0, noise, frames.shape)
            frames = np.clip(frames + grain, 0, 255).astype(np.uint8)
            path = folder / f"{number:04d}-{sample}.mp4"
            write_video(path, frames, fps, metadata='{"model": "runs/secret"}')
            write_sidecar(path, f"square </script><b>{number}</b>", sample)
    return folder


def write_sidecar(video: Path, prompt: str, sample: int = 0, seed: int = 0) -> None:
    told = {"options": {"prompt": prompt, "seed": seed, "model": "runs/secret"}, "sample": sample}
    write_json(video.with_suffix(".json"), {**told, "model": {"name": "runs/secret", "sha256": "ab" * 32}})


def study_in(page: Path) -> dict[str, Any]:
    """What the page holds."""
    text = page.read_text(encoding="utf-8")
    return dict(json.loads(text.partition('id="study">')[2].partition("</script>")[0]))


Choose = Callable[[int, dict[str, Any]], tuple[str, Sequence[str]]]  # rater, trial of the key -> system, reasons


def answer(key: dict[str, Any], rater: int, path: Path, choose: Choose, count: int | None = None) -> Path:
    """The file that the page would save for these choices."""
    answers = []
    for number, trial in enumerate(key["raters"][rater - 1][:count]):
        system, reasons = choose(rater, trial)
        answers.append(Answer(number, "left" if system == trial["left"] else "right", tuple(reasons), 2000))
    told = {"format": 1, "study": key["study"], "rater": rater, "answers": [a._asdict() for a in answers]}
    write_json(path, {**told, "checksum": checksum(key["study"], rater, answers)})
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Five prompts of two systems."""
    root = tmp_path_factory.mktemp("videos")
    return write_videos(root / "plainsystem", 5), write_videos(root / "grainysystem", 5, noise=25)


def always_sharp(rater: int, trial: dict[str, Any]) -> tuple[str, list[str]]:
    return "A", [next(iter(QUESTIONS[trial["question"]]["reasons"]))]


# --- build ------------------------------------------------------------------------------------------------------------


def test_the_page_holds_clips_and_no_word_of_where_they_are_from(folders: tuple[Path, Path], tmp_path: Path) -> None:
    built = build(*folders, tmp_path / "out", num_pairs=3, seed=5)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["key.json", "study.html"]
    text = built.page.read_text(encoding="utf-8")
    told, key = study_in(built.page), read_key(built.key)
    for secret in ("runs/secret", "abab", "plainsystem", "grainysystem", "0001-0", "<b>1", "http:", "https:"):
        assert secret not in text, secret
    first = Counter()
    for pair, row in zip(told["pairs"], key["pairs"], strict=True):
        assert pair["prompt"] == row["prompt"]
        first[row["first"]] += 1
        for number, system in zip(pair["clips"], (row["first"], "AB"[row["first"] == "A"]), strict=True):
            path = tmp_path / f"{number}.mp4"
            path.write_bytes(base64.b64decode(told["clips"][number]))
            assert read_metadata(path) is None
            frames, fps = read_video(path)
            made, _ = read_video(folders[system == "B"] / row[system])
            assert fps == 8
            assert np.abs(frames.astype(int) - made).mean() < 5
    assert len(first) == 2  # neither system always comes first
    for own, shown in zip(key["raters"], told["raters"], strict=True):
        for trial, (pair, question, flipped) in zip(own, shown, strict=True):
            assert (trial["pair"], trial["question"]) == (pair, question)
            assert (trial["left"] == key["pairs"][pair]["first"]) == (not flipped)


def test_all_follows_from_the_seed_and_without_one_nothing_can_be_guessed(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    seeds = (5, 5, 6, None, None)
    built = [build(*folders, tmp_path / str(n), num_pairs=2, seed=seed, raters=2) for n, seed in enumerate(seeds)]
    texts = [(b.page.read_bytes(), b.key.read_bytes()) for b in built]
    assert texts[0] == texts[1]
    assert len({page for page, _ in texts}) == 4


def test_a_page_that_grows_too_large_becomes_a_folder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    done = CliRunner().invoke(
        SYSTEM, ["build", *map(str, folders), "-o", str(tmp_path), "--num-pairs", "2", "--page-mb", "0.01"]
    )
    assert done.exit_code == 0, done.output
    assert "study, a folder that must stay together" in done.output.replace("\n", "")
    assert sorted(p.name for p in (tmp_path / "study").iterdir()) == [
        *(f"{n:04d}.mp4" for n in range(4)),
        "study.html",
    ]
    told = study_in(tmp_path / "study" / "study.html")
    assert told["clips"] == [f"{n:04d}.mp4" for n in range(4)]
    assert (tmp_path / "key.json").is_file()


def test_options_change_what_is_asked(folders: tuple[Path, Path], tmp_path: Path) -> None:
    given = ["--question", "quality", "--num-pairs", "4", "--seed", "3", "--raters", "3", "--repeats"]
    done = CliRunner().invoke(SYSTEM, ["build", *map(str, folders), "-o", str(tmp_path), *given])
    assert done.exit_code == 0, done.output
    key, told = read_key(tmp_path / "key.json"), study_in(tmp_path / "study.html")
    assert list(key["questions"]) == ["quality"]
    assert len(key["pairs"]) == 4
    assert [len(own) for own in key["raters"]] == [6] * 3
    assert {pair["prompt"] for pair in told["pairs"]} == {""}  # what is not asked about is not told


def test_raters_see_every_pair_once_on_balanced_and_mirrored_sides() -> None:
    for own, other in zip(*(iter(assign(9, list(QUESTIONS), 6, False, 1)),) * 2, strict=True):
        assert [trial.question for trial in own] == ["quality"] * 9 + ["faithfulness"] * 9
        for block in (own[:9], own[9:]):
            assert sorted(trial.pair for trial in block) == list(range(9))
            assert sum(trial.flipped for trial in block) in (4, 5)
        mirrored = {(t.pair, t.question): not t.flipped for t in other}
        assert {(t.pair, t.question): t.flipped for t in own} == mirrored
        assert [t.pair for t in own] != [t.pair for t in other]


def test_repeats_come_late_with_sides_exchanged() -> None:
    for own in assign(40, ["quality"], 4, True, 2):
        assert len(own) == 44
        for place, trial in enumerate(own):
            if trial.repeat:
                (before,) = [n for n, t in enumerate(own[:place]) if t.pair == trial.pair]
                assert place - before > 10
                assert own[before].flipped != trial.flipped
                assert not own[before].repeat


def test_unequal_clips_are_shown_alike() -> None:
    ramp = np.arange(24, dtype=np.uint8)[:, None, None, None] + np.zeros((1, 36, 64, 3), np.uint8)
    wide, square = Clip(ramp, 24.0), Clip(np.zeros((6, 24, 24, 3), np.uint8), 8.0)
    one, other = alike(wide, square)
    assert one.frames.shape == other.frames.shape == (6, 24, 24, 3)
    assert one.fps == other.fps == 8
    assert one.frames[:, 0, 0, 0].tolist() == [0, 3, 6, 9, 12, 15]  # the same moments
    large = Clip(np.zeros((8, 48, 86, 3), np.uint8), 8.0)
    assert alike(large, wide)[0].frames.shape == (8, 36, 64, 3)  # of one shape: nothing is cut off


def test_pairs_that_differ_are_counted_and_kept_as_made_on_demand(folders: tuple[Path, Path], tmp_path: Path) -> None:
    larger = write_videos(tmp_path / "larger", 3, noise=20, size=48, fps=16)
    sizes = {}
    for as_made in (False, True):
        built = build(folders[0], larger, tmp_path / str(as_made), as_made=as_made, seed=1, raters=1)
        assert any("differ" in line and " 3;" in line for line in built.remarks)
        assert any("2 left out, without a partner" in line and "0003-0.mp4" in line for line in built.remarks)
        shapes = set()
        for clip in study_in(built.page)["clips"]:
            (tmp_path / "clip.mp4").write_bytes(base64.b64decode(clip))
            frames, fps = read_video(tmp_path / "clip.mp4")
            shapes.add((frames.shape, fps))
        sizes[as_made] = shapes
    assert sizes[False] == {((4, 32, 32, 3), 8.0)}
    assert sizes[True] == {((8, 32, 32, 3), 8.0), ((8, 48, 48, 3), 16.0)}


def test_what_gives_no_pair_is_named(tmp_path: Path) -> None:
    a, b = write_videos(tmp_path / "a", 2, samples=2), write_videos(tmp_path / "b", 2, noise=9)
    (a / "index.json").write_text("{}")
    (a / "broken.json").write_text("{")
    write_sidecar(a / "lost.mp4", "square of a picture only")
    (a / "other.mp4").write_bytes((b / "0000-0.mp4").read_bytes())
    (b / "0001-0.mp4").write_bytes((a / "0001-0.mp4").read_bytes())  # the very same video
    for ending in (".mp4", ".json"):
        (b / f"copy{ending}").write_bytes((b / f"0000-0{ending}").read_bytes())
    built = build(a, b, tmp_path / "out", raters=1)
    assert built.pairs == 1
    left_out = read_key(built.key)["left_out"]
    assert left_out["A"] == {
        "not a side-car of `videodiff generate`": ["broken.json", "index.json"],
        "a side-car whose mp4 is missing": ["lost.json"],
        "an mp4 without a side-car": ["other.mp4"],
        "without a partner of the same prompt, seed and sample": ["0000-1.mp4", "0001-1.mp4"],
    }
    assert left_out["B"] == {"of the same prompt, seed and sample as another": ["copy.mp4"]}
    assert left_out["same"] == ["0001-0.mp4"]
    assert len(built.remarks) == 6


def test_side_cars_of_generate_itself_and_of_other_systems(toy_model: Path, tmp_path: Path) -> None:
    from stages.generate import main as generate

    (tmp_path / "prompts.txt").write_text("a large red circle moving left on a white background\n")
    options = {"model": str(toy_model), "steps": 1, "num_samples": 2}
    generate(None, tmp_path / "ours", tmp_path / "prompts.txt", None, options)
    found = read_folder(tmp_path / "ours")
    assert [key[1:] for key in found.videos] == [(0, 0), (0, 1)]
    assert not found.left_out
    other = write_videos(tmp_path / "other", 1)
    (prompt, _, _) = next(iter(found.videos))
    (other / "0000-0.json").write_text(json.dumps({"options": {"prompt": prompt}}))
    assert build(tmp_path / "ours", other, tmp_path / "out", raters=1).pairs == 1


def test_what_cannot_be_built_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    build(*folders, tmp_path / "done", num_pairs=1, raters=1)
    with pytest.raises(UserError, match="holds a study already"):
        build(*folders, tmp_path / "done", num_pairs=1, raters=1)
    with pytest.raises(UserError, match="only 5 videos"):
        build(*folders, tmp_path / "out", num_pairs=6)
    with pytest.raises(UserError, match="no such folder"):
        build(folders[0], tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UserError, match="holds no mp4"):
        build(folders[0], tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match="there is only 1"):
        build(*folders, tmp_path / "out", num_pairs=1, repeats=True)
    with pytest.raises(UserError, match="same frames twice"):
        build(folders[0], folders[0], tmp_path / "out", num_pairs=1)
    other = tmp_path / "reseeded"
    other.mkdir()
    for path in folders[0].glob("*.mp4"):
        (other / path.name).write_bytes(path.read_bytes())
        write_sidecar(other / path.name, json.loads(path.with_suffix(".json").read_text())["options"]["prompt"], seed=1)
    with pytest.raises(UserError, match="5 prompts are in both, but none with the same seed"):
        build(folders[0], other, tmp_path / "out")
    (other / "0000-0.mp4").write_bytes(b"junk")
    write_sidecar(other / "0000-0.mp4", "square </script><b>0</b>")
    with pytest.raises(UserError, match=r"0000-0\.mp4: not a video"):
        build(folders[0], other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- score ------------------------------------------------------------------------------------------------------------


def test_a_study_worked_out_by_hand(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Five pairs, of three raters 3, 2, 2, 2 and 1 are for A. Rater 1 contradicts what comes again."""
    build(*folders, tmp_path, questions=("quality",), seed=1, raters=3, repeats=True)
    key = read_key(tmp_path / "key.json")

    def choose(rater: int, trial: dict[str, Any]) -> tuple[str, list[str]]:
        for_a = rater <= (3, 2, 2, 2, 1)[trial["pair"]]
        if trial["repeat"] and rater == 1:
            for_a = not for_a
        return ("A", ["pixel sharpness"]) if for_a else ("B", ["amount of motion", "frame consistency"])

    files = [answer(key, rater, tmp_path / f"answers-{rater}.json", choose) for rater in (1, 2, 3)]
    done = CliRunner().invoke(SYSTEM, ["score", str(tmp_path / "key.json"), *map(str, files)])
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "score.json").read_text())
    asked = told["questions"]["quality"]
    assert {name: asked["majority"][name] for name in ("A", "B", "ties", "pairs")} == {
        "A": 4, "B": 1, "ties": 0, "pairs": 5,
    }  # fmt: skip
    assert asked["majority"]["interval"] == pytest.approx([0.3755, 0.9638], abs=1e-4)  # Wilson's of 4 of 5
    assert asked["answers"]["rate"] == pytest.approx(10 / 15)
    assert asked["answers"]["interval"][0] < 10 / 15 < asked["answers"]["interval"][1]
    assert asked["unanimous"] == {"pairs": 1, "of": 5}
    # P = (1 + 4 / 3) / 5 = 7 / 15, by chance 4 / 9 + 1 / 9 = 5 / 9.
    assert asked["kappa"]["value"] == pytest.approx((7 / 15 - 5 / 9) / (4 / 9))
    assert (asked["self_agreement"]["same"], asked["self_agreement"]["of"]) == (4, 6)
    assert asked["reasons"]["pixel sharpness"] == {"A": 10, "B": 0}
    assert asked["reasons"]["frame consistency"] == {"A": 0, "B": 5}
    assert asked["reasons"]["motion smoothness"] == {"A": 0, "B": 0}
    assert told["raters"][0]["median_seconds"] == 2
    assert "80.0 (37.6-96.4)" in done.output
    page = (tmp_path / "score.html").read_text()
    assert "5 (100 %)" in done.output
    assert "A preferred in 80.0 (37.6-96.4) % of 5 pairs" in page
    assert "http" not in page


def test_who_always_chooses_the_left_shows(folders: tuple[Path, Path], tmp_path: Path) -> None:
    build(*folders, tmp_path, num_pairs=3, questions=("quality",), seed=1, raters=2)
    key = read_key(tmp_path / "key.json")
    files = [
        answer(key, r, tmp_path / f"{r}.json", lambda _, trial: (trial["left"], ["pixel sharpness"])) for r in (1, 2)
    ]
    asked = score(key, read_answers(key, files)[0])["questions"]["quality"]
    assert asked["left"]["rate"] == 1
    assert asked["left"]["interval"][0] < 0.7  # a few pairs make nothing certain
    assert asked["majority"]["ties"] == 3  # mirrored raters cancel
    assert asked["majority"]["rate"] == asked["answers"]["rate"] == 0.5
    assert asked["majority"]["interval_by"] == "bootstrap over pairs"
    assert asked["kappa"]["value"] == pytest.approx(-1)


def test_samples_of_a_prompt_are_no_independent_pairs(tmp_path: Path) -> None:
    a, b = write_videos(tmp_path / "a", 2, samples=2), write_videos(tmp_path / "b", 2, noise=20, samples=2)
    build(a, b, tmp_path, questions=("quality",), seed=1, raters=1)
    key = read_key(tmp_path / "key.json")
    by_prompt = {prompt: "AB"[n] for n, prompt in enumerate(sorted({row["prompt"] for row in key["pairs"]}))}
    file = answer(
        key, 1, tmp_path / "1.json", lambda _, t: (by_prompt[key["pairs"][t["pair"]]["prompt"]], ["amount of motion"])
    )
    asked = score(key, read_answers(key, [file])[0])["questions"]["quality"]
    assert asked["majority"]["interval_by"] == "bootstrap over prompts"
    assert asked["majority"]["interval"] == [0, 1]  # two prompts, one for each: four pairs would promise more
    assert asked["kappa"]["value"] is None  # a single rater


def test_answers_that_cannot_be_used_are_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for n, raters in ((0, 5), (1, 4)):
        build(*folders, tmp_path / str(n), num_pairs=3 - n, seed=1, raters=raters)
    key, other = (read_key(tmp_path / f"{n}" / "key.json") for n in (0, 1))
    good = answer(key, 1, tmp_path / "answers-1.json", always_sharp)
    short = answer(key, 1, tmp_path / "answers-1 (1).json", always_sharp, 2)
    partial = answer(key, 2, tmp_path / "answers-2.json", always_sharp, 4)
    alien = answer(other, 3, tmp_path / "alien.json", always_sharp)
    told = json.loads(answer(key, 4, tmp_path / "4.json", always_sharp).read_text())
    edits = {"choice": "right" if told["answers"][0]["choice"] == "left" else "left", "reasons": ["frame consistency"]}
    edited = []
    for name, value in edits.items():
        changed = {**told, "answers": [{**told["answers"][0], name: value}, *told["answers"][1:]]}
        write_json(tmp_path / f"edited-{name}.json", changed)
        edited.append(tmp_path / f"edited-{name}.json")
    forged = answer(key, 4, tmp_path / "forged.json", lambda *_: ("A", ["it is mine"]))
    cut = tmp_path / "cut.json"
    cut.write_text(good.read_text()[:300])
    missing = tmp_path / "void.json"
    write_json(missing, {**told, "answers": [], "checksum": checksum(key["study"], 4, [])})
    given = [short, good, partial, alien, *edited, forged, cut, missing]
    done = CliRunner().invoke(SYSTEM, ["score", str(tmp_path / "0/key.json"), *map(str, given), "-o", str(tmp_path)])
    assert done.exit_code == 0, done.output
    told = json.loads((tmp_path / "score.json").read_text())
    assert {Path(entry["file"]).name: entry["why"].partition("answers-1")[0] for entry in told["left_out"]} == {
        "answers-1 (1).json": f"all of it is in {tmp_path}/",
        "alien.json": "answers to another study",
        "edited-choice.json": "changed after it was saved",
        "edited-reasons.json": "changed after it was saved",
        "forged.json": "changed after it was saved",
        "cut.json": "not a file of answers, or cut off",
        "void.json": "holds no answer",
    }
    assert [(rater["rater"], rater["answers"], rater["of"]) for rater in told["raters"]] == [(1, 6, 6), (2, 4, 6)]
    assert told["missing_raters"] == [3, 4, 5]
    assert told["questions"]["faithfulness"]["kappa"] == {"pairs": 1, "raters": 2, "value": None}  # all for A
    for words in ("rater 2 is incomplete: 4 of 6", "no answers of raters 3, 4, 5", "left out"):
        assert words in done.output
    contradicting = answer(key, 1, tmp_path / "twin.json", lambda _, t: ("B", always_sharp(1, t)[1]))
    with pytest.raises(UserError, match="both are of rater 1 and contradict"):
        read_answers(key, [good, contradicting])
    with pytest.raises(UserError, match="answers to another study"):
        read_answers(key, [alien])
    with pytest.raises(UserError, match=r"nowhere\.json: the answers can't be read"):
        read_answers(key, [tmp_path / "nowhere.json"])
    for wrong in (good, cut):
        with pytest.raises(UserError, match="not a key"):
            read_key(wrong)


def test_kappa_against_fleiss_own_example() -> None:
    """Fleiss (1971), table 1: 30 patients, 6 psychiatrists, 5 diagnoses; kappa is 0.430."""
    rows = (
        "00060 03003 01401 00006 03030 20400 00402 20310 20040 00006 10050 11040 03300 10050 02031 "
        "00501 30012 51000 02040 10203 00006 01050 02013 20040 10041 05010 40002 02040 10500 00006"
    )
    counts = np.array([[int(digit) for digit in row] for row in rows.split()])
    assert counts.sum(0).tolist() == [26, 26, 30, 55, 43]  # as his last row
    assert fleiss_kappa(counts) == pytest.approx(0.430, abs=5e-4)
