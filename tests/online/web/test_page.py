"""The page in Chromium, against a server with fakes: jobs, errors, sign-in and security."""

import io
import re

import httpx
import numpy as np
from PIL import Image as PILImage

from tests.online.scripted_stages import pipes_open
from tests.online.web.conftest import cards, generate, open_menu, playwright
from vidgen_ray.online.store.jobs import JobError, JobState

expect = playwright.expect


def test_clip_is_created_followed_and_played(site, open_page, pipe):
    prompt = f"steps 2 pause at 2 {pipe}"
    site.director.paused.set()
    page = open_page(site.url)
    expect(page.get_by_text("Finished clips appear here.")).to_be_visible()
    generate(page, prompt)
    card = cards(page, "queue")
    status, preview = card.locator(".status"), card.locator(".preview img")
    expect(status).to_have_text("Generating the base image (0 %)")
    assert card.get_by_role("progressbar").get_attribute("value") == "0"
    site.director.paused.clear()
    expect(status).to_have_text(re.compile(r"^Generating the base image, 1 of 2 steps \(\d+ %\)$"))
    (job,) = site.jobs()
    url = f"{site.url}/v1/videos/{job.id}/content?variant=preview"
    assert httpx.get(url).status_code == 204
    expect(card.locator(".preview")).to_be_hidden()

    site.director.pause_at = "svd"
    with pipes_open(pipe):
        expect(preview).to_be_visible()
    image = httpx.get(url)
    with PILImage.open(io.BytesIO(image.content)) as opened:
        assert (opened.format, opened.size, opened.n_frames) == ("WEBP", (128, 64), 1)
        shown = np.asarray(opened.convert("RGB"), np.int16)
    flux = next(step for step in site.pipeline.plan(job.shot).steps if step.stage == "flux")
    rendered = site.pipeline.outputs.stage_cache.get(flux.key, ("image",))["image"]
    assert np.corrcoef(shown.ravel(), rendered.ravel())[0, 1] > 0.5, "of noise, WebP keeps little"
    assert httpx.get(url, headers={"if-none-match": image.headers["etag"]}).status_code == 304
    page.reload()
    expect(preview).to_be_visible()

    before = preview.get_attribute("src")
    site.director.pause_at = "realesrgan"
    expect(preview).not_to_have_attribute("src", before)
    with PILImage.open(io.BytesIO(httpx.get(url).content)) as opened:
        assert (opened.size, opened.n_frames) == ((128, 64), 8)
    expect(card.locator(".estimate")).to_have_text(re.compile("^about .* left$"))
    elapsed = card.locator(".elapsed")
    expect(elapsed).to_have_text(re.compile(r"^\d+:\d\d elapsed$"))
    expect(elapsed).not_to_have_text(elapsed.text_content())  # it counts

    site.director.pause_at = None
    expect(cards(page, "clips")).to_have_count(1)
    expect(cards(page, "queue")).to_have_count(0)
    expect(page.locator("#announcements")).to_have_text(f"{prompt}: completed")
    assert httpx.get(url).headers["content-type"] == "image/webp"
    video = page.locator("video")
    state = "async video => (await fetch(video.poster)).ok && video.readyState === 0"
    assert video.evaluate(state), "the poster is loaded, the clip is not"
    video.evaluate("async video => { video.muted = true; await video.play(); }")
    assert video.evaluate("video => [video.duration, video.videoWidth, video.videoHeight]") == [1.6, 256, 128]
    with page.expect_download() as download:
        open_menu(page, prompt).get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == f"{job.id}.mp4"


