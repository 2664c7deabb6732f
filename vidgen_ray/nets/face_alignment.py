"""The crop that face recognisers are trained on: 112x112 pixels, eyes, nose and mouth where ArcFace has them."""

import cv2
import numpy as np
from numpy.typing import NDArray

from vidgen_ray.errors import StageError

CROP_PX = 112
TEMPLATE_PX = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)
"""Left eye, right eye, nose, left and right corner of the mouth in the crop, left as seen in the picture.

Source: Deng et al. 2019, ArcFace, arXiv:1801.07698; insightface `utils/face_align.py`.
"""


def norm_crop(photo: NDArray[np.uint8], keypoints: NDArray[np.floating]) -> NDArray[np.uint8]:
    """(H, W, 3) and five points (5, 2) in its pixels -> (112, 112, 3), black where the photo ends.

    The channels stay in their order. The same as insightface's `norm_crop` but for rounding.
    """
    crop = cv2.warpAffine(np.ascontiguousarray(photo), similarity(keypoints, TEMPLATE_PX), (CROP_PX, CROP_PX))
    return np.asarray(crop, np.uint8)


def similarity(source: NDArray[np.floating], target: NDArray[np.floating]) -> NDArray[np.float64]:
    """The turn, scale and shift, (2, 3), that takes points (N, 2) nearest to others, by least squares.

    In the plane Umeyama's method needs no singular values: with points as complex numbers the map is z -> a * z + b.
    Source: Umeyama 1991, IEEE TPAMI 13(4). Raises StageError where all source points are one.
    """
    z, w = (np.asarray(points, np.float64) @ (1, 1j) for points in (source, target))
    spread = z - z.mean()
    if not spread.any():
        raise StageError("face_image: the keypoints of the face fall on one point; give another photo")
    a = np.vdot(spread, w) / np.vdot(spread, spread).real
    b = w.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])
