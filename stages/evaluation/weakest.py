"""Which stage is weak, told without truth: on any data, by figures of what each stage makes from real inputs.

The built-in world's reader knows what is right (`statistics.losses`); of other data there are distances from real
clips, the likeness of frames and captions, and motion. N samples, K frames, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stages.evaluation.figures import LEAST, LIKE, distances, of_samples
from stages.evaluation.measures import MEASURES, labelled
from stages.evaluation.paired import SICK, Line, result_of, sample_lines, set_lines
from videodiff.metrics.intervals import compare_sets, set_interval
from videodiff.networks.features import FeatureExtractor
from videodiff.networks.features.extractor import told_apart

# Stage -> the row that shows what it is given, and the row that it makes of that, without any other stage's faults.
ALONE = {
    "autoencoder": ("real", "autoencoder"), "image": ("autoencoder", "image"), "video": ("autoencoder", "video_real"),
    "interpolation": ("autoencoder", "interpolation"),
}  # fmt: skip
RESAMPLES = 60
LISTED = 4  # figures in a sentence; the page has all
Sample = dict[str, Any]
Loss = Callable[[Any], float]  # what a stage loses on chosen samples
Told = dict[str, Any]


def stages_alone(
    samples: Sequence[Sample],
    features: Mapping[str, Tensor],
    extractors: Sequence[FeatureExtractor],
    named: Mapping[str, str],
    *key: str,
) -> list[Told]:
    """By each figure what every stage loses from real inputs, with intervals, and the stage that loses most, where
    these samples tell it from none and from the next one; needs two stages and 16 samples.

    samples: finished ones of a split, in the order of the features (`kept.FeatureFiles`). Kernel distances are added to
    those of the row before: they alone are unbiased at any N and so comparable between a first frame and a clip, where
    a Frechet distance is greater for fewer frames. named: measure -> network, for the labels.
    """
    found = [*_not_finite(samples), *_likeness(samples, named), *_motion(samples)]
    names = told_apart([extractor.name for extractor in extractors])
    for number, name in enumerate(names):
        found += _kernel(features, number, name)
    return [_told(label, losses, count, (*key, label)) for label, losses, count in found if len(losses) > 1]


def first_images(
    samples: Sequence[Sample],
    features: Mapping[str, Tensor],
    extractors: Sequence[FeatureExtractor],
    named: Mapping[str, str],
    *key: str,
) -> list[Line]:
    """What generated first images cost the video stage, against real ones: every share, measure and figure that both
    rows have, paired on prompts."""
    rows = ("video_real", "video_generated")
    if len(samples) < 2 or any(row not in samples[0]["rows"] for row in rows):
        return []
    first, second = ([result_of(sample, row) for sample in samples] for row in rows)
    like = [result_of(sample, "real") if "real" in sample["rows"] else None for sample in samples]
    told = list(sample_lines(first, second, like, tuple(MEASURES), dict(named), *key))
    names = told_apart([extractor.name for extractor in extractors])
    for number, extractor in enumerate(extractors):
        made = [f"{number}/{row}" for row in rows]
        if f"{number}/real" not in features or any(name not in features for name in made):
            continue
        classes = [features[f"{name}/classes"] for name in made if f"{name}/classes" in features]
        told += set_lines(
            features[f"{number}/real"], features[made[0]], features[made[1]],
            finite=(features[f"finite/{rows[0]}"].bool(), features[f"finite/{rows[1]}"].bool()),
            classes=(classes[0], classes[1]) if len(classes) == 2 else None,
            is_clip=extractor.has_texts, by=names[number], takes=extractor.takes, key=key,
        )  # fmt: skip
    return told


def weak_rows(alone: Sequence[Told]) -> set[str]:
    """The rows of the stages that some figure names."""
    return {ALONE[told["most"]][1] for told in alone if told["most"] is not None}


def alone_in_words(alone: Sequence[Told], where: str) -> str | None:
    """The weak stages as a sentence; None where no figure compares stages."""
    if not alone:
        return None

    def listed(told: Told) -> str:
        each = (f"{stage} {loss:.3g} ({low:.3g} to {high:.3g})" for stage, (loss, low, high) in told["losses"].items())
        return f"lost: {', '.join(each)}"

    said = [f"stage {t['most']} is weakest by {t['figure']} ({listed(t)})" for t in alone if t["most"] is not None]
    if undecided := [told for told in alone if told["most"] is None]:
        words = f"{undecided[0]['n']} prompts can't tell by {'; '.join(told['figure'] for told in undecided)}"
        if near := [told for told in undecided if told["more"]]:
            nearest = min(near, key=lambda told: int(told["more"]))
            words += f" (about {nearest['more']} more would by {nearest['figure'].partition(',')[0]})"
        said.append(words)
    return f"Each stage alone, from real inputs, on {where}: {'; '.join(said)}."


def cost_in_words(lines: Sequence[Line]) -> str | None:
    """What stage 1 costs, of the figures that tell the first few; None without any."""
    if not lines:
        return None

    def listed(verdict: str) -> str:
        told = [line for line in lines if line["verdict"] == verdict]
        first = [f"{line['figure']} {line['first']:.4g} to {line['second']:.4g}" for line in told[:LISTED]]
        return "; ".join(first + ([f"{len(told) - LISTED} more"] if len(told) > LISTED else [])) or "no figure"

    undecided = sum(line["verdict"] == "can't tell" for line in lines)
    return (
        f"Generated first images in place of real ones make the video worse by {listed('worse')}. Better by "
        f"{listed('better')}. {undecided} of {len(lines)} figures can't tell."
    )


def _told(label: str, losses: Mapping[str, Loss], count: int, key: tuple[str, ...]) -> Told:
    known = {stage: _remembered(loss) for stage, loss in losses.items()}
    found = {stage: set_interval(loss, (count,), *key, resamples=RESAMPLES) for stage, loss in known.items()}
    worst, second = sorted(found, key=lambda stage: -found[stage].value)[:2]
    others: tuple[Loss, Loss] = (lambda i: 0.0, known[second])
    tests = [compare_sets(known[worst], other, count, *key, resamples=RESAMPLES) for other in others]
    tells = all(test.verdict == "better" for test in tests)  # more of a loss
    more = None if tells or any(test.more is None for test in tests) else max(test.more or 0 for test in tests)
    return {
        "figure": label, "n": count,
        "losses": {stage: [each.value, each.low, each.high] for stage, each in found.items()},
        "most": worst if tells else None, "more": more,
    }  # fmt: skip


def _remembered(loss: Loss) -> Loss:
    """All stages are drawn alike: what one loses on some samples is asked for three times."""
    known: dict[bytes, float] = {}

    def remembered(i: Any) -> float:
        key = i.tobytes()
        if key not in known:
            known[key] = loss(i)
        return known[key]

    return remembered


def _less(after: Loss, before: Loss) -> Loss:
    return lambda i: after(i) - before(i)


Found = Iterator[tuple[str, dict[str, Loss], int]]


def _values(samples: Sequence[Sample], name: str, stages: Sequence[str]) -> dict[str, np.ndarray]:
    """A measure of the rows of these stages, [N] each, of the samples of which all rows have it. What is not finite has
    the worst value that any has."""
    rows = dict.fromkeys(row for stage in stages for row in ALONE[stage])
    told = [[result_of(sample, row).value(name) for row in rows] for sample in samples]
    values = np.array([each for each in told if None not in each], np.float64).reshape(-1, max(1, len(rows)))
    if not np.isfinite(values).any():
        return {}
    return dict(zip(rows, np.where(np.isnan(values), np.nanmin(values), values).T, strict=True))


def _stages(samples: Sequence[Sample], name: str) -> list[str]:
    """The stages of which some sample has a measure both before and after, if there are enough of them."""
    if len(samples) < LEAST:
        return []

    def has(row: str) -> bool:
        return any(row in sample["rows"] and name in sample["rows"][row]["measures"] for sample in samples)

    return [stage for stage, (before, after) in ALONE.items() if has(before) and has(after)]


def _likeness(samples: Sequence[Sample], named: Mapping[str, str]) -> Found:
    name = "text_likeness"
    values = _values(samples, name, _stages(samples, name))
    losses: dict[str, Loss] = {
        stage: (lambda i, a=values[before], b=values[after]: float(np.mean(a[i] - b[i])))
        for stage, (before, after) in ALONE.items()
        if before in values and after in values
    }
    count = len(next(iter(values.values()), ()))
    if count >= LEAST:
        yield labelled(name, named.get(name)), losses, count


def _motion(samples: Sequence[Sample]) -> Found:
    """How much further off the real clips' mean each stage's is than that of what it is given, in percent of it."""
    stages = _stages(samples, "motion")
    values = _values(samples, "motion", stages)
    count = len(next(iter(values.values()), ()))
    losses: dict[str, Loss] = {}
    smooth = [s["rows"].get("real_smooth", {}).get("measures", {}).get("motion") for s in samples]
    likes = {"real": values.get("real")}
    likes["real_smooth"] = np.array(smooth, np.float64) if None not in smooth and len(smooth) == count else None

    def off(row: str) -> Callable[[Any], float] | None:
        real = likes.get(LIKE.get(row, "real"))
        if row == "real":
            return lambda i: 0.0
        if real is None or real.mean() <= 0:
            return None
        return lambda i, a=values[row], real=real: float(100 * abs(a[i].mean() / real[i].mean() - 1))

    for stage in stages:
        before, after = (off(row) for row in ALONE[stage])
        if before is not None and after is not None:
            losses[stage] = _less(after, before)
    if count >= LEAST and np.all([like is None or like.mean() > 0 for like in likes.values()]):
        yield "motion off the real clips', % of theirs", losses, count


def _not_finite(samples: Sequence[Sample]) -> Found:
    """Asked only where some video is not finite, in percent."""
    rows = {row for _, row in ALONE.values() if samples and row in samples[0]["rows"]}
    sick = {row: np.array([100.0 * (not s["rows"][row]["finite"]) for s in samples]) for row in rows}
    if len(samples) >= LEAST and any(each.any() for each in sick.values()):
        losses: dict[str, Loss] = {
            stage: (lambda i, a=sick[row]: float(a[i].mean())) for stage, (_, row) in ALONE.items() if row in rows
        }
        yield SICK, losses, len(samples)


def _kernel(features: Mapping[str, Tensor], number: int, name: str) -> Found:
    def has(row: str) -> bool:
        whole = features.get(f"finite/{row}")
        return f"{number}/{row}" in features and whole is not None and int(whole.sum()) >= LEAST

    stages = {stage: rows for stage, rows in ALONE.items() if all(map(has, rows)) and has(LIKE[rows[1]])}
    if not stages:
        return
    every = [features[f"finite/{row}"].bool() for rows in stages.values() for row in rows]
    finite = torch.stack(every).all(0)
    if (count := int(finite.sum())) < LEAST:
        return
    distance = distances(False)["kernel"]

    def of(row: str, frames: int) -> Loss:
        if row == "real":  # nothing lies between real clips and themselves
            return lambda i: 0.0
        real, made = (features[f"{number}/{each}"][finite][:, :frames] for each in (LIKE[row], row))
        return of_samples(distance, real, made)

    losses: dict[str, Loss] = {}
    for stage, (before, after) in stages.items():
        frames = min(features[f"{number}/{row}"].shape[1] for row in (before, after))  # of a picture the first frame
        losses[stage] = _less(of(after, frames), of(before, frames))
    yield f"kernel distance, {name}", losses, count
