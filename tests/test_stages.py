"""The training tasks of the stages: what each is told, what trains, and what must stay as it was."""

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_stages import Clips, stage_config, trained

from data_pipeline.shards import write_world_shards
from data_pipeline.world import render_clip
from stages import image, interpolation, video
from stages.assemble import begin_with
from stages.autoencoder import AutoencoderStage, AutoencoderTask
from stages.base import Dropout, with_known
from stages.image import ImageStage
from stages.interpolation import InterpolationStage
from stages.pipeline import Pipeline, SampleKey
from stages.posteriors import PosteriorCache
from stages.video import VideoStage
from videodiff import config as configs
from videodiff.batch import Condition
from videodiff.diffusion.samplers import DDIM
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.model_folder import export, write_weights
from videodiff.networks.autoencoder import Autoencoder, AutoencoderConfig
from videodiff.networks.unet import is_temporal
from videodiff.parts import DESCRIPTION
from videodiff.training.trainer import RunConfig, train


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """Networks start from the same weights whichever tests ran before."""
    torch.manual_seed(0)


# --- known frames, windows, dropout -----------------------------------------------------------------------------------


def test_known_slots() -> None:
    assert image.known_slots(1) == ()
    assert video.known_slots(16) == (0,)
    assert interpolation.known_slots(9, 2) == (0, 2, 4, 6, 8)
    assert interpolation.windows(8, 37, 4, 4) == [0]
    assert interpolation.windows(15, 37, 4, 4) == [0, 7]
    assert interpolation.windows(16, 37, 4, 4) == [0, 7, 8]
    assert interpolation.known_slots(37, 4, 4) == (4, 8, 12, 16, 20, 24, 28, 32)  # Emu Video: 8 frames become 37


