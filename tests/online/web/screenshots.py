"""Take the screenshots of the page for the docs: `python -m tests.online.web.screenshots [FOLDER]`.

Renders some clips with the profile demo, in this process. Takes some minutes.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Page, expect, sync_playwright

from tests.conftest import ASTRONAUT
from tests.online.web.server import JobDirector, chromium, free_port, listening_on
from vidgen_ray.online.asgi_app import make_app
from vidgen_ray.online.auth import load_keys
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.online.serving_profile import serving_profile
from vidgen_ray.online.store.store import open_store
from vidgen_ray.pipeline import VideoGenerationPipeline

FOLDER = Path(__file__).parents[3] / "docs" / "images"
CLIPS: list[dict[str, Any]] = [
    {"prompt": "a large green tree on a cloudy day in the snow", "seed": 4},
    {"prompt": "a yellow house on the left on green hills under a rainbow", "seed": 6},
    {"prompt": "a portrait of a person in a blue coat by the sea", "seed": 1, "face": True},
    {"prompt": "an orange hot air balloon in the desert on a sunny day", "seed": 8},
    {"prompt": "a large red boat sailing to the right by the sea at sunset", "seed": 2},
]
"""Oldest first. The page shows the newest first."""
LIVE_PROMPTS = ("a person in a red sweater walking to the left in a meadow", "a small blue car in the snow in the evening")
PAUSE_AT = "realesrgan"
RENDERED_MS = 1_200_000
SCREENSHOTS: tuple[tuple[str, int, int, str], ...] = (
    ("page-light.png", 1366, 768, "light"),
    ("page-dark.png", 1920, 1080, "dark"),
    ("page-phone.png", 390, 844, "light"),
)
POSTERS_MS = 1_500
"""Time until the browser has drawn the posters."""


def render_clips(url: str) -> None:
    """Create the clips."""
    with httpx.Client(base_url=url, timeout=60) as api:
        for clip in CLIPS:
            fields = {name: str(value) for name, value in clip.items() if name != "face"}
            files = {"face_image": ASTRONAUT.read_bytes()} if clip.get("face") else None
            api.post("/v1/videos", data=fields, files=files).raise_for_status()


def start_clips(page: Page) -> None:
    """Create two clips, and wait until the first one shows its preview."""
    for prompt in LIVE_PROMPTS:
        page.get_by_label("Prompt", exact=True).fill(prompt)
        page.keyboard.press("Control+Enter")
        expect(page.locator("#queue h3", has_text=prompt)).to_be_visible()
    page.get_by_label("Prompt", exact=True).fill("")
    status = page.locator("#queue .status").first
    expect(status).to_contain_text("Upscaling", timeout=RENDERED_MS)
    expect(page.locator("#queue .preview img")).to_be_visible()
    page.wait_for_timeout(POSTERS_MS)


def take(page: Page, folder: Path, name: str) -> None:
    page.mouse.move(0, 0)
    page.wait_for_timeout(POSTERS_MS)
    page.evaluate("() => { scrollTo(0, 0); document.activeElement.blur(); }")
    page.screenshot(path=folder / name)


def take_all(page: Page, url: str, folder: Path) -> None:
    for name, width, height, scheme in SCREENSHOTS:
        page.set_viewport_size({"width": width, "height": height})
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        page.goto(url)
        expect(page.locator("#queue .preview img")).to_be_visible()
        expect(page.locator("#queue .estimate").first).not_to_be_empty()
        take(page, folder, name)
    page.set_viewport_size({"width": 1366, "height": 768})
    page.goto(url)
    page.get_by_label("Photos").set_input_files(ASTRONAUT)
    expect(page.locator("#photo-tray rect")).to_have_count(1)
    page.locator("#form-body").evaluate("body => { body.scrollTop = 300; }")
    for box in page.locator("#clips .pick").all()[:2]:
        box.check()
    take(page, folder, "page-form.png")
    page.get_by_role("button", name="Compare").click()
    take(page, folder, "page-compare.png")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    with tempfile.TemporaryDirectory() as data:
        pipeline = VideoGenerationPipeline.from_profile("demo", data)
        settings = OnlineSettings(profile="demo", data=data, database=f"sqlite:///{data}/jobs.db")
        store = open_store(settings)
        director = JobDirector(store, pipeline)
        app = make_app(settings, store, pipeline.outputs, serving_profile(pipeline.profile), load_keys(None, settings.limits))
        port = free_port()
        director.start()
        try:
            with listening_on(app, port), sync_playwright() as playwright:
                url = f"http://127.0.0.1:{port}"
                browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
                page = browser.new_page()
                render_clips(url)
                page.goto(url)
                expect(page.locator("#clips video")).to_have_count(len(CLIPS), timeout=RENDERED_MS)
                director.pause_at = PAUSE_AT
                start_clips(page)
                take_all(page, url, folder)
                browser.close()
        finally:
            director.stop()


if __name__ == "__main__":
    main()
