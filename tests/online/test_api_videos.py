"""Video routes over HTTP: fields, errors, progress, cancellation and events."""

import json
import time

import pytest

from tests.conftest import ASTRONAUT
from tests.online.directors import local_server, noise_renderer
from vidgen_ray.engine.retries import Kind
from vidgen_ray.online import job_director
from vidgen_ray.online.job_service import plan_job
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.online.store.jobs import JobKind
from vidgen_ray.outputs.records import Failure
from vidgen_ray.script.check import check_shot

SMALL = {"prompt": "a man", "size": "64x64", "num_frames": 2, "upscale": False}


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    lora = folder / "ink.safetensors"
    lora.write_bytes(b"weights")
    settings = OnlineSettings(
        profile="tiny", data=str(folder / "out"), loras={"ink": str(lora)}, models={"sora-2": "tiny-fast"}
    )
    with local_server(tiny, settings, step_s=0.02) as running:
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
    by_json = client.post("/v1/videos", json=fields).json()
    by_form = client.post("/v1/videos", data={name: str(value) for name, value in fields.items()}).json()
    shots = [shot_of(client, video["id"]) for video in (by_json, by_form)]
    assert shots[0] == shots[1]
    assert (shots[0]["num_frames"], shots[0]["mode"]) == (10, "fast")
    assert shots[0]["guidance"] == {"flux": 2.5, "klein": 2.5, "remote_image": 2.5}


def test_vllm_omni_field_names(client, held):
    video = made(client, num_inference_steps=9, negative_prompt="blur", lora='{"name": "ink", "scale": 0.5}', fps=4, seed=1)
    shot = shot_of(client, video["id"])
    assert (shot["steps"]["flux"], shot["steps"]["svd"], shot["negative_prompt"], shot["fps"]) == (9, 9, "blur", 4)
    assert shot["lora"] == [{"name": "ink", "scale": 0.5}]
    more = made(client, extra_params={"motion_bucket_id": 99, "steps": {"flux": 3}}, steps={"svd": 4})
    assert (shot_of(client, more["id"])["motion_bucket_id"], shot_of(client, more["id"])["steps"]["svd"]) == (99, 4)


def test_form_accepts_text_for_choices_of_numbers(client, held):
    response = client.post("/v1/videos", data={**SMALL, "upscale": "true", "scale": "2"})
    assert shot_of(client, response.json()["id"])["scale"] == 2
    assert error_of(client.post("/v1/videos", data={**SMALL, "scale": "5"}), 400)["param"] == "scale"


def test_form_brackets_make_a_mapping(client, held):
    response = client.post("/v1/videos", data={**SMALL, "lora[name]": "ink", "lora[scale]": "0.25"})
    assert shot_of(client, response.json()["id"])["lora"] == [{"name": "ink", "scale": 0.25}]
    grouped = client.post("/v1/videos", data={**SMALL, "loras[][name]": ["ink", "ink"]})
    assert error_of(grouped, 400)["code"] == "invalid_form"


def test_json_sent_as_a_form_is_rejected(client):
    head = {"content-type": "application/x-www-form-urlencoded"}
    error = error_of(client.post("/v1/videos", content=b'{"prompt": "x"}', headers=head), 400)
    assert (error["code"], "Send application/json" in error["message"]) == ("invalid_form", True)


def test_style_sets_the_restyle_fields(client, held):
    shot = shot_of(client, made(client, style="watercolour")["id"])
    assert (shot["use_hunyuan_style"], shot["style_prompt"]) == (True, "watercolour")
    for fast in ({"mode": "fast"}, {"model": "tiny-fast"}):
        response = client.post("/v1/videos", json={**SMALL, "style": "watercolour", **fast})
        assert error_of(response, 400)["param"] == "style"


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


