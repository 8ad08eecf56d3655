"""Stage text: a small CLIP learns to match captions with film strips of their clips (Radford et al., 2021)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from stages.base import StageConfig, stages_before, write_part
from stages.further_towers import FurtherTower, open_towers, write_towers
from videodiff import config as configs
from videodiff.batch import VideoBatch
from videodiff.errors import UserError
from videodiff.model import Model
from videodiff.model_folder import carry, place
from videodiff.networks.features.extractor import film_strip
from videodiff.networks.text import ContrastiveTextModel, PretrainedText, TextConfig, TextTower
from videodiff.parts import DESCRIPTION, VOCABULARY, WORDS, FurtherPart, TextPart, files_of
from videodiff.training.distributed import barrier, gather_rows, rank, world
from videodiff.training.task import LossOutput


class TextStage(StageConfig):
    """`videodiff train configs/demo/text.yaml`. With `network.pretrained` a public tower is taken over, not trained.

    `further` towers, all public, stand beside either; the image network has a cross-attention for each.
    """

    stage: Literal["text"]
    network: TextConfig = TextConfig()
    further: tuple[FurtherTower, ...] = ()
    paraphrase_weight: float = Field(
        1.0, ge=0, description="of telling a clip's second caption from those of other clips, beside its film strip"
    )
    hard_negatives: bool = Field(
        True, description="captions that the data's JSON calls wrong about a clip (`negatives`) are rivals of its own"
    )
    num_merges: int = Field(2000, ge=0, description="merges of the byte-pair vocabulary built from the captions")

    @model_validator(mode="after")
    def _can_be_trained(self) -> TextStage:
        named = [f"network.{name}" for name in ("vocabulary", "words") if getattr(self.network, name) is not None]
        if named:
            raise ValueError(f"{named[0]}: the text stage makes its own from the captions of data.shards; leave it out")
        side = self.data.size // 2 * 2
        if self.network.pretrained is None and self.network.image_size != side:
            raise ValueError(
                f"network.image_size is {self.network.image_size}, but film strips of clips with data.size="
                f"{self.data.size} are {side} pixels wide; set network.image_size={side}"
            )
        return self


class TextTask:
    """Symmetric cross-entropy between the captions of a global batch and their film strips, and between the captions
    and second captions of the same clips; captions that the data calls wrong about a clip are further rivals."""

    def __init__(
        self, config: TextStage, base: Model, vocabulary: Path, words: Path, further: tuple[FurtherPart, ...] = ()
    ) -> None:
        micro_batch, accumulation = config.engine.shares(config.data.batch_size, world())
        if accumulation > 1:
            raise UserError(
                f"engine.micro_batch={micro_batch}: the text stage compares every sample of a batch of "
                f"{config.data.batch_size} with all others at once; leave it out, or lower data.batch_size"
            )
        self.config, self.base, self.vocabulary, self.words = config, base, vocabulary, words
        self.further = further  # their files lie in the run's folder, as vocabulary and words do
        files = {"vocabulary": str(vocabulary), "words": str(words)}
        self.module = ContrastiveTextModel(config.network.model_copy(update=files))

    def trains(self, name: str) -> bool:
        return True

    def loss(self, module: Callable[..., tuple[Tensor, Tensor, Tensor]], batch: VideoBatch, seed: int) -> LossOutput:
        parameter = next(self.module.parameters())
        strips = film_strip(batch.frames, self.config.network.image_size) / 127.5 - 1  # four frames can show a motion
        images, count = strips.to(parameter), len(batch)
        weight = self.config.paraphrase_weight if batch.paraphrases else 0.0
        own = self.module.tokenize(batch.captions)
        second = self.module.tokenize(batch.paraphrases if weight else ())
        wrong, told = self._negatives(batch, own, second)
        ids = torch.cat([own, second, wrong]).to(parameter.device)
        image_features, text_features, scale = module(images, ids)
        pictures, scale = image_features.float(), scale.float()
        texts, *others = text_features.float().split(count)
        negatives = Negatives(others.pop(), told.to(images.device)) if len(wrong) else None
        usable = gather_rows(batch.weight.to(images.device)) > 0
        loss, hits = contrast(texts, pictures, scale, usable, negatives)
        metrics = {"retrieval": hits}
        if weight:
            # Of motions and shapes a film strip says little; that two captions mean the same says it outright.
            paraphrased, metrics["paraphrase"] = contrast(texts, others[0], scale, usable, negatives, of_texts=True)
            loss = loss + weight * paraphrased
        tallies = {} if negatives is None else {"negative": negatives.beaten(texts, pictures)}
        return LossOutput(per_sample=loss, metrics=metrics, tallies=tallies)

    def _negatives(self, batch: VideoBatch, own: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [B,L] of a wrong caption of each sample, none [0,L] where no rank has any, and which samples have one:
        bool [B]."""
        texts = batch.negatives if self.config.hard_negatives and batch.negatives else ("",) * len(batch)
        wrong = self.module.tokenize(texts)
        told = torch.tensor([bool(text) for text in texts])
        for right in (own, second):  # what a caption's cut end alone would tell apart can't be learned
            if len(right):
                told &= (wrong != right).any(1)
        device = next(self.module.parameters()).device
        # By the global batch: all ranks go the same way.
        return (wrong if (gather_rows(told.float().to(device)) > 0).any() else wrong[:0]), told

    def sample(self, module: nn.Module, batch: VideoBatch, folder: Path, step: int) -> None:
        """Nothing to look at: the retrieval rate in metrics.jsonl says how the tower does."""

    def export(self, state: dict[str, Tensor], folder: Path, file: str) -> None:
        vocabulary, words = place(self.vocabulary, folder, VOCABULARY), place(self.words, folder, WORDS)
        for name in (file.name for tower in self.further for file in files_of(tower)):
            place(Path(self.config.run.dir) / name, folder, name)
        network = self.config.network
        state = {name.removeprefix("clip."): value for name, value in state.items()}  # open_clip's own names
        write_part(
            "text",
            self.base,
            folder,
            file,
            state,
            lambda weights: TextPart(
                network=network, weights=weights, vocabulary=vocabulary, words=words, further=self.further
            ),
        )


