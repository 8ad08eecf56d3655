"""Every YAML that we ship loads, and names networks that fit together."""

from pathlib import Path

import pytest
import torch

from data_pipeline.prepare_config import PrepareConfig
from stages.assemble import STAGE_CONFIGS, load_stage
from stages.autoencoder import AutoencoderStage
from stages.base import StageConfig
from stages.classifier import ClassifierStage
from stages.control import ControlStage
from stages.image import ImageStage
from stages.image_prompt import ImagePromptStage
from stages.interpolation import InterpolationStage, known_slots, windows
from stages.text import TextStage
from stages.upscale import UpscaleStage, square_side
from stages.video import VideoStage
from videodiff import config as configs
from videodiff.diffusion.prediction import check_pair
from videodiff.networks.autoencoder import Autoencoder
from videodiff.networks.classifier import ClassifierConfig, NoisyClassifier
from videodiff.networks.unet import UNet, UNetConfig
from videodiff.parts import EXTRAS, STAGES

ROOT = Path(__file__).resolve().parents[1]
DATA = sorted((ROOT / "configs" / "data").glob("*.yaml"))  # of `videodiff data prepare`
FILES = sorted((ROOT / "configs" / "demo").glob("*.yaml"))
TWO = sorted((ROOT / "configs" / "two").glob("*.yaml"))  # stands on the bundled model
LARGE = sorted(path for folder in ("emu", "sd") for path in (ROOT / "configs" / folder).glob("*.yaml"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def road(path: Path) -> dict[str, StageConfig]:
    """The configurations of a folder, by stage: a stage and those whose runs it stands on.

    A variant, named after its stage and what is special of it, takes its stage's place in a road of its own alone.
    """
    found = {other.stem: load_stage(other) for other in sorted(path.parent.glob("*.yaml"))}
    return {**{stage: found[stage] for stage in STAGES if stage in found}, found[path.stem].stage: found[path.stem]}  # type: ignore[attr-defined]


def test_there_is_one_for_each_stage() -> None:
    assert {path.stem for path in (ROOT / "configs" / "demo").glob("*.yaml")} == {
        *STAGE_CONFIGS,
        "autoencoder_vq",
    }


def test_each_run_of_the_demo_has_a_folder_and_a_seed_of_its_own() -> None:
    runs = [load_stage(path).run for path in (ROOT / "configs" / "demo").glob("*.yaml")]
    assert len({run.dir for run in runs}) == len({run.seed for run in runs}) == len(runs)


@pytest.mark.parametrize("path", [*FILES, *TWO], ids=name)
def test_a_yaml_loads_and_survives_being_saved(path: Path, tmp_path: Path) -> None:
    config = load_stage(path)
    assert f"{path.stem}_".startswith(f"{config.stage}_")  # type: ignore[attr-defined]
    configs.save(config, tmp_path / "config.yaml")
    assert load_stage(tmp_path / "config.yaml") == config
    engine, run = config.engine, config.run
    assert engine.decay_steps in (None, run.steps)  # a rate that reaches zero before the end would waste the rest
    assert engine.warmup_steps < run.steps


@pytest.mark.parametrize("path", LARGE, ids=name)
def test_a_recipe_for_clusters_loads_and_stands_on_what_is_there(path: Path, tmp_path: Path) -> None:
    """Its model and its start are runs of the same folder, or come from outside: text towers, imported weights."""
    config = load_stage(path)
    configs.save(config, tmp_path / "config.yaml")
    assert load_stage(tmp_path / "config.yaml") == config
    assert config.engine.warmup_steps < config.run.steps
    outside = {"runs/emu/text", "runs/sd15/model", "runs/sd21/model"}
    runs = {load_stage(other).run.dir for other in path.parent.glob("*.yaml")} | outside
    assert {config.model, config.init_from} - {None} <= runs  # type: ignore[attr-defined]
    if isinstance(config, (ImageStage, VideoStage)):
        assert config.prediction is not None
        assert config.schedule is not None
        check_pair(config.prediction, config.schedule)
        assert config.schedule.zero_terminal_snr == (isinstance(config, VideoStage) and config.prediction == "v")
    if isinstance(config, InterpolationStage):  # Emu Video: 8 frames become 37
        assert known_slots(config.data.frames, config.factor, config.offset) == tuple(range(4, 33, 4))


@pytest.mark.parametrize("path", DATA, ids=name)
def test_a_yaml_of_prepare_loads_and_survives_being_saved(path: Path, tmp_path: Path) -> None:
    config = configs.load(PrepareConfig, path)
    configs.save(config, tmp_path / "prepare.yaml")
    assert configs.load(PrepareConfig, tmp_path / "prepare.yaml") == config


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_stage_stands_on_the_one_before_it(path: Path) -> None:
    config, stages = load_stage(path), road(path)
    if config.stage in EXTRAS:  # type: ignore[attr-defined]
        recipe = ("runs/demo/image", "runs/demo/interpolation")  # the runs before those that it has
        assert config.model in ("demo", *recipe)  # beside the road, on the bundled model or in its recipe
        return
    position = STAGES.index(config.stage)  # type: ignore[attr-defined]
    former = stages.get(STAGES[position - 1]) if position else None
    wanted = former.run.dir if former is not None else None
    if config.stage == "video" and config.temporal.image_prompt is not None:  # type: ignore[attr-defined]
        wanted = f"{wanted}_prompt"  # what stands beside the road holds the road before it
    assert config.model == wanted


@pytest.mark.parametrize("path", FILES, ids=name)
def test_the_networks_fit_together(path: Path) -> None:
    config, stages = load_stage(path), road(path)
    autoencoder, text, image = (stages[stage] for stage in ("autoencoder", "text", "image"))
    assert isinstance(autoencoder, AutoencoderStage)
    assert isinstance(text, TextStage)
    assert isinstance(image, ImageStage)
    with torch.device("meta"):
        factor = Autoencoder(autoencoder.network).factor
        assert config.data.size % factor == 0
        if isinstance(config, AutoencoderStage):
            return
        if isinstance(config, TextStage):
            assert config.network.image_size == config.data.size
            return
        if isinstance(config, ControlStage):
            assert (config.data.size, config.data.frames) == (image.data.size, 1)
            return
        if isinstance(config, ImagePromptStage):
            assert config.data.size == image.data.size
            assert config.data.frames > 1
            return
        if isinstance(config, UpscaleStage):
            assert config.data.size == 2 * image.data.size
            check_pair(config.prediction, config.schedule)
            side = square_side(config.network)
            assert config.data.size % (side * config.network.divisor) == 0
            assert config.data.frames == 1
            return
        if isinstance(config, ClassifierStage):
            assert "channels" not in config.network.model_fields_set  # they are the model's, whichever that is
            assert config.data.size == image.data.size
            assert config.data.size // factor % config.network.divisor == 0
            NoisyClassifier(ClassifierConfig(encoder=config.network, num_classes=2, pooling=config.pooling))
            return
        assert (
            not {"context_dims", "pooled_dim"} & image.network.model_fields_set
        )  # any text tower's, so that it may change
        told = {"context_dims": (text.network.width,), "pooled_dim": text.network.embed_dim}
        network: UNetConfig = image.network.model_copy(update=told)
        assert network.channels == autoencoder.network.latent_channels
        assert config.data.size == image.data.size
        assert config.data.size // factor % network.divisor == 0
        check_pair(image.prediction, image.schedule)
        steps = config.sampling.sampler.steps  # type: ignore[attr-defined]
        assert steps <= image.schedule.num_steps
        spatial, temporal = UNet(network).num_parameters()
        assert spatial > 0
        assert temporal == 0
        if isinstance(config, ImageStage):
            assert config.data.frames == 1
            return
        video = stages["video"]
        assert isinstance(video, VideoStage)
        full = UNet(network.model_copy(update={"temporal": video.temporal, "known_channels": True}))
        assert full.num_parameters()[0] == spatial
        assert full.num_parameters()[1] > 0
    if isinstance(config, InterpolationStage):
        assert config.data.fps == video.data.fps * config.factor
        assert windows(video.data.frames, config.data.frames, config.factor)
        assert (config.data.frames - 1) % config.factor == 0
