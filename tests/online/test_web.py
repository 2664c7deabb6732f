"""The page in a real browser, against a real server that renders with the tiny models."""

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

LOOKING = (Path(__file__).parent / "looking.js").read_text()
MUST_HAVE_NAMES = {
    "button", "link", "textbox", "combobox", "listbox", "spinbutton", "checkbox", "radio", "progressbar", "DisclosureTriangle",
    "Video", "image", "navigation", "region", "radiogroup",
}  # fmt: skip
"""Roles, as Chromium's accessibility tree calls them."""
PROMPT, MAKE = "What should it show?", "Make the clip"
LOADED_MS = 120_000
"""In which the tiny models are loaded and do one stage, on a machine that has much else to do."""
PHONE = {"width": 360, "height": 740}


@dataclass
class PageContext:
    """A server under test, and what stands behind it."""

    url: str
    store: JobStore
    director: JobDirector
    pipeline: VideoGenerationPipeline
    start: Callable[[], None]
    stop: Callable[[], None]
    key: str = ""

    def jobs(self, tenant: str = "local") -> list[Job]:
        return self.store.list(tenant, limit=100).jobs

    def when(self, is_so: Callable[[], Any]) -> Any:
        """What holds, once something does; pytest's own time-out ends what never does."""
        while not (found := is_so()):
            time.sleep(0.02)
        return found

    def add(self, prompt: str, state: JobState = JobState.COMPLETED, tenant: str = "local", **fields: Any) -> Job:
        """A job without its work: its files are those of one shot that is rendered once for this file."""
        plain = {"prompt": "a template", "seed": 1, "num_frames": 4, "upscale_video": False}
        shot = check_shot(plain, "test", self.pipeline.profile.defaults)
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
def new_site(quick, tmp_path) -> Iterator[Callable[..., PageContext]]:
    with ExitStack() as sites:

        def make(key: str = "", pipeline: VideoGenerationPipeline = quick, **settings: Any) -> PageContext:
            told = OnlineSettings(
                profile="tiny",
                data=str(pipeline.outputs.root),
                database=f"sqlite:///{tmp_path}/jobs.db",
                loras={"ink": "builtin:tiny/lora.safetensors"},
                **settings,
            )
            store = open_store(told)
            director = JobDirector(store, pipeline)
            director.start()
            sites.callback(director.end)
            running, port = ExitStack(), free_port()
            sites.callback(running.close)

            def start() -> None:
                app = make_app(
                    told, store, pipeline.outputs, serving_profile(pipeline.profile), load_keys(told.keys_file, told.limits)
                )
                running.enter_context(listening_on(app, port))

            start()
            return PageContext(f"http://127.0.0.1:{port}", store, director, pipeline, start, running.close, key)

        yield make


@pytest.fixture
def site(new_site) -> PageContext:
    return new_site()


@pytest.fixture
def guarded(new_site, tmp_path) -> PageContext:
    """With keys, of two tenants."""
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
    """Opens windows. Nothing may be said on their consoles, which is where Chromium tells of what a policy forbids, too."""
    contexts, said = [], []

    def open_(url: str, **options: Any) -> Any:
        context = browser.new_context(**options)
        context.set_default_timeout(30_000)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(url)
        return page

    open_.said = said
    yield open_
    for context in contexts:
        context.close()
    assert said == []


def ask_for(page: Any, prompt: str) -> None:
    page.get_by_label(PROMPT).fill(prompt)
    page.get_by_role("button", name=MAKE).click()


def cards(page: Any, where: str) -> Any:
    return page.locator(f"#{where} > li")


