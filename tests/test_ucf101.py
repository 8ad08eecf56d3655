"""The UCF-101 protocol on a folder of its shape, of real AVI files, judged by TorchScript networks for clips."""

import json
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stages.evaluation.command import Request, main
from stages.evaluation.questions import Clips
from stages.evaluation.ucf101 import UCF101Questions, bare_name, protocol_line
from tests.test_features import saved_script
from videodiff.errors import UserError
from videodiff.networks.features import TorchScriptFeatures, open_features

COLOURS = {"ApplyEyeMakeup": (200, 30, 30), "BabyCrawling": (30, 200, 30), "YoYo": (30, 30, 200)}
CLIPS = Clips(32, 7, 16.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of four videos each, 25 frames a second, MPEG-4 in AVI as UCF-101's; a file that is no video."""
    root = tmp_path_factory.mktemp("ucf") / "UCF-101"
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for group in range(1, 5):
            frames = np.full((30, 48, 64, 3), colour, np.uint8)
            frames[:, :, : 8 * group] = 255
            path = root / name / f"v_{name}_g{group:02d}_c01.avi"
            imageio.mimwrite(path, list(frames), fps=25, codec="mpeg4", quality=9, macro_block_size=None)
    (root / "YoYo" / "readme.txt").write_text("no video")
    return root


class Colours(nn.Module):
    """Which of the three channels is strongest, as logits."""

    def forward(self, x: Tensor) -> Tensor:
        return 8 * x.flatten(2).mean(dim=2)


def test_as_many_of_each_class_and_none_twice_before_all(folder: Path) -> None:
    questions = UCF101Questions(folder, 12, seed=3)
    try:
        assert [prompt.text for prompt in questions.prompts[:3]] == ["apply eye makeup", "baby crawling", "yo yo"]
        assert (questions.classes, questions.per_class) == (3, 4)
        for place, colour in enumerate(COLOURS.values()):
            clips = [questions.clip(prompt, CLIPS) for prompt in questions.prompts if prompt.place == place]
            assert all(clip.shape == (7, 32, 32, 3) for clip in clips)
            assert all(np.abs(clip[:, :, -2:].mean((0, 1, 2)) - colour).max() < 12 for clip in clips)
            # The white bar tells which of the four videos it is (of 64 columns the middle 48 are seen).
            assert len({int((clip[0, 16].min(axis=1) > 128).sum()) for clip in clips}) == 4
        again = UCF101Questions(folder, 12, seed=3)
        assert again.identity() == questions.identity()
        assert np.array_equal(again.clip(again.prompts[5], CLIPS), questions.clip(questions.prompts[5], CLIPS))
        again.close()
    finally:
        questions.close()
    assert bare_name("HandstandPushups") == "handstand pushups"
    with pytest.raises(UserError, match="need a multiple of 3; --num-prompts 300 makes 100 of each"):
        UCF101Questions(folder, 10, seed=3)
    with pytest.raises(UserError, match="no folder of a class"):
        UCF101Questions(folder / "YoYo", 10, seed=3)


def test_sentences_are_of_every_class(folder: Path, tmp_path: Path) -> None:
    written = {name: f"a video of {bare_name(name)}" for name in COLOURS}
    path = tmp_path / "sentences.json"
    path.write_text(json.dumps(written))
    questions = UCF101Questions(folder, 3, 0, path)
    assert questions.prompts[2].text == "a video of yo yo"
    assert questions.identity() != UCF101Questions(folder, 3, 0).identity()
    path.write_text(json.dumps({"YoYo": "a"}))
    with pytest.raises(UserError, match="no sentence for ApplyEyeMakeup and 1 more"):
        UCF101Questions(folder, 3, 0, path)
    with pytest.raises(UserError, match="--sentences is of the UCF-101 protocol"):
        main(Request("demo", "text", 3, 0, tmp_path / "out", sentences=path))


def test_the_protocol_stands_beside_fvd_and_inception_score(
    toy_model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = saved_script(Colours(), tmp_path / "colours.pt")
    judges = tmp_path / "judges.yaml"
    judges.write_text(
        f"features:\n  - {{kind: torchscript, name: C3D, path: {told['path']}, sha256: {told['sha256']}, takes: clips, "
        "size: 16, range: [0, 1], classes: logits}\n"
    )
    request = Request(str(toy_model), "interpolation", 18, 0, tmp_path / "out", data=f"ucf101:{folder}", judges=judges)
    main(request)
    result = json.loads((tmp_path / "out/evaluation.json").read_text())
    line = protocol_line(result["protocol"], result["figures"])
    assert line is not None
    assert line == result["ucf101"]
    assert line in capsys.readouterr().out.replace("\n", "")
    assert "6 clips of each of 3 classes (NOT the data set's 101), bare class names" in line
    assert "whole: FVD" in line
    # The score of the twelve videos, exp(mean KL), written out: white bars over 0, 1, 2 and 3 sixths of what is seen.
    real = next(f for f in result["figures"] if f["row"] == "real" and f["figure"] == "inception_clips")
    colours = np.array([[c + (255 - np.array(c)) * bar / 6 for bar in range(4)] for c in COLOURS.values()]) / 255
    with torch.no_grad():
        p = Colours()(torch.from_numpy(colours).reshape(12, 3, 1, 1, 1)).softmax(1)
    expected = float((p * (p / p.mean(0)).log()).sum(1).mean().exp())
    assert 1.5 < expected < 3
    assert real["value"] == pytest.approx(expected, rel=0.1)  # 18 clips don't show all videos equally often
    made = next(f for f in result["figures"] if f["row"] == "whole" and f["figure"] == "inception_clips")
    assert made["value"] < real["value"]  # an untrained model makes no classes
    distance = next(f for f in result["figures"] if (f["row"], f["figure"]) == ("whole", "frechet"))
    assert f"whole: FVD {distance['value']:.1f}" in line


def test_probabilities_are_checked(tmp_path: Path) -> None:
    told = saved_script(Colours(), tmp_path / "colours.pt")
    config = TorchScriptFeatures(**told, takes="clips", size=8, range=(0.0, 1.0), classes="probabilities")
    clips = np.full((2, 4, 8, 8, 3), 200, np.uint8)
    with pytest.raises(UserError, match="are no probabilities; say classes: logits"):
        open_features(config, None, "cpu").probabilities(clips)
    logits = open_features(config.model_copy(update={"classes": "logits"}), None, "cpu")
    features, probabilities = logits.with_probabilities(clips)
    torch.testing.assert_close(probabilities, features.softmax(1))


def test_the_text_tower_alone_is_judged(toy_model: Path, tmp_path: Path) -> None:
    main(Request(str(toy_model), "text", 17, 0, tmp_path / "out", 0))
    told = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert [entry["row"] for entry in told["rows"]] == ["real"]
    assert told["rows"][0]["measures"]["captions_cut"]["n"] == 17
    found = {(f["figure"], f["features"]) for f in told["figures"]}
    assert len({features for figure, features in found if figure == "text_to_image_r1"}) == 2  # of frames and of clips
