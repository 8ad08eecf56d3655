"""From a YAML to a stage's task: the text stage and the taking over of a public tower, what is refused before work."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from data_pipeline.shards import write_shard
from stages.assemble import load_stage, make_task, train_stage
from stages.text import TextTask
from videodiff.batch import VideoBatch
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.networks import tokenizer
from videodiff.parts import DESCRIPTION, VOCABULARY, WORDS

ROOT = Path(__file__).resolve().parents[1]
YAML = ROOT / "configs/demo/text.yaml"
SMALL = ["data.size=32", "data.batch_size=4", "data.workers=0", "engine.warmup_steps=0", "num_merges=50"]
SMALL += ["network={width: 16, layers: 1, heads: 2, embed_dim: 16, image_size: 32, image_width: 16, image_layers: 1,"
          " image_heads: 2}"]  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "a.tar"
    write_shard(path, [(f"{n}", b"never read", {"captions": [f"a circle number {n}"]}) for n in "abcd"])
    return path


@pytest.fixture
def given(shards: Path, toy_model: Path, tmp_path: Path) -> list[str]:
    return [*SMALL, f"run.dir={tmp_path / 'run'}", f"data.shards={shards}", f"model={toy_model}"]


@pytest.fixture
def task(given: list[str]) -> TextTask:
    task = make_task(load_stage(YAML, given))
    assert isinstance(task, TextTask)
    return task


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a public architecture, random, the file named by a link as a download cache does."""
    folder = tmp_path_factory.mktemp("public")
    whole = tokenizer.import_open_clip().create_model("ViT-S-32-alt")
    save_file({name: value.contiguous() for name, value in whole.state_dict().items()}, folder / "blob")
    (folder / "public.safetensors").symlink_to("blob")
    return folder / "public.safetensors"


def pretrained(path: Path) -> str:
    return f"network={{pretrained: {{name: ViT-S-32-alt, path: {path}}}}}"


def batch(weight: list[float], paint: int = 0) -> VideoBatch:
    frames = torch.randint(0, 256, (4, 4, 32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    frames[3] = paint
    return VideoBatch(
        frames=frames,
        captions=tuple(f"a circle number {n}" for n in "abcd"),
        fps=torch.full((4,), 8.0),
        numbers=torch.arange(4),
        keys=tuple("abcd"),
        weight=torch.tensor(weight),
    )


# --- the text stage ---------------------------------------------------------------------------------------------------


def test_a_bad_clip_is_no_negative(task: TextTask) -> None:
    def outcome(weight: list[float], paint: int) -> tuple[torch.Tensor, Any]:
        task.module.zero_grad()
        output = task.loss(task.module, batch(weight, paint), seed=0)
        losses = output.per_sample
        torch.where(torch.tensor(weight) > 0, losses, 0).sum().backward()
        grad = torch.cat([p.grad.flatten() for p in task.module.parameters() if p.grad is not None])
        return losses.detach()[:3], grad

    assert torch.isfinite(task.loss(task.module, batch([0, 0, 0, 0]), seed=0).per_sample).all()
    bad, bright = outcome([1, 1, 1, 0], 0), outcome([1, 1, 1, 0], 255)
    for one, other in zip(bad, bright, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other)
    assert not torch.allclose(outcome([1, 1, 1, 1], 0)[0], bad[0])
    alone = task.loss(task.module, batch([1, 1, 1, 0]).select(slice(3)), seed=0)
    torch.testing.assert_close(alone.per_sample.detach(), bad[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("engine.micro_batch=2", r"engine\.micro_batch=2: the text stage compares every sample"),
        (
            "network.image_size=64",
            r"image_size is 64, but film strips .* are 32 pixels wide; set network.image_size=32",
        ),
        ("network.vocabulary=v.gz", r"network\.vocabulary: the text stage makes its own"),
        ("network.words=words.txt", r"network\.words: the text stage makes its own"),
    ],
)
def test_what_the_text_stage_cannot_do_is_refused(given: list[str], override: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as refusal:
        make_task(load_stage(YAML, [*given, override]))
    assert "\n" not in str(refusal.value)


def test_a_run_folder_that_cannot_be_made_is_named_with_the_way_out(given: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=rf"^run\.dir={folder}: can't be written \(.*\); name another folder$"):
            make_task(load_stage(YAML, [*given, f"run.dir={folder}"]))


def test_the_whole_batch_as_micro_batch_is_no_accumulation(given: list[str]) -> None:
    make_task(load_stage(YAML, [*given, "engine.micro_batch=4"]))


def test_an_autoencoder_goes_on_only_with_the_network_it_has(tmp_path: Path, toy_model: Path) -> None:
    given = [f"run.dir={tmp_path}", f"model={toy_model}", "network.widths=[8, 24]"]
    with pytest.raises(UserError, match=r"network: differs .* leave it out"):
        make_task(load_stage(ROOT / "configs/demo/autoencoder.yaml", given))


def test_a_vocabulary_torn_by_a_kill_is_written_again(task: TextTask, given: list[str], tmp_path: Path) -> None:
    whole = task.vocabulary.read_bytes(), task.words.read_bytes()
    for left in ((), (VOCABULARY,), (WORDS,)):
        for name in {VOCABULARY, WORDS} - set(left):
            (tmp_path / "run" / name).unlink()
        make_task(load_stage(YAML, given))
        assert (task.vocabulary.read_bytes(), task.words.read_bytes()) == whole
    assert {path.name for path in (tmp_path / "run").iterdir()} == {VOCABULARY, WORDS}


# --- a public tower ---------------------------------------------------------------------------------------------------


def test_a_public_tower_is_taken_over_and_later_stages_are_left_behind(
    given: list[str], public: Path, tmp_path: Path
) -> None:
    train_stage(YAML, [*given, pretrained(public)])
    model = Model.load(tmp_path / "run")
    assert model.config.stages() == ["autoencoder", "text"]
    assert model.text.encode(["a red circle"]).tokens.shape[:2] == (1, 77)


def test_wrong_weights_are_refused_before_anything_is_written(given: list[str], toy_model: Path, public: Path) -> None:
    run = Path(next(g for g in given if g.startswith("run.dir=")).partition("=")[2])
    for path, problem in (
        (toy_model / "image.safetensors", "not the weights of this text tower"),
        (toy_model / DESCRIPTION, "no file of weights"),
        (toy_model / "none.safetensors", "no such file"),
    ):
        with pytest.raises(UserError, match=problem):
            train_stage(YAML, [*given, pretrained(path)])
    assert not run.exists()
    with pytest.raises(UserError, match="name a new folder"):
        train_stage(YAML, [*given, pretrained(public), f"run.dir={public.parent}"])
    assert public.is_file()


def test_one_rank_alone_writes_the_tower(given: list[str], public: Path, tmp_path: Path) -> None:
    """Each of two ranks is told a folder of its own: there is the first rank's only."""
    code = "import os, sys; from stages.assemble import train_stage; rank = os.environ['RANK'];"
    code += "train_stage(sys.argv[1], [a.replace('RANK', rank) for a in sys.argv[2:]])"
    (tmp_path / "start.py").write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:0", str(tmp_path / "start.py"), str(YAML), *given, pretrained(public)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, f"run.dir={tmp_path}/rank-RANK"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in tmp_path.glob("rank-*")] == ["rank-0"]
    assert Model.load(tmp_path / "rank-0").config.stages() == ["autoencoder", "text"]
