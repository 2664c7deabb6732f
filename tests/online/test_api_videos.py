"""Video routes over HTTP: fields, errors, progress, cancellation and events."""

import json
import time

import pytest
from starlette.testclient import TestClient

from tests.conftest import ASTRONAUT
from tests.online.directors import LOCAL, SMALL, local_server, noise_renderer
from vidgen_ray.engine.messages import Kind
from vidgen_ray.online import job_director
from vidgen_ray.online.job_service import plan_job
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.online.store.jobs import JobKind
from vidgen_ray.outputs.records import Failure
from vidgen_ray.script.check import check_shot

SHOT = {"prompt": "a shot", "width": 64, "height": 64, "num_frames": 4, "scale": 2, "seed": 1}
PRICE_PER_HOUR = 3.6


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    lora = folder / "ink.safetensors"
    lora.write_bytes(b"weights")
    # The price is that of the upscaler, which runs on a GPU, so the profile says.
    upscaler = tiny.actors["realesrgan"].model_copy(update={"device": "cuda"})
    profile = tiny.model_copy(update={"actors": {**tiny.actors, "realesrgan": upscaler}})
    models, loras = {"sora-2": "tiny-fast"}, {"ink": str(lora)}
    data = str(folder / "out")
    settings = OnlineSettings(profile="tiny", data=data, loras=loras, models=models, gpu_hour_price=PRICE_PER_HOUR)
    with local_server(profile, settings, step_s=0.02) as running:
        yield running


