"""The worked example of CONTRIBUTING.md, executed."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.scratch import ROOT, ScratchProject
from vidgen_ray.outputs.records import shot_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = {"width": 64, "height": 64, "num_frames": 5, "scale": 2}


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A project with the stage of the worked example."""
    project = ScratchProject(tmp_path_factory.mktemp("colours") / "project")
    changed = project.apply_steps((ROOT / "CONTRIBUTING.md").read_text())
    assert changed == [
        "vidgen_ray/shot.py",
        "vidgen_ray/stages/colours.py",
        "vidgen_ray/graph.py",
        "vidgen_ray/profiles/tiny.yaml",
        "vidgen_ray/profiles/gpu-80gb.yaml",
    ]
    return project


def script(folder: Path, *lines: dict) -> str:
    path = folder / "script.jsonl"
    path.write_text("".join(json.dumps({"seed": 1, **SMALL, **line}) + "\n" for line in lines))
    return str(path)


def test_worked_example_passes_the_contract_tests(colours):
    colours.run("-m", "pytest", "-q", "tests/stages/test_contract.py", "-k", "colours or fields")


def test_worked_example_is_planned_and_rendered(colours, tmp_path):
    lines = script(tmp_path, {"id": "a", "prompt": "a red ball", "hold_colours": True}, {"id": "b", "prompt": "a red ball"})
    planned = colours.run("-m", "vidgen_ray", "plan", lines, "-p", "gpu-80gb", "--gpus", "8x80GB", "--json")
    assert json.loads(planned.stdout)
    colours.run("-m", "vidgen_ray", "render", lines, "-o", str(tmp_path / "out"), "-p", "tiny")
    records = {name: json.loads((tmp_path / "out" / shot_path(name) / "shot.json").read_text()) for name in "ab"}
    assert [step["stage"] for step in records["a"]["stages"]] == ["flux", "svd", "colours", "realesrgan"]
    assert [step["stage"] for step in records["b"]["stages"]] == ["flux", "svd", "realesrgan"]
    assert records["a"]["files"]["video.mp4"] != records["b"]["files"]["video.mp4"]


def test_worked_example_renders_an_online_job(colours, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vidgen_ray", "serve", "-p", "tiny", "--data", str(tmp_path), "--port", str(port)]
    log = (tmp_path / "log").open("wb")
    with subprocess.Popen(command, cwd=colours.folder, env=colours.environment, stdout=log, stderr=log) as server:
        try:
            url = f"http://127.0.0.1:{port}"
            transport = httpx.HTTPTransport(retries=60)
            with httpx.Client(base_url=url, transport=transport, timeout=60) as client:
                asked = client.post(
                    "/v1/videos", json={"prompt": "a red ball", "hold_colours": True, "size": "64x64", "num_frames": 4}
                )
                assert asked.status_code == 200, asked.text
                with client.stream("GET", f"/v1/videos/{asked.json()['id']}/events", timeout=240) as events:
                    text = "".join(events.iter_text())
                video = client.get(f"/v1/videos/{asked.json()['id']}").json()
        finally:
            server.terminate()
    assert video["status"] == "completed", video
    assert "colours" in text