@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("keys_in_window", [2, 3, 5, 8])
def test_windows_cover_every_frame(keys_in_window: int, factor: int) -> None:
    frames = (keys_in_window - 1) * factor + 1
    for keys in range(2, 40):
        starts = interpolation.windows(keys, frames, factor)
        within = min(keys_in_window, keys)
        covered = [set(range(start, start + within)) for start in starts]
        assert set().union(*covered) == set(range(keys))
        assert starts == sorted(set(starts))
        for one, other in pairwise(covered):
            assert one & other  # each window starts from a frame that the one before it ends at or shows
        assert len(starts) == max(1, -(-(keys - 1) // (keys_in_window - 1)))  # no more than needed


def test_with_known_shows_the_given_frames_alone() -> None:
    latents = torch.randn(2, 4, 5, 3, 3)
    condition = with_known(Condition(), latents, (0, 2))
    assert condition.known is not None
    assert condition.known_mask is not None
    assert condition.known_mask.shape == (2, 1, 5, 3, 3)
    for frame in range(5):
        given = frame in (0, 2)
        assert torch.equal(condition.known[:, :, frame], latents[:, :, frame] if given else torch.zeros(2, 4, 3, 3))
        assert bool((condition.known_mask[:, :, frame] == float(given)).all())


def test_text_and_image_are_dropped_at_their_rates_separately_and_together() -> None:
    dropout, count = Dropout(text=0.1, image=0.05, both=0.2), 20_000
    text_dropped, image_dropped = dropout.draw(3, torch.arange(count))
    observed = {
        0.1: text_dropped & ~image_dropped,
        0.05: image_dropped & ~text_dropped,
        0.2: text_dropped & image_dropped,
        0.65: ~text_dropped & ~image_dropped,
    }
    for rate, rows in observed.items():
        assert abs(rows.double().mean() - rate) < 4 * (rate * (1 - rate) / count) ** 0.5
    again = dropout.draw(3, torch.tensor([7, 5]))  # by the sample's number, whatever its batch
    assert torch.equal(again[0], text_dropped[[7, 5]])
    nothing = Dropout(text=0, image=0, both=0).draw(3, torch.arange(100))
    assert not torch.stack(nothing).any()
    assert torch.stack(Dropout(text=0, image=0, both=1).draw(3, torch.arange(100))).all()


def test_probabilities_that_cannot_be_are_refused() -> None:
    for wrong in ({"text": -0.1}, {"text": 0.6, "image": 0.5}):
        with pytest.raises(UserError, match="dropout"):
            configs.build(VideoStage, {**configs.to_dict(_video(Path("x"))), "dropout": wrong}, "the test")


def _video(folder: Path, **more: Any) -> VideoStage:
    return stage_config(VideoStage, folder, frames=4, **more)


# --- the tasks --------------------------------------------------------------------------------------------------------


def test_the_image_enters_and_the_spatial_half_stays(toy_model: Path, tmp_path: Path) -> None:
    """20 steps of the video stage through the real engine: the requirement that a first image counts at all."""
    _check_video_stage(toy_model, tmp_path, steps=20)


@pytest.mark.slow
def test_the_spatial_half_stays_for_a_hundred_steps(toy_model: Path, tmp_path: Path) -> None:
    _check_video_stage(toy_model, tmp_path, steps=100)


def _check_video_stage(toy_model: Path, tmp_path: Path, steps: int) -> None:
    config = _video(tmp_path, temporal={"fps": True})
    config = config.model_copy(update={"run": config.run.model_copy(update={"steps": steps, "save_every": steps})})
    base = Model.load(toy_model)
    task = video.task(config, base)
    source = Clips(4, 8.0)
    batch = source.batch([0, 1])
    latents = task.latents(batch, seed=0)
    other = latents.flip(0)
    noise, time = torch.randn_like(latents), torch.tensor([900.0, 400.0])

    def outputs(network: torch.nn.Module) -> list[torch.Tensor]:
        conditions = [with_known(task.condition(batch, latents), first, (0,)) for first in (latents, other)]
        with torch.no_grad():
            return [network(noise, time, condition) for condition in conditions]

    before = outputs(task.module)
    assert torch.equal(*before)  # known frames enter through weights that start at zero
    spatial = {name: p.clone() for name, p in task.module.named_parameters() if not task.trains(name)}
    model = trained(config, task, source)
    network = model.unet("video")
    after = outputs(network)
    assert float((after[0] - after[1]).abs().max()) > 1e-3
    assert network.known_conv is not None
    assert network.known_conv.weight.abs().max() > 0
    assert not any(name in spatial for name in model.state("video"))  # stored once, in the image stage
    assert all(torch.equal(p, spatial[name]) for name, p in task.module.named_parameters() if name in spatial)
    assert {is_temporal(name) for name in spatial} == {False}
    image_network = base.unet("image")
    told = base.text.encode(list(batch.captions))
    condition = Condition(text=(told.tokens,), text_mask=(told.mask,), pooled=told.pooled, fps=batch.fps)
    with torch.no_grad():
        made = [unet(noise[:, :, :1], time, condition) for unet in (network, image_network)]
    assert torch.equal(*made)


def test_the_naive_way_is_told_the_text_alone(toy_model: Path, tmp_path: Path) -> None:
    """The same layers without a first image: what is given as one changes nothing, in training and in sampling."""
    base = Model.load(toy_model)
    config = _video(tmp_path, temporal={"fps": True}, first_image=False)
    naive, told = (video.task(c, base) for c in (config, _video(tmp_path, temporal={"fps": True})))
    names = [{name for name, _ in task.module.named_parameters() if task.trains(name)} for task in (naive, told)]
    assert names[1] - names[0] == {"known_conv.weight"}
    assert names[0] < names[1]
    batch = Clips(4, 8.0).batch([0, 1])
    assert naive.condition(batch, naive.latents(batch, 0)).known is None
    model = trained(config, naive, Clips(4, 8.0))
    assert not model.diffusion("video").first_image
    road, keys = Pipeline(model, "cpu"), [SampleKey(0, "a red circle")]
    side = base.diffusion("image").size // base.autoencoder.factor
    clips = [
        road.video(keys, torch.full((1, 4, 1, side, side), value), 8.0, model.diffusion("video").sampling)
        for value in (0.0, 3.0)
    ]
    assert torch.equal(*clips)
    with pytest.raises(UserError, match="given no frames"):
        interpolation.task(stage_config(InterpolationStage, tmp_path, frames=5, factor=2), model)


def test_a_run_is_a_function_of_its_seed(toy_model: Path, tmp_path: Path) -> None:
    """Wherever torch's own generator stands, as it does elsewhere in every process."""
    losses, weights = [], []
    network = configs.to_dict(Model.load(toy_model).diffusion("image").network)
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)
        told = {"dir": str(tmp_path / str(number)), "steps": 3, "save_every": 3, "sample_every": 0, "seed": seed}
        config = stage_config(ImageStage, tmp_path, 1, network=network, run=told)

        def prepare(config: ImageStage = config) -> tuple[Any, Clips]:
            return image.task(config, Model.load(toy_model)), Clips(1, 8.0)

        train(config.run, config.engine, config.data.batch_size, prepare, config)
        lines = (tmp_path / str(number) / "metrics.jsonl").read_text().splitlines()
        losses.append([(record["loss"], record["grad_norm"]) for record in map(json.loads, lines)])
        weights.append(Model.load(tmp_path / str(number)).unet("image").state_dict())
    assert losses[0] == losses[1] != losses[2]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0])


