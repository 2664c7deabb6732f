"""Built-in scorers. They measure; what is good or bad is decided by a query."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby, pairwise
from typing import Any, ClassVar

import cv2
import numpy as np
import pyarrow
from numpy.typing import NDArray

from vidgen_ray.dataset.scorers import Clip, Column, Need, Scorer
from vidgen_ray.stages.instantid import DECIMALS
from vidgen_ray.stages.rife import MIN_SIMILARITY

INT, FLOAT = pyarrow.int64(), pyarrow.float64()
DARK_LEVEL, DARK_SHARE = 25, 0.98
"""A frame is black if at least this share of its pixels has at most this luma."""
BLANK_LEVELS = 3.0
"""A frame has one colour if no channel has a larger standard deviation."""
FROZEN_LEVELS, _BLOCKS = 1.0, 16
"""A frame is frozen if the luma of no block changes by more on average. Blocks along the longer side."""
CLIPPED_LEVELS = (2, 253)
"""Luma up to which a pixel is clipped to black, and from which it is clipped to white."""
SHARPNESS_SIDE_PX = 512
HASHED_FRAMES, HASH_PX, HASH_SIDE = 3, 32, 8


class PixelScorer(Scorer):
    """Measurements of luma and of the file."""

    name: ClassVar[str] = "pixels"
    version: ClassVar[int] = 1
    cpu_s_per_frame: ClassVar[float] = 0.004
    columns: ClassVar[Mapping[str, Column]] = {
        "file_duration_s": Column(FLOAT, "Duration of the file in seconds; null for an image."),
        "file_kbps": Column(FLOAT, "Bitrate of the file in kilobits per second; null for an image."),
        "black_frames": Column(INT, f"Frames of which {DARK_SHARE:.0%} of the pixels have a luma of at most {DARK_LEVEL}."),
        "blank_frames": Column(INT, "Frames of a single colour, black ones included."),
        "frozen_frames": Column(INT, "Frames that show the same as the frame before; null for an image."),
        "frozen_longest": Column(INT, "Longest run of frozen frames; null for an image."),
        "flicker": Column(
            FLOAT, "Amplitude of mean luma that turns from frame to frame, in levels, 0 to 127; null below 3 frames."
        ),
        "luma": Column(FLOAT, "Mean luma, 0 to 255."),
        "dark_share": Column(FLOAT, "Share of pixels that are clipped to black, 0 to 1."),
        "bright_share": Column(FLOAT, "Share of pixels that are clipped to white, 0 to 1."),
        "sharpness": Column(
            FLOAT, f"Mean variance of the Laplacian of luma at {SHARPNESS_SIDE_PX} pixels, in levels², from 0."
        ),
        "sharpness_worst": Column(FLOAT, "The same of the least sharp frame."),
    }

    def score(self, clip: Clip) -> Mapping[str, Any]:
        luma, count = clip.luma, len(clip.luma)
        means = luma.mean((1, 2))
        sharpness = [_sharpness(frame) for frame in luma]
        values: dict[str, Any] = {
            "black_frames": int((np.mean(luma <= DARK_LEVEL, (1, 2)) >= DARK_SHARE).sum()),
            "blank_frames": sum(bool(cv2.meanStdDev(frame)[1].max() <= BLANK_LEVELS) for frame in clip.frames),
            "flicker": flicker(means),
            "luma": round(float(means.mean()), 2),
            "dark_share": round(float(np.mean(luma <= CLIPPED_LEVELS[0])), 4),
            "bright_share": round(float(np.mean(luma >= CLIPPED_LEVELS[1])), 4),
            "sharpness": round(float(np.mean(sharpness)), 2),
            "sharpness_worst": round(min(sharpness), 2),
        }
        if clip.fps:
            duration_s = count / clip.fps
            values |= {
                "file_duration_s": round(duration_s, 3),
                "file_kbps": round(clip.path.stat().st_size * 8 / duration_s / 1000, 1),
            }
        if count > 1:
            frozen = [_largest_change(*pair) <= FROZEN_LEVELS for pair in pairwise(luma)]
            values |= {"frozen_frames": sum(frozen), "frozen_longest": max(sum(run) for _, run in groupby(frozen))}
        return values


def _sharpness(luma: NDArray[np.uint8]) -> float:
    factor = SHARPNESS_SIDE_PX / max(luma.shape)
    resized = cv2.resize(luma, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    return float(cv2.Laplacian(resized, cv2.CV_32F).var())


def _largest_change(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> float:
    """Return the mean absolute difference of luma in the block where it is largest."""
    height, width = first.shape
    blocks = max(1, _BLOCKS * width // max(height, width)), max(1, _BLOCKS * height // max(height, width))
    return float(cv2.resize(cv2.absdiff(first, second).astype(np.float32), blocks, interpolation=cv2.INTER_AREA).max())


def flicker(means: NDArray[np.float64]) -> float | None:
    """Return the amplitude A of a mean luma (T,) that alternates by ±A. A trend and a cut have none.

    A frame counts if its mean is above those of both neighbours or below both, with the smaller of the two differences.
    """
    if len(means) < 3:
        return None
    steps = np.diff(means)
    turns = np.where(steps[:-1] * steps[1:] < 0, np.minimum(abs(steps[:-1]), abs(steps[1:])), 0)
    return round(float(np.sqrt(np.mean(turns**2)) / 2), 3)


class MotionScorer(Scorer):
    """Motion between neighbouring frames, and cuts."""

    name: ClassVar[str] = "motion"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[Need, ...]] = ("frames", "flow")
    cpu_s_per_frame: ClassVar[float] = 0.004
    columns: ClassVar[Mapping[str, Column]] = {
        "motion": Column(FLOAT, "Mean length of the motion between two frames, in pixels of the file; null for an image."),
        "motion_worst": Column(FLOAT, "The same of the two frames with the most motion."),
        "motion_share": Column(FLOAT, "`motion` as a share of the width."),
        "motion_worst_share": Column(FLOAT, "`motion_worst` as a share of the width."),
        "cuts": Column(INT, f"Frames whose similarity to the frame before is below {MIN_SIMILARITY:g} after motion is undone."),
        "similarity_worst": Column(FLOAT, "Lowest similarity of two frames after motion is undone, -1 to 1."),
    }

    def score(self, clip: Clip) -> Mapping[str, Any]:
        if len(clip.frames) < 2:
            return {}
        is_cut = clip.flow.similarity < MIN_SIMILARITY
        values: dict[str, Any] = {
            "cuts": int(is_cut.sum()),
            "similarity_worst": round(float(clip.flow.similarity.min()), 4),
        }
        # Motion across a cut means nothing.
        lengths = np.array([np.hypot(*np.moveaxis(motion, -1, 0)).mean() for motion in clip.flow.motion[~is_cut]], float)
        if len(lengths):
            for name, length in (("motion", lengths.mean()), ("motion_worst", lengths.max())):
                values[name] = round(float(length), 3)
                values[f"{name}_share"] = round(float(length) / clip.size[0], 6)
        return values


class FaceScorer(Scorer):
    """Faces and their likeness to the face photos, by the models of the folder's profile."""

    name: ClassVar[str] = "faces"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[Need, ...]] = ("frames", "faces")
    cpu_s_per_frame: ClassVar[float] = 0.001
    columns: ClassVar[Mapping[str, Column]] = {
        "faces_mean": Column(FLOAT, "Mean number of faces in 5 frames, from the first to the last."),
        "faces_max": Column(INT, "Largest number of faces in these frames."),
        "likeness_frames": Column(
            pyarrow.list_(FLOAT), "Likeness to the face photos in each of these frames, -1 to 1; null without a face or photo."
        ),
        "likeness": Column(FLOAT, "Mean of `likeness_frames`, -1 to 1."),
        "likeness_worst": Column(
            FLOAT, "Minimum of `likeness_frames`, -1 to 1. That of frames before encoding is `clip_likeness_worst`."
        ),
    }

    def score(self, clip: Clip) -> Mapping[str, Any]:
        counts = [len(faces) for faces in clip.faces]
        values: dict[str, Any] = {"faces_mean": float(np.mean(counts)), "faces_max": max(counts)}
        person = clip.person
        if person is None:
            return values
        likeness = [
            round(max(float(face.embedding @ person) for face in faces), DECIMALS) if faces else None for faces in clip.faces
        ]
        values["likeness_frames"] = likeness
        if known := [each for each in likeness if each is not None]:
            values |= {"likeness": round(sum(known) / len(known), DECIMALS), "likeness_worst": min(known)}
        return values


