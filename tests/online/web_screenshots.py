"""Photographs the page of a running server for the documents: `python -m tests.online.web_screenshots URL [FOLDER]`.

    vidgen serve --profile demo
    python -m tests.online.web_screenshots http://127.0.0.1:8000

Makes some clips through the API first; those that are there already are answered at once.
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
"""The oldest first, as the page shows them last."""
LIVE = ("a person in a red sweater walking to the left in a meadow", "a small blue car in the snow in the evening")
LOOKS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("page-light.png", {"viewport": {"width": 1280, "height": 960}, "color_scheme": "light"}),
    ("page-dark.png", {"viewport": {"width": 1280, "height": 960}, "color_scheme": "dark"}),
    ("page-phone.png", {"viewport": {"width": 390, "height": 844}, "color_scheme": "light", "device_scale_factor": 2}),
)
ENOUGH_PERCENT = 20
PHONE_SHOWS = {"x": 0, "y": 0, "width": 390, "height": 1800}
"""The form, and the first of the clips below it."""
POSTERS_MS = 3_000
"""In which the players have drawn their posters and put their own sign of loading away."""


def made(url: str) -> None:
    """Ask for the clips and wait for all of them."""
    with httpx.Client(base_url=url, timeout=60) as api:
        ids = []
        for clip in CLIPS:
            fields = {name: str(value) for name, value in clip.items() if name != "face"}
            files = {"face_image": ASTRONAUT.read_bytes()} if clip.get("face") else None
            answer = api.post("/v1/videos", data=fields, files=files)
            answer.raise_for_status()
            ids.append(answer.json()["id"])
        while any(api.get(f"/v1/videos/{each}").json()["status"] in ("queued", "in_progress") for each in ids):
            time.sleep(1)


def live(page: Page) -> None:
    """Begin two clips with new seeds, and wait until the first is well under way."""
    for prompt in LIVE:
        page.get_by_label("What should it show?").fill(prompt)
        page.get_by_role("button", name="Make the clip").click()
        expect(page.locator("#queue h3", has_text=prompt)).to_be_visible()
    page.get_by_label("What should it show?").fill("")
    # Not by wait_for_function: it evaluates text, which the page's policy forbids.
    while (first := page.locator("#queue progress")).count() > 1 and int(
        first.first.evaluate("bar => bar.value")
    ) < ENOUGH_PERCENT:
        page.wait_for_timeout(200)


def main() -> None:
    url, folder = sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else FOLDER
    made(url)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for number, (name, options) in enumerate(LOOKS):
            page = browser.new_page(reduced_motion="reduce", **options)
            page.goto(url)
            if number == 0:
                live(page)
                page.get_by_label("What should it show?").blur()
                page.mouse.move(0, 0)
            page.wait_for_timeout(POSTERS_MS)
            # Making a clip has scrolled to it.
            page.evaluate("() => { scrollTo(0, 0); document.querySelector('.make').scrollTop = 0; }")
            shown = {"full_page": True, "clip": PHONE_SHOWS} if "phone" in name else {}
            page.screenshot(path=folder / name, **shown)
        browser.close()


if __name__ == "__main__":
    main()
