"""`videodiff evaluate` over the checkpoints of a run: which, twice the same, as they come, compared, on shards."""

import io
import json
import shutil
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from data_pipeline.shards import write_world_shards
from stages.evaluation import checkpoints, command
from stages.evaluation.checkpoints import Choice, subjects
from stages.evaluation.command import Request, main
from stages.evaluation.compare import compared
from stages.evaluation.report import write_report
from tests.test_features import saved_script
from videodiff import config as configs
from videodiff.errors import UserError
from videodiff.parts import File, ModelConfig, sha256
from videodiff.training.status import Status
from videodiff.video_io import encode_video


def add_checkpoint(run: Path, model: Path, step: int, noise: float = 0.0, name: str = "step") -> Path:
    """A checkpoint of a run: the model, its video stage's weights disturbed, the same again as the raw ones."""
    folder = run / "checkpoints" / f"{name}-{step:08d}"
    draft = folder.with_name("draft.tmp")
    shutil.copytree(model, draft)
    state = load_file(draft / "video.safetensors")
    generator = torch.Generator().manual_seed(step)
    state = {key: value + noise * torch.randn(value.shape, generator=generator) for key, value in state.items()}
    save_file(state, draft / "video.safetensors")
    file = File(name="video.safetensors", sha256=sha256(draft / "video.safetensors"))
    told = configs.load(ModelConfig, draft / "model.yaml")
    assert told.video is not None
    video = told.video.model_copy(update={"weights": file, "raw": file})
    configs.save(told.model_copy(update={"video": video}), draft / "model.yaml")
    draft.rename(folder)
    return folder


@pytest.fixture
def run(toy_model: Path, tmp_path: Path) -> Path:
    """Three checkpoints, and a model of averaged weights that was kept of a fourth."""
    folder = tmp_path / "run"
    for step, noise in ((20, 0.3), (30, 0.1), (40, 0.0)):
        add_checkpoint(folder, toy_model, step, noise)
    add_checkpoint(folder, toy_model, 10, 0.5, "average")
    return folder


def names(run: Path, choice: str, weights: Any = "ema") -> list[str]:
    return [subject.name for subject in subjects(str(run), Choice.parse(choice), weights)]


def test_which_checkpoints_are_judged(run: Path, toy_model: Path) -> None:
    assert names(run, "all") == [f"step-{step:08d}-ema" for step in (10, 20, 30, 40)]
    assert names(run, "every:20", "both") == [f"step-{step:08d}-{kind}" for step in (20, 40) for kind in ("ema", "raw")]
    assert names(run, "every 30", "raw") == ["step-00000030-raw"]
    assert names(run, "all", "raw")[0] == "step-00000020-raw"  # of step 10 the averaged weights alone were kept
    assert names(run, "last") == [""]
    assert subjects(str(run), Choice.parse("last"), "ema")[0].step == 40
    assert names(toy_model, "last", "both") == ["ema", "raw"]
    for choice, message in (
        ("each", "say last, all, or every N or every:N"),
        ("every:0", "say last"),
        ("every:7", "multiple of 7; say all, or name another run"),
    ):
        with pytest.raises(UserError, match=message):
            subjects(str(run), Choice.parse(choice), "ema")
    (run.parent / "empty/checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no checkpoint yet; train further, or name another run"):
        subjects(str(run.parent / "empty"), Choice.parse("all"), "ema")
    with pytest.raises(UserError, match="not a run with checkpoints"):
        subjects(str(toy_model), Choice.parse("all"), "ema")