class HashScorer(Scorer):
    """Perceptual hashes, for near-duplicates."""

    name: ClassVar[str] = "hashes"
    version: ClassVar[int] = 1
    cpu_s_per_frame: ClassVar[float] = 0.0001
    columns: ClassVar[Mapping[str, Column]] = {
        "phash": Column(
            pyarrow.list_(INT), "Perceptual hashes of the first, middle and last frame, 64 bits each; compare with `xor`."
        ),
    }

    def score(self, clip: Clip) -> Mapping[str, Any]:
        indices = np.linspace(0, len(clip.luma) - 1, HASHED_FRAMES).round().astype(int)
        return {"phash": [perceptual_hash(clip.luma[index]) for index in indices]}


def perceptual_hash(luma: NDArray[np.uint8]) -> int:
    """Return 64 bits, as a signed integer: which of the lowest 8x8 frequencies are above their median.

    Source: Zauner 2010, Implementation and Benchmarking of Perceptual Image Hash Functions.
    """
    small = cv2.resize(luma, (HASH_PX, HASH_PX), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:HASH_SIDE, :HASH_SIDE].ravel()
    # The first is the mean luma.
    bits = low > np.median(low[1:])
    return int(np.packbits(bits).view(">i8")[0])


SCORERS: tuple[type[Scorer], ...] = (PixelScorer, MotionScorer, FaceScorer, HashScorer)
