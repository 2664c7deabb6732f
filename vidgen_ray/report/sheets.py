"""Sheets: one image of a run with a row per shot, and one image of the faces in photos."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from vidgen_ray.graph import STAGES
from vidgen_ray.media import open_video, read_image
from vidgen_ray.nets.faces import COLOURS
from vidgen_ray.outputs.manifest import ManifestRow, read_manifest
from vidgen_ray.stages.base import Image
from vidgen_ray.stages.instantid import DetectedPhoto
from vidgen_ray.system.files import write_atomically

CELL_PX = 168
GAP_PX = 8
HEADER_PX = 18
LABEL_HEIGHT_PX = 84
LABEL_WIDTH_PX = 190
BACKGROUND, INK, FAINT = (24, 24, 27), (228, 228, 231), (161, 161, 170)


def write_contact_sheet(out: Path) -> Path:
    """Draw `OUT/contact_sheet.jpg` from the finished shots: kept stages, image and three frames of the clip."""
    rows = [row for row in read_manifest(out) if row.status in ("done", "skipped")]
    shots = [(row, _cells(out, row)) for row in sorted(rows, key=lambda row: row.line or 0)]
    columns = list(dict.fromkeys(name for name in _column_names() if any(name in cells for _, cells in shots)))
    heights_px = [max([LABEL_HEIGHT_PX, *(cell.height for cell in cells.values())]) for _, cells in shots]
    width = LABEL_WIDTH_PX + len(columns) * (CELL_PX + GAP_PX) + GAP_PX
    height = HEADER_PX + GAP_PX + sum(height + GAP_PX for height in heights_px)
    sheet = PILImage.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for number, name in enumerate(columns):
        draw.text((LABEL_WIDTH_PX + number * (CELL_PX + GAP_PX), GAP_PX), name, FAINT, font)
    top = HEADER_PX + GAP_PX
    for (row, cells), height_px in zip(shots, heights_px, strict=True):
        draw.text((GAP_PX, top), row.id, INK, font)
        length = f"{row.num_frames} frames at {row.fps} fps\n" if row.num_frames else ""
        draw.multiline_text((GAP_PX, top + 18), length + _wrap(row.prompt or ""), FAINT, font, spacing=2)
        for name, cell in cells.items():
            sheet.paste(cell, (LABEL_WIDTH_PX + columns.index(name) * (CELL_PX + GAP_PX), top))
        top += height_px + GAP_PX
    path = out / "contact_sheet.jpg"
    content = io.BytesIO()
    sheet.save(content, "JPEG", quality=88)
    write_atomically(path, content.getvalue())
    return path


def _column_names() -> Sequence[str]:
    kept = [stage.debug_file.removesuffix(".png") for stage in STAGES if stage.debug_file and stage.debug_file.endswith(".png")]
    return [*kept, "image", "first frame", "middle frame", "last frame"]


def _cells(out: Path, row: ManifestRow) -> dict[str, PILImage.Image]:
    """Return column name -> thumbnail. Images are scaled down here to limit the memory of long runs."""
    folder = (out / row.image).parent if row.image else out
    cells = {name: read_image(folder / f"{name}.png") for name in _column_names() if (folder / f"{name}.png").exists()}
    clip = row.hd_video or row.video
    if clip:
        with open_video(out / clip) as video:
            last = video.frame_count - 1
            frames = video.frames_at([0, last // 2, last])
        cells |= dict(zip(("first frame", "middle frame", "last frame"), frames, strict=True))
    return {name: _thumbnail(image) for name, image in cells.items()}


def _thumbnail(image: Image) -> PILImage.Image:
    """Scale an image to fit into CELL_PX x CELL_PX, keeping its aspect ratio."""
    thumbnail = PILImage.fromarray(np.asarray(image))
    thumbnail.thumbnail((CELL_PX, CELL_PX), PILImage.Resampling.LANCZOS)
    return thumbnail


def _wrap(text: str, width: int = 30, lines: int = 3) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" ..."))


PHOTO_PX = 480
"""Longer side of a photo, in pixels."""
CROP_PX = 224
"""Side of the aligned crop, in pixels."""
POSE_PX = 420
"""Longer side of the keypoint image, in pixels."""
FACES_GAP_PX = 12
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
    heights_px = [max(cell.height for _, cell in row) + LABEL_PX + FACES_GAP_PX for row in rows]
    size = FACES_GAP_PX + max(sum(cell.width + FACES_GAP_PX for _, cell in row) for row in rows), FACES_GAP_PX + sum(heights_px)
    sheet = PILImage.new("RGB", size, BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    top = FACES_GAP_PX
    for row, height_px in zip(rows, heights_px, strict=True):
        left = FACES_GAP_PX
        for label, cell in row:
            draw.text((left, top), label, FAINT, font)
            sheet.paste(cell, (left, top + LABEL_PX))
            left += cell.width + FACES_GAP_PX
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