def test_every_checkpoint_on_equal_prompts(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def judge(out: Path) -> None:
        main(Request(str(run), "video", 2, 3, out, 0, checkpoints="every:20", weights="ema"))

    judge(tmp_path / "a")
    shown = capsys.readouterr()
    assert "step-00000020-ema" in shown.out
    assert str(tmp_path / "a/report.html") in shown.out
    judge(tmp_path / "b")
    told = {}
    for step in (20, 40):
        name = f"step-{step:08d}-ema/evaluation.json"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        told[step] = json.loads((tmp_path / "a" / name).read_text())
        assert str(tmp_path) not in (tmp_path / "a" / name).read_text()
    first, last = (told[step]["protocol"] for step in (20, 40))
    assert {key for key in first if first[key] != last[key]} == {"model"}
    real = [{e["row"]: e["measures"] for e in told[step]["rows"]}["real"] for step in (20, 40)]
    assert real[0] == real[1]  # the same prompts and clips
    page = (tmp_path / "a/report.html").read_text()
    assert page.count("<polyline") > 5
    assert page.count('<video src="data:video/mp4;base64,') == 2 * 2 * 3  # prompts, checkpoints, rows
    assert "http" not in page


def test_a_run_is_followed_until_it_is_complete(
    toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkpoints, "POLL_SECONDS", 0.2)
    run, out = tmp_path / "run", tmp_path / "out"
    add_checkpoint(run, toy_model, 10)
    status = Status(step=10, steps=20)
    status.write(run)

    def trained_on() -> None:
        while not (out / "step-00000010-ema/evaluation.json").is_file():
            time.sleep(0.1)
        add_checkpoint(run, toy_model, 20)
        shutil.rmtree(run / "checkpoints/step-00000010")  # by retention
        status.state, status.step = "complete", 20
        status.write(run)

    thread = threading.Thread(target=trained_on)
    thread.start()
    main(Request(str(run), "image", 1, 0, out, 0, checkpoints="all", watch=True))
    thread.join()
    told = json.loads((out / "checkpoints.json").read_text())
    assert [entry["step"] for entry in told["checkpoints"]] == [10, 20]
    assert "complete at step 20" in capsys.readouterr().err


def test_who_waits_for_a_dead_run_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "POLL_SECONDS", 0.0)
    run, lines = tmp_path / "run", []
    run.mkdir()
    status = Status(step=12, steps=20)
    status.write(run)
    told = json.loads((run / "status.json").read_text())
    (run / "status.json").write_text(json.dumps({**told, "written": time.time() - 1800}))

    def say(line: str) -> None:
        lines.append(line)
        status.state = "complete"
        status.write(run)

    assert list(checkpoints.follow(str(run), Choice.parse("all"), "ema", [], say)) == []
    assert lines[0].endswith("(step 12, training, but silent for 30 min: has it died?)")
    assert len(lines) == 2


def test_a_better_checkpoint_is_told_from_a_worse_one(run: Path, tmp_path: Path) -> None:
    for step in (20, 40):
        request = Request(str(run / f"checkpoints/step-{step:08d}"), "video", 6, 3, tmp_path / str(step), 0)
        main(request)
    told = compared(tmp_path / "20", tmp_path / "40")
    assert {line["row"] for line in told} == {"video_real", "video_generated"}
    losses = [line for line in told if line["figure"].startswith("loss")]
    assert len(losses) == 8  # of the video stage, from real first images
    assert all(line["n"] == 6 for line in losses)
    assert "better" in {line["verdict"] for line in losses}  # the weights of step 20 were disturbed
    back = compared(tmp_path / "40", tmp_path / "20")
    assert [-line["difference"] for line in back] == pytest.approx([line["difference"] for line in told])
    turned = {"better": "worse", "worse": "better", "can't tell": "can't tell"}
    assert [turned[line["verdict"]] for line in back] == [line["verdict"] for line in told]
    same = compared(tmp_path / "40", tmp_path / "40")
    assert {line["verdict"] for line in same} == {"can't tell"}
    assert {line["difference"] for line in same} == {0.0}
    main(Request(str(run), "video", 6, 4, tmp_path / "other", 0))
    with pytest.raises(UserError, match=r"unequal protocols \(prompts: .*; seed: 3 and 4\)"):
        compared(tmp_path / "40", tmp_path / "other")
    with pytest.raises(UserError, match="holds no finished evaluation"):
        compared(tmp_path / "40", tmp_path)


