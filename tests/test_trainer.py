"""The loop: exact resume, signals, bad samples, what a run writes; one process and two, real files and processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_training import PACE, TinyConfig, TinySource, TinyTask, run_tiny, tiny

from videodiff import config as configs
from videodiff.batch import VideoBatch
from videodiff.errors import UserError
from videodiff.training.trainer import train

SCRIPT = Path(__file__).with_name("tiny_training.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


def lines(config: TinyConfig) -> list[dict[str, Any]]:
    text = Path(config.run.dir, "metrics.jsonl").read_text()
    return [{k: v for k, v in json.loads(line).items() if k not in PACE} for line in text.splitlines()]


def weights(config: TinyConfig, step: int, kind: str) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run.dir, "checkpoints", f"step-{step:08d}", f"{kind}.safetensors"))


def assert_same_run(a: TinyConfig, b: TinyConfig, step: int = 4) -> None:
    """Equal to the last bit: losses, keys, rates, norms, raw weights and their average."""
    assert lines(a) == lines(b)
    assert len(lines(a)) == step
    for kind in ("raw", "ema"):
        left, right = weights(a, step, kind), weights(b, step, kind)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def launch(
    *configs_: TinyConfig, ranks: int = 1, status: int = 0, limit: int | None = None, kill_at: int | None = None
) -> str:
    command = [*TORCHRUN, f"--nproc-per-node={ranks}"] if ranks > 1 else [sys.executable]
    texts = [json.dumps(configs.to_dict(config)) for config in configs_]
    folder = Path(configs_[0].run.dir).parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    environment["PYTHONPATH"] = str(SCRIPT.parents[1])
    if limit is not None:
        environment["TINY_FILE_LIMIT"] = str(limit)
    if kill_at is not None:
        environment["TINY_KILL_AT"] = str(kill_at)
    done = subprocess.run(
        [*command, str(SCRIPT), *texts], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_four_steps_are_two_and_a_restart_and_two(tmp_path: Path, stage: int, precision: str) -> None:
    engine = {"zero_stage": stage, "precision": precision, "micro_batch": 4, "warmup_steps": 3}
    straight = tiny(tmp_path / "straight", engine=engine)
    run_tiny(straight)
    run_tiny(tiny(tmp_path / "parts", engine=engine, run__steps=2))
    parts = tiny(tmp_path / "parts", engine=engine)
    run_tiny(parts)
    assert_same_run(straight, parts)
    records = lines(straight)
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    assert [record["samples"] for record in records] == [[f"key-{8 * s + i}" for i in range(8)] for s in range(4)]
    assert all(record["loss"] > 0 and record["grad_norm"] > 0 for record in records)
    assert weights(straight, 4, "raw").keys() == {"0.weight", "3.weight", "3.bias", "scale"}  # no frozen 0.bias
    assert weights(straight, 4, "raw")["scale"] == torch.tensor([1 / 3])  # buffers in full precision


@pytest.mark.parametrize("stage", [1, 2])
def test_one_process_alone_shards_nothing(tmp_path: Path, stage: int) -> None:
    plain, asked = (
        tiny(tmp_path / f"zero-{zero}", engine={"zero_stage": zero, "precision": "fp32"}) for zero in (0, stage)
    )
    for config in (plain, asked):
        run_tiny(config)
    assert_same_run(plain, asked)


def memory(config: TinyConfig, step: int) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run.dir, "checkpoints", f"step-{step:08d}", "memory.safetensors"))


def test_what_a_task_remembers_is_kept_and_resumed_exactly(tmp_path: Path) -> None:
    importance = {"history": 1, "uniform_prob": 0.1}
    straight = tiny(tmp_path / "straight", importance=importance, bad=[5])
    run_tiny(straight)
    run_tiny(tiny(tmp_path / "parts", importance=importance, bad=[5], run__steps=2))
    parts = tiny(tmp_path / "parts", importance=importance, bad=[5])
    begun = {name: value.clone() for name, value in memory(parts, 2).items()}
    run_tiny(parts)
    assert_same_run(straight, parts)
    kept = memory(straight, 4)
    assert all(torch.equal(kept[name], memory(parts, 4)[name]) for name in kept)
    assert begun["loss_counts"].tolist() == [1, 1, 1, 1]  # so that the steps after the restart drew by it
    assert not torch.equal(begun["loss_history"], kept["loss_history"])
    times = [line["mean_time"] for line in lines(straight)]
    forgetful = tiny(tmp_path / "uniform", importance={"history": 1000}, bad=[5])
    run_tiny(forgetful)
    assert [line["mean_time"] for line in lines(forgetful)][:1] == times[:1]
    assert [line["mean_time"] for line in lines(forgetful)] != times
    assert memory(forgetful, 4)["loss_counts"].sum() == 31  # each sample of four steps but the bad one
    # Cut into other micro-batches, the steps draw the same times.
    pieces = tiny(tmp_path / "pieces", importance=importance, bad=[5], engine__micro_batch=8, run__steps=1)
    run_tiny(pieces)
    assert lines(pieces)[0]["mean_time"] == times[0]


def test_two_processes_zero_1_2_3_resume_exactly(tmp_path: Path) -> None:
    def runs(name: str, steps: int) -> list[TinyConfig]:
        plain = [
            tiny(tmp_path / f"{name}-{stage}", run__steps=steps, engine__zero_stage=stage, engine__micro_batch=2)
            for stage in (1, 2, 3)
        ]
        remembers = {"importance": {"history": 1, "uniform_prob": 0.1}, "engine__micro_batch": 2}
        return [*plain, tiny(tmp_path / f"{name}-remembers", run__steps=steps, **remembers)]

    straight, first, rest = runs("straight", 4), runs("parts", 2), runs("parts", 4)
    launch(*straight, *first, ranks=2)
    output = launch(*rest, ranks=2)
    for a, b in zip(straight, rest, strict=True):
        assert_same_run(a, b)
    kept = memory(straight[-1], 4)
    assert kept["loss_counts"].min() == 1
    assert all(torch.equal(kept[name], memory(rest[-1], 4)[name]) for name in kept)
    assert "resumed after step 2" in output
    assert "2 processes x 2 x 2 samples" in output
    assert not (tmp_path / "extensions").exists()  # nothing was compiled
    # Another number of processes meets the same samples.
    one = tiny(tmp_path / "one", engine__micro_batch=2)
    run_tiny(one)
    assert [r["samples"] for r in lines(one)] == [r["samples"] for r in lines(straight[0])]
    assert lines(one)[0]["loss"] == pytest.approx(lines(straight[0])[0]["loss"], rel=0.2)  # dropout differs


def test_twenty_steps_are_ten_and_a_killed_rank_and_ten(tmp_path: Path) -> None:
    """Two ranks, ZeRO 1, 2 and 3, equal to the last bit; one is killed after some steps that no checkpoint holds."""

    def run(name: str, stage: int) -> TinyConfig:
        return tiny(tmp_path / f"{name}-{stage}", run__steps=20, run__save_every=10, engine__zero_stage=stage)

    launch(*[run("straight", stage) for stage in (1, 2, 3)], ranks=2)
    for stage in (1, 2, 3):
        launch(run("killed", stage), ranks=2, status=1, kill_at=8 * 13 + 7)
        assert [path.name for path in (tmp_path / f"killed-{stage}/checkpoints").iterdir()] == ["step-00000010"]
        assert len(lines(run("killed", stage))) == 13
    assert "resumed after step 10" in launch(*[run("killed", stage) for stage in (1, 2, 3)], ranks=2)
    for stage in (1, 2, 3):
        assert_same_run(run("straight", stage), run("killed", stage), 20)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_saves_and_the_same_command_goes_on(
    tmp_path: Path, number: int, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    straight = tiny(tmp_path / "straight")
    run_tiny(straight)
    stopped = tiny(tmp_path / "stopped", signal=int(number), signal_at=20)  # sample 20 is met in step 3
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as exit_:
        run_tiny(stopped)
    assert exit_.value.code == status
    assert signal.getsignal(number) == before
    assert "saved after step 3; the same command goes on" in capsys.readouterr().out
    assert len(lines(stopped)) == 3
    run_tiny(stopped)  # the sample that sends the signal lies behind
    assert_same_run(straight, stopped)


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    straight, killed = tiny(tmp_path / "straight"), tiny(tmp_path / "killed", run__steps=2)
    run_tiny(straight)
    run_tiny(killed)
    with open(tmp_path / "killed" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 9.0, "samples": []}\n{"step": 4, "lo')
    killed = tiny(tmp_path / "killed")
    run_tiny(killed)
    assert_same_run(straight, killed)


def test_a_changed_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    run_tiny(tiny(tmp_path / "run", run__steps=1))
    with pytest.raises(UserError, match=r"engine\.learning_rate: 0\.01 -> 0\.02.*name a new run\.dir"):
        run_tiny(tiny(tmp_path / "run", engine__learning_rate=0.02))


def test_a_start_that_failed_binds_nobody(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="micro_batch=3 does not divide"):
        run_tiny(tiny(tmp_path / "run", engine__micro_batch=3, engine__learning_rate=0.02))
    mended = tiny(tmp_path / "run")
    run_tiny(mended)
    assert configs.load(TinyConfig, tmp_path / "run" / "config.yaml") == mended


def test_a_second_start_is_refused_while_the_first_trains(tmp_path: Path) -> None:
    config, outputs = tiny(tmp_path / "run", run__steps=2), []

    class Source(TinySource):
        def batches(self, *position: int) -> Iterator[VideoBatch]:
            outputs.append(launch(config, status=2))
            yield from super().batches(*position)

    train(config.run, config.engine, config.batch_size, lambda: (TinyTask(config), Source()), config)
    assert outputs[0].splitlines()[-1].startswith(f"run.dir={config.run.dir}: process {os.getpid()} on ")
    assert "Traceback" not in outputs[0]
    run_tiny(tiny(tmp_path / "run"))  # the end of the first releases the folder


def test_samples_that_can_not_be_drawn_end_all_processes(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", run__steps=2, run__sample_every=2)
    Path(config.run.dir).mkdir()
    Path(config.run.dir, "samples").write_text("a file stands here")
    output = launch(config, ranks=2, status=1)  # torchrun's own status
    assert output.count("FileExistsError: ") == 1  # of rank 0, the other ends without a word
    assert weights(config, 2, "ema")  # what was trained is kept


def test_other_data_and_other_frozen_layers_are_refused(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", run__steps=1)
    run_tiny(config)
    config = tiny(tmp_path / "run", run__steps=2)
    task, source = TinyTask(config), TinySource()
    source.fingerprint = "other shards"
    with pytest.raises(UserError, match="written with source synthetic, now other shards"):
        train(config.run, config.engine, config.batch_size, lambda: (task, source), config)
    task = TinyTask(config)
    task.module[0].bias.data[0] += 1e-3
    with pytest.raises(UserError, match="frozen layers are not those it trained on"):
        train(config.run, config.engine, config.batch_size, lambda: (task, TinySource()), config)


def test_a_bad_sample_weighs_nothing(tmp_path: Path) -> None:
    """Its slot stays; the loss is the mean over the others, whatever micro-batch they fall in."""
    settings: dict[str, Any] = {"engine__precision": "fp32", "engine__micro_batch": 2, "run__steps": 1}
    bad = tiny(tmp_path / "bad", bad=[1, 2, 3], **settings)
    run_tiny(bad)
    task, source = TinyTask(bad), TinySource()
    batch = source.batch(torch.arange(8))
    kept = [0, 4, 5, 6, 7]
    # Dropout draws differ between batches: compare without.
    still = tiny(tmp_path / "still", bad=[1, 2, 3], **settings)
    task_without_dropout = TinyTask(still)
    task_without_dropout.module[1].p = 0.0
    train(still.run, still.engine, 8, lambda: (task_without_dropout, TinySource((1, 2, 3))), still)
    task.module[1].p = 0.0
    expected = task.loss(task.module, batch, 0).per_sample[kept].mean()
    assert lines(still)[0]["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert lines(bad)[0]["samples"] == [f"key-{i}" for i in range(8)]
    assert lines(bad)[0]["bad_samples"] == 3


def test_gradients_that_are_not_finite_are_skipped_and_counted(tmp_path: Path) -> None:
    run_tiny(tiny(tmp_path / "run", poison=[9], run__save_every=1, run__keep_last=9))
    config = tiny(tmp_path / "run", poison=[9], run__save_every=1, run__keep_last=9)
    records = lines(config)
    assert [record["skipped"] for record in records] == [0, 1, 1, 1]
    assert records[1]["loss"] is None  # JSON has no infinity
    first, second, third = (weights(config, step, "raw") for step in (1, 2, 3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(second["3.weight"], third["3.weight"])


def test_ten_such_steps_in_a_row_end_the_run(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", poison=list(range(16, 1000, 8)), run__steps=50, run__save_every=2)
    with pytest.raises(UserError, match=r"step 12: gradients were not finite 10 times in a row; .*key-88, key-89"):
        run_tiny(config)
    # A restart does not begin to count anew. Two ranks skip what is met by one, and stop together: one tells of it.
    output = launch(config, ranks=2, status=1)  # torchrun's own status
    assert output.count("gradients were not finite 10 times in a row") == 1
    assert "step 12: " in output
    assert "key-88, key-89, key-90, key-91, key-92, key-93, key-94, key-95" in output


def test_samples_are_drawn_from_the_average_and_change_nothing(tmp_path: Path) -> None:
    plain, sampled = tiny(tmp_path / "plain"), tiny(tmp_path / "sampled", run__sample_every=2)
    run_tiny(plain)
    run_tiny(sampled)
    assert_same_run(plain, sampled)
    drawn = load_file(tmp_path / "sampled" / "samples" / "step-00000004.safetensors")
    average = weights(sampled, 4, "ema")
    assert torch.equal(drawn["3.weight"], average["3.weight"].bfloat16().float())
    assert "0.bias" in drawn  # the whole module, frozen layers and all
    assert sorted(path.name for path in (tmp_path / "sampled" / "samples").iterdir())[0].startswith("step-00000002")


def test_a_finished_run_says_so_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(tmp_path / "run", run__steps=2)
    run_tiny(config)
    before = lines(config)
    run_tiny(config)
    assert lines(config) == before
    assert "2 steps done" in capsys.readouterr().out


def test_a_file_gets_few_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_tiny(tiny(tmp_path / "run", run__steps=30, run__log_every=10, batch_size=2))
    steps = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["10/30", "20/30", "30/30"]
    assert all(word in steps[0] for word in ("loss", "grad_norm", "lr", "s/step", "min left"))
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_weights_and_biases_hears_of_it_when_wished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    with pytest.raises(UserError, match=r"run\.wandb=demo: wandb is not installed; pip install 'videodiff\[wandb\]'"):
        run_tiny(tiny(tmp_path / "without", run__wandb="demo"))
    monkeypatch.undo()
    pytest.importorskip("wandb")
    run_tiny(tiny(tmp_path / "with", run__wandb="demo", run__steps=2))
    run_tiny(tiny(tmp_path / "with", run__wandb="demo"))
    assert len(list((tmp_path / "with" / "wandb").glob("offline-run-*"))) == 2  # one run's number for both starts


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir=.*can't be written"):
        run_tiny(tiny(tmp_path / "file" / "run"))


def test_a_folder_that_has_become_read_only(tmp_path: Path) -> None:
    """An old run on a disk that can only be read now: one line, and nothing of it changes."""
    config = tiny(tmp_path / "run", run__steps=2)
    run_tiny(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    command = [sys.executable, str(SCRIPT), json.dumps(configs.to_dict(tiny(tmp_path / "run")))]
    if os.geteuid() == 0:  # whom no permissions hold back: a disk of its own, in a namespace
        mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
        command = ["unshare", "--mount", "sh", "-c", mount, str(tmp_path / "run"), *command]
        if subprocess.run([*command[:6], "true"], capture_output=True, check=False).returncode:
            pytest.skip("no namespaces here")
    else:
        (tmp_path / "run").chmod(0o555)
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    (tmp_path / "run").chmod(0o755)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"run.dir={tmp_path / 'run'}: can't be written (")
    assert "Traceback" not in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_a_copy_without_its_checkpoints_is_not_begun_anew(tmp_path: Path) -> None:
    run_tiny(tiny(tmp_path / "run", run__steps=2))
    shutil.copytree(tmp_path / "run", tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    copy = tiny(tmp_path / "copy")
    for _ in range(2):
        with pytest.raises(UserError, match=r"copy/checkpoints: no checkpoint is there, but status.json tells of one"):
            run_tiny(copy)
    assert len(lines(copy)) == 2
    shutil.copytree(tmp_path / "run/checkpoints", tmp_path / "copy/checkpoints")
    run_tiny(copy)
    assert len(lines(copy)) == 4


def test_a_copy_without_the_newest_checkpoint_says_so_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(tmp_path / "run", run__save_every=2)
    run_tiny(config)
    shutil.copytree(tmp_path / "run", tmp_path / "copy", ignore=shutil.ignore_patterns("step-00000004"))
    capsys.readouterr()
    run_tiny(tiny(tmp_path / "copy", run__save_every=2))
    told = f"{tmp_path / 'copy'}: status.json tells of a checkpoint of step 4, the newest here is of step 2; it goes on"
    assert told in capsys.readouterr().out
    assert_same_run(config, tiny(tmp_path / "copy", run__save_every=2))


def test_a_status_that_can_not_be_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("videodiff.training.run_folder.STATUS_SECONDS", 0)
    loss = TinyTask.loss

    def losing(self: TinyTask, module: Any, batch: VideoBatch, seed: int) -> Any:
        path = tmp_path / "run/status.json"
        if 8 in batch.numbers.tolist():  # the second step: nothing can be moved to a folder's place
            path.unlink()
            path.mkdir()
        if 24 in batch.numbers.tolist():
            path.rmdir()
        return loss(self, module, batch, seed)

    monkeypatch.setattr(TinyTask, "loss", losing)
    run_tiny(tiny(tmp_path / "run"))
    told = [line for line in capsys.readouterr().out.splitlines() if "training goes on" in line]
    assert len(told) == 1
    assert told[0].startswith(f"{tmp_path / 'run/status.json'}: can't be written (")
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "complete"


def test_metrics_that_can_not_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"run/metrics.jsonl: can't be written \(No space left on device\); make room"):
        run_tiny(tiny(tmp_path / "run"))


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    config = tiny(tmp_path / "run", run__steps=2)
    launch(config)
    config = tiny(tmp_path / "run", run__steps=4)
    output = launch(config, status=2, limit=4000)
    message = [line for line in output.splitlines() if "could not be written" in line]
    assert len(message) == 1
    assert "step-00000002 is untouched" in message[0]
    assert "Traceback" not in output
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.slow
def test_two_processes_stop_together_on_a_signal_to_one(tmp_path: Path) -> None:
    straight = tiny(tmp_path / "straight")
    stopped = tiny(tmp_path / "stopped", signal=int(signal.SIGTERM), signal_at=20)  # rank 1 alone meets sample 20
    launch(straight, ranks=2)
    assert "saved after step 3" in launch(stopped, ranks=2, status=1)  # torchrun's own status
    assert sorted(path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()) == ["step-00000003"]
    launch(stopped, ranks=2)
    assert_same_run(straight, stopped)
