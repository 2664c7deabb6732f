"""Requests of released clients, written down from their source code, against the API.

The bodies have every field that the client sends, with its defaults, in the encoding that it uses.
"""

import asyncio
import io
import json
import threading
import time
from contextlib import closing
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.conftest import ASTRONAUT
from tests.decoded import frames_of
from tests.online.directors import listening_on_a_port, local_server
from tests.online.test_api_videos import ended, error_of, shot_of
from vidgen_ray.online.api.requests import PEER_FIELDS, CreateVideo
from vidgen_ray.online.api_error import ApiError
from vidgen_ray.online.server_settings import OnlineSettings

PHOTO = ASTRONAUT.read_bytes()


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    loras = {name: str(folder / f"{name}.safetensors") for name in ("ink", "oil")}
    for path in loras.values():
        Path(path).write_bytes(path.encode())
    limits = {"open_jobs": 1000}
    settings = OnlineSettings(profile="tiny", data=str(folder / "out"), wait_s=60, loras=loras, limits=limits, max_queued=1000)
    with local_server(tiny, settings, step_s=0.01) as running:
        yield running


def form(**fields: str) -> dict:
    """Return multipart fields, as aiohttp's FormData sends them."""
    return {name: (None, value) for name, value in fields.items()}


def size_of(content: bytes) -> tuple[int, int]:
    _, height, width, _ = frames_of(content).shape
    return width, height


# ComfyUI-vLLM-Omni: apps/ComfyUI-vLLM-Omni/comfyui_vllm_omni of vllm-project/vllm-omni.
# nodes.py, VLLMOmniDiffusionSampling (sampling parameters with their defaults) and utils/api_client.py, generate_video.

COMFYUI_SAMPLING = {
    "n": "1",
    "num_inference_steps": "50",
    "guidance_scale": "7.5",
    "true_cfg_scale": "1.0",
    "vae_use_slicing": "False",
    "vae_use_tiling": "False",
}


def comfyui_video(**changes: str) -> dict:
    fields = {"model": "tiny", "prompt": "a cat", "width": "854", "height": "480", "num_frames": "3", "fps": "16"}
    return {**fields, "negative_prompt": "blur", **COMFYUI_SAMPLING, **changes}


def test_comfyui_image_to_video_with_a_lora_and_photos(client, held):
    lora = json.dumps({"name": "ink", "path": "/weights/ink", "scale": 0.7, "int_id": 3})
    files = {**form(**comfyui_video(lora=lora, seed="42")), "input_reference": ("image.png", PHOTO, "image/png")}
    video = client.post("/v1/videos", files=files).json()
    shot = shot_of(client, video["id"])
    assert (shot["lora"], shot["seed"], shot["steps"]["flux"]) == ([{"name": "ink", "scale": 0.7}], 42, 50)
    assert shot["image"].startswith("file-")
    references = [("input_references", (f"image_{number}.png", PHOTO, "image/png")) for number in (1, 2)]
    fields = [(name, (None, value)) for name, value in {"prompt": "she smiles", "size": "64x64"}.items()]
    video = client.post("/v1/videos", files=[*fields, *references]).json()
    assert len(shot_of(client, video["id"])["face_image"]) == 2, "photos of the person"
    grey = io.BytesIO()
    Image.linear_gradient("L").save(grey, "PNG")
    without_face = client.post("/v1/videos", files=[*fields, ("input_references", ("a.png", grey.getvalue(), "image/png"))])
    assert error_of(without_face, 400)["code"] == "no_face"


