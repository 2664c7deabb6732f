"""`vidgen render --to`: a script as a batch of a server, its clips and manifest, and batches of the client."""

import asyncio
import json

import pytest

from tests.conftest import ASTRONAUT
from tests.online.directors import listening_on_a_port, local_server
from vidgen_client import Client, script_batch
from vidgen_ray.cli import main
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import iter_script


@pytest.fixture
def server(tiny, tmp_path):
    with local_server(tiny, OnlineSettings(profile="tiny", data=str(tmp_path / "server"))) as running:
        yield running


@pytest.fixture
def url(server):
    with listening_on_a_port(server.app) as url:
        yield url


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_script_is_rendered_by_a_server_with_the_content_keys_of_a_run_here(server, url, tiny, tmp_path, capsys, monkeypatch):
    script, out = tmp_path / "s.jsonl", tmp_path / "out"
    face = {"face_image": str(ASTRONAUT), "consent": {"subject": "Ada", "basis": "written"}}
    lines = [{"prompt": f"a boat {n}", "num_frames": 2, "variants": 1 + n % 2} for n in range(3)]
    script.write_text("".join(json.dumps(each) + "\n" for each in [*lines, {"prompt": "a", **face}, {"prompt": "x", "fps": 0}]))
    monkeypatch.setattr(script_batch.AsyncClient, "wait_for_batch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(render_to(url, [{"id": "a", "prompt": "a", "num_frames": 2}], out))
    monkeypatch.undo()
    assert asyncio.run(render_to(url, [], out)) == (1, 0), "the batch is resumed"
    assert main(["render", str(script), "--to", url, "--out", str(out), "--json"]) == 1
    printed = capsys.readouterr()
    assert json.loads(printed.out.splitlines()[-1]) == {"done": 5, "failed": 1}
    assert "s.jsonl line 5, fps: got 0" in printed.err
    found = {row["id"]: server.store.get(row["video"]["id"], None).key for row in rows(out / "manifest.jsonl")}
    settings = ScriptSettings(script, profile_defaults=tiny.defaults)
    shots = [shot for line in iter_script(settings) if not line.errors for shot in line.shots]
    assert {shot.id: server.serving_profile.plan(shot).key for shot in shots}.items() <= found.items()
    assert all((out / row["file"]).stat().st_size for row in rows(out / "manifest.jsonl"))
    rendered = len(server.director.rendered)
    (out / "errors.jsonl").unlink()
    assert main(["render", str(script), "--to", url, "--out", str(out)]) == 1
    assert len(server.store.batches.list("local", None, 9)) == 2, "finished lines are not sent again"
    assert len(server.director.rendered) == rendered
    assert main(["render", str(script), "--to", "http://127.0.0.1:9", "--out", str(tmp_path / "other")]) == 4


async def render_to(url, shots, out):
    async with script_batch.AsyncClient(url) as client:
        return await script_batch.render_to(client, shots, out, print)


async def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_client_follows_and_cancels_batches(server, url):
    server.director.held.set()
    body = {"prompt": "a boat", "num_frames": 2}
    content = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/videos", "body": body}).encode()
    with Client(url) as client:
        first, second = (client.create_batch(client.upload_batch(content)) for _ in range(2))
        assert {each.id for each in client.list_batches()} == {first.id, second.id}
        assert not client.cancel_batch(first).is_final
        server.director.held.clear()
        states = []
        assert client.wait_for_batch(second, on_progress=states.append).status == "completed"
        assert states[-1].request_counts.completed == 1
        output, errors = client.batch_results(states[-1])
        assert (output[0]["custom_id"], errors) == ("a", [])
        assert client.wait_for_batch(first).status == "cancelled"
        assert client.batch_results(client.get_batch(first))[1][0]["error"]["code"] == "batch_cancelled"