def test_the_image_stage_learns(toy_model: Path, tmp_path: Path) -> None:
    base = Model.load(toy_model)
    network = configs.to_dict(base.diffusion("image").network)
    config = stage_config(ImageStage, tmp_path, frames=1, network=network)
    task = image.task(config, base)
    assert all(task.trains(name) for name, _ in task.module.named_parameters())
    model = trained(config, task, Clips(1, 8.0))
    assert model.config.stages() == ["autoencoder", "text", "image"]  # the old video stage stood on another image stage
    assert not torch.equal(
        model.state("image")["conv_in.spatial.weight"], base.state("image")["conv_in.spatial.weight"]
    )
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 20


def test_a_learned_variance_goes_from_the_image_stage_to_the_video_stage(toy_model: Path, tmp_path: Path) -> None:
    """With importance sampling, interrupted: 20 steps in one go are 10, a restart and 10, to the last bit."""
    base = Model.load(toy_model)
    network = {**configs.to_dict(base.diffusion("image").network), "learn_variance": True}
    loss = {"importance": {"history": 1, "uniform_prob": 0.1}}
    schedule = {"num_steps": 8, "beta_start": 0.05, "beta_end": 0.5, "zero_terminal_snr": True}
    sampling = {"sampler": {"kind": "ddim", "steps": 4}}
    told = {"network": network, "loss": loss, "schedule": schedule, "sampling": sampling}
    models = []
    for folder, parts in (("straight", (20,)), ("parts", (10, 20))):
        for steps in parts:
            torch.manual_seed(0)
            config = stage_config(ImageStage, tmp_path / folder, frames=1, **told)
            config = config.model_copy(update={"run": config.run.model_copy(update={"steps": steps, "save_every": 10})})
            task = image.task(config, base)
            assert task.module.conv_out.spatial.out_channels == 8
            model = trained(config, task, Clips(1, 8.0))
        assert task.history is not None
        assert task.history.probabilities().std() > 0
        models.append(model)
    states = [model.state("image") for model in models]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert states[0]["conv_out.spatial.weight"][4:].abs().max() > 0  # the variance trained
    x = torch.randn(2, 4, 1, 8, 8)
    condition = task.condition(Clips(1, 8.0).batch([0, 1]), x)
    estimate = models[0].denoiser("image").estimate(x, torch.tensor([8, 3]), condition)
    assert estimate.x0.shape == x.shape
    assert estimate.variance_fraction is not None
    assert not (estimate.variance_fraction == 0.5).all()
    video_task = video.task(_video(tmp_path, temporal={"fps": True}, sampling=sampling), models[0])
    losses = video_task.loss(video_task.module, Clips(4, 8.0).batch([0, 1]), seed=0).per_sample
    losses.sum().backward()
    assert losses.isfinite().all()
    (tmp_path / "pictures").mkdir()
    video_task.sample(video_task.module, Clips(4, 8.0).batch([0, 1]), tmp_path / "pictures", 1)


