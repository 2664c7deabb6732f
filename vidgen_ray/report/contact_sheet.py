"""One picture of a whole run: a row a shot, from the first stage to the last frame."""

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
    """Draw `OUT/contact_sheet.jpg` from the shots that are done: kept stages, picture, three frames of the clip."""
    rows = [row for row in read_manifest(out) if row.status != "failed"]
    drawn = [(row, _cells(out, row)) for row in sorted(rows, key=lambda row: row.line or 0)]
    columns = list(dict.fromkeys(name for name in _column_names() if any(name in cells for _, cells in drawn)))
    heights_px = [max([LABEL_HEIGHT_PX, *(cell.height for cell in cells.values())]) for _, cells in drawn]
    width = LABEL_WIDTH_PX + len(columns) * (CELL_PX + GAP_PX) + GAP_PX
    height = HEADER_PX + GAP_PX + sum(height + GAP_PX for height in heights_px)
    sheet = PILImage.new("RGB", (width, height), BACKGROUND)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for number, name in enumerate(columns):
        pen.text((LABEL_WIDTH_PX + number * (CELL_PX + GAP_PX), GAP_PX), name, FAINT, font)
    top = HEADER_PX + GAP_PX
    for (row, cells), height_px in zip(drawn, heights_px, strict=True):
        pen.text((GAP_PX, top), row.id, INK, font)
        pen.multiline_text((GAP_PX, top + 18), _wrapped(row.prompt or ""), FAINT, font, spacing=2)
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
    """Scaled at once: the sheet of a long run never holds its frames at full size."""
    folder = out / "shots" / row.id
    cells = {name: read_image(folder / f"{name}.png") for name in _column_names() if (folder / f"{name}.png").exists()}
    clip = row.hd_video or row.video
    if clip:
        with open_video(out / clip) as video:
            last = video.frame_count - 1
            frames = video.frames_at([0, last // 2, last])
        cells |= dict(zip(("first frame", "middle frame", "last frame"), frames, strict=True))
    return {name: _scaled(image) for name, image in cells.items()}


def _scaled(image: Image) -> PILImage.Image:
    """At most CELL_PX wide and high, the shape kept."""
    picture = PILImage.fromarray(np.asarray(image))
    picture.thumbnail((CELL_PX, CELL_PX), PILImage.Resampling.LANCZOS)
    return picture


def _wrapped(text: str, width: int = 30, lines: int = 4) -> str:
    return "\n".join(textwrap.wrap(text, width, max_lines=lines, placeholder=" ..."))
