"""The worked example of CONTRIBUTING.md, executed, and a chunked stage that changes the number of frames."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.scratch import ROOT, ScratchProject
from vidgen_ray.cache_dir import sha256_of
from vidgen_ray.media import open_video
from vidgen_ray.outputs.paths import shot_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = {"width": 64, "height": 64, "num_frames": 5, "scale": 2}
DOUBLING = '''
"""Frame doubling by averaging neighbours: T frames become 2T - 1."""

from typing import Any, ClassVar

import numpy as np

from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import ChunkedStage, Frames, StageParams


class DoublingParams(StageParams):
    pass


class DoublingStage(ChunkedStage[DoublingParams]):
    name: ClassVar[str] = "doubling"
    label: ClassVar[str] = "Doubling"
    activity: ClassVar[str] = "Doubling frames"
    version: ClassVar[int] = 1
    actor: ClassVar[str] = "doubling"
    lookahead_frames: ClassVar[int] = 1
    reads: ClassVar[tuple[str, ...]] = ()
    clip_only_fields: ClassVar[tuple[str, ...]] = ("double_frames",)
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({"double_frames": True},)
    takes: ClassVar[tuple[str, ...]] = ("frames",)
    writes: ClassVar[tuple[str, ...]] = ("frames",)
    Params: ClassVar[type[StageParams]] = DoublingParams

    @staticmethod
    def applies(shot: Shot) -> bool:
        return shot.generate_video and shot.double_frames

    @classmethod
    def chunk_frames(cls, params: DoublingParams) -> int:
        return 3

    @staticmethod
    def frame_factor(shot: Shot) -> int:
        return 2

    def load(self) -> None:
        pass

    def process_chunk(self, shot: Shot, frames: Frames, lookahead: Frames) -> Frames:
        following = np.concatenate([frames[1:], lookahead])
        doubled = np.repeat(frames, 2, axis=0)[: len(frames) + len(following)]
        doubled[1::2] = ((frames[: len(following)].astype(int) + following) // 2).astype(np.uint8)
        return doubled
'''


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


@pytest.fixture(scope="module")
def doubling(tmp_path_factory):
    """A project with a frame-doubling stage before the upscaler."""
    project = ScratchProject(tmp_path_factory.mktemp("doubling") / "project")
    project.insert("vidgen_ray/shot.py", "    generate_video: bool", "    double_frames: bool = False\n")
    project.create("vidgen_ray/stages/doubling.py", DOUBLING)
    base = "from vidgen_ray.stages.base import ChunkedStage, Stage"
    project.insert("vidgen_ray/graph.py", base, "from vidgen_ray.stages.doubling import DoublingStage\n")
    project.insert("vidgen_ray/graph.py", "    ClipLikenessStage,", "    DoublingStage,\n")
    entry = '  doubling: {weights: "builtin:realesrgan", memory_gb: 0.1, cpus: 0.25}\n'
    project.insert("vidgen_ray/profiles/tiny.yaml", "actors:", entry)
    return project


def frames_of(path: Path) -> np.ndarray:
    with open_video(path) as video:
        return video.frames(0, video.frame_count)


def fps_of(path: Path) -> float:
    with open_video(path) as video:
        return float(video.fps)


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


def test_chunked_stage_changes_the_number_of_frames(doubling, tmp_path):
    line = {"prompt": "a red ball", "seed": 1, "fps": 5}
    lines = script(
        tmp_path,
        {**line, "id": "plain"},
        {**line, "id": "doubled", "double_frames": True},
        {**line, "id": "small", "double_frames": True, "upscale_video": False},
    )
    doubling.run("-m", "vidgen_ray", "render", lines, "-o", str(tmp_path / "ray"), "-p", "tiny")
    reference = (
        "import json, sys; from vidgen_ray.pipeline import VideoGenerationPipeline\n"
        "pipeline = VideoGenerationPipeline.from_profile('tiny', sys.argv[2])\n"
        "[pipeline.generate_video(**json.loads(line)) for line in open(sys.argv[1])]"
    )
    doubling.run("-c", reference, lines, str(tmp_path / "library"))
    shots = {name: tmp_path / "ray" / shot_path(name) for name in ("plain", "doubled", "small")}
    for name, files in {"plain": 3, "doubled": 3, "small": 2}.items():
        clips = sorted(file for file in shots[name].iterdir() if file.name != "shot.json")
        assert len(clips) == files
        assert [sha256_of(file) for file in clips] == [
            sha256_of(tmp_path / "library" / shot_path(name) / file.name) for file in clips
        ]
    plain, doubled, small = (frames_of(folder / "video.mp4") for folder in shots.values())
    assert (len(plain), len(doubled), len(small)) == (5, 9, 9)
    assert len(frames_of(shots["doubled"] / "hd.mp4")) == 9
    assert frames_of(shots["doubled"] / "hd.mp4").shape[1:3] == (128, 128)
    assert [fps_of(shots["doubled"] / name) for name in ("video.mp4", "hd.mp4")] == [10, 10]
    assert np.abs(doubled[::2].astype(int) - plain).mean() < 4, "every second frame is one of the undoubled clip"
    assert np.array_equal(doubled, small)
    doubling.run(
        "-m", "vidgen_ray", "stage", "doubling", str(shots["plain"] / "video.mp4"), "-o", str(tmp_path / "d.mp4"), "-p", "tiny"
    )
    assert len(frames_of(tmp_path / "d.mp4")) == 9
