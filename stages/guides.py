"""What else a generation follows, besides its text: a classifier's gradient, a weaker model, a noise to begin at.

B rows of a batch, C latent channels, T frames, H W latent size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from stages.pipeline import Pipeline
from stages.requests import Options
from videodiff.batch import Condition
from videodiff.diffusion.guidance import Autoguidance, ClassifierGuidance, class_log_prob
from videodiff.diffusion.prediction import Denoise
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.parts import ClassifierPart, DiffusionStage, Sampling

STEERED: tuple[DiffusionStage, ...] = ("image", "video")  # interpolation only fills in between them


@dataclass(frozen=True)
class Guides:
    """The guides of a batch, as a Pipeline takes them.

    classifier: of the image stage, with `classes`, the name of each row's class. weak: for the stages that it has
    otherwise than the model, asked with the same prompts and by the same guidance as the model itself, so that what is
    amplified is what it can't do. noise: stage -> [C,T,H,W], where all rows begin.
    """

    prompts: Sequence[str]
    classifier: Pipeline | None = None
    classifier_guidance: ClassifierGuidance = field(default_factory=ClassifierGuidance)
    classes: Sequence[str] = ()
    weak: Pipeline | None = None
    autoguidance: Autoguidance = field(default_factory=Autoguidance)
    weak_stages: Sequence[DiffusionStage] = ()
    noise: Mapping[str, Tensor] = field(default_factory=dict)

    def start(self, stage: DiffusionStage, drawn: Tensor) -> Tensor:
        """Where a stage begins [B,C,T,H,W]: the given noise, or the one drawn for it."""
        return self.noise[stage].to(drawn).expand_as(drawn) if stage in self.noise else drawn

    def wrap(self, stage: DiffusionStage, denoise: Denoise, condition: Condition, sampling: Sampling) -> Denoise:
        """The stage's guided denoiser, guided by these too."""
        if self.weak is not None and stage in self.weak_stages:
            told = self.weak.condition(self.prompts, 1.0)  # by its own text tower
            shared = {name: getattr(condition, name) for name in ("known", "known_mask", "fps")}
            weaker = sampling.guidance(self.weak.denoiser(stage), replace(told, **shared))
            denoise = self.autoguidance(denoise, weaker)
        if self.classifier is not None and stage == "image":
            labels = class_index(classifier_part(self.classifier.model), self.classes)
            denoise = self.classifier_guidance(denoise, class_log_prob(self.classifier.classifier, labels))
        return denoise

    def told(self, stage: str, row: int) -> dict[str, Any]:
        """What a side-car says of the guides of a stage of one row."""
        told: dict[str, Any] = {}
        if self.classifier is not None and stage == "image":
            attribute = classifier_part(self.classifier.model).attribute
            scale = self.classifier_guidance.scale
            told["classifier"] = {"attribute": attribute, "class": self.classes[row], "scale": scale}
        if self.weak is not None and stage in self.weak_stages:
            told["autoguidance"] = {"scale": self.autoguidance.scale}
        if stage in self.noise:
            told["noise"] = "given"
        return told


def guides_for(options: Options, prompts: Sequence[str], pipelines: Mapping[str, Pipeline]) -> Guides:
    """The guides that the options ask for, for a batch with these prompts; `check_guides` let them pass before."""
    told: dict[str, Any] = {"prompts": prompts}
    if options.classifier is not None:
        told["classifier"] = pipelines[options.classifier]
        part = classifier_part(told["classifier"].model)
        told["classes"] = [class_asked_for(part, prompt, options.class_name) for prompt in prompts]
        if options.classifier_scale is not None:
            told["classifier_guidance"] = ClassifierGuidance(scale=options.classifier_scale)
    if options.weak_model is not None:
        told["weak"] = pipelines[options.weak_model]
        told["weak_stages"] = weaker_stages(pipelines[options.model].model, told["weak"].model, _made(options))
        if options.weak_scale is not None:
            told["autoguidance"] = Autoguidance(scale=options.weak_scale)
    if options.noise is not None:
        told["noise"] = read_noise(options.noise)
    return Guides(**told)


def check_guides(options: Options, models: Mapping[str, Model]) -> None:
    """Refuse (UserError) guides that can't do what they are asked, before anything is computed."""
    for flag, given, needed in (
        ("--classifier-scale", options.classifier_scale, "classifier"),
        ("--class", options.class_name, "classifier"),
        ("--weak-scale", options.weak_scale, "weak_model"),
    ):
        if given is not None and getattr(options, needed) is None:
            raise UserError(f"{flag} goes with --{needed.replace('_', '-')} MODEL; name one, or leave it out")
    model = models[options.model]
    if options.classifier is not None:
        if options.image is not None:
            raise UserError("--classifier guides the making of a first image, and --image gives one; leave one out")
        check_classifier(models[options.classifier], model)
        class_asked_for(classifier_part(models[options.classifier]), options.prompt, options.class_name)
    if options.weak_model is not None:
        made = _made(options)
        steered = weaker_stages(model, models[options.weak_model], made)
        if options.control is not None and "image" in steered:
            raise UserError(
                f"--weak-model {options.weak_model}: its image stage does not follow --control's picture, so that "
                "would be amplified and not what it can't do; leave one out"
            )
        if not steered:
            raise UserError(
                f"--weak-model {options.weak_model}: of {' and '.join(made)} it has the model's own weights, so "
                "there is nothing to amplify; name an earlier checkpoint or a smaller one"
            )
    if options.noise is not None:
        _check_noise(options, options.noise, model)


# --- the classifier ---------------------------------------------------------------------------------------------------


def classifier_part(model: Model) -> ClassifierPart:
    """The description of a model's classifier; UserError when it has none."""
    part = model.part("classifier")
    assert isinstance(part, ClassifierPart)
    return part


