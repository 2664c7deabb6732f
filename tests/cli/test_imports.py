"""What commands, workers and processes of a server may import. A heavy package that they do not need costs time and memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tests.upscale.videos import write_video
from vidgen_ray.cli import main
from vidgen_ray.cli.app import LISTED, app

ROOT = Path(__file__).parents[2]
HEAVY = {
    *("PIL", "accelerate", "av", "cv2", "diffusers", "duckdb", "fastapi", "httpx2", "more_itertools", "numpy", "obstore"),
    *("onnxruntime", "pandas", "pyarrow", "pydantic", "ray", "ray.serve", "rich", "scipy", "spandrel", "sqlalchemy"),
    *("starlette", "torch", "torch._dynamo", "torchvision", "transformers", "typer", "vidgen_ray.batch"),
    *("vidgen_ray.cli.options", "vidgen_ray.graph", "vidgen_ray.online", "vidgen_ray.provenance", "vidgen_ray.remote", "yaml"),
}
"""Packages and modules of which a command imports those in its list below only."""
HELP = {"typer", "rich"}
UPSCALE = {*HELP, "PIL", "av", "numpy", "pydantic", "vidgen_ray.provenance", "yaml"}
SCRIPT = {"typer", "pydantic", "yaml", "vidgen_ray.cli.options", "vidgen_ray.graph", "vidgen_ray.remote"}
COMMANDS = {
    "--version": set[str](),
    "--help": HELP,
    "validate SCRIPT": SCRIPT,
    "validate --help": SCRIPT | {"rich"},
    "plan SCRIPT": SCRIPT | {"rich", "numpy", "pyarrow", "more_itertools", "vidgen_ray.batch"},
    "upscale --help": UPSCALE,
    # torchvision, which spandrel imports, needs no compiler.
    "upscale VIDEO --scale 2 --no-provenance": UPSCALE | {"spandrel", "torch", "torchvision"},
}
WORKER = {"PIL", "numpy", "pydantic", "ray", "vidgen_ray.graph", "vidgen_ray.remote", "yaml"}
PROCESS = WORKER - {"ray"} | {"vidgen_ray.online", "vidgen_ray.provenance"}
PROCESSES = {
    "api_process": PROCESS | {"fastapi", "sqlalchemy", "starlette"},
    "job_director": PROCESS | {"fastapi", "httpx2", "ray", "sqlalchemy", "starlette"},
    "workers": PROCESS | {"httpx2", "ray", "starlette"},
}
"""Module of each process of a server. The API imports Ray, too: it is a Ray actor."""


def imported_by(code: str, words: list[str], folder: Path) -> set[str]:
    """Run code with these arguments in a process of its own, and return the modules of `HEAVY` that it imports."""
    out = folder / "modules.json"
    code = f"import json, sys; {code}; open({str(out)!r}, 'w').write(json.dumps(sorted(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, cwd=folder, env=environment)
    return HEAVY & set(json.loads(out.read_text()))


@pytest.fixture(scope="module", autouse=True)
def small_weights(tmp_path_factory):
    """Small weights are made with torch by the first command that needs them."""
    script = tmp_path_factory.mktemp("first") / "script.jsonl"
    script.write_text('{"prompt": "a cat"}\n')
    assert main(["validate", str(script)]) == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_command_imports_only_what_it_runs(command, tmp_path):
    script = tmp_path / "script.jsonl"
    script.write_text('{"prompt": "a cat"}\n')
    video = write_video(tmp_path / "video.mp4", 1)
    words = command.replace("SCRIPT", str(script)).replace("VIDEO", str(video)).split()
    code = "from vidgen_ray.cli import main; assert main(sys.argv[1:]) == 0"
    assert imported_by(code, words, tmp_path) == COMMANDS[command]


def test_worker_with_simulated_stages_imports_no_networks(tmp_path):
    assert imported_by("import vidgen_ray.engine.worker, benchmarks.simulated_stages", [], tmp_path) == WORKER


@pytest.mark.parametrize("module", PROCESSES)
def test_process_of_a_server_imports_only_what_it_runs(module, tmp_path):
    assert imported_by(f"import vidgen_ray.online.{module}", [], tmp_path) == PROCESSES[module]


def test_help_says_what_the_commands_say():
    vidgen = typer.main.get_command(app)
    assert vidgen.list_commands(None) == list(LISTED)
    for name, listed in LISTED.items():
        text = vidgen.get_command(None, name).help
        assert " ".join(text.split("\n\n")[0].split()) == listed.help, name
