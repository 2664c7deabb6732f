"""The page in Chromium, against a real server with the tiny models or with fakes."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ASTRONAUT
from tests.online.web_server import JobDirector, QuickPipeline, chromium, free_port, listening_on
from vidgen_ray.online.asgi_app import make_app
from vidgen_ray.online.auth import hash_key, load_keys, new_key
from vidgen_ray.online.serving_profile import serving_profile
from vidgen_ray.online.settings import OnlineSettings
from vidgen_ray.online.store.jobs import Job, JobError, JobKind, JobState, new_id
from vidgen_ray.online.store.store import JobStore, open_store
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.script.reader import check_shot

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (pip install playwright)")
expect = playwright.expect
expect.set_options(timeout=20_000)

CHECK_PAGE = (Path(__file__).parent / "check_page.js").read_text()
NAMED_ROLES = {
    "button", "link", "textbox", "combobox", "listbox", "spinbutton", "checkbox", "radio", "progressbar", "DisclosureTriangle",
    "Video", "image", "navigation", "region", "radiogroup",
}  # fmt: skip
"""Roles of Chromium's accessibility tree whose nodes need a name."""
CREATE = "Create clip"
LOADED_MS = 120_000
"""Time to load the tiny models and run one stage on a busy machine."""
PHONE = {"width": 360, "height": 740}


@dataclass
class Site:
    """Server under test, with its store and director."""

    url: str
    store: JobStore
    director: JobDirector
    pipeline: VideoGenerationPipeline
    start: Callable[[], None]
    stop: Callable[[], None]
    key: str = ""

    def jobs(self, tenant: str = "local") -> list[Job]:
        return self.store.list(tenant, limit=100).jobs

    def wait_for(self, condition: Callable[[], Any]) -> Any:
        """Wait until the condition is true and return its value. Limited by pytest's timeout only."""
        while not (value := condition()):
            time.sleep(0.02)
        return value

    def add(self, prompt: str, state: JobState = JobState.COMPLETED, tenant: str = "local", **fields: Any) -> Job:
        """Store a job without rendering it. All such jobs share the files of one shot."""
        template = {"prompt": "a template", "seed": 1, "num_frames": 4, "upscale_video": False}
        shot = check_shot(template, "test", self.pipeline.profile.defaults)
        record, now = self.pipeline.render(shot), time.time()
        done = state is JobState.COMPLETED
        job = Job(
            id=new_id("video"),
            tenant=tenant,
            kind=JobKind.VIDEO,
            state=state,
            shot=shot.model_copy(update={"prompt": prompt}),
            key=self.pipeline.plan(shot).key,
            progress=100 if done else 0,
            created_at=now,
            started_at=now - 41,
            completed_at=now if state.is_final else None,
            shot_id=record.shot.id if done else None,
            **fields,
        )
        self.store.create(job)
        return job


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> VideoGenerationPipeline:
    return QuickPipeline.from_profile("tiny", tmp_path_factory.mktemp("out"))


@pytest.fixture
def new_site(quick, tmp_path) -> Iterator[Callable[..., Site]]:
    with ExitStack() as sites:

        def make(key: str = "", pipeline: VideoGenerationPipeline = quick, **settings: Any) -> Site:
            server_settings = OnlineSettings(
                profile="tiny",
                data=str(pipeline.outputs.root),
                database=f"sqlite:///{tmp_path}/jobs.db",
                loras={"ink": "builtin:tiny/lora.safetensors"},
                # The director of these tests does not know tenants.
                share_results_between_tenants=True,
                **settings,
            )
            store = open_store(server_settings)
            director = JobDirector(store, pipeline)
            director.start()
            sites.callback(director.stop)
            running, port = ExitStack(), free_port()
            sites.callback(running.close)

            def start() -> None:
                app = make_app(
                    server_settings,
                    store,
                    pipeline.outputs,
                    serving_profile(pipeline.profile),
                    load_keys(server_settings.keys_file, server_settings.limits),
                )
                running.enter_context(listening_on(app, port))

            start()
            return Site(f"http://127.0.0.1:{port}", store, director, pipeline, start, running.close, key)

        yield make


@pytest.fixture
def site(new_site) -> Site:
    return new_site()