def test_comfyui_images(client):
    sampling = {"n": 2, "num_inference_steps": 50, "guidance_scale": 7.5, "true_cfg_scale": 1.0}
    fields = {"model": "tiny", "prompt": "a cat", "size": "100x72", "response_format": "b64_json", "negative_prompt": "blur"}
    body = {**fields, **sampling, "vae_use_slicing": False, "vae_use_tiling": False}
    answer = client.post("/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    assert (len(answer.json()["data"]), answer.json()["size"]) == (2, "100x72")
    fields = {"model": "tiny", "prompt": "an oil painting", "size": "64x64", **COMFYUI_SAMPLING}
    answer = client.post("/v1/images/edits", files={**form(**fields), "image": ("image.png", PHOTO, "image/png")})
    assert answer.status_code == 200, answer.text


# vLLM-Omni: docs/serving/videos_api.md, and entrypoints/openai/protocol/videos.py with its defaults.


def test_vllm_omni_synchronous_video(client):
    fields = {"prompt": "a small robot", "width": "854", "height": "480", "num_frames": "2", "fps": "16"}
    answer = client.post("/v1/videos/sync", files=form(**fields))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "video/mp4")
    assert size_of(answer.content) == (854, 480)
    assert answer.headers["x-model"] == "tiny"
    assert float(answer.headers["x-inference-time-s"]) > 0
    assert client.get(f"/v1/videos/{answer.headers['x-request-id']}").json()["status"] == "completed"
    failed = client.post("/v1/videos/sync", json={"prompt": "fail", "size": "64x64", "num_frames": 2})
    assert error_of(failed, 500)["code"] == "stage_failed"
    several = error_of(client.post("/v1/videos/sync", json={"prompt": "a", "n": 2}), 400)
    assert (several["param"], "one file" in several["message"]) == ("n", True)


def test_vllm_omni_request_with_all_defaults(client, held):
    body = {
        "prompt": "a lake", "seconds": "2", "size": "832x480", "user": "me", "video_params": {"fps": 8, "num_frames": 16},
        "guidance_scale": 4.0, "guidance_scale_2": 4.0, "true_cfg_scale": 1.0, "boundary_ratio": 1.0, "seed": 7,
        "generate_sound": False, "enable_frame_interpolation": False, "frame_interpolation_exp": 1,
        "frame_interpolation_scale": 1.0, "num_outputs_per_prompt": 1, "return_stage_metrics": True,
        "quality": "default", "image_reference": None,
    }  # fmt: skip
    answer = client.post("/v1/videos", json=body)
    assert answer.status_code == 200, answer.text
    expected = {"size": "832x480", "fps": 8, "num_frames": 16, "seconds": "2", "user": "me"}
    assert answer.json().items() >= expected.items()


def test_vllm_omni_frame_interpolation(client, held):
    body = {"prompt": "a lake", "size": "64x64", "num_frames": 4, "fps": 6, "enable_frame_interpolation": True}
    for exponent, factor in (({}, 2), ({"frame_interpolation_exp": 2}, 4)):
        video = client.post("/v1/videos", json={**body, **exponent, "frame_interpolation_scale": 1.0})
        assert video.status_code == 200, video.text
        assert video.json().items() >= {"fps": 6 * factor, "num_frames": 4 * factor, "seconds": "0.666667"}.items()
        assert shot_of(client, video.json()["id"])["interpolation"] == factor
    for wrong in ({"interpolation": 8}, {"frame_interpolation_exp": 4}, {"frame_interpolation_model_path": "/x"}):
        error_of(client.post("/v1/videos", json={**body, **wrong}), 400)


def test_lora_objects_of_vllm_omni_and_sglang(client, server, held):
    oil = server.settings.loras["oil"]
    for lora in (
        {"name": "oil", "path": "/models/oil", "scale": 0.5},
        {"lora_name": "oil", "local_path": "/models/oil", "lora_scale": 0.5, "int_id": 1},
        {"adapter": "oil", "lora_path": "oil", "scale": 0.5, "lora_int_id": 1},
        {"lora_nickname": "oil", "lora_path": "oil", "strength": 0.5},
        {"lora_name": "mine", "local_path": oil, "scale": 0.5},
    ):
        video = client.post("/v1/videos", json={"prompt": "a", "size": "64x64", "lora": lora})
        assert video.status_code == 200, video.text
        assert shot_of(client, video.json()["id"])["lora"] == [{"name": "oil", "scale": 0.5}], lora
    two = error_of(client.post("/v1/videos", json={"prompt": "a", "lora": {"name": "ink", "path": oil}}), 400)
    assert "different LoRAs" in two["message"]


