"""What a command may import. A heavy package that a command does not need costs all who call it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tests.upscale.videos import write_video
from vidgen_ray.cli.app import LISTED, app

HEAVY = {
    *("PIL", "accelerate", "av", "cv2", "diffusers", "duckdb", "fastapi", "httpx2", "more_itertools", "numpy", "obstore"),
    *(
        "onnxruntime",
        "pandas",
        "pyarrow",
        "pydantic",
        "ray",
        "rich",
        "scipy",
        "spandrel",
        "sqlalchemy",
        "starlette",
        "torch",
        "torch._dynamo",
        "torchvision",
    ),
    *("transformers", "typer", "vidgen_ray.batch", "vidgen_ray.cli.options", "vidgen_ray.graph", "vidgen_ray.online"),
    *("vidgen_ray.provenance", "vidgen_ray.remote", "yaml"),
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
    "plan SCRIPT": SCRIPT | {"rich", "numpy", "scipy", "pyarrow", "more_itertools", "vidgen_ray.batch"},
    "upscale --help": UPSCALE,
    # torchvision, which spandrel imports, needs no compiler.
    "upscale VIDEO --scale 2 --no-provenance": UPSCALE | {"spandrel", "torch", "torchvision"},
}


def imported_by(words: list[str], folder: Path) -> set[str]:
    """Run a command in a process of its own, and return the modules of `HEAVY` that it imports."""
    code = (
        "import json, sys; from vidgen_ray.cli import main; code = main(sys.argv[2:]);"
        "open(sys.argv[1], 'w').write(json.dumps([code, sorted(sys.modules)]))"
    )
    out = folder / "modules.json"
    subprocess.run([sys.executable, "-c", code, str(out), *words], check=True, capture_output=True, cwd=folder)
    code, modules = json.loads(out.read_text())
    assert code == 0
    return HEAVY & set(modules)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_imports_only_what_it_runs(command, tmp_path):
    script = tmp_path / "script.jsonl"
    script.write_text('{"prompt": "a cat"}\n')
    video = write_video(tmp_path / "video.mp4", 1)
    words = command.replace("SCRIPT", str(script)).replace("VIDEO", str(video)).split()
    assert imported_by(words, tmp_path) == COMMANDS[command]


def test_help_says_what_the_commands_say():
    vidgen = typer.main.get_command(app)
    assert vidgen.list_commands(None) == list(LISTED)
    for name, listed in LISTED.items():
        text = vidgen.get_command(None, name).help
        assert " ".join(text.split("\n\n")[0].split()) == listed.help, name
