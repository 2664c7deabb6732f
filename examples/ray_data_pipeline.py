"""Ray Data pipeline with rendering as one step: ideas -> prompts -> clips -> a table of the clips.

    python examples/ray_data_pipeline.py --profile demo --out out/ray-data

The input is `ideas.parquet` in the output folder, with the columns `id`, `subject`, `place` and `photo`. If it does not exist,
it is created with three examples. The result is `clips.parquet`, with one row per clip. Clips, manifest and `failures.jsonl`
are those of `vidgen render`. See docs/ray-data.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import ray
import ray.data
from decord import VideoReader
from ray.data import SaveMode
from ray.data.expressions import col

from vidgen_ray.data import build_processor

FACES = Path(__file__).resolve().parent / "faces"
IDEAS = [
    {"id": "boat", "subject": "red boat", "place": "by the sea at sunset", "photo": None},
    {"id": "ada", "subject": "portrait of a person", "place": "in a meadow on a sunny day", "photo": str(FACES / "ada.png")},
    # This photo does not exist, so this shot fails.
    {"id": "zoe", "subject": "portrait of a person", "place": "in the snow at night", "photo": str(FACES / "zoe.png")},
]


def write_prompt(idea: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a shot. A template stands in for a language model here."""
    return {"id": idea["id"], "prompt": f"a {idea['subject']} {idea['place']}", "face_image": idea["photo"]}


def describe_clip(row: dict[str, Any]) -> dict[str, Any]:
    """Return the size, brightness (0 to 255) and motion (mean change of a pixel between two frames, 0 to 255) of a clip."""
    clip = VideoReader(row["hd_video"], num_threads=1)
    frames = clip.get_batch(range(len(clip))).asnumpy().astype(np.float32)
    frame_count, height, width, _ = frames.shape
    return {
        "id": row["id"],
        "prompt": row["prompt"],
        "clip": row["hd_video"],
        "frames": frame_count,
        "width": width,
        "height": height,
        "brightness": round(float(frames.mean()), 1),
        "motion": round(float(np.abs(np.diff(frames, axis=0)).mean()), 1),
    }


def run(profile: str, out: Path) -> None:
    """Execute the pipeline in the connected Ray."""
    ideas, clips = out / "ideas.parquet", out / "clips.parquet"
    out.mkdir(parents=True, exist_ok=True)
    if not ideas.exists():
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(IDEAS), ideas)

    processor = build_processor(profile, out, name="ideas", defaults={"scale": 2})
    prompts = ray.data.read_parquet(str(ideas)).map(write_prompt)
    rendered = processor(prompts).filter(expr=col("status") != "failed")
    # A run returns the shots that an earlier run has finished, too, so its table replaces the old one.
    rendered.map(describe_clip).write_parquet(str(clips), mode=SaveMode.OVERWRITE)


def main() -> None:
    parser = argparse.ArgumentParser(description="Render ideas with a Ray Data pipeline.")
    parser.add_argument("--profile", default="demo", help="Built-in profile or profile file. Default: demo.")
    parser.add_argument("--out", type=Path, default=Path("out/ray-data"), help="Output folder. Default: out/ray-data.")
    options = parser.parse_args()
    # Without the messages of tasks and workers. RAY_ADDRESS selects a cluster.
    ray.init(log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    run(options.profile, options.out)
    for row in pyarrow.parquet.read_table(options.out / "clips.parquet").sort_by("id").to_pylist():
        size, brightness, motion = f"{row['width']}x{row['height']}", row["brightness"], row["motion"]
        print(f"{row['id']}: {row['frames']} frames of {size}, brightness {brightness}, motion {motion}")


if __name__ == "__main__":
    main()
