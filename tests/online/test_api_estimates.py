"""Estimates of the API: what a job would take, without creating it."""

import pytest

from tests.online.directors import local_server
from tests.online.test_api_videos import ended, error_of
from vidgen_ray.online.server_settings import OnlineSettings

SHOT = {"prompt": "a man", "width": 64, "height": 64, "num_frames": 4, "scale": 2, "seed": 1}
PRICE_PER_HOUR = 3.6


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    """Server whose upscaler runs on a GPU, so the profile says."""
    upscaler = tiny.actors["realesrgan"].model_copy(update={"device": "cuda"})
    profile = tiny.model_copy(update={"actors": {**tiny.actors, "realesrgan": upscaler}})
    folder = tmp_path_factory.mktemp("server")
    settings = OnlineSettings(profile="tiny", data=str(folder), gpu_hour_price=PRICE_PER_HOUR)
    with local_server(profile, settings) as running:
        yield running


def estimate(client, route="shots", **fields):
    response = client.post(f"/v1/{route}/estimate", json=fields)
    assert response.status_code == 200, response.text
    return response.json()


def test_estimate_of_a_shot_creates_nothing(server, client):
    answer = estimate(client, **SHOT)
    assert (answer["size"], answer["model_size"], answer["scale"]) == ("128x128", "64x64", 2)
    assert (answer["num_frames"], answer["results"], answer["is_rendered"]) == (4, 1, False)
    extended = estimate(client, **SHOT, extend=2)
    assert extended["num_frames"] == 10
    assert extended["stage_durations"]["svd"] == pytest.approx(3 * answer["stage_durations"]["svd"], rel=0.01)
    assert next(iter(answer["stage_durations"])) == "flux"
    assert answer["render_s"] > 0
    assert answer["render_s"] == pytest.approx(sum(answer["stage_durations"].values()), abs=0.01)
    assert server.store.list("local").jobs == []


def test_cost_is_that_of_the_stages_on_gpus(client):
    answer = estimate(client, **SHOT)
    assert answer["gpu_seconds"] == answer["stage_durations"]["realesrgan"] > 0
    assert answer["cost"] == pytest.approx(answer["gpu_seconds"] * PRICE_PER_HOUR / 3600, abs=1e-6)
    image = estimate(client, **{**SHOT, "generate_video": False})
    assert (image["gpu_seconds"], image["cost"], image["size"]) == (0, 0, "64x64")


def test_completed_video_has_the_cost_of_its_stages_on_gpus(client):
    video = client.post("/v1/videos", json={"prompt": "a man", "size": "250x130", "num_frames": 4}).json()
    assert video["cost"] is None
    done = ended(client, video["id"])
    assert done["cost"] == pytest.approx(done["stage_durations"]["realesrgan"] * PRICE_PER_HOUR / 3600, abs=1e-6)


def test_estimate_of_a_video_resolves_its_size_and_counts_all_results(client):
    body = {"prompt": "a man", "size": "250x130", "num_frames": 4}
    one, three = estimate(client, "videos", **body), estimate(client, "videos", **body, n=3)
    assert (one["size"], three["results"]) == ("250x130", 3)
    assert three["render_s"] == pytest.approx(3 * one["render_s"], rel=0.01)


def test_queue_is_part_of_the_estimate(server, client):
    assert estimate(client, **SHOT)["queue_wait_s"] == 0
    server.director.held.set()
    job = client.post("/v1/shots", json={**SHOT, "seed": 2}).json()
    # The snapshot of the queue is a second old at most.
    server_estimator = client.app.state.server.queue_estimator
    server_estimator._snapshot = None
    waiting = estimate(client, **SHOT)
    assert waiting["queue_position"] == 1
    assert waiting["queue_wait_s"] > 0
    server.director.held.clear()
    server.director.wake()
    ended(client, job["id"])


def test_rendered_shot_takes_no_time(client):
    job = client.post("/v1/shots", json={**SHOT, "seed": 3}).json()
    ended(client, job["id"])
    answer = estimate(client, **{**SHOT, "seed": 3})
    assert (answer["is_rendered"], answer["render_s"], answer["queue_wait_s"], answer["cost"]) == (True, 0, 0, 0)


def test_invalid_requests_are_refused_as_when_creating_the_job(client):
    assert error_of(client.post("/v1/shots/estimate", json={**SHOT, "fps": 0}), 400)["param"] == "fps"
    assert error_of(client.post("/v1/videos/estimate", json={"prompt": "a", "size": "9x9"}), 400)["param"] == "size"
    assert error_of(client.post("/v1/shots/estimate", data={"prompt": "a"}), 415)["code"] == "unsupported_media_type"