def test_full_queue_keeps_the_form_and_cancel_leaves_other_jobs_alone(new_site, open_page):
    site = new_site(max_queued=2)
    site.director.paused.set()
    page = open_page(site.url)
    for prompt in ("first", "second", "third"):
        generate(page, prompt)
        expect(page.locator("#queue").get_by_role("heading", name=prompt)).to_be_visible()
    running, following = re.compile("^about .* left$"), re.compile("^Next in the queue, about")
    statuses, estimates = cards(page, "queue").locator(".status"), cards(page, "queue").locator(".estimate")
    expect(statuses).to_have_text([re.compile("Generating"), re.compile("Queued"), re.compile("Queued")])
    expect(estimates).to_have_text([running, following, re.compile("^Position 2, about")])
    generate(page, "rejected")
    expect(page.get_by_role("alert")).to_have_text(re.compile(r"The queue is full.*Try again in \d+ s"))
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("rejected")
    page.get_by_role("button", name="Cancel second").click()
    expect(estimates).to_have_text([running, following])
    page.get_by_role("button", name="Cancel first").click()
    expect(page.locator("#clips .reason")).to_have_text(["Cancelled.", "Cancelled."])
    site.director.paused.clear()
    site.wait_for_jobs(3)
    expect(page.locator("#clips video")).to_have_count(1)
    assert [job.state for job in site.jobs()] == ["completed", "cancelled", "cancelled"]
    open_page.messages[:] = [text for text in open_page.messages if "429" not in text]


def test_lost_response_creates_no_second_job(site, open_page):
    site.director.paused.set()
    page = open_page(site.url)
    page.route("**/v1/videos", lambda route: (route.fetch(), route.abort()))
    generate(page, "twice")
    expect(page.get_by_role("alert")).to_have_text(re.compile("cannot be reached"))
    page.unroute("**/v1/videos")
    page.get_by_role("button", name="Generate").click()
    expect(page.locator("#announcements")).to_have_text("twice: queued")
    generate(page, "edited")
    expect(cards(page, "queue")).to_have_count(2)
    assert [job.shot.prompt for job in site.jobs()] == ["edited", "twice"]
    open_page.messages.clear()


def test_page_reconnects_after_a_server_restart(site, open_page):
    site.director.paused.set()
    page = open_page(site.url)
    generate(page, "through a restart")
    expect(cards(page, "queue").locator(".status")).to_have_text(re.compile("Generating"))
    site.stop()
    expect(page.locator("#connection")).to_have_text(re.compile("cannot be reached"))
    generate(page, "while it is away")
    expect(page.get_by_role("alert")).to_have_text(re.compile("cannot be reached. It may have received"))
    site.director.paused.clear()
    site.wait_for_jobs(1)
    site.start()
    expect(page.locator("#clips video")).to_be_visible()
    expect(page.locator("#connection")).to_be_hidden()
    open_page.messages[:] = [
        text for text in open_page.messages if "ERR_CONNECTION_REFUSED" not in text and "ERR_INCOMPLETE" not in text
    ]


def test_sign_in_with_a_key(site_with_keys, open_page):
    site_with_keys.add("of ann", tenant="ann")
    site_with_keys.add("of ben", tenant="ben")
    page = open_page(site_with_keys.url)
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    page.get_by_label("API key").fill("vg-invalid")
    page.keyboard.press("Enter")
    expect(page.get_by_label("API key")).to_have_attribute("aria-invalid", "true")
    page.get_by_label("API key").fill(site_with_keys.key)
    page.keyboard.press("Enter")
    expect(cards(page, "clips").locator("h3")).to_have_text(["of ann"])
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert site_with_keys.key not in cookie["value"]
    assert (
        page.locator("video").evaluate("async video => { video.muted = true; await video.play(); return video.duration; }") > 0
    )
    generate(page, "signed in")
    site_with_keys.wait_for_jobs(2, "ann")
    expect(page.locator("#clips video")).to_have_count(2)

    by_cookie = {"cookies": {cookie["name"]: cookie["value"]}}
    clip = site_with_keys.jobs("ann")[0]
    assert httpx.get(f"{site_with_keys.url}/v1/videos/{clip.id}", **by_cookie).status_code == 200
    other = site_with_keys.jobs("ben")[0]
    preview = f"{site_with_keys.url}/v1/videos/{other.id}/content?variant=preview"
    assert httpx.get(preview, **by_cookie).status_code == 404
    requests = [("POST", "/v1/videos"), ("POST", "/v1/files"), ("POST", f"/v1/videos/{clip.id}/cancel")]
    requests += [("DELETE", f"/v1/videos/{clip.id}"), ("POST", "/sign-out"), ("POST", "/sign-in")]
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}):
        for method, path in requests:
            answer = httpx.request(method, site_with_keys.url + path, headers=headers, **by_cookie)
            assert answer.status_code == 403, (method, path, headers)
    assert len(site_with_keys.jobs("ann")) == 2
    assert httpx.delete(f"{site_with_keys.url}/v1/videos/{other.id}", **by_cookie).status_code == 404
    wrong_key = {"authorization": "Bearer vg-invalid"}
    assert httpx.get(f"{site_with_keys.url}/v1/videos/{clip.id}", headers=wrong_key, **by_cookie).status_code == 401
    assert httpx.get(f"{site_with_keys.url}/clips/download?id={other.id}", **by_cookie).status_code == 404
    assert other.id not in httpx.get(f"{site_with_keys.url}/clips?favourites&id={other.id}", **by_cookie).text
    open_menu(page, "signed in").get_by_role("button", name="Delete signed in").click()
    expect(cards(page, "clips").locator("h3")).to_have_text(["of ann"])
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("API key")).to_be_visible()
    assert httpx.get(f"{site_with_keys.url}/v1/videos/{clip.id}", **by_cookie).status_code == 401
    open_page.messages[:] = [text for text in open_page.messages if "403" not in text]


