"""One sample out of a shard: a clip, an image or encoded features, with its captions and all that its JSON says.

A sample is a video (or an image, a clip of one frame) and a JSON member of one key; the JSON holds ``captions``, or a
.txt member is the caption. Only these members are looked at, and nothing is executed.
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from data_pipeline import tars
from data_pipeline.clips import IMAGE_SUFFIXES
from data_pipeline.index import Shape, Shard, open_shards
from videodiff.errors import UserError

VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "mov", "avi")
FEATURES = "safetensors"
TEXT_SUFFIXES = ("json", "txt")
_CONTENT = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)


class SampleError(UserError):
    """A sample is unusable as it is stored. ``reason`` is a short fixed word to count by."""

    def __init__(self, reason: str, message: str, key: str = "") -> None:
        super().__init__(message)
        self.reason, self.key = reason, key


@dataclass(frozen=True)
class RawSample:
    """A sample as it is stored: the bytes of its video file, its captions (one at least), and all of its JSON."""

    key: str
    video: bytes  # or of an image, or of features
    captions: tuple[str, ...]
    meta: dict[str, Any]
    suffix: str = "mp4"  # says which


def read_sample(shard: Shard, number: int, content: Sequence[str] = _CONTENT) -> RawSample:
    """Sample ``number`` of a shard, read at its place. ``content``: suffixes of the member that is wanted, the first of
    them that is there.

    Raises SampleError, a UserError, with the reasons "torn" (also where its checksum is not the index's), "no video",
    "no caption", "caption not UTF-8" and "unsafe name".
    """
    start, stop = shard.extent(number)
    try:
        with shard.open() as file:
            file.seek(start)
            data = file.read(stop - start)
        if shard.crc32 and zlib.crc32(data) != shard.crc32[number]:
            raise tarfile.ReadError("checksum")
        sample = tars.read_group(data)
    except UserError:  # it cannot be fetched
        raise
    except (OSError, tarfile.TarError, EOFError, ValueError) as error:
        raise _torn(shard, start, error) from None
    return _checked(shard, sample, content)


def try_sample(shard: Shard, number: int) -> RawSample | SampleError:
    """`read_sample`, its error given and not raised."""
    try:
        return read_sample(shard, number)
    except SampleError as error:
        return error


def read_texts(shard: Shard, number: int, content: Sequence[str] = _CONTENT) -> RawSample:
    """As `read_sample`, without reading the video: its bytes are empty."""
    return _checked(shard, _read_texts(shard, number), content)


def all_captions(location: str) -> Iterator[str]:
    """Every caption of the shards at ``location`` (see `open_shards`), in their order. Videos are skipped, not read,
    and so are bad samples, which the loader counts and names."""
    for _, sample in _good_texts(location):
        yield from sample.captions


def all_labels(location: str, field: str) -> set[str]:
    """Every value that the good samples of the shards at ``location`` have in a field of their JSON, see `label_of`."""
    return {label_of(shard, sample.key, sample.meta, field) for shard, sample in _good_texts(location)}


def _good_texts(location: str) -> Iterator[tuple[Shard, RawSample]]:
    for shard in open_shards(location):
        for number in range(len(shard.offsets)):
            with suppress(SampleError):
                yield shard, read_texts(shard, number)


def label_of(shard: Shard, key: str, meta: dict[str, Any], field: str) -> str:
    """What the JSON of a sample says in ``field``, a dotted path such as scene.shape: a word, or a whole number as one.

    Raises UserError where it says nothing of the kind.
    """
    value: Any = meta
    for name in field.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        has = ", ".join(sorted(meta)) or "nothing"
        raise UserError(
            f"{shard.path}: the JSON of sample {key} has no word or whole number at data.label={field} "
            f"(it has: {has}); name another field, or write it"
        )
    return str(value)


def shapes_of(shard: Shard) -> tuple[Shape | None, ...]:
    """The shape of each sample, without decoding: from the index, else from the samples' JSON (width, height, fps, and
    frames or duration in seconds) or an image's header. None where neither tells it, or the sample is torn."""
    return shard.shapes or tuple(_shape(shard, number) for number in range(len(shard.offsets)))


