"""Take the screenshots of the page for the docs: `python -m tests.online.web_screenshots URL [FOLDER]`.

    vidgen serve --profile demo
    python -m tests.online.web_screenshots http://127.0.0.1:8000

First creates some clips through the API. Clips that were rendered before complete at once.
"""

import sys
import time
from pathlib import Path
from typing import Any

import httpx
from playwright.sync_api import Page, expect, sync_playwright

from tests.conftest import ASTRONAUT
from tests.online.web_server import chromium

FOLDER = Path(__file__).parents[2] / "docs" / "images"
CLIPS: list[dict[str, Any]] = [
    {"prompt": "a large green tree on a cloudy day in the snow", "seed": 4},
    {"prompt": "a yellow house on the left on green hills under a rainbow", "seed": 6},
    {"prompt": "a portrait of a person in a blue coat by the sea", "seed": 1, "face": True},
    {"prompt": "an orange hot air balloon in the desert on a sunny day", "seed": 8},
    {"prompt": "a large red boat sailing to the right by the sea at sunset", "seed": 2},
]
"""Oldest first. The page shows the newest first."""
LIVE_PROMPTS = (
    "a person in a red sweater walking to the left in a meadow",
    "a small blue car in the snow in the evening",
)
SCREENSHOTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("page-light.png", {"viewport": {"width": 1280, "height": 960}, "color_scheme": "light"}),
    ("page-dark.png", {"viewport": {"width": 1280, "height": 960}, "color_scheme": "dark"}),
    ("page-phone.png", {"viewport": {"width": 390, "height": 844}, "color_scheme": "light", "device_scale_factor": 2}),
)
MIN_PERCENT = 20
PHONE_CLIP = {"x": 0, "y": 0, "width": 390, "height": 1800}
"""Area of the phone screenshot: the form and the first clips."""
POSTERS_MS = 3_000
"""Time until the players have drawn their posters and hidden their loading indicators."""


def render_clips(url: str) -> None:
    """Create the clips and wait until all have ended."""
    with httpx.Client(base_url=url, timeout=60) as api:
        ids = []
        for clip in CLIPS:
            fields = {name: str(value) for name, value in clip.items() if name != "face"}
            files = {"face_image": ASTRONAUT.read_bytes()} if clip.get("face") else None
            response = api.post("/v1/videos", data=fields, files=files)
            response.raise_for_status()
            ids.append(response.json()["id"])
        while any(api.get(f"/v1/videos/{each}").json()["status"] in ("queued", "in_progress") for each in ids):
            time.sleep(1)


def start_clips(page: Page) -> None:
    """Create two clips with new seeds, and wait until the first has reached `MIN_PERCENT`."""
    for prompt in LIVE_PROMPTS:
        page.get_by_label("Prompt", exact=True).fill(prompt)
        page.get_by_role("button", name="Create clip").click()
        expect(page.locator("#queue h3", has_text=prompt)).to_be_visible()
    page.get_by_label("Prompt", exact=True).fill("")
    # Not wait_for_function: it evaluates a string, which the Content-Security-Policy of the page forbids.
    while (first := page.locator("#queue progress")).count() > 1 and int(
        first.first.evaluate("bar => bar.value")
    ) < MIN_PERCENT:
        page.wait_for_timeout(200)


def main() -> None:
    url, folder = sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else FOLDER
    render_clips(url)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for number, (name, options) in enumerate(SCREENSHOTS):
            page = browser.new_page(reduced_motion="reduce", **options)
            page.goto(url)
            if number == 0:
                start_clips(page)
                page.get_by_label("Prompt", exact=True).blur()
                page.mouse.move(0, 0)
            page.wait_for_timeout(POSTERS_MS)
            # Creating a clip has scrolled the page.
            page.evaluate("() => { scrollTo(0, 0); document.querySelector('.create').scrollTop = 0; }")
            area = {"full_page": True, "clip": PHONE_CLIP} if "phone" in name else {}
            page.screenshot(path=folder / name, **area)
        browser.close()


if __name__ == "__main__":
    main()
