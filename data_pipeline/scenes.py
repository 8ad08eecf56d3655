"""A video is cut into scenes, and each scene into clips of the wanted length. The only importer of scenedetect."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from data_pipeline.measures import small
from videodiff.config import Config

_SIDE = 128  # pixels of the shorter side of what the detector sees


class ScenesConfig(Config):
    """How PySceneDetect finds the cuts.

    "adaptive" compares each change with those around it, so that fast motion is no cut; "content" has one threshold.
    """

    detector: Literal["adaptive", "content"] = "adaptive"
    threshold: float | None = Field(None, gt=0)  # the detector's own by default: 3 (a ratio), 27 (of 255)
    min_frames: int = Field(15, ge=1)  # two cuts are no nearer to each other than this


class ClipConfig(Config):
    """What a clip is: ``frames`` frames at ``fps``, the shorter side ``size`` pixels.

    ``aspect`` (width / height) crops the centre to it; without one the picture keeps its own aspect. Nothing is
    enlarged: what is smaller is rejected.
    """

    frames: int = Field(16, ge=1)
    fps: float = Field(8.0, gt=0, lt=1000)
    size: int = Field(256, ge=16, multiple_of=2)
    aspect: float | None = Field(None, gt=0.1, lt=10)
    per_scene: int | None = Field(None, ge=1)  # at most so many, from the scene's start on; all by default
    crf: int = Field(12, ge=0, le=51)  # x264's rate factor of what is stored: 0 lossless in YUV .. 51 worst


def find_cuts(
    config: ScenesConfig | None, frames: Iterable[tuple[float, npt.NDArray[np.uint8]]]
) -> tuple[npt.NDArray[np.float64], list[int]]:
    """The times of all frames (uint8 [H,W,3], RGB), and the numbers of those that begin a scene; 0 is the first.

    Without a configuration all is one scene.
    """
    times: list[float] = []
    if config is None:
        times = [time for time, _ in frames]
        return np.array(times, np.float64), [0]
    from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode

    own = config.threshold
    length: Any = {"min_scene_len": config.min_frames}
    detector = (
        AdaptiveDetector(**length, **({} if own is None else {"adaptive_threshold": own}))
        if config.detector == "adaptive"
        else ContentDetector(**length, **({} if own is None else {"threshold": own}))
    )
    cuts = {0}
    number = FrameTimecode(0, 25.0)
    for index, (time, frame) in enumerate(frames):
        times.append(time)
        number = FrameTimecode(index, 25.0)  # it counts frames, whatever their rate
        cuts |= {cut.frame_num for cut in detector.process_frame(number, small(frame, _SIDE)[:, :, ::-1].copy())}
    cuts |= {cut.frame_num for cut in detector.post_process(number)} if times else set()
    return np.array(times, np.float64), sorted(cut for cut in cuts if cut < max(1, len(times)))


def cut_clips(config: ClipConfig, times: npt.NDArray[np.float64], cuts: list[int]) -> list[dict[str, Any]]:
    """The clips of a video: ``start`` (of the file's own time), ``scene``, ``source_fps``, and a ``problem`` or "".

    Clips of a scene lie end to end; ``source_fps`` is the mean rate within each. A clip whose frames come at less than
    its rate is "too slow"; a scene that gives no other, or none, is listed once, as "too slow" or "too short".
    """
    clips: list[dict[str, Any]] = []
    for scene, (first, stop) in enumerate(zip(cuts, [*cuts[1:], len(times)], strict=True)):
        within = times[first:stop]
        if len(within) == 0:
            continue
        interval = (within[-1] - within[0]) / (len(within) - 1) if len(within) > 1 else 0.0
        # A frame lasts half an interval beyond its time before the next scene's first one may be nearer.
        end = within[-1] + interval / 2
        if stop < len(times):
            end = min(end, (within[-1] + times[stop]) / 2)
        total = int((end - within[0]) * config.fps * (1 - 1e-6)) + 1
        count = min(total // config.frames, config.per_scene or total)
        mine = []
        for number in range(count):
            start = float(within[0]) + number * config.frames / config.fps
            interval = _interval(within, start, start + (config.frames - 1) / config.fps)
            slow = "too slow" if config.frames > 1 and interval * config.fps > 1.1 else ""
            mine.append(
                {"start": start, "scene": scene, "source_fps": 1 / interval if interval else None, "problem": slow}
            )
        if not mine:
            problem = "too slow" if config.frames > 1 and interval * config.fps > 1.1 else "too short"
            rate = 1 / interval if interval else None
            mine = [{"start": float(within[0]), "scene": scene, "source_fps": rate, "problem": problem}]
        clips += mine if any(not clip["problem"] for clip in mine) else mine[:1]
    return clips


def _interval(times: npt.NDArray[np.float64], start: float, end: float) -> float:
    """The mean time from frame to frame between start and end, of those frames nearest around it; 0 of one frame."""
    first = max(0, int(np.searchsorted(times, start + 1e-6)) - 1)
    last = min(len(times) - 1, max(first + 1, int(np.searchsorted(times, end - 1e-6))))
    return float(times[last] - times[first]) / (last - first) if last > first else 0.0


def grid(config: ClipConfig, start: float) -> npt.NDArray[np.float64]:
    """When the frames of a clip show: each is the source frame nearest to its time, the earlier of two as near."""
    return start + np.arange(config.frames) / config.fps * (1 - 1e-6)
