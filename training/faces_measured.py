"""Measure the trained face pack and IR-SE50 on the cast, which is not part of the training data.

python -m training.faces_measured FOLDER_OF_BOTH_ONNX_FILES IR_SE50.pth
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import skimage.data
import torch
from numpy.typing import NDArray

from training.cast import CAST, PORTRAIT_PX, portrait, pose
from training.degrading import degraded
from training.drawing import keypoints_px
from training.face_detector import others, people
from training.face_recogniser import People
from vidgen_ray.nets.faces import DetectedFace, PackDetector, PackRecogniser, norm_crop, open_pack
from vidgen_ray.nets.ir_se50 import IRSE50Embedder

SEED = 4711
SIZES_PX, MIN_SCORE = (640, 320, 160), 0.65
"""Settings of the profile `demo`."""
EACH = 16
"""Images per cast member."""
UNSEEN_PHOTOS = ("astronaut", "camera", "moon", "page", "clock", "brick", "grass", "gravel", "horse")
"""Photos of skimage that are not part of the training data."""

Picture = NDArray[np.uint8]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("ir_se50", type=Path)
    told = parser.parse_args()
    torch.set_num_threads(1)
    pack = open_pack(told.pack, ("detection", "recognition"), "cpu", 1)
    detector = PackDetector(pack["detection"], MIN_SCORE)
    embedders = {
        "glintr100": PackRecogniser(pack["recognition"]).embed,
        "ir_se50": IRSE50Embedder(told.ir_se50, threads=1).embed,
    }
    _of_the_cast(detector, embedders)
    _of_any_people(detector)
    _of_nobody(detector)
    _seconds(detector, embedders)
    return 0


def detected(detector: PackDetector, picture: Picture) -> list[DetectedFace]:
    """Detect faces as the stages do: at the first size that has any."""
    return next((faces for size_px in SIZES_PX if (faces := detector.detect(picture, size_px))), [])


def _crop(picture: Picture, keypoints: NDArray[np.floating]) -> Picture:
    return norm_crop(picture, keypoints)[:, :, ::-1]


def _of_the_cast(detector: PackDetector, embedders: dict[str, Callable[[Picture], NDArray[np.float32]]]) -> None:
    drawn = People(EACH * len(CAST), SEED, list(CAST.values()))
    right = np.arange(len(drawn.pictures)) % len(CAST)
    faces = [detected(detector, portrait(name)) for name in CAST]
    print("portraits with one face:", sum(len(found) == 1 for found in faces), "of", len(faces))
    portraits = np.stack([_crop(portrait(name), found[0].keypoints) for name, found in zip(CAST, faces, strict=True)])
    references = {name: _unit(embed(portraits)) for name, embed in embedders.items()}
    exact = np.stack([_crop(portrait(name), keypoints_px(pose(name), PORTRAIT_PX)) for name in CAST])
    exact_references = {name: _unit(embed(exact)) for name, embed in embedders.items()}
    between = references["ir_se50"] @ references["ir_se50"].T
    agree = (references["ir_se50"] * references["glintr100"]).sum(1).min()
    print(
        f"both files agree to a cosine of {agree:.6f}; two of the cast have {between[np.triu_indices(10, 1)].mean():.2f}, "
        f"the most alike {between[np.triu_indices(10, 1)].max():.2f}"
    )
    for way in ("clean", "spoilt"):
        random = np.random.default_rng(SEED)
        pictures = [picture if way == "clean" else degraded(picture, random) for picture in drawn.pictures]
        found = [detected(detector, picture) for picture in pictures]
        true = np.stack([_crop(picture, points) for picture, points in zip(pictures, drawn.keypoints, strict=True)])
        seen = [n for n, faces in enumerate(found) if faces]
        own = np.stack([_crop(pictures[n], found[n][0].keypoints) for n in seen])
        for name, embed in embedders.items():
            exactly = _told(_unit(embed(true)) @ exact_references[name].T, right)
            by_found = _told(_unit(embed(own)) @ references[name].T, right[seen])
            print(f"{way}, {name}: with true points {exactly}; with found points {by_found}")


def _told(cosines: NDArray[np.float32], right: NDArray[np.int_]) -> str:
    """Summarise the cosines (N, 10) of faces with the portraits of the cast, as text."""
    own = cosines[np.arange(len(right)), right]
    others = np.where(np.eye(len(CAST), dtype=bool)[right], -1, cosines).max(1)
    share = (cosines.argmax(1) == right).mean()
    return f"{share:.3f} of {len(right)} right, cosines {own.mean():.2f}, the next {others.mean():.2f}"


def _of_any_people(detector: PackDetector) -> None:
    samples = people(200, SEED)
    for way in ("clean", "spoilt"):
        random, errors, missed, many = np.random.default_rng(SEED), [], 0, 0
        for picture, truth in samples:
            assert truth is not None
            if truth[2:].min() < 0 or truth[2:].max() > len(picture):
                continue
            faces = detected(detector, picture if way == "clean" else degraded(picture, random))
            missed, many = missed + (not faces), many + (len(faces) > 1)
            if faces:
                off = np.hypot(*(faces[0].keypoints - truth[2:]).T)
                errors.append(off.mean() / (truth[1, 0] - truth[0, 0]))
        print(
            f"{way}: points off by {np.mean(errors):.4f} widths, median {np.median(errors):.4f}, 95 % below "
            f"{np.quantile(errors, 0.95):.4f}; missed {missed}, more than one face {many}, of {len(errors) + missed}"
        )


def _of_nobody(detector: PackDetector) -> None:
    samples = others(300, SEED)
    for way in ("clean", "spoilt"):
        random = np.random.default_rng(SEED)
        fired = sum(
            bool(detected(detector, picture if way == "clean" else degraded(picture, random))) for picture, _ in samples
        )
        print(f"{way}: something found in {fired} of {len(samples)} scenes without people")
    for name in UNSEEN_PHOTOS:
        photo = getattr(skimage.data, name)()
        photo = (
            photo
            if photo.ndim == 3
            else np.repeat((photo * (255 if photo.max() <= 1 else 1)).astype(np.uint8)[..., None], 3, 2)
        )
        for face in detected(detector, np.ascontiguousarray(photo)):
            print(f"found in the photo {name}: {np.round(face.box)}, {face.score:.2f}")


def _seconds(detector: PackDetector, embedders: dict[str, Callable[[Picture], NDArray[np.float32]]]) -> None:
    picture = cv2.resize(portrait("ada"), (320, 320))
    crop = np.zeros((1, 112, 112, 3), np.uint8)
    tasks = {
        f"detection at {size_px}": lambda size_px=size_px: detector.detect(picture, size_px) for size_px in (640, *SIZES_PX)
    }
    tasks |= {name: lambda embed=embed: embed(crop) for name, embed in embedders.items()}
    for name, task in tasks.items():
        task()
        began = time.process_time()
        for _ in range(10):
            task()
        print(f"{name}: {(time.process_time() - began) * 100:.1f} ms of one core")


def _unit(embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


if __name__ == "__main__":
    raise SystemExit(main())
