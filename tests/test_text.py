"""Text: the vocabulary and its round trip, lost and unknown words, features against open_clip, refusals."""

import gzip
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from videodiff.errors import UserError
from videodiff.networks import text as texts
from videodiff.networks import tokenizer
from videodiff.networks.text import ContrastiveTextModel, PretrainedText, TextConfig, TextTower
from videodiff.networks.tokenizer import build_vocabulary

CAPTIONS = [
    "a large red circle moving left on a white background",
    "A small blue square stays still, on a striped floor.",
    "the green triangle's growing",
    "a large red circle moves right",
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TextConfig:
    folder = tmp_path_factory.mktemp("vocabulary")
    build_vocabulary(CAPTIONS, folder / "vocabulary.txt.gz", folder / "words.txt")
    return TextConfig(
        width=16, layers=2, heads=2, context_length=16, embed_dim=12, image_size=16, patch_size=8, image_layers=1,
        image_width=16, image_heads=2, vocabulary=str(folder / "vocabulary.txt.gz"), words=str(folder / "words.txt"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(config: TextConfig) -> ContrastiveTextModel:
    torch.manual_seed(0)
    return ContrastiveTextModel(config).eval()


@pytest.fixture(scope="module")
def tower(config: TextConfig, model: ContrastiveTextModel) -> TextTower:
    return TextTower(config, model.state_dict())


def test_importing_does_not_import_open_clip() -> None:
    code = "import sys, videodiff.networks.text; sys.exit('open_clip' in sys.modules or 'torchvision' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_each_word_is_one_token_and_comes_back(tower: TextTower) -> None:
    ids = tower.tokenizer(CAPTIONS)
    assert ids.shape == (4, 16)
    assert (ids[0] != 0).sum() == len(CAPTIONS[0].split()) + 2
    assert tower.tokenizer.decode(ids[0]) == CAPTIONS[0]
    # A word never seen is spelled in pieces and comes back too: to byte pairs no word is unknown.
    assert tower.tokenizer.decode(tower.tokenizer(["a zébra"])[0]) == "a zébra"


def test_the_vocabulary_is_a_function_of_the_captions(config: TextConfig, tmp_path: Path) -> None:
    build_vocabulary(reversed(CAPTIONS), tmp_path / "v", tmp_path / "w")
    assert config.vocabulary is not None
    assert config.words is not None
    assert (tmp_path / "v").read_bytes() == Path(config.vocabulary).read_bytes()
    assert (tmp_path / "w").read_bytes() == Path(config.words).read_bytes()
    build_vocabulary(CAPTIONS, tmp_path / "few", tmp_path / "w", num_merges=5)
    few = texts.Tokenizer(str(tmp_path / "few"), None, 60)
    assert few.size == 512 + 5 + 2
    assert few.decode(few(CAPTIONS[:1])[0]) == CAPTIONS[0]


def test_the_most_frequent_pair_is_merged_first(tmp_path: Path) -> None:
    # Sennrich et al. 2016: of "low low low newer" the pair (l, o) counts 3, as (o, w</w>) does; ties by name.
    build_vocabulary(["low low low newer"], tmp_path / "v", tmp_path / "w", num_merges=2)

    assert gzip.decompress((tmp_path / "v").read_bytes()).decode().split("\n")[1:] == ["l o", "lo w</w>"]


def test_captions_without_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no words"):
        build_vocabulary(["", "  "], tmp_path / "v", tmp_path / "w")


def test_lost_words_are_those_that_do_not_come_back(tower: TextTower) -> None:
    caption = " ".join(CAPTIONS[:2]).lower()
    lost = tower.lost_words(caption)
    # 16 places, two of them for start and end: ten words of the first caption and four of the second.
    assert lost == ["stays", "still", ",", "on", "a", "striped", "floor", "."]
    assert tower.tokenizer.decode(tower.tokenizer([caption])[0]) == f"{CAPTIONS[0]} a small blue square"
    assert tower.lost_words(CAPTIONS[0]) == []


def test_unknown_words_are_those_not_trained_on(tower: TextTower) -> None:
    assert tower.unknown_words("A RED zebra, moving like a zebra!") == ["zebra", "like", "!"]
    assert tower.unknown_words(CAPTIONS[1]) == []


def test_features_are_open_clips(tower: TextTower, model: ContrastiveTextModel) -> None:
    features = tower.encode(CAPTIONS)
    assert features.tokens.shape == (4, 16, 16)
    assert features.pooled.shape == (4, 12)
    wanted = model.clip.encode_text(model.tokenize(CAPTIONS), normalize=True)
    torch.testing.assert_close(features.pooled, wanted, atol=1e-6, rtol=1e-5)
    assert features.mask.sum(1).tolist() == [(row != 0).sum() for row in tower.tokenizer(CAPTIONS)]
    assert not any(parameter.requires_grad for parameter in tower.parameters())


def test_a_token_sees_only_what_stands_before_it(tower: TextTower) -> None:
    one = tower.encode(["a large red circle moving left"])
    other = tower.encode(["a large red square growing"])
    torch.testing.assert_close(one.tokens[:, :4], other.tokens[:, :4], atol=1e-6, rtol=1e-5)
    assert (one.tokens[:, 4] - other.tokens[:, 4]).abs().max() > 1e-3
    assert (one.pooled - other.pooled).abs().max() > 1e-3


def test_the_layer_is_the_one_named(config: TextConfig, model: ContrastiveTextModel) -> None:
    tower = TextTower(config.model_copy(update={"layer": -2}), model.state_dict())
    ids = model.tokenize(CAPTIONS)
    # open_clip's `text_indices=2` means the last two layers; -2 alone is the first of them.
    two = model.clip.forward_intermediates(text=ids, text_indices=2, normalize_intermediates=True)["text_intermediates"]
    assert len(two) == 2
    torch.testing.assert_close(tower.encode(CAPTIONS).tokens, two[0], atol=1e-5, rtol=1e-4)
    last = TextTower(config, model.state_dict()).encode(CAPTIONS)
    torch.testing.assert_close(last.tokens, two[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(last.pooled, tower.encode(CAPTIONS).pooled)


def test_training_tells_pictures_apart(config: TextConfig) -> None:
    torch.manual_seed(0)
    model = ContrastiveTextModel(config)
    captions = [CAPTIONS[0], CAPTIONS[1]]
    pictures = torch.stack([torch.full((3, 16, 16), value) for value in (-1.0, 1.0)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(30):
        image_features, text_features, scale = model(pictures, model.tokenize(captions))
        loss = torch.nn.functional.cross_entropy(scale * image_features @ text_features.T, torch.arange(2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    right, wrong = model.similarity(pictures, captions), model.similarity(pictures, captions[::-1])
    assert (right > wrong + 0.1).all()


def test_a_foreign_vocabulary_is_refused(config: TextConfig, model: ContrastiveTextModel, tmp_path: Path) -> None:
    build_vocabulary(CAPTIONS[:2], tmp_path / "v", tmp_path / "w")
    other = config.model_copy(update={"vocabulary": str(tmp_path / "v")})
    with pytest.raises(UserError, match=r"weights for .* tokens, but the vocabulary has"):
        TextTower(other, model.state_dict())
    with pytest.raises(UserError, match="not the weights of this text tower"):
        TextTower(config.model_copy(update={"layers": 3}), model.state_dict())


def test_missing_and_broken_files_are_named(config: TextConfig, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    (tmp_path / "torn").write_bytes(Path(config.vocabulary or "").read_bytes()[:-20])
    (tmp_path / "other").write_text("not a vocabulary")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    for name, words in (("gone", "no such file"), ("torn", "can't be read"), ("other", "not a vocabulary file")):
        with pytest.raises(UserError, match=words):
            ContrastiveTextModel(config.model_copy(update={"vocabulary": str(tmp_path / name)}))
    with pytest.raises(UserError, match=r"text\.vocabulary"):
        ContrastiveTextModel(config.model_copy(update={"vocabulary": None}))
    with pytest.raises(UserError, match="without weights"):
        TextTower(config)
    for public, words in (
        (PretrainedText(name="ViT-S-32-alt", path=gone), "no such file"),
        (PretrainedText(name="ViT-S-32-alt", path=str(tmp_path / "other")), "no file of weights"),
        (PretrainedText(name="ViT-S-32-alt", path=str(tmp_path / "tensor.pt")), "holds a Tensor"),
        (PretrainedText(name="ViT-Z", path=gone), "knows no such model"),
        (PretrainedText(name="roberta-ViT-B-32", path=gone), "not CLIP's plain transformer"),
    ):
        with pytest.raises(UserError, match=words):
            TextTower(TextConfig(pretrained=public))
    with pytest.raises(UserError, match="not trained"):
        ContrastiveTextModel(TextConfig(pretrained=public))


def test_a_public_model_reads_a_local_file(tmp_path: Path) -> None:
    open_clip = tokenizer.import_open_clip()
    torch.manual_seed(0)
    whole = open_clip.create_model("ViT-S-32-alt").eval()
    save_file({name: value.contiguous() for name, value in whole.state_dict().items()}, tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{n}": v for n, v in whole.state_dict().items()}}, tmp_path / "w.pt")
    wanted = whole.encode_text(open_clip.tokenize(CAPTIONS), normalize=True)
    for file in ("w.safetensors", "w.pt"):
        tower = TextTower(TextConfig(pretrained=PretrainedText(name="ViT-S-32-alt", path=str(tmp_path / file))))
        features = tower.encode(CAPTIONS)
        torch.testing.assert_close(features.pooled, wanted, atol=1e-5, rtol=1e-4)
        assert features.tokens.shape == (4, 77, tower.width)
        assert features.pooled.shape[1] == tower.embed_dim
        assert tower.unknown_words("zebra") == []


def test_the_torchvision_shim_may_be_called_again() -> None:
    tokenizer.declare_torchvision_ops()
    tokenizer.declare_torchvision_ops()
    import torchvision  # noqa: F401
