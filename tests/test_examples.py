"""Scripts in examples/ run as documented, with the tiny weights."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq

from tests.conftest import ASTRONAUT, EXAMPLES
from tests.online.directors import listening_on_a_port, local_server
from vidgen_ray.online.server_settings import OnlineSettings


def test_ray_data_pipeline_writes_clips_and_a_table(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    photo = str(EXAMPLES / "faces" / "astronaut.jpg")
    ideas = [
        {"id": "boat", "subject": "red boat", "place": "by the sea", "photo": None},
        {"id": "astronaut", "subject": "person", "place": "in the snow", "photo": photo},
        {"id": "missing", "subject": "person", "place": "in the snow", "photo": str(tmp_path / "missing.png")},
    ]
    pq.write_table(pyarrow.Table.from_pylist(ideas), out / "ideas.parquet")
    command = [sys.executable, EXAMPLES / "ray_data_pipeline.py", "--profile", "tiny", "--out", out]
    # A Ray of its own, even if a cluster runs on this machine.
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "RAY_ADDRESS": "local"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)

    clips = {row["id"]: row for row in pq.read_table(out / "clips.parquet").to_pylist()}
    assert set(clips) == {"boat", "astronaut"}
    for clip in clips.values():
        assert (clip["frames"], clip["width"], clip["height"]) == (8, 256, 128)
        assert Path(clip["clip"]).is_relative_to(out)
        assert Path(clip["clip"]).stat().st_size > 0
        assert clip["brightness"] > 0
    manifest = {row["id"]: row for row in pq.read_table(out / "manifest").to_pylist()}
    assert {name: row["status"] for name, row in manifest.items()} == {"boat": "done", "astronaut": "done", "missing": "failed"}
    assert "missing.png" in manifest["missing"]["failure_message"]
    assert '"missing"' in (out / "failures.jsonl").read_text()


def test_client_renders_and_downloads_prompts(tiny, tmp_path):
    settings = OnlineSettings(profile="tiny", data=str(tmp_path / "data"))
    with local_server(tiny, settings) as server, listening_on_a_port(server.app) as url:
        command = [sys.executable, EXAMPLES / "client.py", "a boat", "fail", "--photo", ASTRONAUT, "--out", tmp_path / "clips"]
        environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "VIDGEN_URL": url}
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    (clip,) = (tmp_path / "clips").iterdir()
    assert f"{clip.stem} completed 100%" in run.stdout
    assert "'fail': " in run.stdout
    assert run.stdout.splitlines()[-2:] == [str(clip), "failed"]
