"""Pages in a real browser: Debian's Chromium, driven by Playwright."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PROGRAMS = (Path("/usr/bin/chromium-headless-shell"), Path("/usr/bin/chromium"), Path("/usr/bin/chromium-browser"))


@contextmanager
def running_browser() -> Iterator[Any]:
    """Start the browser. Skips the test if there is none. Until it ends, no event loop can run in this thread."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (pip install playwright)")
    program = next((path for path in PROGRAMS if path.exists()), None)
    if program is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@contextmanager
def page_in(browser: Any, width_px: int, height_px: int) -> Iterator[Any]:
    """Open a page of this size. Fails on an error of a script."""
    errors: list[str] = []
    page = browser.new_page(viewport={"width": width_px, "height": height_px})
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert not errors


@contextmanager
def browser_page(width_px: int, height_px: int) -> Iterator[Any]:
    """Start the browser, and open a page of this size. Skips the test if there is no browser."""
    with running_browser() as browser, page_in(browser, width_px, height_px) as page:
        yield page
