"""Videos whose frames carry their number as a row of black and white squares, in any container, codec and timing."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import imageio_ffmpeg
import numpy as np

BITS = 8


def numbered(count: int, height: int = 64, width: int = 96, first: int = 0) -> np.ndarray:
    """Frames uint8 [T,H,W,3]; frame i shows the bits of first + i, the highest at the left, over a texture that drifts.

    The squares lie in the middle of the frame, so that a centre crop of 3:2 or narrower than that keeps them.
    """
    rng = np.random.default_rng(7)
    texture = np.kron(rng.integers(60, 190, (height // 8 + 2, width // 8 + 2, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    side = min(height, width) // (BITS + 2)
    top, left = (height - side) // 2, (width - BITS * side) // 2
    frames = np.empty((count, height, width, 3), np.uint8)
    for index in range(count):
        frames[index] = np.roll(texture, index, axis=1)[:height, :width]
        for bit in range(BITS):
            value = 255 if (first + index) >> (BITS - 1 - bit) & 1 else 0
            frames[index, top : top + side, left + bit * side : left + (bit + 1) * side] = value
    return frames


def numbers(frames: np.ndarray) -> list[int]:
    """The number that each frame uint8 [T,H,W,3] carries, whatever its size."""
    height, width = frames.shape[1:3]
    side = min(height, width) / (BITS + 2)
    columns = [round(width / 2 + (bit + 0.5 - BITS / 2) * side) for bit in range(BITS)]
    row = height // 2
    values = frames[:, row - 1 : row + 1].mean((1, 3))
    return [sum(int(line[x] > 127) << (BITS - 1 - bit) for bit, x in enumerate(columns)) for line in values]


def encode(path: Path, frames: np.ndarray, *options: str, fps: float = 24, inputs: Sequence[str] = ()) -> Path:
    """Encode frames by ffmpeg with the given output options; the name's ending chooses the container."""
    height, width = frames.shape[1:3]
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", f"{fps:g}", "-i", "-"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-nostdin", *raw, *inputs, *options, "-threads", "1"]
    subprocess.run([*command, "-y", f"file:{path}"], input=frames.tobytes(), check=True)
    return path


VFR = (
    "-vf",
    "setpts='(N+3*floor(N/4))/24/TB'",
    "-fps_mode",
    "vfr",
)  # four frames at 24 a second, then a pause of three


def vfr_times(count: int) -> np.ndarray:
    """When the frames of a video filtered by VFR show, in seconds."""
    index = np.arange(count)
    return (index + 3 * (index // 4)) / 24


X264 = ("-c:v", "libx264", "-preset", "veryfast", "-crf", "12", "-pix_fmt", "yuv420p")
X265 = ("-c:v", "libx265", "-preset", "ultrafast", "-crf", "12", "-pix_fmt", "yuv420p", "-x265-params")
VP9 = (
    "-c:v",
    "libvpx-vp9",
    "-crf",
    "20",
    "-b:v",
    "0",
    "-deadline",
    "realtime",
    "-cpu-used",
    "8",
    "-pix_fmt",
    "yuv420p",
)

# name -> options: the containers, codecs and pixel formats that people have
KINDS: dict[str, tuple[str, ...]] = {
    "h264.mp4": (*X264, "-bf", "2", "-g", "12"),
    "h264.mkv": X264,
    "h264_opengop.mkv": (*X264, "-x264-params", "open-gop=1:keyint=12:bframes=3"),
    "h264_10bit.mp4": (*X264[:-1], "yuv420p10le"),
    "hevc.mp4": (*X265, "log-level=none:pools=none"),
    "hevc.mov": (*X265, "log-level=none:pools=none"),
    "hevc_opengop.mkv": (*X265, "log-level=none:pools=none:keyint=12:min-keyint=12:open-gop=1:bframes=3:scenecut=0"),
    "vp9.webm": VP9,
    "av1.mp4": ("-c:v", "libaom-av1", "-cpu-used", "8", "-crf", "20", "-pix_fmt", "yuv420p", "-g", "16"),
    "av1.webm": ("-c:v", "libaom-av1", "-cpu-used", "8", "-crf", "20", "-pix_fmt", "yuv420p", "-g", "16"),
    "mpeg4.avi": ("-c:v", "mpeg4", "-q:v", "2", "-bf", "2"),
    "mjpeg.avi": ("-c:v", "mjpeg", "-q:v", "2"),
    "anim.gif": (),
    "vfr.mkv": (*X264, *VFR, "-bf", "2"),
    "vfr.mp4": (*X264, *VFR, "-bf", "2", "-g", "12"),
    "vfr.webm": (*VP9, *VFR),
}
