"""Captions cut into tokens, and their vocabulary. The only importer of open_clip.

open_clip is imported inside the functions that need it: it takes seconds.
"""

import gzip
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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


def import_open_clip() -> Any:
    """The module, with a torchvision of any build."""
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
    open_clip = import_open_clip()
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


# --- tokenizer --------------------------------------------------------------------------------------------------------


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
        self._tokenizer = import_open_clip().tokenizer.SimpleTokenizer(context_length=context_length, **arguments)
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


def _read_text(path: str) -> str:
    """A text file, gzip or plain."""
    try:
        data = Path(path).read_bytes()
        return (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; name the one that the text stage wrote") from error
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error}); copy it again") from error