def test_video_lora_names_an_expert(client, held):
    lora = {"name": "ink", "scale": 0.5, "expert": "low"}
    video = made(client, video_model="wan", num_frames=9, video_lora=[lora])
    assert shot_of(client, video["id"])["video_lora"] == [lora]
    wrong = client.post("/v1/videos", json={**SMALL, "lora": [lora]})
    assert error_of(wrong, 400)["code"] == "unknown_parameter"
    missing = client.post("/v1/videos", json={**SMALL, "video_lora": "other"})
    assert error_of(missing, 404)["param"] == "video_lora"


def test_licences_are_returned_with_the_video(client, held):
    video = made(client, video_model="wan", num_frames=9)
    assert [each["weights"] for each in video["licences"]] == ["builtin:tiny/flux", "builtin:tiny/wan"]
    assert {each["commercial_use"] for each in video["licences"]} == {"yes"}


def test_model_alias(client, held):
    video = made(client, model="sora-2")
    assert (video["model"], shot_of(client, video["id"])["mode"]) == ("sora-2", "fast")
    other = made(client, model="sora-2-pro")
    assert (other["model"], shot_of(client, other["id"])["mode"]) == ("sora-2-pro", "quality")
    assert error_of(client.post("/v1/videos", json={**SMALL, "model": "sora-9"}), 404)["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "param", "code", "message"),
    [
        ({"prompt": None}, "prompt", "missing_required_parameter", "required"),
        ({"prompt": " "}, "prompt", "invalid_value", "blank"),
        ({"size": "101x100"}, "size", "invalid_size", "nearest: 100x100"),
        ({"size": "4096x64"}, "size", "invalid_size", "nearest: 2048x64"),
        ({"size": "big"}, "size", "invalid_value", "WIDTHxHEIGHT"),
        ({"width": 100}, "width", "invalid_value", "size says 64"),
        ({"size": None, "width": "70"}, "height", "missing_required_parameter", "required together with width"),
        ({"size": None, "width": 7, "height": 64}, "size", "invalid_size", "even numbers from 64 to 2048"),
        ({"seconds": "0"}, "seconds", "invalid_value", "from 0.4 to 51.2"),
        ({"seconds": "NaN"}, "seconds", "invalid_value", "finite number"),
        ({"seconds": 9}, "num_frames", "invalid_value", "seconds says 45"),
        ({"num_frames": 1}, "num_frames", "invalid_value", "2"),
        ({"seed": -2}, "seed", "invalid_value", "from -1 to 4294967295"),
        ({"seed": []}, "seed", "invalid_value", "1 to 10 seeds"),
        ({"seed": [1, 2], "n": 3}, "seed", "invalid_value", "2 seeds for 3 results"),
        ({"n": 11}, "n", "invalid_value", "10"),
        ({"upscaling_scale": 8}, "upscaling_scale", "invalid_value", "2, 3 or 4"),
        ({"guidance_scale": 3, "guidance_scale_2": 4}, "guidance_scale_2", "invalid_value", "equal to guidance_scale"),
        ({"extra_body": {"gibberish": 1}}, "gibberish", "unknown_parameter", "see /openapi.json"),
        ({"extra_body": {"extra_body": {}}}, "extra_body", "invalid_value", "must not contain"),
        ({"video_params": {"codec": "av1"}}, "video_params.codec", "unknown_parameter", "no such field"),
        ({"crop_width": 64}, "crop_width", "unknown_parameter", "did you mean width"),
        ({"gibberish": 1}, "gibberish", "unknown_parameter", "see /openapi.json"),
        ({"image": "/etc/passwd"}, "image", "unknown_parameter", "an unknown field"),
        ({"input_reference": "/etc/passwd"}, "input_reference", "file_not_found", "uploaded"),
        ({"input_reference": {"path": "/etc/passwd"}}, "input_reference", "invalid_value", "file_id"),
        (
            {"input_reference": {"image_url": "http://localhost/x"}},
            "input_reference",
            "url_inputs_disabled",
            "does not fetch URLs",
        ),
        ({"face_image": ["file-" + "0" * 64]}, "face_image", "file_not_found", "uploaded"),
        ({"face_image": "../../x"}, "face_image", "file_not_found", "uploaded"),
        ({"character": "unknown"}, "character", "character_not_found", "unknown"),
        ({"lora": "/etc/passwd"}, "lora", "lora_not_found", "must be one of ink"),
        ({"lora": {"lora_name": "no", "local_path": "/etc/passwd"}}, "lora", "lora_not_found", "must be one of ink"),
        ({"lora": {"name": "ink", "rank": 4}}, "lora", "unknown_parameter", "allowed are name and scale"),
        ({"lora": {"name": "ink", "scale": 1e9}}, "lora.weight", "invalid_value", "2"),
        ({"upscaler": "../../x"}, "upscaler", "invalid_value", "pattern"),
        ({"extra_params": {"image": "/etc/passwd"}}, "extra_params", "unknown_parameter", "image"),
        ({"extra_params": "{"}, "extra_params", "invalid_json", "JSON"),
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


def test_video_reports_progress_and_completes(client):
    video = made(client, prompt="to the end", seconds="0.4")
    done = ended(client, video["id"])
    assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None)
    assert done["stage_durations"]["flux"] == 0.5
    assert client.get(f"/v1/videos/{video['id']}").headers["openai-poll-after-ms"] == "1000"


def test_queued_video_reports_its_position_and_estimate(client, held):
    first, second = made(client, prompt="first"), made(client, prompt="second")
    positions = [client.get(f"/v1/videos/{video['id']}").json()["queue_position"] for video in (first, second)]
    assert positions[1] >= positions[0] >= 0
    assert second["eta_s"] > 0
    cancelled = client.post(f"/v1/videos/{first['id']}/cancel").json()
    assert (cancelled["queue_position"], cancelled["eta_s"]) == (None, None)


def test_failed_video_reports_its_error(client):
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


def test_video_continues_a_completed_one(client, server):
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


def test_only_completed_videos_can_be_continued(client, held):
    waiting = made(client, seed=2)["id"]
    for video_id, why in ((waiting, f"{waiting} is queued"), ("video_x", "there is no such video"), ("\0", "there is no such")):
        error = error_of(client.post("/v1/videos", json={**SMALL, "continue_from": video_id}), 400)
        assert error["param"] == "continue_from"
        assert why in error["message"]


def test_remix_keeps_omitted_fields(client, held):
    first = made(client, seed=4, style="ink", motion_bucket_id=50)
    second = client.post(f"/v1/videos/{first['id']}/remix", json={"prompt": "another", "seed": 5}).json()
    before, after = shot_of(client, first["id"]), shot_of(client, second["id"])
    assert after == {**before, "prompt": "another", "seed": 5}
    assert second["remixed_from_video_id"] == first["id"]


def test_remix_replaces_model_and_face(client, held):
    photo = client.post("/v1/files", files={"file": ("me.jpg", ASTRONAUT.read_bytes())}).json()["id"]
    first = made(client, model="tiny-fast", face_image=[photo])
    face = shot_of(client, first["id"])["face_image"]
    assert shot_of(client, first["id"])["mode"] == "fast"

    def remixed(**fields):
        response = client.post(f"/v1/videos/{first['id']}/remix", json=fields)
        assert response.status_code == 200, response.text
        return shot_of(client, response.json()["id"])

    assert (remixed(prompt="x")["mode"], remixed(prompt="x")["face_image"]) == ("fast", face)
    assert (remixed(model="tiny")["mode"], remixed(model="tiny")["face_image"]) == ("quality", face)
    assert "face_image" not in remixed(face_image=[])
    client.post("/v1/videos/characters", files={"image": ("me.jpg", ASTRONAUT.read_bytes())}, data={"name": "Eileen"})
    assert remixed(character="Eileen")["face_image"] == [photo]


def test_remix_accepts_files(client, held):
    first = made(client)
    files = {"input_reference": ("me.jpg", ASTRONAUT.read_bytes())}
    response = client.post(f"/v1/videos/{first['id']}/remix", data={"prompt": "x"}, files=files)
    assert shot_of(client, response.json()["id"])["image"].startswith("file-")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("videos", {"prompt": "x", "width": 10**400}, "width"),
        ("videos", {"prompt": "x", "metadata": {"a": "b" * 70_000}}, "metadata"),
        ("videos", {"prompt": "x", "face_image": ["file-1"] * 100}, "face_image"),
        ("images/edits", {"prompt": "x", "image": ["file-1"] * 100}, "image"),
        ("images/generations", {"prompt": "x", "x" * 1000: 1}, "x" * 100),
        ("images/generations", {"prompt": "x", "n": 2, "seed": 1e300}, "seed"),
    ],
)
def test_oversized_values_are_rejected(client, path, body, param):
    assert error_of(client.post(f"/v1/{path}", json=body), 400)["param"] == param