def test_a_clip_is_made_watched_and_played(new_site, open_page, tmp_path):
    """With the tiny models, and not the fakes of the other tests."""
    site = new_site(pipeline=VideoGenerationPipeline.from_profile("tiny", tmp_path / "out"))
    site.director.gate.clear()
    page = open_page(site.url)
    expect(page.get_by_text("No clips yet")).to_be_visible()
    ask_for(page, "a lighthouse")
    card = cards(page, "queue")
    # The models are loaded first.
    expect(card.locator(".now")).to_have_text("Generating the base image · 0 %", timeout=LOADED_MS)
    assert card.get_by_role("progressbar").get_attribute("value") == "0"
    site.director.gate.set()
    expect(card.locator(".now")).to_have_text(re.compile(r", [12] of 2 steps · \d+ %"), timeout=LOADED_MS)
    expect(cards(page, "clips")).to_have_count(1, timeout=LOADED_MS)
    expect(cards(page, "queue")).to_have_count(0)
    expect(page.locator("#news")).to_have_text("a lighthouse: is done")
    video = page.locator("video")
    assert video.evaluate("async video => (await fetch(video.poster)).ok && video.readyState === 0"), (
        "a poster, and not the clip"
    )
    video.evaluate("async video => { video.muted = true; await video.play(); }")
    assert video.evaluate("video => [video.duration, video.videoWidth, video.videoHeight]") == [1.6, 256, 128]
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == f"{site.jobs()[0].id}.mp4"


def test_what_the_form_says_is_made_and_shown(site, open_page):
    site.director.gate.clear()
    page = open_page(site.url)
    page.get_by_label("Photo of a person").set_input_files(ASTRONAUT)
    expect(page.get_by_role("img", name="astronaut.jpg")).to_be_visible()
    page.get_by_label("LoRA", exact=True).select_option("ink")
    page.get_by_label("LoRA weight").fill("0.5")
    page.get_by_label("Style").fill("watercolour")
    ask_for(page, "an astronaut\non a beach")
    card = cards(page, "queue")
    expect(card.locator(".now")).to_have_text("Reading the face · 0 %")
    expect(card.locator("[aria-current=step]")).to_have_text("Face")
    stages = [text.removesuffix(" (done)") for text in card.locator(".track li").all_text_contents()]
    assert stages == ["Face", "Base image", "LoRA", "Style", "Likeness", "Video", "Clip likeness", "Upscale", "Save"]
    site.director.gate.set()
    card = cards(page, "clips")
    expect(card.locator("video")).to_be_visible()
    (job,) = site.jobs()
    assert (job.shot.prompt, job.shot.use_hunyuan_style) == ("an astronaut\non a beach", True)
    assert Path(job.shot.face_image[0]).read_bytes() == ASTRONAUT.read_bytes()
    card.get_by_text("Settings").click()
    said = dict(zip(card.locator("dt").all_text_contents(), card.locator("dd").all_text_contents(), strict=True))
    assert said["Size"] == "128 × 64, upscaled 2 times"
    assert said["Seed"] == str(job.shot.seed)
    assert said["LoRA"] == "ink, weight 0.5"
    assert said["Style"] == "watercolour"
    assert said["Person"] == "from a photo"


def test_a_reload_in_the_middle_finds_the_clip_where_it_is(site, open_page):
    site.director.gate.clear()
    page = open_page(site.url)
    ask_for(page, "a red ball")
    expect(cards(page, "queue").locator(".now")).to_have_text(re.compile("Generating the base image"))
    page.reload()
    expect(cards(page, "queue").locator(".now")).to_have_text(re.compile("Generating the base image"))
    site.director.gate.set()
    expect(cards(page, "clips").locator("video")).to_be_visible()
    page.reload()
    expect(cards(page, "clips")).to_have_count(1)
    assert len(site.jobs()) == 1


def test_cancel_stops_one_and_leaves_the_others(site, open_page):
    site.director.gate.clear()
    page = open_page(site.url)
    for prompt in ("first", "second", "third"):
        ask_for(page, prompt)
        expect(page.locator("#queue").get_by_role("heading", name=prompt)).to_be_visible()
    expect(cards(page, "queue").nth(0).locator(".now")).to_have_text(re.compile("Generating"))
    expect(cards(page, "queue").nth(1).locator(".now")).to_have_text("Waiting for its turn")
    for name in ("second", "first"):  # one that waits, and the one in progress
        page.get_by_role("button", name=f"Cancel {name}").click()
        expect(page.locator("#clips").get_by_role("heading", name=name)).to_be_visible()
    expect(page.locator("#clips .reason")).to_have_text(["Cancelled.", "Cancelled."])
    site.director.gate.set()
    expect(page.locator("#clips video")).to_have_count(1)
    assert [job.state for job in site.jobs()] == ["completed", "cancelled", "cancelled"]


