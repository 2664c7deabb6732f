"""Preview, times and place in the queue of jobs that have not ended."""

import io
import re

import httpx
import numpy as np
from PIL import Image as PILImage

from tests.online.web.conftest import cards, generate, playwright
from vidgen_ray.online.store.jobs import JobState

expect = playwright.expect


def test_preview_changes_from_nothing_to_the_image_to_the_clip(site, open_page):
    site.director.pause_at = "flux"
    page = open_page(site.url)
    page.get_by_label("Seed").fill("31")
    generate(page, "a preview")
    card = cards(page, "queue")
    expect(card.locator(".status")).to_have_text(re.compile("Generating the base image"))
    job = site.jobs()[0]
    url = f"{site.url}/v1/videos/{job.id}/content?variant=preview"
    assert httpx.get(url).status_code == 204
    expect(card.locator(".preview")).to_be_hidden()

    site.director.pause_at = "svd"
    expect(card.locator(".preview img")).to_be_visible()
    image = httpx.get(url)
    with PILImage.open(io.BytesIO(image.content)) as opened:
        assert (opened.format, opened.size, opened.n_frames) == ("WEBP", (128, 64), 1)
        shown = np.asarray(opened.convert("RGB"), np.int16)
    flux = next(step for step in site.pipeline.plan(job.shot).steps if step.stage == "flux")
    rendered = site.pipeline.outputs.stage_cache.get(flux.key, ("image",))["image"]
    assert np.corrcoef(shown.ravel(), rendered.ravel())[0, 1] > 0.5, "of noise, WebP keeps little"
    assert httpx.get(url, headers={"if-none-match": image.headers["etag"]}).status_code == 304
    before = card.locator(".preview img").get_attribute("src")
    page.reload()
    expect(card.locator(".preview img")).to_be_visible()

    before = card.locator(".preview img").get_attribute("src")
    site.director.pause_at = "realesrgan"
    expect(card.locator(".preview img")).not_to_have_attribute("src", before)
    clip = httpx.get(url)
    with PILImage.open(io.BytesIO(clip.content)) as opened:
        assert (opened.size, opened.n_frames) == ((128, 64), 8)
    site.director.pause_at = None
    site.wait_for_jobs(1)
    expect(page.locator("#clips video")).to_be_visible()
    assert httpx.get(url).headers["content-type"] == "image/webp"


def test_preview_is_for_the_owner_only(site_with_keys):
    site = site_with_keys
    site.director.paused.set()
    job = site.add("of ben", JobState.QUEUED, tenant="ben")
    own = {"authorization": f"Bearer {site.key}"}
    answer = httpx.get(f"{site.url}/v1/videos/{job.id}/content?variant=preview", headers=own)
    assert answer.status_code == 404


def test_running_job_shows_elapsed_and_remaining_time(site, open_page):
    site.director.pause_at = "realesrgan"
    page = open_page(site.url)
    page.get_by_label("Seed").fill("32")
    generate(page, "with times")
    card = cards(page, "queue")
    expect(card.locator(".estimate")).to_have_text(re.compile("^about .* left$"))
    elapsed = card.locator(".elapsed")
    expect(elapsed).to_have_text(re.compile(r"^\d+:\d\d elapsed$"))
    before = elapsed.text_content()
    expect(elapsed).not_to_have_text(before)  # it counts


def test_queued_jobs_show_their_place(site, open_page):
    site.director.paused.set()
    page = open_page(site.url)
    for prompt in ("first", "second", "third"):
        generate(page, prompt)
        expect(page.locator("#queue").get_by_role("heading", name=prompt)).to_be_visible()
    running, following, left = (
        re.compile("^about .* left$"),
        re.compile("^Next in the queue, about"),
        "Position 2, about",
    )
    estimates = cards(page, "queue").locator(".estimate")
    expect(estimates).to_have_text([running, following, re.compile(f"^{left}")])
    page.get_by_role("button", name="Cancel second").click()
    expect(estimates).to_have_text([running, following])