def test_errors_do_not_leak_server_paths(client, server):
    message = error_of(client.post("/v1/videos", json={**SMALL, "upscale": True, "upscaler": "nope"}), 400)["message"]
    assert "nope" in message
    assert "/" not in message
    failure = Failure(stage="flux", error="RuntimeError", message="/srv/data/cache/x.png: broken", attempts=1, worker="a")
    assert job_director.error_of(failure, Kind.ERROR).message == "flux: x.png: broken"
    full = Failure(stage="output", error="WriteError", message="/srv/x.png: cannot be written", attempts=3, worker="a")
    error = job_director.error_of(full, Kind.ERROR)
    assert (error.type, error.code) == ("server_error", "stage_failed")


def test_list_pages(client, held):
    ids = [made(client)["id"] for _ in range(3)]
    page = client.get("/v1/videos", params={"limit": 2}).json()
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", ids[2], ids[1], True)
    for invalid in ({"limit": 0}, {"limit": 101}, {"order": "best"}):
        assert error_of(client.get("/v1/videos", params=invalid), 400)["param"] == next(iter(invalid))
    assert error_of(client.get("/v1/videos", params={"after": "video_x"}), 404)["param"] == "after"


def test_list_does_not_contain_images(client, server):
    assert client.post("/v1/images/generations", json={"prompt": "x", "size": "64x64"}).status_code == 200
    assert all(video["id"].startswith("video_") for video in client.get("/v1/videos").json()["data"])
    assert server.store.list("local", kinds=[JobKind.IMAGE]).jobs


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


