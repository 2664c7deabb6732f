"""The keypoint image that InstantID and InfiniteYou condition on: five points joined to the nose, on black."""

import math

import numpy as np
from numpy.typing import NDArray

LIMBS = ((0, 2), (1, 2), (3, 2), (4, 2))
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
LIMB_HALF_WIDTH_PX = 4
POINT_RADIUS_PX = 10
LIMB_BRIGHTNESS = 0.6
TRAINING_AREA_PX = 1_000_000
"""Image area, in pixels, for which the sizes above are defined."""


def draw_keypoints(keypoints: NDArray[np.floating], width: int, height: int, scale: float = 1.0) -> NDArray[np.uint8]:
    """Draw keypoints (5, 2), x and y in pixels of the canvas. Return an RGB image (height, width, 3).

    `scale` multiplies line widths and point sizes. 1 is the published size (`draw_kps` of InstantID, Wang et al. 2024,
    arXiv:2401.07519).
    """
    import cv2

    canvas = np.zeros((height, width, 3), np.float64)
    limb_half_width = max(1, round(LIMB_HALF_WIDTH_PX * scale))
    for start, end in LIMBS:
        (x0, y0), (x1, y1) = keypoints[start], keypoints[end]
        centre = int((x0 + x1) / 2), int((y0 + y1) / 2)
        axes = int(math.hypot(x0 - x1, y0 - y1) / 2), limb_half_width
        angle_deg = int(math.degrees(math.atan2(y0 - y1, x0 - x1)))
        cv2.fillConvexPoly(canvas, cv2.ellipse2Poly(centre, axes, angle_deg, 0, 360, 1), COLOURS[start])
    image = np.ascontiguousarray((canvas * LIMB_BRIGHTNESS).astype(np.uint8))
    for (x, y), colour in zip(keypoints, COLOURS, strict=True):
        cv2.circle(image, (int(x), int(y)), max(1, round(POINT_RADIUS_PX * scale)), colour, -1)
    return image


def map_to_canvas(
    keypoints: NDArray[np.floating], photo_size: tuple[int, int], canvas_size: tuple[int, int]
) -> NDArray[np.float32]:
    """Map keypoints (5, 2) from photo pixels to canvas pixels. The photo is scaled to the canvas's shorter side and centred.

    InfiniteYou places its control image in the same way. Sizes are (width, height).
    """
    (photo_w, photo_h), (canvas_w, canvas_h) = photo_size, canvas_size
    if canvas_w <= canvas_h:
        scaled_w, scaled_h = canvas_w, int(canvas_w * (photo_h / photo_w))
    else:
        scaled_w, scaled_h = int(canvas_h * (photo_w / photo_h)), canvas_h
    offset = (canvas_w - scaled_w) // 2, (canvas_h - scaled_h) // 2
    scale = scaled_w / photo_w, scaled_h / photo_h
    return (np.asarray(keypoints) * scale + offset).astype(np.float32)
