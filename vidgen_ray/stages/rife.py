"""RIFE: draws frames between the frames of a clip, so that it plays at a higher rate. Its duration stays the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from pydantic import Field, field_validator

from vidgen_ray.errors import StageError
from vidgen_ray.nets.weight_files import NOT_FINITE
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import (
    ChunkedStage,
    Frames,
    Image,
    StageParams,
    pixels_to_uint8,
    torch_dtype,
)
from vidgen_ray.stages.loading import require_device
from vidgen_ray.stages.memory_table import ShotWork, StageMemory, activation_bytes, network_work, weight_bytes
from vidgen_ray.system.model_files import rife_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from vidgen_ray.nets.rife_network import Rife

CUT_PX, CUT_WINDOW_PX = 64, 11
"""Side to which frames are reduced before they are compared, and that of the window of the comparison."""
MIN_SIMILARITY = 0.5
"""Default of `RifeParams.min_similarity`."""

FLOW_SCALES = (1.0, 0.5, 0.25)
_LAYOUTS = ("rife/hdv3", "rife/4.25")
LARGEST_MULTIPLE_PX = 128
"""Pixels to whose multiples RIFE 4.25 pads the sides of frames, at a flow scale of 1."""
KEPT_FRAMES = 17
"""Most frames that are kept between two frames, these included: a network that only draws the middle draws sixteenths."""


class RifeParams(StageParams):
    """`weights` is RIFE's `flownet.pkl`, or the same as .safetensors, or a folder with one of them."""

    flow_scale: float = 1.0
    """Share of the resolution at which motion is estimated: 1, 0.5 or 0.25. 0.5 suits clips larger than 1080p."""
    min_similarity: float = Field(default=MIN_SIMILARITY, ge=-1, le=1)
    """Structural similarity of two frames after their motion is undone, -1 to 1. Below it there is a scene cut between them."""

    @field_validator("flow_scale")
    @classmethod
    def _check_flow_scale(cls, value: float) -> float:
        if value not in FLOW_SCALES:
            raise ValueError(f"must be one of {', '.join(map(str, FLOW_SCALES))}")
        return value


_Pixels: TypeAlias = "NDArray[Any]"


@dataclass(frozen=True, slots=True)
class _Pair:
    """The last two frames between which a frame was drawn."""

    first: Image
    second: Image
    between: Callable[[Fraction], Image]
    """Time between 0 and 1 -> frame."""


class RifeStage(ChunkedStage[RifeParams]):
    """`frames` uint8 (T, H, W, 3) at `fps` -> `frames` uint8 (T * factor, H, W, 3) at `fps * factor`.

    The factor is `interpolation`, or `fps_out / fps`; T * factor is rounded up. The frame at time t is drawn from the frames
    before and after t; a generated frame that begins at t is taken unchanged. The last frame is held for its own duration.
    At a scene cut the frame before it is repeated. A cut is where the two frames differ even after both are moved along the
    estimated motion to the middle. RIFE's own rule compares the frames as they are, and takes fast motion for a cut.
    Source: Huang et al. 2022, arXiv:2011.06294.
    """

    name: ClassVar[str] = "rife"
    label: ClassVar[str] = "Interpolation"
    activity: ClassVar[str] = "Interpolating frames"
    chosen_by: ClassVar[str] = "interpolates"
    compute_share: ClassVar[float] = 0.2
    reference: ClassVar[Mapping[str, Any]] = {"interpolation": 2}
    examples: ClassVar[tuple[Mapping[str, Any], ...]] = ({"interpolation": 2},)
    reads: ClassVar[tuple[str, ...]] = ("fps", "interpolation", "fps_out")
    clip_only_fields: ClassVar[tuple[str, ...]] = ("fps", "interpolation", "fps_out")
    switch_off: ClassVar[Mapping[str, Any]] = {"interpolation": 1, "fps_out": None}
    takes: ClassVar[tuple[str, ...]] = ("frames",)
    writes: ClassVar[tuple[str, ...]] = ("frames",)
    Params: ClassVar[type[StageParams]] = RifeParams

    @staticmethod
    def frame_factor(shot: Shot) -> Fraction:
        return Fraction(shot.interpolation if shot.fps_out is None else Fraction(shot.fps_out) / shot.fps)

    @staticmethod
    def source_frames(shot: Shot, chunk: slice) -> slice:
        factor = RifeStage.frame_factor(shot)
        return slice(floor(chunk.start / factor), floor((chunk.stop - 1) / factor) + 2)

    @classmethod
    def work(cls, params: RifeParams, shot: Shot) -> ShotWork:
        drawn = shot.clip_frames * (float(cls.frame_factor(shot)) - 1)
        return ShotWork(network_work(f"{_LAYOUTS[-1]}:1", _padded_pixels(shot, 1.0)).times(drawn))

    @classmethod
    def lower_memory(cls, params: RifeParams) -> RifeParams | None:
        """Return half the resolution of motion, down to a quarter."""
        return params.model_copy(update={"flow_scale": params.flow_scale / 2}) if params.flow_scale > 0.25 else None

    @classmethod
    def memory(cls, params: RifeParams, shot: Shot) -> StageMemory | None:
        """Memory of the layout that needs more: the file decides which one it is."""
        pixels, dtype = shot.width * shot.height, params.dtype
        largest = max(_LAYOUTS, key=lambda layout: weight_bytes(layout, dtype))
        padded = _padded_pixels(shot, params.flow_scale)
        draw = max(activation_bytes(f"{layout}:{params.flow_scale:g}", padded, dtype) for layout in _LAYOUTS)
        kept = KEPT_FRAMES * pixels * 3 * 4
        return StageMemory({"rife": weight_bytes(largest, dtype)}, draw + kept, 4 * pixels * 3 * 4)

    @classmethod
    def chunk_frames(cls, params: RifeParams) -> int:
        """Return 1: a frame depends on the two frames around it only, so a clip may be cut anywhere."""
        return 1

    @classmethod
    def check_weights(cls, params: RifeParams) -> None:
        rife_file(params.weights)

    def load(self) -> None:
        from vidgen_ray.nets.rife_network import load_rife

        require_device(self.params.device)
        self._network: Rife = load_rife(self.params.weights, torch_dtype(self.params.dtype)).to(self.params.device)
        self._pair: _Pair | None = None

    def move(self, device: str) -> None:
        self._network.to(device)
        self._pair = None

    def process_chunk(self, shot: Shot, frames: Frames, chunk: slice) -> Frames:
        position = chunk.start / self.frame_factor(shot)
        time = position - floor(position)
        if not time or len(frames) == 1:
            return frames[:1]
        return self._between(frames[0], frames[1])(time)[None]

    def _between(self, first: Image, second: Image) -> Callable[[Fraction], Image]:
        """Return a function that draws frames between two frames. It is kept for the next call, which often has the same."""

        import numpy as np

        pair = self._pair
        if pair is None or not (np.array_equal(pair.first, first) and np.array_equal(pair.second, second)):
            # Copies, since frames of other processes are views of their memory.
            first, second = first.copy(), second.copy()
            params = self.params
            between = frames_between(
                self._network, first, second, flow_scale=params.flow_scale, min_similarity=params.min_similarity
            )
            pair = self._pair = _Pair(first, second, between)
        return pair.between