@lru_cache(maxsize=8)
def check_classifier(classifier: Model, model: Model) -> None:
    """Refuse (UserError) a classifier that does not read what the model's image stage makes."""
    part, image = classifier_part(classifier), model.diffusion("image")
    where = f"--classifier {classifier.folder}"
    if classifier.config.autoencoder is None:
        raise UserError(f"{where}: reads pixels, the image stage makes latents; train one with model={model.folder}")
    for name, its, wanted in (
        ("latent channels", part.network.encoder.channels, image.network.channels),
        ("picture size", part.size, image.size),
    ):
        if its != wanted:
            raise UserError(
                f"{where}: was trained for {name} {its}, the image stage of {model.folder} has {wanted}; "
                f"train one with model={model.folder}"
            )
    if part.schedule != image.schedule:
        raise UserError(
            f"{where}: was trained on another noise schedule than that of the image stage of {model.folder}; "
            f"train one with model={model.folder}"
        )
    _check_latents(where, classifier, model)


def class_index(part: ClassifierPart, names: Sequence[str]) -> Tensor:
    """Places [B] of the named classes; UserError for one that the classifier does not know."""
    if unknown := sorted(set(names) - set(part.classes)):
        raise UserError(f"--class {unknown[0]!r}: the classifier tells {_classes(part)}; name one of them")
    return torch.tensor([part.classes.index(name) for name in names])


def class_asked_for(part: ClassifierPart, prompt: str, name: str | None) -> str:
    """The class named, or else the one class whose name stands in the prompt; UserError where that is not clear."""
    if name is not None:
        class_index(part, [name])
        return name
    found = [c for c in part.classes if re.search(rf"\b{re.escape(c)}\b", prompt, re.IGNORECASE)]
    if len(found) != 1:
        named = f"names {' and '.join(found)}" if found else "names none"
        raise UserError(
            f"--classifier tells {_classes(part)}, and the prompt {named} of them; choose with --class NAME"
        )
    return found[0]


def _classes(part: ClassifierPart) -> str:
    return f"{part.attribute} ({', '.join(part.classes)})"


# --- the weaker model -------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def weaker_stages(model: Model, weak: Model, made: tuple[DiffusionStage, ...] = STEERED) -> tuple[DiffusionStage, ...]:
    """Of the stages that are made those that both have, with other weights; UserError where the weaker one's do not
    fit."""
    shared: list[DiffusionStage] = []
    others = False
    for stage in STEERED:
        if getattr(model.config, stage) is None or getattr(weak.config, stage) is None:
            continue
        one, other = model.diffusion(stage), weak.diffusion(stage)
        # The video stage's spatial half is the image stage's: where that differs, so does the video stage.
        others = others or one.weights.sha256 != other.weights.sha256
        if stage not in made:
            continue
        for name in ("schedule", "size", "frames", "first_image"):
            if getattr(one, name) != getattr(other, name):
                raise UserError(
                    f"--weak-model {weak.folder}: the {name} of its {stage} stage is not that of {model.folder}; "
                    "name an earlier checkpoint of it, or a smaller model trained as it was"
                )
        if others:
            shared.append(stage)
    _check_latents(f"--weak-model {weak.folder}", weak, model)
    return tuple(shared)


@lru_cache(maxsize=8)
def _check_latents(where: str, other: Model, model: Model) -> None:
    """Refuse (UserError) another encoder. Weights are compared, not files: they may be stored in half precision, and a
    decoder that was trained on its own changes no latents."""
    ours, its = (_encoder(opened) for opened in (model, other))
    alike = ours.keys() == its.keys() and all(
        ours[name].shape == its[name].shape and torch.allclose(ours[name], its[name], rtol=2e-3, atol=1e-4)
        for name in ours
    )
    if not alike:
        raise UserError(
            f"{where}: stands on another autoencoder than {model.folder}, so its latents mean something else; "
            f"name one trained on the autoencoder of {model.folder}"
        )


def _encoder(model: Model) -> dict[str, Tensor]:
    state = model.state("autoencoder")
    return {name: value for name, value in state.items() if not name.startswith("decoder.")}


# --- the noise --------------------------------------------------------------------------------------------------------


def read_noise(path: str) -> dict[str, Tensor]:
    """Stage -> noise [C,T,H,W] of a file that `videodiff invert` wrote; UserError for any other."""
    try:
        noise = load_file(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{path}: not a file of noise that can be read ({reason}); make one with `videodiff invert`"
        ) from None
    if not noise or set(noise) - set(STEERED):
        raise UserError(
            f"{path}: holds {', '.join(sorted(noise)) or 'nothing'}, not noise; make it with `videodiff invert`"
        )
    return noise


def _check_noise(options: Options, path: str, model: Model) -> None:
    noise = read_noise(path)
    used = [stage for stage in STEERED if stage in noise and not _left_out(stage, options)]
    if not used:
        raise UserError(f"{path}: holds noise of {' and '.join(noise)}, which is not made here; leave out --noise")
    for stage in used:
        part = model.diffusion(stage)
        side = part.size // model.autoencoder.factor
        wanted = [part.network.channels, part.frames, side, side]
        if list(noise[stage].shape) != wanted:
            raise UserError(
                f"{path}: the noise of the {stage} stage is {list(noise[stage].shape)}, that of {model.folder} is "
                f"{wanted}; invert with this model"
            )


def _made(options: Options) -> tuple[DiffusionStage, ...]:
    """The steered stages that the options ask for."""
    return tuple(stage for stage in STEERED if not _left_out(stage, options))


def _left_out(stage: str, options: Options) -> bool:
    return options.image is not None if stage == "image" else options.image_only
