"""Text towers: captions become features of tokens, mask and pooled vector.

Shapes: B captions, L tokens (context length), D width, E embedding width, S picture size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
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
from videodiff.networks.tokenizer import Tokenizer, import_open_clip

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
        open_clip = import_open_clip()
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
    transformer = import_open_clip().transformer
    return transformer.TextTransformer(
        context_length=settings["context_length"],
        vocab_size=vocabulary_size,
        width=settings["width"],
        heads=settings["heads"],
        layers=settings["layers"],
        output_dim=embed_dim,
        act_layer=transformer.QuickGELU if quick_gelu else nn.GELU,
    )


def text_shapes(config: TextConfig, vocabulary_size: int) -> nn.Module:
    """The text half that a TextTower of this configuration has, on the meta device: names and shapes alone."""
    import_open_clip()  # before the device is meta: what its import makes is real
    with torch.device("meta"):
        text: nn.Module = _make_text(config.model_dump(), vocabulary_size, config.quick_gelu, None)
    return text


def public_settings(name: str, key: str = "text.pretrained") -> tuple[dict[str, Any], bool]:
    """Shape of the text half of an open_clip architecture, and whether it uses CLIP's quick GELU."""
    settings = import_open_clip().get_model_config(name)
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
    open_clip = import_open_clip()
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