def test_another_like_this_fills_the_form_and_keeps_the_person(site, open_page):
    site.director.gate.clear()
    page = open_page(site.url)
    page.get_by_label("Photo of a person").set_input_files(ASTRONAUT)
    page.get_by_text("More settings").click()
    page.get_by_label("Frames", exact=True).fill("4")
    page.get_by_label("Seed").fill("77")
    page.get_by_label("Size").select_option("64x128")
    page.get_by_label("Upscaling").select_option("None")
    page.get_by_text("Fast", exact=False).first.check()
    ask_for(page, "a portrait")
    site.when(site.jobs)
    page.get_by_role("button", name="Cancel a portrait").click()
    page.get_by_role("link", name="Try it again (a portrait)").click()
    expect(page.get_by_role("heading", name="Another like this")).to_be_visible()
    expect(page.get_by_label(PROMPT)).to_have_value("a portrait")
    expect(page.get_by_label("The same person as in that clip")).to_be_checked()
    page.get_by_text("More settings").click()
    expect(page.get_by_text("That clip had 77")).to_be_visible()
    page.get_by_role("button", name=MAKE).click()
    again, before = site.when(lambda: len(jobs := site.jobs()) == 2 and jobs)
    assert again.shot.seed != before.shot.seed
    assert again.shot.model_copy(update={"seed": 77, "id": None}) == before.shot.model_copy(update={"id": None})
    assert again.shot.face_image


def test_a_photo_is_saved_as_a_character(site, open_page):
    site.director.gate.clear()
    page = open_page(site.url)
    expect(page.get_by_label("Or a saved character")).to_be_hidden()
    expect(page.get_by_label("Save this person as")).to_be_hidden()
    page.get_by_label("Photo of a person").set_input_files(ASTRONAUT)
    page.get_by_label("Save this person as").fill("Eileen")
    ask_for(page, "somebody new")
    expect(cards(page, "queue")).to_have_count(1, timeout=LOADED_MS)
    expect(page.get_by_label("Or a saved character").locator("option:checked")).to_have_text("Eileen")
    assert page.get_by_label("Photo of a person").evaluate("input => input.files.length") == 0
    ask_for(page, "somebody we know")
    card = cards(page, "queue").nth(1)
    card.get_by_text("Settings").click()
    expect(card.locator("dl")).to_contain_text("Eileen")
    known, new = site.jobs()
    assert known.shot.face_image == new.shot.face_image


def test_delete_asks_first(site, open_page):
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


def test_what_is_wrong_stands_beside_its_field(site, open_page, tmp_path):
    page = open_page(site.url)
    wrong = tmp_path / "photo.jpg"
    wrong.write_text("<script>alert(1)</script>")
    page.get_by_label("Photo of a person").set_input_files(wrong)
    ask_for(page, "somebody")
    photo = page.get_by_label("Photo of a person")
    expect(photo).to_have_attribute("aria-invalid", "true")
    expect(photo).to_be_focused()
    expect(page.locator("#photo-error")).to_be_visible()
    photo.set_input_files([])
    page.get_by_label("Style").fill("ink")
    page.get_by_text("Fast", exact=False).first.check()
    page.get_by_role("button", name=MAKE).click()
    expect(page.locator("#style_prompt-error")).to_have_text(re.compile("Mode fast has no restyle"))
    expect(page.get_by_label("Style")).to_be_focused()
    expect(page.locator("#photo-error")).to_be_hidden()
    page.get_by_label("Style").fill("")
    page.locator("#make").evaluate("form => { form.noValidate = true; form.elements.num_frames.value = '1'; }")
    page.get_by_role("button", name=MAKE).click()
    expect(page.get_by_label("Frames", exact=True)).to_be_focused()  # inside of what was folded away
    assert site.jobs() == []
    open_page.said[:] = [text for text in open_page.said if "422" not in text and "400" not in text]


