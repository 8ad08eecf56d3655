"""What `videodiff generate` is asked for: a prompt, a file of prompts or a side-car become a list of requests."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from videodiff import config as configs
from videodiff.config import Config
from videodiff.diffusion.samplers import SamplerKind
from videodiff.errors import UserError
from videodiff.model import Model, find
from videodiff.parts import DESCRIPTION, sha256

SIDECAR_FORMAT = 1
MAX_ROWS = 1024  # more in a side-car's batch than any `--batch-size` means that it was changed by hand


# Options that name what is read beside the model: files, and folders of models.
FILES, GUIDES = ("image", "control", "noise"), ("classifier", "weak_model")
# Options that came after the first side-cars. They count where they are given alone, so that those still repeat.
LATER = (
    "control", "control_scale", "upscale", "guidance_rescale", "guidance_interval", "classifier", "classifier_scale",
    "class_name", "weak_model", "weak_scale", "noise",
)  # fmt: skip


class Options(Config):
    """What `generate` can be told; None means what the model's own card says."""

    prompt: str
    model: str = "demo"
    num_samples: int = Field(1, ge=1)
    seed: int = 0
    steps: int | None = Field(None, ge=1)
    sampler: SamplerKind | None = None
    text_guidance: float | None = Field(None, ge=0)
    image_guidance: float | None = Field(None, ge=0)
    frames: int | None = Field(None, ge=1)
    fps: float | None = Field(None, ge=0.01, lt=1000)
    interpolation: bool = True
    image: str | None = None
    image_only: bool = False
    control: str | None = None
    control_scale: float | None = Field(None, ge=0)
    upscale: bool = False
    guidance_rescale: float | None = Field(None, ge=0, le=1)
    guidance_interval: tuple[float, float | None] | None = None
    classifier: str | None = None
    classifier_scale: float | None = Field(None, ge=0)
    class_name: str | None = None
    weak_model: str | None = None
    weak_scale: float | None = Field(None, ge=0)
    noise: str | None = None

    def models(self) -> list[str]:
        """Every model that is named: the one that makes the frames first, then those that guide it."""
        return [self.model, *(name for key in GUIDES if (name := getattr(self, key)) is not None)]

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError('is empty; say what the video shows, e.g. "a small blue square moving up"')
        return prompt


