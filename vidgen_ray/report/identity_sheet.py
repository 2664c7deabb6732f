"""Identity sheet: the image drawn by `vidgen identity show`, with the faces found in photos."""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from vidgen_ray.nets.faces import COLOURS
from vidgen_ray.stages.base import Image
from vidgen_ray.stages.instantid import DetectedPhoto

PHOTO_PX = 480
"""Longer side of a photo, in pixels."""
CROP_PX = 224
"""Side of the aligned crop, in pixels."""
POSE_PX = 420
"""Longer side of the keypoint image, in pixels."""
GAP_PX = 12
LABEL_PX = 20
POINT_RADIUS_PX = 3
BACKGROUND, FAINT, CHOSEN, OTHER = (24, 24, 27), (161, 161, 170), (74, 222, 128), (228, 228, 231)


def identity_sheet(photos: Sequence[Image], detected: Sequence[DetectedPhoto], pose: Image) -> PILImage.Image:
    """Draw one row per photo: its faces, numbered from the left, and the aligned crop of the chosen face.

    The chosen face is green and has its keypoints. The first row also contains the keypoint image `pose` (H, W, 3).
    """
    rows = [
        [("photo", _draw_faces(photo, detection)), ("aligned crop", _crop(detection))]
        for photo, detection in zip(photos, detected, strict=True)
    ]
    height, width = pose.shape[:2]
    rows[0].append((f"keypoint image, {width}x{height}", _resize(PILImage.fromarray(pose), POSE_PX)))
    heights_px = [max(cell.height for _, cell in row) + LABEL_PX + GAP_PX for row in rows]
    size = GAP_PX + max(sum(cell.width + GAP_PX for _, cell in row) for row in rows), GAP_PX + sum(heights_px)
    sheet = PILImage.new("RGB", size, BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    top = GAP_PX
    for row, height_px in zip(rows, heights_px, strict=True):
        left = GAP_PX
        for label, cell in row:
            draw.text((left, top), label, FAINT, font)
            sheet.paste(cell, (left, top + LABEL_PX))
            left += cell.width + GAP_PX
        top += height_px
    return sheet


def _draw_faces(photo: Image, detected: DetectedPhoto) -> PILImage.Image:
    image = _resize(PILImage.fromarray(photo), PHOTO_PX)
    scale = image.width / photo.shape[1]
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=13)
    for number, face in enumerate(detected.faces):
        colour, line_px = (CHOSEN, 3) if face is detected.chosen else (OTHER, 1)
        left, top, right, bottom = (side * scale for side in face.box)
        draw.rectangle((left, top, right, bottom), outline=colour, width=line_px)
        label = f"{number}: {face.score:.2f}" if len(detected.faces) > 1 else f"{face.score:.2f}"
        at = max(0.0, left), max(0.0, top - LABEL_PX + 2)
        draw.rectangle(draw.textbbox(at, label, font), fill=BACKGROUND)
        draw.text(at, label, colour, font)
    for (x, y), colour in zip(np.asarray(detected.chosen.keypoints) * scale, COLOURS, strict=True):
        draw.ellipse((x - POINT_RADIUS_PX, y - POINT_RADIUS_PX, x + POINT_RADIUS_PX, y + POINT_RADIUS_PX), fill=colour)
    return image


def _crop(detected: DetectedPhoto) -> PILImage.Image:
    return PILImage.fromarray(cv2.resize(detected.crop[:, :, ::-1], (CROP_PX, CROP_PX), interpolation=cv2.INTER_CUBIC))


def _resize(image: PILImage.Image, longer_side_px: int) -> PILImage.Image:
    """Scale an image so that its longer side has the given length."""
    scale = longer_side_px / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return image.resize(size, PILImage.Resampling.LANCZOS)
