"""Which stage is weak without any truth, and what stage 1 costs: on drawn features whose truth is known."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from stages.evaluation.figures import set_figures
from stages.evaluation.paired import Result, sample_lines, set_lines
from stages.evaluation.report import _confusions, _weakest
from stages.evaluation.weakest import ALONE, alone_in_words, cost_in_words, first_images, stages_alone, weak_rows

N, K, D = 48, 3, 6
NETWORK = SimpleNamespace(name="network", takes="pictures", has_texts=True)
NAMED = {"text_likeness": "network"}
MADE = ("autoencoder", "image", "video_real", "video_generated", "interpolation")


def drawn(seed: int = 0, **shifts: float) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Samples and features of N prompts, as they are kept: rows whose features lie off the real ones' by a shift."""
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randn(N, 1, D, generator=generator)

    def clip(like: Tensor, shift: float) -> Tensor:
        return like + shift + 0.3 * torch.randn(N, K, D, generator=generator)

    features = {f"0/{row}": clip(prompts, 0.0) for row in ("real", "real_smooth")}
    features["0/autoencoder"] = features["0/real"] + shifts.get("autoencoder", 0.0)
    for row in MADE[1:]:  # other clips of the same kind
        other = torch.randn(N, 1, D, generator=generator)
        features[f"0/{row}"] = clip(other, shifts.get(row, 0.0))[:, : 1 if row == "image" else K]
    features |= {f"finite/{name.removeprefix('0/')}": torch.ones(N, dtype=torch.bool) for name in list(features)}
    rng = np.random.default_rng(seed)
    samples = []
    for number in range(N):
        likeness, rows = rng.normal(30, 3), {}
        for name in ("real", "real_smooth", *MADE):
            measures = {"text_likeness": likeness + rng.normal(0, 1) - 4 * shifts.get(name, 0.0)}
            if name != "image":
                measures["motion"] = rng.normal(0.1, 0.02)
            rows[name] = {"read": {}, "consistent": True, "finite": True, "measures": measures}
        samples.append({"split": "data", "number": number, "truth": None, "rows": rows})
    return samples, features


@pytest.mark.parametrize("stage", list(ALONE))
def test_a_broken_stage_is_named_by_every_figure_that_sees_it(stage: str) -> None:
    row = ALONE[stage][1]
    samples, features = drawn(**{row: 1.0})
    if stage == "autoencoder":  # what it spoils is spoilt in all that follows, and is no fault of those
        samples, features = drawn(**dict.fromkeys(MADE, 1.0))
    told = {each["figure"]: each for each in stages_alone(samples, features, [NETWORK], NAMED, "data")}
    assert told["CLIP score, network"]["most"] == stage
    assert told["kernel distance, network"]["most"] == stage
    lost, low, high = told["CLIP score, network"]["losses"][stage]
    assert low < 4 < high
    assert lost == pytest.approx(4, abs=0.8)
    others = [each for name, each in told["kernel distance, network"]["losses"].items() if name != stage]
    assert all(low < 0.1 for _, low, _ in others)
    assert weak_rows([*told.values()]) == {row}
    words = alone_in_words([*told.values()], "the data") or ""
    assert f"stage {stage} is weakest by CLIP score, network (lost: autoencoder" in words
    assert "can't tell by motion" in words
    entries = {"losses": {"data": {"most": None}}, "alone": {"data": [*told.values()]}}
    assert _weakest(entries) == [(row, "data")]
    assert _weakest({"losses": {"data": {"most": "image"}}, "alone": {}}) == [("image", "data")]


def test_of_stages_that_are_sound_none_is_accused() -> None:
    named = []
    for seed in range(10):
        found = stages_alone(*drawn(seed), [NETWORK], NAMED, "data")
        assert len(found) == 3
        named += [told["most"] for told in found]
    assert len(named) - named.count(None) <= 2  # of 30, at 95 % and against a second one too


def test_a_video_that_stands_still_or_is_not_finite_is_named() -> None:
    samples, features = drawn()
    for sample in samples:
        sample["rows"]["video_real"]["measures"]["motion"] = 0.0
    told = {each["figure"]: each for each in stages_alone(samples, features, [NETWORK], NAMED, "data")}
    motion = told["motion off the real clips', % of theirs"]
    assert motion["most"] == "video"
    assert motion["losses"]["video"][0] == pytest.approx(100, abs=8)
    for number, sample in enumerate(samples):
        if number % 2:
            sample["rows"]["video_real"] |= {"finite": False, "measures": {}}
    features["finite/video_real"] = torch.arange(N) % 2 == 0
    told = {each["figure"]: each for each in stages_alone(samples, features, [NETWORK], NAMED, "data")}
    assert told["videos that are not finite, %"]["most"] == "video"
    assert told["videos that are not finite, %"]["losses"]["video"][0] == 50
    assert told["CLIP score, network"]["n"] == N  # they count, as the worst
    assert told["CLIP score, network"]["most"] == "video"
    assert told["kernel distance, network"]["n"] == N / 2
    assert stages_alone(samples[:15], {}, [NETWORK], NAMED, "data") == []


