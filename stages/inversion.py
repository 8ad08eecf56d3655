"""`videodiff invert`: a picture or a video -> the noise of each stage, from which `generate --noise` begins.

C latent channels, T frames, H W latent size, S picture size.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from data_pipeline.shards import VIDEO_SUFFIXES
from stages.guides import Guides
from stages.pipeline import Pipeline, SampleKey, adjusted
from stages.requests import model_hash
from videodiff import config as configs
from videodiff.errors import UserError
from videodiff.metrics.pictures import clip_psnr
from videodiff.model import Model
from videodiff.parts import DiffusionStage, Sampling
from videodiff.training.distributed import device
from videodiff.video_io import Frames, atomic_path, read_image, read_video, write_json


def main(
    source: Path, prompt: str, out: Path, model: str, steps: int, text_guidance: float, image_guidance: float
) -> None:
    """Write the noise of `source` to `out`, beside it a side-car with the round trip's PSNR, and print the command that
    begins there.

    Raises UserError for what the model can't lead back.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: noise is stored as safetensors; end its name with .safetensors")
    if not prompt.strip():
        raise UserError("--prompt is empty; say what is seen, so that the model knows it")
    opened = Model.load(model)
    frames, is_video = read_source(source, opened)
    stages: tuple[DiffusionStage, ...] = ("image", "video") if is_video else ("image",)
    cards = {stage: opened.diffusion(stage).sampling for stage in stages}
    # As `generate` will be told: its scale of the image is the video stage's alone.
    scales = {stage: (text_guidance, image_guidance if stage == "video" else None) for stage in stages}
    samplings = {stage: adjusted(cards[stage], "ddim", steps, *scales[stage]) for stage in stages}
    for stage in stages:
        part = opened.diffusion(stage)
        samplings[stage].sampler.check(part.schedule, part.network.variance)
    noise, again, ceiling = round_trip(Pipeline(opened, device()), frames, prompt, samplings)
    sidecar = out.with_name(f"{out.name}.json")  # the picture's own side-car may have the name without .safetensors
    with atomic_path(out) as draft:
        draft.write_bytes(save({stage: value.contiguous() for stage, value in noise.items()}))
    reached, most = clip_psnr(again, frames), clip_psnr(ceiling, frames)
    write_json(
        sidecar,
        {
            "source": str(source),
            "prompt": prompt,
            "model": {"name": model, "sha256": model_hash(opened)},
            "stages": {stage: configs.to_dict(sampling) for stage, sampling in samplings.items()},
            "psnr": {"noise_and_back": reached, "autoencoder_alone": most},
        },
    )
    print(f"from the noise and back: {reached:.1f} dB (the autoencoder alone: {most:.1f} dB)")
    print(f"begin there with: {_command(prompt, out, model, steps, text_guidance, image_guidance, is_video)}")
    for path in (out, sidecar):
        print(path, flush=True)


def read_source(path: Path, model: Model) -> tuple[Frames, bool]:
    """The frames uint8 [T,S,S,3] of a picture (T = 1) or a video, and which it is; UserError for what does not fit."""
    is_video = path.suffix.lower().lstrip(".") in VIDEO_SUFFIXES
    part = model.diffusion("video" if is_video else "image")
    frames = read_video(path)[0] if is_video else read_image(path)[None]
    count, height, width = frames.shape[:3]
    if (height, width) != (part.size, part.size):
        raise UserError(
            f"{path}: is {width}x{height} pixels, this model takes {part.size}x{part.size}; resize or crop it first"
        )
    if count != part.frames:
        raise UserError(
            f"{path}: has {count} frames, the video stage makes {part.frames}; cut it, or generate it with "
            "--no-interpolation"
        )
    return frames, is_video


def round_trip(
    pipeline: Pipeline, frames: Frames, prompt: str, samplings: dict[DiffusionStage, Sampling]
) -> tuple[dict[str, Tensor], Frames, Frames]:
    """Noise [C,T,H,W] of each stage of `samplings`, the frames [T,S,S,3] it gives again, and the autoencoder's alone.

    A video's first frame is the image stage's; the video stage is told it as the image stage gives it again.
    """
    latents, keys = pipeline.encode(frames[None]), [SampleKey(0, prompt)]
    noise: dict[str, Tensor] = {}

    def keep(stage: DiffusionStage, found: Tensor) -> Guides:
        noise[stage] = found[0].cpu()
        return Guides([prompt], noise={stage: noise[stage]})

    condition = pipeline.image_condition([prompt])
    found = pipeline.invert("image", latents[:, :, :1], condition, samplings["image"])
    made = pipeline.image(keys, samplings["image"], steering=keep("image", found))
    if "video" in samplings:
        fps = pipeline.model.diffusion("video").fps
        condition = pipeline.video_condition([prompt], made, fps)
        found = pipeline.invert("video", latents, condition, samplings["video"])
        made = pipeline.video(keys, made, fps, samplings["video"], steering=keep("video", found))
    return noise, pipeline.decode(made)[0], pipeline.decode(latents)[0]


def _command(
    prompt: str, out: Path, model: str, steps: int, text_guidance: float, image_guidance: float, is_video: bool
) -> str:
    """What generates the source again from its noise."""
    scales = ["--text-guidance", f"{text_guidance:g}"]
    if is_video:
        scales += ["--image-guidance", f"{image_guidance:g}", "--no-interpolation"]
    else:
        scales.append("--image-only")
    command = ["videodiff", "generate", prompt, "--model", model, "--noise", str(out), "--sampler", "ddim"]
    return shlex.join([*command, "--steps", str(steps), *scales])
