"""A batch by OpenAI's client while processes of the server are killed: each line once, with the bytes of `vidgen render`."""

import hashlib
import json
import os
import signal
import socket
import time
from threading import Event

import pytest
import yaml

from tests.batch.test_batch import Events
from tests.online.on_serve.applications import POLL_S, scripted_profile
from tests.online.on_serve.test_processes import pid_of
from tests.online.scripted_stages import SCRIPTED
from vidgen_ray.batch.render_script import render_shots
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.online.server import serving
from vidgen_ray.online.server_plan import server_plan
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner.cluster import parse_gpus, this_machine
from vidgen_ray.profile import load_profile
from vidgen_ray.script.lines import ScriptSettings

PROCESSES = ("Api", "Director", "Worker", "Encoder")
SHOT = {"width": 64, "height": 64, "num_frames": 2, "upscale_video": False}


@pytest.mark.parametrize(
    ("n_lines", "n_kills"), [pytest.param(60, 4, marks=pytest.mark.slow), pytest.param(2000, 20, marks=pytest.mark.very_slow)]
)
@pytest.mark.timeout(7200)
def test_lines_are_rendered_once_with_the_bytes_of_a_run_while_processes_are_killed(
    tiny, tmp_path, local_ray, n_lines, n_kills
):
    openai = pytest.importorskip("openai")
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(scripted_profile(tiny).model_dump(mode="json")))
    settings = OnlineSettings(profile=str(tmp_path / "p.yaml"), data=str(tmp_path / "out"), gpus="2x80GB")
    shots = {f"shot-{n}": {"prompt": f"a boat {n}", "seed": n, **SHOT} for n in range(n_lines)}
    lines = [
        json.dumps({"custom_id": name, "method": "POST", "url": "/v1/shots", "body": body}) for name, body in shots.items()
    ]
    kills = []
    with (
        socket.create_server(("127.0.0.1", 0)) as bound,
        serving(server_plan(settings, this_machine), bound, SCRIPTED) as server,
    ):
        server.wait_until_accepting(Event())
        server.wait_until_ready(Event())
        client = openai.OpenAI(api_key="none", base_url=f"http://127.0.0.1:{bound.getsockname()[1]}/v1", max_retries=8)
        file = client.files.create(file=("lines.jsonl", "\n".join(lines).encode()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/shots", completion_window="24h")
        while batch.status in ("validating", "in_progress", "finalizing"):
            done = batch.request_counts.completed
            if len(kills) < n_kills and done >= (len(kills) + 0.5) * n_lines / n_kills:
                kills.append(PROCESSES[len(kills) % len(PROCESSES)])
                os.kill(pid_of(kills[-1]), signal.SIGKILL)
            time.sleep(POLL_S)
            batch = client.batches.retrieve(batch.id)
        assert (batch.status, batch.request_counts.completed, len(kills)) == ("completed", n_lines, n_kills)
        rows = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
        assert [row["custom_id"] for row in rows] == list(shots)
        assert batch.error_file_id is None
        answers = {row["custom_id"]: client.videos.download_content(row["response"]["body"]["id"]).content for row in rows}
    script = tmp_path / "s.jsonl"
    script.write_text("".join(json.dumps({"id": name, **body}) + "\n" for name, body in shots.items()))
    profile, outputs = load_profile(str(tmp_path / "p.yaml")), OutputFolder(tmp_path / "run")
    render_shots(
        ScriptSettings(script, profile_defaults=profile.defaults),
        profile,
        outputs,
        RenderOptions(cluster=parse_gpus("2x80GB"), stages=SCRIPTED),
        listener=Events(),
    )
    for name, content in answers.items():
        assert hashlib.sha256(content).digest() == hashlib.sha256(outputs.read(name, "video.mp4")).digest(), name