@pytest.fixture
def site_with_keys(new_site, tmp_path) -> Site:
    """Server with the keys of two tenants, ann and ben."""
    keys = {"ann": new_key(), "ben": new_key()}
    lines = [f"  - {{tenant: {tenant}, sha256: {hash_key(key)}}}\n" for tenant, key in keys.items()]
    (tmp_path / "keys.yaml").write_text("keys:\n" + "".join(lines))
    return new_site(key=keys["ann"], keys_file=tmp_path / "keys.yaml")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = chromium()
    if program is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as started:
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = started.chromium.launch(executable_path=program, args=options)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., Any]]:
    """Open browser windows. Fails if their consoles have messages, e.g. violations of the Content-Security-Policy."""
    contexts, messages = [], []

    def open_(url: str, **options: Any) -> Any:
        context = browser.new_context(**options)
        context.set_default_timeout(30_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(url)
        return page

    open_.messages = messages
    yield open_
    for context in contexts:
        context.close()
    assert messages == []


def create_clip(page: Any, prompt: str) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_role("button", name=CREATE).click()


def cards(page: Any, list_id: str) -> Any:
    return page.locator(f"#{list_id} > li")


def test_clip_is_created_followed_and_played(new_site, open_page, tmp_path):
    """Uses the tiny models. The other tests use fakes."""
    site = new_site(pipeline=VideoGenerationPipeline.from_profile("tiny", tmp_path / "out"))
    site.director.gate.clear()
    page = open_page(site.url)
    expect(page.get_by_text("No clips yet")).to_be_visible()
    create_clip(page, "a lighthouse")
    card = cards(page, "queue")
    # The models are loaded first.
    expect(card.locator(".status")).to_have_text("Generating the base image · 0 %", timeout=LOADED_MS)
    assert card.get_by_role("progressbar").get_attribute("value") == "0"
    site.director.gate.set()
    expect(card.locator(".status")).to_have_text(re.compile(r", [12] of 2 steps · \d+ %"), timeout=LOADED_MS)
    expect(cards(page, "clips")).to_have_count(1, timeout=LOADED_MS)
    expect(cards(page, "queue")).to_have_count(0)
    expect(page.locator("#announcements")).to_have_text("a lighthouse: completed")
    video = page.locator("video")
    assert video.evaluate("async video => (await fetch(video.poster)).ok && video.readyState === 0"), (
        "the poster is loaded, the clip is not"
    )
    video.evaluate("async video => { video.muted = true; await video.play(); }")
    assert video.evaluate("video => [video.duration, video.videoWidth, video.videoHeight]") == [1.6, 256, 128]
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == f"{site.jobs()[0].id}.mp4"


def test_form_values_reach_the_job_and_its_card(site, open_page):
    site.director.gate.clear()
    page = open_page(site.url)
    page.get_by_label("Photos").set_input_files(ASTRONAUT)
    expect(page.get_by_role("img", name="astronaut.jpg")).to_be_visible()
    page.get_by_label("LoRA", exact=True).select_option("ink")
    page.get_by_label("LoRA weight").fill("0.5")
    page.get_by_label("Style").fill("watercolour")
    create_clip(page, "an astronaut\non a beach")
    card = cards(page, "queue")
    expect(card.locator(".status")).to_have_text("Reading the face · 0 %")
    expect(card.locator("[aria-current=step]")).to_have_text("Face")
    stages = [text.removesuffix(" (done)") for text in card.locator(".stages li").all_text_contents()]
    assert stages == ["Face", "Base image", "LoRA", "Style", "Likeness", "Video", "Clip likeness", "Upscale", "Save"]
    site.director.gate.set()
    card = cards(page, "clips")
    expect(card.locator("video")).to_be_visible()
    (job,) = site.jobs()
    assert (job.shot.prompt, job.shot.use_hunyuan_style) == ("an astronaut\non a beach", True)
    assert Path(job.shot.face_image[0]).read_bytes() == ASTRONAUT.read_bytes()
    card.get_by_text("Settings of").click()
    client_fields = dict(zip(card.locator("dt").all_text_contents(), card.locator("dd").all_text_contents(), strict=True))
    assert client_fields["Size"] == "128 × 64, upscaled 2 times"
    assert client_fields["Seed"] == str(job.shot.seed)
    assert client_fields["LoRA"] == "ink, weight 0.5"
    assert client_fields["Style"] == "watercolour"
    assert client_fields["Character"] == "from a photo"


def test_reload_shows_the_current_progress(site, open_page):
    site.director.gate.clear()
    page = open_page(site.url)
    create_clip(page, "a red ball")
    expect(cards(page, "queue").locator(".status")).to_have_text(re.compile("Generating the base image"))
    page.reload()
    expect(cards(page, "queue").locator(".status")).to_have_text(re.compile("Generating the base image"))
    site.director.gate.set()
    expect(cards(page, "clips").locator("video")).to_be_visible()
    page.reload()
    expect(cards(page, "clips")).to_have_count(1)
    assert len(site.jobs()) == 1


def test_cancel_leaves_other_jobs_alone(site, open_page):
    site.director.gate.clear()
    page = open_page(site.url)
    for prompt in ("first", "second", "third"):
        create_clip(page, prompt)
        expect(page.locator("#queue").get_by_role("heading", name=prompt)).to_be_visible()
    expect(cards(page, "queue").nth(0).locator(".status")).to_have_text(re.compile("Generating"))
    expect(cards(page, "queue").nth(1).locator(".status")).to_have_text("Queued")
    for name in ("second", "first"):  # a queued job, then the running one
        page.get_by_role("button", name=f"Cancel {name}").click()
        expect(page.locator("#clips").get_by_role("heading", name=name)).to_be_visible()
    expect(page.locator("#clips .reason")).to_have_text(["Cancelled.", "Cancelled."])
    site.director.gate.set()
    expect(page.locator("#clips video")).to_have_count(1)
    assert [job.state for job in site.jobs()] == ["completed", "cancelled", "cancelled"]


def test_reuse_settings_fills_the_form_and_keeps_the_photo(site, open_page):
    site.director.gate.clear()
    page = open_page(site.url)
    page.get_by_label("Photos").set_input_files(ASTRONAUT)
    page.get_by_text("More settings").click()
    page.get_by_label("Frames", exact=True).fill("4")
    page.get_by_label("Seed").fill("77")
    page.get_by_label("Size").select_option("64x128")
    page.get_by_label("Upscaling").select_option("None")
    page.get_by_text("Fast", exact=False).first.check()
    create_clip(page, "a portrait")
    site.wait_for(site.jobs)
    page.get_by_role("button", name="Cancel a portrait").click()
    page.get_by_role("link", name="Try again (a portrait)").click()
    expect(page.get_by_role("heading", name="New clip with these settings")).to_be_visible()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a portrait")
    expect(page.get_by_label("Same character as in that clip")).to_be_checked()
    page.get_by_text("More settings").click()
    expect(page.get_by_text("That clip has seed 77")).to_be_visible()
    page.get_by_role("button", name=CREATE).click()
    again, before = site.wait_for(lambda: len(jobs := site.jobs()) == 2 and jobs)
    assert again.shot.seed != before.shot.seed
    assert again.shot.model_copy(update={"seed": 77, "id": None}) == before.shot.model_copy(update={"id": None})
    assert again.shot.face_image


def test_photo_is_saved_as_character(site, open_page):
    site.director.gate.clear()
    page = open_page(site.url)
    expect(page.get_by_label("Saved character")).to_be_hidden()
    expect(page.get_by_label("Save as character")).to_be_hidden()
    page.get_by_label("Photos").set_input_files(ASTRONAUT)
    page.get_by_label("Save as character").fill("Eileen")
    create_clip(page, "a new character")
    expect(cards(page, "queue")).to_have_count(1, timeout=LOADED_MS)
    expect(page.get_by_label("Saved character").locator("option:checked")).to_have_text("Eileen")
    assert page.get_by_label("Photos").evaluate("input => input.files.length") == 0
    create_clip(page, "a saved character")
    card = cards(page, "queue").nth(1)
    card.get_by_text("Settings").click()
    expect(card.locator("dl")).to_contain_text("Eileen")
    second, first = site.jobs()
    assert second.shot.face_image == first.shot.face_image


def test_delete_asks_for_confirmation(site, open_page):
    site.add("one")
    site.add("two")
    page = open_page(site.url)
    card = cards(page, "clips").first
    assert not card.get_by_role("button", name="Yes, delete two").is_visible()
    card.get_by_text("Delete", exact=False).first.click()
    card.get_by_role("button", name="Yes, delete two").click()
    expect(cards(page, "clips")).to_have_count(1)
    expect(page.locator("h3:focus")).to_have_text("one")  # not at the top of the page
    assert [job.shot.prompt for job in site.jobs()] == ["one"]


def test_errors_are_shown_at_their_field(site, open_page, tmp_path):
    page = open_page(site.url)
    invalid_photo = tmp_path / "photo.jpg"
    invalid_photo.write_text("<script>alert(1)</script>")
    page.get_by_label("Photos").set_input_files(invalid_photo)
    create_clip(page, "a portrait")
    photo = page.get_by_label("Photos")
    expect(photo).to_have_attribute("aria-invalid", "true")
    expect(photo).to_be_focused()
    expect(page.locator("#photo-error")).to_be_visible()
    photo.set_input_files([])
    page.get_by_label("Style").fill("ink")
    page.get_by_text("Fast", exact=False).first.check()
    page.get_by_role("button", name=CREATE).click()
    expect(page.locator("#style_prompt-error")).to_have_text(re.compile("Fast mode has no restyling"))
    expect(page.get_by_label("Style")).to_be_focused()
    expect(page.locator("#photo-error")).to_be_hidden()
    page.get_by_label("Style").fill("")
    page.locator("#create").evaluate("form => { form.noValidate = true; form.elements.num_frames.value = '1'; }")
    page.get_by_role("button", name=CREATE).click()
    expect(page.get_by_label("Frames", exact=True)).to_be_focused()  # in the closed details element
    assert site.jobs() == []
    open_page.messages[:] = [text for text in open_page.messages if "422" not in text and "400" not in text]


def test_full_queue_shows_an_error_and_keeps_the_form(new_site, open_page):
    site = new_site(max_queued=1)
    site.director.gate.clear()
    page = open_page(site.url)
    create_clip(page, "running")
    expect(cards(page, "queue").locator(".status")).to_have_text(re.compile("Generating"))
    create_clip(page, "queued")
    expect(cards(page, "queue")).to_have_count(2)
    create_clip(page, "rejected")
    expect(page.get_by_role("alert")).to_have_text(re.compile(r"The queue is full.*Try again in \d+ s"))
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("rejected")
    open_page.messages[:] = [text for text in open_page.messages if "429" not in text]


def test_page_works_without_javascript(site, open_page):
    site.director.gate.clear()
    page = open_page(site.url, java_script_enabled=False)
    page.get_by_label("Style").fill("ink")
    page.get_by_text("Fast", exact=False).first.check()
    create_clip(page, "no script")
    style = page.get_by_label("Style")
    expect(style).to_have_attribute("aria-invalid", "true")
    expect(style).to_have_value("ink")
    style.fill("")
    page.get_by_role("button", name=CREATE).click()
    expect(cards(page, "queue").locator("h3")).to_have_text("no script")
    page.get_by_role("button", name="Cancel no script").click()
    site.wait_for(lambda: site.jobs()[0].state.is_final)
    page.goto(site.url)
    card = cards(page, "clips")
    expect(card.locator(".reason")).to_have_text("Cancelled.")
    card.locator("summary", has_text="Delete").click()
    card.get_by_role("button", name="Yes, delete").click()
    expect(cards(page, "clips")).to_have_count(0)
    open_page.messages[:] = [text for text in open_page.messages if "422" not in text]


def test_form_submitted_twice_creates_one_job(site):
    site.director.gate.clear()
    page = httpx.get(site.url).text
    form = {
        name: re.search(f'name="{name}"[^>]* value="([^"]*)"', page)[1]
        for name in ("submission_id", "num_frames", "fps", "motion_bucket_id")
    }
    form |= {"prompt": "twice", "size": "128x64", "mode": "quality", "scale": "2"}
    answers = [httpx.post(site.url, files=[(name, (None, value)) for name, value in form.items()]) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [303, 303]
    assert answers[0].headers["location"] == answers[1].headers["location"]
    changed = form | {"prompt": "edited"}
    httpx.post(site.url, files=[(name, (None, value)) for name, value in changed.items()])
    assert len(site.jobs()) == 2


def test_page_reconnects_after_a_server_restart(site, open_page):
    site.director.gate.clear()
    page = open_page(site.url)
    create_clip(page, "through a restart")
    expect(cards(page, "queue").locator(".status")).to_have_text(re.compile("Generating"))
    site.stop()
    expect(page.locator("#connection")).to_have_text(re.compile("cannot be reached"))
    page.get_by_role("button", name=CREATE).click()
    expect(page.get_by_role("alert")).to_have_text(re.compile("The request was not sent"))
    site.director.gate.set()
    site.wait_for(lambda: site.jobs()[0].state.is_final)
    site.start()
    expect(page.locator("#clips video")).to_be_visible()
    expect(page.locator("#connection")).to_be_hidden()
    open_page.messages[:] = [
        text for text in open_page.messages if "ERR_CONNECTION_REFUSED" not in text and "ERR_INCOMPLETE" not in text
    ]


def test_gallery_is_paginated(site, open_page):
    for number in range(14):
        site.add(f"clip {number}")
    page = open_page(site.url)
    expect(cards(page, "clips")).to_have_count(12)
    page.get_by_role("link", name="Older clips").click()
    expect(cards(page, "clips").locator("h3")).to_have_text(["clip 1", "clip 0"])
    expect(page.get_by_role("link", name="Older clips")).to_have_count(0)
    page.get_by_role("link", name="Newest clips").click()
    expect(cards(page, "clips").locator("h3").first).to_have_text("clip 13")


def test_sign_in_with_a_key(site_with_keys, open_page):
    site_with_keys.add("of ann", tenant="ann")
    site_with_keys.add("of ben", tenant="ben")
    page = open_page(site_with_keys.url)
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    assert page.evaluate(CHECK_PAGE) == []
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
    create_clip(page, "signed in")
    expect(page.locator("#clips video")).to_have_count(2)

    by_cookie = {"cookies": {cookie["name"]: cookie["value"]}}
    clip = site_with_keys.jobs("ann")[0]
    assert httpx.get(f"{site_with_keys.url}/v1/videos/{clip.id}", **by_cookie).status_code == 200
    assert httpx.delete(f"{site_with_keys.url}/v1/videos/{clip.id}", **by_cookie).status_code == 401, (
        "the cookie is for reads only"
    )
    for headers in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}):
        for path in ("/", f"/clips/{clip.id}/delete", "/sign-out", "/sign-in"):
            assert httpx.post(site_with_keys.url + path, headers=headers, **by_cookie).status_code == 403
    other = site_with_keys.jobs("ben")[0]
    assert httpx.post(f"{site_with_keys.url}/clips/{other.id}/delete", **by_cookie).status_code == 404
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("API key")).to_be_visible()
    assert httpx.get(f"{site_with_keys.url}/v1/videos/{clip.id}", **by_cookie).status_code == 401
    open_page.messages[:] = [text for text in open_page.messages if "403" not in text]


