"""Checkpoints that a kill, a bad disk or a full one can't spoil: real files, real processes that die."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from videodiff.errors import LostError, UserError
from videodiff.model import Model
from videodiff.training import checkpoint
from videodiff.training.checkpoint import MANIFEST, Checkpoints, fault, seal


def fill(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "engine").mkdir()
        (folder / "engine" / "rank0.pt").write_text(text * 100)
        (folder / "state.json").write_text(json.dumps({"text": text}))

    return write


@pytest.fixture
def checkpoints(tmp_path: Path) -> Checkpoints:
    return Checkpoints(tmp_path / "checkpoints", keep_last=2)


def test_the_newest_is_found_and_old_ones_go(checkpoints: Checkpoints) -> None:
    assert checkpoints.newest() is None
    for step in (10, 20, 30):
        assert checkpoints.write(step, fill(str(step)), 1000).name == f"step-{step:08d}"
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000020", "step-00000030"]
    newest = checkpoints.newest()
    assert newest is not None
    assert json.loads((newest / "state.json").read_text()) == {"text": "30"}


def test_copies_beside_them_are_no_checkpoints(checkpoints: Checkpoints) -> None:
    for step in (9, 10):
        checkpoints.write(step, fill(str(step)), 1000)
    for name in ("step-00000010-r4", "step-00000011.x.tmp", "step-"):
        shutil.copytree(checkpoints.folder / "step-00000010", checkpoints.folder / name)
    assert checkpoints.last_step() == 10
    assert checkpoints.newest() == checkpoints.folder / "step-00000010"


def cut(folder: Path) -> None:
    path = folder / "engine" / "rank0.pt"
    path.write_bytes(path.read_bytes()[:-1])


def flip(folder: Path) -> None:
    path = folder / "engine" / "rank0.pt"
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "rank0.pt is not what was written"),
        (flip, "rank0.pt is not what was written"),
        (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "it has no manifest.json"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {"a'), "manifest.json can't be read"),
        (lambda folder: (folder / MANIFEST).write_text("[1]"), "manifest.json can't be read"),
    ],
    ids=["cut", "bit", "missing", "no-manifest", "torn-manifest", "odd-manifest"],
)
def test_a_broken_one_is_named_and_the_one_before_counts(
    checkpoints: Checkpoints, damage: Callable[[Path], None], words: str
) -> None:
    for step in (1, 2):
        checkpoints.write(step, fill(str(step)), 1000)
    damage(checkpoints.folder / "step-00000002")
    with pytest.warns(UserWarning, match=f"step-00000002: skipped, .*{words}"):
        newest = checkpoints.newest()
    assert newest == checkpoints.folder / "step-00000001"
    damage(newest)
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(UserError, match="no checkpoint is sound"):
        checkpoints.newest()
    checkpoints.write(2, fill("again"), 1000)  # the step is done again, over its broken remains
    assert checkpoints.newest() == checkpoints.folder / "step-00000002"


def test_a_broken_one_does_not_outlive_the_sound_one_below(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep_last=1)
    checkpoints.write(200, fill("200"), 1000)
    cut(checkpoints.folder / "step-00000200")
    for step in (120, 140):  # the run went on from 100
        checkpoints.write(step, fill(str(step)), 1000)
        assert [path.name for path in checkpoints.folder.iterdir()] == [f"step-{step:08d}"]
        assert checkpoints.newest() == checkpoints.folder / f"step-{step:08d}"


def test_averages_stay_for_good(toy_model: Path, tmp_path: Path) -> None:
    """Of every second checkpoint, as a model of its own without raw weights; the run keeps the last two alone."""

    def copy(folder: Path) -> None:
        shutil.copytree(toy_model, folder, dirs_exist_ok=True)

    checkpoints = Checkpoints(tmp_path, 2, keep_average_every=4)
    for step in range(2, 13, 2):
        checkpoints.write(step, copy, 1000)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["average-00000004", "average-00000008", "step-00000010", "step-00000012"]
    assert Model.load(tmp_path / "average-00000004").config.stages() == Model.load(toy_model).config.stages()


def test_an_average_that_can_not_be_kept_ends_nothing(toy_model: Path, tmp_path: Path) -> None:
    """The old checkpoint has rotted since it was written; what a killed export left goes with the next save."""

    def copy(folder: Path) -> None:
        shutil.copytree(toy_model, folder, dirs_exist_ok=True)

    checkpoints = Checkpoints(tmp_path, 1, keep_average_every=2)
    checkpoints.write(2, copy, 1000)
    path = next((tmp_path / "step-00000002").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])
    (tmp_path / ".average-00000001.7.tmp").mkdir()
    with pytest.warns(UserWarning, match=rf"average-00000002: not kept: .*{path.name}"):
        checkpoints.write(4, copy, 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]
    checkpoints.write(6, copy, 1000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["average-00000004", "step-00000006"]


@pytest.mark.parametrize("failures", [2, 3])
def test_a_disk_that_is_away_for_a_moment_costs_no_checkpoint(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    for step in (1, 2):
        checkpoints.write(step, fill(str(step)), 1000)
    left, digest = [OSError(errno.ESTALE, "Stale file handle")] * failures, checkpoint._sha256

    def away(path: Path) -> str:
        if left:
            raise left.pop()
        return digest(path)

    monkeypatch.setattr(checkpoint, "_sha256", away)
    monkeypatch.setattr(checkpoint, "READ_PAUSES", (0.0, 0.0))
    if failures == 3:
        with pytest.raises(LostError, match=r"step-00000002: can't be read now \(Stale file handle\); the same"):
            checkpoints.newest()
    assert checkpoints.newest() == checkpoints.folder / "step-00000002"


def test_who_may_not_publish_leaves_everything_as_it_is(tmp_path: Path) -> None:
    def refuse() -> None:
        raise LostError("another has taken over")

    Checkpoints(tmp_path, 1, token="a").write(1, fill("1"), 1000)
    with pytest.raises(LostError):
        Checkpoints(tmp_path, 1, token="b", may_publish=refuse).write(2, fill("2"), 1000)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_what_is_not_whole_is_not_sealed(checkpoints: Checkpoints) -> None:
    checkpoints.write(1, fill("1"), 1000)
    with pytest.raises(UserError, match="1 of 2 ranks' files are there"):
        checkpoints.write(2, fill("2"), 1000, lambda folder: "1 of 2 ranks' files are there")
    assert checkpoints.newest() == checkpoints.folder / "step-00000001"


def die_at(folder: Path, moment: str) -> None:
    """Write step 2 and be killed: in the middle of a file, before the manifest, or just before the rename."""

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write(draft: Path) -> None:
        (draft / "engine.pt").write_text("half")
        if moment == "file":
            kill()
        fill("2")(draft)
        if moment == "manifest":
            kill()
        seal(draft)
        kill()

    Checkpoints(folder, 2).write(2, write, 1000)


@pytest.mark.parametrize("moment", ["file", "manifest", "rename"])
def test_a_kill_while_writing_costs_nothing(checkpoints: Checkpoints, moment: str) -> None:
    checkpoints.write(1, fill("1"), 1000)
    process = multiprocessing.get_context("fork").Process(target=die_at, args=(checkpoints.folder, moment))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert checkpoints.newest() == checkpoints.folder / "step-00000001"
    checkpoints.write(2, fill("2"), 1000)
    assert not list(checkpoints.folder.glob("*.tmp"))
    assert checkpoints.newest() == checkpoints.folder / "step-00000002"


def test_too_little_room_is_said_before_writing(checkpoints: Checkpoints) -> None:
    checkpoints.write(1, fill("1"), 1000)
    with pytest.raises(UserError, match=r"the disk has [\d,]+ MB free; make room"):
        checkpoints.write(2, fill("2"), shutil.disk_usage(checkpoints.folder).free * 2)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000001"]


def write_on_a_full_disk(folder: Path, answers: multiprocessing.SimpleQueue) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, 50))
    try:
        Checkpoints(folder, 2).write(2, fill("2"), 10)
    except UserError as error:
        answers.put(str(error))


def test_a_disk_that_fills_up_while_writing(checkpoints: Checkpoints) -> None:
    checkpoints.write(1, fill("1"), 1000)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=write_on_a_full_disk, args=(checkpoints.folder, answers))
    process.start()
    process.join(60)
    message = answers.get()
    assert "checkpoint of step 2 could not be written (File too large)" in message
    assert "step-00000001 is untouched" in message
    assert "\n" not in message
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step-00000001"]
    assert fault(checkpoints.folder / "step-00000001") is None


def test_a_folder_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file stands here")
    with pytest.raises(UserError, match="can't be written"):
        Checkpoints(tmp_path / "checkpoints", 2).write(1, fill("1"), 1000)