def test_what_generated_first_images_cost_is_told_by_every_figure() -> None:
    samples, features = drawn(video_generated=1.0)
    lines = {line["figure"]: line for line in first_images(samples, features, [NETWORK], NAMED, "data")}
    likeness = lines["CLIP score, network"]
    assert likeness["verdict"] == "worse"
    assert likeness["interval"][0] < -4 < likeness["interval"][1]
    frechet = lines["Frechet distance, network"]
    assert frechet["interval"][0] < D * 1.0**2 < frechet["interval"][1]  # |shift|^2
    assert lines["kernel distance (KID, unlike prompts), network"]["verdict"] == "worse"
    assert lines["motion, % of diagonal a second, off the real clips'"]["verdict"] == "can't tell"
    words = cost_in_words([*lines.values()]) or ""
    assert words.startswith("Generated first images in place of real ones make the video worse by CLIP score, network ")
    alike = first_images(*drawn(), [NETWORK], NAMED, "data")
    assert sum(line["verdict"] != "can't tell" for line in alike) <= 1
    assert first_images([{"rows": {"real": {}}}] * 3, {}, [NETWORK], NAMED, "data") == []


def of(values: list[float | None], name: str) -> list[Result]:
    rows = [
        {"read": {}, "consistent": True, "finite": v is not None, "measures": {} if v is None else {name: v}}
        for v in values
    ]
    return [Result(row) for row in rows]


def test_videos_that_are_not_finite_count_against_the_side_that_made_them() -> None:
    rng = np.random.default_rng(0)
    first = rng.normal(25.0, 2, 40)
    second: list[float | None] = [*(first + rng.normal(0.5, 0.5, 40))]

    def told(side: list[float | None]) -> list[dict[str, Any]]:
        name = "first_frame_psnr"
        return list(sample_lines(of([*first], name), of(side, name), [None] * 40, (name,), {}, "k"))

    assert [line["verdict"] for line in told(second)] == ["better"]
    second[:16] = [None] * 16
    sick, psnr = told(second)
    assert (sick["figure"], sick["second"], sick["verdict"]) == ("videos that are not finite, %", 40.0, "worse")
    assert psnr["n"] == 40
    assert psnr["verdict"] == "worse"  # of those that are left alone it would be better
    assert psnr["not_finite"] == sick["not_finite"] == [0, 16]
    known = [value for value in (*first, *second) if value is not None]
    filled = [min(known) if value is None else value for value in second]
    assert psnr["difference"] == pytest.approx(np.mean(filled) - first.mean())
    # Off the real clips' mean: what failed is as far off as any.
    real = of([*rng.normal(5.0, 1.0, 40)], "motion")
    same = [*rng.normal(5.0, 1.0, 40)]
    failed: list[float | None] = [*same]
    failed[:10] = [None] * 10
    (_, motion) = sample_lines(of(same, "motion"), of(failed, "motion"), real, ("motion",), {}, "k")
    assert motion["second"] > motion["first"]


def test_a_set_that_lost_videos_is_not_called_better_for_it() -> None:
    generator = torch.Generator().manual_seed(0)
    real, far, near = torch.randn(3, 60, 1, 4, generator=generator)
    far, whole = far + 1.0, torch.ones(60, dtype=torch.bool)
    classes = torch.eye(4)[torch.arange(60) % 4] * 0.9 + 0.025, torch.full((60, 4), 0.25)

    def lines(finite: Tensor) -> dict[str, dict[str, Any]]:
        sides = (whole, finite)
        found = set_lines(real, far, near, sides, classes, False, "network", "clips", ("k",))
        return {line["figure"].partition(",")[0]: line for line in found}

    told = lines(whole)
    assert told["Frechet distance"]["verdict"] == "better"
    score = told["inception score"]
    assert (score["verdict"], score["second"]) == ("worse", pytest.approx(1.0))
    assert score["first"] > 2.5
    some = lines(torch.arange(60) % 6 > 0)
    assert (some["Frechet distance"]["verdict"], some["Frechet distance"]["not_finite"]) == ("can't tell", [0, 10])
    assert some["inception score"]["verdict"] == "worse"
    assert some["Frechet distance"]["n"] == 50


def test_a_rank_that_half_the_samples_do_not_reach_has_its_value_and_a_mark() -> None:
    generator = torch.Generator().manual_seed(0)
    texts = torch.nn.functional.normalize(torch.randn(18, 8, generator=generator), dim=1)
    features = {"0/real": texts[:, None], "0/texts": texts, "finite/real": torch.ones(18)}
    network = SimpleNamespace(name="network", kind="bundled", takes="pictures", has_texts=True)
    told = {f["figure"]: f for f in set_figures(["real"], features, [str(i) for i in range(18)], [network], "k")}
    tenth = told["text_to_image_r10"]
    assert tenth["value"] == 1.0
    assert tenth["interval"][0] == pytest.approx(0.824, abs=5e-4)  # Wilson's of 18 of 18
    assert "half the samples are too few for this rank" in tenth["caution"]
    first = told["text_to_image_r1"]
    assert first["value"] == 1.0
    assert first["interval"] == tenth["interval"]  # all are found: no half differs
    assert "half the samples" not in first["caution"]


def test_confusions_of_a_data_set_are_shown() -> None:
    row = {"row": "image", "split": "data", "confusions": {"colour": {"red": {"blue": 3, "red": 1}}}}
    (told,) = _confusions([row])
    assert told["wrong"] == 3
