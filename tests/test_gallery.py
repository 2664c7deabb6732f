"""The gallery: what it shows of a run, in a browser, from disk and live, and reviews in it."""

import json
import math
import shutil
from importlib.util import find_spec

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from tests.browser import page_in, running_browser
from tests.dataset.conftest import make_folder, texture, write_scores
from tests.online.directors import listening_on_a_port
from vidgen_ray.cli.app import run_command
from vidgen_ray.dataset.tables import open_tables, run_query
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.manifest import SCHEMA
from vidgen_ray.outputs.records import LikenessRecord, shot_path
from vidgen_ray.outputs.reviews import read_reviews, reviewable_clips
from vidgen_ray.outputs.storage import LocalStorage, storage_at
from vidgen_ray.report import gallery_page
from vidgen_ray.report.gallery_page import gallery_app, gallery_rows, page_of, write_gallery
from vidgen_ray.system.quantities import size

MANY = 10_000


@pytest.fixture(scope="module")
def browser():
    with running_browser() as browser:
        yield browser


def problems(page, part="html"):
    """Return the violations of accessibility rules, none without the tool."""
    if not find_spec("axe_playwright_python"):
        return []
    from tests.online.web.test_accessibility import problems

    return problems(page, part)


def row(shot_id, line, **columns):
    return {"run": "r", "script": "s.yaml", "id": shot_id, "line": line, "status": "done", "metadata": "{}", **columns}


def write_rows(out, rows):
    (out / "manifest").mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), out / "manifest" / "r-00001.parquet")


@pytest.fixture
def out(tmp_path):
    """An output folder with two finished shots, a failed one and two films."""
    shots = []
    for number, shot_id in enumerate(("ada", "bo"), start=1):
        fields = {
            "id": shot_id,
            "prompt": f"a portrait of {shot_id}",
            "lora": [{"path": f"/x/{shot_id}.safetensors"}],
            "steps": {"flux": 4, "lora": 6, "hunyuan": 8},
            "upscale_video": True,
            "scale": 2,
            "fps": 5,
            "seconds": 1.0 * number,
            "likeness": LikenessRecord(image=0.5, clip_mean=0.4, clip_worst=0.1 * number, frames_without_face=0),
            "metadata": {"character": shot_id, "style": "noir"},
        }
        shots.append((fields, np.random.default_rng(number).integers(0, 256, (3, 64, 128, 3), np.uint8)))
    make_folder(tmp_path, [*shots, ({"id": "bad", "prompt": "a </script> man"}, None)], "s.yaml")
    for record in tmp_path.glob("shots/*/*/shot.json"):
        shutil.copy(record.with_name("image.png"), record.with_name("base.png"))
        content = json.loads(record.read_text())
        record.write_text(json.dumps(content | {"files": content["files"] | {"base.png": {}}}))
    for name in ("film.mp4", "a 2nd cut.mp4"):
        (tmp_path / name).write_bytes(b"film")
    return tmp_path


def cards(page):
    return page.locator("#cards h2").all_inner_texts()


def test_gallery_opens_from_disk_filters_and_shows_details(browser, out):
    page_file = write_gallery(out)
    assert sorted(path.name for path in (out / "thumbnails").rglob("*.webp")) == ["ada.webp", "bo.webp"]
    with page_in(browser, 1366, 768) as page:
        page.goto(page_file.as_uri())
        assert cards(page) == ["bad", "ada", "bo"]
        assert page.locator("#counts").inner_text() == "2 done, 1 failed"
        assert page.locator("#films a").all_inner_texts() == ["a 2nd cut.mp4", "film.mp4"]
        assert page.locator("#films a").first.get_attribute("href") == "a%202nd%20cut.mp4"
        page.select_option("select[name=lora]", "bo")
        assert cards(page) == ["bo"]
        page.select_option("select[name=lora]", "")
        page.fill("input[name=likeness]", "0.15")
        assert cards(page) == ["ada"]
        page.fill("input[name=likeness]", "")
        page.select_option("select[name=sort]", "slow")
        assert cards(page)[0] == "bo"
        page.fill("input[name=text]", "portrait ada")
        assert (cards(page), page.locator("#shown").inner_text()) == (["ada"], "1 of 3")

        page.reload()
        page.hover("article >> nth=1")
        page.wait_for_function("document.querySelector('article video')?.readyState >= 2")
        page.click("article >> nth=0")
        assert page.locator("dialog dd.reason").inner_text() == "svd: out of memory"
        page.keyboard.press("ArrowRight")
        assert page.locator("dialog h2").inner_text() == "ada"
        assert page.locator("dialog figcaption").all_inner_texts() == ["base", "image"]
        page.wait_for_function("[...document.querySelectorAll('dialog .chain img')].every(image => image.naturalWidth === 128)")
        settings = dict(row.split("\n") for row in page.locator("dialog dl > div").all_inner_texts())
        assert settings["Likeness at rendering"] == "face 0.50, clip 0.40, worst 0.10"
        assert (settings["Length"], settings["Rendered in"], settings["Size"]) == ("0.6 s", "1 s", "256 × 128")
        assert (settings["LoRA"], settings["Steps"]) == ("ada, weight 1", "Base image 4, LoRA 6")
        page.click("text=Copy as script line")
        line = json.loads(page.locator("#line").input_value())
        assert (line["id"], line["prompt"], line["lora"][0]["path"]) == ("ada", "a portrait of ada", "/x/ada.safetensors")
        assert line["steps"] == {"flux": 4, "lora": 6, "hunyuan": 8}
        page.keyboard.press("Escape")
        assert page.locator("dialog[open]").count() == 0