def made(client, **fields) -> dict:
    response = client.post("/v1/videos", json={**SMALL, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def ended(client, video_id: str) -> dict:
    until = time.monotonic() + 120
    while (video := client.get(f"/v1/videos/{video_id}").json())["status"] in ("queued", "in_progress"):
        assert time.monotonic() < until
        time.sleep(0.02)
    return video


def shot_of(client, job_id: str) -> dict:
    return client.get(f"/v1/shots/{job_id}").json()["shot"]


def error_of(response, status: int) -> dict:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]


def test_form_and_json_create_the_same_shot(client, held):
    fields = {"prompt": "a man", "size": "128x64", "seconds": "2", "seed": 3, "guidance_scale": 2.5, "mode": "fast"}
    by_json = client.post("/v1/videos", json={**fields, "lora": {"name": "ink", "scale": 0.25}}).json()
    by_json_in_form = client.post("/v1/videos", data={**SMALL, "metadata": '{"shop": 7}'}).json()
    assert shot_of(client, by_json_in_form["id"])["metadata"] == {"shop": 7}
    form = {name: str(value) for name, value in fields.items()}
    by_form = client.post("/v1/videos", data={**form, "lora[name]": "ink", "lora[scale]": "0.25"}).json()
    shots = [shot_of(client, video["id"]) for video in (by_json, by_form)]
    assert shots[0] == shots[1]
    assert (shots[0]["num_frames"], shots[0]["mode"]) == (10, "fast")
    assert shots[0]["guidance"] == {"flux": 2.5, "klein": 2.5, "remote_image": 2.5}
    chosen = client.post("/v1/videos", data={**SMALL, "upscale": "true", "scale": "2"})
    assert shot_of(client, chosen.json()["id"])["scale"] == 2, "a choice of numbers"
    assert error_of(client.post("/v1/videos", data={**SMALL, "scale": "5"}), 400)["param"] == "scale"
    grouped = client.post("/v1/videos", data={**SMALL, "loras[][name]": ["ink", "ink"]})
    assert error_of(grouped, 400)["code"] == "invalid_form"


def test_malformed_body_is_rejected(client):
    json_kind, multipart, urlencoded = "application/json", "multipart/form-data", "application/x-www-form-urlencoded"
    for body, kind, status, code in (
        (b"", json_kind, 400, "invalid_json"),
        (b"[]", json_kind, 400, "invalid_json"),
        (b"prompt=a", "", 415, "unsupported_media_type"),
        (b'{"prompt": "x"}', urlencoded, 400, "invalid_form"),
        (b"--x\r\n\r\n", f"{multipart}; boundary=x", 400, "invalid_request"),
        (b"", f"{multipart}; boundary=x", 400, "missing_required_parameter"),
        (b"", multipart, 400, "invalid_request"),
    ):
        response = client.post("/v1/videos", content=body, headers={"content-type": kind})
        assert error_of(response, status)["code"] == code, (body, kind)


def test_video_models_are_listed_and_choose_their_own_length(client, held):
    models = [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert {"tiny-wan", "tiny-ltx"} <= set(models)
    plain = {"prompt": "a man", "size": "64x64", "upscale": False}
    wan = client.post("/v1/videos", json={**plain, "model": "tiny-wan", "motion_prompt": "slow zoom"}).json()
    assert (wan["model"], wan["num_frames"], wan["fps"], wan["seconds"]) == ("tiny-wan", 81, 16, "5.0625")
    shot = shot_of(client, wan["id"])
    assert (shot["video_model"], shot["motion_prompt"]) == ("wan", "slow zoom")
    seconds = client.post("/v1/videos", json={**plain, "video_model": "ltx", "seconds": 2, "fps": 24}).json()
    assert seconds["num_frames"] == 49
    # Two passes of 73 frames, of which the second starts with the last frame of the first.
    extended = client.post("/v1/videos", json={**plain, "video_model": "ltx", "seconds": 6, "fps": 24, "extend": 1}).json()
    assert (extended["num_frames"], extended["seconds"]) == (145, "6.04167")
    assert shot_of(client, extended["id"])["num_frames"] == 73
    error = error_of(client.post("/v1/videos", json={**plain, "seconds": 1, "extend": 15}), 400)
    assert (error["param"], "in 16 passes" in error["message"]) == ("seconds", True)
    auto = client.post("/v1/videos", json={**plain, "video_model": "ltx", "num_frames": "auto"}).json()
    assert auto["num_frames"] == 121
    by_form = client.post("/v1/videos", data={**plain, "video_model": "wan", "num_frames": "9"}).json()
    assert (by_form["num_frames"], by_form["fps"]) == (9, 16)
    error = error_of(client.post("/v1/videos", json={**plain, "video_model": "wan", "num_frames": 8}), 400)
    assert (error["param"], "nearest: 5, 9" in error["message"]) == ("num_frames", True)
    # A remix with another video model has the length of that model.
    remix = client.post(f"/v1/videos/{wan['id']}/remix", json={"prompt": "a dog", "model": "tiny-ltx"}).json()
    assert (remix["num_frames"], remix["fps"]) == (121, 25)


def test_model_alias_and_style(client, held):
    video = made(client, model="sora-2")
    assert (video["model"], shot_of(client, video["id"])["mode"]) == ("sora-2", "fast")
    other = made(client, model="sora-2-pro", style="watercolour")
    shot = shot_of(client, other["id"])
    assert (other["model"], shot["mode"]) == ("sora-2-pro", "quality")
    assert (shot["use_hunyuan_style"], shot["style_prompt"]) == (True, "watercolour")
    for fast in ({"mode": "fast"}, {"model": "tiny-fast"}):
        response = client.post("/v1/videos", json={**SMALL, "style": "watercolour", **fast})
        assert error_of(response, 400)["param"] == "style"
    assert error_of(client.post("/v1/videos", json={**SMALL, "model": "sora-9"}), 404)["code"] == "model_not_found"


def test_video_lora_names_an_expert_and_licences_are_returned(client, held):
    lora = {"name": "ink", "scale": 0.5, "expert": "low"}
    video = made(client, video_model="wan", num_frames=9, video_lora=[lora])
    assert shot_of(client, video["id"])["video_lora"] == [lora]
    licences = {each["weights"]: each["commercial_use"] for each in video["licences"]}
    assert licences["builtin:tiny/flux"] == licences["builtin:tiny/wan"] == "yes"
    wrong = client.post("/v1/videos", json={**SMALL, "lora": [lora]})
    assert error_of(wrong, 400)["code"] == "unknown_parameter"
    missing = client.post("/v1/videos", json={**SMALL, "video_lora": "other"})
    assert error_of(missing, 404)["param"] == "video_lora"


@pytest.mark.parametrize(
    ("fields", "param", "code", "message"),
    [
        ({"prompt": None}, "prompt", "missing_required_parameter", "required"),
        ({"size": "101x100"}, "size", "invalid_size", "nearest: 100x100"),
        ({"size": "4096x64"}, "size", "invalid_size", "nearest: 2048x64"),
        ({"reference_url": "https://example.com/a.png"}, "reference_url", "url_inputs_disabled", "does not fetch URLs"),
        ({"width": 100}, "width", "invalid_value", "size says 64"),
        ({"size": None, "width": "70"}, "height", "missing_required_parameter", "required together with width"),
        ({"seconds": "0", "num_frames": None}, "seconds", "invalid_value", "from 0.4 to 51.2"),
        ({"num_frames": 1}, "num_frames", "invalid_value", "2"),
        ({"seed": -2}, "seed", "invalid_value", "from -1 to 4294967295"),
        ({"seed": [1, 2], "n": 3}, "seed", "invalid_value", "2 seeds for 3 results"),
        ({"n": 11}, "n", "invalid_value", "10"),
        ({"upscaling_scale": 8}, "upscaling_scale", "invalid_value", "2, 3 or 4"),
        ({"extra_body": {"gibberish": 1}}, "gibberish", "unknown_parameter", "see /openapi.json"),
        ({"extra_body": {"extra_body": {}}}, "extra_body", "invalid_value", "must not contain"),
        ({"video_params": {"codec": "av1"}}, "video_params.codec", "unknown_parameter", "no such field"),
        ({"size": None, "width": 10**400}, "width", "invalid_value", ""),
        ({"metadata": {"a": "b" * 70_000}}, "metadata", "too_large", "at most"),
        ({"face_image": ["file-1"] * 100}, "face_image", "invalid_value", "at most"),
        ({"crop_width": 64}, "crop_width", "unknown_parameter", "did you mean width"),
        ({"image": "/etc/passwd"}, "image", "unknown_parameter", "an unknown field"),
        ({"input_reference": "/etc/passwd"}, "input_reference", "file_not_found", "uploaded"),
        ({"input_reference": {"image_url": "http://localhost/x"}}, "input_reference", "url_inputs_disabled", "not fetch URLs"),
        ({"face_image": "../../x"}, "face_image", "file_not_found", "uploaded"),
        ({"character": "unknown"}, "character", "character_not_found", "unknown"),
        ({"lora": "/etc/passwd"}, "lora", "lora_not_found", "must be one of ink"),
        ({"lora": {"name": "ink", "rank": 4}}, "lora", "unknown_parameter", "allowed are name and scale"),
        ({"upscaler": "../../x"}, "upscaler", "invalid_value", "pattern"),
        ({"extra_params": {"image": "/etc/passwd"}}, "extra_params", "unknown_parameter", "image"),
        ({"steps": [1]}, "steps", "invalid_value", ""),
    ],
)
def test_invalid_field_is_named(client, held, fields, param, code, message):
    body = {name: value for name, value in {**SMALL, **fields}.items() if value is not None}
    status = 404 if code in ("model_not_found", "character_not_found", "lora_not_found") else 400
    error = error_of(client.post("/v1/videos", json=body), status)
    assert (error["param"], error["code"]) == (param, code), error
    assert message in error["message"]
    assert "Traceback" not in error["message"]


def test_completed_and_failed_videos_report_their_results(client):
    done = ended(client, made(client, prompt="to the end", seconds="0.4")["id"])
    assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None)
    assert done["stage_durations"]["flux"] == 0.5
    assert client.get(f"/v1/videos/{done['id']}").headers["openai-poll-after-ms"] == "1000"
    done = ended(client, made(client, prompt="fail")["id"])
    assert done["status"] == "failed"
    assert done["error"] == {
        "code": "stage_failed",
        "message": "flux: ValueError: the prompt asked for it",
        "type": "server_error",
        "param": None,
        "stage": "flux",
    }
    assert error_of(client.get(f"/v1/videos/{done['id']}/content"), 409)["code"] == "not_completed"


def test_cancel_of_queued_and_completed_videos(client, server):
    server.director.held.set()
    waiting = made(client, prompt="waits")
    cancelled = client.post(f"/v1/videos/{waiting['id']}/cancel").json()
    assert (cancelled["status"], cancelled["error"]["code"], cancelled["completed_at"]) == ("failed", "cancelled", None)
    assert client.get(f"/v1/videos/{waiting['id']}").json() == cancelled
    assert client.get(f"/v1/shots/{waiting['id']}").json()["status"] == "cancelled"
    server.director.held.clear()
    assert error_of(client.post("/v1/videos/video_x/cancel"), 404)["code"] == "video_not_found"
    done = ended(client, made(client, prompt="done")["id"])
    assert client.post(f"/v1/videos/{done['id']}/cancel").json()["status"] == "completed"


def test_shot_rendered_by_a_batch_run_is_completed_at_once(client, server, tiny):
    fields = {"prompt": "rendered before", "seed": 5, "width": 64, "height": 64, "num_frames": 2, "upscale_video": False}
    plan = server.serving_profile.plan(check_shot({**fields, "id": "mine"}, "script.jsonl", tiny.defaults))
    noise_renderer(tiny, server.outputs)(plan, lambda *_: None)
    video = made(client, prompt="rendered before", seed=5)
    assert (video["status"], video["progress"]) == ("completed", 100)
    assert client.get(f"/v1/videos/{video['id']}/content").status_code == 200


def test_videos_of_another_profile_are_served_and_remixed(tiny, tmp_path):
    settings = OnlineSettings(profile="tiny", data=str(tmp_path / "out"))
    with local_server(tiny, settings) as server, TestClient(server.app, **LOCAL) as client:
        video = ended(client, made(client, model="tiny-fast")["id"])
    with local_server(tiny.model_copy(update={"name": "other"}), settings) as server, TestClient(server.app, **LOCAL) as client:
        assert client.get(f"/v1/videos/{video['id']}/content").status_code == 200
        remix = client.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "a dog"})
        assert remix.status_code == 200, remix.text
        assert remix.json()["model"] == "other"
        assert shot_of(client, remix.json()["id"]).get("mode") == shot_of(client, made(client)["id"]).get("mode")