def test_page_requires_sign_in(site_with_keys):
    url, key = site_with_keys.url, site_with_keys.key
    for path in ("/", "/clips", "/clips/download?id=video_1", "/queue", "/inputs/file-1", "/inputs/file-1/photo", "/api-docs"):
        assert httpx.get(url + path).headers["location"] == "/sign-in", path
    assert httpx.get(f"{url}/events").status_code == 401
    assert httpx.post(f"{url}/v1/videos", json={"prompt": "x"}).status_code == 401
    assert site_with_keys.jobs("ann") == site_with_keys.jobs("ben") == []
    for proxy, secure in (({}, False), ({"x-forwarded-proto": "https"}, True)):
        answer = httpx.post(f"{url}/sign-in", data={"key": key}, headers=proxy)
        assert ("Secure" in answer.headers["set-cookie"]) == secure
    for wrong, status in (("x" * 10_000, 413), ("x", 403)):
        assert httpx.post(f"{url}/sign-in", data={"key": wrong}).status_code == status


def test_headers_of_the_page(site):
    for path in ("/", "/api-docs"):
        answer = httpx.get(site.url + path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    for file in ("page.css", "page.js", "form.js", "icon.svg"):
        assert httpx.get(f"{site.url}/static/{file}").headers["x-content-type-options"] == "nosniff"
    assert httpx.get(site.url, headers={"host": "evil.example"}).status_code == 403, "DNS rebinding"
    head = httpx.head(f"{site.url}/")
    assert (head.status_code, head.content) == (200, b"")
    with httpx.stream("GET", f"{site.url}/events?since={'9' * 5000}") as answer:
        assert answer.status_code == 200


def test_prompts_are_escaped_and_failures_explained(site, open_page):
    markup = "<img src=x onerror=alert(1)>{{7*7}}\"'</textarea><script>alert(1)</script>"
    message = "instantid: face_image 2 of 3 (file-2.png): no face found; use a photo with an upright, clearly visible face"
    site.add(markup)
    site.add("a portrait", JobState.FAILED, error=JobError(code="invalid_shot", message=message, stage="instantid"))
    page = open_page(site.url)
    explained = "Failed. Face: Photo 2 of 3: no face found; use a photo with an upright, clearly visible face."
    expect(page.locator("#clips .reason")).to_have_text(explained)
    expect(cards(page, "clips").locator("h3")).to_have_text(["a portrait", markup])
    open_menu(page, markup).get_by_role("link", name="More like this").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(markup)
    generate(page, markup)
    expect(cards(page, "clips").locator("h3")).to_have_text([markup, "a portrait", markup])
    page.get_by_role("link", name="API", exact=True).click()
    expect(page.get_by_role("heading", name="Videos")).to_be_visible()
    assert "POST /v1/videos" in page.locator(".operations code").all_text_contents()
    assert page.get_by_role("link", name="openapi.json").evaluate("async link => (await fetch(link.href)).status") == 200