def test_any_score_can_be_sorted_by_and_is_shown(browser, out):
    storage = storage_at(out)
    clips = {shot_id: digest for digest, shot_id in reviewable_clips(storage).items()}
    digests = [clips["ada"], clips["bo"]]
    write_scores(storage, "old@1", {"clip_sha256": digests, "motion": [0.5, 0.1], "phash": [[1], [2]]})
    write_scores(storage, "old@2", {"clip_sha256": digests, "motion": [0.123412, 12.5], "cuts": [0, 0], "is_cut": [True, None]})
    write_scores(
        storage, "other@1", {"clip_sha256": [clips["bo"], "f" * 64], "likeness": [0.25, 0.75], "likeness_worst": [0.2, 0.3]}
    )
    write_scores(storage, "other@1", {"clip_sha256": [clips["ada"]], "likeness_worst": [0.5]}, "2")
    (out / "scores/other@1/3.parquet").write_bytes(b"damaged")
    write_scores(storage, "foreign@1", {"clip_sha256": digests, "loss": [math.nan, math.inf]})
    write_scores(storage, "foreign@1", {"clip": digests, "loss": [1.0, 2.0]}, "2")
    data = gallery_page.gallery_data(storage)
    assert (data["scores"], [row.get("scores") for row in data["rows"]]) == (
        ["likeness_worst", "motion"],
        [None, [0.5, 0.1234], [0.2, 12.5]],
    )
    page_file = write_gallery(out)
    with page_in(browser, 1366, 768) as page:
        page.goto(page_file.as_uri())
        page.select_option("select[name=sort]", label="motion")
        # The failed shot has none.
        assert cards(page) == ["ada", "bo", "bad"]
        assert page.locator("article strong").all_inner_texts() == ["motion 0.123", "motion 12.5"]
        page.check("input[name=reversed]")
        assert cards(page) == ["bo", "ada", "bad"]
        page.select_option("select[name=sort]", "script")
        assert cards(page) == ["bo", "ada", "bad"]
        page.click("article >> nth=1")
        settings = dict(row.split("\n") for row in page.locator("dialog dl > div").all_inner_texts())
        assert settings["Scores"] == "likeness worst 0.5, motion 0.123"


def swept(number, seed, lora, scale, **columns):
    """Return the row of a shot of a matrix. Its number starts at 1."""
    matrix = {"seed": seed, "lora": f"runs/{lora}/lora.safetensors", "scale": scale}
    shot_id = f"a-very-long-name-of-a-boat-in-the-evening-sun-{seed}-{lora}-{scale}"
    metadata = json.dumps({"matrix": matrix, "matrix_number": number})
    digest = f"{number:064x}"
    return row(shot_id, 1, prompt="a boat", metadata=metadata, seconds=float(number), image_sha256=digest, **columns)


