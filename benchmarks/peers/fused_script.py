"""A script with one fused Ray Data actor per GPU, as Ray's documentation suggests: read_text -> map_batches -> write_parquet.

It skips clips that were made from the same line, returns errors as rows, writes clips atomically and holds a lock. An actor
whose shots fail one after another exits.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import ray.data

from benchmarks.local_ray import local_ray
from benchmarks.peers.lines import content_of, digests_of, is_finished, parsed, run_as_command
from benchmarks.peers.video_server import clip_of
from benchmarks.simulated import CHAIN, Models, Payload

ATTEMPTS = 3
MAX_FAILED = 2
"""Failed shots in a row after which the process of an actor exits, so that Ray starts another one."""
RESTARTS = 2
"""Restarts of an actor, and of its tasks, before Ray gives it up."""


class Renderer:
    def __init__(self, run_folder: Path, out: Path) -> None:
        self._models = Models(run_folder, CHAIN)
        self._out = out
        self._failed = 0

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        line = {name: str(values[0]) for name, values in batch.items()}
        error = line["error"] or self._render(line)
        return {**batch, "status": ["failed" if error else "done"], "error": [error]}

    def _render(self, line: dict[str, Any]) -> str:
        error = ""
        for _ in range(ATTEMPTS):
            try:
                payload: Payload = {}
                for stage in CHAIN:
                    payload = self._models.run(stage, line["id"], payload)
                partial = self._out / f"{line['id']}.part"
                partial.write_bytes(clip_of(content_of(line)))
                partial.rename(partial.with_suffix(".mp4"))
                self._failed = 0
                return ""
            # The row says what failed, and the others go on.
            except Exception as caught:
                error = str(caught)
        self._failed += 1
        if self._failed == MAX_FAILED:
            os._exit(1)
        return error


def rows_of(out: Path) -> list[dict[str, Any]]:
    """Return the rows of all runs in their order."""
    rows: list[dict[str, Any]] = []
    for file in sorted(out.glob("manifest/*.parquet"), key=lambda file: file.stat().st_mtime):
        # A full disk leaves files without content.
        with suppress(pyarrow.ArrowInvalid):
            rows += pyarrow.parquet.read_table(file).to_pylist()
    return rows


def render_script(run_folder: Path, script: Path, out: Path, gpus: int, timeout_s: float) -> int:
    context = ray.data.DataContext.get_current()
    context.max_errored_blocks = -1
    context.execution_no_progress_timeout_s = timeout_s
    context.target_max_block_size = 1
    digests = digests_of(rows_of(out))
    # Read here: a broken line must not cost the others of its file.
    texts = [{"text": text} for text in script.read_text().splitlines()]
    lines = (
        ray.data.from_items(texts).map(lambda row: parsed(row["text"])).filter(lambda row: not is_finished(row, out, digests))
    )
    results = lines.repartition(target_num_rows_per_block=1).map_batches(
        Renderer,
        batch_size=1,
        num_cpus=0.25,
        num_gpus=1,
        max_restarts=RESTARTS,
        max_task_retries=RESTARTS,
        compute=ray.data.ActorPoolStrategy(size=gpus),
        fn_constructor_args=(run_folder, out),
    )
    results.write_parquet(str(out / "manifest"))
    finished = digests_of(rows_of(out))
    return 0 if all(is_finished(parsed(row["text"]), out, finished) for row in texts) else 1


def main(run_folder: Path, script: Path, out: Path, gpus: int, timeout_s: float) -> int:
    def run() -> int:
        with local_ray(gpus):
            return render_script(run_folder, script, out, gpus, timeout_s)

    return run_as_command(run, script, out)


if __name__ == "__main__":
    raise SystemExit(main(*map(Path, sys.argv[1:4]), int(sys.argv[4]), float(sys.argv[5])))
