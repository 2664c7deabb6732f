"""What `vidgen identity show` draws: the faces of some photos, the one that counts, and what the models get of it."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from vidgen_ray.nets.keypoints import COLOURS
from vidgen_ray.stages.base import Image
from vidgen_ray.stages.instantid import DetectedPhoto

PHOTO_PX = 480
"""Longer side of a photo."""
CROP_PX = 224
POSE_PX = 420
"""Longer side of the keypoint picture."""
GAP_PX = 12
LABEL_PX = 20
POINT_RADIUS_PX = 3
BACKGROUND, FAINT, CHOSEN, OTHER = (24, 24, 27), (161, 161, 170), (74, 222, 128), (228, 228, 231)


def identity_sheet(photos: Sequence[Image], seen: Sequence[DetectedPhoto], pose: Image) -> PILImage.Image:
    """A row a photo: its faces, numbered from the left, the chosen one in green with its points, and the aligned crop; in
    the first also the keypoint picture `pose` (H, W, 3)."""
    rows = [[("photo", _marked(photo, one)), ("aligned crop", _crop(one))] for photo, one in zip(photos, seen, strict=True)]
    height, width = pose.shape[:2]
    rows[0].append((f"keypoint picture, {width}x{height}", _fitted(PILImage.fromarray(pose), POSE_PX)))
    heights_px = [max(cell.height for _, cell in row) + LABEL_PX + GAP_PX for row in rows]
    size = GAP_PX + max(sum(cell.width + GAP_PX for _, cell in row) for row in rows), GAP_PX + sum(heights_px)
    sheet = PILImage.new("RGB", size, BACKGROUND)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    top = GAP_PX
    for row, height_px in zip(rows, heights_px, strict=True):
        left = GAP_PX
        for label, cell in row:
            pen.text((left, top), label, FAINT, font)
            sheet.paste(cell, (left, top + LABEL_PX))
            left += cell.width + GAP_PX
        top += height_px
    return sheet


def _marked(photo: Image, seen: DetectedPhoto) -> PILImage.Image:
    picture = _fitted(PILImage.fromarray(photo), PHOTO_PX)
    scale = picture.width / photo.shape[1]
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
    for number, face in enumerate(seen.faces):
        colour, line_px = (CHOSEN, 3) if face is seen.chosen else (OTHER, 1)
        left, top, right, bottom = (side * scale for side in face.box)
        pen.rectangle((left, top, right, bottom), outline=colour, width=line_px)
        label = f"{number}: {face.score:.2f}" if len(seen.faces) > 1 else f"{face.score:.2f}"
        at = max(0.0, left), max(0.0, top - LABEL_PX + 2)
        pen.rectangle(pen.textbbox(at, label, font), fill=BACKGROUND)
        pen.text(at, label, colour, font)
    for (x, y), colour in zip(np.asarray(seen.chosen.keypoints) * scale, COLOURS, strict=True):
        pen.ellipse((x - POINT_RADIUS_PX, y - POINT_RADIUS_PX, x + POINT_RADIUS_PX, y + POINT_RADIUS_PX), fill=colour)
    return picture


def _crop(seen: DetectedPhoto) -> PILImage.Image:
    return PILImage.fromarray(cv2.resize(seen.crop[:, :, ::-1], (CROP_PX, CROP_PX), interpolation=cv2.INTER_CUBIC))


def _fitted(picture: PILImage.Image, longer_px: int) -> PILImage.Image:
    """With its longer side so long."""
    scale = longer_px / max(picture.size)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    return picture.resize(size, PILImage.Resampling.LANCZOS)