def test_video_continues_a_completed_one_only(client, server):
    first = ended(client, made(client, seed=1)["id"])
    second = made(client, prompt="goes on", continue_from=first["id"])
    for video in (second, ended(client, second["id"])):
        assert [each["weights"] for each in video["licences"]] == ["builtin:tiny/flux", "builtin:tiny/svd"]
    assert client.get(f"/v1/videos/{second['id']}").json()["status"] == "completed"
    job = server.store.get(second["id"], None)
    planned = plan_job(job, server.serving_profile, server.settings)
    assert [each.weights for each in planned.licences] == ["builtin:tiny/flux", "builtin:tiny/svd"]
    source, shot = (server.store.get(video["id"], None).shot for video in (first, second))
    last_frame = server.outputs.shot_folder(source.id) / "last_frame.png"
    assert shot.image == str(last_frame)
    assert shot_of(client, second["id"])["continue_from"] == first["id"]
    remix = client.post(f"/v1/videos/{second['id']}/remix", json={"prompt": "stops"})
    assert remix.status_code == 200, remix.text
    assert server.store.get(remix.json()["id"], None).shot.image == str(last_frame)
    server.director.held.set()
    waiting = made(client, seed=2)["id"]
    for video_id, why in ((waiting, f"{waiting} is queued"), ("video_x", "there is no such video"), ("\0", "there is no such")):
        error = error_of(client.post("/v1/videos", json={**SMALL, "continue_from": video_id}), 400)
        assert error["param"] == "continue_from"
        assert why in error["message"]
    server.director.held.clear()