def test_session_cookie_is_secure_over_https(site_with_keys):
    for proxy, secure in (({}, False), ({"x-forwarded-proto": "https"}, True)):
        answer = httpx.post(f"{site_with_keys.url}/sign-in", data={"key": site_with_keys.key}, headers=proxy)
        assert ("Secure" in answer.headers["set-cookie"]) == secure


def test_sign_in_rejects_large_bodies_and_invalid_keys(site_with_keys):
    assert httpx.post(f"{site_with_keys.url}/sign-in", data={"key": "x" * 10_000}).status_code == 413
    assert httpx.post(f"{site_with_keys.url}/sign-in", data={"key": "x"}).status_code == 403


def test_numbers_with_thousands_of_digits_are_rejected(site):
    for field in ("num_frames", "size"):
        fields = {"prompt": "x", "size": "64x64", field: "9" * 5000 if field == "num_frames" else f"{'9' * 5000}x64"}
        assert httpx.post(site.url, data=fields).status_code == 422
    with httpx.stream("GET", f"{site.url}/events?since={'9' * 5000}") as answer:
        assert answer.status_code == 200


def test_page_requires_sign_in(site_with_keys):
    for path in ("/", "/?like=video_1"):
        assert httpx.get(site_with_keys.url + path).headers["location"] == "/sign-in"
    assert httpx.get(f"{site_with_keys.url}/events").status_code == 401
    assert httpx.post(site_with_keys.url, data={"prompt": "x"}).headers["location"] == "/sign-in"
    assert site_with_keys.jobs("ann") == site_with_keys.jobs("ben") == []


