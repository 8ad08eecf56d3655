"""`videodiff suite`: videos for the prompts of a public benchmark, laid out and named as its own tools look for them.

The prompts are read from the user's copy; judging is the benchmark's own. VBench (Huang et al. 2024): videos of its
VBench_full_info.json as PROMPT-N.mp4, five of each prompt and 25 for temporal flickering. T2V-CompBench (Sun et al.
2024): of its folder meta_data, one video a prompt as CATEGORY/0001.mp4 in the order of CATEGORY.json.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.generate import main as generate
from stages.requests import slug
from videodiff.errors import UserError
from videodiff.training.distributed import launched_as
from videodiff.video_io import atomic_path, write_json

SAMPLES = 5  # VBench's number of videos of a prompt ...
FLICKER, FLICKER_SAMPLES = "temporal_flickering", 25  # ... and of this dimension, most of whose videos are thrown away


@dataclass(frozen=True)
class Wanted:
    """A video that the benchmark looks for: where, of which prompt, the how manieth of it."""

    file: str
    prompt: str
    sample: int


def main(suite: str, source: Path, out: Path, model: str, seed: int, batch_size: int, samples: int | None) -> None:
    """Generate what is not there yet, at the model's own settings, and put it where the benchmark looks.

    Videos, first images and side-cars of `videodiff generate` lie in `out`/generated, `out`/videos holds what the
    benchmark reads, metadata.json says which video is of which prompt. Raises UserError for a source that is none.
    """
    if suite != "vbench" and samples is not None:
        raise UserError(f"--num-samples {samples}: {suite} has one video of each prompt; leave it out")
    wanted = vbench(source, samples) if suite == "vbench" else comp_bench(source)
    prompts = list(dict.fromkeys(video.prompt for video in wanted))
    most = {prompt: 1 + max(v.sample for v in wanted if v.prompt == prompt) for prompt in prompts}
    out.mkdir(parents=True, exist_ok=True)
    lines = out / "prompts.jsonl"
    with atomic_path(lines) as draft:  # every rank writes the same
        told = (json.dumps({"prompt": prompt, "num_samples": most[prompt]}) + "\n" for prompt in prompts)
        draft.write_text("".join(told), encoding="utf-8")
    made = out / "generated"
    problem = None
    try:
        generate(None, made, lines, None, {"model": model, "seed": seed}, batch_size)
    except UserError as error:  # what was made goes to its place all the same
        problem = error
    if launched_as()[0] > 0:
        if problem is not None:
            raise problem
        return
    missing = []
    for video in wanted:
        name = f"{prompts.index(video.prompt):04d}-{slug(video.prompt)}"
        source_file = made / f"{name if most[video.prompt] == 1 else f'{name}-{video.sample}'}.mp4"
        if source_file.is_file():
            _link(source_file, out / "videos" / video.file)
        else:
            missing.append(video.file)
    write_json(out / "metadata.json", [vars(video) for video in wanted if video.file not in missing])
    where = f"{out / 'videos'}: {len(wanted) - len(missing)} of {len(wanted)} videos for {suite}"
    print(where + ("; other ranks make the rest: run it again when they are done" if missing else ""))
    if problem is not None:
        raise problem


def vbench(path: Path, samples: int | None = None) -> list[Wanted]:
    """What VBench looks for; `samples` of each prompt in place of its own number. UserError for another file."""
    told = _read(path)
    if not isinstance(told, list) or not all(isinstance(e, dict) and isinstance(e.get("prompt_en"), str) for e in told):
        raise UserError(f"{path}: not VBench's list (objects with prompt_en); name its VBench_full_info.json")
    wanted = []
    for entry in told:
        prompt = entry["prompt_en"]
        if "/" in prompt or "\0" in prompt or len(prompt.encode()) > 240:
            raise UserError(f"{path}: the prompt {prompt[:60]!r} can't name a file, as VBench needs; leave it out")
        flickers = FLICKER in entry.get("dimension", ())
        count = samples or (FLICKER_SAMPLES if flickers else SAMPLES)
        wanted += [Wanted(f"{prompt}-{number}.mp4", prompt, number) for number in range(count)]
    return list(dict.fromkeys(wanted))


def comp_bench(folder: Path) -> list[Wanted]:
    """What T2V-CompBench looks for. UserError for a folder without its lists."""
    files = sorted(folder.glob("*.json")) if folder.is_dir() else [folder]
    if not files:
        raise UserError(f"{folder}: holds no JSON; name T2V-CompBench's folder meta_data, or one of its files")
    wanted = []
    for file in files:
        told = _read(file)
        if not isinstance(told, list) or not all(
            isinstance(e, dict) and isinstance(e.get("prompt"), str) for e in told
        ):
            raise UserError(f"{file}: not a list of T2V-CompBench (objects with prompt); leave it out")
        wanted += [_of_category(file.stem, number, told) for number in range(len(told))]
    return wanted


def _of_category(category: str, number: int, told: Sequence[dict[str, Any]]) -> Wanted:
    # The same prompt twice in a category is made twice, of other noise; two categories share a video.
    prompt = told[number]["prompt"].strip()
    before = sum(entry["prompt"].strip() == prompt for entry in told[:number])
    return Wanted(f"{category}/{number + 1:04d}.mp4", prompt, before)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path}: can't be read ({error.strerror}); name your copy of the benchmark's prompts"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); name your copy of the benchmark's prompts") from None


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
