"""Small shards of any members, pictures and clips, for the tests of what reads them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from videodiff.video_io import encode_video


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def picture(value: int, width: int, height: int, form: str = "PNG", **more: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (value, 0, 255 - value)).save(file, form, **more)
    return file.getvalue()


def clip(value: int, width: int, height: int, frames: int = 4) -> tuple[bytes, dict[str, Any]]:
    video = encode_video(np.full((frames, height, width, 3), value, np.uint8), 8)
    return video, {"captions": [f"number {value}"], "fps": 8, "frames": frames, "width": width, "height": height}
