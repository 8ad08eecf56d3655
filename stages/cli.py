"""The `videodiff` command: parses, calls, prints. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from stages import cli_data, cli_prepare, cli_run, cli_study
from videodiff.errors import UserError

app = typer.Typer(
    name="videodiff",
    help="Text to image to video to smooth video: train, generate, evaluate.",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Make training data.")
app.add_typer(data, name="data")
for name, command in {
    "prepare": cli_prepare.prepare, "filter": cli_prepare.refilter, "merge": cli_prepare.merge,
    "world": cli_data.world, "check": cli_data.check, "show": cli_data.show, "encode": cli_data.encode,
}.items():  # fmt: skip
    data.command(name)(command)


study = typer.Typer(help="Let people compare two systems' videos.")
app.add_typer(study, name="study")
study.command("build")(cli_study.build)
study.command("score")(cli_study.score)
app.command()(cli_run.status)
app.command()(cli_run.plan)
app.command()(cli_run.doctor)
checkpoint = typer.Typer(help="Look after the checkpoints of a run.")
app.add_typer(checkpoint, name="checkpoint")
for name, command in {
    "list": cli_run.list_checkpoints, "verify": cli_run.verify, "reshape": cli_run.reshape,
}.items():  # fmt: skip
    checkpoint.command(name)(command)


class StageChoice(str, Enum):
    """What `videodiff evaluate --stage` takes."""

    autoencoder = "autoencoder"
    text = "text"
    image = "image"
    video = "video"
    interpolation = "interpolation"
    classifier = "classifier"
    control = "control"
    image_prompt = "image_prompt"
    upscale = "upscale"
    all = "all"


class WeightsChoice(str, Enum):
    """What `videodiff evaluate --weights` takes."""

    ema = "ema"
    raw = "raw"
    both = "both"


class SuiteChoice(str, Enum):
    """What `videodiff suite` takes."""

    vbench = "vbench"
    comp_bench = "t2v-compbench"


class SamplerChoice(str, Enum):
    """What `videodiff generate --sampler` takes."""

    ddim = "ddim"
    ddpm = "ddpm"
    dpm_solver = "dpm_solver"
    heun = "heun"
    langevin = "langevin"
    predictor_corrector = "predictor_corrector"


class FormatChoice(str, Enum):
    """What `videodiff export --format` takes."""

    videodiff = "videodiff"
    diffusers = "diffusers"


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="A stage's YAML, e.g. configs/demo/image.yaml")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value ...")] = None,
) -> None:
    """Train a stage; the same command resumes it. Runs alone, under torchrun, or under srun."""
    from stages.assemble import train_stage

    train_stage(config, overrides or [])


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the video shows")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The mp4 to write, or a folder [default: outputs/, by prompt]")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A model folder, a run, a checkpoint, or 'demo' [default: demo]")
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="Videos per prompt [default: 1]")] = None,
    seed: Annotated[int | None, typer.Option(help="Another seed, another video [default: 0]")] = None,
    steps: Annotated[int | None, typer.Option(help="Sampling steps of the image and video stages")] = None,
    sampler: Annotated[SamplerChoice | None, typer.Option(help="Sampler of the image and video stages")] = None,
    text_guidance: Annotated[float | None, typer.Option(help="How closely to follow the text; 1 is off")] = None,
    image_guidance: Annotated[
        float | None, typer.Option(help="How closely the video follows its first image; 1 is off")
    ] = None,
    guidance_rescale: Annotated[float | None, typer.Option(help="0 to 1: tames the contrast of high scales")] = None,
    guidance_interval: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Guide by the text only where LOW < sigma/alpha <= HIGH; HIGH may be inf"),
    ] = None,
    classifier: Annotated[
        str | None, typer.Option(help="A model whose classifier guides the first image to a class")
    ] = None,
    classifier_scale: Annotated[float | None, typer.Option(help="How strongly; 0 is off [default: 1]")] = None,
    class_name: Annotated[
        str | None, typer.Option("--class", help="Which of its classes [default: the one in the prompt]")
    ] = None,
    weak_model: Annotated[
        str | None, typer.Option(help="Away from what this weaker model says (an earlier checkpoint)")
    ] = None,
    weak_scale: Annotated[float | None, typer.Option(help="How far; 1 is off [default: 2]")] = None,
    noise: Annotated[Path | None, typer.Option(help="Begin at this noise, of `videodiff invert`")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames before interpolation; must fit the model")] = None,
    fps: Annotated[float | None, typer.Option(help="Frames per second of the mp4")] = None,
    interpolation: Annotated[
        bool, typer.Option("--interpolation/--no-interpolation", help="Raise the frame rate by the last stage")
    ] = True,
    image: Annotated[Path | None, typer.Option(help="Animate this picture; no first image is generated")] = None,
    image_only: Annotated[bool, typer.Option("--image-only", help="Stop at the first image")] = False,
    control: Annotated[
        Path | None, typer.Option(help="Make the first image along the outlines of this picture")
    ] = None,
    control_scale: Annotated[
        float | None, typer.Option(help="How closely to follow them; 0 not at all [default: 1]")
    ] = None,
    upscale: Annotated[
        bool, typer.Option("--upscale", help="Enlarge every frame by the super-resolution stage")
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option(help=".txt, a prompt a line; or .jsonl, {prompt, seed, steps, ...} a line")
    ] = None,
    from_sidecar: Annotated[Path | None, typer.Option("--from", help="Repeat a generation from its JSON file")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Videos computed together")] = 4,
) -> None:
    """Turn a prompt into an mp4, its first image as PNG, and a JSON file that repeats it.

    What is not asked for is as the model's card says. To choose a first image: --image-only, then --image PICTURE.
    """
    from stages.generate import main as run

    given = {
        "model": model, "num_samples": num_samples, "seed": seed, "steps": steps,
        "sampler": sampler.value if sampler else None, "text_guidance": text_guidance,
        "image_guidance": image_guidance, "frames": frames, "fps": fps,
        "interpolation": None if interpolation else False, "image": str(image) if image else None,
        "image_only": image_only or None,
        "control": str(control) if control else None,
        "control_scale": control_scale, "upscale": upscale or None,
        "guidance_rescale": guidance_rescale,
        "guidance_interval": _interval(guidance_interval), "classifier": classifier,
        "classifier_scale": classifier_scale, "class_name": class_name, "weak_model": weak_model,
        "weak_scale": weak_scale, "noise": str(noise) if noise else None,
    }  # fmt: skip
    options = {key: value for key, value in given.items() if value is not None}
    run(prompt, out, prompts, from_sidecar, options, batch_size)


@app.command()
def invert(
    source: Annotated[Path, typer.Argument(help="A picture, or a video of as many frames as the model makes")],
    prompt: Annotated[str, typer.Option(help="What it shows")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file of noise to write: NAME.safetensors")],
    model: Annotated[str, typer.Option(help="A model folder, a run, a checkpoint, or 'demo'")] = "demo",
    steps: Annotated[int, typer.Option(min=1, help="DDIM's steps; more lead back more exactly")] = 50,
    text_guidance: Annotated[float, typer.Option(help="1 leads back best")] = 1.0,
    image_guidance: Annotated[float, typer.Option(help="1 leads back best")] = 1.0,
) -> None:
    """Lead a picture or a video back to the noise that it would be generated from (DDIM inversion).

    Prints how well the noise gives it again, and the command that begins there: with another prompt, it is edited.
    """
    from stages.inversion import main as run

    run(source, prompt, out, model, steps, text_guidance, image_guidance)


class Evaluate(TyperCommand):
    """`--checkpoints every 500` says the same as `--checkpoints every:500`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments, the two words as one."""
        for place, words in enumerate(zip(args, args[1:], args[2:], strict=False)):
            if words[:2] == ("--checkpoints", "every") and words[2].lstrip("-").isdigit():
                args = [*args[:place], "--checkpoints", f"every:{words[2]}", *args[place + 3 :]]
                break
        return super().parse_args(ctx, args)


@app.command(cls=Evaluate)
def evaluate(
    model: Annotated[str, typer.Argument(help="A model folder, a run, a checkpoint, or 'demo'")],
    stage: Annotated[StageChoice, typer.Option(help="Which stage to judge")] = StageChoice.all,
    data: Annotated[
        str | None,
        typer.Option(
            help="Judge on clips and captions of these shards, or on UCF-101's classes: ucf101:FOLDER "
            "[default: the built-in world]"
        ),
    ] = None,
    sentences: Annotated[
        Path | None, typer.Option(help="UCF-101: JSON of class: sentence [default: bare class names]")
    ] = None,
    objects: Annotated[
        int, typer.Option(min=1, max=2, help="In the built-in world's prompts; 2 for a model of configs/two")
    ] = 1,
    size: Annotated[
        int | None, typer.Option(min=1, help="Of the clips, for a model of autoencoder and text alone [default: 64]")
    ] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts on seen combinations, or of the shards")] = 200,
    num_held_out: Annotated[
        int | None, typer.Option(min=0, help="Prompts on each kind of unseen ones [default: as many]")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the prompts and of the noise, the same for every checkpoint")] = 0,
    checkpoints: Annotated[str, typer.Option(help="Of a run: last, all, or every N steps")] = "last",
    weights: Annotated[WeightsChoice, typer.Option(help="The averaged weights, the raw ones, or both")] = (
        WeightsChoice.ema
    ),
    watch: Annotated[
        bool, typer.Option("--watch", help="Follow a run that trains, and judge each checkpoint as it comes")
    ] = False,
    judges: Annotated[
        Path | None, typer.Option(help="YAML of the networks that judge by features [default: the model's text tower]")
    ] = None,
    training: Annotated[
        str | None, typer.Option(help="Training shards: are generated clips near copies of some of them?")
    ] = None,
    classifier_scale: Annotated[
        float | None, typer.Option(min=0, help="How strongly the classifier guides in its rows [default: 1]")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at a time; less takes less memory")] = 8,
    out: Annotated[Path, typer.Option(help="Folder of the table, the JSON and the pictures")] = Path(
        "outputs/evaluation"
    ),
) -> None:
    """Judge a model, or the checkpoints of a run, stage by stage, and say in a sentence which stage loses most."""
    from stages.evaluation.command import Request
    from stages.evaluation.command import main as run

    given = {
        "data": data, "checkpoints": checkpoints, "weights": weights.value, "watch": watch, "judges": judges,
        "training": training, "batch_size": batch_size, "sentences": sentences, "size": size, "objects": objects,
    }  # fmt: skip
    run(Request(model, stage.value, num_prompts, seed, out, num_held_out, classifier_scale, **given))


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="The folder of an evaluation (`evaluate --out`)")],
    second: Annotated[Path, typer.Argument(help="Another one, on the same prompts and seeds")],
    out: Annotated[Path | None, typer.Option(help="A JSON file of it")] = None,
) -> None:
    """Is the second better than the first? Paired on prompts and seeds, each figure with an interval and a verdict."""
    from stages.evaluation.compare import main as run

    run(first, second, out)


@app.command()
def suite(
    name: Annotated[SuiteChoice, typer.Argument(help="Which benchmark")],
    source: Annotated[Path, typer.Argument(help="Your VBench_full_info.json, or T2V-CompBench's folder meta_data")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to fill; the same command goes on there")],
    model: Annotated[str, typer.Option(help="A model folder, a run, a checkpoint, or 'demo'")] = "demo",
    seed: Annotated[int, typer.Option(help="Seed of the videos")] = 0,
    num_samples: Annotated[int | None, typer.Option(min=1, help="Of each prompt [default: as VBench has it]")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Videos computed together")] = 4,
) -> None:
    """Videos for the prompts of a public benchmark, laid out as its own tools look for them."""
    from stages.suites import main as run

    run(name.value, source, out, model, seed, batch_size, num_samples)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A run, a checkpoint or a model folder")],
    out: Annotated[Path, typer.Option(help="The new model folder")],
    half: Annotated[bool, typer.Option("--half", help="Store the weights in float16")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="The raw weights of the newest stage, not the averaged ones")
    ] = False,
    form: Annotated[
        FormatChoice, typer.Option("--format", help="diffusers: the image stage alone, as its pipelines load it")
    ] = FormatChoice.videodiff,
) -> None:
    """Copy a model's inference weights into one folder that stands alone."""
    from videodiff.model import Model
    from videodiff.model_folder import export as export_model

    opened = Model.load(model, "raw" if raw else "ema")
    if form is FormatChoice.diffusers:
        from stages.public_export import export_diffusers

        export_diffusers(opened, out, half)
    else:
        export_model(opened, out, half)
    typer.echo(f"wrote {out}")