@dataclass(frozen=True)
class Request:
    """One video to make: the options, which of their samples, and where it goes (`stem`, without the ending).

    `batch` is (rows, row) of a side-car's sample. Rounding depends on the number of rows that are computed together
    and on the row's place among them, so an exact repetition needs both. `former` is what the repetition must equal:
    the sha256 of the side-car's frames, and the version of torch that made them.
    """

    options: Options
    sample: int
    stem: Path
    batch: tuple[int, int] | None = None
    former: tuple[str, str] | None = None

    def identity(self, model_hash: str) -> str:
        """Names what will be made: the options that change the frames, the sample, the model, what else is read."""
        told = configs.to_dict(self.options) | self.inputs()
        for key in ("num_samples", "model", *(name for name in LATER if told[name] in (None, False))):
            del told[key]
        text = json.dumps({"options": told, "sample": self.sample, "model": model_hash}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def inputs(self) -> dict[str, str]:
        """Option -> sha256 of what it names: a file, or the description of a model, which names those of its files."""
        paths: dict[str, Path] = {}
        for key in (*FILES, *GUIDES):
            if (name := getattr(self.options, key)) is not None:
                paths[key] = Path(name) if key in FILES else find(name) / DESCRIPTION
        return {key: sha256(path) for key, path in paths.items()}

    def file(self, ending: str) -> Path:
        """stem + ending; a dot in the stem stays."""
        return self.stem.with_name(self.stem.name + ending)

    def finished(self, identity: str) -> bool:
        """Whether the files of exactly this request stand already."""
        try:
            told = json.loads(self.file(".json").read_text(encoding="utf-8"))
            return told["request"] == identity and all(self.file(Path(name).suffix).is_file() for name in told["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return False


def read_requests(
    prompt: str | None, out: Path | None, prompts: Path | None, sidecar: Path | None, options: dict[str, Any]
) -> list[Request]:
    """All that a command line asks for. Raises UserError for what can't be understood."""
    if sum(source is not None for source in (prompt, prompts, sidecar)) != 1:
        raise UserError("name one source: a prompt in quotes, or --prompts FILE, or --from SIDECAR.json")
    if sidecar is not None:
        return [_repeated(sidecar, out, options)]
    if prompts is not None:
        folder = out if out is not None else Path("outputs")
        if folder.suffix in (".mp4", ".png"):
            raise UserError(f"{folder}: --prompts makes many files; name a folder with -o")
        found: list[Request] = []
        for number, (place, line) in enumerate(_lines(prompts)):
            told = configs.build(Options, {**options, **line}, place)
            found += _samples(told, folder / f"{number:04d}-{slug(told.prompt)}")
        return found
    told = configs.build(Options, {**options, "prompt": prompt}, "videodiff generate")
    return list(_samples(told, _stem(out if out is not None else Path("outputs"), slug(told.prompt))))


def slug(prompt: str) -> str:
    """A file name out of a prompt."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].rstrip("-") or "video"


def model_hash(model: Model) -> str:
    """sha256 of the description, which in turn names the sha256 of every file."""
    return sha256(model.folder / DESCRIPTION)


def _stem(out: Path, name: str) -> Path:
    """Where a result goes: `-o out.mp4`, or a folder that gets a file named after the prompt."""
    if out.suffix in (".mp4", ".png"):
        return out.with_suffix("")
    if out.suffix and not out.is_dir():
        raise UserError(f"{out}: the output is an mp4; end its name with .mp4, or name a folder")
    return out / name


def _samples(options: Options, stem: Path) -> Iterator[Request]:
    for sample in range(options.num_samples):
        yield Request(options, sample, stem if options.num_samples == 1 else stem.with_name(f"{stem.name}-{sample}"))


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, options) of each prompt of a file; blank lines are left out."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: the prompts can't be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    lines = [(f"{path}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path}: holds no prompt; write one a line")
    for place, line in lines:
        if path.suffix != ".jsonl":
            yield place, {"prompt": line.strip()}
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f'{place}: not JSON ({error}); write {{"prompt": "..."}}') from None
        if not isinstance(value, dict):
            raise UserError(f'{place}: not an object; write {{"prompt": "..."}}')
        yield place, value


def _repeated(sidecar: Path, out: Path | None, options: dict[str, Any]) -> Request:
    """The request that wrote a side-car; only its models may be named anew, since folders move."""
    if extra := sorted(set(options) - {"model", *GUIDES}):
        raise UserError(f"--from repeats a generation exactly; leave out {', '.join(extra)}")
    try:
        told = json.loads(sidecar.read_text(encoding="utf-8"))
        sidecar_format, batch = told["format"], told["batch"]
        before, sample = dict(told["options"]), int(told["sample"])
        identity, former_model = str(told["request"]), str(told["model"]["sha256"])
        former = str(told["frames_sha256"]), str(told["software"]["torch"])
    except OSError as error:
        raise UserError(f"{sidecar}: the side-car can't be read ({error.strerror}); check the path") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{sidecar}: not a side-car that `videodiff generate` wrote; check the path") from None
    if sidecar_format != SIDECAR_FORMAT:
        raise UserError(
            f"{sidecar}: format {sidecar_format!r}, this program reads {SIDECAR_FORMAT}; repeat it with the version of "
            "videodiff that wrote it"
        )
    if not (
        isinstance(batch, list)
        and [type(number) for number in batch] == [int, int]
        and 0 <= batch[1] < batch[0] <= MAX_ROWS
    ):
        raise UserError(
            f"{sidecar}: batch is {str(batch)[:40]}, not [rows, row] with 0 <= row < rows <= {MAX_ROWS}; it was "
            "changed by hand: give the options on the command line instead"
        )
    repeated = configs.build(Options, {**before, **options}, str(sidecar))
    stem = sidecar.with_name(f"{sidecar.stem}-again")
    if out is not None:
        stem = _stem(out, stem.name)
    request = Request(repeated, sample, stem, (batch[0], batch[1]), former)
    if (found := model_hash(Model.load(repeated.model))) != former_model:
        raise UserError(
            f"{sidecar}: was made with another model ({former_model[:12]}) than {repeated.model} is now "
            f"({found[:12]}); name the folder of the former one with --model"
        )
    read = [name for key in (*FILES, *GUIDES) if (name := getattr(repeated, key)) is not None]
    if missing := [name for key in FILES if (name := getattr(repeated, key)) and not Path(name).is_file()]:
        raise UserError(f"{sidecar}: was made from {missing[0]}, which is missing; put it back")
    if request.identity(found) != identity:
        what = f"{' or '.join(read)} has changed since" if read else "it was changed by hand"
        raise UserError(f"{sidecar}: can't be repeated exactly: {what}; give the options on the command line instead")
    return request