def test_remix_keeps_omitted_fields(client, held):
    photo = client.post("/v1/files", files={"file": ("me.jpg", ASTRONAUT.read_bytes())}).json()["id"]
    first = made(client, seed=4, model="tiny-fast", face_image=[photo], motion_bucket_id=50)
    before = shot_of(client, first["id"])
    assert before["mode"] == "fast"

    def remixed(**request):
        response = client.post(f"/v1/videos/{first['id']}/remix", **request)
        assert response.status_code == 200, response.text
        assert response.json()["remixed_from_video_id"] == first["id"]
        return shot_of(client, response.json()["id"])

    assert remixed(json={"prompt": "another", "seed": 5}) == {**before, "prompt": "another", "seed": 5}
    other_model = remixed(json={"model": "tiny"})
    assert (other_model["mode"], other_model["face_image"]) == ("quality", before["face_image"])
    assert "face_image" not in remixed(json={"face_image": []})
    client.post("/v1/videos/characters", files={"image": ("me.jpg", ASTRONAUT.read_bytes())}, data={"name": "Eileen"})
    assert remixed(json={"character": "Eileen"})["face_image"] == [photo]
    start = {"input_reference": ("me.jpg", ASTRONAUT.read_bytes())}
    assert remixed(data={"prompt": "x"}, files=start)["image"].startswith("file-")


