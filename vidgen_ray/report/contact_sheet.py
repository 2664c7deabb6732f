"""Contact sheet: one image of a run, with a row per shot from the first stage to the last frame."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from vidgen_ray.atomic_files import write_atomically
from vidgen_ray.graph import STAGES
from vidgen_ray.media import open_video, read_image
from vidgen_ray.outputs.manifest import ManifestRow, read_manifest
from vidgen_ray.stages.base import Image

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
