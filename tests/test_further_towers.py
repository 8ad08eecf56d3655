"""Text towers beside the first, through the real commands: taken over, carried, trained on, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from t5_folders import CAPTIONS, WIDTH, transformers, write_t5

from data_pipeline.shards import write_world_shards
from stages import image
from stages.assemble import load_stage, make_task, train_stage
from stages.cli import main
from stages.image import ImageStage
from stages.public_export import export_diffusers
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.model_folder import export
from videodiff.networks import tokenizer
from videodiff.networks.towers import TextTowers
from videodiff.parts import DESCRIPTION, T5Part, sha256

ROOT = Path(__file__).resolve().parents[1]
TEXT, IMAGE = ROOT / "configs/demo/text.yaml", ROOT / "configs/demo/image.yaml"
EVERY = ["run.save_every=1", "run.sample_every=2", "data.batch_size=4", "data.size=32", "data.workers=0"]
SMALL = ["num_merges=50", "network={width: 16, layers: 1, heads: 2, embed_dim: 16, image_size: 32, image_width: 16,"
         " image_layers: 1, image_heads: 2}"]  # fmt: skip
UNET = "channels: 4, model_channels: 16, channel_mult: [1], num_res_blocks: 1, attention_levels: [true]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5(tmp_path_factory.mktemp("t5") / "t5")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world_shards(tmp_path_factory.mktemp("shards"), 8, size=32, frames=4, fps=8, seed=1).parent


def further(path: Path, **more: object) -> str:
    return f"further=[{json.dumps({'kind': 't5', 'path': str(path), **more})}]"


def hidden_states(folder: Path, model: Model, tower: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """A tower's tokens of the captions, and transformers' from the folder; padding left out."""
    text = model.text
    assert isinstance(text, TextTowers)
    ids, mask = text.towers[tower].tokenizer(CAPTIONS)  # type: ignore[operator, union-attr]
    peer = transformers().T5EncoderModel.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = peer(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    return text.encode(CAPTIONS).towers[tower].tokens[mask], wanted[mask].float()


def test_from_two_towers_to_a_picture(
    toy_model: Path, folder: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small CLIP is trained with a T5 beside it, interrupted after a step; an image stage is trained on both."""
    given = [*EVERY, f"data.shards={shards}"]
    source = Path(shutil.copytree(folder, tmp_path / "t5"))
    text = [*given, *SMALL, f"run.dir={tmp_path}/text", f"model={toy_model}", "data.frames=4", "data.fps=8"]
    text.append(further(source, context_length=30))
    draft = tmp_path / "text" / "checkpoints" / "step-00000001.killed.tmp"  # of a start that was killed as it saved
    draft.mkdir(parents=True)
    (draft / DESCRIPTION).write_text("torn")
    train_stage(TEXT, [*text, "run.steps=1"])
    shutil.rmtree(source)  # a run that has a checkpoint has the tower too
    train_stage(TEXT, [*text, "run.steps=2"])
    model = Model.load(tmp_path / "text")
    assert model.text.widths == (16, WIDTH)
    torch.testing.assert_close(*hidden_states(folder, model), atol=1e-5, rtol=1e-5)
    assert model.text.encode(CAPTIONS).towers[1].tokens.shape == (4, 30, WIDTH)

    drawn = [*given, f"run.dir={tmp_path}/image", f"model={tmp_path}/text", f"network={{{UNET}, head_channels: 8}}"]
    train_stage(IMAGE, [*drawn, "run.steps=2", "sampling.sampler.steps=2"])
    model = Model.load(tmp_path / "image")
    part = model.diffusion("image")
    assert part.network.context_dims == (16, WIDTH)
    torch.testing.assert_close(*hidden_states(folder, model), atol=1e-5, rtol=1e-5)
    assert len((tmp_path / "image" / "metrics.jsonl").read_text().splitlines()) == 2

    export(model, tmp_path / "half", half=True)
    half = Model.load(tmp_path / "half")
    assert {value.dtype for value in load_file(half.folder / "text-2.safetensors").values()} == {torch.float16}
    torch.testing.assert_close(*hidden_states(folder, half), atol=0.05, rtol=0.05)
    torch.testing.assert_close(*hidden_states(folder, Model.load(tmp_path / "image")), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="2 towers"):
        export_diffusers(model, tmp_path / "diffusers")

    monkeypatch.chdir(tmp_path)
    asked = ["generate", "a red circle", "--image-only", "--steps", "2"]
    for name in ("image", "half"):
        with pytest.raises(SystemExit) as stop:
            main([*asked, "--model", name, "-o", f"{name}.png"])
        assert not stop.value.code
        assert Image.open(f"{name}.png").size == (32, 32)


