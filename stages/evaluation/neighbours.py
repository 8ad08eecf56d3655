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
from stages.evaluation.kept import FeatureFiles, digest_of, read_tensors, write_tensors
from stages.evaluation.measures import Gauge, chosen_frames
from stages.evaluation.questions import Clips, ShardQuestions
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


def nearest_training_clips(
    out: Path, files: FeatureFiles, plan: Plan, gauge: Gauge, location: str, split: str, shared: Path
) -> dict[str, Any] | None:
    """Figures of what the video stage made against up to MOST clips of the training shards, by the first network that
    sees clips (else frames); None where it made none. Pictures of the nearest pairs among the videos that are kept go
    to `out`/neighbours. shared: where the features of the training clips are kept, for all checkpoints.
    """
    clips_of = {i: path for i in range(SHOWN_CLIPS) if (path := clip_path(out, ROW, split, i)).is_file()}
    number = next((i for i, e in enumerate(gauge.extractors) if e.takes == "clips"), 0)
    numbers, features = files.of_split(split)
    if not gauge.extractors or f"{number}/{ROW}" not in features:
        return None
    extractor = gauge.extractors[number]
    clips = Clips(plan.size, plan.frames, plan.fps)
    questions = ShardQuestions(location, MOST, plan.seed, at_most=True)
    try:
        training, places = _training(shared, questions, clips, extractor)
        made, real = (nearest(features[f"{number}/{row}"].mean(1), training) for row in (ROW, "real"))
        distances, usual = made.distances[:, 0].numpy(), real.distances[:, 0].numpy()
        limit = float(np.percentile(usual, UNUSUAL))
        order = [int(i) for i in np.argsort(distances, kind="stable") if numbers[int(i)] in clips_of][:SHOWN]
        for rank, i in enumerate(order):
            prompt = questions.prompts[places[int(made.indices[i, 0])]]
            pair = [strip(read_video(clips_of[numbers[i]])[0]), strip(questions.clip(prompt, clips))]
            write_png(out / "neighbours" / f"{rank:02d}.png", np.concatenate(pair))
    finally:
        questions.close()
    return {
        "row": ROW, "features": extractor.name,
        "training": questions.identity()["data"], "training_clips": len(training),
        "made": mean_interval(distances.tolist(), "neighbours", "made"),
        "unseen": mean_interval(usual.tolist(), "neighbours", "unseen"),
        "nearer_than_usual": share(bool(distance < limit) for distance in distances), "usual": UNUSUAL / 100,
    }  # fmt: skip


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
        raise UserError(
            f"--training: none of {len(questions.prompts)} clips has {clips.count} frames at {clips.fps:g} fps; name "
            "the shards that the video stage trained on"
        )
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


def _clip(questions: ShardQuestions, prompt: Any, clips: Clips) -> np.ndarray | None:
    try:
        return questions.clip(prompt, clips)
    except ClipError:
        return None  # `data check` counts it; here one clip more or less says nothing