def _padded_pixels(shot: Shot, flow_scale: float) -> int:
    step = round(LARGEST_MULTIPLE_PX / flow_scale)
    return ceil(shot.width / step) * ceil(shot.height / step) * step**2


def frames_between(
    network: Rife, first: _Pixels, second: _Pixels, *, flow_scale: float = 1.0, min_similarity: float = MIN_SIMILARITY
) -> Callable[[Fraction], _Pixels]:
    """Return a function that draws the frame at a time between 0 (the first frame) and 1. At a cut, it is the first frame.

    Frames are RGB (H, W, 3): uint8, or uint16 with the full range. Raises StageError for NaN and infinity, like the function.
    """
    import numpy as np
    import torch

    from vidgen_ray.nets.rife_network import FramePair

    device = next(network.parameters()).device
    levels = np.iinfo(first.dtype).max

    def tensor(frame: _Pixels) -> torch.Tensor:
        # torch has few operations for uint16.
        pixels = torch.from_numpy(frame if levels == 255 else frame.astype(np.int32)).to(device)
        return pixels.permute(2, 0, 1)[None].float() / levels

    pair = FramePair(network, tensor(first), tensor(second), flow_scale)
    if image_similarity(*(pixels_to_uint8(pixels[0]) for pixels in pair.aligned())) < min_similarity:
        return lambda time: first

    def drawn(time: Fraction) -> _Pixels:
        pixels = pair.at(time)[0]
        if levels == 255:
            return pixels_to_uint8(pixels)
        if not pixels.isfinite().all():
            raise StageError(NOT_FINITE)
        deep: _Pixels = (pixels.movedim(0, -1).float().clamp(0, 1) * levels).round().cpu().numpy().astype(first.dtype)
        return deep

    return drawn


def image_similarity(first: Image, second: Image) -> float:
    """Return the structural similarity of two frames of the same size, reduced to 64x64 pixels, -1 to 1.

    Source: Wang et al. 2004, Image Quality Assessment: From Error Visibility to Structural Similarity.
    """
    import cv2
    from skimage.metrics import structural_similarity

    small = [cv2.resize(frame, (CUT_PX, CUT_PX), interpolation=cv2.INTER_AREA) for frame in (first, second)]
    return float(
        structural_similarity(  # type: ignore[no-untyped-call]  # scikit-image is untyped
            *small,
            win_size=CUT_WINDOW_PX,
            channel_axis=-1,
            data_range=255,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )
