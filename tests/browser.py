"""Pages in a real browser: Debian's Chromium, driven by Playwright."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = (Path("/usr/bin/chromium"), Path("/usr/bin/chromium-browser"))


@contextmanager
def browser_page(width_px: int, height_px: int) -> Iterator[Any]:
    """Open a page of this size. Fails on an error of a script. Skips the test if there is no browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (pip install playwright)")
    program = next((path for path in PROGRAMS if path.exists()), None)
    if program is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    errors: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width_px, "height": height_px})
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        browser.close()
    assert not errors