def test_the_interpolation_stage_starts_from_the_video_stage(toy_model: Path, tmp_path: Path) -> None:
    base = Model.load(toy_model)
    config = stage_config(InterpolationStage, tmp_path, frames=5, fps=16.0)
    task = interpolation.task(config, base)
    state = task.module.state_dict()
    assert all(torch.equal(state[name], value) for name, value in base.state("video").items())
    assert all(torch.equal(state[name], value) for name, value in base.state("image").items())
    condition = task.condition(Clips(5, 16.0).batch([0]), torch.randn(1, 4, 5, 4, 4))
    assert condition.known_mask is not None
    assert condition.known_mask[0, 0, :, 0, 0].tolist() == [1, 0, 1, 0, 1]
    with pytest.raises(UserError, match="use 5"):
        interpolation.task(stage_config(InterpolationStage, tmp_path, frames=6), base)


def test_interpolation_as_published_reaches_beyond_what_is_given(toy_model: Path, tmp_path: Path) -> None:
    """Two frames on either side, noise on the given ones: trained, stored, and made in windows that share a frame."""
    base = Model.load(toy_model)
    noise = {"max_time": 250, "time": 100}
    config = stage_config(InterpolationStage, tmp_path, frames=9, fps=16.0, factor=2, offset=2, known_noise=noise)
    config = config.model_copy(update={"run": config.run.model_copy(update={"steps": 2, "save_every": 2})})
    task = interpolation.task(config, base)
    assert task.known_slots(9) == (2, 4, 6)
    batch = Clips(9, 16.0).batch([0, 1, 2, 3])
    x0 = task.latents(batch, 0)
    told = {seed: task.condition(batch, x0, seed).known for seed in (1, 2)}
    apart = {seed: (known - x0 * (known != 0)).square().mean((1, 2, 3, 4)) for seed, known in told.items()}
    assert not torch.equal(told[1], told[2])
    assert apart[1].unique().numel() == 4  # each sample has a time of its own
    levels = [(task.condition(batch, x0, seed, sampling=True).known != 0).sum() for seed in (1, 2)]
    assert levels[0] == levels[1] == 4 * 4 * 3 * 16  # three frames of 4x4 latents with 4 channels
    model = trained(config, task, Clips(9, 16.0))
    part = model.diffusion("interpolation")
    assert (part.frames, part.factor, part.offset, part.known_time) == (9, 2, 2, 100)
    pipeline, sampling = Pipeline(model), part.sampling.model_copy(update={"sampler": DDIM(steps=2)})
    for keys, frames in ((3, 9), (5, 13), (2, 7), (4, 11)):
        clip = torch.randn(1, 4, keys, 4, 4)
        smooth = pipeline.interpolation([SampleKey(0, "a red circle")], clip, 8.0, sampling)
        assert smooth.shape[2] == frames
        assert torch.equal(smooth[:, :, 2:-2:2], clip)
        assert (smooth.abs().amax((0, 1, 3, 4)) > 0).all()  # no frame was left out
    with pytest.raises(UserError, match=r"known_noise\.max_time: 5000 is beyond the schedule's 1000 steps"):
        interpolation.task(stage_config(InterpolationStage, tmp_path, frames=9, known_noise={"max_time": 5000}), base)
    with pytest.raises(UserError, match=r"\(T-1\)\*2\+1\+2\*2 with a factor of 2; use 9"):
        interpolation.task(stage_config(InterpolationStage, tmp_path, frames=10, offset=2), base)


def test_a_blend_is_exact_on_a_line_and_holds_its_ends() -> None:
    line = torch.arange(9.0).view(1, 1, 9, 1, 1) * torch.randn(2, 3, 1, 4, 4)
    for factor in (1, 2, 4):
        torch.testing.assert_close(interpolation.blended(line[:, :, ::factor], 9, factor), line)
    beyond = interpolation.blended(line[:, :, 2:7:2], 9, 2, offset=2)
    torch.testing.assert_close(beyond, line[:, :, [2, 2, 2, 3, 4, 5, 6, 6, 6]])