def test_matrix_is_shown_in_order_and_as_a_grid(browser, tmp_path):
    shots = [(seed, lora, scale) for seed in (10, 2) for lora in ("wide", "base") for scale in (2, 4)]
    rows = [swept(number, *shot) for number, shot in enumerate(shots, start=1)]
    rows[0] |= {"frames_without_face": 0, "image_likeness": 0.5}
    rows[1] |= {"frames_without_face": 0, "image_likeness": 0.25}
    rows[2] |= {"frames_without_face": 1}
    write_rows(tmp_path, rows[::-1])
    page_file = write_gallery(tmp_path)
    with page_in(browser, 1366, 768) as page:
        page.goto(page_file.as_uri())
        assert cards(page) == ["…2", "…4"] * 4
        page.check("input[name=faceless]")
        assert page.locator("#shown").inner_text() == "1 of 8"
        assert "no face found" in page.locator("article").inner_text()
        page.uncheck("input[name=faceless]")
        assert page.locator("#cards .facts").nth(0).inner_text().split("\n") == ["seed 10", "LoRA wide/lora", "scale 2"]
        page.select_option("select[name=columns]", "seed")
        assert page.locator("#grid td article").count() == 8
        page.select_option("select[name=rows]", "lora")
        page.select_option("select[name='axis:scale']", "4")
        headings = [heading.split("\n") for heading in page.locator("#grid th").all_inner_texts()]
        assert [heading[0] for heading in headings] == ["seed 2", "seed 10", "LoRA wide/lora", "LoRA base/lora"]
        # Means of the second and fourth shot, and of the second and sixth one.
        assert "rendered in 3 s" in headings[1]
        assert "rendered in 4 s" in headings[2]
        page.select_option("select[name='axis:scale']", "")
        assert "likeness 0.38" in page.locator("#grid th").nth(1).inner_text()
        page.select_option("select[name='axis:scale']", "4")
        for key, number in (("a", 0), ("r", 1), ("4", 2)):
            page.locator("#grid .open").nth(number).focus()
            page.keyboard.press(key)
        # Names of files may be broken.
        assert [each for each in problems(page) if "inside a word" not in each] == []
        page.locator("#grid article").nth(3).click()
        assert page.locator("dialog h2").inner_text() == rows[3]["id"]


def test_failures_are_kept_if_there_are_too_many_shots(out):
    rows, counts, _ = gallery_rows(LocalStorage(out), limit=2)
    assert ([each["id"] for each in rows], counts) == (["bad", "ada"], {"done": 2, "failed": 1})
    assert "3 shots" in write_gallery(out).read_text()


def test_shots_of_a_line_that_differ_only_in_their_seed_are_siblings(tmp_path):
    shots = [(seed, lora, "boat") for lora in ("wide", "base") for seed in (1, 2)] + [(1, "wide", "kite")]
    rows = []
    for number, (seed, lora, prompt) in enumerate([*shots, (1, "free", "kite"), (2, "free", "kite")]):
        metadata = json.dumps({"matrix": {"seed": seed, "lora": lora}, "choices": {"boat|kite": prompt}})
        files = {"image": "a/image.png", "image_sha256": f"{number:064x}"}
        line = None if lora == "free" else 1
        rows.append(row(f"{prompt}-{lora}-{seed}", line, prompt=prompt, metadata=metadata, **files))
    write_rows(tmp_path, rows)
    storage = LocalStorage(tmp_path)
    siblings = {each["id"]: each.get("siblings") for each in gallery_rows(storage).rows}
    alone = dict.fromkeys(["kite-wide-1", "kite-free-1", "kite-free-2"])
    assert siblings == {"boat-base-1": 0, "boat-base-2": 0, "boat-wide-1": 1, "boat-wide-2": 1, **alone}
    with open_tables(storage) as database:
        groups = run_query(database, "SELECT list(id ORDER BY id) AS ids FROM clips GROUP BY siblings").read_all()
    expected = [["boat-base-1", "boat-base-2"], ["boat-wide-1", "boat-wide-2"], *([each] for each in alone)]
    assert sorted(groups["ids"].to_pylist()) == sorted(expected)


def test_ten_thousand_shots_keep_the_page_small(browser, tmp_path):
    rows = [{"id": f"shot-{n}", "status": "done", "prompt": f"a ball {n}", "script": "s", "line": n} for n in range(MANY)]
    (tmp_path / "index.html").write_text(
        page_of({"rows": rows, "counts": {"done": MANY}, "total": MANY, "scores": [], "films": []})
    )
    with page_in(browser, 1366, 768) as page:
        page.goto((tmp_path / "index.html").as_uri())
        page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        page.wait_for_selector(f"text=shot-{MANY - 1}")
        assert page.locator("article").count() < 60
        page.fill("input[name=text]", "ball 77")
        assert page.locator("#shown").inner_text() == "280 of 10,000"


