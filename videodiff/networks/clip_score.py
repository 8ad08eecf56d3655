"""How well a picture shows its caption, and how good it looks, by public weights that the user has."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from videodiff.errors import UserError
from videodiff.networks.text import public_clip


class ClipScorer:
    """A frozen open_clip model (its architecture's name, local weights) and, where given, an aesthetic predictor.

    The predictor is LAION's kind: linear layers, one or several, on the normalised features of a picture; a safetensors
    file of their weights and biases, in the order of the numbers in their names.
    """

    def __init__(self, name: str, path: str, aesthetic: str | None = None, device: str = "cpu") -> None:
        """Raises UserError for files that are missing or do not fit."""
        self._model, self._tokenizer, self._picture = public_clip(name, path, "scores")
        try:
            self._model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"scores.device={device}: cannot be used ({error}); try cpu or cuda") from None
        self._device = device
        width = int(self._model.visual.output_dim)
        self._layers = None if aesthetic is None else _read_layers(aesthetic, width, device)

    @torch.no_grad()
    def __call__(self, frame: npt.NDArray[np.uint8], captions: Sequence[str]) -> dict[str, float]:
        """Scores of a picture uint8 [H,W,3]: "clip_similarity", the cosine with its nearest caption (-1 to 1), and
        "aesthetic" where there is a predictor.
        """
        image = self._model.encode_image(self._prepared(frame), normalize=True)
        text = self._model.encode_text(self._tokenizer(captions).to(self._device), normalize=True)
        scores = {"clip_similarity": float((image @ text.T).max())}
        if self._layers is not None:
            for weight, bias in self._layers:
                image = torch.nn.functional.linear(image, weight, bias)
            scores["aesthetic"] = float(image.squeeze())
        return scores

    def _prepared(self, frame: npt.NDArray[np.uint8]) -> Tensor:
        """[1,3,S,S]: the shorter side resized to S (bicubic), the centre cropped, normalised: as in training."""
        from PIL import Image

        size = self._picture["size"]
        size = size if isinstance(size, int) else size[0]
        height, width = frame.shape[:2]
        new = (size, int(size * height / width)) if width <= height else (int(size * width / height), size)
        picture = Image.fromarray(frame).resize(new, Image.Resampling.BICUBIC)
        left, top = round((new[0] - size) / 2), round((new[1] - size) / 2)
        pixels = np.array(picture.crop((left, top, left + size, top + size)), np.float32) / 255
        normal = (pixels - np.array(self._picture["mean"], np.float32)) / np.array(self._picture["std"], np.float32)
        return torch.from_numpy(normal).permute(2, 0, 1)[None].to(self._device)


def _read_layers(path: str, width: int, device: str) -> list[tuple[Tensor, Tensor | None]]:
    try:
        state = load_file(path, device=device)
    except (OSError, SafetensorError) as error:
        raise UserError(f"scores.aesthetic={path}: cannot be read ({error}); give a .safetensors file") from None
    names = [name for name in state if state[name].ndim == 2 and name.endswith("weight")]
    names.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    layers = [(state[name].float(), state.get(f"{name.removesuffix('weight')}bias")) for name in names]
    wide = [width, *(weight.shape[0] for weight, _ in layers)]
    fits = all(weight.shape[1] == before for (weight, _), before in zip(layers, wide, strict=False))
    if not layers or not fits or wide[-1] != 1:
        raise UserError(
            f"scores.aesthetic={path}: not linear layers from {width} features to one number; take the predictor that "
            "belongs to scores.name"
        )
    return [(weight, None if bias is None else bias.float()) for weight, bias in layers]
