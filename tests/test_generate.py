"""`videodiff generate` on a toy model with random weights: what it writes, repeats, skips, refuses and warns of."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stages.cli import main
from stages.pipeline import Pipeline, SampleKey
from stages.requests import read_requests
from videodiff import config as configs
from videodiff.diffusion.samplers import DDPM
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.model_folder import write_weights
from videodiff.parts import DESCRIPTION, ModelConfig
from videodiff.video_io import read_image, read_metadata, read_video, write_png

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "a large red circle moving left on a white background"


def run(*arguments: object) -> int:
    """Exit status of a command line, in this process."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


@pytest.fixture
def generate(toy_model: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Generate to a name in tmp_path; returns the side-car."""

    def call(name: str, *arguments: object, prompt: str = PROMPT) -> dict[str, Any]:
        assert run("generate", prompt, "--model", toy_model, "-o", tmp_path / f"{name}.mp4", *arguments) == 0
        return sidecar(tmp_path / f"{name}.json")

    return call


def sidecar(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    error = np.square(one.astype(float) - other).mean()
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def altered(model: Path, folder: Path, stage: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a model with other weights in one stage, and a description that knows them."""
    shutil.copytree(model, folder)
    state = load_file(folder / f"{stage}.safetensors")
    change(state)
    weights = write_weights(folder, f"{stage}.safetensors", state)
    description = configs.load(ModelConfig, folder / DESCRIPTION)
    part = getattr(description, stage).model_copy(update={"weights": weights})
    configs.save(description.model_copy(update={stage: part}), folder / DESCRIPTION)
    return folder


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_prompt_becomes_a_video_a_picture_and_a_sidecar(
    generate: Callable[..., dict[str, Any]], toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = generate("out", "--seed", 5)
    assert capsys.readouterr().out.split() == [str(tmp_path / f"out.{ending}") for ending in ("mp4", "png", "json")]
    frames, fps = read_video(tmp_path / "out.mp4")
    assert frames.shape == (7, 32, 32, 3)
    assert fps == 16
    data = (tmp_path / "out.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # faststart
    probe = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(tmp_path / "out.mp4")]
    assert "yuv420p" in subprocess.run(probe, capture_output=True, text=True, check=False).stderr
    assert read_image(tmp_path / "out.png").shape == (32, 32, 3)
    assert told["options"]["prompt"] == PROMPT
    assert told["options"]["seed"] == 5
    assert told["result"] == {"frames": 7, "fps": 16.0, "height": 32, "width": 32}
    assert told["stages"]["video"] == {
        "sampler": {"kind": "ddim", "steps": 3, "eta": 0.0, "spacing": "trailing"},
        "guidance": {"text": 2.0, "image": 1.5, "rescale": 0.0, "interval": None},
    }
    assert set(told["stages"]) == {"image", "video", "interpolation"}
    assert json.loads(read_metadata(tmp_path / "out.mp4") or "")["seed"] == 5
    assert json.loads(read_metadata(tmp_path / "out.png") or "")["prompt"] == PROMPT


def test_the_same_command_gives_the_same_frames(generate: Callable[..., dict[str, Any]]) -> None:
    first = generate("one")["frames_sha256"]
    assert generate("two")["frames_sha256"] == first
    assert generate("three", "--seed", 1)["frames_sha256"] != first
    assert generate("four", prompt="a small blue square moving left")["frames_sha256"] != first


def test_each_option_is_obeyed(generate: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    plain = generate("plain", "--no-interpolation")
    assert plain["result"]["frames"] == 4
    assert plain["result"]["fps"] == 8
    assert set(plain["stages"]) == {"image", "video"}
    told = generate(
        "other", "--no-interpolation", "--steps", 2, "--sampler", "ddpm", "--text-guidance", 3, "--image-guidance", 2
    )
    assert told["stages"]["image"]["sampler"] == {
        "kind": "ddpm",
        "steps": 2,
        "spacing": "trailing",
        "variance": "beta_tilde",
    }
    assert told["stages"]["video"]["guidance"] == {"text": 3.0, "image": 2.0, "rescale": 0.0, "interval": None}
    assert told["frames_sha256"] != plain["frames_sha256"]
    assert generate("frames", "--no-interpolation", "--frames", 4)["frames_sha256"] == plain["frames_sha256"]


def test_fps_is_the_playback_rate_and_the_condition(generate: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    slow, normal = generate("slow", "--fps", 12), generate("normal")
    assert read_video(tmp_path / "slow.mp4")[1] == 12
    assert slow["result"]["fps"] == 12
    assert slow["frames_sha256"] != normal["frames_sha256"]  # the toy's networks are told the frame rate
    assert generate("same", "--fps", 16)["frames_sha256"] == normal["frames_sha256"]
    assert generate("raw", "--fps", 12, "--no-interpolation")["result"]["fps"] == 12


def test_a_first_image_is_made_alone_and_then_animated(
    generate: Callable[..., dict[str, Any]], toy_model: Path, tmp_path: Path
) -> None:
    told = generate("first", "--image-only")
    assert told["files"] == ["first.png"]
    assert not (tmp_path / "first.mp4").exists()
    assert told["result"]["frames"] == 1
    picture = (tmp_path / "first.png").read_bytes()
    animated = generate("first", "--image", tmp_path / "first.png")  # the same name: the picture must survive it
    assert (tmp_path / "first.png").read_bytes() == picture
    assert set(animated["stages"]) == {"video", "interpolation"}
    write_png(tmp_path / "black.png", np.zeros((32, 32, 3), np.uint8))
    other = generate("other", "--image", tmp_path / "black.png")
    assert other["frames_sha256"] != animated["frames_sha256"]
    assert not read_image(tmp_path / "other.png").any()


def test_output_names(toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stems(out: str | None, **options: Any) -> list[str]:
        path = None if out is None else Path(out)
        return [str(request.stem) for request in read_requests("A red circle!", path, None, None, options)]

    monkeypatch.chdir(tmp_path)
    assert stems(None) == ["outputs/a-red-circle"]
    assert stems("a.b.mp4") == ["a.b"]
    assert stems("films") == ["films/a-red-circle"]
    assert stems("x.mp4", num_samples=2) == ["x-0", "x-1"]
    with pytest.raises(UserError, match=r"end its name with \.mp4"):
        stems("x.gif")


# --- batches, ranks, files of prompts ---------------------------------------------------------------------------------


def test_batches_and_ranks_change_rounding_only(
    toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [PROMPT, "a small blue square moving up", PROMPT, "a red circle"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))

    def made(name: str, *arguments: object) -> list[Path]:
        source = ("--prompts", tmp_path / "prompts.txt", "--model", toy_model, "--num-samples", 2)
        assert run("generate", *source, "-o", tmp_path / name, *arguments) == 0
        return sorted((tmp_path / name).glob("*.mp4"))

    single = made("single", "--batch-size", 1)
    assert len(single) == 8
    batched = made("batched", "--batch-size", 3)
    assert [sidecar(path.with_suffix(".json"))["batch"][0] for path in batched] == [3] * 6 + [2] * 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        shared = made("ranks")
        assert len(shared) == 4 * (rank + 1)
    for one, two, three in zip(single, batched, shared, strict=True):
        assert one.name == two.name == three.name
        pictures = [read_image(path.with_suffix(".png")) for path in (one, two, three)]
        assert psnr(pictures[0], pictures[1]) >= 45
        assert psnr(pictures[0], pictures[2]) >= 45
    # Noise follows from (seed, prompt, sample): equal prompts make equal videos, their samples differ.
    hashes = [sidecar(path.with_suffix(".json"))["frames_sha256"] for path in single]
    assert hashes[0] == hashes[4]
    assert len(set(hashes)) == 6


def test_a_batch_is_repeated_exactly_from_one_sidecar(toy_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\na small blue square moving up\na red circle")
    assert run("generate", "--prompts", tmp_path / "prompts.txt", "--model", toy_model, "-o", tmp_path / "out") == 0
    source = tmp_path / "out" / "0001-a-small-blue-square-moving-up.json"
    assert sidecar(source)["batch"] == [3, 1]
    assert run("generate", "--from", source) == 0
    again = sidecar(source.with_name(f"{source.stem}-again.json"))
    assert again["frames_sha256"] == sidecar(source)["frames_sha256"]
    assert run("generate", "--from", source, "-o", tmp_path / "third.mp4") == 0
    assert (tmp_path / "third.mp4").read_bytes() == source.with_suffix(".mp4").read_bytes()


def test_a_moved_model_repeats_and_a_changed_one_is_refused(
    generate: Callable[..., dict[str, Any]], toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = generate("out")
    shutil.copytree(toy_model, tmp_path / "moved")
    assert run("generate", "--from", tmp_path / "out.json", "--model", tmp_path / "moved") == 0
    assert sidecar(tmp_path / "out-again.json")["frames_sha256"] == told["frames_sha256"]
    changed = altered(toy_model, tmp_path / "changed", "image", lambda state: state["conv_out.spatial.bias"].add_(1))
    capsys.readouterr()
    assert run("generate", "--from", tmp_path / "out.json", "--model", changed) == 2
    assert "made with another model" in capsys.readouterr().err
    told["options"]["seed"] += 1
    (tmp_path / "out.json").write_text(json.dumps(told))
    assert run("generate", "--from", tmp_path / "out.json") == 2
    assert "changed by hand" in capsys.readouterr().err
    assert run("generate", "--from", tmp_path / "out.json", "--seed", 3) == 2
    assert "leave out seed" in capsys.readouterr().err


def test_a_repetition_that_differs_is_told(
    generate: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = generate("out", "--image-only")
    assert run("generate", "--from", tmp_path / "out.json") == 0
    assert sidecar(tmp_path / "out-again.json")["warnings"] == told["warnings"]
    told["frames_sha256"], told["software"]["torch"] = "0" * 64, "1.2.3"
    (tmp_path / "out.json").write_text(json.dumps(told))
    capsys.readouterr()
    assert run("generate", "--from", tmp_path / "out.json") == 0
    message = f"which were made with torch 1.2.3, these with torch {torch.__version__}"
    assert message in capsys.readouterr().err
    assert any(message in warning for warning in sidecar(tmp_path / "out-again.json")["warnings"])


def test_a_sidecar_changed_by_hand_is_one_line(
    generate: Callable[..., dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = generate("out", "--image-only")
    wrong: list[dict[str, Any]] = [
        {"batch": batch}
        for batch in ([1, 5], ["a", "b"], [0, 0], [1.5, 0], [2, -1], [True, False], [9999, 0], [1], "11", None)
    ]
    for change in (*wrong, {"format": 2}, {"format": None}, {"software": 3}, {"options": 3}, {"model": "x"}):
        (tmp_path / "out.json").write_text(json.dumps({**told, **change}))
        capsys.readouterr()
        assert run("generate", "--from", tmp_path / "out.json") == 2, change
        errors = capsys.readouterr().err
        assert len(errors.splitlines()) == 1, errors
        assert "out.json" in errors
        assert change.keys() & {"software", "options", "model"} or next(iter(change)) in errors
    assert not (tmp_path / "out-again.json").exists()


def test_a_file_of_prompts_carries_options_and_is_not_made_twice(
    toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": PROMPT, "interpolation": False}, {"prompt": "a red circle", "seed": 3, "image_only": True}]
    path, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    lines[1]["prompt"] += "\u2028"  # a line's end for some, and inside of JSON for none; and a mark that editors write
    path.write_text("\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8-sig")
    command = ("generate", "--prompts", path, "--model", toy_model, "-o", out, "--seed", 7)
    assert run(*command) == 0
    video, image = sorted(out.glob("*.json"))
    assert sidecar(video)["options"]["seed"] == 7
    assert sidecar(video)["result"]["frames"] == 4
    assert sidecar(image)["options"]["seed"] == 3
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    capsys.readouterr()
    assert run(*command) == 0
    assert capsys.readouterr().err.count("already made") == 2
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    video.with_suffix(".mp4").unlink()
    assert run(*command) == 0
    now = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert now.keys() == before.keys()
    assert {file.stem for file in now if now[file] != before[file]} == {video.stem}
    assert run(*command, "--steps", 2) == 0  # other settings: what stands is not what is asked for
    assert sidecar(video)["stages"]["image"]["sampler"]["steps"] == 2


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(toy_model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(f"a red circle number {n}" for n in range(16)))
    out = tmp_path / "out"
    command = ["generate", "--prompts", tmp_path / "prompts.txt", "--model", toy_model, "-o", out, "--batch-size", 1]
    command = [str(part) for part in [*command, "--steps", 30]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # The tests themselves may run in the background, where a shell has this signal ignored.
    hear = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", hear, sys.executable, "-m", "stages.cli", *command],
        stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(out.glob("0*.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("videodiff: error: stopped by Ctrl-C")
    finished = {file: file.stat().st_mtime_ns for path in out.glob("*.json") for file in out.glob(f"{path.stem}.*")}
    assert 3 <= len(finished) < 48
    assert not list(out.glob(".*"))  # no half files
    assert run(*command) == 0
    assert len(list(out.glob("*.mp4"))) == len(list(out.glob("*.json"))) == 16
    assert all(file.stat().st_mtime_ns == made for file, made in finished.items())


# --- warnings and refusals --------------------------------------------------------------------------------------------


def test_sick_results_and_strange_words_are_named(
    toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def painted(level: float) -> Callable[[dict[str, torch.Tensor]], None]:
        def change(state: dict[str, torch.Tensor]) -> None:
            last = max(int(name.split(".")[1]) for name in state if name.startswith("decoder."))
            last = max(n for n in range(last + 1) if f"decoder.{n}.weight" in state)
            state[f"decoder.{last}.weight"].zero_()
            state[f"decoder.{last}.bias"].fill_(level)

        return change

    def warnings(model: Path, prompt: str, status: int = 0) -> str:
        out = tmp_path / f"{model.name}.mp4"
        assert run("generate", prompt, "--model", model, "-o", out, "--no-interpolation") == status
        told = capsys.readouterr().err
        if status == 0:
            assert all(warning in told for warning in sidecar(out.with_suffix(".json"))["warnings"])
        return told

    black = altered(toy_model, tmp_path / "black", "autoencoder", painted(-1.0))
    assert "warning: black: the result is black" in warnings(black, "a red circle")
    grey = altered(toy_model, tmp_path / "grey", "autoencoder", painted(0.0))
    assert "warning: grey: the result is static" in warnings(grey, PROMPT)
    assert "static" not in warnings(grey, "a small blue square stands still on black")
    broken = altered(toy_model, tmp_path / "broken", "image", lambda s: s["conv_out.spatial.bias"].fill_(torch.nan))
    assert "warning: broken: the result is not finite" in warnings(broken, PROMPT, status=2)
    assert not (tmp_path / "broken.mp4").exists()
    strange = warnings(toy_model, "a large green circle " * 5)
    assert "words that the model was not trained on: green" in strange
    assert "last words are cut off" in strange
    assert warnings(toy_model, PROMPT).strip() == ""


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "name one source"),
        (("  ",), "prompt: is empty"),
        ((PROMPT, "--steps", "0"), "steps"),
        ((PROMPT, "--steps", "1001"), "1000 steps"),
        ((PROMPT, "--frames", "7.5"), "--frames"),
        ((PROMPT, "--frames", "5"), "clips of 4 frames"),
        ((PROMPT, "--fps", "0"), "fps"),
        ((PROMPT, "--fps", "nan"), "fps"),
        ((PROMPT, "--num-samples", "0"), "num_samples"),
        ((PROMPT, "--text-guidance", "-1"), "text_guidance"),
        ((PROMPT, "--image", "none.png"), "none.png"),
        ((PROMPT, "--image", "wide.png"), "is 48x32 pixels, this model takes 32x32"),
        ((PROMPT, "--image", "right.png", "--image-only"), "leave one of them out"),
        ((PROMPT, "--frames", "4", "--image-only"), "--frames is of a video"),
        ((PROMPT, "--image-guidance", "2", "--image-only"), "--image-guidance is of a video"),
        ((PROMPT, "--no-interpolation", "--image-only"), "--no-interpolation is of a video"),
        ((PROMPT, "--fps", "0.0004"), "fps"),
        ((PROMPT, "-o", "file/out.mp4"), "file"),
        ((PROMPT, "-o", "/proc/none/out.mp4"), "/proc/none"),
        ((PROMPT, "--prompts", "good.jsonl"), "name one source"),
        (("--prompts", "none.txt"), "none.txt"),
        (("--prompts", "empty.txt"), "holds no prompt"),
        (("--prompts", "bad.jsonl"), "bad.jsonl, line 2: not JSON"),
        (("--prompts", "typo.jsonl"), "typo.jsonl, line 1: stpes: unknown key; did you mean steps?"),
        (("--prompts", "good.jsonl", "-o", "out.mp4"), "name a folder"),
        (("--from", "none.json"), "none.json"),
        (("--from", "other.json"), "not a side-car"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...],
    problem: str,
    toy_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, height, width in (("right", 32, 32), ("wide", 32, 48)):
        write_png(tmp_path / f"{name}.png", np.zeros((height, width, 3), np.uint8))
    texts = {
        "file": "",
        "empty.txt": "\n \n",
        "good.jsonl": '{"prompt": "a"}',
        "bad.jsonl": '{"prompt": "a"}\n{',
        "typo.jsonl": '{"prompt": "a", "stpes": 3}',
        "other.json": '{"a": 1}',
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    before = set(tmp_path.iterdir())
    model = () if "--from" in arguments else ("--model", toy_model)
    assert run("generate", *arguments, *model) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("videodiff: error: ")
    assert len(captured.err.splitlines()) == 1
    assert problem in captured.err
    assert set(tmp_path.iterdir()) <= {*before, tmp_path / "outputs"}  # nothing was made


@pytest.mark.parametrize("harm", ["missing", "foreign", "no such folder", "no stage", "torn yaml"])
def test_a_broken_model_is_refused(
    harm: str, toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    if harm != "no such folder":
        shutil.copytree(toy_model, model)
    if harm == "missing":
        (model / "video.safetensors").unlink()
    if harm == "foreign":
        shutil.copy(model / "image.safetensors", model / "video.safetensors")
    if harm == "no stage":
        description = configs.load(ModelConfig, model / DESCRIPTION)
        configs.save(description.model_copy(update={"video": None, "interpolation": None}), model / DESCRIPTION)
    if harm == "torn yaml":
        (model / DESCRIPTION).write_bytes((toy_model / DESCRIPTION).read_bytes()[:300])
    assert run("generate", PROMPT, "--model", model, "-o", tmp_path / "out.mp4") == 2
    errors = capsys.readouterr().err
    assert errors.startswith("videodiff: error: ")
    assert str(model) in errors
    assert harm == "torn yaml" or len(errors.splitlines()) == 1


def test_a_card_that_samples_by_a_variance_never_learned_is_refused(
    toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(toy_model, tmp_path / "model"))
    description = configs.load(ModelConfig, model / DESCRIPTION)
    assert description.image is not None
    sampling = description.image.sampling.model_copy(update={"sampler": DDPM(steps=3, variance="learned")})
    image = description.image.model_copy(update={"sampling": sampling})
    configs.save(description.model_copy(update={"image": image}), model / DESCRIPTION)
    for options in ((), ("--image-only",)):
        assert run("generate", PROMPT, "--model", model, "-o", tmp_path / "out.mp4", *options) == 2
        assert "network.learn_variance is false" in capsys.readouterr().err
    assert not (tmp_path / "out.png").exists()


def test_a_full_disk_leaves_no_half_files(toy_model: Path, tmp_path: Path) -> None:
    limited = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500));"
        f"sys.argv = ['videodiff', 'generate', {PROMPT!r}, '--model', {str(toy_model)!r}, '-o', 'out.mp4'];"
        "from stages.cli import main; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", limited], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "cannot be written" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"out.png"}


# --- inside -----------------------------------------------------------------------------------------------------------


def test_interpolation_keeps_the_given_frames_and_covers_every_other(toy_model: Path) -> None:
    pipeline = Pipeline(Model.load(toy_model))
    part = pipeline.model.diffusion("interpolation")
    for count in (2, 3, 4, 7):
        clip = torch.randn(2, 4, count, 4, 4)
        keys = [SampleKey(0, PROMPT), SampleKey(0, PROMPT, 1)]
        smooth = pipeline.interpolation(keys, clip, 8.0, part.sampling)
        assert smooth.shape[2] == (count - 1) * 2 + 1
        assert torch.equal(smooth[:, :, ::2], clip)
        assert (smooth[:, :, 1::2].flatten(3).abs().sum(3) > 0).all()
    with pytest.raises(UserError, match="two frames"):
        pipeline.interpolation(keys, clip[:, :, :1], 8.0, part.sampling)


def test_frames_do_not_depend_on_the_batch(toy_model: Path) -> None:
    """Before they are encoded: a codec turns a difference of one grey level into several."""
    pipeline = Pipeline(Model.load(toy_model))
    keys = [SampleKey(seed, prompt) for seed, prompt in enumerate((PROMPT, "a red circle", "a small blue square"))]

    def frames(keys: list[SampleKey]) -> np.ndarray:
        sampling = [pipeline.model.diffusion(stage).sampling for stage in ("image", "video", "interpolation")]
        clip = pipeline.video(keys, pipeline.image(keys, sampling[0]), 8.0, sampling[1])
        return pipeline.decode(pipeline.interpolation(keys, clip, 8.0, sampling[2]))

    together = frames(keys)
    for row, key in enumerate(keys):
        assert psnr(together[row], frames([key])[0]) >= 45
    assert psnr(together[0], together[1]) < 30
