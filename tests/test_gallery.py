"""The gallery: what it shows of a run, in a browser, from disk and live."""

import json
from importlib.util import find_spec

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from tests.browser import browser_page
from tests.film.conftest import Shots
from vidgen_ray.cli.app import main
from vidgen_ray.dataset.tables import open_tables, run_query
from vidgen_ray.errors import SetupError
from vidgen_ray.media import Mp4Settings, Mp4Writer, write_png
from vidgen_ray.outputs.manifest import SCHEMA
from vidgen_ray.outputs.storage import LocalStorage
from vidgen_ray.report.gallery_page import gallery_app, gallery_rows, page_of, write_gallery

MANY = 10_000


def row(shot_id, line, **columns):
    return {
        "run": "r",
        "script": "s.yaml",
        "id": shot_id,
        "line": line,
        "status": "done",
        "metadata": "{}",
        **columns,
    }


@pytest.fixture
def out(tmp_path):
    """An output folder with two finished shots and a failed one."""
    rows = [
        row("bad", 3, status="failed", prompt="a </script> man", failure_stage="instantid", failure_message="no face found")
    ]
    for number, shot_id in enumerate(("ada", "bo"), start=1):
        folder = tmp_path / "shots" / "ab" / shot_id
        folder.mkdir(parents=True)
        image = np.full((72, 128, 3), 40 * number, np.uint8)
        for name in ("image.png", "base.png"):
            write_png(folder / name, image)
        with Mp4Writer(folder / "video.mp4", 128, 72, 5, Mp4Settings()) as clip:
            clip.write(np.stack([image] * 3))
        shot = {
            "id": shot_id,
            "prompt": f"a portrait of {shot_id}",
            "lora": [{"path": f"/x/{shot_id}.safetensors", "weight": 1.0}],
            "steps": {"flux": 4, "lora": 6, "hunyuan": 8, "klein": None},
            "width": 128,
            "height": 64,
            "scale": 2,
            "fps": 5,
        }
        (folder / "shot.json").write_text(json.dumps({"shot": shot, "files": {"image.png": {}, "base.png": {}}}))
        files = {"image": f"shots/ab/{shot_id}/image.png", "video": f"shots/ab/{shot_id}/video.mp4"}
        likeness = {
            "image_likeness": 0.5,
            "clip_likeness_mean": 0.4,
            "clip_likeness_worst": 0.1 * number,
            "frames_without_face": 0,
        }
        size = {"width": 128, "height": 64, "num_frames": 3, "fps": 5, "duration_s": 0.6, "seconds": 1.0 * number}
        size |= {"cost": 0.004, "currency": "USD"} if shot_id == "ada" else {}
        metadata = json.dumps({"character": shot_id, "style": "noir"})
        rows.append(row(shot_id, number, prompt=shot["prompt"], metadata=metadata, **files, **likeness, **size))
    (tmp_path / "manifest").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "manifest" / "r-00001.parquet")
    failed = {"id": "bad", "prompt": "a </script> man", "failure": {"id": "bad", "script": "s.yaml", "stage": "instantid"}}
    (tmp_path / "failures.jsonl").write_text(json.dumps(failed) + "\n")
    return tmp_path


def cards(page):
    return page.locator("#cards h2").all_inner_texts()


def test_gallery_opens_from_disk_and_filters(out):
    page_file = write_gallery(out)
    assert sorted(path.name for path in (out / "thumbnails").rglob("*.webp")) == ["ada.webp", "bo.webp"]
    with browser_page(1366, 768) as page:
        page.goto(page_file.as_uri())
        assert cards(page) == ["bad", "ada", "bo"]
        assert page.locator("#counts").inner_text() == "2 done, 1 failed"
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


