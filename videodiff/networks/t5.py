"""T5's encoder as a text tower (Raffel et al. 2020). The only importer of transformers, tokenizers and sentencepiece.

Shapes: B captions, L tokens (context length), D width. The packages are an extra, `pip install 'videodiff[t5]'`, and
imported inside the functions that need them. transformers gives the network alone: files are read here and by the
caller, so nothing is downloaded, unpickled or run out of a folder.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from videodiff.errors import UserError
from videodiff.networks.text import TextFeatures
from videodiff.networks.tokenizer import declare_torchvision_ops

# What config.json says of the network; all else in it (versions, generation, code to run) says nothing to an encoder.
ARCHITECTURE = (
    "vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj", "layer_norm_epsilon",
    "relative_attention_num_buckets", "relative_attention_max_distance",
)  # fmt: skip
# The names of T5's weights that are the encoder's, and the second name of its embedding, which files may repeat.
ENCODER = ("shared.", "encoder.")
_REPEATED = "encoder.embed_tokens.weight"


class T5Tokenizer:
    """Captions -> ids [B,L] and mask [B,L], from a `tokenizer.json` or a sentencepiece model (`spiece.model`).

    A caption's tokens, the end of text, padding (Raffel et al. 2020); nothing stands for a start. Case is kept.
    Raises UserError for a file that can't be read.
    """

    def __init__(self, file: Path, context_length: int, end: int, padding: int) -> None:
        self.context_length, self.end, self.padding = context_length, end, padding
        self.pieces, self.size = _read_tokenizer(file)  # ids of a caption, however many; rows that they need

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """int64 ids and bool mask [B,L], True up to the end of text. What is too long is cut: see `lost_words`."""
        ids = torch.full((len(captions), self.context_length), self.padding)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for row, caption in enumerate(captions):
            kept = [*self.pieces(caption)[: self.context_length - 1], self.end]
            ids[row, : len(kept)] = torch.tensor(kept)
            mask[row, : len(kept)] = True
        return ids, mask

    def lost_words(self, caption: str) -> list[str]:
        """The words at the end that do not fit, in order; a word cut in its middle is lost."""
        words = caption.split()
        if len(self.pieces(caption)) < self.context_length:
            return []
        lengths = (len(self.pieces(" ".join(words[: count + 1]))) for count in range(len(words)))
        return [word for word, length in zip(words, lengths, strict=True) if length >= self.context_length]


class T5Tower(nn.Module):
    """The frozen encoder of a T5, T5 v1.1 or Flan-T5, with its tokenizer: tokens and mask, no pooled vector.

    settings: its config.json. tokenizer: its tokenizer.json or spiece.model. state: weights under transformers' names,
    of the whole T5 or of its encoder. They keep their precision, but for float16: T5 was trained in bfloat16 and its
    feed-forward layers leave float16's range, so those are computed in float32.
    Raises UserError for files that can't be read or do not belong together, and where the extra is not installed.
    """

    def __init__(self, settings: Path, tokenizer: Path, state: dict[str, Tensor], context_length: int) -> None:
        super().__init__()
        told = _read_settings(settings)
        end, padding = (
            value if isinstance(value := told.get(name), int) else usual
            for name, usual in (("eos_token_id", 1), ("pad_token_id", 0))
        )
        self.tokenizer = T5Tokenizer(tokenizer, context_length, end, padding)
        self.encoder, rows = _make_encoder(settings, told)
        if self.tokenizer.size > rows:
            raise UserError(
                f"{tokenizer}: a vocabulary of {self.tokenizer.size} tokens, but {settings} has {rows}; take the "
                "tokenizer that lies beside the weights"
            )
        self._load(encoder_state(state), settings)
        self.width: int = self.encoder.config.d_model
        self.embed_dim: int | None = None
        self.requires_grad_(False).eval()

    def _load(self, state: dict[str, Tensor], settings: Path) -> None:
        state = {
            "embed_tokens.weight" if name == "shared.weight" else name.removeprefix("encoder."): value
            for name, value in state.items()
        }
        own = self.encoder.state_dict()
        wrong = sorted(own.keys() ^ state.keys()) or sorted(n for n in own if own[n].shape != state[n].shape)
        if wrong:
            raise UserError(
                f"{settings}: the weights are not this encoder's ({wrong[0]} differs, {len(wrong)} in all); take the "
                "weights and config.json of one and the same T5"
            )
        state = {name: value.float() if value.dtype == torch.float16 else value for name, value in state.items()}
        self.encoder.load_state_dict(state, assign=True)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Features of the captions in float32; too long ones are cut (`lost_words` names what is lost).

        No text is zeros, as in Imagen (Saharia et al. 2022, section 2.2).
        """
        device = self.encoder.embed_tokens.weight.device
        ids, mask = (x.to(device) for x in self.tokenizer(captions))
        tokens = self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return TextFeatures(tokens.float(), mask, None)

    def lost_words(self, caption: str) -> list[str]:
        """The words of the caption that do not fit into the context."""
        return self.tokenizer.lost_words(caption)

    def unknown_words(self, caption: str) -> list[str]:
        """None: the tower is public, and read more than captions."""
        return []


def encoder_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's share of a T5's weights, each once, under transformers' names."""
    kept = {name: value for name, value in state.items() if name.startswith(ENCODER)}
    if (embedding := kept.pop(_REPEATED, None)) is not None:
        kept.setdefault("shared.weight", embedding)
    return kept


def _read_tokenizer(file: Path) -> tuple[Callable[[str], list[int]], int]:
    """What gives the ids of a caption's tokens, without the end of text, and the size of its vocabulary."""
    with _extra():
        import sentencepiece
        import tokenizers
    try:
        if file.suffix == ".json":
            fast = tokenizers.Tokenizer.from_file(str(file))
            fast.no_truncation()  # the file keeps what its last user asked for
            fast.no_padding()
            # Files differ in whether their template adds the end of text, so none is asked to.
            return lambda caption: fast.encode(caption, add_special_tokens=False).ids, fast.get_vocab_size()
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        return lambda caption: pieces.encode(caption), pieces.get_piece_size()
    except Exception as error:  # tokenizers raises Exception itself
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: not a tokenizer that can be read ({reason}); copy it again") from None


def _make_encoder(settings: Path, told: dict[str, Any]) -> tuple[Any, int]:
    """transformers' T5Stack on the meta device, and the rows of its embedding."""
    with _extra():
        declare_torchvision_ops()  # transformers imports torchvision where it is installed
        from transformers import T5Config, T5EncoderModel  # loaded when named
    try:
        config = T5Config(**{name: told[name] for name in ARCHITECTURE if name in told}, use_cache=False)
        with torch.device("meta"):
            encoder = T5EncoderModel(config).encoder
    except Exception as error:  # transformers' own checks raise errors of several kinds
        reason = " ".join(str(error).split())
        raise UserError(f"{settings}: not the settings of a T5 ({reason}); copy config.json again") from None
    return encoder, config.vocab_size


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a folder with the config.json of a T5") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: can't be read ({error}); copy it again") from None
    kind = told.get("model_type") if isinstance(told, dict) else None
    if kind != "t5":
        raise UserError(f"{path}: model_type is {kind!r}, not 't5'; name the folder of a T5, T5 v1.1 or Flan-T5")
    return dict(told)


@contextmanager
def _extra() -> Iterator[None]:
    """Name the extra where an import in here fails."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"a T5 text tower needs {error.name or error}, which can't be imported; pip install 'videodiff[t5]'"
        ) from None