# SGLang: python/sglang/multimodal_gen/runtime/entrypoints/openai/protocol.py, VideoGenerationsRequest and its defaults;
# docs/diffusion/api/openai_api.md. Clients are curl and the openai package.

SGLANG_DEFAULTS = {
    **dict.fromkeys(("num_outputs_per_prompt", "fps", "num_frames", "seed", "width", "height", "negative_prompt", "model")),
    **dict.fromkeys(("frame_interpolation_model_path", "upscaling_model_path", "output_compression", "output_path")),
    **dict.fromkeys(("diffusers_kwargs", "perf_dump_path", "guidance_scale", "guidance_scale_2", "true_cfg_scale")),
    **dict.fromkeys(("input_reference", "reference_url", "num_inference_steps")),
    **dict.fromkeys(("enable_teacache", "enable_frame_interpolation", "enable_upscaling"), False),
    "n": 1, "seconds": 1, "size": "", "generator_device": "cuda", "output_quality": "default", "upscaling_scale": 4,
    "frame_interpolation_exp": 1, "frame_interpolation_scale": 1.0,
}  # fmt: skip


def test_sglang_request_with_all_defaults(client, held):
    answer = client.post("/v1/videos", json={"prompt": "a calico cat", **SGLANG_DEFAULTS})
    assert answer.status_code == 200, answer.text
    # `enable_upscaling` is false.
    assert (answer.json()["size"], answer.json()["scale"], answer.json()["num_frames"]) == ("128x64", 1, 5)
    extra = {"fps": 4, "num_frames": 8, "seconds": 4, "negative_prompt": "blur"}
    video = client.post("/v1/videos", json={"prompt": "a calico cat", "size": "1280x720", "extra_body": extra}).json()
    assert (video["size"], video["fps"], video["num_frames"]) == ("1280x720", 4, 8)
    assert shot_of(client, video["id"])["negative_prompt"] == "blur"
    in_a_form = client.post("/v1/videos", files=form(prompt="a", extra_body=json.dumps({"fps": 4, "num_frames": 8})))
    assert (in_a_form.json()["fps"], in_a_form.json()["num_frames"]) == (4, 8)


def test_sglang_upscaling_makes_a_larger_clip_beside(client):
    body = {"prompt": "a", "size": "100x64", "num_frames": 2, "enable_upscaling": True, "upscaling_scale": 3}
    video = ended(client, client.post("/v1/videos", json=body).json()["id"])
    assert video.items() >= {"size": "100x64", "model_size": "128x64", "scale": 3, "hd_size": "300x192"}.items()
    for variant, size in (("video", (100, 64)), ("hd", (300, 192)), ("sd", (100, 64))):
        content = client.get(f"/v1/videos/{video['id']}/content", params={"variant": variant}).content
        assert size_of(content) == size


def test_sglang_several_outputs_and_seeds(client):
    body = {"prompt": "a", "size": "64x64", "num_frames": 2, "num_outputs_per_prompt": 3, "n": 1, "seed": 5}
    first = client.post("/v1/videos", json=body).json()
    assert len(first["outputs"]) == 3
    assert first["outputs"][0] == first["id"]
    videos = [ended(client, video_id) for video_id in first["outputs"]]
    assert [video["seed"] for video in videos] == [5, 6, 7]
    contents = [client.get(f"/v1/videos/{video['id']}/content").content for video in videos]
    by_number = [client.get(f"/v1/videos/{first['id']}/content", params={"variant": number}).content for number in range(3)]
    assert by_number == contents
    assert error_of(client.get(f"/v1/videos/{first['id']}/content?variant=3"), 404)["code"] == "variant_not_found"
    listed = client.post("/v1/videos", json={"prompt": "a", "size": "64x64", "num_frames": 2, "seed": [9, -1]}).json()
    assert (listed["seed"], len(listed["outputs"])) == (9, 2)


