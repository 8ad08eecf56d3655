"""Has a model learned clips by heart? The training clips nearest to what it made, against those nearest to unseen ones.

What was memorised lies nearer to a training clip than an unseen real clip does. T frames, S frame side, D features.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_pipeline.decoders import ClipError
from stages.evaluation.judging import Job
from stages.evaluation.kept import FeatureFiles, digest_of, read_tensors, write_tensors
from stages.evaluation.measures import Gauge, chosen_frames, sees
from stages.evaluation.questions import Clips, Prompt, ShardQuestions
from stages.evaluation.road import Plan, strip
from stages.evaluation.sheets import clip_path
from stages.evaluation.statistics import mean_interval, share
from videodiff.errors import UserError
from videodiff.metrics.manifold import nearest
from videodiff.networks.features import FeatureExtractor
from videodiff.video_io import read_video, write_png

MOST = 4096  # training clips that are looked at
SHOWN_CLIPS = 100  # numbers below which kept videos are looked for
SHOWN = 8  # of the nearest pairs
UNUSUAL = 5.0  # percent of unseen real clips that lie as near
ROW = "video_generated"


def training_questions(location: str, seed: int) -> ShardQuestions:
    """The training clips that are looked at. Raises UserError for shards that are none, or hold no videos."""
    return ShardQuestions(location, MOST, seed, at_most=True, option="training")


def check_training(questions: ShardQuestions, plan: Plan, gauge: Gauge) -> None:
    """Raise UserError where no training clip can be compared with what a plan makes: before anything is computed."""
    clips = _clips(plan)
    if _judge_of(plan, gauge) is not None and all(_clip(questions, p, clips) is None for p in questions.prompts):
        raise _too_short(questions, clips)


def nearest_training_clips(job: Job, questions: ShardQuestions, shared: Path) -> dict[str, Any] | None:
    """Figures of what the video stage made against the training clips, by the first network that sees clips (else
    frames); None where it made none. Pictures of the nearest pairs among the videos that are kept go to the folder
    `neighbours`. shared: where the features of the training clips are kept, for all checkpoints. Raises UserError where
    no clip of one of both sides can be compared.
    """
    out, plan, gauge, split = job.out, job.plan, job.gauge, job.questions.prompts[0].split
    clips_of = {i: path for i in range(SHOWN_CLIPS) if (path := clip_path(out, ROW, split, i)).is_file()}
    number = _judge_of(plan, gauge)
    numbers, features = FeatureFiles(out, job.protocol).of_split(split)
    if number is None or f"{number}/{ROW}" not in features:
        return None
    extractor, clips = gauge.extractors[number], _clips(plan)
    finite = features[f"finite/{ROW}"].bool()
    if not bool(finite.any()):
        raise UserError(f"none of {len(finite)} generated videos is finite; try other weights")
    training, places = _training(shared, questions, clips, extractor)
    made = nearest(features[f"{number}/{ROW}"][finite].mean(1), training)
    real = nearest(features[f"{number}/real"].mean(1), training)
    distances, usual = made.distances[:, 0].numpy(), real.distances[:, 0].numpy()
    limit = float(np.percentile(usual, UNUSUAL))
    judged = [n for n, whole in zip(numbers, finite.tolist(), strict=True) if whole]
    order = [int(i) for i in np.argsort(distances, kind="stable") if judged[int(i)] in clips_of][:SHOWN]
    for rank, i in enumerate(order):
        prompt = questions.prompts[places[int(made.indices[i, 0])]]
        if (twin := _clip(questions, prompt, clips)) is not None:
            pair = [strip(read_video(clips_of[judged[i]])[0]), strip(twin)]
            write_png(out / "neighbours" / f"{rank:02d}.png", np.concatenate(pair))
    return {
        "row": ROW, "features": extractor.name, "not_finite": int((~finite).sum()),
        "training": questions.identity()["data"], "training_clips": len(training),
        "made": mean_interval(distances.tolist(), "neighbours", "made"),
        "unseen": mean_interval(usual.tolist(), "neighbours", "unseen"),
        "nearer_than_usual": share(bool(distance < limit) for distance in distances), "usual": UNUSUAL / 100,
    }  # fmt: skip


def _judge_of(plan: Plan, gauge: Gauge) -> int | None:
    """Which network sees what the video stage makes, one for clips before one for frames; None where none does."""
    length = plan.lengths.get(ROW)
    seeing = [] if length is None else [i for i, e in enumerate(gauge.extractors) if sees(e, length)]
    return min(seeing, key=lambda i: gauge.extractors[i].takes != "clips", default=None)


def _clips(plan: Plan) -> Clips:
    return Clips(plan.size, plan.frames, plan.fps)


def _too_short(questions: ShardQuestions, clips: Clips) -> UserError:
    return UserError(
        f"--training: none of {len(questions.prompts)} clips has {clips.count} frames at {clips.fps:g} fps; name "
        "the shards that the video stage trained on"
    )


def _training(
    shared: Path, questions: ShardQuestions, clips: Clips, extractor: FeatureExtractor
) -> tuple[Tensor, list[int]]:
    """Features [N,D] of the training clips and their places among the prompts; kept, so that they are made once."""
    path = shared / "features" / "training.safetensors"
    protocol = digest_of({"data": questions.identity(), "by": extractor.protocol(), "clips": vars(clips)})
    if kept := _kept(path, protocol):
        return kept["features"], kept["places"].tolist()
    found, places = [], []
    for place, prompt in enumerate(questions.prompts):
        clip = _clip(questions, prompt, clips)
        if clip is not None:
            frames = clip[None] if extractor.takes == "clips" else clip[chosen_frames(len(clip))]
            found.append(extractor(np.ascontiguousarray(frames)).mean(0))
            places.append(place)
    if not found:
        raise _too_short(questions, clips)
    features = torch.stack(found)
    write_tensors(path, {"features": features, "places": torch.tensor(places)}, {"protocol": protocol})
    return features, places


def _kept(path: Path, protocol: str) -> dict[str, Tensor] | None:
    """The features that an earlier call made, or the evaluation of another checkpoint."""
    try:
        with safe_open(path, "pt") as file:
            same = (file.metadata() or {}).get("protocol") == protocol
    except (SafetensorError, OSError):
        return None
    return read_tensors(path) if same else None


def _clip(questions: ShardQuestions, prompt: Prompt, clips: Clips) -> np.ndarray | None:
    try:
        return questions.clip(prompt, clips)
    except ClipError:
        return None  # `data check` counts it; here one clip more or less says nothing
