"""`videodiff checkpoint list|verify|reshape` on the checkpoints of a real run."""

import multiprocessing
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tiny_training import run_tiny, tiny

from stages.cli import main
from stages.runs import reshape
from videodiff.errors import UserError
from videodiff.training.checkpoint import fault
from videodiff.training.fragments import Fragments


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with a checkpoint of each."""
    run = tmp_path_factory.mktemp("runs") / "run"
    run_tiny(tiny(run, run__steps=2, run__save_every=1))
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def tell(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, list[str]]:
    with pytest.raises(SystemExit) as end:
        main(["checkpoint", *map(str, arguments)])
    told = capsys.readouterr()
    return int(end.value.code or 0), (told.out + told.err).splitlines()


def test_sound_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (run / f"checkpoints/step-{step:08d}" for step in (1, 2))
    code, lines = tell(capsys, "list", run)
    assert code == 0
    assert [line.partition(": ")[0] for line in lines] == [str(one), str(two)]
    assert lines[1].startswith(f"{two}: step 2, 0.0 MB, written by 1 rank, 0 steps skipped, sound")
    assert tell(capsys, "verify", run) == (0, [f"{one}: sound", f"{two}: sound"])
    assert tell(capsys, "verify", two) == (0, [f"{two}: sound"])


def test_broken_checkpoints_are_a_line_each(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (run / f"checkpoints/step-{step:08d}" for step in (1, 2))
    torn = two / "engine/rank-00000.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    code, lines = tell(capsys, "list", run)
    assert (code, len(lines)) == (0, 2)
    assert lines[1].startswith(f"{two}: broken (")
    problem = "engine/rank-00000.safetensors is not what was written"
    assert tell(capsys, "verify", run) == (1, [f"{one}: sound", f"{two}: {problem}"])
    code, lines = tell(capsys, "reshape", two, "--ranks", 2, "--out", run / "new")
    assert (code, lines) == (2, [f"videodiff: error: {two}: {problem}; take another checkpoint"])
    (one / "state.json").write_text("{}")
    (two / "manifest.json").unlink()
    assert [": broken (" in line for line in tell(capsys, "list", run)[1]] == [True, True]
    assert tell(capsys, "list", run.parent)[0] == 2


def test_a_reshaped_one_is_the_same_state(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = run / "checkpoints/step-00000002", run.parent / "new"
    assert tell(capsys, "reshape", run, "--ranks", 3, "--out", new) == (0, [f"wrote {new}"])
    assert fault(new) is None
    names = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in (old, new)]
    assert {str(name) for name in names[0] ^ names[1]} == {f"engine/rank-0000{n}.safetensors" for n in (1, 2)}
    before, after = Fragments(old / "engine"), Fragments(new / "engine")
    assert (len(before), len(after), before.counters, before.contents) == (1, 3, after.counters, after.contents)
    for key in before.contents:
        size = before.size(*key)
        assert torch.equal(before.read(*key, 0, size), after.read(*key, 0, size))
    code, lines = tell(capsys, "reshape", run, "--ranks", 2, "--out", new)
    assert (code, lines) == (2, [f"videodiff: error: {new}: exists already; name a new folder"])
    shutil.rmtree(old)
    shutil.move(new, old)
    run_tiny(tiny(run, run__steps=3))  # and a run goes on from it


def reshape_on_a_full_disk(run: Path, limit: int, answers: multiprocessing.SimpleQueue) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        reshape(run, 1, run.parent / "new")
    except UserError as error:
        answers.put(str(error))


@pytest.mark.parametrize("file", ["ema.safetensors", "engine/rank-00000.safetensors"])
def test_a_full_disk_is_one_line_and_leaves_no_draft(run: Path, file: str) -> None:
    size = (run / "checkpoints/step-00000002" / file).stat().st_size
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=reshape_on_a_full_disk, args=(run, size - 1, answers))
    process.start()
    process.join(60)
    message = answers.get()
    assert message.startswith(f"{run.parent / 'new'}: cannot be written ({Path(file).name}: File too large); make room")
    assert [path.name for path in run.parent.iterdir()] == ["run"]