def test_sglang_lists_models_and_loras(client):
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/models").json() == client.get("/v1/models").json()
    adapters = [{"nickname": name, "path": name} for name in ("ink", "oil")]
    assert client.get("/v1/list_loras").json() == {"loaded_adapters": adapters, "active": {}}
    assert [lora["id"] for lora in client.get("/v1/loras").json()["data"]] == ["ink", "oil"]


# Values that cannot be honoured.

OTHER_VALUES = {bool: True, str: "x", int: 3, float: 3.5, object: {"video_url": "https://example.com/a.mp4"}}


def test_peer_fields_accept_neutral_values_and_refuse_others_with_a_sentence():
    for peer in PEER_FIELDS:
        for neutral in (None, "", *(peer.neutral or ())):
            CreateVideo.parse({"prompt": "a", peer.name: neutral})
        other = {"prompt": "a", peer.name: OTHER_VALUES.get(peer.type, {"flow_shift": 5})}
        if peer.neutral is None:
            CreateVideo.parse(other)
            continue
        with pytest.raises(ApiError) as raised:
            CreateVideo.parse(other)
        assert raised.value.param == peer.name
        assert peer.why in raised.value.message


def job_with_prompt(server, prompt: str):
    return next((job for job in server.store.list("local", limit=100).jobs if job.shot.prompt == prompt), None)


def states_of(server, prompt: str):
    return {job.state for job in server.store.list("local", limit=100).jobs if job.shot.prompt == prompt}


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"key": "kept"}])
def test_aborted_image_request_is_cancelled_unless_it_has_an_idempotency_key(server, held, fields):
    key = fields.get("key")
    prompt = f"aborted {fields}"
    body = json.dumps({"prompt": prompt, "size": "64x64", "n": 2, "stream": "stream" in fields})
    headers = {"Content-Type": "application/json", **({"Idempotency-Key": key} if key else {})}
    with listening_on_a_port(server.app) as url:
        with closing(HTTPConnection(url.removeprefix("http://"))) as connection:
            connection.request("POST", "/v1/images/generations", body, headers)
            while job_with_prompt(server, prompt) is None:
                time.sleep(0.02)
            if "stream" in fields:
                connection.getresponse()
        while not key and states_of(server, prompt) != {"cancelled"}:
            time.sleep(0.02)
    # The server has ended all its requests.
    assert states_of(server, prompt) == {"queued" if key else "cancelled"}


@pytest.mark.parametrize("path", ["images/generations", "videos/sync"])
def test_request_that_is_aborted_while_its_job_is_stored_is_cancelled(server, held, monkeypatch, path):
    service, reached, released = server.app.state.server.job_service, threading.Event(), threading.Event()
    store, prompt = service._store_new, f"aborted while stored {path}"

    def store_late(*args):
        reached.set()
        assert released.wait(60)
        return store(*args)

    async def abort():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(server.app), base_url="http://127.0.0.1") as client:
            fields = {"prompt": prompt, "size": "64x64"}
            request = asyncio.ensure_future(client.post(f"/v1/{path}", json=fields, timeout=60))
            assert await asyncio.to_thread(reached.wait, 60)
            request.cancel()
            await asyncio.sleep(0)
            released.set()
            with pytest.raises(asyncio.CancelledError):
                await request

    monkeypatch.setattr(service, "_store_new", store_late)
    asyncio.run(abort())
    assert states_of(server, prompt) == {"cancelled"}


def test_synchronous_request_with_an_idempotency_key_waits_again_after_a_disconnect(server):
    body = json.dumps({"prompt": "with a key", "size": "64x64", "num_frames": 2})
    headers = {"Content-Type": "application/json", "Idempotency-Key": "k"}
    server.director.held.set()
    with listening_on_a_port(server.app) as url:
        with closing(HTTPConnection(url.removeprefix("http://"))) as connection:
            connection.request("POST", "/v1/videos/sync", body, headers)
            while job_with_prompt(server, "with a key") is None:
                time.sleep(0.02)
        server.director.held.clear()
        server.director.wake()
        answer = httpx.post(f"{url}/v1/videos/sync", content=body, headers=headers, timeout=60)
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == job_with_prompt(server, "with a key").id
