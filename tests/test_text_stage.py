"""The text stage: towers learn to tell clips apart, by pictures, by second captions and from wrong ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_stages import Clips, stage_config, trained

from data_pipeline import world_two
from data_pipeline.world import render_clip
from stages.text import Negatives, TextStage, TextTask, contrast
from videodiff.batch import VideoBatch
from videodiff.model import Model
from videodiff.networks.features.extractor import film_strip
from videodiff.networks.tokenizer import build_vocabulary
from videodiff.parts import VOCABULARY, WORDS

TINY = {"width": 16, "layers": 1, "heads": 2, "image_size": 32, "image_width": 16, "image_layers": 1}
TINY |= {"image_heads": 2, "embed_dim": 16}


def test_the_text_stage_learns_to_tell_clips_apart(toy_model: Path, tmp_path: Path) -> None:
    base, source = Model.load(toy_model), Clips(4, 8.0)
    build_vocabulary(source.batch(list(range(6))).captions, tmp_path / VOCABULARY, tmp_path / WORDS, 100)
    config = stage_config(TextStage, tmp_path, frames=4, network=TINY)
    torch.manual_seed(1)  # of the network
    task = TextTask(config, base, tmp_path / VOCABULARY, tmp_path / WORDS)
    batch = source.batch(list(range(6)))
    before = task.loss(task.module, batch, seed=0)
    assert before.per_sample.shape == (6,)
    assert abs(float(before.per_sample.detach().mean()) - np.log(6)) < 1  # knows nothing yet
    model = trained(config, task, source)
    after = task.loss(task.module, batch, seed=0)
    assert float(after.per_sample.detach().mean()) < float(before.per_sample.detach().mean())
    assert model.config.stages() == ["autoencoder", "text"]
    assert model.text.encode(["a red circle"]).tokens.shape == (1, 32, 16)
    assert model.text.unknown_words("a zebra") == ["zebra"]


def test_second_captions_alone_tell_a_tower_what_means_the_same(toy_model: Path, tmp_path: Path) -> None:
    """Where pictures say nothing, the second captions still bring wordings of one motion together."""
    base, source = Model.load(toy_model), Clips(4, 8.0)
    batch = source.batch(list(range(6)))
    clips = [render_clip(0, number, 32, 4, 8.0) for number in range(6)]
    captions = [caption for clip in clips for caption in clip.captions]
    build_vocabulary(captions, tmp_path / VOCABULARY, tmp_path / WORDS, 100)
    blank = replace(batch, frames=torch.zeros_like(batch.frames))
    second = replace(blank, paraphrases=tuple(clip.captions[1] for clip in clips))
    share = {}
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        config = stage_config(TextStage, tmp_path, frames=4, network=TINY, paraphrase_weight=weight)
        task = TextTask(config, base, tmp_path / VOCABULARY, tmp_path / WORDS)
        optimizer = torch.optim.Adam(task.module.parameters(), lr=3e-3)
        for _ in range(30):
            optimizer.zero_grad()
            output = task.loss(task.module, second, seed=0)
            output.per_sample.mean().backward()
            optimizer.step()
        with torch.no_grad():
            whole = task.loss(task.module, second, seed=0)
            alone = task.loss(task.module, blank, seed=0)
        assert ("paraphrase" in whole.metrics) == (weight > 0)
        assert "paraphrase" not in alone.metrics
        tower = task.module.clip
        with torch.no_grad():
            pairs = [tower.encode_text(task.module.tokenize(list(texts)), normalize=True)
                     for texts in (second.captions, second.paraphrases)]  # fmt: skip
        found = (pairs[0] @ pairs[1].T).argmax(1) == torch.arange(6)
        share[weight] = float(found.double().mean())
    assert share[1.0] == 1.0
    assert share[0.0] < 1.0


def test_wrong_captions_are_rivals_of_the_right_ones() -> None:
    """The loss with captions that are wrong about a clip, against the sum over all rivals written out."""
    torch.manual_seed(0)
    texts, pictures, wrong = (F.normalize(torch.randn(4, 5), dim=1) for _ in range(3))
    told, usable, scale = (
        torch.tensor([True, False, True, True]),
        torch.tensor([True, True, True, False]),
        torch.tensor(7.0),
    )
    for of_texts in (False, True):
        loss, _ = contrast(texts, pictures, scale, usable, Negatives(wrong, told), of_texts)
        for row in range(3):  # the fourth is a bad clip
            rivals = torch.stack([*texts[:3], wrong[0], wrong[2]])
            by_picture = (scale * rivals @ pictures[row]).softmax(0)[row].log()
            rivals = torch.stack([*pictures[:3], *((wrong[0], wrong[2]) if of_texts else ())])
            by_text = (scale * rivals @ texts[row]).softmax(0)[row].log()
            assert loss[row].item() == pytest.approx(-(by_picture + by_text).item() / 2, rel=1e-5)
    untold, _ = contrast(texts, pictures, scale, usable, Negatives(wrong, torch.zeros(4, dtype=torch.bool)))
    torch.testing.assert_close(untold[:3], contrast(texts, pictures, scale, usable)[0][:3])
    assert Negatives(pictures, told).beaten(texts, pictures).tolist() == [0, 3]
    assert Negatives(-pictures, told).beaten(pictures, pictures).tolist() == [3, 3]


def test_a_batch_with_wrong_captions_has_them_for_rivals(toy_model: Path, tmp_path: Path) -> None:
    """One clip has none; the loss is that of its parts, and without any it is what it was."""
    base, network = Model.load(toy_model), {**TINY, "context_length": 48}
    clips = [world_two.render_clip(0, number, 32, 4, 8.0) for number in range(6)]
    build_vocabulary([text for clip in clips for text in clip.captions], tmp_path / VOCABULARY, tmp_path / WORDS, 100)
    batch = VideoBatch(
        frames=torch.from_numpy(np.stack([clip.frames for clip in clips])),
        captions=tuple(clip.captions[0] for clip in clips),
        fps=torch.full((6,), 8.0),
        numbers=torch.arange(6),
        keys=tuple(clip.key for clip in clips),
        weight=torch.ones(6),
        paraphrases=tuple(clip.captions[1] for clip in clips),
        negatives=("", *(clip.meta["negatives"][0] for clip in clips[1:])),
    )
    config = stage_config(TextStage, tmp_path, frames=4, network=network)
    task = TextTask(config, base, tmp_path / VOCABULARY, tmp_path / WORDS)
    told, usable = torch.tensor([False] + [True] * 5), torch.ones(6, dtype=torch.bool)
    with torch.no_grad():
        output = task.loss(task.module, batch, seed=0)
        tower = task.module.clip
        texts, seconds, wrong = (
            tower.encode_text(task.module.tokenize(list(each)), normalize=True)
            for each in (batch.captions, batch.paraphrases, batch.negatives)
        )
        pictures = tower.encode_image(film_strip(batch.frames, 32) / 127.5 - 1, normalize=True)
        scale, negatives = tower.logit_scale.exp(), Negatives(wrong, told)
        parts = [contrast(texts, pictures, scale, usable, negatives)[0]]
        parts.append(contrast(texts, seconds, scale, usable, negatives, of_texts=True)[0])
        torch.testing.assert_close(output.per_sample, sum(parts), rtol=1e-4, atol=1e-5)
        nearer = (pictures[1:] * (texts - wrong)[1:]).sum(1) > 0
        assert output.tallies["negative"].tolist() == [nearer.sum().item(), 5]
        plain = task.loss(task.module, replace(batch, negatives=("",) * 6), seed=0)
        assert (plain.per_sample < output.per_sample).all()
        assert plain.tallies == {}
        # One that is the caption again, or differs behind what the tower reads, is no rival.
        long = "a red square " * 30
        plain = replace(batch, captions=(long, *batch.captions[1:]), negatives=())
        same = replace(plain, negatives=(long + "above", *plain.captions[1:]))
        told = [task.loss(task.module, each, seed=0).per_sample for each in (same, plain)]
        assert torch.equal(*told)
        task.config = config.model_copy(update={"hard_negatives": False})
        assert task.loss(task.module, batch, seed=0).tallies == {}


def test_a_film_strip_shows_four_moments_in_reading_order() -> None:
    frames = torch.arange(7, dtype=torch.uint8).view(1, 7, 1, 1, 1).expand(1, 7, 8, 8, 3) * 30
    strip = film_strip(frames, 8)
    assert strip.shape == (1, 3, 8, 8)
    corners = [strip[0, 0, y, x].item() for y in (0, 7) for x in (0, 7)]
    assert corners == pytest.approx([0, 60, 120, 180], abs=1e-3)
