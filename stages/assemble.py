"""From a YAML to a running stage: configuration -> networks, loss, loader, engine."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from pydantic import ConfigDict

from data_pipeline.loader import ShardSource
from data_pipeline.shards import all_captions
from stages import control, image, image_prompt, interpolation, text, upscale, video
from stages.autoencoder import AutoencoderStage, AutoencoderTask
from stages.base import DiffusionStageConfig, StageConfig
from stages.classifier import ClassifierStage, ClassifierTask
from stages.control import ControlStage
from stages.encode import encoder_digest
from stages.further_towers import place_in_run
from stages.image import ImageStage
from stages.image_prompt import ImagePromptStage
from stages.interpolation import InterpolationStage
from stages.text import TextStage, TextTask
from stages.upscale import UpscaleStage
from stages.video import VideoStage
from videodiff import config as configs
from videodiff.config import Config
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.model_folder import export
from videodiff.networks.tokenizer import build_vocabulary
from videodiff.parts import VOCABULARY, WORDS
from videodiff.training import distributed
from videodiff.training.checkpoint import Checkpoints
from videodiff.training.run_folder import CHECKPOINTS, cannot_write
from videodiff.training.status import Status
from videodiff.training.task import Task
from videodiff.training.trainer import train

BASE = "base"  # in a run's folder: what it stands on

STAGE_CONFIGS: dict[str, type[StageConfig]] = {
    "autoencoder": AutoencoderStage,
    "text": TextStage,
    "image": ImageStage,
    "video": VideoStage,
    "interpolation": InterpolationStage,
    "classifier": ClassifierStage,
    "control": ControlStage,
    "image_prompt": ImagePromptStage,
    "upscale": UpscaleStage,
}


class _StageName(Config):
    """The one key that tells which class reads the rest."""

    model_config = ConfigDict(extra="ignore")

    stage: Literal[
        "autoencoder", "text", "image", "video", "interpolation", "classifier", "control", "image_prompt", "upscale"
    ]


def load_stage(path: str | Path, overrides: Sequence[str] = ()) -> StageConfig:
    """The configuration of a stage from its YAML and `a.b=c` overrides; raises UserError naming every problem."""
    name = configs.load(_StageName, path, overrides).stage
    return configs.load(STAGE_CONFIGS[name], path, overrides)


def make_task(config: StageConfig) -> Task:
    """The task that a stage's configuration asks for, standing on the model it names."""
    if isinstance(config, AutoencoderStage):
        return AutoencoderTask(config, None if config.model is None else Model.load(config.model))
    if isinstance(config, ClassifierStage):
        return ClassifierTask(config, None if config.model is None else Model.load(config.model))
    base = _base(config)
    if isinstance(config, TextStage):
        return TextTask(config, base, *_vocabulary(config), place_in_run(config.further, Path(config.run.dir)))
    if isinstance(config, ImageStage):
        return image.task(config, base)
    if isinstance(config, VideoStage):
        return video.task(config, base)
    if isinstance(config, ControlStage):
        return control.task(config, base)
    if isinstance(config, ImagePromptStage):
        return image_prompt.task(config, base)
    if isinstance(config, UpscaleStage):
        return upscale.task(config, base)
    assert isinstance(config, InterpolationStage)
    return interpolation.task(config, base)


def begin_with(task: Task, stage: str, model: Model) -> None:
    """Give what is trained the averaged weights of the same stage of `model`; UserError when they do not fit.

    Frozen layers that it has must be equal to those here: what is trained was trained on them.
    """
    state, own = model.state(stage), task.module.state_dict()
    trained = {name for name, _ in task.module.named_parameters() if task.trains(name)}
    odd = sorted((trained - state.keys()) | (state.keys() - own.keys()))
    odd = odd or sorted(name for name in state if state[name].shape != own[name].shape)
    odd = odd or sorted(
        name for name in state.keys() - trained if not torch.equal(state[name], own[name].float().cpu())
    )
    if odd:
        raise UserError(
            f"init_from: the {stage} stage of {model.folder} does not fit this network at {odd[0]!r} ({len(odd)} such "
            "names); name a model of the same network that froze the same layers, or take its settings"
        )
    task.module.load_state_dict({name: state[name] for name in trained}, strict=False)


def _on_own_base(config: StageConfig, begun: bool) -> StageConfig:
    """The configuration with `model` naming the run's own copy of what it stands on, made when the run starts.

    Hard links where the disk allows them. Without it a run could not go on once the model that it names has trained
    further, or has pruned the checkpoint that was taken.
    """
    if config.model is None:
        return config
    own = Path(config.run.dir) / BASE
    if begun:
        return config.model_copy(update={"model": str(own)}) if own.is_dir() else config
    problem = None
    if distributed.rank() == 0:
        try:
            shutil.rmtree(own, ignore_errors=True)
            export(Model.load(config.model), own)
        except UserError as error:
            problem = error
    distributed.raise_from_first(problem)
    return config.model_copy(update={"model": str(own)})


def _base(config: StageConfig) -> Model:
    if config.model is None:
        raise UserError("model: this stage stands on the stage before it; name its run with model=RUN")
    return Model.load(config.model)


def _vocabulary(config: TextStage) -> tuple[Path, Path]:
    """The run's vocabulary and word list, made from the captions of its shards by the first rank."""
    folder = Path(config.run.dir)
    vocabulary, words = folder / VOCABULARY, folder / WORDS
    problem = None
    if distributed.rank() == 0 and not Checkpoints(folder / CHECKPOINTS, 1).exist():  # else it keeps its words
        try:
            folder.mkdir(parents=True, exist_ok=True)
            build_vocabulary(
                chain.from_iterable(all_captions(d.shards) for d in config.data.data_sets()),
                vocabulary,
                words,
                config.num_merges,
            )
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = cannot_write(folder, error)
    distributed.raise_from_first(problem)
    return vocabulary, words


def _encoder(config: StageConfig) -> Callable[[], str] | None:
    """The hash of what made the latents and text features that a stage learns from; None where it needs pictures."""
    if not isinstance(config, (ImageStage, ImagePromptStage, VideoStage, InterpolationStage)):
        return None
    return lambda: encoder_digest(_base(config))


def train_stage(path: str | Path, overrides: Sequence[str] = ()) -> None:
    """Start a stage's run, or go on with it: `videodiff train`."""
    distributed.start()
    try:
        config = distributed.together(lambda: load_stage(path, overrides))
        if isinstance(config, TextStage) and config.network.pretrained is not None:
            text.adopt(config, config.network.pretrained, _base(config))
            if distributed.rank() == 0:
                Status(state="complete", step=config.run.steps, steps=config.run.steps).write(Path(config.run.dir))
            return
        bad_samples = Path(config.run.dir) / "bad_samples.jsonl"

        def prepare() -> tuple[Task, ShardSource]:
            begun = Checkpoints(Path(config.run.dir) / CHECKPOINTS, 1).exist()
            if not begun:
                config.data.check_ranks(distributed.world())
            standing = _on_own_base(config, begun)
            source = ShardSource(
                config.data,
                config.run.seed,
                bad_samples,
                encoder=_encoder(standing),
                more_texts=isinstance(config, TextStage),
            )
            task = make_task(standing)
            if isinstance(config, DiffusionStageConfig) and config.init_from is not None and not begun:
                begin_with(task, config.stage, Model.load(config.init_from))
            return task, source

        train(config.run, config.engine, config.data.batch_size, prepare, config)
    finally:
        distributed.cleanup()