def test_head_request_of_the_page(site):
    answer = httpx.head(f"{site.url}/")
    assert (answer.status_code, answer.content) == (200, b"")


def test_pages_have_security_headers(site):
    for path in ("/", "/sign-in", "/clips/video_1/delete"):
        answer = httpx.request("POST" if "clips" in path else "GET", site.url + path)
        policy = answer.headers.get("content-security-policy", "")
        if answer.status_code == 303:
            continue
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    for file in ("page.css", "page.js", "icon.svg"):
        assert httpx.get(f"{site.url}/static/{file}").headers["x-content-type-options"] == "nosniff"
    assert httpx.get(site.url, headers={"host": "evil.example"}).status_code == 403, "DNS rebinding"


def test_prompts_are_escaped(site, open_page):
    markup = "<img src=x onerror=alert(1)>{{7*7}}\"'</textarea><script>alert(1)</script>"
    site.add(markup)
    page = open_page(site.url)
    expect(cards(page, "clips").locator("h3")).to_have_text(markup)
    page.get_by_role("link", name="Reuse settings").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value(markup)
    create_clip(page, markup)
    expect(cards(page, "clips").locator("h3")).to_have_text([markup, markup])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, {"width": 1280, "height": 900}], ids=["phone", "desktop"])
def test_accessibility_and_layout(site, open_page, scheme, size):
    site.add("a completed clip with " + "a_very_long_word" * 10)
    site.add("a failed clip", JobState.FAILED, error=JobError(code="stage_failed", message="no face was found " * 6))
    site.add("a cancelled clip", JobState.CANCELLED)
    site.director.gate.clear()
    page = open_page(site.url, viewport=size, color_scheme=scheme, reduced_motion="reduce")
    create_clip(page, "a running clip")
    create_clip(page, "a queued clip")
    expect(cards(page, "queue").locator(".status").first).to_have_text(re.compile("Generating"))
    assert page.evaluate(CHECK_PAGE) == []
    for summary in page.locator("summary").all():
        summary.click()
    page.locator("#create").evaluate("form => { form.noValidate = true; form.elements.prompt.value = ''; }")
    page.get_by_role("button", name=CREATE).click()
    expect(page.locator("#prompt-error")).to_be_visible()
    assert page.evaluate(CHECK_PAGE) == []
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    roles = {node["role"]["value"] for node in nodes if not node["ignored"]}
    assert {"textbox", "button", "progressbar", "Video", "status"} <= roles
    unnamed = [
        node for node in nodes
        if not node["ignored"] and node["role"]["value"] in NAMED_ROLES and not node.get("name", {}).get("value")
    ]  # fmt: skip
    assert unnamed == []
    assert page.locator(".stages .current").first.evaluate("e => getComputedStyle(e, '::before').animationName") == "none"
    page.goto(f"{site.url}/?like={site.jobs()[-1].id}&after={site.jobs()[0].id}")
    assert page.evaluate(CHECK_PAGE) == []
    open_page.messages[:] = [text for text in open_page.messages if "422" not in text]