def test_responses_do_not_leak_server_paths(client, held, server):
    photo = {"file": ("me.jpg", ASTRONAUT.read_bytes(), "image/jpeg")}
    upload = client.post("/v1/files", files=photo).json()
    responses = [upload]
    video = made(client, face_image=[upload["id"]], lora="ink", input_reference={"file_id": upload["id"]})
    responses += [video, client.get(f"/v1/shots/{video['id']}").json()]
    assert server.settings.data not in json.dumps(responses)
    assert responses[-1]["shot"]["face_image"] == [upload["id"]]
    assert responses[-1]["shot"]["image"] == upload["id"]


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


@pytest.mark.parametrize(
    ("body", "kind", "status", "code"),
    [
        (b"", "application/json", 400, "invalid_json"),
        (b"[]", "application/json", 400, "invalid_json"),
        (b"\xff\xfe", "application/json", 400, "invalid_json"),
        (b"prompt=a", "", 415, "unsupported_media_type"),
        (b"--x\r\n\r\n", "multipart/form-data; boundary=x", 400, "invalid_request"),
        (b"", "multipart/form-data; boundary=x", 400, "missing_required_parameter"),
        (b"", "multipart/form-data", 400, "invalid_request"),
    ],
)
def test_malformed_body_is_rejected(client, body, kind, status, code):
    response = client.post("/v1/videos", content=body, headers={"content-type": kind})
    assert error_of(response, status)["code"] == code
