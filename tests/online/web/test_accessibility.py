"""Accessibility by axe-core, and layout, of all states of the page."""

import re
from typing import Any

import pytest

from tests.conftest import ASTRONAUT
from tests.online.web.conftest import CHECK_PAGE, cards, generate, playwright
from vidgen_ray.online.store.jobs import JobError, JobState

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed")
expect = playwright.expect
PHONE, LAPTOP, DESKTOP = ({"width": width, "height": height} for width, height in ((390, 844), (1366, 768), (1920, 1080)))
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
FIND_VIOLATIONS = "([part, options]) => axe.run(part, options).then(results => results.violations)"


def problems(page: Any, part: str = "html") -> list[str]:
    """Return what axe-core (in a part) and `check_page.js` find: on a light phone, and of contrast on a dark laptop."""
    page.evaluate(axe.Axe().axe_script)
    found = []
    for scheme, size, rules in (("light", PHONE, RULES), ("dark", LAPTOP, "color-contrast")):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size(size)
        # Only violations: axe-core also describes each element for each rule that it passes.
        violations = page.evaluate(FIND_VIOLATIONS, [part, {"runOnly": rules, "resultTypes": ["violations"]}])
        nodes = [(each["id"], node) for each in violations for node in each["nodes"]]
        found += [f"{scheme}, {rule}: {node['html'][:150]} {node['failureSummary']}" for rule, node in nodes]
        found += page.evaluate(CHECK_PAGE)
    return found


def test_states_are_accessible(site, open_page):
    site.add("a completed clip with " + "a_very_long_word" * 10)
    site.add("another clip")
    site.add("a failed clip", JobState.FAILED, error=JobError(code="stage_failed", message="no face was found " * 6))
    site.add("a cancelled clip", JobState.CANCELLED)
    site.director.pause_at = "svd"
    page = open_page(site.url, reduced_motion="reduce")
    page.locator(".settings-fold").evaluate("fold => { fold.open = true; }")
    page.get_by_label("Photos").set_input_files(ASTRONAUT)
    expect(page.get_by_label("Use this photo")).to_be_checked()
    generate(page, "a running clip")
    generate(page, "a queued clip")
    expect(page.locator("#queue .preview img")).to_be_visible()
    # In one call: the script of the page replaces the list of stages at any time.
    assert page.evaluate("getComputedStyle(document.querySelector('.stages .current'), '::before').animationName") == "none"
    for fold in page.locator("details").all():
        fold.evaluate("fold => { fold.open = true; }")
    page.locator("#create").evaluate("form => { form.noValidate = true; form.elements.prompt.value = ''; }")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#prompt-error")).to_be_visible()
    page.get_by_role("button", name="Favourite: another clip").click()
    for name in ("another clip", "a completed clip"):
        page.get_by_role("checkbox", name=f"Select {name}").check()
    assert problems(page) == []
    page.get_by_role("button", name="Compare").click()
    compare = page.get_by_role("dialog", name="Compare")
    for name, is_paused in (("Play", False), ("Pause", True)):
        compare.get_by_role("button", name=name).click()
        for video in compare.locator("video").all():
            expect(video).to_have_js_property("paused", is_paused)
    rows = [row.split("\t")[0] for row in compare.locator("tbody tr").all_inner_texts()]
    assert rows == ["Prompt"], "what differs"
    boxes = [video.bounding_box() for video in compare.locator("video").all()]
    assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"], "side by side"
    assert problems(page, "dialog[open]") == []
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Compare")).to_be_focused()
    page.get_by_role("link", name="Open another clip").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert problems(page, "dialog[open]") == []
    page.keyboard.press("Escape")
    page.get_by_role("searchbox").fill("nothing like it")
    expect(page.get_by_text("No clip has all of these words.")).to_be_visible()
    assert problems(page) == []
    for path in ("/api-docs", "/usage"):
        page.goto(site.url + path)
        assert problems(page) == []
    open_page.messages[:] = [text for text in open_page.messages if "400" not in text]


def test_empty_page_and_sign_in_are_accessible(site, site_with_keys, open_page):
    for url in (site.url, site_with_keys.url, f"{site.url}/clips/download?id=video_1"):
        page = open_page(url, reduced_motion="reduce")
        assert problems(page) == []
    open_page.messages[:] = [text for text in open_page.messages if "404" not in text]


def test_generate_button_running_clip_and_errors_are_visible_without_scrolling(site, open_page):
    site.add("a finished clip")
    page = open_page(site.url)
    for size in (PHONE, LAPTOP, DESKTOP):
        page.set_viewport_size(size)
        page.reload()
        expect(page.get_by_role("button", name="Generate")).to_be_in_viewport(ratio=1)
        expect(page.locator("#clips .screen")).to_be_in_viewport(ratio=0.5)
    site.director.pause_at = "svd"
    generate(page, "a running clip")
    card = cards(page, "queue")
    expect(card.locator(".preview img")).to_be_visible()
    assert re.match(r"Generating the clip", card.locator(".status").text_content())
    for size in (PHONE, LAPTOP, DESKTOP):
        page.set_viewport_size(size)
        page.reload()
        expect(page.locator("#queue-counts")).to_have_text("1 running")
        expect(page.locator("#queue-counts")).to_be_in_viewport(ratio=1)
        if size == PHONE:  # the form comes first: the queue is one line until it is opened
            expect(card).to_be_hidden()
            page.locator("#queue-fold > summary").click()
        expect(card.locator(".preview img")).to_be_visible()
        for part in (".preview img", "progress", ".status"):
            expect(card.locator(part)).to_be_in_viewport(ratio=1)
        if size == PHONE:
            page.locator("#queue-fold > summary").click()
        expect(page.get_by_role("button", name="Generate")).to_be_in_viewport(ratio=1)
        expect(page.get_by_label("Prompt", exact=True)).to_be_in_viewport(ratio=1)
    page.set_viewport_size(PHONE)
    page.locator(".settings-fold").evaluate("fold => { fold.open = true; }")
    page.get_by_label("Prompt", exact=True).fill("a boat")
    page.locator("#create").evaluate("form => { form.noValidate = true; }")
    frames = page.get_by_label("Frames", exact=True)
    frames.fill("999")
    # At the lower edge of the window, behind the bar.
    frames.evaluate("field => scrollBy(0, field.getBoundingClientRect().bottom - innerHeight)")
    page.get_by_role("button", name="Generate").click()
    expect(frames).to_be_focused()
    error, bar = (page.locator(selector).bounding_box() for selector in ("#num_frames-error", ".submit"))
    assert error["y"] + error["height"] < bar["y"]
    open_page.messages[:] = [text for text in open_page.messages if "400" not in text]
