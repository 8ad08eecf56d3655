"""Text towers: captions become tokens, mask and pooled vector. The only importer of open_clip.

Shapes: B captions, L tokens (context length), D width, E embedding width, S picture size.
open_clip is imported inside the functions that need it: it takes seconds.
"""

import gzip
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from videodiff.batch import Condition
from videodiff.config import Config
from videodiff.errors import UserError
from videodiff.video_io import atomic_path

KNOWN_CAPTIONS = 1 << 17  # whose ids are kept, some hundred bytes each
END_OF_WORD = "</w>"
# Letters, single digits and runs of other signs: how CLIP's tokenizer cuts a lower-cased caption.
WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|(?:[^\s\w]|_)+")

_declared: list[torch.library.Library] = []


def declare_torchvision_ops() -> None:
    """Make a CUDA build of torchvision importable beside a torch without CUDA.

    Its import registers fake kernels for two operators that its library failed to define, and dies with `operator
    torchvision::nms does not exist`; with their schemas declared it loads. Does nothing where torch has a CUDA build
    or the operators are there. Call it before importing open_clip, diffusers or transformers.
    """
    if torch.version.cuda is not None or _declared:
        return
    schemas = {
        "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    }
    missing = [schema for name, schema in schemas.items() if not _operator_exists(name)]
    if missing:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in missing:
            library.define(schema)
        _declared.append(library)  # a library that is collected takes its schemas with it


def _operator_exists(name: str) -> bool:
    try:
        getattr(torch.ops.torchvision, name)
    except AttributeError:
        return False
    return True


def _open_clip() -> Any:
    declare_torchvision_ops()
    import open_clip

    return open_clip


# --- vocabulary -------------------------------------------------------------------------------------------------------


def words_of(text: str) -> list[str]:
    """The words of a caption, lower-cased, as the tokenizer cuts them."""
    return WORDS.findall(text.lower())


def build_vocabulary(
    captions: Iterable[str], vocabulary: str | Path, words: str | Path, num_merges: int = 4096
) -> None:
    """Write a byte-pair vocabulary in which each common word of the captions is one token, and the list of words.

    `vocabulary` is what open_clip's SimpleTokenizer reads: gzip, one comment line, one merge a line. Merges are taken
    greedily, the most frequent pair first (Sennrich et al. 2016), at most `num_merges`, fewer when every word is one
    token. `words` has one word a line, so that `unknown_words` can tell what training never saw. Equal captions in
    any order give equal bytes. Each file is written whole or not at all, `words` last: where it stands, both do.
    Raises UserError where there are no words.
    """
    counts = Counter(word for caption in captions for word in words_of(caption))
    if not counts:
        raise UserError(f"{vocabulary}: the captions have no words to build a vocabulary from; check the data")
    open_clip = _open_clip()
    letters = open_clip.tokenizer.bytes_to_unicode()
    spelled = {}
    for word in sorted(counts):
        signs = [letters[byte] for byte in word.encode()]
        spelled[word] = [*signs[:-1], signs[-1] + END_OF_WORD]
    merges: list[tuple[str, str]] = []
    while len(merges) < num_merges:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in spelled.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = {word: _merge(parts, best) for word, parts in spelled.items()}
    write_vocabulary([" ".join(pair) for pair in merges], vocabulary)
    with atomic_path(words) as temporary:
        temporary.write_text("\n".join(sorted(counts)) + "\n", encoding="utf-8")


def write_vocabulary(merges: Iterable[str], vocabulary: str | Path) -> None:
    """Write the file that open_clip's SimpleTokenizer reads from merges "a b", in their order."""
    # No time and no name in the gzip header: the file is a function of the merges. No last newline: an empty line
    # would be read as one more merge.
    with atomic_path(vocabulary) as temporary:
        temporary.write_bytes(gzip.compress("\n".join(["#version: 0.2", *merges]).encode(), mtime=0))


def _merge(parts: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


# --- configuration ----------------------------------------------------------------------------------------------------


class PretrainedText(Config):
    """A public open_clip model whose weights lie in a local file. Nothing is ever downloaded."""

    name: str = Field(
        description="open_clip's name of the architecture, such as ViT-L-14, or ViT-L-14-quickgelu, OpenAI's"
    )
    path: str = Field(description="weights: .safetensors, or a checkpoint that torch.load reads with weights_only")


class TextConfig(Config):
    """A small CLIP of our own, trained on the captions of the data, or with `pretrained` a public one: then shape,
    context length and tokenizer are that model's.

    padding: what follows the end of a caption. "masked": nothing attends to it, and no text is zeros. "zero" and "end"
    are how Stable Diffusion 2 and 1 were trained: token 0, or the end again, attended to like words; no text is the
    empty caption, and there is no pooled vector.
    """

    width: int = Field(128, ge=1)
    layers: int = Field(3, ge=1)
    heads: int = Field(4, ge=1)
    context_length: int = Field(32, ge=3)
    embed_dim: int = Field(128, ge=1, description="width of the pooled vector")
    layer: Literal[-1, -2] = Field(-1, description="layer whose tokens are used; either passes the final LayerNorm")
    quick_gelu: bool = Field(False, description="x sigmoid(1.702 x), as in OpenAI's CLIP; a pretrained model knows")
    padding: Literal["masked", "zero", "end"] = "masked"
    image_size: int = Field(64, ge=8, description="pictures of the image half, which only training and scores use")
    patch_size: int = Field(8, ge=1)
    image_layers: int = Field(3, ge=1)
    image_width: int = Field(128, ge=1)
    image_heads: int = Field(4, ge=1)
    vocabulary: str | None = Field(None, description="vocabulary file; None where a run or a model brings its own")
    words: str | None = Field(None, description="the words trained on, one a line")
    pretrained: PretrainedText | None = None

    @model_validator(mode="after")
    def _check(self) -> "TextConfig":
        for width, heads in (("width", "heads"), ("image_width", "image_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(
                    f"{heads} {getattr(self, heads)} does not divide {width} {getattr(self, width)}; choose a divisor"
                )
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size {self.patch_size} does not divide image_size {self.image_size}; choose a divisor"
            )
        return self


# --- towers -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextFeatures:
    """tokens [B,L,D]; mask [B,L] bool, True where there is something to attend to; pooled [B,E] of length 1 or None;
    null [B,L,D] the tokens that stand for no text, None for zeros."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor | None
    null: Tensor | None = None

    def condition(self, fps: Tensor) -> Condition:
        """The condition of these captions at fps [B], without known frames."""
        null = () if self.null is None else (self.null,)
        return Condition(text=(self.tokens,), text_mask=(self.mask,), null_text=null, pooled=self.pooled, fps=fps)


class Tokenizer:
    """Captions -> ids [B,L]. `vocabulary` None is CLIP's own; `words` None means that no word is unknown;
    `pad_with_end` repeats the end of the text where there would be zeros."""

    def __init__(
        self, vocabulary: str | None, words: str | None, context_length: int, pad_with_end: bool = False
    ) -> None:
        self.words = None if words is None else frozenset(_read_text(words).split())
        arguments = {}
        if vocabulary is not None:
            # Read first: a missing file is the user's mistake and deserves better than a traceback out of open_clip.
            if not _read_text(vocabulary).startswith("#version"):
                raise UserError(f"{vocabulary}: not a vocabulary file; name the one that the text stage wrote")
            arguments = {"bpe_path": vocabulary}
        self._tokenizer = _open_clip().tokenizer.SimpleTokenizer(context_length=context_length, **arguments)
        self.context_length = context_length
        self.size: int = self._tokenizer.vocab_size
        self.end: int = self._tokenizer.eot_token_id
        self.pad_with_end = pad_with_end
        # Training meets the same captions epoch after epoch, and their splitting took longer than a small network's
        # step on a GPU.
        self._row = lru_cache(maxsize=KNOWN_CAPTIONS)(self._ids)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """int64 [B,L]: start, tokens, end, zeros. What is too long is cut: see `lost_words`."""
        if not captions:
            return torch.zeros(0, self.context_length, dtype=torch.long)
        return torch.stack([self._row(caption) for caption in captions])

    def _ids(self, caption: str) -> Tensor:
        ids: Tensor = self._tokenizer([caption])[0]
        return torch.where((ids == self.end).cumsum(0) > 0, self.end, ids) if self.pad_with_end else ids

    def tokens(self) -> list[str]:
        """The token of each id; the last two are start and end."""
        return list(self._tokenizer.encoder)

    def merges(self) -> list[str]:
        """The merges of the vocabulary, "a b", in their order."""
        return [" ".join(pair) for pair in self._tokenizer.bpe_ranks]

    def decode(self, ids: Tensor) -> str:
        """The text of one row of ids, without start and end, as far as it was kept."""
        row = ids.tolist()
        return self._tokenizer.decode(row[1 : row.index(self.end)]).strip()

    def lost_words(self, caption: str) -> list[str]:
        """The words at the end that do not fit, in order; a word cut in its middle is lost."""
        room = self.context_length - 2
        lost = []
        for word in self._words(caption):
            room -= len(self._tokenizer.encode(word))
            if room < 0:
                lost.append(word)
        return lost

    def unknown_words(self, caption: str) -> list[str]:
        """The words that were not trained on, each once, in order of appearance."""
        if self.words is None:
            return []
        return [word for word in dict.fromkeys(self._words(caption)) if word not in self.words]

    def _words(self, caption: str) -> list[str]:
        return words_of(self._tokenizer.clean_fn(caption))


def own_tokenizer(config: TextConfig) -> Tokenizer:
    """The tokenizer of a small model. Raises UserError where its configuration names no vocabulary."""
    if config.vocabulary is None:
        raise UserError("text.vocabulary: none is named; give the file that the text stage wrote beside its weights")
    return Tokenizer(config.vocabulary, config.words, config.context_length, config.padding == "end")


class ContrastiveTextModel(nn.Module):
    """open_clip's CLIP in a small configuration: text and image halves are trained together.

    forward(images [B,3,S,S] in [-1,1], ids [B,L]) -> image features [B,E] and text features [B,E] of length 1, and
    the scale of their products. Below `clip.` the state has open_clip's own names.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        if config.pretrained is not None:
            raise UserError("text.pretrained: a public model is used as it is, not trained; leave out the text stage")
        if config.padding != "masked" or config.quick_gelu:
            raise UserError("text.padding and text.quick_gelu are for public weights, not for training; leave them out")
        self.config = config
        self.tokenize = own_tokenizer(config)
        open_clip = _open_clip()
        self.clip = open_clip.CLIP(
            embed_dim=config.embed_dim,
            nonscalar_logit_scale=True,  # DeepSpeed can't broadcast a parameter without an axis
            vision_cfg=open_clip.CLIPVisionCfg(
                layers=config.image_layers,
                width=config.image_width,
                head_width=config.image_width // config.image_heads,
                patch_size=config.patch_size,
                image_size=config.image_size,
            ),
            text_cfg=open_clip.CLIPTextCfg(
                context_length=config.context_length,
                vocab_size=self.tokenize.size,
                width=config.width,
                heads=config.heads,
                layers=config.layers,
            ),
        )

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        image_features = self.clip.encode_image(images, normalize=True)
        return image_features, self.clip.encode_text(ids, normalize=True), self.clip.logit_scale.exp()

    @torch.no_grad()
    def similarity(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Cosine of each picture [B,3,S,S] in [-1,1] with its caption -> float32 [B] in [-1,1]."""
        image_features, text_features, _ = self(images, self.tokenize(captions).to(images.device))
        return (image_features.float() * text_features.float()).sum(dim=-1)


class TextTower(nn.Module):
    """The frozen text half of a CLIP with its tokenizer.

    state: weights under open_clip's names, of the whole CLIP or of its text half; None loads `config.pretrained`.
    Raises UserError for missing files and for weights that do not fit, such as those of another vocabulary.
    """

    def __init__(self, config: TextConfig, state: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        self.config = config
        public = config.pretrained
        if public is None:
            if state is None:
                raise UserError("text: a tower without weights; train the text stage or name text.pretrained")
            self.tokenizer = own_tokenizer(config)
            settings, quick_gelu = config.model_dump(), config.quick_gelu
        else:
            settings, quick_gelu = public_settings(public.name)
            self.tokenizer = Tokenizer(None, None, settings["context_length"], config.padding == "end")
            state = _read_weights(public.path) if state is None else state
        # None where there is no pooled vector.
        self.embed_dim: int | None = settings["embed_dim"] if config.padding == "masked" else None
        self.text = _make_text(settings, self.tokenizer.size, quick_gelu, self.embed_dim)
        self.width: int = settings["width"]
        self.widths = (self.width,)
        self.num_layers: int = settings["layers"]
        self.num_heads: int = settings["heads"]
        self.quick_gelu: bool = quick_gelu
        self._load(state, "text weights" if public is None else public.path)
        self.requires_grad_(False).eval()

    def _load(self, state: dict[str, Tensor], where: str) -> None:
        state = {name.removeprefix("clip."): value for name, value in state.items()}
        state = {name: value for name, value in state.items() if _is_text(name)}
        if self.embed_dim is None:
            state.pop("text_projection", None)
        own = self.text.state_dict()
        rows = state.get("token_embedding.weight")
        if rows is not None and rows.shape[0] != self.tokenizer.size:
            raise UserError(
                f"{where}: weights for {rows.shape[0]} tokens, but the vocabulary has {self.tokenizer.size}; "
                "use the vocabulary file that these weights were trained with"
            )
        wrong = sorted(own.keys() ^ state.keys()) or sorted(n for n in own if own[n].shape != state[n].shape)
        if wrong:
            raise UserError(
                f"{where}: not the weights of this text tower ({wrong[0]} differs, {len(wrong)} in all); "
                "check width, layers and name in the text configuration"
            )
        self.text.load_state_dict(state)

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextFeatures:
        """Features of the captions; too long ones are cut (`lost_words` names what is lost)."""
        ids = self.tokenizer(captions).to(self.text.positional_embedding.device)
        dtype = self.text.positional_embedding.dtype
        x = self.text.token_embedding(ids).to(dtype) + self.text.positional_embedding
        hidden = []
        for block in self.text.transformer.resblocks:
            x = block(x, attn_mask=self.text.attn_mask.to(dtype))
            hidden.append(x)
        ends = (ids == self.tokenizer.end).int().argmax(dim=-1)
        last = self.text.ln_final(hidden[-1])
        tokens = last if self.config.layer == -1 else self.text.ln_final(hidden[self.config.layer])
        if self.config.padding != "masked":
            null = tokens if not any(captions) else self.encode([""]).tokens.expand_as(tokens)
            return TextFeatures(tokens, torch.ones_like(ids, dtype=torch.bool), None, null)
        mask = torch.arange(ids.shape[1], device=ids.device) <= ends[:, None]
        pooled = last[torch.arange(len(ids), device=ids.device), ends] @ self.text.text_projection
        return TextFeatures(tokens, mask, F.normalize(pooled, dim=-1))

    def lost_words(self, caption: str) -> list[str]:
        """The words of the caption that do not fit into the context."""
        return self.tokenizer.lost_words(caption)

    def unknown_words(self, caption: str) -> list[str]:
        """The words of the caption that the tower was not trained on; none for a public model."""
        return self.tokenizer.unknown_words(caption)


def _is_text(name: str) -> bool:
    return not name.startswith("visual.") and name not in ("logit_scale", "logit_bias", "attn_mask")


def _make_text(settings: dict[str, Any], vocabulary_size: int, quick_gelu: bool, embed_dim: int | None) -> Any:
    """open_clip's TextTransformer, which has the names of the text half of its CLIP; without projection for None."""
    from open_clip.transformer import QuickGELU, TextTransformer

    return TextTransformer(
        context_length=settings["context_length"],
        vocab_size=vocabulary_size,
        width=settings["width"],
        heads=settings["heads"],
        layers=settings["layers"],
        output_dim=embed_dim,
        act_layer=QuickGELU if quick_gelu else nn.GELU,
    )


def text_shapes(config: TextConfig, vocabulary_size: int) -> nn.Module:
    """The text half that a TextTower of this configuration has, on the meta device: names and shapes alone."""
    _open_clip()
    with torch.device("meta"):
        text: nn.Module = _make_text(config.model_dump(), vocabulary_size, config.quick_gelu, None)
    return text


def public_settings(name: str, key: str = "text.pretrained") -> tuple[dict[str, Any], bool]:
    """Shape of the text half of an open_clip architecture, and whether it uses CLIP's quick GELU."""
    settings = _open_clip().get_model_config(name)
    if settings is None:
        raise UserError(f"{key}.name {name!r}: open_clip knows no such model; try ViT-L-14 or ViT-B-32")
    text = dict(settings["text_cfg"])
    if settings.get("custom_text") or set(text) - {"context_length", "vocab_size", "width", "heads", "layers"}:
        raise UserError(f"{key}.name {name!r}: its text half is not CLIP's plain transformer; choose one like ViT-L-14")
    return {"context_length": 77, **text, "embed_dim": settings["embed_dim"]}, settings.get("quick_gelu", False)


def public_clip(name: str, path: str, key: str) -> tuple[Any, Tokenizer, dict[str, Any]]:
    """Both halves of a public open_clip model, frozen, its tokenizer, and how pictures are brought to it:
    `size`, `mean`, `std` (OpenAI's, which a file of weights alone can't tell from others). `key` names the
    configuration in errors: UserError for an unknown name or other weights."""
    settings, quick_gelu = public_settings(name, key)
    open_clip = _open_clip()
    told = open_clip.get_model_config(name)
    halves = open_clip.CLIPVisionCfg(**told["vision_cfg"]), open_clip.CLIPTextCfg(**told["text_cfg"])
    model = open_clip.CLIP(told["embed_dim"], *halves, quick_gelu=quick_gelu)
    try:
        model.load_state_dict(_read_weights(path, f"{key}.path"))
    except RuntimeError as error:
        first = (str(error).splitlines() or [""])[-1].strip()
        raise UserError(f"{key}.path {path}: not the weights of {name} ({first[:120]}); check {key}.name") from None
    model.requires_grad_(False).eval()
    picture = {"size": halves[0].image_size, "mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    return model, Tokenizer(None, None, settings["context_length"]), picture


def _read_text(path: str) -> str:
    """A text file, gzip or plain."""
    try:
        data = Path(path).read_bytes()
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; name the one that the text stage wrote") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error}); copy it again") from error


def _read_weights(path: str, key: str = "text.pretrained.path") -> dict[str, Tensor]:
    where = f"{key} {path}"
    state: Any
    try:
        state = load_file(path) if path.endswith(".safetensors") else torch.load(path, "cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{where}: no such file; put the weights there first, nothing is downloaded") from error
    except (OSError, RuntimeError, EOFError, UnpicklingError, SafetensorError) as error:
        # Not torch's own words: they advise to unpickle whatever is in there.
        raise UserError(f"{where}: no file of weights ({type(error).__name__}); give .safetensors or .pt") from error
    if not isinstance(state, dict):
        raise UserError(f"{where}: holds a {type(state).__name__}, not named weights; save the model's state_dict")
    state = state.get("state_dict", state)
    return {name.removeprefix("module."): value for name, value in state.items()}
