"""Image prompts: what they replace, their own weights alone in training, and the video stage that hears them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_stages import Clips, stage_config, trained, with_extras

from stages import image_prompt, video
from stages.base import DiffusionTask
from stages.image_prompt import ImagePromptStage
from stages.pipeline import Pipeline, SampleKey, adjusted
from stages.video import VideoStage
from videodiff.batch import Condition, Encoded, VideoBatch
from videodiff.config import ConfigError
from videodiff.diffusion.denoiser import Denoiser
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.networks.image_prompt import ImagePrompt, ImagePromptConfig, prompted
from videodiff.seeding import generator

NETWORK = {"width": 8, "side": 2}
STAGE = {"stage": "image_prompt", "network": NETWORK}


def task_of(model: Path, folder: Path, steps: int = 2, **more: Any) -> tuple[ImagePromptStage, Any]:
    torch.manual_seed(0)
    config = stage_config(ImagePromptStage, folder, **{"frames": 3, **STAGE, **more})
    config = config.model_copy(update={"run": config.run.model_copy(update={"steps": steps, "save_every": 2})})
    return config, image_prompt.task(config, Model.load(model))


def test_a_prompt_says_what_the_first_known_frame_shows_and_nothing_else() -> None:
    torch.manual_seed(0)
    prompt = ImagePrompt(ImagePromptConfig(width=8, side=2), 3, (6, 10), 5)
    known, mask = torch.randn(2, 3, 4, 4, 4), torch.zeros(2, 1, 4, 4, 4)
    mask[0, :, 1], mask[1, :, 2] = 1, 1
    text = (torch.randn(2, 7, 6), torch.randn(2, 7, 10))
    masks = (torch.ones(2, 7, dtype=torch.bool),) * 2
    told = Condition(text, masks, torch.randn(2, 5), known * mask, mask, torch.full((2,), 8.0))
    found = prompted(prompt, told, torch.float32)
    tokens, pooled = prompt(torch.stack([known[0, :, 1], known[1, :, 2]]))
    assert [tuple(part.shape) for part in found.text] == [(2, 4, 6), (2, 4, 10)]
    assert all(torch.equal(a, b) for a, b in zip(found.text, tokens, strict=True))
    assert torch.equal(found.pooled, pooled)
    assert all(bool(part.all()) for part in found.text_mask)
    assert found.known is None
    assert not torch.equal(tokens[0][0], tokens[0][1])
    other = prompted(prompt, replace(told, text=tuple(part + 1 for part in text)), torch.float32)
    assert torch.equal(other.text[0], found.text[0])
    blank = prompted(prompt, told.without("image"), torch.float32)
    assert torch.equal(blank.text[0][0], blank.text[0][1])  # no picture says the same of all


def test_the_last_frame_is_made_of_the_first_and_the_prompt_trains_alone(toy_model: Path, tmp_path: Path) -> None:
    config, task = task_of(toy_model, tmp_path)
    base = Model.load(toy_model)
    batch = Clips(3, 8.0).batch([0, 1])
    target = task.latents(batch, seed=5)
    condition = task.condition(batch, target)
    ends = DiffusionTask.latents(task, replace(batch, frames=batch.frames[:, [0, 2]]), 5)
    assert torch.equal(target, ends[:, :, 1:])
    assert condition.known is not None
    assert torch.equal(condition.known, ends[:, :, :1])
    before = {name: value.clone() for name, value in task.module.state_dict().items()}
    model = trained(config, task, Clips(3, 8.0))
    changed = {name for name, value in task.module.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("prompt.") for name in changed)
    assert model.config.stages() == [*base.config.stages(), "image_prompt"]
    part = model.part("image_prompt")
    assert part.network == ImagePromptConfig(**NETWORK)
    Pipeline(model).load()
    assert model.image_prompt.state_dict().keys() == model.state("image_prompt").keys()


@pytest.mark.parametrize(
    ("given", "words"), [({"frames": 1}, "two frames of a clip"), ({"data.size": 64}, "the image stage of")]
)
def test_clips_that_teach_nothing_are_refused(
    given: dict[str, Any], words: str, toy_model: Path, tmp_path: Path
) -> None:
    size = given.pop("data.size", 32)
    config = stage_config(ImagePromptStage, tmp_path, **{"frames": 2, **STAGE, **given})
    config = config.model_copy(update={"data": config.data.model_copy(update={"size": size})})
    with pytest.raises(UserError, match=words):
        image_prompt.task(config, Model.load(toy_model))


def test_a_video_stage_begins_with_the_models_prompt_and_paints_what_it_says(toy_model: Path, tmp_path: Path) -> None:
    """At the start the temporal layers add nothing: each frame is what the image network makes of the prompt."""
    config, task = task_of(toy_model, tmp_path / "prompt")
    model = trained(config, task, Clips(3, 8.0))
    told = stage_config(VideoStage, tmp_path / "video", frames=4, temporal={"fps": True, "image_prompt": NETWORK})
    made = video.task(told, model)
    batch = Clips(4, 8.0).batch([0, 1])
    latents = made.latents(batch, seed=0)
    condition = made.condition(batch, latents)
    time = torch.tensor([900.0, 300.0])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        made.module.known_conv.weight.zero_()
        clip = made.module(noise, time, condition)
        image = model.unet("image")
        for frame in range(4):
            alone = image(noise[:, :, frame : frame + 1], time, prompted_by(model, condition))
            torch.testing.assert_close(clip[:, :, frame : frame + 1], alone, atol=1e-4, rtol=1e-4)
    after = trained(told, made, Clips(4, 8.0))
    names = set(after.state("video"))
    assert {name for name in names if name.startswith("temporal_image_prompt.")}
    road = Pipeline(after, "cpu")
    side = after.diffusion("image").size // after.autoencoder.factor
    clips = [
        road.video([SampleKey(0, "a red circle")], torch.full((1, 4, 1, side, side), value), 8.0,
                   after.diffusion("video").sampling)
        for value in (0.0, 3.0)
    ]  # fmt: skip
    assert not torch.equal(*clips)


@pytest.mark.parametrize("encoded", [False, True])
def test_imagined_samples_learn_what_the_image_stage_makes_of_their_caption(
    encoded: bool, toy_model: Path, tmp_path: Path
) -> None:
    """Each by its own number and caption, whatever is beside it; the others learn from their clips."""
    batch, base = Clips(3, 8.0).batch(list(range(8, 16))), Model.load(toy_model)
    _, clips = task_of(toy_model, tmp_path)
    _, mixed = task_of(toy_model, tmp_path, imagined=0.5)
    if encoded:
        batch = replace(batch, encoded=encoded_by(base, batch))
    real, made = clips.latents(batch, seed=5), mixed.latents(batch, seed=5)
    told, first = mixed.condition(batch, made).known, clips.condition(batch, real).known
    assert told is not None
    assert first is not None
    imagined = [not torch.equal(made[i], real[i]) for i in range(8)]
    assert 0 < sum(imagined) < 8
    image = base.diffusion("image")
    denoiser = Denoiser(base.unet("image"), image.schedule, image.prediction)
    for i in range(8):
        if not imagined[i]:
            assert torch.equal(told[i], first[i])
            continue
        by = [generator(5, "imagined picture", 8 + i)]
        noise = torch.randn(made.shape[1:], generator=by[0])[None]
        heard = base.text.encode([batch.captions[i]]).condition(torch.full((1,), 8.0))
        with torch.no_grad():
            alone = image.sampling.sampler(image.sampling.guidance(denoiser, heard), noise, image.schedule, by)
        near = 2e-2 if encoded else 1e-4  # encoded text is in half precision
        torch.testing.assert_close(made[i], alone[0], atol=near, rtol=near)
        assert torch.equal(told[i], made[i])
    some = batch.select(slice(3, 6))
    torch.testing.assert_close(mixed.latents(some, seed=5), made[3:6], atol=1e-4, rtol=1e-4)


def encoded_by(model: Model, batch: VideoBatch) -> Encoded:
    with torch.no_grad():
        posterior, heard = model.autoencoder.encode_clip(batch.frames), model.text.encode(list(batch.captions))
    text = heard.condition(batch.fps)
    pooled = None if text.pooled is None else text.pooled.half()
    tokens = tuple(part.half() for part in text.text)
    return Encoded(posterior.mean.half(), posterior.std.half(), tokens, text.text_mask, pooled)


def test_an_image_told_a_picture_hears_nothing_else(toy_model: Path, tmp_path: Path) -> None:
    model = Model.load(with_extras(toy_model, tmp_path / "model"))
    road, keys = Pipeline(model), [SampleKey(0, "a red circle")]
    image = model.diffusion("image")
    side = image.size // model.autoencoder.factor
    pictures = torch.randn(2, 1, 4, 1, side, side, generator=torch.Generator().manual_seed(0))
    made = [road.prompted_image(keys, picture, image.sampling) for picture in pictures]
    assert not torch.equal(*made)
    louder = adjusted(image.sampling, text=7.0, image=3.0)
    assert torch.equal(road.prompted_image(keys, pictures[0], louder), made[0])


def prompted_by(model: Model, condition: Condition) -> Condition:
    return prompted(model.image_prompt, condition, torch.float32)


def test_a_video_stage_that_hears_what_is_not_there_is_refused(toy_model: Path, tmp_path: Path) -> None:
    asked = {"temporal": {"fps": True, "image_prompt": NETWORK}, "frames": 4}
    with pytest.raises(UserError, match="holds no image_prompt stage"):
        video.task(stage_config(VideoStage, tmp_path, **asked), Model.load(toy_model))
    config, task = task_of(toy_model, tmp_path / "prompt")
    model = trained(config, task, Clips(3, 8.0))
    asked["temporal"] = {"fps": True, "image_prompt": {"width": 16, "side": 2}}
    with pytest.raises(UserError, match="use its values"):
        video.task(stage_config(VideoStage, tmp_path, **asked), model)
    with pytest.raises(ConfigError, match="no first image where first_image is false"):
        stage_config(VideoStage, tmp_path, **asked, first_image=False)
    asked["temporal"]["text_attention"] = False
    with pytest.raises(ConfigError, match="no layer would hear the text"):
        stage_config(VideoStage, tmp_path, **asked)