@app.command("import")
def import_public(
    image_model: Annotated[
        Path, typer.Option(help="Stable Diffusion 1.x or 2.x in diffusers' format: a pipeline's folder, or its unet/")
    ],
    out: Annotated[Path, typer.Option(help="The new model folder")],
    autoencoder: Annotated[
        Path | None, typer.Option(help="A vae/ folder or a pipeline's [default: the image model's]")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="A text_encoder/ folder, a pipeline's, or open_clip:NAME [default: the image model's]"),
    ] = None,
    text_weights: Annotated[Path | None, typer.Option(help="Weights of open_clip:NAME; nothing is downloaded")] = None,
) -> None:
    """Turn public image weights (safetensors) into a model to generate with, or to train a video stage on."""
    from stages.public_weights import import_model

    import_model(image_model, autoencoder, text, text_weights, out)
    typer.echo(f"wrote {out}")


def _interval(given: tuple[float, float] | None) -> tuple[float, float | None] | None:
    """An infinite end is none at all."""
    return None if given is None else (given[0], None if given[1] == float("inf") else given[1])


# What --help must not need, and an installation without the extra `train` has not.
TRAINING_PACKAGES = ("deepspeed", "webdataset", "decord", "braceexpand", "fsspec", "tensorboard")
DATA_PACKAGES = ("av", "scenedetect", "cv2", "imagehash", "pyarrow", "jinja2")  # likewise, of the extra `data`


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. A user's mistake ends in one line and status 2, a failing system in one and 1, Ctrl-C in 130."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        status = app(given or ["--help"], prog_name="videodiff", standalone_mode=False)
    # typer hides its usage errors; the one that it shows names the class of all.
    except typer.BadParameter.__mro__[1] as error:  # type: ignore[misc]
        context = getattr(error, "ctx", None)
        where = context.command_path if context is not None else "videodiff"
        problem = " ".join(error.format_message().split()).rstrip(".")
        _fail(f"{problem}; see `{where} --help`", 2)
    except UserError as error:
        if error.echoed:  # one line for a job of many ranks
            raise SystemExit(2) from None
        _fail(str(error), 2)
    except (KeyboardInterrupt, typer.Abort):
        status = 130
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in TRAINING_PACKAGES + DATA_PACKAGES:
            raise
        extra = "train" if package in TRAINING_PACKAGES else "data"
        _fail(f"{error.name} is not installed; install it with pip install 'videodiff[{extra}]'", 1)
    except OSError as error:
        _fail(f"{error.filename or 'the system'}: {error.strerror or error}", 1)
    if status == 130:
        _fail("stopped by Ctrl-C; what was finished is kept, give the same command again to go on", 130)
    sys.exit(status or 0)


def _fail(message: str, status: int) -> None:
    print(f"videodiff: error: {message}", file=sys.stderr)
    raise SystemExit(status)


if __name__ == "__main__":
    main()