def test_detail_shows_clip_images_settings_and_reason(out):
    page_file = write_gallery(out)
    with browser_page(1366, 768) as page:
        page.goto(page_file.as_uri())
        page.hover("article >> nth=1")
        page.wait_for_function("document.querySelector('article video')?.readyState >= 2")
        page.click("article >> nth=0")
        assert page.locator("dialog dd.reason").inner_text() == "instantid: no face found"
        page.keyboard.press("ArrowRight")
        assert page.locator("dialog h2").inner_text() == "ada"
        assert page.locator("dialog figcaption").all_inner_texts() == ["base", "image"]
        page.wait_for_function("[...document.querySelectorAll('dialog .chain img')].every(image => image.naturalWidth === 128)")
        settings = dict(row.split("\n") for row in page.locator("dialog dl > div").all_inner_texts())
        assert settings["Likeness"] == "face 0.50, clip 0.40, worst 0.10"
        assert (settings["Length"], settings["Rendered in"], settings["Size"]) == ("0.6 s", "1 s", "256 × 128")
        assert (settings["LoRA"], settings["Steps"]) == ("ada, weight 1", "Base image 4, LoRA 6")
        page.click("text=Copy as script line")
        line = json.loads(page.locator("#line").input_value())
        assert (line["id"], line["prompt"], line["lora"][0]["path"]) == ("ada", "a portrait of ada", "/x/ada.safetensors")
        assert line["steps"] == {"flux": 4, "lora": 6, "hunyuan": 8}
        page.keyboard.press("Escape")
        assert page.locator("dialog[open]").count() == 0


def swept(number, seed, lora, scale, **columns):
    """Return the row of a shot of a matrix. Its number starts at 1."""
    matrix = {"seed": seed, "lora": f"runs/{lora}/lora.safetensors", "scale": scale}
    shot_id = f"a-very-long-name-of-a-boat-in-the-evening-sun-{seed}-{lora}-{scale}"
    metadata = json.dumps({"matrix": matrix, "matrix_number": number})
    digest = f"{number:064x}"
    return row(shot_id, 1, prompt="a boat", metadata=metadata, seconds=float(number), image_sha256=digest, **columns)


def test_matrix_is_shown_in_order_and_as_a_grid(tmp_path):
    shots = [(seed, lora, scale) for seed in (10, 2) for lora in ("wide", "base") for scale in (2, 4)]
    rows = [swept(number, *shot) for number, shot in enumerate(shots, start=1)]
    rows[0] |= {"frames_without_face": 0, "image_likeness": 0.5}
    rows[1] |= {"frames_without_face": 0, "image_likeness": 0.25}
    (tmp_path / "manifest").mkdir()
    pq.write_table(pa.Table.from_pylist(rows[::-1], schema=SCHEMA), tmp_path / "manifest" / "r-00001.parquet")
    page_file = write_gallery(tmp_path)
    with browser_page(1366, 768) as page:
        page.goto(page_file.as_uri())
        assert cards(page) == ["…2", "…4"] * 4
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
        if find_spec("axe_playwright_python"):
            from tests.online.web.test_accessibility import problems

            for key, number in (("a", 0), ("r", 1), ("4", 2)):
                page.locator("#grid .open").nth(number).focus()
                page.keyboard.press(key)
            # Names of files may be broken.
            assert [each for each in problems(page) if "inside a word" not in each] == []
        page.locator("#grid article").nth(3).click()
        assert page.locator("dialog h2").inner_text() == rows[3]["id"]


def test_only_files_of_a_matrix_have_short_names(tmp_path):
    axes = [{"prompt": f"a {size} ball, f/{size}.jpg", "face_image": f"faces/{size}.png"} for size in "12"]
    rows = [row(f"a-{n}", 1, metadata=json.dumps({"matrix": each})) for n, each in enumerate(axes)]
    (tmp_path / "manifest").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "manifest" / "r-00001.parquet")
    shown = [each["axes"] for each in gallery_rows(LocalStorage(tmp_path)).rows]
    assert shown == [{"prompt": f"a {size} ball, f/{size}.jpg", "face_image": size} for size in "12"]


