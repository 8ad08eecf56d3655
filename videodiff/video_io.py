"""Files that people look at: mp4, PNG, contact sheets and side-car JSON. The only importer of imageio.

Frames are uint8 [T,H,W,3], RGB. Videos are H.264 in mp4, yuv420p with BT.709 tags, the index in front (faststart), at
exactly the asked size, rate and length. Each file is written beside its place, read back and renamed: a reader never
sees half a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import subprocess
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from videodiff.errors import UserError

Frames = npt.NDArray[np.uint8]

_STREAM = re.compile(r"Stream #0:\d+.*?: Video: .*?, (\d+)x(\d+)[ ,]")
_RATE = re.compile(r"([\d.]+)(k?) fps")
_LABEL_HEIGHT = 11  # one line of Pillow's built-in font, in pixels


def write_video(
    path: str | os.PathLike[str], frames: Frames, fps: float, *, crf: int = 14, metadata: str | None = None
) -> None:
    """Write uint8 frames [T,H,W,3] as an mp4, whole or not at all, and check size, rate and count by reading it back.

    ``fps`` is in frames a second; ``crf`` is x264's constant rate factor (0 lossless in YUV .. 51 worst); ``metadata``
    is a string, commonly JSON, kept in the file's comment tag. Raises UserError for odd sizes, a wrong array, a place
    that cannot be written.
    """
    path, frames = Path(path), _checked(frames, fps, f"the video {path}")
    with atomic_path(path) as temporary:
        _encode(temporary, frames, fps, crf, preset="medium", metadata=metadata)
        stored, stored_fps = read_video(temporary)
        if stored.shape != frames.shape or abs(stored_fps - fps) > 0.01:
            raise UserError(
                f"{path}: the encoder wrote {_words(stored, stored_fps)} where {_words(frames, fps)} was asked; "
                "choose an even size and a frame rate below 1000"
            )


def encode_video(frames: Frames, fps: float, crf: int = 12) -> bytes:
    """The bytes of an mp4 of uint8 frames [T,H,W,3], equal for equal arguments: one thread, no dates, no versions."""
    frames = _checked(frames, fps, "a clip")
    try:
        with tempfile.TemporaryDirectory(prefix="videodiff-") as folder:
            path = Path(folder) / "clip.mp4"
            _encode(path, frames, fps, crf, preset="veryfast", metadata=None)
            return path.read_bytes()
    except OSError as error:
        where = tempfile.gettempdir()
        raise UserError(f"{where}: a clip cannot be encoded there ({error}); free disk space or set TMPDIR") from None


def read_video(path: str | os.PathLike[str]) -> tuple[Frames, float]:
    """All frames of a video file as uint8 [T,H,W,3], and its rate in frames a second. UserError if undecodable."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such video file; check the path")
    how = ["-map", "0:v:0", "-fps_mode", "passthrough", "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    raw, log, code = _ffmpeg(["-xerror", "-i", f"file:{path}", *how])
    # The last video stream named in the log is ffmpeg's output: the size after any rotation tag is applied.
    sizes, rates = _STREAM.findall(log), _RATE.findall(log)
    if code != 0 or not sizes or not rates or not raw:
        raise UserError(f"{path}: not a video that can be decoded ({_reason(log)}); check or replace the file")
    width, height = map(int, sizes[-1])
    fps = float(rates[0][0]) * (1000 if rates[0][1] else 1)
    return np.frombuffer(raw, np.uint8).reshape(-1, height, width, 3).copy(), fps


def read_metadata(path: str | os.PathLike[str]) -> str | None:
    """The string that :func:`write_video` or :func:`write_png` put into a file's tag; None where there is none."""
    path = Path(path)
    if path.suffix.lower() == ".png":
        from PIL import Image

        try:
            with Image.open(path) as image:
                tag = image.info.get("comment")
        except (OSError, SyntaxError) as error:
            raise UserError(f"{path}: not a picture that can be read ({error}); check the path") from None
        return None if tag is None else str(tag)
    raw, log, code = _ffmpeg(["-i", f"file:{path}", "-f", "ffmetadata", "-"])
    if code != 0:
        raise UserError(f"{path}: not a video that can be read ({_reason(log)}); check or replace the file")
    found = re.search(r"^comment=((?:[^\\\n]|\\.|\\\n)*)$", raw.decode(errors="replace"), re.MULTILINE)
    return None if found is None else re.sub(r"\\(.)", r"\1", found.group(1), flags=re.DOTALL)


def write_png(path: str | os.PathLike[str], image: Frames, metadata: str | None = None) -> None:
    """Write a uint8 image [H,W,3] of any size as a PNG; ``metadata`` is kept in its comment text."""
    from imageio import v3 as iio
    from PIL import PngImagePlugin

    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise UserError(
            f"{path}: a picture is uint8 [H,W,3], this is {image.dtype} {list(image.shape)}; convert it first"
        )
    tags = PngImagePlugin.PngInfo()
    if metadata is not None:
        tags.add_itxt("comment", metadata)
    data = iio.imwrite("<bytes>", image, plugin="pillow", extension=".png", pnginfo=tags)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_animation(path: str | os.PathLike[str], frames: Frames, fps: float) -> None:
    """Write uint8 frames [T,H,W,3] as an endless animated WebP, which pages show without a player."""
    from imageio import v3 as iio

    frames = _checked(frames, fps, str(path))
    pause = round(1000 / fps)
    data = iio.imwrite("<bytes>", frames, plugin="pillow", extension=".webp", duration=pause, loop=0, quality=80)
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def read_image(path: str | os.PathLike[str]) -> Frames:
    """A picture file as uint8 [H,W,3], turned upright by its own rotation tag; transparency falls on white."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: not a picture that can be read ({error}); give a PNG or JPEG file") from None
    paper = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(paper, picture).convert("RGB")).copy()


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def contact_sheet(images: Sequence[Frames], columns: int, labels: Sequence[str] | None = None, gap: int = 2) -> Frames:
    """Lay equal uint8 images [H,W,3] out in rows of ``columns`` on white, each over its label: uint8 [H',W',3]."""
    from PIL import Image, ImageDraw, ImageFont

    pictures = [np.asarray(image) for image in images]
    if not pictures or columns < 1:
        raise UserError("a contact sheet needs at least one image and one column")
    if len({picture.shape for picture in pictures}) != 1 or (labels is not None and len(labels) != len(pictures)):
        raise UserError("a contact sheet needs images of one size, and a label for each or none")
    height, width = pictures[0].shape[:2]
    font = ImageFont.load_default(size=9)
    characters = max(int(width / 4.6), 4)  # about 4.6 pixels a letter at this size
    lines = [textwrap.wrap(label, characters) for label in labels or [""] * len(pictures)]
    footer = _LABEL_HEIGHT * max(map(len, lines))
    rows = -(-len(pictures) // columns)
    columns = min(columns, len(pictures))
    cell_height, cell_width = height + footer + gap, width + gap
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, text) in enumerate(zip(pictures, lines, strict=True)):
        x, y = gap + number % columns * cell_width, gap + number // columns * cell_height
        sheet.paste(Image.fromarray(picture), (x, y))
        for row, line in enumerate(text):
            draw.text((x, y + height + row * _LABEL_HEIGHT), line, fill="black", font=font)
    return np.asarray(sheet).copy()


def save_sheet(
    path: str | os.PathLike[str], images: Sequence[Frames], columns: int, labels: Sequence[str] | None = None
) -> None:
    """Write :func:`contact_sheet` of the images as a PNG."""
    write_png(path, contact_sheet(images, columns, labels))


def symptoms(frames: npt.ArrayLike, motion_expected: bool) -> list[str]:
    """What is wrong with a generated clip [T,H,W,3] (uint8, or float in [-1,1]), in words: empty for a healthy one.

    "not finite": NaN or infinite values. "black": hardly any light in any frame. "saturated": nearly all values at the
    ends of the range. "static": asked to move, yet no part of the picture does. Thresholds are in grey levels of
    0..255.
    """
    clip = np.asarray(frames)
    if clip.dtype != np.uint8:
        clip = clip.astype(np.float32)
        if not np.isfinite(clip).all():
            return ["not finite"]
        clip = (np.clip(clip, -1, 1) + 1) * 127.5
    clip = clip.astype(np.float32)
    found = []
    if clip.mean() < 4 and np.percentile(clip, 99) < 24:
        found.append("black")
    # A plain scene of pure colours is healthy: values at the ends are only sick where neighbours jump between them.
    ends = (clip < 3) | (clip > 252)
    if ends.mean() > 0.98 and clip.shape[2] > 1 and np.abs(np.diff(clip, axis=2)).mean() > 40:
        found.append("saturated")
    if motion_expected and len(clip) > 1:
        # A small object that moves changes few pixels a lot: the largest change, in blocks of 4x4 against coding noise.
        change = np.abs(clip - clip[:1]).mean(-1)
        height, width = (size - size % 4 for size in change.shape[1:])
        blocks = change[:, :height, :width].reshape(len(clip), height // 4, 4, width // 4, 4).mean((2, 4))
        if blocks.size == 0 or blocks.max() < 12:
            found.append("static")
    return found


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to: renamed at the end, removed after an error or an interrupt."""
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); check folder, rights and disk space"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _encode(path: Path, frames: Frames, fps: float, crf: int, preset: str, metadata: str | None) -> None:
    """Raises OSError with ffmpeg's reason."""
    height, width = frames.shape[1:3]
    rate = str(Fraction(fps).limit_denominator(1001))
    arguments = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate, "-i", "-", "-an"]
    arguments += ["-vf", "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int+bicubic"]
    arguments += ["-c:v", "libx264", "-preset", preset, "-crf", str(crf), "-threads", "1", "-pix_fmt", "yuv420p"]
    arguments += ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
    arguments += ["-fflags", "+bitexact", "-flags:v", "+bitexact", "-movflags", "+faststart"]
    if metadata is not None:
        arguments += ["-metadata", f"comment={metadata}"]
    _, log, code = _ffmpeg([*arguments, "-y", f"file:{path}"], np.ascontiguousarray(frames).tobytes())
    if code != 0:
        raise OSError(_reason(log))