def test_interpolation_may_make_the_difference_from_the_blend(toy_model: Path, tmp_path: Path) -> None:
    """By a network of its own, which is stored whole."""
    base = Model.load(toy_model)
    own = base.config.video.network.model_copy(update={"model_channels": 24, "known_channels": False})  # type: ignore[union-attr]
    given = {"network": own.model_dump(mode="json"), "deviation": 0.5}
    dropout = {"text": 0.1, "image": 0.0, "both": 0.0}
    config = stage_config(InterpolationStage, tmp_path, frames=5, fps=16.0, dropout=dropout, **given)
    config = config.model_copy(update={"run": config.run.model_copy(update={"steps": 2, "save_every": 2})})
    task, batch = interpolation.task(config, base), Clips(5, 16.0).batch([0, 1])
    assert all(task.trains(name) for name, _ in task.module.named_parameters())
    difference = task.latents(batch, 0)
    assert (difference[:, :, ::2] == 0).all()
    assert (difference[:, :, 1::2] != 0).any()
    condition = task.condition(batch, difference)
    assert condition.known is not None
    assert condition.known_mask is not None
    assert condition.known_mask[0, 0, :, 0, 0].tolist() == [1, 0, 1, 0, 1]
    whole = super(interpolation.InterpolationTask, task).latents(batch, 0)
    torch.testing.assert_close(condition.known + 0.5 * difference, whole)
    assert torch.equal(task.frames(difference, batch), task.autoencoder.decode_clip(condition.known + 0.5 * difference))

    model = trained(config, task, Clips(5, 16.0))
    assert model.state("interpolation").keys() == task.module.state_dict().keys()
    pipeline, sampling = Pipeline(model), model.diffusion("interpolation").sampling
    clip, keys = torch.randn(2, 4, 4, 4, 4), [SampleKey(0, "a red circle"), SampleKey(0, "a blue square")]
    made = pipeline.interpolation(keys, clip, 8.0, sampling)
    assert torch.equal(made[:, :, ::2], clip)
    blend = interpolation.blended(clip, 7, 2)
    assert (made - blend).abs().max() > 1e-3
    part = model.diffusion("interpolation").model_copy(update={"deviation": 1e-9})
    model.config = model.config.model_copy(update={"interpolation": part})
    torch.testing.assert_close(Pipeline(model).interpolation(keys, clip, 8.0, sampling), blend)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"network": {"model_channels": 64}}, "network.temporal"),
        ({"deviation": 0.5}, "set dropout.image and .both to 0"),
        ({"deviation": 0.5, "known_noise": {}, "dropout": {"image": 0.0, "both": 0.0}}, "leave one of them out"),
        ({"deviation": 0.0}, "deviation"),
    ],
)
def test_a_difference_needs_a_blend_of_clean_frames(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        stage_config(InterpolationStage, tmp_path, frames=5, fps=16.0, **given)


def test_a_stage_may_begin_with_anothers_weights(toy_model: Path, tmp_path: Path) -> None:
    """Those that train here; frozen layers must be the same."""
    base = Model.load(toy_model)
    config = stage_config(VideoStage, tmp_path, frames=4)
    one, other = video.task(config, base), video.task(config, base)
    for name, parameter in one.module.named_parameters():
        if one.trains(name):
            parameter.data += 1.0
    part = base.diffusion("video")
    folder = tmp_path / "before"
    shutil.copytree(toy_model, folder)
    temporal = {name: value for name, value in one.module.state_dict().items() if is_temporal(name)}
    weights = write_weights(folder, "video.safetensors", temporal)
    changed = base.config.model_copy(update={"video": part.model_copy(update={"weights": weights})})
    configs.save(changed, folder / DESCRIPTION)
    begin_with(other, "video", Model.load(folder))
    assert all(torch.equal(value, one.module.state_dict()[name]) for name, value in other.module.state_dict().items())
    unfrozen = {**temporal, **{n: v + 1 for n, v in one.module.spatial_state().items()}}
    weights = write_weights(folder, "video.safetensors", unfrozen)
    changed = base.config.model_copy(update={"video": part.model_copy(update={"weights": weights})})
    configs.save(changed, folder / DESCRIPTION)
    with pytest.raises(
        UserError, match=r"init_from: the video stage of .* does not fit this network at .* froze the same"
    ):
        begin_with(other, "video", Model.load(folder))


def test_losses_are_told_by_quarter_of_the_times(toy_model: Path, tmp_path: Path) -> None:
    base = Model.load(toy_model)
    task = video.task(stage_config(VideoStage, tmp_path, frames=4), base)
    losses, t = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([0, 249, 250, 999, 500])
    found = task._by_quarter(losses, t, torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0]))
    assert {name: value.tolist() for name, value in found.items()} == {
        "loss_quarter_1": [3, 2], "loss_quarter_2": [3, 1], "loss_quarter_3": [0, 0], "loss_quarter_4": [4, 1],
    }  # fmt: skip