def test_public_towers_alone_are_taken_over(toy_model: Path, folder: Path, shards: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = tokenizer.import_open_clip().create_model("ViT-S-32-alt").eval()
    clip = tmp_path / "clip" / "w.safetensors"
    clip.parent.mkdir()
    save_file({name: value.contiguous() for name, value in whole.state_dict().items()}, clip)
    public = {"name": "ViT-S-32-alt", "path": str(clip)}
    towers = [{"kind": "open_clip", **public}, {"kind": "t5", "path": str(folder)}]
    given = [f"data.shards={shards}", f"run.dir={tmp_path}/run", f"model={toy_model}"]
    given += [f"network={json.dumps({'pretrained': public})}", f"further={json.dumps(towers)}"]
    train_stage(TEXT, given)
    model = Model.load(tmp_path / "run")
    assert model.config.stages() == ["autoencoder", "text"]
    condition = model.text.encode(CAPTIONS).condition(torch.ones(4))
    assert [tokens.shape[2] for tokens in condition.text] == list(model.text.widths)
    assert model.text.widths == (model.text.widths[0],) * 2 + (WIDTH,)
    assert torch.equal(condition.text[0], condition.text[1])
    torch.testing.assert_close(*hidden_states(folder, model, tower=2), atol=1e-5, rtol=1e-5)
    # Models that stand on this one link to its files: taking over another T5 leaves them as they were.
    part = model.part("text").further[1]  # type: ignore[union-attr]
    assert isinstance(part, T5Part)
    files = [part.weights, part.settings, part.tokenizer]
    for file in files:
        (tmp_path / file.name).hardlink_to(model.folder / file.name)
    train_stage(TEXT, [*given[:-1], further(write_t5(tmp_path / "other", seed=1))])
    assert [sha256(tmp_path / file.name) for file in files] == [file.sha256 for file in files]
    assert Model.load(tmp_path / "run").text.widths == (model.text.widths[0], WIDTH)


def test_a_damaged_tower_is_found_when_the_model_is_opened(
    toy_model: Path, folder: Path, shards: Path, tmp_path: Path
) -> None:
    task = make_task(
        load_stage(
            TEXT,
            [*EVERY, *SMALL, f"run.dir={tmp_path}", f"data.shards={shards}", f"model={toy_model}", further(folder)],
        )
    )
    out = tmp_path / "out"
    out.mkdir()
    task.export(task.module.state_dict(), out, "ema.safetensors")
    assert Model.load(out).text.widths == (16, WIDTH)
    for name in ("text-2.config.json", "text-2.safetensors", "text-2.tokenizer.json"):
        (out / name).rename(tmp_path / "kept")
        with pytest.raises(UserError, match=f"{name}: missing"):
            Model.load(out)
        (tmp_path / "kept").rename(out / name)
    assert (out / DESCRIPTION).is_file()


# --- refusals ---------------------------------------------------------------------------------------------------------


def only_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "spiece.model"):
        (folder / name).unlink()


def another_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "bert"}')


def a_layer_less(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in state.items() if "encoder.block.1." not in name}, folder / "model.safetensors"
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (only_a_pickle, "only pickles"),
        (no_weights, "no model.safetensors"),
        (no_tokenizer, "neither tokenizer.json nor spiece.model"),
        (another_model, "'bert'"),
        (a_layer_less, "not this encoder's"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_wrong_folders_are_refused_before_a_tower_is_written(
    change: Callable[[Path], None], words: str, toy_model: Path, folder: Path, shards: Path, tmp_path: Path
) -> None:
    wrong = Path(shutil.copytree(folder, tmp_path / "t5"))
    change(wrong)
    given = [*EVERY, *SMALL, f"run.dir={tmp_path}/run", f"data.shards={shards}", f"model={toy_model}", further(wrong)]
    with pytest.raises(UserError, match=words) as refusal:
        make_task(load_stage(TEXT, given))
    assert "\n" not in str(refusal.value)
    assert not list((tmp_path / "run").glob("text-*"))


def test_shards_and_half_precision_are_read(toy_model: Path, folder: Path, shards: Path, tmp_path: Path) -> None:
    model = transformers().T5ForConditionalGeneration.from_pretrained(folder)
    source = tmp_path / "t5"
    model.to(torch.bfloat16).save_pretrained(source, max_shard_size="8KB")
    assert (source / "model.safetensors.index.json").is_file()
    shutil.copy(folder / "spiece.model", source)
    given = [*EVERY, *SMALL, f"run.dir={tmp_path}/run", f"data.shards={shards}", f"model={toy_model}", further(source)]
    task = make_task(load_stage(TEXT, given))
    task.export(task.module.state_dict(), tmp_path, "ema.safetensors")
    text = Model.load(tmp_path).text
    assert {parameter.dtype for parameter in text.towers[1].parameters()} == {torch.bfloat16}  # type: ignore[union-attr]
    torch.testing.assert_close(*hidden_states(source, Model.load(tmp_path)), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("widths", [[16], [16, 32], [WIDTH, 16]])
def test_widths_that_do_not_fit_are_refused(
    widths: list[int], toy_model: Path, folder: Path, shards: Path, tmp_path: Path
) -> None:
    given = [*EVERY, f"data.shards={shards}"]
    text = [*given, *SMALL, f"run.dir={tmp_path}/run", f"model={toy_model}", further(folder)]
    task = make_task(load_stage(TEXT, text))
    task.export(task.module.state_dict(), tmp_path, "ema.safetensors")
    network = f"network={{{UNET}, head_channels: 8, context_dims: {widths}}}"
    config = load_stage(IMAGE, [*given, f"run.dir={tmp_path}/image", network])
    assert isinstance(config, ImageStage)
    with pytest.raises(UserError, match=rf"network.context_dims: .* asks \[16, {WIDTH}\]"):
        image.task(config, Model.load(tmp_path))


def test_a_tower_is_not_written_over_itself(toy_model: Path, folder: Path, shards: Path) -> None:
    before = {path.name: sha256(path) for path in folder.iterdir()}
    given = [*EVERY, *SMALL, f"data.shards={shards}", f"model={toy_model}", further(folder), f"run.dir={folder}"]
    with pytest.raises(UserError, match="name a new folder"):
        make_task(load_stage(TEXT, given))
    assert {name: sha256(folder / name) for name in before} == before