def _ffmpeg(arguments: list[str], data: bytes | None = None) -> tuple[bytes, str, int]:
    import imageio_ffmpeg

    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-hide_banner",
        "-nostdin",
        "-nostats",
        "-filter_threads",
        "1",
        *arguments,
    ]
    done = subprocess.run(command, input=data, stdin=subprocess.DEVNULL if data is None else None, capture_output=True)
    return done.stdout, done.stderr.decode(errors="replace"), done.returncode


def _reason(log: str) -> str:
    """The one line of ffmpeg's log that says most."""
    lines = [re.sub(r"^\[[^]]*\] ", "", line.strip()) for line in log.splitlines() if line.strip()]
    for line in lines:
        if re.search(r"No space|too large|Permission|No such|Invalid data|moov atom|Error", line):
            return line
    return lines[-1] if lines else "ffmpeg was killed"


def _checked(frames: Frames, fps: float, what: str) -> Frames:
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise UserError(
            f"{what}: frames are uint8 [T,H,W,3], these are {frames.dtype} {list(frames.shape)}; convert them first"
        )
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise UserError(
            f"{what}: {width}x{height} pixels cannot be stored as yuv420p, which players need; use even numbers"
        )
    if not 0 < fps < 1000:
        raise UserError(f"{what}: {fps} frames a second is not possible; use a rate between 0 and 1000")
    return frames


def _words(frames: Frames, fps: float) -> str:
    return f"{len(frames)} frames of {frames.shape[2]}x{frames.shape[1]} at {fps:g} fps"