def test_an_unfrozen_spatial_half_is_the_interpolation_networks_too(toy_model: Path, tmp_path: Path) -> None:
    base = Model.load(toy_model)
    config = _video(tmp_path / "video", temporal={"fps": True}, freeze_spatial=False)
    config = config.model_copy(update={"run": config.run.model_copy(update={"steps": 2, "save_every": 2})})
    base = trained(config, video.task(config, base), Clips(4, 8.0))
    spatial = "conv_in.spatial.weight"
    assert not torch.equal(base.state("video")[spatial], base.state("image")[spatial])
    smooth = stage_config(InterpolationStage, tmp_path / "interpolation", frames=5, fps=16.0)
    smooth = smooth.model_copy(update={"run": smooth.run.model_copy(update={"steps": 2, "save_every": 2})})
    task = interpolation.task(smooth, base)
    exported = trained(smooth, task, Clips(5, 16.0))
    assert spatial not in exported.state("interpolation")  # frozen here, so stored by the video stage alone
    network = Model.load(exported.folder, "raw").unet("interpolation").state_dict()
    assert network.keys() == task.module.state_dict().keys()
    assert all(torch.equal(network[name], value) for name, value in task.module.state_dict().items())


MISTAKES = {
    "size and factor": ({"data": {"size": 36}}, "data.size: 36 is not a multiple of 8"),
    "size and levels": (
        {"data": {"size": 40}, "network": {"channel_mult": [1, 1], "attention_levels": [True, True]}},
        "data.size: 40 is not a multiple of 16",
    ),
    "latent channels": ({"network": {"channels": 8}}, "network.channels: 8 does not fit"),
    "tokens": ({"network": {"context_dims": [32]}}, r"network.context_dims: \[32\] does not fit .* \[16\]"),
    "pooled text": ({"network": {"pooled_dim": 32}}, "network.pooled_dim: 32 does not fit"),
    "steps": ({"sampling": {"sampler": {"kind": "ddim", "steps": 2000}}}, "sampler.steps is 2000"),
    "variance": (
        {"sampling": {"sampler": {"kind": "ddpm", "variance": "learned"}}},
        r"sampler.variance is learned, but .*network.learn_variance is false.* use variance: beta_tilde",
    ),
    "times": (
        {"sampling": {"sampler": {"kind": "ddim", "steps": 20, "spacing": "leading"}}},
        "leading begins at 951 .* spacing: trailing",
    ),
    "grey levels": ({"loss": {"levels": 256}}, "loss.levels: 256 grey levels"),
    "pair": ({"prediction": "eps"}, "prediction eps with schedule.zero_terminal_snr"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_does_not_fit_is_refused_before_training(mistake: str, toy_model: Path, tmp_path: Path) -> None:
    (change, problem), base = MISTAKES[mistake], Model.load(toy_model)
    network = configs.to_dict(base.diffusion("image").network)
    tree = configs.to_dict(stage_config(ImageStage, tmp_path, frames=1, network=network))
    image.task(configs.build(ImageStage, tree, "the test"), base)
    for key, value in change.items():
        tree[key] = {**tree[key], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=problem):
        image.task(configs.build(ImageStage, tree, "the test"), base)


@pytest.mark.parametrize("mistake", ["steps", "variance", "times", "pair"])
def test_what_the_yaml_alone_tells_is_refused_before_a_model_is_opened(mistake: str, tmp_path: Path) -> None:
    change, problem = MISTAKES[mistake]
    network = {"model_channels": 32, "channel_mult": [1], "attention_levels": [True], "head_channels": 8}
    tree = configs.to_dict(stage_config(ImageStage, tmp_path, frames=1, network=network)) | change
    with pytest.raises(UserError, match=problem):
        configs.build(ImageStage, tree, "the test")


def test_an_autoencoder_refuses_a_size_that_it_cannot_halve(tmp_path: Path) -> None:
    tree = configs.to_dict(stage_config(AutoencoderStage, tmp_path, frames=1))
    tree["data"]["size"] = 36
    with pytest.raises(UserError, match=r"data\.size: 36 is not a multiple of 8 .* use 32"):
        AutoencoderTask(configs.build(AutoencoderStage, tree, "the test"))


@pytest.mark.parametrize("crop", [12, 64])
def test_an_autoencoder_refuses_pieces_that_are_no_cells_of_a_frame(crop: int, tmp_path: Path) -> None:
    config = stage_config(AutoencoderStage, tmp_path, frames=1, crop=crop)
    with pytest.raises(UserError, match=rf"crop: {crop} .* factor 8 .* 32"):
        AutoencoderTask(config)


def test_the_image_network_takes_the_text_towers_widths(toy_model: Path, tmp_path: Path) -> None:
    base = Model.load(toy_model)
    network = configs.to_dict(base.diffusion("image").network)
    del network["context_dims"], network["pooled_dim"]
    task = image.task(stage_config(ImageStage, tmp_path, frames=1, network=network), base)
    assert task.module.config == task.part["network"] == base.diffusion("image").network


@pytest.mark.parametrize("odd", ["missing", "unexpected"])
def test_an_image_stage_that_is_not_whole_is_refused(odd: str, toy_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy_model, tmp_path / "model"))
    base = Model.load(folder)
    state, part = base.state("image"), base.diffusion("image")
    if odd == "missing":
        del state["conv_in.spatial.weight"]
    else:
        state["nonsense.weight"] = torch.zeros(1)
    part = part.model_copy(update={"weights": write_weights(folder, part.weights.name, state)})
    configs.save(base.config.model_copy(update={"image": part}), folder / DESCRIPTION)
    with pytest.raises(UserError, match="stage image do not fit"):
        video.task(_video(tmp_path, temporal={"fps": True}), Model.load(folder))


def test_activation_checkpointing_changes_no_loss(toy_model: Path, tmp_path: Path) -> None:
    batch, losses, calls = Clips(4, 8.0).batch([0, 1]), [], []
    for saving in (False, True):
        torch.manual_seed(0)
        config = _video(tmp_path, temporal={"fps": True}, activation_checkpointing=saving)
        task = video.task(config, Model.load(toy_model))
        seen: list[int] = []
        task.module.middle[0].register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))  # type: ignore[union-attr]
        losses.append(task.loss(task.module, batch, seed=1).per_sample)
        losses[-1].sum().backward()
        calls.append(len(seen))
    assert torch.equal(*losses)
    assert calls == [1, 2]