def test_list_has_pages_of_videos_only(client, server):
    assert client.post("/v1/images/generations", json={"prompt": "x", "size": "64x64"}).status_code == 200
    assert server.store.list("local", kinds=[JobKind.IMAGE]).jobs
    server.director.held.set()
    ids = [made(client)["id"] for _ in range(3)]
    page = client.get("/v1/videos", params={"limit": 2}).json()
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", ids[2], ids[1], True)
    assert all(video["id"].startswith("video_") for video in client.get("/v1/videos").json()["data"])
    for invalid in ({"limit": 0}, {"limit": 101}, {"order": "best"}):
        assert error_of(client.get("/v1/videos", params=invalid), 400)["param"] == next(iter(invalid))
    assert error_of(client.get("/v1/videos", params={"after": "video_x"}), 404)["param"] == "after"
    server.director.held.clear()


def test_responses_do_not_leak_server_paths(client, held, server):
    upload = client.post("/v1/files", files={"file": ("me.jpg", ASTRONAUT.read_bytes(), "image/jpeg")}).json()
    video = made(client, face_image=[upload["id"]], lora="ink", input_reference={"file_id": upload["id"]})
    shot = client.get(f"/v1/shots/{video['id']}").json()
    assert server.settings.data not in json.dumps([upload, video, shot])
    assert (shot["shot"]["face_image"], shot["shot"]["image"]) == ([upload["id"]], upload["id"])
    message = error_of(client.post("/v1/videos", json={**SMALL, "upscale": True, "upscaler": "nope"}), 400)["message"]
    assert ("nope" in message, "/" in message) == (True, False)
    for internal, shown in (
        ("/srv/data/cache/x.png: broken", "flux: x.png: broken"),
        ("http://10.0.0.5:8000: no response", "flux: a server: no response"),
        ("nothing at https://[::1]:80/v1/models (refused)", "flux: nothing at a server (refused)"),
    ):
        failure = Failure(stage="flux", error="RuntimeError", message=internal, attempts=1, worker="a")
        assert job_director.error_of(failure, Kind.ERROR).message == shown


def test_create_shot_accepts_script_fields(client, held):
    fields = {"prompt": "x", "width": 64, "height": 64, "svd.steps": 3, "metadata": {"scene": 4}, "min_identity": 0.2}
    shot = client.post("/v1/shots", json=fields).json()
    assert shot["id"].startswith("shot_")
    assert (shot["shot"]["steps"]["svd"], shot["shot"]["metadata"], shot["shot"]["min_identity"]) == (3, {"scene": 4}, 0.2)
    assert len(shot["digest"]) == 64
    again = client.post("/v1/shots", json=shot["shot"]).json()
    assert again["digest"] == shot["digest"]
    for field in ({"id": "x"}, {"variants": 2}):
        assert error_of(client.post("/v1/shots", json={**fields, **field}), 400)["code"] == "unknown_parameter"
    assert error_of(client.post("/v1/shots", data={"prompt": "x"}), 415)["code"] == "unsupported_media_type"


def events_of(client, job_id: str, **headers) -> list[dict]:
    text = client.get(f"/v1/videos/{job_id}/events", headers=headers).text
    blocks = [block.splitlines() for block in text.replace("\r", "").strip().split("\n\n")]
    events = [dict(line.split(": ", 1) for line in block) for block in blocks]
    return [event for event in events if "event" in event]


def test_events_until_completion(client):
    video = made(client, prompt="to follow")
    events = events_of(client, video["id"])
    names = [event["event"] for event in events]
    assert names[-1] == "video.completed"
    assert set(names[:-1]) <= {"video.queued", "video.in_progress"}
    assert [int(event["id"]) for event in events] == sorted({int(event["id"]) for event in events})
    last = json.loads(events[-1]["data"])
    assert (last["status"], last["progress"]) == ("completed", 100)
    # After a reconnect with the last event's id, the final event is sent again.
    again = events_of(client, video["id"], **{"Last-Event-ID": events[-1]["id"]})
    assert [event["event"] for event in again] == ["video.completed"]
    assert error_of(client.get("/v1/videos/video_x/events"), 404)["code"] == "video_not_found"