@dataclass(frozen=True)
class Negatives:
    """Captions that are wrong about this rank's samples: rivals that in-batch ones leave out (NegCLIP, Yuksekgonul et
    al. 2023)."""

    texts: Tensor  # float32 [B,E] of length 1
    told: Tensor  # bool [B], whether the sample has one

    def beaten(self, texts: Tensor, others: Tensor) -> Tensor:
        """How many of `others` [B,E] lie nearer to their texts [B,E] than to wrong ones, of how many: float32 [2]."""
        nearer = ((others * (texts - self.texts)).sum(1) > 0) & self.told
        return torch.stack([nearer.sum(), self.told.sum()]).float()


def contrast(
    texts: Tensor,
    others: Tensor,
    scale: Tensor,
    usable: Tensor,
    negatives: Negatives | None = None,
    of_texts: bool = False,
) -> tuple[Tensor, Tensor]:
    """Symmetric cross-entropy [B] of telling each row's partner among the global batch, and the share of texts [] that
    find theirs.

    texts, others: this rank's float32 rows [B,E] of length 1. usable: bool [world * B] of the global batch.
    negatives: further rivals where a text is to be told; of_texts: `others` are texts too.
    """
    # Every rank compares its rows with the whole global batch, so that the loss does not depend on the ranks.
    all_texts, all_others = gather_rows(texts), gather_rows(others)
    first = rank() * len(texts)
    target = torch.arange(first, first + len(texts), device=texts.device)
    # A bad clip is no rival: its column is closed to all but its own row, which the trainer gives no weight.
    closed = ~usable & (torch.arange(len(usable), device=texts.device) != target[:, None])
    by_other = (scale * others @ all_texts.T).masked_fill(closed, -torch.inf)
    by_text = (scale * texts @ all_others.T).masked_fill(closed, -torch.inf)
    hits = (by_text.argmax(1) == target) & usable[target]
    if negatives is not None:
        wrong, told = gather_rows(negatives.texts), (gather_rows(negatives.told.float()) > 0) & usable
        by_other = torch.cat([by_other, (scale * others @ wrong.T).masked_fill(~told, -torch.inf)], dim=1)
        if of_texts:
            by_text = torch.cat([by_text, (scale * texts @ wrong.T).masked_fill(~told, -torch.inf)], dim=1)
    loss = F.cross_entropy(by_other, target, reduction="none") + F.cross_entropy(by_text, target, reduction="none")
    return loss / 2, hits.sum() / usable[target].sum().clamp(min=1)


def adopt(config: TextStage, public: PretrainedText, base: Model) -> None:
    """Make public models the text towers: nothing is trained, the run's folder becomes a Model with them.

    Of `base` the stages before the text stage are taken. Raises UserError, before anything is written, for weights that
    are not the tower's.
    """
    folder, path = Path(config.run.dir), Path(public.path)
    if folder.resolve() in (base.folder.resolve(), path.resolve().parent):
        raise UserError(f"run.dir={folder}: holds the model or the weights that are taken over; name a new folder")
    TextTower(config.network)
    further = open_towers(config.further, folder)
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        weights = place(path.resolve(), folder, f"text{path.suffix}")  # a link to a link may point nowhere
        part = TextPart(network=config.network, weights=weights, further=write_towers(further, folder))
        model = carry(stages_before(base, "text"), folder).model_copy(update={"text": part})
        configs.save(model, folder / DESCRIPTION)
    barrier()
