"""The command line: help, one-line errors, Ctrl-C in training. What `generate` refuses is in test_generate.py."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from data_pipeline.shards import write_world_shards
from stages.cli import main
from videodiff.errors import UserError
from videodiff.model import Model

ROOT = Path(__file__).resolve().parents[1]
TOY = [
    "data.size=32",
    "data.frames=2",
    "data.batch_size=4",
    "data.workers=0",
    "network.patch=4",
    "network.widths=[16,16]",
]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def one_line(captured: str) -> str:
    assert captured.startswith("videodiff: error: ")
    assert len(captured.splitlines()) == 1, captured
    return captured


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world_shards(tmp_path_factory.mktemp("data") / "shards", 8, 32, 7, 16.0, 0, samples_per_shard=4).parent


def train(folder: Path, shards: Path, *overrides: str) -> list[str]:
    """The command that trains a toy autoencoder."""
    return ["train", "configs/demo/autoencoder.yaml", f"run.dir={folder}", f"data.shards={shards}", *TOY, *overrides]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["nonsense"], "nonsense"),
        (["generate", "a", "--nonsense"], "--nonsense"),
        (["generate", "a", "--frames", "7.5"], "--frames"),
        (["generate", "a", "--steps", "many"], "--steps"),
        (["generate", "a", "--sampler", "euler"], "--sampler"),
        (["generate", "a", "--batch-size", "0"], "--batch-size"),
        (["train"], "config"),
        (["train", "configs/demo/imag.yaml"], "configs/demo/imag.yaml: no such configuration file"),
        (["train", "configs/demo/image.yaml", "run.stpes=3"], "run.stpes: unknown key; did you mean run.steps?"),
        (["train", "configs/demo/image.yaml", "run.steps=7.5"], "run.steps: expected a whole number, got 7.5"),
        (["train", "configs/demo/image.yaml", "run.steps=0"], "run.steps"),
        (["train", "configs/demo/image.yaml", "run.steps"], "no '='"),
        (["train", "configs/demo/image.yaml", "stage=imagine"], "did you mean 'image'?"),
        (["train", "configs/demo/video.yaml", "dropout={text: 0.9, image: 0.9}"], "dropout"),
        (["data"], "Missing command"),
        (["data", "world"], "--out"),
        (["data", "world", "--out", "x", "--num-clips", "0"], "--num-clips"),
        (["data", "world", "--out", "x", "--size", "33"], "size 33 is odd"),
        (["evaluate", "nowhere"], "nowhere"),
        (["evaluate", "demo", "--stage", "all of them"], "--stage"),
        (["export", "nowhere", "--out", "x"], "nowhere"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert problem in one_line(capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def test_several_mistakes_in_a_config_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "configs/demo/image.yaml", "run.stpes=3", "data.size=big") == 2
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "videodiff: error: configs/demo/image.yaml: 2 problems"
    assert sorted(line.split(":")[0].strip() for line in others) == ["data.size", "run.stpes"]


def test_without_arguments_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    told = capsys.readouterr().out
    assert all(command in told for command in ("train", "generate", "evaluate", "export", "data"))


@pytest.mark.parametrize("harm", ["none there", "missing shard", "torn shard", "no model", "not a folder"])
def test_training_refuses_bad_data(harm: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "shards"
    if harm != "none there":
        shutil.copytree(shards, copy)
    shard = copy / "world-000001.tar"
    if harm == "missing shard":
        shard.unlink()
    if harm == "torn shard":
        shard.write_bytes(shard.read_bytes()[:-700])
    if harm == "not a folder":
        (tmp_path / "run").write_text("")
    command = train(tmp_path / "run", copy)
    if harm == "no model":
        command = ["train", "configs/demo/image.yaml", f"model={tmp_path}/nowhere", f"data.shards={copy}"]
        command.append(f"run.dir={tmp_path}/run")
    assert run(*command) == 2
    problem = one_line(capsys.readouterr().err)
    expected = {"none there": copy, "no model": f"{tmp_path}/nowhere", "not a folder": f"{tmp_path}/run"}
    assert str(expected.get(harm, shard)) in problem
    assert not list(tmp_path.rglob("step-*"))


def process(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "stages.cli", *command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_clips_that_do_not_decode_stop_the_run_with_one_line(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for number in range(8):
            for ending, data in (("mp4", b"not a video" * 99), ("json", b'{"captions": ["a"]}')):
                member = tarfile.TarInfo(f"clip{number}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    started = process(train(tmp_path / "run", tmp_path / "bad.tar", "data.bad_floor=2"))
    _, errors = started.communicate(timeout=300)
    assert started.returncode == 2
    assert "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("videodiff: error: ")
    assert "clips are bad" in last
    assert "undecodable" in last
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert {entry["reason"] for entry in listed} == {"undecodable"}


def test_ctrl_c_in_training_saves_and_the_same_command_goes_on(shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    started = process(train(folder, shards, "run.steps=100000", "run.sample_every=0", "engine.decay_steps=100000"))
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and started.poll() is None:
        if metrics.is_file() and len(metrics.read_text().splitlines()) >= 2:
            break
        time.sleep(0.05)
    started.send_signal(signal.SIGINT)
    output, errors = started.communicate(timeout=120)
    assert started.returncode == 130, errors
    assert "Traceback" not in errors
    assert "saved after step" in output + errors
    (saved,) = (folder / "checkpoints").glob("step-*")
    step = int(saved.name.removeprefix("step-"))
    assert Model.load(folder).config.stages() == ["autoencoder"]
    command = train(folder, shards, f"run.steps={step + 1}", "run.sample_every=0", "engine.decay_steps=100000")
    resumed = process(command)
    output, errors = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, errors
    assert f"resumed after step {step}" in output + errors
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, step + 2))


def test_export_makes_a_model_that_stands_alone(
    toy_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("export", toy_model, "--out", tmp_path / "half", "--half") == 0
    exported = Model.load(tmp_path / "half")
    assert exported.config.stages() == Model.load(toy_model).config.stages()
    size = {path: os.path.getsize(path / "image.safetensors") for path in (toy_model, tmp_path / "half")}
    assert size[tmp_path / "half"] < 0.6 * size[toy_model]
    capsys.readouterr()
    assert run("export", toy_model, "--out", tmp_path / "half") == 2
    assert "holds a model already" in one_line(capsys.readouterr().err)


def test_without_the_extra_a_command_says_what_to_install(shards: Path, tmp_path: Path) -> None:
    """A package that can't be imported stands for one that is not installed."""
    code = "import sys; sys.modules['deepspeed'] = None; from stages.cli import main\n"
    code += f"main({train(tmp_path / 'run', shards)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'videodiff[train]'" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_what_rank_0_tells_the_others_do_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A job of 512 ranks ends in one line."""
    error = UserError("data: no shard is there")

    def fail(*given: object) -> None:
        raise error

    monkeypatch.setattr("stages.assemble.train_stage", fail)
    assert run("train", ROOT / "configs/demo/image.yaml") == 2
    assert "data: no shard is there" in one_line(capsys.readouterr().err)
    error.echoed = True
    assert run("train", ROOT / "configs/demo/image.yaml") == 2
    assert capsys.readouterr() == ("", "")


def test_every_n_may_be_one_word_or_two(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from stages.evaluation import command

    asked: list[str] = []
    monkeypatch.setattr(command, "main", lambda request: asked.append(f"{request.model} {request.checkpoints}"))
    assert run("evaluate", "runs/a", "--checkpoints", "every", "500") == 0
    assert run("evaluate", "--checkpoints", "every", "500", "runs/a", "--watch") == 0
    assert run("evaluate", "--checkpoints", "every:500", "runs/a") == 0
    assert run("evaluate", "--checkpoints=every 500", "runs/a") == 0
    assert asked == ["runs/a every:500"] * 3 + ["runs/a every 500"]
    monkeypatch.undo()
    capsys.readouterr()
    for words in (["every", "0"], ["every"], ["every", "-5"], ["often"]):
        assert run("evaluate", "runs/a", "--checkpoints", *words) == 2
        assert "say last, all, or every N or every:N" in one_line(capsys.readouterr().err)