def test_shots_of_a_line_that_differ_only_in_their_seed_are_siblings(tmp_path):
    shots = [(seed, lora, "boat") for lora in ("wide", "base") for seed in (1, 2)] + [(1, "wide", "kite")]
    rows = []
    for number, (seed, lora, prompt) in enumerate([*shots, (1, "free", "kite"), (2, "free", "kite")]):
        metadata = json.dumps({"matrix": {"seed": seed, "lora": lora}, "choices": {"boat|kite": prompt}})
        files = {"image": "a/image.png", "image_sha256": f"{number:064x}"}
        line = None if lora == "free" else 1
        rows.append(row(f"{prompt}-{lora}-{seed}", line, prompt=prompt, metadata=metadata, **files))
    (tmp_path / "manifest").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "manifest" / "r-00001.parquet")
    storage = LocalStorage(tmp_path)
    siblings = {each["id"]: each.get("siblings") for each in gallery_rows(storage).rows}
    alone = dict.fromkeys(["kite-wide-1", "kite-free-1", "kite-free-2"])
    assert siblings == {"boat-base-1": 0, "boat-base-2": 0, "boat-wide-1": 1, "boat-wide-2": 1, **alone}
    with open_tables(storage) as database:
        groups = (
            run_query(database, "SELECT list(id ORDER BY id) AS ids FROM clips GROUP BY siblings").read_all()["ids"].to_pylist()
        )
    assert sorted(groups) == sorted(
        [["boat-base-1", "boat-base-2"], ["boat-wide-1", "boat-wide-2"], *([each] for each in alone)]
    )


def test_gallery_links_the_films_of_the_folder(tmp_path):
    shots = Shots(tmp_path / "out")
    shots.add("a")
    page_file = write_gallery(shots.root)
    with browser_page(1366, 768) as page:
        page.goto(page_file.as_uri())
        assert page.locator("#films a").count() == 0
        for name in ("film.mp4", "a 2nd cut.mp4"):
            assert main(["film", str(shots.root), "-o", str(shots.root / name)]) == 0
        page.reload()
        assert page.locator("#films a").all_inner_texts() == ["a 2nd cut.mp4", "film.mp4"]
        assert page.locator("#films a").first.get_attribute("href") == "a%202nd%20cut.mp4"
    client = TestClient(gallery_app(shots.root))
    assert client.get("/a%202nd%20cut.mp4").content == (shots.root / "a 2nd cut.mp4").read_bytes()
    assert client.get("/run.json").status_code == 404


def test_ten_thousand_shots_keep_the_page_small(tmp_path):
    rows = [{"id": f"shot-{n}", "status": "done", "prompt": f"a ball {n}", "script": "s", "line": n} for n in range(MANY)]
    (tmp_path / "index.html").write_text(page_of({"rows": rows, "counts": {"done": MANY}, "total": MANY, "films": []}))
    with browser_page(1366, 768) as page:
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
    assert ["Cost", "0.004 USD"] in shown["ada"]["settings"]
    assert [shown[name]["facts"][3:] for name in ("ada", "bo")] == [["cost 0.004 USD"], []]
    pq.write_table(pa.Table.from_pylist([row("new", 4)], schema=SCHEMA), out / "manifest" / "s-00001.parquet")
    assert {each["id"] for each in client.get("/rows.json").json()["rows"]} == {"ada", "bo", "bad", "new"}
    clip = client.get("/shots/ab/ada/video.mp4", headers={"Range": "bytes=0-9"})
    assert (clip.status_code, len(clip.content)) == (206, 10)
    for path in ("/jobs.db", "/shots/../jobs.db", "/shots/%2e%2e/jobs.db", "/manifest/r-00001.parquet", "/shots/ab"):
        assert client.get(path).status_code == 404, path
    with pytest.raises(SetupError, match="no such folder"):
        gallery_app(out / "gone")


def test_status_lists_what_stands_out(out, capsys):
    assert main(["status", str(out), "--json"]) == 0
    status = json.loads(capsys.readouterr().out)
    assert status["counts"] == {"done": 2, "failed": 1}
    assert [(each["stage"], each["count"], each["line"]) for each in status["failures"]] == [("instantid", 1, 3)]
    assert [shot["id"] for shot in status["slowest"]] == ["bo", "ada"]
    assert [(shot["id"], shot["value"]) for shot in status["least_alike"]] == [("ada", 0.1), ("bo", 0.2)]
    assert main(["status", str(out)]) == 0
    text = capsys.readouterr().out
    assert "2 done, 1 failed" in text
    assert "3 s of work; 0 bytes of images and clips" in text
    assert "s.yaml line 3" in text
    assert main(["status", str(out / "gone")]) == 4
