"""Face alignment: the 112x112 crop that face recognisers are trained on, with the keypoints at ArcFace's positions."""

import numpy as np
from numpy.typing import NDArray

from vidgen_ray.errors import StageError

CROP_PX = 112
TEMPLATE_PX = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float32
)
"""Left eye, right eye, nose, left and right corner of the mouth in the crop. Left means left in the image.

Source: Deng et al. 2019, ArcFace, arXiv:1801.07698; insightface `utils/face_align.py`.
"""


def norm_crop(photo: NDArray[np.uint8], keypoints: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Return the aligned crop (112, 112, 3) of a photo (H, W, 3) with keypoints (5, 2) in pixels of the photo.

    Pixels outside of the photo are black. The channel order is kept. Equal to insightface's `norm_crop` except for rounding.
    """
    import cv2

    crop = cv2.warpAffine(np.ascontiguousarray(photo), similarity(keypoints, TEMPLATE_PX), (CROP_PX, CROP_PX))
    return np.asarray(crop, np.uint8)


def similarity(source: NDArray[np.floating], target: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the least-squares rotation, scale and shift (2, 3) from `source` to `target`, both (N, 2).

    In the plane, Umeyama's method needs no singular values: with points as complex numbers the map is z -> a * z + b.
    Source: Umeyama 1991, IEEE TPAMI 13(4). Raises StageError if all source points are equal.
    """
    z, w = (np.asarray(points, np.float64) @ (1, 1j) for points in (source, target))
    spread = z - z.mean()
    if not spread.any():
        raise StageError("face_image: the keypoints of the face fall on one point; give another photo")
    a = np.vdot(spread, w) / np.vdot(spread, spread).real
    b = w.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])
