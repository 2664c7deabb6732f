"""Reviews in the gallery: with the keyboard, by requests to `vidgen watch`, and in a page that was opened from a disk."""

import json
import socket
import threading
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import uvicorn
from starlette.testclient import TestClient

from tests.browser import page_in, running_browser
from tests.dataset.conftest import make_folder, texture
from vidgen_ray.cli import main
from vidgen_ray.outputs.reviews import read_reviews, reviewable_clips
from vidgen_ray.outputs.storage import storage_at
from vidgen_ray.report import gallery_page
from vidgen_ray.report.gallery_page import gallery_app, write_gallery

NOTE = "« \"quoted\" 'twice' <b>שלום</b> 🎬"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def out(tmp_path):
    """A failed shot, two seeds of one prompt, and two shots of other prompts."""
    shots = [({"id": "bad"}, None)]
    for number, (id_, prompt) in enumerate(
        (("boat-1", "a boat"), ("boat-2", "a boat"), ("kite", "a kite"), ("ball", "a ball"))
    ):
        shots.append(({"id": id_, "prompt": prompt, "seed": number}, texture(64, 64, seed=number)))
    make_folder(tmp_path, shots)
    return tmp_path


@pytest.fixture(scope="module")
def browser():
    with running_browser() as browser:
        yield browser


def reviews(out):
    """Return id -> verdict, stars and note."""
    stored = read_reviews(storage_at(out)).values()
    return {each.id: (each.verdict, each.stars, each.note) for each in stored}