def test_a_sampler_that_draws_noise_makes_pictures(toy_model: Path, tmp_path: Path) -> None:
    base, batch = Model.load(toy_model), Clips(4, 8.0).batch([0, 1])
    config = _video(tmp_path, temporal={"fps": True}, sampling={"sampler": {"kind": "ddpm", "steps": 3}})
    task = video.task(config, base)
    for again in ("one", "two"):
        (tmp_path / again).mkdir()
        task.sample(base.unet("video"), batch, tmp_path / again, 3)
    one, two = ((tmp_path / again / "step-00000003.png").read_bytes() for again in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("limit", [1500, None])
def test_an_export_is_whole_or_not_there(limit: int | None, toy_model: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    code = (
        "import resource, sys; from stages.cli import main;"
        f"limit = {limit} or resource.RLIM_INFINITY; resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit));"
        f"main(['export', {str(toy_model)!r}, '--out', 'out'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    if limit is None:
        assert done.returncode == 0, done.stderr
        assert Model.load(tmp_path / "out").config.stages() == Model.load(toy_model).config.stages()
    else:
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert "autoencoder.safetensors" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if limit is None else [])


def test_an_export_spares_what_is_in_a_folder(toy_model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else already"):
        export(Model.load(toy_model), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_diffusion_loss_follows_the_sample_not_its_batch(toy_model: Path, tmp_path: Path) -> None:
    task = video.task(_video(tmp_path, temporal={"fps": True}), Model.load(toy_model))
    source = Clips(4, 8.0)
    together = task.loss(task.module, source.batch([3, 4, 5]), seed=1).per_sample
    alone = [task.loss(task.module, source.batch([number]), seed=1).per_sample for number in (3, 4, 5)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, task.loss(task.module, source.batch([3, 4, 5]), seed=2).per_sample)


def test_sample_pictures_are_written(toy_model: Path, tmp_path: Path) -> None:
    base, batch = Model.load(toy_model), Clips(4, 8.0).batch([0, 1])
    video.task(_video(tmp_path, temporal={"fps": True}), base).sample(base.unet("video"), batch, tmp_path, 3)
    config = stage_config(AutoencoderStage, tmp_path, frames=1, network=_autoencoder(base))
    AutoencoderTask(config).sample(base.autoencoder, batch, tmp_path, 4)
    assert [path.name for path in sorted(tmp_path.glob("*.png"))] == ["step-00000003.png", "step-00000004.png"]


def _autoencoder(base: Model) -> dict[str, Any]:
    return configs.to_dict(base.part("autoencoder").network)  # type: ignore[union-attr]


@pytest.mark.parametrize("crop", [None, 16])
def test_the_autoencoder_learns_and_measures_its_latents(crop: int | None, toy_model: Path, tmp_path: Path) -> None:
    shards = write_world_shards(tmp_path / "shards", 6, 32, 1, 8.0, 0).parent
    config = stage_config(AutoencoderStage, tmp_path, frames=1, crop=crop, network=_autoencoder(Model.load(toy_model)))
    config = config.model_copy(update={"data": config.data.model_copy(update={"shards": str(shards)})})
    source = Clips(1, 8.0)  # what trains; the task opens the shards itself to measure
    task = AutoencoderTask(config)
    batch = source.batch(list(range(6)))
    before = float(task.loss(task.module, batch, seed=0).per_sample.detach().mean())
    model = trained(config, task, source)
    assert float(task.loss(task.module, batch, seed=0).per_sample.detach().mean()) < 0.8 * before
    latents = model.autoencoder.encode_clip(batch.frames)
    spread = latents.mean.transpose(0, 1).flatten(1).var(1) + latents.std.square().mean((0, 2, 3, 4))
    assert bool(((spread > 0.8) & (spread < 1.2)).all())  # the run sees these six clips alone


def test_an_autoencoder_that_goes_on_trains_its_decoder_alone(toy_model: Path, tmp_path: Path) -> None:
    base, source = Model.load(toy_model), Clips(1, 8.0)
    config = stage_config(AutoencoderStage, tmp_path, frames=1)
    task = AutoencoderTask(config, base)
    batch = source.batch(list(range(6)))
    before = float(task.loss(task.module, batch, seed=0).per_sample.detach().mean())
    model = trained(config, task, source)
    assert float(task.loss(task.module, batch, seed=0).per_sample.detach().mean()) < 0.9 * before
    old, new = base.state("autoencoder"), model.state("autoencoder")
    assert new.keys() == old.keys()
    changed = {name.partition(".")[0] for name in new if not torch.equal(new[name], old[name])}
    assert changed == {"decoder"}  # the encoder and what latents are divided by stay


def test_run_config_is_the_one_that_others_rely_on() -> None:
    assert {"dir", "steps", "save_every", "seed"} <= set(RunConfig.model_fields)


@pytest.mark.parametrize("frames", [1, 5])
@pytest.mark.parametrize("room", [0, 1 << 30])
def test_latents_do_not_depend_on_the_batch_a_clip_is_met_in(frames: int, room: int) -> None:
    torch.manual_seed(0)
    autoencoder = Autoencoder(AutoencoderConfig(latent_channels=2, patch=2, widths=[8, 8]))
    clips = torch.from_numpy(np.stack([render_clip(0, n, 32, frames, 8.0).frames for n in range(7)]))
    whole = PosteriorCache(autoencoder, room)(clips)
    for rows in ([0], [6, 2], [3, 3, 5, 1], list(range(6, -1, -1))):
        other = PosteriorCache(autoencoder, room)
        for _ in range(2):  # made, then remembered
            for part, same in zip(other(clips[rows]), whole, strict=True):
                assert torch.equal(part, same[rows])
    alone = autoencoder.encode_clip(clips[2:3])
    torch.testing.assert_close(whole[0][2:3], alone.mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole[1][2:3], alone.std, atol=1e-5, rtol=1e-5)