def test_shards_are_judged_too(toy_model: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    write_world_shards(shards, num_clips=20, size=32, frames=8, fps=16, seed=1)
    request = Request(str(toy_model), "all", 18, 0, tmp_path / "out", data=str(shards), training=str(shards))
    main(request)
    told = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert {entry["split"] for entry in told["rows"]} == {"data"}
    assert told["bad"] == {}
    real = next(entry for entry in told["rows"] if entry["row"] == "real")
    assert real["n"] == 18
    assert real["shares"]["colour"]["share"] > 0.9  # these shards say what they show
    found = {(f["row"], f["figure"]) for f in told["figures"]}
    assert {("autoencoder", "frechet"), ("whole", "recall"), ("real", "text_to_image_r1")} <= found
    assert all(f["n"] == 18 for f in told["figures"])
    alone = {told["figure"].partition(",")[0]: told for told in told["alone"]["data"]}
    assert {"kernel distance", "CLIP score"} <= set(alone)
    assert set(alone["CLIP score"]["losses"]) == {"autoencoder", "image", "video", "interpolation"}
    cost = {line["figure"].partition(",")[0] for line in told["first_images"]["data"]}
    assert {"Frechet distance", "kernel distance (KID", "CLIP score", "first frame PSNR"} <= cost
    # The clips that are judged are the training clips themselves: the nearest one is at no distance.
    assert told["memorized"]["unseen"]["mean"] < 1e-3
    assert told["memorized"]["made"]["mean"] > 0.01
    assert told["memorized"]["nearer_than_usual"]["right"] == 0
    assert "Learned by heart?" in (tmp_path / "out/report.html").read_text()
    main(request)
    assert json.loads((tmp_path / "out/evaluation.json").read_text()) == told
    with pytest.raises(UserError, match="holds 20 samples, --num-prompts 21"):
        main(Request(str(toy_model), "all", 21, 0, tmp_path / "more", data=str(shards)))
    with pytest.raises(UserError, match="leave it out"):
        main(Request(str(toy_model), "all", 2, 0, tmp_path / "more", 2, data=str(shards)))


def test_a_restarted_watch_remembers_what_is_gone(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    request = Request(str(run), "image", 1, 0, out, 0, checkpoints="every:20")
    main(request)
    kept = (run / "checkpoints/step-00000020").rename(run / "checkpoints/average-00000020")  # by retention
    (kept / "model.yaml").write_text((kept / "model.yaml").read_text() + "\n# written anew\n")
    add_checkpoint(run, run / "checkpoints/step-00000040", 60)
    main(request)
    told = json.loads((out / "checkpoints.json").read_text())
    assert [entry["step"] for entry in told["checkpoints"]] == [20, 40, 60]
    assert (out / "report.html").read_text().count("step-00000020-ema") > 0


def test_weights_that_are_not_finite_show_nothing_and_end_nothing(run: Path, tmp_path: Path) -> None:
    """The other stages are judged all the same."""
    sick = add_checkpoint(tmp_path / "sick", run / "checkpoints/step-00000040", 5, noise=float("nan"))
    main(Request(str(sick), "video", 17, 0, tmp_path / "out", 0))
    text = (tmp_path / "out/evaluation.json").read_text()
    told = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    rows = {entry["row"]: entry for entry in told["rows"]}
    for row in ("video_real", "video_generated"):
        assert rows[row]["not_finite"] == rows[row]["n"] == 17
        assert rows[row]["measures"] == {}
        assert rows[row]["shares"]["colour"]["right"] == 0
    assert rows["real"]["measures"]["flicker"]["n"] == 17
    refused = [f for f in told["figures"] if f["row"].startswith("video")]
    assert refused
    assert all(f["n"] == 0 and f["not_finite"] == 17 and "refused" in f for f in refused)


def test_features_that_are_lost_are_made_again(toy_model: Path, tmp_path: Path) -> None:
    request = Request(str(toy_model), "image", 17, 0, tmp_path / "out", 0)
    main(request)
    before = (tmp_path / "out/evaluation.json").read_bytes()
    files = sorted((tmp_path / "out/features").glob("batch-*"))
    assert len(files) == 3
    files[0].write_bytes(files[0].read_bytes()[:100])
    files[1].unlink()
    main(request)
    assert (tmp_path / "out/evaluation.json").read_bytes() == before


def test_clips_that_can_not_be_read_are_counted(toy_model: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    write_world_shards(shards, num_clips=4, size=32, frames=2, fps=16, seed=1)  # shorter than the model's
    with pytest.raises(UserError, match="too short"):
        main(Request(str(toy_model), "video", 4, 0, tmp_path / "out", data=str(shards)))


def judges_file(folder: Path, what: str) -> Path:
    """A --judges file with one TorchScript network; `what` says its name and what it takes, in YAML."""
    told = saved_script(nn.Flatten(), folder / "judge.pt")
    path = folder / "judges.yaml"
    network = f"kind: torchscript, path: {told['path']}, sha256: {told['sha256']}, size: 16, range: [0, 1], {what}"
    path.write_text(f"features:\n  - {{{network}}}\n")
    return path


def test_a_network_that_sees_no_row_is_named_and_nothing_is_made_twice(toy_model: Path, tmp_path: Path) -> None:
    judges = judges_file(tmp_path, "name: I3D, takes: clips, frames: 16")
    request = Request(str(toy_model), "video", 2, 0, tmp_path / "out", 0, judges=judges)
    main(request)
    result = json.loads((tmp_path / "out/evaluation.json").read_text())
    reason = "it takes clips of 16 frames, these have 4"
    assert result["skipped"] == {"I3D on real, video_real, video_generated": reason}
    (kept,) = (tmp_path / "out/features").iterdir()
    before = kept.stat().st_mtime_ns
    main(request)
    assert kept.stat().st_mtime_ns == before


def test_the_tower_is_judged_whatever_networks_are_named(toy_model: Path, tmp_path: Path) -> None:
    judges = judges_file(tmp_path, "name: other, takes: pictures")
    main(Request(str(toy_model), "text", 24, 0, tmp_path / "out", 0, judges=judges))
    result = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert [judge["kind"] for judge in result["protocol"]["features"]] == ["bundled", "bundled", "torchscript"]
    assert json.dumps(result["figures"]).count('text_to_image_r1"') >= 1


def test_shards_without_captions_are_refused(toy_model: Path, tmp_path: Path) -> None:
    video = encode_video(np.zeros((16, 32, 32, 3), np.uint8), 16)
    silent = tarfile.TarInfo("silent.mp4")
    silent.size = len(video)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(silent, io.BytesIO(video))
    with pytest.raises(UserError, match="no sample can be asked about"):
        main(Request(str(toy_model), "video", 1, 0, tmp_path / "out", data=str(tmp_path / "a.tar")))


def test_the_towers_of_a_text_run_are_compared(toy_model: Path, tmp_path: Path) -> None:
    """Each judges itself; the raw weights are judged as the raw weights."""
    other = tmp_path / "other"
    shutil.copytree(toy_model, other)
    told = configs.load(ModelConfig, other / "model.yaml")
    state = load_file(other / "text.safetensors")
    save_file({key: -value if key == "text_projection" else value for key, value in state.items()}, other / "raw.st")
    assert told.text is not None
    raw = File(name="raw.st", sha256=sha256(other / "raw.st"))
    configs.save(ModelConfig(text=told.text.model_copy(update={"raw": raw})), other / "model.yaml")
    main(Request(str(other), "text", 24, 0, tmp_path / "out", 0, weights="both"))
    ema, unlike = (json.loads((tmp_path / "out" / n / "evaluation.json").read_text()) for n in ("ema", "raw"))
    assert ema["protocol"]["features"][0]["sha256"] == told.text.weights.sha256
    assert unlike["protocol"]["features"][0]["sha256"] == raw.sha256
    found = compared(tmp_path / "out/ema", tmp_path / "out/raw")
    assert {line["row"] for line in found} == {"real"}
    names = {line["figure"] for line in found}
    assert "captions that the text tower cuts, %" in names
    assert sum(name.startswith("CLIP score, ") for name in names) == 1  # with the network's name
    assert sum(line["figure"].startswith("clips found by their texts") for line in found) == 6  # by frames and by clips


def test_training_clips_are_looked_at_before_anything_is_computed(
    toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "short"
    write_world_shards(short, num_clips=3, size=32, frames=2, fps=8, seed=1)
    request = Request(str(toy_model), "video", 1, 0, tmp_path / "out", 0, training=str(short))
    with pytest.raises(UserError, match="--training: none of 3 clips has 4 frames at 8 fps; name the shards that"):
        main(request)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="nowhere"):
        main(replace(request, training=str(tmp_path / "nowhere")))
    # A clip that fails later costs its figure alone.
    long = tmp_path / "long"
    write_world_shards(long, num_clips=3, size=32, frames=4, fps=8, seed=1)

    def broken(*arguments: object) -> None:
        raise UserError(f"{long}/000.tar: torn")

    monkeypatch.setattr(command, "nearest_training_clips", broken)
    main(replace(request, training=str(long)))
    told = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert told["skipped"] == {"nearest training clips": "--training/000.tar: torn"}
    assert told["memorized"] is None


def test_a_checkpoint_that_went_half_way_is_judged_by_the_average_that_was_kept(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    request = Request(str(run), "image", 1, 0, out, 0, checkpoints="every:20")
    main(request)
    (out / "step-00000020-ema/evaluation.json").unlink()  # as if killed before the end
    kept = (run / "checkpoints/step-00000020").rename(run / "checkpoints/average-00000020")
    (kept / "model.yaml").write_text((kept / "model.yaml").read_text() + "\n# written anew\n")
    for _ in range(2):
        main(request)
        told = json.loads((out / "checkpoints.json").read_text())
        assert [entry["name"] for entry in told["checkpoints"]] == ["average-00000020-ema", "step-00000040-ema"]


def test_a_page_is_of_one_run_and_one_protocol(run: Path, toy_model: Path, tmp_path: Path) -> None:
    request = Request(str(run), "image", 1, 0, tmp_path / "out", 0, checkpoints="every:40")
    main(request)
    before = (tmp_path / "out/checkpoints.json").read_bytes()
    add_checkpoint(tmp_path / "other", toy_model, 80)
    for change, message in (
        ({"model": str(tmp_path / "other"), "checkpoints": "all"}, "holds evaluations of run, and this is other"),
        ({"seed": 1, "checkpoints": "every:30"}, r"by another protocol \(prompts: .*; seed: 0 and 1\); name another"),
        ({"checkpoints": "last"}, "evaluations of 1 checkpoints, of which a single one would write over the index"),
    ):
        with pytest.raises(UserError, match=message):
            main(replace(request, **change))
    assert (tmp_path / "out/checkpoints.json").read_bytes() == before


def test_a_checkpoint_is_done_when_it_is_judged(
    toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of step 20 is pruned to its average while that of step 10 is judged."""
    monkeypatch.setattr(checkpoints, "POLL_SECONDS", 0.0)
    for step in (10, 20):
        add_checkpoint(tmp_path, toy_model, step)
    Status(step=20, steps=20, state="complete").write(tmp_path)
    done: list[checkpoints.Subject] = []
    given = []
    for subject in checkpoints.follow(str(tmp_path), Choice.parse("all"), "ema", done, print):
        given.append(subject.folder.name)
        if subject.step == 10:
            (tmp_path / "checkpoints/step-00000020").rename(tmp_path / "checkpoints/average-00000020")
        if subject.folder.exists():
            done.append(subject)
    assert given == ["step-00000010", "step-00000020", "average-00000020"]


def test_a_page_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished evaluation"):
        write_report(tmp_path)


def spoil(checkpoint: Path) -> None:
    """A file that a disk cut short."""
    file = checkpoint / "video.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def test_a_checkpoint_that_is_spoiled_is_named_and_the_others_are_judged(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    sound = (run / "checkpoints/step-00000030/video.safetensors").read_bytes()
    spoil(run / "checkpoints/step-00000030")
    request = Request(str(run), "image", 1, 0, out, 0, checkpoints="all")
    main(request)
    told = json.loads((out / "checkpoints.json").read_text())
    assert [entry["step"] for entry in told["checkpoints"]] == [10, 20, 40]
    (reason,) = told["unread"].values()
    assert reason.startswith("step-00000030/video.safetensors: not the file that model.yaml was written with")
    said = capsys.readouterr().err
    assert "skipped step-00000030-ema: step-00000030/video.safetensors" in said
    assert said.endswith("1 of 4 checkpoints could not be read: step-00000030-ema\n")
    assert "Not judged: step-00000030-ema (step-00000030/video" in (out / "report.html").read_text()
    assert str(tmp_path) not in (out / "checkpoints.json").read_text()
    (run / "checkpoints/step-00000030/video.safetensors").write_bytes(sound)  # copied again
    main(request)
    told = json.loads((out / "checkpoints.json").read_text())
    assert ([entry["step"] for entry in told["checkpoints"]], "unread" in told) == ([10, 20, 30, 40], False)


def test_where_none_can_be_read_the_first_reason_is_told(run: Path, tmp_path: Path) -> None:
    for folder in (run / "checkpoints").glob("step-*"):
        spoil(folder)
    request = Request(str(run), "image", 1, 0, tmp_path / "out", 0, checkpoints="every:20")
    with pytest.raises(UserError, match=r"no checkpoint could be judged \(step-00000020-ema, .*; step-00000020/video"):
        main(request)
    # What no checkpoint is to blame for ends the call at once.
    with pytest.raises(UserError, match=r"judges\.yaml"):
        main(replace(request, checkpoints="every:10", judges=tmp_path / "judges.yaml"))


def test_a_spoiled_checkpoint_does_not_hold_up_who_follows(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "POLL_SECONDS", 0.0)
    spoil(run / "checkpoints/step-00000020")
    Status(step=40, steps=40, state="complete").write(run)
    main(Request(str(run), "image", 1, 0, tmp_path / "out", 0, checkpoints="every:20", watch=True))
    told = json.loads((tmp_path / "out/checkpoints.json").read_text())
    assert [entry["step"] for entry in told["checkpoints"]] == [40]
    assert list(told["unread"]) == ["step-00000020-ema"]


def test_run_and_folder_may_be_moved(run: Path, tmp_path: Path) -> None:
    main(Request(str(run), "image", 1, 0, tmp_path / "out", 0, checkpoints="every:20"))
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.move(run, tmp_path / "elsewhere/run"), shutil.move(tmp_path / "out", tmp_path / "elsewhere/out")
    before = {path: path.read_bytes() for path in Path(moved[1]).rglob("*.json") if path.name != "timings.json"}
    main(Request(str(moved[0]), "image", 1, 0, Path(moved[1]), 0, checkpoints="every:20"))
    assert {path: path.read_bytes() for path in before} == before
    assert len(before) == 3
