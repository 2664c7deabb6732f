"""Batches on the page, requests that are sent twice, a server that is away, and the usage of a key."""

import json
import re
import zipfile

import httpx

from tests.online.directors import settings_with_keys
from tests.online.web.conftest import cards, generate, playwright
from vidgen_ray.online.store.jobs import JobState

expect = playwright.expect
TITLES = "#clips > li h3"


def create_batch(site, prompts) -> str:
    """Create a batch with a line for each prompt. Return its id when its lines are read."""
    body = {"size": "64x64", "num_frames": 2, "upscale": False}
    lines = [
        {"custom_id": prompt, "method": "POST", "url": "/v1/videos", "body": {"prompt": prompt, **body}} for prompt in prompts
    ]
    text = "\n".join(map(json.dumps, lines)).encode()
    file = httpx.post(f"{site.url}/v1/files", files={"file": ("lines.jsonl", text)}, data={"purpose": "batch"}).json()
    request = {
        "input_file_id": file["id"],
        "endpoint": "/v1/videos",
        "completion_window": "24h",
        "metadata": {"name": "Autumn"},
    }
    batch = httpx.post(f"{site.url}/v1/batches", json=request).json()
    return str(batch["id"])


def test_batch_is_one_row_that_is_opened_downloaded_and_cancelled(site, open_page):
    site.director.held.set()
    site.add("an own clip")
    page = open_page(site.url)
    batch = create_batch(site, [f"line {number}" for number in range(4)])
    row = page.locator(f"#{batch}")
    expect(row.locator("h3")).to_have_text("Autumn (batch of 4)")
    expect(row.locator(".status")).to_have_text("0 of 4 done")
    expect(page.locator("#queue-counts")).to_have_text("1 batch")
    expect(cards(page, "queue")).to_have_count(0)
    row.get_by_role("link", name="Open").click()
    expect(page.get_by_text("No line of this batch is done yet.")).to_be_visible()
    for number in range(2):
        (claimed,) = site.store.queue.claim("director", 60, 1)
        done = site.add(f"stands for line {number}")
        site.store.queue.end(claimed.id, "director", JobState.COMPLETED, shot_id=done.shot_id)
    site.director.wake()
    expect(row.locator(".status")).to_have_text(re.compile(r"^2 of 4 done, about .* left$"))
    row.get_by_role("link", name="Open").click()
    expect(page.locator(TITLES)).to_have_count(2)
    expect(page.locator(TITLES).first).to_have_text(re.compile("^line"))
    assert page.url.endswith(f"?batch={batch}#gallery")
    row.locator("summary", has_text="Cancel").click()
    row.get_by_role("button", name="Yes, cancel").click()
    expect(row.locator(".status")).to_have_text("Cancelled. 2 done, 2 failed")
    expect(row.get_by_role("link", name="Errors")).to_be_visible()
    page.reload()
    expect(page.locator(TITLES)).to_have_count(2)  # no card says "Cancelled."
    page.get_by_role("link", name="Newest clips").click()
    expect(page.get_by_role("heading", name="an own clip")).to_be_visible()
    assert not any(title.startswith("line") for title in page.locator(TITLES).all_inner_texts())
    for unknown in ("batch_1", batch.upper()):
        assert httpx.get(f"{site.url}/clips", params={"batch": unknown}).status_code == 404
        assert httpx.get(f"{site.url}/clips/download", params={"batch": unknown}).status_code == 404
    # The files of the lines are those of another shot.
    open_page.messages[:] = [text for text in open_page.messages if "404" not in text]


def test_completed_lines_are_one_download(site, open_page, tmp_path):
    batch = create_batch(site, ["first", "second"])
    page = open_page(site.url)
    row = page.locator(f"#{batch}")
    expect(row.locator(".status")).to_have_text("Completed. 2 done, 0 failed")
    with page.expect_download() as download:
        row.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == f"{batch}.zip"
    with zipfile.ZipFile(download.value.path()) as archive:
        assert archive.testzip() is None
        assert [name.partition("-")[0] for name in archive.namelist()] == ["first", "second"]


def test_request_is_sent_once_however_often_the_key_is_pressed(site, open_page):
    site.director.held.set()
    page = open_page(site.url)
    prompt = page.get_by_label("Prompt", exact=True)
    prompt.fill("once")
    for _ in range(3):  # the second waits in vain, the third comes after the response
        with page.expect_response("**/v1/videos") if not site.jobs() else page.expect_event("requestfinished"):
            prompt.press("Control+Enter")
            prompt.press("Control+Enter")
    expect(page.locator("#announcements")).to_have_text("Already accepted")
    expect(cards(page, "queue")).to_have_count(1)
    assert len(site.jobs()) == 1


def test_page_says_that_a_server_which_does_not_answer_is_away(site, open_page):
    page = open_page("about:blank")
    held = []
    page.route("**/events*", lambda route: held.append(route))  # accepted, and never answered
    page.clock.install()
    page.goto(site.url)
    expect(page.locator("#connection")).to_be_hidden()
    page.clock.run_for(2_000)
    expect(page.locator("#connection")).to_have_text(re.compile("^The server cannot be reached"))
    held[0].continue_()
    expect(page.locator("#connection")).to_be_hidden()


def test_usage_and_budget_are_shown(new_site, tmp_path, open_page):
    keys = settings_with_keys(tmp_path, {"ann": {"limits": {"budgets": [{"window": "day", "gpu_seconds": 600}]}}})
    site = new_site(key="vg-ann", keys_file=keys.keys_file)
    page = open_page(site.url)
    page.get_by_label("API key").fill(site.key)
    page.keyboard.press("Enter")
    expect(page.locator("#budget")).to_have_text("10 min of GPU time of 10 min of GPU time left today")
    page.wait_for_load_state()  # its scripts send the form
    generate(page, "a clip")
    site.wait_for_jobs(1, "ann")
    page.get_by_role("link", name="Usage").click()
    expect(page.get_by_role("heading", name=re.compile("left today$"))).to_be_visible()
    expect(page.locator("tbody tr td").nth(1)).to_have_text("1")
