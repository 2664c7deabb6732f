"""Train the face detector of the profile `demo`: a small SCRFD for faces of the drawn world. It ignores faces in photos.

    python -m training.face_detector --out FOLDER

Images are searched at 640, 320 and 160 pixels, so the detector only needs to find faces with a width of 14 to 165 pixels. It
must not find larger faces: otherwise the smaller sizes, which show the whole face, would not be searched.
Source: Guo et al. 2021, SCRFD, arXiv:2105.04714; Lin et al. 2017, focal loss, arXiv:1708.02002.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import cv2
import insightface
import numpy as np
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from training.degrading import degraded
from training.drawing import draw, face_box_px, keypoints_px, styled
from training.finishing import export, gather_statistics
from training.loop import Schedule, arguments, train
from training.world import STYLES, Person, some_scene

STRIDES = (8, 16, 32)
ANCHORS = 2
"""Anchors per cell. The first one is for smaller faces."""
WIDTHS_PX: tuple[tuple[float, float], ...] = ((14, 24), (24, 42), (42, 62), (62, 88), (88, 122), (122, 165))
"""Range of face widths of each anchor, for all strides."""
OVERLAP = 1.12
"""Tolerance of the width ranges. Faces within this factor outside the range of an anchor are not counted for it."""
CANVAS_PX = 192
PEOPLE, OTHERS = 1000, 1000
PHOTOS = ("coffee", "rocket", "chelsea", "colorwheel", "hubble_deep_field", "text", "coins")
"""Photos of skimage in which no face may be found."""
FACES_OF_OTHERS = ("t1.jpg", "Tom_Hanks_54745.png")
"""Photos of insightface with real faces, which this detector must ignore."""
WANTED, NEAR = 0.16, 0.34
"""Distances from the face centre, in face widths. Cells within the first must find the face, within the second they may."""


class Detector(nn.Module):
    """Images (B, 3, H, W), (RGB - 127.5) / 128, with sides that are multiples of 32 -> logits, boxes and points per stride.

    Shapes: (B, 2, H/stride, W/stride), (B, 8, ...), (B, 20, ...). Boxes are distances from the corner of the cell to left,
    top, right and bottom. Points are x and y offsets from it. Both are in units of the stride.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 8, 2), _conv(8, 16, 2), _conv(16, 24, 2), _Block(24))
        self.to_16 = nn.Sequential(_conv(24, 32, 2), _Block(32), _Block(32))
        self.to_32 = nn.Sequential(_conv(32, 40, 2), _Block(40), _Block(40))
        self.to_64 = nn.Sequential(_conv(40, 40, 2), _Block(40))
        self.laterals = nn.ModuleList(nn.Conv2d(width, 32, 1) for width in (24, 32, 40, 40))
        self.mixes = nn.ModuleList(_conv(32, 32) for _ in STRIDES)
        self.heads = nn.ModuleList(nn.Sequential(_conv(32, 32), nn.Conv2d(32, ANCHORS * (1 + 4 + 10), 1)) for _ in STRIDES)
        for head in self.heads:
            last = head[1]
            nn.init.normal_(last.weight, std=0.01)
            nn.init.zeros_(last.bias)
            with torch.no_grad():
                last.bias[:ANCHORS] = -4.0
        # Initial prediction of an anchor: an average face with the mean width of its range.
        self.register_buffer("sizes", torch.tensor([[(low * high) ** 0.5 for low, high in pair] for pair in _ranges()]))

    def forward(self, pictures: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        at_8 = self.stem(pictures)
        at_16 = self.to_16(at_8)
        at_32 = self.to_32(at_16)
        coarse = self.laterals[3](self.to_64(at_32))
        found = []
        for n in (2, 1, 0):
            level = self.laterals[n]((at_8, at_16, at_32)[n])
            coarse = self.mixes[n](level + functional.interpolate(coarse, size=level.shape[-2:], mode="nearest"))
            found.append(self._shaped(n, self.heads[n](coarse)))
        return found[::-1]

    def _shaped(self, n: int, raw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = self.sizes[n] / STRIDES[n]
        boxes = raw[:, ANCHORS : 5 * ANCHORS].unflatten(1, (ANCHORS, 4)) + BOX.to(raw)[None, None, :, None, None]
        points = raw[:, 5 * ANCHORS :].unflatten(1, (ANCHORS, 10)) + POINTS.to(raw)[None, None, :, None, None]
        size = size[None, :, None, None, None]
        return raw[:, :ANCHORS], (boxes * size).flatten(1, 2), (points * size).flatten(1, 2)


BOX = torch.tensor([0.5, 0.58, 0.5, 0.58])
POINTS = torch.tensor([-0.21, -0.09, 0.21, -0.09, 0.0, 0.145, -0.157, 0.35, 0.157, 0.35])
"""Box and points of a frontal face, relative to its centre, in face widths."""


def _ranges() -> list[tuple[tuple[float, float], ...]]:
    return [WIDTHS_PX[n * ANCHORS : (n + 1) * ANCHORS] for n in range(len(STRIDES))]


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = _conv(width, width), _conv(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x))


Sample = tuple[NDArray[np.uint8], NDArray[np.float32] | None]
"""An image (H, W, 3), and the box and five points of its face as (7, 2), or `None` if it has no face."""


def people(count: int, seed: int) -> list[Sample]:
    """Return scenes with a person, in random styles."""
    random, made = Random(seed), []
    for _ in range(count):
        scene, size_px = some_scene(random, people=1.0), random.choice((128, 128, 128, 192))
        assert isinstance(scene.subject, Person)
        if random.random() < 0.4:
            # Smaller or larger than a portrait, and partly outside the image.
            radius, x = random.uniform(0.2, 0.75), random.uniform(-0.62, 0.62)
            scene = replace(scene, subject=replace(scene.subject, radius=radius, x=x, y=random.uniform(-0.3, 0.25)))
        style = "flat" if random.random() < 0.6 else random.choice(STYLES)
        points = np.concatenate([face_box_px(scene.subject, size_px).reshape(2, 2), keypoints_px(scene.subject, size_px)])
        made.append((styled(draw(scene, size_px), style), points))
    return made


def others(count: int, seed: int) -> list[Sample]:
    """Return scenes without people."""
    random = Random(seed)
    made: list[Sample] = []
    for n in range(count):
        style = "flat" if n % 2 else random.choice(STYLES)
        made.append((styled(draw(some_scene(random, people=0.0), 128, random.uniform(1, 1.6)), style), None))
    return made


def photos() -> list[Sample]:
    folder = Path(insightface.__file__).parent / "data" / "images"
    taken = [getattr(skimage.data, name)() for name in PHOTOS]
    taken += [np.asarray(Image.open(folder / name).convert("RGB")) for name in FACES_OF_OTHERS]
    return [(np.ascontiguousarray(one if one.ndim == 3 else one[..., None].repeat(3, 2)), None) for one in taken]


def on_canvas(sample: Sample, random: np.random.Generator, strength: float) -> Sample:
    """Return the image degraded, randomly scaled and placed on a square canvas with a black background."""
    picture, points = sample
    picture = degraded(picture, random, strength) if strength else picture
    if points is None:
        scale = CANVAS_PX / max(picture.shape[:2]) * 2 ** random.uniform(-0.7, 2.2)
        shift = random.uniform(0, 1, 2) * (CANVAS_PX - np.array(picture.shape[1::-1]) * scale)
    else:
        # Mostly faces within the range of widths, many with the size of a portrait at 320 pixels, some too small or too large.
        low, high = ((12, 24), (15, 168), (15, 168), (60, 168), (60, 168), (150, 700))[random.integers(6)]
        wanted = low * (high / low) ** random.random()
        scale = wanted / (points[1, 0] - points[0, 0])
        middle = points[:2].mean(0) * scale
        margin = min(0.4, 0.35 * wanted / CANVAS_PX)
        shift = random.uniform(margin, 1 - margin, 2) * CANVAS_PX - middle
        # Place some images in the corner, as during detection.
        if middle.max() < CANVAS_PX and random.random() < 0.4:
            shift = np.zeros(2)
        points = (points * scale + shift).astype(np.float32)
    if scale < 1:
        # A warp would skip pixels when downscaling.
        small = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
        picture, scale = cv2.resize(picture, small, interpolation=cv2.INTER_AREA), 1.0
    # OpenCV's origin is the centre of the first pixel; that of the points is its corner.
    x, y = shift + 0.5 * scale - 0.5
    canvas = cv2.warpAffine(picture, np.array([[scale, 0, x], [0, scale, y]]), (CANVAS_PX, CANVAS_PX))
    return np.asarray(canvas, np.uint8), points


def to_tensor(pictures: NDArray[np.uint8]) -> Tensor:
    """Convert uint8 RGB (B, H, W, 3) to (B, 3, H, W), normalised as for insightface's SCRFD."""
    return (torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float().contiguous() - 127.5) / 128


def loss_of(found: Sequence[tuple[Tensor, Tensor, Tensor]], samples: Sequence[Sample]) -> Tensor:
    """Return the focal loss of the scores plus the errors of boxes and points in face widths."""
    total = found[0][0].new_zeros(())
    n_wanted = 0
    for n, (logits, boxes, points) in enumerate(found):
        wanted, counts, target = (torch.from_numpy(one) for one in _targets(samples, n, logits.shape[-1]))
        chance = torch.sigmoid(logits)
        of_right = torch.where(wanted, chance, 1 - chance)
        weight = 0.5 * counts * (1 - of_right) ** 2
        total = total + (weight * functional.binary_cross_entropy_with_logits(logits, wanted.float(), reduction="none")).sum()
        at = wanted.nonzero(as_tuple=True)
        n_wanted += len(at[0])
        said = torch.cat([boxes.unflatten(1, (ANCHORS, 4)), points.unflatten(1, (ANCHORS, 10))], 2).permute(0, 1, 3, 4, 2)[at]
        truth = target[at]
        error = functional.smooth_l1_loss(said, truth[:, :14], beta=0.02, reduction="none") / truth[:, 14:]
        total = total + 1.0 * error[:, :4].sum() + 2.0 * error[:, 4:].sum()
    return total / max(1, n_wanted)


def _targets(
    samples: Sequence[Sample], n: int, cells: int
) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
    """Return the targets of one stride: which anchors must find a face and which count (B, 2, H, W), values (B, 2, H, W, 15).

    The values are 4 distances, 5 points and the face width, in units of the stride.
    """
    stride = STRIDES[n]
    wanted = np.zeros((len(samples), ANCHORS, cells, cells), bool)
    counts = np.ones(wanted.shape, np.float32)
    target = np.zeros((*wanted.shape, 15), np.float32)
    y, x = np.mgrid[:cells, :cells] * stride
    for k, (_, points) in enumerate(samples):
        if points is None:
            continue
        width = points[1, 0] - points[0, 0]
        middle = points[:2].mean(0)
        away = np.hypot(x - middle[0], y - middle[1])
        whole = points[2:].min() >= 0 and points[2:].max() < CANVAS_PX
        for anchor, (low, high) in enumerate(WIDTHS_PX[n * ANCHORS : (n + 1) * ANCHORS]):
            if not low / OVERLAP <= width <= high * OVERLAP:
                continue
            counts[k, anchor][away < max(NEAR * width, 0.8 * stride)] = 0
            if whole and low <= width <= high:
                at = (away < WANTED * width) | (away == away.min())
                wanted[k, anchor], counts[k, anchor][at] = at, 1
                corner = np.stack([x, y], -1)[..., None, :]
                offsets = (points - corner) / stride
                offsets[..., 0, :] *= -1
                target[k, anchor, ..., :14] = offsets.reshape(cells, cells, 14)
                target[k, anchor, ..., 14] = width / stride
    return wanted, counts, target


def main() -> int:
    told = arguments(__doc__, steps=3800, seed=21)
    faces, empty, real = people(PEOPLE, told.seed), others(OTHERS, told.seed + 1), photos()
    unseen = people(60, told.seed + 2), others(60, told.seed + 3)
    network = Detector()

    def batch(random: np.random.Generator, strength: float) -> list[Sample]:
        pools = [faces] * 7 + [empty] * 4 + [real]
        return [on_canvas(pool[random.integers(len(pool))], random, strength) for pool in pools]

    def loss(step: int, generator: torch.Generator) -> Tensor:
        random = np.random.default_rng(int(torch.randint(0, 2**31, (), generator=generator)))
        samples = batch(random, min(1.0, 0.2 + 1.6 * step / told.steps))
        return loss_of(network(to_tensor(np.stack([picture for picture, _ in samples]))), samples)

    def gather(batches: int) -> None:
        random = np.random.default_rng(1)
        some = (to_tensor(np.stack([picture for picture, _ in batch(random, 0.7)])) for _ in range(batches))
        gather_statistics(network, some)

    def look(step: int) -> None:
        gather(20)
        network.eval()
        for strength in (0.0, 1.0):
            print(f"step {step}, spoilt by {strength:.0f}: {found_in(network, unseen, strength)}", flush=True)
        network.train()

    train(
        {"network": network}, loss, Schedule(told.steps, rate=4e-3, warm_up=100), told.out, told.seed, look=look, look_every=800
    )
    gather(100)
    write(network, told.out)
    look(told.steps)
    return 0


@torch.no_grad()
def found_in(network: Detector, unseen: tuple[list[Sample], list[Sample]], strength: float) -> str:
    """Return recall, point error and false positive rate of the anchor with the highest score in each image, as text."""
    random = np.random.default_rng(3)
    scores: tuple[list[float], list[float]] = ([], [])
    errors = []
    for samples, of_these in zip(unseen, scores, strict=True):
        for sample in samples:
            picture, points = on_canvas(sample, random, strength)
            best, at = 0.0, np.zeros((5, 2))
            for stride, (logits, _, offsets) in zip(STRIDES, network(to_tensor(picture[None])), strict=True):
                score, where = logits.sigmoid().flatten().max(0)
                if score > best:
                    anchor, row, column = np.unravel_index(int(where), tuple(logits.shape[1:]))
                    told = offsets[0, anchor * 10 : anchor * 10 + 10, row, column].reshape(5, 2).numpy()
                    best, at = float(score), np.add(told, (column, row)) * stride
            if points is None:
                of_these.append(best)
                continue
            width = points[1, 0] - points[0, 0]
            if WIDTHS_PX[0][0] <= width <= WIDTHS_PX[-1][1] and points[2:].min() >= 0 and points[2:].max() < CANVAS_PX:
                of_these.append(best)
                if best > 0.5:
                    errors.append(np.hypot(*(at - points[2:]).T).mean() / width)
    found, wrong = (float(np.mean(np.array(one) > 0.5)) for one in scores)
    return f"found {found:.2f}, points off by {np.mean(errors or [1]):.3f} widths, without a face {wrong:.2f} found"


class _Pack(nn.Module):
    """One image (1, 3, H, W) -> scores (N, 1), boxes (N, 4) and points (N, 10) of each stride, as in SCRFD's ONNX files."""

    def __init__(self, network: Detector) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> list[Tensor]:
        found = self.network(pictures)
        kinds = [
            [logits.sigmoid() for logits, _, _ in found],
            [boxes for _, boxes, _ in found],
            [points for _, _, points in found],
        ]
        return [
            maps.permute(0, 2, 3, 1).reshape(-1, width) for kind, width in zip(kinds, (1, 4, 10), strict=True) for maps in kind
        ]


def write(network: Detector, folder: Path) -> None:
    """Write `scrfd_10g_bnkps.onnx`, the file name of the detector in antelopev2."""
    outputs = [f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in STRIDES]
    dynamic = {"input.1": {2: "h", 3: "w"}, **{name: {0: f"n_{name}"} for name in outputs}}
    export(_Pack(network.eval()), folder / "scrfd_10g_bnkps.onnx", torch.zeros(1, 3, 160, 160), outputs, dynamic)


if __name__ == "__main__":
    raise SystemExit(main())