def test_watch_serves_new_rows_and_nothing_beside_the_shots(out):
    (out / "jobs.db").write_text("secret")
    client = TestClient(gallery_app(out))
    assert 'name="generator"' in client.get("/").text
    shown = {each["id"]: each for each in client.get("/rows.json").json()["rows"]}
    assert len(shown) == 3
    assert shown["ada"]["facts"][3:] == []
    write_rows(out, [row("new", 4, cost=0.004, currency="USD")])
    shown = {each["id"]: each for each in client.get("/rows.json").json()["rows"]}
    assert shown.keys() == {"ada", "bo", "bad", "new"}
    assert ["Cost", "0.004 USD"] in shown["new"]["settings"]
    assert shown["new"]["facts"][-1] == "cost 0.004 USD"
    clip = client.get(f"/{shot_path('ada')}/video.mp4", headers={"Range": "bytes=0-9"})
    assert (clip.status_code, len(clip.content)) == (206, 10)
    assert client.get("/a%202nd%20cut.mp4").content == b"film"
    folder = shot_path("ada").rpartition("/")[0]
    for path in ("jobs.db", "shots/../jobs.db", "shots/%2e%2e/jobs.db", "manifest/r-00001.parquet", folder, "run.json"):
        assert client.get(f"/{path}").status_code == 404, path
    with pytest.raises(SetupError, match="has no results"):
        gallery_app(out / "gone")


