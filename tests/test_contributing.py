"""The worked examples of CONTRIBUTING.md, executed."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from vidgen_ray.outputs.records import shot_path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = {"width": 64, "height": 64, "num_frames": 9, "fps": 25, "scale": 2}
LINES = (
    {"id": "new", "prompt": "a red ball", "video_model": "ltx95", "steps": {"ltx95": 2}, "guidance": {"ltx95": 2}},
    {"id": "plain", "prompt": "a red ball"},
    {"id": "guided", "prompt": "a red ball", "start_guidance": 3},
)
ROOT = Path(__file__).parents[1]
DOCUMENT = (ROOT / "CONTRIBUTING.md").read_text()
STEP = re.compile(r'<!-- (create|insert) (\S+)(?: after "([^\n]*?)")? -->\n```\w+\n(.*?)```', re.DOTALL)


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", DOCUMENT, re.DOTALL | re.MULTILINE)[1]


def copied_project(folder: Path) -> Path:
    folder.mkdir()
    for name in ("vidgen_ray", "tests", "examples", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def apply_steps(project: Path, document: str) -> list[str]:
    """Apply the marked code blocks of a document. Return the changed paths, each once."""
    steps = STEP.findall(document)
    for action, path, after, text in steps:
        file = project / path
        if action == "create":
            assert not file.exists(), f"{path} exists already"
            file.write_text(text)
            continue
        lines = file.read_text().splitlines(keepends=True)
        (number,) = [number for number, line in enumerate(lines) if line.startswith(after)]
        # Below a line that ends in ":", text is indented by two.
        indent = "  " if after.endswith(":") else after[: len(after) - len(after.lstrip())]
        lines.insert(number + 1, textwrap.indent(textwrap.dedent(text), indent))
        file.write_text("".join(lines))
    return list(dict.fromkeys(path for _, path, _, _ in steps))


def run_python(project: Path, *arguments: str) -> None:
    """Run Python with the copy of the project. Fails with its output."""
    environment = {**os.environ, "PYTHONPATH": str(project)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def other_package(folder: Path) -> Path:
    """Return an unchanged project, with a package on its path that adds the stage of the worked example by entry points."""
    project = copied_project(folder)
    steps = STEP.findall(DOCUMENT)
    (stage,) = [text for action, path, _, text in steps if (action, path) == ("create", "vidgen_ray/stages/ltx95.py")]
    (model,) = [text for _, path, _, text in steps if path == "vidgen_ray/video_models.py"]
    (entry_points,) = re.findall(r"```toml\n(.*?)```", section("Stages of other packages"), re.DOTALL)
    package, metadata = project / "vidgen_ltx95", project / "vidgen_ltx95-1.0.dist-info"
    package.mkdir()
    metadata.mkdir()
    (package / "__init__.py").touch()
    (package / "stage.py").write_text(stage.replace("    label: ", '    follows: ClassVar[str] = "ltx"\n    label: '))
    value = model.partition(":")[2].strip().rstrip(",")
    (package / "clips.py").write_text(f"from vidgen_ray.video_models import VideoModel\n\nLTX95 = {value}\n")
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vidgen-ltx95\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(re.sub(r'project\.entry-points\."(.*?)"', r"\1", entry_points).replace('"', ""))
    profile = yaml.safe_load((ROOT / "vidgen_ray" / "profiles" / "tiny.yaml").read_text())
    profile["actors"]["ltx95"] = {"weights": "builtin:tiny/ltx", "memory_gb": 0.3, "cpus": 0.25}
    (project / "own.yaml").write_text(yaml.safe_dump(profile))
    return project


def script(folder: Path, *lines: dict) -> str:
    path = folder / "script.jsonl"
    path.write_text("".join(json.dumps({"seed": 1, **SMALL, **line}) + "\n" for line in lines))
    return str(path)


def records(folder: Path, *names: str) -> list[dict]:
    return [json.loads((folder / shot_path(name) / "shot.json").read_text()) for name in names]


CHECKS = """
import sys
from contextlib import closing
from pathlib import Path
import pytest
from starlette.testclient import TestClient
from tests.online.directors import LOCAL, local_server
from tests.online.test_api_videos import ended
from vidgen_ray.cli import main
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.profile import load_profile
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import read_script

assert pytest.main(["-q", "tests/stages/test_contract.py", "-k", "ltx95 or svd"]) == 0
script, out, data = sys.argv[1:]
profile = load_profile("tiny")
assert main(["plan", script, "-p", "gpu-80gb", "--gpus", "8x80GB", "--json"]) == 0
with closing(VideoGenerationPipeline(profile, out)) as pipeline:
    for shot in read_script(ScriptSettings(Path(script), profile_defaults=profile.defaults)).shots:
        pipeline.render(shot)
with local_server(profile, OnlineSettings(profile="tiny", data=data)) as server:
    client = TestClient(server.app, **LOCAL)
    for fields in ({"video_model": "ltx95", "num_frames": 9}, {"start_guidance": 2}):
        asked = client.post("/v1/videos", json={"prompt": "a red ball", "size": "64x64", "num_frames": 4, **fields})
        assert asked.status_code == 200, asked.text
        video = ended(client, asked.json()["id"])
        assert video["status"] == "completed", video
"""


def test_worked_examples_pass_the_contract_tests_and_are_planned_rendered_and_served(tmp_path):
    project = copied_project(tmp_path / "project")
    assert apply_steps(project, section("Worked example: add a video model")) == [
        "vidgen_ray/video_models.py",
        "vidgen_ray/stages/ltx95.py",
        "vidgen_ray/graph.py",
        "vidgen_ray/profiles/tiny.yaml",
        "vidgen_ray/profiles/gpu.yaml",
    ]
    changed = apply_steps(project, section("Worked example: add a shot field"))
    assert changed == ["vidgen_ray/shot.py", "vidgen_ray/stages/svd.py"]
    run_python(project, "docs/field_tables.py")  # a part of `make docs`
    assert "    start_guidance: float\n" in (project / "vidgen_ray" / "pipeline.py").read_text()
    run_python(project, "-c", CHECKS, script(tmp_path, *LINES), str(tmp_path / "out"), str(tmp_path / "data"))
    new, plain, guided = records(tmp_path / "out", "new", "plain", "guided")
    assert [step["stage"] for step in new["stages"]] == ["flux", "ltx95", "realesrgan"]
    assert [step["stage"] for step in plain["stages"]] == ["flux", "svd", "realesrgan"]
    assert plain["files"]["video.mp4"] != guided["files"]["video.mp4"]
    served = [json.loads(path.read_text()) for path in (tmp_path / "data").rglob("shot.json")]
    assert {shot["stages"][1]["stage"] for shot in served} == {"ltx95", "svd"}


def test_stage_of_another_package_is_rendered_on_ray(tmp_path):
    project = other_package(tmp_path / "project")
    lines = script(tmp_path, {"id": "a", "prompt": "a red ball", "video_model": "ltx95", "steps": {"ltx95": 2}})
    run_python(project, "-m", "vidgen_ray", "render", lines, "-o", str(tmp_path / "out"), "-p", str(project / "own.yaml"))
    (record,) = records(tmp_path / "out", "a")
    assert [step["stage"] for step in record["stages"]] == ["flux", "ltx95", "realesrgan"]