def test_a_full_queue_is_told_and_keeps_the_form(new_site, open_page):
    site = new_site(max_queued=1)
    site.director.gate.clear()
    page = open_page(site.url)
    ask_for(page, "the one in hand")
    expect(cards(page, "queue").locator(".now")).to_have_text(re.compile("Generating"))
    ask_for(page, "the one that waits")
    expect(cards(page, "queue")).to_have_count(2)
    ask_for(page, "the one too many")
    expect(page.get_by_role("alert")).to_have_text(re.compile(r"The queue is full.*Try again in \d+ s"))
    expect(page.get_by_label(PROMPT)).to_have_value("the one too many")
    open_page.said[:] = [text for text in open_page.said if "429" not in text]


def test_all_of_it_works_without_script(site, open_page):
    site.director.gate.clear()
    page = open_page(site.url, java_script_enabled=False)
    page.get_by_label("Style").fill("ink")
    page.get_by_text("Fast", exact=False).first.check()
    ask_for(page, "no script")
    style = page.get_by_label("Style")
    expect(style).to_have_attribute("aria-invalid", "true")
    expect(style).to_have_value("ink")
    style.fill("")
    page.get_by_role("button", name=MAKE).click()
    expect(cards(page, "queue").locator("h3")).to_have_text("no script")
    page.get_by_role("button", name="Cancel no script").click()
    site.when(lambda: site.jobs()[0].state.is_final)
    page.goto(site.url)
    card = cards(page, "clips")
    expect(card.locator(".reason")).to_have_text("Cancelled.")
    card.locator("summary", has_text="Delete").click()
    card.get_by_role("button", name="Yes, delete").click()
    expect(cards(page, "clips")).to_have_count(0)
    open_page.said[:] = [text for text in open_page.said if "422" not in text]