@contextmanager
def watched(out, reviewer):
    """Serve the gallery of a folder. Yields its URL."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(gallery_app(out, reviewer), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    server.should_exit = True
    thread.join()


def problems(page, part):
    if not find_spec("axe_playwright_python"):
        return []
    from tests.online.web.test_accessibility import problems

    return problems(page, part)


def test_only_the_own_page_can_review_clips_of_this_folder(out):
    clips = {shot_id: digest for digest, shot_id in reviewable_clips(storage_at(out)).items()}
    host = "http://127.0.0.1:8001"
    client = TestClient(gallery_app(out, "ada"), base_url=host)
    review = {"clip_sha256": clips["kite"], "verdict": "reject", "stars": None, "note": None}

    def post(content=review, **headers):
        return client.post("/reviews", content=json.dumps(content), headers={**JSON, **headers}).status_code

    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.example:8001"},
        {"Host": "localhost.evil.example"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
    ):
        assert post(**headers) == 403, headers
    assert post({**review, "clip_sha256": "f" * 64}) == 404
    for wrong in ({"stars": 0}, {"stars": True}, {"verdict": "maybe"}, {"note": "x" * 2001}, {"who": "eve"}, {"where": "true"}):
        assert post({**review, **wrong}) == 422, wrong
    assert post({**review, "note": "x" * 70_000}) == 413
    assert post("no object") == 422
    assert client.get("/reviews").status_code == 404
    assert not (out / "reviews").exists()

    assert post(Origin=host, **{"Sec-Fetch-Site": "same-origin"}) == 204
    # Another session has the last word, and both pages show it.
    other = TestClient(gallery_app(out, "bo"), base_url="http://localhost:8002")
    assert other.post("/reviews", json={**review, "verdict": "accept", "note": NOTE}).status_code == 204
    for each in (client, other):
        (kite,) = (row for row in each.get("/rows.json").json()["rows"] if row["id"] == "kite")
        shown = {name: kite["review"][name] for name in ("verdict", "stars", "note", "who")}
        assert shown == {"verdict": "accept", "stars": None, "note": NOTE, "who": "bo"}
    assert "<b>" not in client.get("/").text
    (out / "manifest").rename(out / "gone")
    assert post({**review, "clip_sha256": clips["ball"]}) == 204, "known since the page was loaded"


def test_review_with_the_keyboard_and_in_a_file(browser, out, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gallery_page, "REFRESH_S", 0.3)
    with watched(out, "ada") as url, page_in(browser, 1366, 768) as page:
        page.goto(url)
        keys = page.keyboard
        for key in ("ArrowRight", "ArrowRight", "4", "a", "r"):  # the first card is that of the failed shot
            keys.press(key)
        assert page.locator("#reviews").inner_text() == "1 accepted, 1 rejected"
        page.locator("[title=kite] .review").get_by_label("2 stars").click()
        page.select_option("select[name=verdict]", "accept")
        assert page.locator("#cards h2").all_inner_texts() == ["boat-1"]
        page.select_option("select[name=verdict]", "")
        page.locator("[title=boat-1] .open").focus()
        keys.press("n")
        with page.expect_response("**/rows.json"):
            keys.type("aru1" + NOTE)  # letters that are keys elsewhere
        assert page.locator("#note").input_value() == "aru1" + NOTE
        keys.press("Enter")
        assert page.locator("dialog h2").inner_text() == "boat-1"
        keys.press("c")
        assert page.locator("dialog .mark").all_inner_texts() == ["accepted ★★★★", "rejected"]
        assert problems(page, "dialog[open]") == []
        keys.press("r")
        keys.press("ArrowRight")
        assert page.locator("figure[aria-current=true]").inner_text() == "boat-2\nrejected"
        keys.press("u")  # the verdict
        keys.press("u")  # the note
        assert page.locator("#note").input_value() == ""
        keys.press("c")
        for _ in range(3):
            keys.press("ArrowRight")
        keys.press("a")
        assert "ball is accepted. It is the last clip." in page.locator("dialog .message").inner_text()
        keys.press("Escape")
        page.wait_for_selector("#reviews[aria-busy=false]")
        for _ in range(2):  # the second one was asked for after the reviews were stored
            page.wait_for_event("response", lambda response: response.url.endswith("rows.json"))
        assert page.evaluate("document.activeElement.closest('article').title") == "ball"
        assert reviews(out) == {
            "boat-1": ("accept", 4, None),
            "boat-2": ("reject", None, None),
            "kite": (None, 2, None),
            "ball": ("accept", None, None),
        }
    with page_in(browser, 390, 844) as page:
        page.goto(write_gallery(out).as_uri())
        page.locator("[title=kite] .note").click()
        page.locator("#note").fill(NOTE)
        page.locator("#review").get_by_label("Reject").click()
        page.reload()
        assert page.locator("#reviews").inner_text() == "2 accepted, 2 rejected"
        assert page.locator("[title=kite] .note").get_attribute("title") == NOTE
        with page.expect_download() as saved:
            page.get_by_role("button", name="Save reviews").click()
        saved.value.save_as(tmp_path / "saved.json")
    given = json.loads((tmp_path / "saved.json").read_text())
    (tmp_path / "saved.json").write_text(json.dumps([*given, {**given[0], "clip_sha256": "f" * 64}]))
    for numbers in ((1, 0, 1), (0, 1, 1)):
        assert main(["review", str(out), str(tmp_path / "saved.json"), "--reviewer", "bo", "--json"]) == 1
        assert tuple(json.loads(capsys.readouterr().out).values()) == numbers
    assert reviews(out)["kite"] == ("reject", 2, NOTE)
    assert {each.id: each.who for each in read_reviews(storage_at(out)).values()}["kite"] == "bo"
    by_id = [{"id": "kite", "verdict": "accept"}, {"id": "unknown", "stars": 1}, {"id": "strange", "stars": 1}]
    (tmp_path / "saved.json").write_text(json.dumps(by_id))
    for numbers in ((1, 0, 2), (0, 1, 2)):
        assert main(["review", str(out), str(tmp_path / "saved.json"), "--json"]) == 1
        assert tuple(json.loads(capsys.readouterr().out).values()) == numbers
    assert reviews(out)["kite"] == ("accept", None, None)
    (tmp_path / "saved.json").write_text("not JSON")
    assert main(["review", str(out), str(tmp_path / "saved.json")]) == 2
    assert "saved.json: is not JSON" in capsys.readouterr().err
    (tmp_path / "saved.json").write_text(json.dumps([{**given[0], "stars": 6}]))
    assert main(["review", str(out), str(tmp_path / "saved.json")]) == 2
    assert "0.stars: must be less than or equal to 5; must be a file that the gallery has saved" in capsys.readouterr().err


def test_reviews_are_kept_while_the_server_does_not_answer(browser, out):
    with page_in(browser, 800, 600) as page, watched(out, "ada") as url:
        page.goto(url)
        page.route("**/reviews", lambda route: route.abort())
        page.locator("[title=boat-1] .open").focus()
        page.keyboard.press("a")
        page.wait_for_function("document.querySelector('.message').textContent.startsWith('Not stored yet')")
        page.unroute("**/reviews")
        page.keyboard.press("a")
        page.wait_for_selector("#reviews[aria-busy=false]")
        assert page.locator("#reviews").inner_text() == "2 accepted, 0 rejected"
    assert {id_: verdict for id_, (verdict, *_) in reviews(out).items()} == {"boat-1": "accept", "boat-2": "accept"}