def _shape(shard: Shard, number: int) -> Shape | None:
    try:
        sample = _read_texts(shard, number, headers=IMAGE_SUFFIXES)
    except UserError:
        return None
    for suffix in IMAGE_SUFFIXES:
        if suffix in sample:
            return _image_shape(sample[suffix])
    meta, _ = _texts(sample)
    fps, height, width = (_positive(meta.get(name)) for name in ("fps", "height", "width"))
    frames = _positive(meta.get("frames", meta.get("num_frames"))) or round(fps * _positive(meta.get("duration")))
    return Shape(int(frames), fps, int(height), int(width)) if min(frames, fps, height, width) > 0 else None


def _positive(value: Any) -> float:
    """A finite, positive number as one; 0 for anything else."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if number and 0 < value < float("inf") else 0.0


def _image_shape(header: bytes) -> Shape | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(header)) as image:
            width, height = image.size
            if image.getexif().get(0x0112, 1) in (5, 6, 7, 8):  # it is turned by a quarter when it is shown
                width, height = height, width
    except Exception:  # what Pillow raises over a broken header or tag is of many classes
        return None
    return Shape(1, 0.0, height, width)


def _checked(shard: Shard, sample: dict[str, Any], content: Sequence[str]) -> RawSample:
    key = str(sample["__key__"])

    def bad(reason: str, what: str, remedy: str) -> SampleError:
        return SampleError(reason, f"{shard.path}: sample {' '.join(key.split())} {what}; {remedy}", key)

    if key.startswith("/") or ".." in key.split("/"):
        raise bad("unsafe name", "has a name that points out of its folder", "write it again under another name")
    content = content if shard.encoding is None else (FEATURES,)
    suffix = next((suffix for suffix in content if suffix in sample), None)
    if suffix is None:
        raise bad("no video", f"has no video ({', '.join(content)})", "remove it or write it again")
    meta, captions = _texts(sample)
    if not captions and not _is_utf8(sample.get("txt", b"")):
        raise bad("caption not UTF-8", "has a txt member that is not UTF-8", "write it as UTF-8")
    if not captions:
        raise bad("no caption", "has no caption (JSON 'captions', 'caption' or 'text', or a txt member)", "give it one")
    return RawSample(key, sample[suffix], captions, meta, suffix)


def _texts(sample: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    try:
        meta = json.loads(sample.get("json", b"{}"))
        text = sample.get("txt", b"").decode("utf-8")
    except (ValueError, RecursionError):
        return {}, ()
    if not isinstance(meta, dict):
        return {}, ()
    return meta, tuple(caption.strip() for caption in captions_in(meta) or (text,) if _is_text(caption))


def captions_in(said: Mapping[str, Any]) -> tuple[str, ...]:
    """The captions in the JSON of a clip, ours or anybody's: "captions", "caption" or "text", one or a list."""
    return _texts_of(said.get("captions") or said.get("caption") or said.get("text"))


def negatives_in(said: Mapping[str, Any], captions: Sequence[str]) -> tuple[str, ...]:
    """The "negatives" in the JSON of a clip, one or a list: texts that are wrong about it, and none of its captions."""
    texts = _texts_of(said.get("negatives"))
    return tuple(text for text in (text.strip() for text in texts) if text and text not in captions)


def _texts_of(given: Any) -> tuple[str, ...]:
    return tuple(text for text in (given if isinstance(given, list) else [given]) if isinstance(text, str))


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _is_text(value: Any) -> bool:
    """Whether there is something to read, and in letters: JSON can say half a surrogate pair, which is none."""
    if not isinstance(value, str) or not value.strip():
        return False
    return not any("\ud800" <= letter <= "\udfff" for letter in value)


def _read_texts(shard: Shard, number: int, headers: Collection[str] = ()) -> dict[str, Any]:
    """The members of a sample by suffix, as webdataset gives them, but only json and txt have their content, and those
    with a suffix of ``headers`` its beginning."""
    start, stop = shard.extent(number)
    sample: dict[str, Any] = {}
    try:
        with shard.open() as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for key, suffix, member in tars.members(tar, stop):
                    size = member.size if suffix in TEXT_SUFFIXES else 1 << 16 if suffix in headers else 0
                    content = tar.extractfile(member) if size else None
                    sample.setdefault("__key__", key)
                    sample[suffix] = b"" if content is None else content.read(size)
        if not sample:
            raise EOFError
    except (OSError, tarfile.TarError, EOFError) as error:
        raise _torn(shard, start, error) from None
    return sample


def _torn(shard: Shard, start: int, error: Exception) -> SampleError:
    return SampleError(
        "torn", f"{shard.path}: torn at byte {start} ({type(error).__name__}); write or copy the shard again"
    )