def test_clip_is_created_and_deleted_by_keyboard(site, open_page):
    page = open_page(site.url)
    focused = "document.activeElement"
    page.keyboard.press("Tab")
    assert page.evaluate(f"{focused}.textContent") == "Skip to your clips"
    focus_order = []
    while (name := page.evaluate(f"{focused}.name || {focused}.textContent.trim()")) != CREATE:
        focus_order.append(name)
        ring = page.evaluate(f"(({{outlineStyle, outlineWidth}}) => [outlineStyle, outlineWidth])(getComputedStyle({focused}))")
        assert ring == ["solid", "2px"], f"no focus ring on {name}"
        if name == "prompt":
            page.keyboard.type("by keyboard")
        if name == "mode":
            page.keyboard.press("ArrowRight")
        page.keyboard.press("Tab")
    assert focus_order == [
        "Skip to your clips", "vidgen", "prompt", "photo", "lora", "lora_weight", "style_prompt", "mode", "More settings"
    ]  # fmt: skip
    page.keyboard.press("Enter")
    expect(page.locator("#clips video")).to_be_visible()
    job = site.jobs()[0]
    assert (job.shot.prompt, job.shot.mode) == ("by keyboard", "fast")
    page.locator("h3", has_text="by keyboard").focus()
    for _ in range(9):
        page.keyboard.press("Tab")
        if page.evaluate(f"{focused}.textContent").startswith("Delete"):
            break
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(cards(page, "clips")).to_have_count(0)
    assert page.evaluate(f"{focused}.id") == "gallery-heading"
