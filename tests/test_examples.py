"""Scripts in examples/ run as documented, with the tiny weights."""

import asyncio
import runpy
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet as pq
import pytest
import ray

from tests.conftest import ASTRONAUT, EXAMPLES
from tests.fake_stages import FAKES
from tests.online.directors import listening_on_a_port, local_server
from vidgen_ray.online.server_settings import OnlineSettings


@pytest.mark.usefixtures("local_ray")
def test_ray_data_pipeline_writes_clips_and_a_table(tmp_path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    ideas = [
        {"id": "boat", "subject": "red boat", "place": "by the sea", "photo": None},
        {"id": "missing", "subject": "person", "place": "in the snow", "photo": str(tmp_path / "missing.png")},
    ]
    pq.write_table(pyarrow.Table.from_pylist(ideas), out / "ideas.parquet")
    monkeypatch.setattr(sys, "argv", ["ray_data_pipeline.py", "--profile", "tiny", "--out", str(out)])
    monkeypatch.setattr("vidgen_ray.batch.run_options.STAGE_BY_NAME", FAKES)
    # This process is connected.
    monkeypatch.setattr(ray, "init", lambda **_: None)
    runpy.run_path(str(EXAMPLES / "ray_data_pipeline.py"))["main"]()

    clips = {row["id"]: row for row in pq.read_table(out / "clips.parquet").to_pylist()}
    assert set(clips) == {"boat"}
    for clip in clips.values():
        assert (clip["frames"], clip["width"], clip["height"]) == (8, 256, 128)
        assert Path(clip["clip"]).is_relative_to(out)
        assert Path(clip["clip"]).stat().st_size > 0
        assert clip["brightness"] > 0
    manifest = {row["id"]: row for row in pq.read_table(out / "manifest").to_pylist()}
    assert {name: row["status"] for name, row in manifest.items()} == {"boat": "done", "missing": "failed"}
    assert "missing.png" in manifest["missing"]["failure_message"]
    assert '"missing"' in (out / "failures.jsonl").read_text()


def test_client_renders_and_downloads_prompts(tiny, tmp_path, monkeypatch, capsys):
    settings = OnlineSettings(profile="tiny", data=str(tmp_path / "data"))
    with local_server(tiny, settings) as server, listening_on_a_port(server.app) as url:
        arguments = ["client.py", "a boat", "fail", "--photo", str(ASTRONAUT), "--out", str(tmp_path / "clips")]
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.setenv("VIDGEN_URL", url)
        assert asyncio.run(runpy.run_path(str(EXAMPLES / "client.py"))["main"]()) == 1
    printed = capsys.readouterr().out
    (clip,) = (tmp_path / "clips").iterdir()
    assert f"{clip.stem} completed 100%" in printed
    assert "'fail': " in printed
    assert printed.splitlines()[-2:] == [str(clip), "failed"]
