"""Dense optical flow, and frames between two frames by warping along it. The only importer of cv2 in videodiff/.

Shapes: frames uint8 [H,W,3], at least 16 pixels each way.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from videodiff.errors import UserError

LEAST_SIDE = 16  # pixels: with fewer the method finds nothing
Frame = npt.NDArray[np.uint8]
Flow = npt.NDArray[np.float32]


def dense_flow(a: Frame, b: Frame) -> Flow:
    """Flow float32 [H,W,2] (x, y) in pixels: what is at p in `a` is at p + flow in `b` (DIS: Kroeger et al. 2016).

    Patches are compared less their means, so that a change of light is no motion. Raises UserError without OpenCV,
    and for frames that are smaller than 16 pixels or of two sizes.
    """
    cv2 = _cv2()
    if a.shape != b.shape or a.ndim != 3 or min(a.shape[:2]) < LEAST_SIDE or {a.dtype, b.dtype} != {np.dtype(np.uint8)}:
        raise UserError(
            f"optical flow: frames {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}; give two uint8 [H,W,3] of "
            f"one size, at least {LEAST_SIDE} pixels each way"
        )
    method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    method.setFinestScale(0)  # to the pixel: generated clips are small
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # a frame is cut in a strip for each thread: so equal clips have equal flow on any machine
    try:
        flow = method.calc(*(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in (a, b)), None)
    finally:
        cv2.setNumThreads(threads)
    return np.asarray(flow, np.float32)


def interpolate_by_flow(a: Frame, b: Frame, share: float) -> Frame:
    """The frame at `share` (0 to 1) of the way from `a` to `b`: both warped along the flow and blended.

    The baseline of an interpolation stage: it moves what moves evenly, and knows nothing of what is hidden. The flow
    from the frame between is put together from both flows (Jiang et al. 2018, eq. 4). At 0 and 1 it is `a` and `b`
    exactly. Raises UserError as `dense_flow`, and for a share outside 0 to 1.
    """
    if not 0 <= share <= 1:
        raise UserError(f"interpolate: share {share} lies outside 0 to 1; to go on beyond a frame is another task")
    forward, backward = dense_flow(a, b), dense_flow(b, a)
    t = np.float32(share)
    to_a = -(1 - t) * t * forward + t * t * backward
    to_b = (1 - t) ** 2 * forward - t * (1 - t) * backward
    (from_a, seen_a), (from_b, seen_b) = _warped(a, to_a), _warped(b, to_b)
    # What one frame does not show, since it lies beyond its edge, is left to the other.
    weight_a, weight_b = (1 - t) * seen_a, t * seen_b
    total = weight_a + weight_b
    part_b = np.where(total > 0, weight_b / np.maximum(total, 1e-6), t)[..., None]
    return np.asarray(np.rint((1 - part_b) * from_a + part_b * from_b).clip(0, 255), np.uint8)


def _warped(frame: Frame, flow: Flow) -> tuple[Flow, Flow]:
    """float32 [H,W,3]: at each pixel what the frame shows at pixel + flow, the nearest edge where that lies beyond it;
    and whether it lies within, [H,W].
    """
    cv2 = _cv2()
    height, width = flow.shape[:2]
    y, x = np.mgrid[:height, :width].astype(np.float32) + flow[..., 1::-1].transpose(2, 0, 1)
    found = cv2.remap(frame.astype(np.float32), x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    within = (x > -0.5) & (x < width - 0.5) & (y > -0.5) & (y < height - 0.5)
    return np.asarray(found, np.float32), within.astype(np.float32)


def _cv2() -> Any:
    try:
        import cv2
    except ImportError:
        raise UserError(
            "optical flow: opencv-python-headless is not installed; install it with pip install 'videodiff[eval]'"
        ) from None
    return cv2
