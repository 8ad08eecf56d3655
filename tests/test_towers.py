"""T5's encoder against transformers, and several text towers side by side."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from t5_folders import CAPTIONS, WIDTH, transformers, write_t5

from videodiff.batch import Condition
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.networks.t5 import T5Tower, encoder_state
from videodiff.networks.text import TextTower
from videodiff.networks.towers import JointFeatures, TextTowers
from videodiff.networks.unet import UNet, UNetConfig

FILES = ("tokenizer.json", "spiece.model")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_t5(tmp_path_factory.mktemp("t5") / "t5")


def tower_of(folder: Path, length: int = 40, tokenizer: str = FILES[0], dtype: torch.dtype | None = None) -> T5Tower:
    state = {name: value.to(dtype) for name, value in load_file(folder / "model.safetensors").items()}
    return T5Tower(folder / "config.json", folder / tokenizer, state, length)


@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])  # T5, and T5 v1.1 and Flan-T5
@pytest.mark.parametrize("tokenizer", FILES)
def test_hidden_states_are_transformers(activation: str, tokenizer: str, tmp_path: Path) -> None:
    folder = write_t5(tmp_path / "t5", feed_forward_proj=activation)
    peer = transformers().T5EncoderModel.from_pretrained(folder).eval()
    features = tower_of(folder, tokenizer=tokenizer).encode(CAPTIONS)
    ids, mask = tower_of(folder, tokenizer=tokenizer).tokenizer(CAPTIONS)
    with torch.no_grad():
        wanted = peer(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        alone = peer(input_ids=ids[3:, : mask[3].sum()]).last_hidden_state
    assert features.tokens.shape == (4, 40, WIDTH)
    torch.testing.assert_close(features.tokens[mask], wanted[mask], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.tokens[3:, : mask[3].sum()], alone, atol=1e-5, rtol=1e-5)
    assert wanted[mask].std() > 0.1
    assert torch.equal(features.mask, mask)
    assert features.pooled is None


@pytest.mark.parametrize("tokenizer", FILES)
def test_a_caption_becomes_its_pieces_and_the_end(folder: Path, tokenizer: str) -> None:
    import sentencepiece

    peer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    ids, mask = tower_of(folder, tokenizer=tokenizer).tokenizer(["", *CAPTIONS])
    for row, kept, caption in zip(ids, mask, ["", *CAPTIONS], strict=True):
        assert row[kept].tolist() == [*peer.encode(caption), 1]
        assert not row[~kept].any()


def test_a_longer_padding_changes_nothing(folder: Path) -> None:
    short, long = (tower_of(folder, length).encode(CAPTIONS) for length in (40, 90))
    assert torch.equal(short.mask, long.mask[:, :40])
    assert not long.mask[:, 40:].any()
    kept = short.mask
    torch.testing.assert_close(short.tokens[kept], long.tokens[:, :40][kept], atol=1e-5, rtol=1e-5)


def test_lost_words_are_those_that_do_not_fit(folder: Path) -> None:
    tower = tower_of(folder)
    assert tower.lost_words(CAPTIONS[3]) == []
    words = CAPTIONS[0].split()
    room = len(tower.tokenizer.pieces(" ".join(words[:4]))) + 1
    assert tower_of(folder, room).lost_words(CAPTIONS[0]) == words[4:]
    assert tower_of(folder, room - 1).lost_words(CAPTIONS[0]) == words[3:]
    cut = tower_of(folder, room).encode(CAPTIONS[:1])
    assert torch.equal(cut.tokens, tower_of(folder, room).encode([" ".join(words[:4])]).tokens)


def test_weights_keep_their_precision_but_for_float16(folder: Path) -> None:
    wanted = tower_of(folder).encode(CAPTIONS)
    for given, kept in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        tower = tower_of(folder, dtype=given)
        assert {parameter.dtype for parameter in tower.parameters()} == {kept}
        features = tower.encode(CAPTIONS)
        assert features.tokens.dtype == torch.float32
        torch.testing.assert_close(features.tokens[wanted.mask], wanted.tokens[wanted.mask], atol=0.1, rtol=0.1)
    assert not any(parameter.requires_grad for parameter in tower.parameters())


def test_files_that_do_not_belong_together_are_refused(folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "model.safetensors")
    settings, tokenizer = json.loads((folder / "config.json").read_text()), folder / FILES[0]
    changes = {
        "model_type": ({"model_type": "bert"}, "'bert'"),
        "width": ({"d_model": 32}, "not this encoder's"),
        "layers": ({"num_layers": 3}, "not this encoder's"),
        "vocabulary": ({"vocab_size": 20}, "has 20"),
        "activation": ({"feed_forward_proj": "odd-odd-odd"}, "not the settings of a T5"),
    }
    for name, (change, words) in changes.items():
        (tmp_path / name).write_text(json.dumps({**settings, **change}))
        with pytest.raises(UserError, match=words) as refusal:
            T5Tower(tmp_path / name, tokenizer, state, 20)
        assert "\n" not in str(refusal.value)
    (tmp_path / "torn.json").write_bytes(tokenizer.read_bytes()[:50])
    (tmp_path / "torn.model").write_bytes(b"nothing")
    for torn in ("torn.json", "torn.model"):
        with pytest.raises(UserError, match=f"{torn}: not a tokenizer"):
            T5Tower(folder / "config.json", tmp_path / torn, state, 20)
    with pytest.raises(UserError, match="no such file"):
        T5Tower(tmp_path / "gone", tokenizer, state, 20)


def test_without_the_extra_one_line_names_it(folder: Path) -> None:
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['sentencepiece'] = None\n"
        "from pathlib import Path; from videodiff.errors import UserError; from videodiff.networks.t5 import T5Tower\n"
        f"folder = Path({str(folder)!r})\n"
        "try: T5Tower(folder / 'config.json', folder / 'tokenizer.json', {}, 20)\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'videodiff[t5]'" in done.stdout
    assert len(done.stdout.splitlines()) == 1


# --- side by side -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def towers(folder: Path, toy_model: Path) -> TextTowers:
    first = Model.load(toy_model).text
    assert isinstance(first, TextTower)
    return TextTowers([first, tower_of(folder)])


def test_towers_stand_behind_one_door(towers: TextTowers, folder: Path) -> None:
    assert towers.widths == (16, WIDTH)
    assert towers.embed_dim == 16
    condition = towers.encode(CAPTIONS).condition(torch.ones(4))
    each = [tower.encode(CAPTIONS) for tower in towers.towers]
    assert all(torch.equal(tokens, one.tokens) for tokens, one in zip(condition.text, each, strict=True))
    assert all(torch.equal(mask, one.mask) for mask, one in zip(condition.text_mask, each, strict=True))
    assert condition.pooled is not None
    assert torch.equal(condition.pooled, each[0].pooled)
    dropped = condition.without("text")
    assert not any(tokens.any() for tokens in (*dropped.text, dropped.pooled))
    assert [mask.sum(1).tolist() for mask in dropped.text_mask] == [[1] * 4] * 2
    assert towers.unknown_words("a red zebra") == ["zebra"]
    assert towers.lost_words(CAPTIONS[3]) == []
    narrow = TextTowers([towers.towers[0], tower_of(folder, 5)])
    assert narrow.lost_words(CAPTIONS[0]) == narrow.towers[1].lost_words(CAPTIONS[0]) != []


def network() -> UNet:
    torch.manual_seed(0)
    network = UNet(
        UNetConfig(
            channels=4, model_channels=16, channel_mult=(1,), num_res_blocks=1, attention_levels=(True,),
            head_channels=8, context_dims=(16, WIDTH), pooled_dim=16,
        )
    ).eval()  # fmt: skip
    for parameter in network.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return network


def test_each_cross_attention_sees_its_own_tokens_behind_its_own_mask(towers: TextTowers) -> None:
    unet = network()
    condition = towers.encode(CAPTIONS).condition(torch.full((4,), 8.0))
    x, time = torch.randn(4, 4, 1, 8, 8), torch.full((4,), 500.0)

    def output(condition: Condition) -> torch.Tensor:
        with torch.no_grad():
            return unet(x, time, condition)

    plain = output(condition)
    for number in range(2):
        tokens, mask = condition.text[number], condition.text_mask[number]
        seen, hidden = (
            tuple(torch.where(where[..., None], 5.0, t) if n == number else t for n, t in enumerate(condition.text))
            for where in (mask, ~mask)
        )
        assert (~mask).any()
        assert (output(replace(condition, text=seen)) - plain).abs().amax((1, 2, 3, 4)).min() > 1e-3
        torch.testing.assert_close(output(replace(condition, text=hidden)), plain)
        assert tokens.shape[-1] == towers.widths[number]


def test_no_text_is_the_same_whether_one_tower_has_tokens_for_it_or_none(towers: TextTowers) -> None:
    """A masked tower beside one with an empty caption: its zeros under the whole mask are those under one token."""
    unet, features = network(), towers.encode(CAPTIONS).towers
    fps, x, time = torch.full((4,), 8.0), torch.randn(4, 4, 1, 8, 8), torch.full((4,), 500.0)
    zeros = replace(features[0], null=torch.zeros_like(features[0].tokens))
    conditions = [JointFeatures(given).condition(fps).without("text") for given in (features, (zeros, features[1]))]
    assert not torch.equal(conditions[0].text_mask[1], conditions[1].text_mask[1])
    with torch.no_grad():
        torch.testing.assert_close(*(unet(x, time, condition) for condition in conditions))


def test_the_encoder_alone_is_kept_and_may_come_under_either_name(folder: Path, tmp_path: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    assert any(name.startswith("decoder.") for name in whole)
    kept = encoder_state(whole)
    assert not any(name.startswith("decoder.") for name in kept)
    assert "encoder.embed_tokens.weight" not in kept
    renamed = {name.replace("shared.", "encoder.embed_tokens."): value for name, value in kept.items()}
    shutil.copy(folder / "config.json", tmp_path)
    one, other = (T5Tower(tmp_path / "config.json", folder / FILES[0], s, 20).encode(CAPTIONS) for s in (kept, renamed))
    assert torch.equal(one.tokens, other.tokens)
