"""The gallery in Chromium: search, favourites, selection, download, deletion, full view, comparison."""

import time
import zipfile

import httpx

from tests.online.web.conftest import cards, generate, open_menu, playwright
from vidgen_ray.online.store.jobs import JobState

expect = playwright.expect
TITLES = "#clips > li h3"


def test_gallery_and_search_have_pages_without_a_reload(site, open_page):
    for prompt in ("A red boat at sea", *(f"red boat {number}" for number in range(12)), "a Blue boat"):
        site.add(prompt)
    page = open_page(site.url)
    page.evaluate("window.same = true")
    expect(cards(page, "clips")).to_have_count(12)
    page.get_by_role("link", name="Older clips").click()
    expect(page.locator(TITLES)).to_have_text(["red boat 0", "A red boat at sea"])
    expect(page.get_by_role("link", name="Older clips")).to_have_count(0)
    generate(page, "not on this page")
    site.wait_for_jobs(15)
    expect(page.locator("#announcements")).to_have_text("not on this page: completed")
    expect(page.locator(TITLES)).to_have_text(["red boat 0", "A red boat at sea"])
    page.get_by_role("link", name="Newest clips").click()
    expect(page.locator(TITLES).first).to_have_text("not on this page")
    page.get_by_role("searchbox").fill("BOAT red")
    expect(page.locator(TITLES)).to_have_text([f"red boat {number}" for number in range(11, -1, -1)])
    page.get_by_role("link", name="Older clips").click()
    expect(page.locator(TITLES)).to_have_text(["A red boat at sea"])
    page.get_by_role("searchbox").fill("submarine")
    expect(page.get_by_text("No clip has all of these words.")).to_be_visible()
    assert page.evaluate("window.same"), "the page was reloaded"
    page.goto(f"{site.url}/?q=blue")
    expect(page.locator(TITLES)).to_have_text(["a Blue boat"])


def test_clips_are_favourites_downloaded_as_one_file_and_deleted_with_undo(site, open_page):
    jobs = [site.add(prompt) for prompt in ("one", "two", "three", "four")]
    site.add("failed", JobState.FAILED)
    page = open_page(site.url)
    selection = page.get_by_role("form", name="Selected clips")
    expect(selection).to_be_hidden()
    for prompt in ("one", "three", "failed"):
        page.get_by_role("checkbox", name=f"Select {prompt}").check()
    expect(page.locator("#selected-count")).to_have_text("3 selected")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download", exact=True).click()
    assert download.value.suggested_filename == "clips.zip"
    clip = httpx.get(f"{site.url}/v1/videos/{jobs[0].id}/content").content
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"three-{jobs[2].id[-6:]}.mp4", f"one-{jobs[0].id[-6:]}.mp4"]
        assert archive.read(archive.namelist()[1]) == clip
    answer = httpx.get(f"{site.url}/clips/download", params={"id": [job.id for job in jobs]})
    assert int(answer.headers["content-length"]) == len(answer.content)
    page.get_by_role("button", name="Favourite: one").click()
    page.get_by_role("button", name="Favourite: four").click()
    page.reload()
    expect(page.get_by_role("button", name="Favourite: one")).to_have_attribute("aria-pressed", "true")
    page.get_by_role("button", name="Favourites", exact=True).click()
    expect(page.locator(TITLES)).to_have_text(["four", "one"])
    page.get_by_role("button", name="Favourites", exact=True).click()
    expect(page.locator(TITLES)).to_have_count(5)
    for prompt in ("one", "three", "failed"):
        page.get_by_role("checkbox", name=f"Select {prompt}").check()
    page.clock.install()
    page.clock.pause_at(time.time() + 60)  # the pause for undo does not end by itself
    page.get_by_role("button", name="Delete the selected clips").click()
    expect(page.locator(TITLES)).to_have_text(["four", "two"])
    expect(page.locator("#toast-text")).to_have_text("Deleted: 3 clips")
    expect(selection).to_be_hidden()
    undo = page.get_by_role("button", name="Undo")
    expect(undo).to_be_focused()
    assert len(site.jobs()) == 5, "nothing is deleted while it can be undone"
    undo.click()
    expect(page.locator(TITLES)).to_have_text(["failed", "four", "three", "two", "one"])
    expect(page.locator("h3:focus")).to_have_text("failed")
    open_menu(page, "failed").get_by_role("button", name="Delete failed").click()
    assert httpx.delete(f"{site.url}/v1/videos/{site.jobs()[0].id}").status_code == 200  # in another window
    expect(page.locator("#toast")).to_be_hidden()
    site.add("failed", JobState.FAILED)
    page.reload()
    open_menu(page, "four").get_by_role("button", name="Delete four").click()
    open_menu(page, "two").get_by_role("button", name="Delete two").click()  # the one before is deleted at once
    expect(page.locator("#toast-text")).to_have_text("Deleted: two")
    while len(site.jobs()) != 4:
        page.wait_for_timeout(20)
    page.goto("about:blank")  # leaves no time for undo
    while len(site.jobs()) != 3:
        page.wait_for_timeout(20)
    assert [job.shot.prompt for job in site.jobs()] == ["failed", "three", "one"]


def test_clips_play_under_the_pointer_and_in_the_full_view_with_the_keyboard(site, open_page):
    for prompt in ("one", "two", "three"):
        site.add(prompt)
    page = open_page(site.url)
    video = page.locator("#clips video").last
    assert video.evaluate("video => !video.controls && video.readyState === 0"), "no controls over the clip, nothing is loaded"
    video.hover()
    expect(video).to_have_js_property("paused", False)
    page.mouse.move(0, 0)
    expect(video).to_have_js_property("paused", True)
    expect(video).to_have_js_property("currentTime", 0)
    page.get_by_role("link", name="Open one").focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Shift+Tab")  # the focus of the keyboard plays it, too
    expect(video).to_have_js_property("paused", False)
    page.get_by_role("link", name="Open two").click()
    viewer = page.get_by_role("dialog")
    expect(viewer).to_have_accessible_name("two")
    expect(viewer.get_by_text("AI-generated")).to_be_visible()
    video = viewer.locator("video")
    expect(video).to_have_js_property("paused", False)
    page.keyboard.press("Space")
    expect(video).to_have_js_property("paused", True)
    page.keyboard.press("Space")
    expect(video).to_have_js_property("paused", False)
    page.keyboard.press("ArrowRight")
    expect(viewer).to_have_accessible_name("one")
    page.keyboard.press("ArrowRight")  # the last one
    expect(viewer).to_have_accessible_name("one")
    video.focus()
    page.keyboard.press("ArrowLeft")  # the player would seek
    page.keyboard.press("ArrowLeft")
    expect(viewer).to_have_accessible_name("three")
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()
    expect(page.get_by_role("link", name="Open three")).to_be_focused()