def test_status_lists_what_stands_out(out, capsys):
    assert run_command(["status", str(out), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["counts"] == {"done": 2, "failed": 1}
    assert [(each["stage"], each["count"], each["line"]) for each in status["failures"]] == [("svd", 1, 3)]
    assert [shot["id"] for shot in status["slowest"]] == ["bo", "ada"]
    assert [(shot["id"], shot["value"]) for shot in status["least_alike"]] == [("ada", 0.1), ("bo", 0.2)]
    assert run_command(["status", str(out)]) == 0
    text = capsys.readouterr().out
    assert "2 done, 1 failed" in text
    stored = sum(file.stat().st_size for name in ("image.png", "video.mp4") for file in out.glob(f"shots/*/*/{name}"))
    assert f"3 s of work, 3 s of it on GPUs; {size(stored)} of images and clips" in text
    assert "s.yaml line 3" in text
    assert run_command(["status", str(out / "gone")]) == 4


# Reviews: with the keyboard, by requests to `vidgen watch`, and in a page that was opened from a disk

NOTE = "« \"quoted\" 'twice' <b>שלום</b> 🎬"
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def reviewed(tmp_path):
    """A failed shot, two seeds of one prompt, and two shots of other prompts."""
    prompts = {"boat-1": "a boat", "boat-2": "a boat", "kite": "a kite", "ball": "a ball"}
    shots = [({"id": "bad"}, None)]
    for number, (id_, prompt) in enumerate(prompts.items()):
        shots.append(({"id": id_, "prompt": prompt, "seed": number}, texture(64, 64, seed=number)))
    make_folder(tmp_path, shots)
    return tmp_path


def reviews(reviewed):
    """Return id -> verdict, stars and note."""
    stored = read_reviews(storage_at(reviewed)).values()
    return {each.id: (each.verdict, each.stars, each.note) for each in stored}


def test_only_the_own_page_can_review_clips_of_this_folder(reviewed):
    clips = {shot_id: digest for digest, shot_id in reviewable_clips(storage_at(reviewed)).items()}
    host = "http://127.0.0.1:8001"
    client = TestClient(gallery_app(reviewed, "ada"), base_url=host)
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
    assert not (reviewed / "reviews").exists()

    assert post(Origin=host, **{"Sec-Fetch-Site": "same-origin"}) == 204
    # Another session has the last word, and both pages show it.
    other = TestClient(gallery_app(reviewed, "bo"), base_url="http://localhost:8002")
    assert other.post("/reviews", json={**review, "verdict": "accept", "note": NOTE}).status_code == 204
    for each in (client, other):
        (kite,) = (row for row in each.get("/rows.json").json()["rows"] if row["id"] == "kite")
        shown = {name: kite["review"][name] for name in ("verdict", "stars", "note", "who")}
        assert shown == {"verdict": "accept", "stars": None, "note": NOTE, "who": "bo"}
    assert "<b>" not in client.get("/").text
    (reviewed / "manifest").rename(reviewed / "gone")
    assert post({**review, "clip_sha256": clips["ball"]}) == 204, "known since the page was loaded"


def test_review_with_the_keyboard_and_in_a_file(browser, reviewed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gallery_page, "PAGE_REFRESH_S", 0.3)
    with listening_on_a_port(gallery_app(reviewed, "ada")) as url, page_in(browser, 1366, 768) as page:
        page.goto(url)
        keys = page.keyboard
        for key in ("ArrowRight", "ArrowRight", "4", "a", "r"):  # the first card is that of the failed shot
            keys.press(key)
        page.wait_for_selector("#reviews:text-is('1 accepted, 1 rejected')")
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
        assert reviews(reviewed) == {
            "boat-1": ("accept", 4, None),
            "boat-2": ("reject", None, None),
            "kite": (None, 2, None),
            "ball": ("accept", None, None),
        }
    with page_in(browser, 390, 844) as page:
        page.goto(write_gallery(reviewed).as_uri())
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
    by_id = [{"id": "ball", "verdict": "reject"}, {"id": "unknown", "stars": 1}]
    (tmp_path / "saved.json").write_text(json.dumps([given[0], {**given[0], "clip_sha256": "f" * 64}, *by_id]))
    for result in ((2, 0, ["kite", "unknown"]), (0, 2, ["kite", "unknown"])):
        assert run_command(["review", str(reviewed), str(tmp_path / "saved.json"), "--reviewer", "bo", "--json"]) == 1
        assert tuple(json.loads(capsys.readouterr().out).values()) == result
    assert run_command(["review", str(reviewed), str(tmp_path / "saved.json")]) == 1
    assert "2 reviews left out, of clips that the folder does not have (any more): kite, unknown" in capsys.readouterr().err
    assert reviews(reviewed)["kite"] == ("reject", 2, NOTE)
    assert reviews(reviewed)["ball"] == ("reject", None, None)
    assert {each.id: each.who for each in read_reviews(storage_at(reviewed)).values()}["kite"] == "bo"
    wrong = json.dumps([{**given[0], "stars": 6}])
    for content, message in (
        ("not JSON", "saved.json: is not JSON"),
        (wrong, "0.stars: must be less than or equal to 5; must be a file that the gallery has saved"),
    ):
        (tmp_path / "saved.json").write_text(content)
        assert run_command(["review", str(reviewed), str(tmp_path / "saved.json")]) == 2
        assert message in capsys.readouterr().err


def test_reviews_are_kept_while_the_server_does_not_answer(browser, reviewed):
    with page_in(browser, 800, 600) as page, listening_on_a_port(gallery_app(reviewed, "ada")) as url:
        page.goto(url)
        page.route("**/reviews", lambda route: route.abort())
        page.locator("[title=boat-1] .open").focus()
        page.keyboard.press("a")
        page.wait_for_function("document.querySelector('.message').textContent.startsWith('Not stored yet')")
        page.unroute("**/reviews")
        page.keyboard.press("a")
        page.wait_for_selector("#reviews[aria-busy=false]")
        assert page.locator("#reviews").inner_text() == "2 accepted, 0 rejected"
    assert {id_: verdict for id_, (verdict, *_) in reviews(reviewed).items()} == {"boat-1": "accept", "boat-2": "accept"}


def test_rows_that_are_older_than_a_stored_review_do_not_hide_it(browser, reviewed, monkeypatch):
    monkeypatch.setattr(gallery_page, "PAGE_REFRESH_S", 0.1)
    with page_in(browser, 800, 600) as page, listening_on_a_port(gallery_app(reviewed, "ada")) as url:
        older, posts, held = page.request.get(f"{url}/rows.json"), [], []
        page.route("**/reviews", lambda route: posts.append(route))
        page.route("**/rows.json", lambda route: held.append(route))
        page.goto(url)
        page.locator("[title=boat-1] .open").focus()
        page.keyboard.press("a")
        asked = len(held) + 1  # the next one may have been sent before the key was pressed
        while len(held) <= asked:
            page.wait_for_timeout(10)
        posts[0].continue_()
        page.wait_for_selector("#reviews[aria-busy=false]")
        with page.expect_event("requestfinished"):
            held[asked].fulfill(response=older)
        page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
        assert page.locator("#reviews").inner_text() == "1 accepted, 0 rejected"