def estimate(client, route="shots", **fields):
    response = client.post(f"/v1/{route}/estimate", json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def test_estimate_of_size_seconds_and_cost_creates_nothing(server, client, monkeypatch):
    # Jobs of other tests may end between two estimates.
    monkeypatch.setattr("vidgen_ray.online.queue_estimate.SNAPSHOT_VALID_S", 1000)
    monkeypatch.setattr(client.app.state.server.queue_estimator, "_snapshot", None)
    monkeypatch.setattr(client.app.state.server.queue_estimator, "_valid_until", 0)
    answer = estimate(client, **SHOT)
    assert (answer["size"], answer["model_size"], answer["scale"]) == ("128x128", "64x64", 2)
    assert (answer["num_frames"], answer["results"], answer["is_rendered"]) == (4, 1, False)
    extended = estimate(client, **SHOT, extend=2)
    assert extended["num_frames"] == 10
    # Rounded to milliseconds.
    assert extended["stage_durations"]["svd"] == pytest.approx(3 * answer["stage_durations"]["svd"], abs=0.003)
    assert next(iter(answer["stage_durations"])) == "flux"
    assert answer["render_s"] > 0
    assert answer["render_s"] == pytest.approx(sum(answer["stage_durations"].values()), abs=0.01)
    assert answer["gpu_seconds"] == answer["stage_durations"]["realesrgan"] > 0
    assert answer["cost"] == pytest.approx(answer["gpu_seconds"] * PRICE_PER_HOUR / 3600, abs=1e-6)
    image = estimate(client, **{**SHOT, "generate_video": False})
    assert (image["gpu_seconds"], image["cost"], image["size"]) == (0, 0, "64x64")
    body = {"prompt": "a man", "size": "250x130", "num_frames": 4}
    one, three = estimate(client, "videos", **body), estimate(client, "videos", **body, n=3)
    assert (one["size"], three["results"]) == ("250x130", 3)
    assert three["render_s"] == pytest.approx(3 * one["render_s"], abs=0.05)
    assert "a shot" not in [job.shot.prompt for job in server.store.list("local", limit=100).jobs]


def test_queue_is_part_of_the_estimate_until_the_shot_is_rendered(server, client):
    server.director.held.set()
    body = {"prompt": "a shot", "size": "250x130", "num_frames": 4, "seed": 1}
    job = client.post("/v1/videos", json=body).json()
    assert job["cost"] is None
    # The snapshot of the queue is a second old at most.
    client.app.state.server.queue_estimator._snapshot = None
    waiting = estimate(client, **SHOT)
    assert waiting["queue_position"] == 1
    queued = client.get(f"/v1/videos/{made(client, seed=5)['id']}").json()
    assert queued["queue_position"] == 1
    assert queued["eta_s"] > 0
    cancelled = client.post(f"/v1/videos/{queued['id']}/cancel").json()
    assert (cancelled["queue_position"], cancelled["eta_s"]) == (None, None)
    assert waiting["queue_wait_s"] > 0
    server.director.held.clear()
    server.director.wake()
    done = ended(client, job["id"])
    assert done["cost"] == pytest.approx(done["stage_durations"]["realesrgan"] * PRICE_PER_HOUR / 3600, abs=1e-6)
    answer = estimate(client, "videos", **body)
    assert (answer["is_rendered"], answer["render_s"], answer["queue_wait_s"], answer["cost"]) == (True, 0, 0, 0)


def test_invalid_requests_are_refused_as_when_creating_the_job(client):
    assert error_of(client.post("/v1/shots/estimate", json={**SHOT, "fps": 0}), 400)["param"] == "fps"
    assert error_of(client.post("/v1/videos/estimate", json={"prompt": "a", "size": "9x9"}), 400)["param"] == "size"
    assert error_of(client.post("/v1/shots/estimate", data={"prompt": "a"}), 415)["code"] == "unsupported_media_type"
