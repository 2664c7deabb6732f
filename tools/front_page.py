"""Draw the pictures of README.md and the documentation from the output folder of `make demo`. Needs Debian's Chromium.

python -m tools.front_page out/demo

Writes docs/images/front.webp (lines of the script, their images and clips, the gallery, a photo that RealESRGAN enlarges) and
docs/images/gallery.png.
"""

from __future__ import annotations

import argparse
import io
import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tests.browser import browser_page
from vidgen_ray import VideoGenerationPipeline
from vidgen_ray.media.decode import open_video

ROOT = Path(__file__).parent.parent
EXAMPLES, IMAGES = ROOT / "examples", ROOT / "docs" / "images"
SHOTS = ("ada", "ada-at-sunset", "ada-in-pencil")
"""Shots whose lines, images and clips are shown."""
SHOWN = ("prompt", "lora", "style_prompt")
"""Fields of their lines that are shown."""
WIDTH_PX, HEIGHT_PX, BOX_PX = 832, 368, 248
FRAME_MS, HOLD_FRAMES = 83, 12
STILL_FRAME = 20
"""Comes first, because some viewers show only one: the first clip."""
FACE_BOX_PX = (132, 0, 340, 208)
"""Part of the photo that is enlarged."""
SMALL_PX, SCALE = 92, 4
PAPER, INK, FAINT = "#ffffff", "#1f2328", "#8b949e"
QUALITY = 60
LARGEST_BYTES = 1_000_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="output folder of `make demo`")
    demo: Path = parser.parse_args().demo
    if not (demo / "index.html").exists():
        parser.error(f"{demo}: has no index.html, must be the output folder of `make demo`")
    page = screenshot(demo / "index.html")
    page.crop((0, 0, page.width, 768)).save(IMAGES / "gallery.png", optimize=True)
    frames = deque([*flow(demo), *gallery(page), *enlarged()])
    frames.rotate(-STILL_FRAME)
    first, *others = frames
    file = IMAGES / "front.webp"
    first.save(file, save_all=True, append_images=others, duration=FRAME_MS, loop=0, quality=QUALITY, method=6)
    if (size := file.stat().st_size) > LARGEST_BYTES:
        raise SystemExit(f"{file}: has {size} bytes, may have {LARGEST_BYTES}. Lower QUALITY.")
    return 0


def flow(demo: Path) -> Iterator[Image.Image]:
    """Yield frames in which the script line of each shot is typed, and its photo, image and clip follow."""
    lines = [json.loads(line) for line in (EXAMPLES / "demo.jsonl").read_text().splitlines()]
    for line in (line for line in lines if line["id"] in SHOTS):
        (folder,) = (demo / "shots").glob(f"*/{line['id']}")
        text = json.dumps({key: line[key] for key in SHOWN if key in line})
        photo, image = (Image.open(file).convert("RGB") for file in (EXAMPLES / line["face_image"], folder / "image.png"))
        with open_video(folder / "hd.mp4") as video:
            clip = [Image.fromarray(frame) for frame in video.frames(0, video.frame_count)[::2]]
        boxes = [("face_image", photo), ("image", image)]
        for end in range(0, len(text), 8):
            yield _flow_frame(text[:end], boxes[:1])
        yield from [_flow_frame(text, boxes)] * (HOLD_FRAMES // 2)
        for frame in [*clip, *[clip[-1]] * (HOLD_FRAMES // 2)]:
            yield _flow_frame(text, [*boxes, ("clip", frame)])


def gallery(page: Image.Image) -> Iterator[Image.Image]:
    """Yield frames that scroll down the gallery."""
    scaled = page.resize((WIDTH_PX, page.height * WIDTH_PX // page.width), Image.Resampling.LANCZOS)
    way_px = scaled.height - HEIGHT_PX
    for share in [*[0.0] * HOLD_FRAMES, *(0.5 - 0.5 * np.cos(np.linspace(0, np.pi, 18))), *[1.0] * HOLD_FRAMES]:
        top = round(way_px * share)
        yield scaled.crop((0, top, WIDTH_PX, top + HEIGHT_PX))


def enlarged() -> Iterator[Image.Image]:
    """Yield frames in which the enlarged photo replaces the bicubic one from left to right."""
    photo = Image.open(EXAMPLES / "faces" / "astronaut.jpg").convert("RGB")
    small = photo.crop(FACE_BOX_PX).resize((SMALL_PX, SMALL_PX), Image.Resampling.LANCZOS)
    after = VideoGenerationPipeline.from_profile("demo").upscale(small, scale=SCALE, upscaler="x4plus")
    before = small.resize(after.size, Image.Resampling.BICUBIC)
    for share in [*[0.0] * HOLD_FRAMES, *(0.5 - 0.5 * np.cos(np.linspace(0, np.pi, 30))), *[1.0] * 2 * HOLD_FRAMES]:
        edge_px = round(before.width * share)
        shown = before.copy()
        shown.paste(after.crop((0, 0, edge_px, after.height)), (0, 0))
        ImageDraw.Draw(shown).line([(edge_px, 0), (edge_px, after.height)], fill=PAPER, width=2)
        frame = Image.new("RGB", (WIDTH_PX, HEIGHT_PX), PAPER)
        frame.paste(small, (40, (HEIGHT_PX - SMALL_PX) // 2))
        frame.paste(shown, (WIDTH_PX - after.width - 100, 0))
        draw = ImageDraw.Draw(frame)
        draw.text((40, (HEIGHT_PX + SMALL_PX) // 2 + 8), f"{SMALL_PX} x {SMALL_PX} pixels", INK, _font(14))
        draw.text((40, 24), "RealESRGAN x4plus,\nits real weights", INK, _font(18))
        draw.text((200, HEIGHT_PX // 2 - 14), "x4", FAINT, _font(24))
        yield frame


def screenshot(page: Path) -> Image.Image:
    with browser_page(1366, 960) as browser:
        browser.goto(page.absolute().as_uri())
        browser.wait_for_load_state("networkidle")
        return Image.open(io.BytesIO(browser.screenshot())).convert("RGB")


def _flow_frame(text: str, boxes: list[tuple[str, Image.Image]]) -> Image.Image:
    frame = Image.new("RGB", (WIDTH_PX, HEIGHT_PX), PAPER)
    draw = ImageDraw.Draw(frame)
    draw.rounded_rectangle((8, 8, WIDTH_PX - 8, 60), 8, fill="#f6f8fa", outline="#d0d7de")
    draw.text((20, 26), text, INK, _font(15))
    for number, (label, image) in enumerate(boxes):
        left = 8 + number * (BOX_PX + 36)
        if number:
            middle = 94 + BOX_PX // 2
            draw.polygon([(left - 24, middle - 9), (left - 24, middle + 9), (left - 12, middle)], FAINT)
        draw.text((left, 70), label, INK, _font(15))
        frame.paste(image.resize((BOX_PX, BOX_PX), Image.Resampling.LANCZOS), (left, 94))
    return frame


def _font(size_px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size_px)


if __name__ == "__main__":
    raise SystemExit(main())