def test_a_form_that_is_sent_twice_asks_once(site):
    site.director.gate.clear()
    page = httpx.get(site.url).text
    form = {
        name: re.search(f'name="{name}"[^>]* value="([^"]*)"', page)[1]
        for name in ("once", "num_frames", "fps", "motion_bucket_id")
    }
    form |= {"prompt": "twice", "size": "128x64", "mode": "quality", "scale": "2"}
    answers = [httpx.post(site.url, files=[(name, (None, value)) for name, value in form.items()]) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [303, 303]
    assert answers[0].headers["location"] == answers[1].headers["location"]
    changed = form | {"prompt": "something else"}
    httpx.post(site.url, files=[(name, (None, value)) for name, value in changed.items()])
    assert len(site.jobs()) == 2


def test_a_server_that_goes_and_comes_back_is_found_again(site, open_page):
    site.director.gate.clear()
    page = open_page(site.url)
    ask_for(page, "through a restart")
    expect(cards(page, "queue").locator(".now")).to_have_text(re.compile("Generating"))
    site.stop()
    expect(page.locator("#connection")).to_have_text(re.compile("cannot be reached"))
    page.get_by_role("button", name=MAKE).click()
    expect(page.get_by_role("alert")).to_have_text(re.compile("Nothing was sent"))
    site.director.gate.set()
    site.when(lambda: site.jobs()[0].state.is_final)
    site.start()
    expect(page.locator("#clips video")).to_be_visible()
    expect(page.locator("#connection")).to_be_hidden()
    open_page.said[:] = [
        text for text in open_page.said if "ERR_CONNECTION_REFUSED" not in text and "ERR_INCOMPLETE" not in text
    ]


def test_the_gallery_has_pages(site, open_page):
    for number in range(14):
        site.add(f"clip {number}")
    page = open_page(site.url)
    expect(cards(page, "clips")).to_have_count(12)
    page.get_by_role("link", name="Older clips").click()
    expect(cards(page, "clips").locator("h3")).to_have_text(["clip 1", "clip 0"])
    expect(page.get_by_role("link", name="Older clips")).to_have_count(0)
    page.get_by_role("link", name="Newest clips").click()
    expect(cards(page, "clips").locator("h3").first).to_have_text("clip 13")


def test_signing_in_with_a_key(guarded, open_page):
    guarded.add("of ann", tenant="ann")
    guarded.add("of ben", tenant="ben")
    page = open_page(guarded.url)
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    assert page.evaluate(LOOKING) == []
    page.get_by_label("API key").fill("vg-nobody's")
    page.keyboard.press("Enter")
    expect(page.get_by_label("API key")).to_have_attribute("aria-invalid", "true")
    page.get_by_label("API key").fill(guarded.key)
    page.keyboard.press("Enter")
    expect(cards(page, "clips").locator("h3")).to_have_text(["of ann"])
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert guarded.key not in cookie["value"]
    assert (
        page.locator("video").evaluate("async video => { video.muted = true; await video.play(); return video.duration; }") > 0
    )
    ask_for(page, "signed in")
    expect(page.locator("#clips video")).to_have_count(2)

    by_cookie = {"cookies": {cookie["name"]: cookie["value"]}}
    clip = guarded.jobs("ann")[0]
    assert httpx.get(f"{guarded.url}/v1/videos/{clip.id}", **by_cookie).status_code == 200
    assert httpx.delete(f"{guarded.url}/v1/videos/{clip.id}", **by_cookie).status_code == 401, "the cookie only reads"
    for site in ({"origin": "https://evil.example"}, {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}):
        for path in ("/", f"/clips/{clip.id}/delete", "/sign-out", "/sign-in"):
            assert httpx.post(guarded.url + path, headers=site, **by_cookie).status_code == 403
    other = guarded.jobs("ben")[0]
    assert httpx.post(f"{guarded.url}/clips/{other.id}/delete", **by_cookie).status_code == 404
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_label("API key")).to_be_visible()
    assert httpx.get(f"{guarded.url}/v1/videos/{clip.id}", **by_cookie).status_code == 401
    open_page.said[:] = [text for text in open_page.said if "403" not in text]


def test_a_cookie_that_was_asked_for_by_https_is_never_sent_in_clear(guarded):
    for proxy, secure in (({}, False), ({"x-forwarded-proto": "https"}, True)):
        answer = httpx.post(f"{guarded.url}/sign-in", data={"key": guarded.key}, headers=proxy)
        assert ("Secure" in answer.headers["set-cookie"]) == secure


def test_who_signs_in_may_send_a_key_and_no_more(guarded):
    assert httpx.post(f"{guarded.url}/sign-in", data={"key": "x" * 10_000}).status_code == 413
    assert httpx.post(f"{guarded.url}/sign-in", data={"key": "x"}).status_code == 403


def test_a_number_of_thousands_of_digits_is_no_number(site):
    for field in ("num_frames", "size"):
        fields = {"prompt": "x", "size": "64x64", field: "9" * 5000 if field == "num_frames" else f"{'9' * 5000}x64"}
        assert httpx.post(site.url, data=fields).status_code == 422
    with httpx.stream("GET", f"{site.url}/events?since={'9' * 5000}") as answer:
        assert answer.status_code == 200


def test_a_stranger_gets_nothing(guarded):
    for path in ("/", "/?like=video_1"):
        assert httpx.get(guarded.url + path).headers["location"] == "/sign-in"
    assert httpx.get(f"{guarded.url}/events").status_code == 401
    assert httpx.post(guarded.url, data={"prompt": "x"}).headers["location"] == "/sign-in"
    assert guarded.jobs("ann") == guarded.jobs("ben") == []


def test_a_monitor_may_ask_for_the_head_alone(site):
    answer = httpx.head(f"{site.url}/")
    assert (answer.status_code, answer.content) == (200, b"")


