"""Seconds and peak memory of `vidgen film` for many clips: `python benchmarks/film.py --shots 1000 --size 1024x576`.

Every shot has its own burnt-in caption, so that all pieces are rendered, with cross-fades, sound of clips and music. A second
call measures a film of which nothing has changed. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.film.conftest import Shots, tone, write_sound

CLIPS = 8
"""Different clips. Shots repeat them, since making a thousand would take longer than the film."""
FPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shots", type=int, default=1000)
    parser.add_argument("--size", default="1024x576", help="WIDTHxHEIGHT in pixels")
    parser.add_argument("--frames", type=int, default=25, help=f"frames per clip, at {FPS} per second")
    parser.add_argument("--cut", action="store_true", help="cuts without burnt-in captions: all clips are copied")
    arguments = parser.parse_args()
    width, height = map(int, arguments.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), arguments.shots, (width, height), arguments.frames, copied=arguments.cut)
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")


def run_command(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Run `vidgen` in a process of its own. Return its report, seconds and peak memory in MB."""
    begin, peak_file = time.monotonic(), folder / "peak_mb"
    command = [sys.executable, "-m", "benchmarks.peak_memory", str(peak_file), "vidgen_ray", *arguments]
    output = subprocess.run(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True).stdout
    return {
        "report": json.loads(output),
        "seconds": round(time.monotonic() - begin, 1),
        "peak_mb": round(float(peak_file.read_text())),
    }


def measure(
    folder: Path,
    shots: int,
    size: tuple[int, int],
    frames: int,
    *,
    copied: bool,
    run: Callable[[Path, list[str]], dict[str, Any]] = run_command,
) -> dict[str, Any]:
    """Make a film twice. Return seconds and peak memory in MB of the two commands, and the report of the first."""
    made = Shots(folder / "out")
    for number in range(CLIPS):
        colours = [(60 + 20 * number, 10 * (n % 20), 255 - 8 * n) for n in range(frames)]
        made.add(f"clip-{number}", colour=colours, size=size, fps=FPS, sound=tone(frames / FPS, 200 + 50 * number))
    options = "--music", str(write_sound(folder / "music.wav", tone(10, 150)))
    entries = [{"id": f"clip-{n % CLIPS}", "caption": f"Caption of shot {n}"} for n in range(shots)]
    settings = {
        "transition": "cut" if copied else "fade",
        "fade_s": 0.25,
        "captions": "file" if copied else "burn",
        "encode": {"preset": "ultrafast", "threads": 1},
        "shots": entries,
    }
    (folder / "film.yaml").write_text(json.dumps(settings))
    command = ["film", str(made.root), "-o", str(folder / "film.mp4"), "--film", str(folder / "film.yaml")]
    first, again = (run(folder, [*command, *options, "--json"]) for _ in range(2))
    return {
        "shots": shots,
        "size": f"{size[0]}x{size[1]}",
        "film_seconds": first["report"]["seconds"],
        **{name: first["report"][name] for name in ("copied", "rendered")},
        "seconds": first["seconds"],
        "peak_mb": first["peak_mb"],
        "unchanged_seconds": again["seconds"],
        "unchanged_rendered": again["report"]["rendered"],
        "unchanged_peak_mb": again["peak_mb"],
    }


if __name__ == "__main__":
    main()
