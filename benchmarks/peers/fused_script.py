"""A script with one fused Ray Data actor per GPU, as Ray's documentation suggests: read_json -> map_batches -> write_parquet.

It skips clips that exist, returns errors as rows and writes clips atomically.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import ray.data

from benchmarks.local_ray import local_ray
from benchmarks.peers.video_server import clip_of
from benchmarks.simulated import CHAIN, Models, Payload

ATTEMPTS = 3


class Renderer:
    def __init__(self, run_folder: Path, out: Path) -> None:
        self._models = Models(run_folder, CHAIN)
        self._out = out

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        errors = [self._render(str(name), str(prompt)) for name, prompt in zip(batch["id"], batch["prompt"], strict=True)]
        return {**batch, "status": ["failed" if error else "done" for error in errors], "error": errors}

    def _render(self, shot: str, prompt: str) -> str:
        error = ""
        for _ in range(ATTEMPTS):
            try:
                payload: Payload = {}
                for stage in CHAIN:
                    payload = self._models.run(stage, shot, payload)
                partial = self._out / f"{shot}.part"
                partial.write_bytes(clip_of(prompt))
                partial.rename(partial.with_suffix(".mp4"))
                return ""
            # The row says what failed, and the others go on.
            except Exception as caught:
                error = str(caught)
        return error


def main(run_folder: Path, script: Path, out: Path, gpus: int, timeout_s: float) -> int:
    out.mkdir(exist_ok=True)
    with local_ray(gpus):
        context = ray.data.DataContext.get_current()
        context.max_errored_blocks = -1
        context.execution_no_progress_timeout_s = timeout_s
        context.target_max_block_size = 1
        lines = ray.data.read_json(str(script), lines=True).filter(lambda row: not (out / f"{row['id']}.mp4").exists())
        results = lines.repartition(target_num_rows_per_block=1).map_batches(
            Renderer,
            batch_size=1,
            num_cpus=0.25,
            num_gpus=1,
            compute=ray.data.ActorPoolStrategy(size=gpus),
            fn_constructor_args=(run_folder, out),
        )
        results.write_parquet(str(out / "manifest"))
        return 1 if lines.count() else 0


if __name__ == "__main__":
    raise SystemExit(main(*map(Path, sys.argv[1:4]), int(sys.argv[4]), float(sys.argv[5])))