def test_every_page_says_what_may_run_on_it(site):
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
    assert httpx.get(site.url, headers={"host": "evil.example"}).status_code == 403, "a name that was rebound to this machine"


def test_what_people_wrote_is_text(site, open_page):
    nasty = "<img src=x onerror=alert(1)>{{7*7}}\"'</textarea><script>alert(1)</script>"
    site.add(nasty)
    page = open_page(site.url)
    expect(cards(page, "clips").locator("h3")).to_have_text(nasty)
    page.get_by_role("link", name="Make another like this").click()
    expect(page.get_by_label(PROMPT)).to_have_value(nasty)
    ask_for(page, nasty)
    expect(cards(page, "clips").locator("h3")).to_have_text([nasty, nasty])


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [PHONE, {"width": 1280, "height": 900}], ids=["phone", "desk"])
def test_everything_is_named_readable_and_within_the_window(site, open_page, scheme, size):
    site.add("a completed clip with " + "a_very_long_word" * 10)
    site.add("one that failed", JobState.FAILED, error=JobError(code="stage_failed", message="no face was found " * 6))
    site.add("one that was cancelled", JobState.CANCELLED)
    site.director.gate.clear()
    page = open_page(site.url, viewport=size, color_scheme=scheme, reduced_motion="reduce")
    ask_for(page, "one that is being made")
    ask_for(page, "one that waits")
    expect(cards(page, "queue").locator(".now").first).to_have_text(re.compile("Generating"))
    assert page.evaluate(LOOKING) == []
    for summary in page.locator("summary").all():
        summary.click()
    page.locator("#make").evaluate("form => { form.noValidate = true; form.elements.prompt.value = ''; }")
    page.get_by_role("button", name=MAKE).click()
    expect(page.locator("#prompt-error")).to_be_visible()
    assert page.evaluate(LOOKING) == []
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    roles = {node["role"]["value"] for node in nodes if not node["ignored"]}
    assert {"textbox", "button", "progressbar", "Video", "status"} <= roles
    nameless = [
        node for node in nodes
        if not node["ignored"] and node["role"]["value"] in MUST_HAVE_NAMES and not node.get("name", {}).get("value")
    ]  # fmt: skip
    assert nameless == []
    assert page.locator(".track .current").first.evaluate("e => getComputedStyle(e, '::before').animationName") == "none"
    page.goto(f"{site.url}/?like={site.jobs()[-1].id}&after={site.jobs()[0].id}")
    assert page.evaluate(LOOKING) == []
    open_page.said[:] = [text for text in open_page.said if "422" not in text]


def test_a_clip_by_the_keyboard_alone(site, open_page):
    page = open_page(site.url)
    focused = "document.activeElement"
    page.keyboard.press("Tab")
    assert page.evaluate(f"{focused}.textContent") == "Skip to your clips"
    passed = []
    while (name := page.evaluate(f"{focused}.name || {focused}.textContent.trim()")) != MAKE:
        passed.append(name)
        ring = page.evaluate(f"(({{outlineStyle, outlineWidth}}) => [outlineStyle, outlineWidth])(getComputedStyle({focused}))")
        assert ring == ["solid", "2px"], f"no ring round {name}"
        if name == "prompt":
            page.keyboard.type("made by keys")
        if name == "mode":
            page.keyboard.press("ArrowRight")
        page.keyboard.press("Tab")
    assert passed == [
        "Skip to your clips", "vidgen", "prompt", "photo", "lora", "lora_weight", "style_prompt", "mode", "More settings"
    ]  # fmt: skip
    page.keyboard.press("Enter")
    expect(page.locator("#clips video")).to_be_visible()
    job = site.jobs()[0]
    assert (job.shot.prompt, job.shot.mode) == ("made by keys", "fast")
    page.locator("h3", has_text="made by keys").focus()
    for _ in range(9):
        page.keyboard.press("Tab")
        if page.evaluate(f"{focused}.textContent").startswith("Delete"):
            break
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(cards(page, "clips")).to_have_count(0)
    assert page.evaluate(f"{focused}.id") == "gallery-heading"
