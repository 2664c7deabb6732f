"""Stream the task files through the director, an operator of Ray Data, and yield the results as they arrive."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import ray
import ray.data
from more_itertools import batched
from ray.data import ActorPoolStrategy, DataContext

from vidgen_ray.batch.director import BatchDirector
from vidgen_ray.engine.engine_config import RunConfig
from vidgen_ray.batch.run_state import RunStateHandle
from vidgen_ray.batch.task_files import ShotTask, TaskResult, read_part
from vidgen_ray.engine.step_groups import LOADING
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.records import Failure, ShotRecord
from vidgen_ray.planner.solver import DIRECTOR_CPUS

# Importing Ray Data enables its log messages about every dataset. Errors are reported by vidgen itself.
logging.getLogger("ray.data").setLevel(logging.CRITICAL)

PARTS_AT_ONCE = 2
"""The next part starts while the last shots of the current one finish."""
BLOCK_BYTES = 1
"""Target block size. With 1, every result is a block of its own and is returned at once."""
PARTS_PER_DATASET = 40
"""Ray Data keeps about 2 KB of metadata per block as long as a dataset exists. So a long script runs as several datasets, one
after another, on the same workers."""
VISIBILITY_TIMEOUT_S = 60
"""Seconds until a file written by a worker must be visible to the driver. Network file systems cache that a file is missing."""


def stream(parts: Sequence[str], config: RunConfig, run_state: RunStateHandle) -> Iterator[tuple[ShotTask, TaskResult] | None]:
    """Run the parts and yield each task with its result exactly once. Yield `None` for each line not started before a stop.

    Raises SetupError if actors cannot load their weights, or if the driver does not see the files that the workers write.
    """
    received: dict[str, set[int] | None] = {part: set() for part in parts}
    folder_checked = False
    try:
        for batch in chain.from_iterable(_result_rows(group, config, run_state) for group in batched(parts, PARTS_PER_DATASET)):
            part, number, text = str(batch["part"][0]), int(batch["number"][0]), str(batch["result"][0])
            done_lines = received[part]
            # A restarted director may emit results again.
            if done_lines is None or number in done_lines or not text:
                continue
            done_lines.add(number)
            if len(done_lines) == batch["line_count"][0]:
                received[part] = None
                run_state.received.remote(part)
            task, result = ShotTask.from_line(batch["line"][0]), TaskResult.from_line(text)
            if isinstance(result.result, Failure) and result.result.stage == LOADING:
                # Every other shot would fail in the same way.
                raise SetupError(result.result.message)
            if isinstance(result.result, ShotRecord) and not folder_checked:
                _check_shared_folder(task, config)
                folder_checked = True
            yield task, result
    except ray.exceptions.RayError as error:
        raise SetupError(f"Ray aborted the run: {str(error).strip().splitlines()[0]}") from error
    stopped = ray.get(run_state.stopping.remote())
    for part, done_lines in received.items():
        if done_lines is None:
            continue
        for number, line in enumerate(read_part(config.outputs, part)):
            if number in done_lines:
                continue
            if stopped:
                yield None
                continue
            message = "Ray Data returned no result for this line. Render it again."
            lost = Failure(stage="ray", error="LostShot", message=message, attempts=1, worker="driver")
            yield ShotTask.from_line(line), TaskResult(lost)


def _result_rows(parts: Sequence[str], config: RunConfig, run_state: RunStateHandle) -> Any:
    _configure(DataContext.get_current())
    dataset = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
    dataset = dataset.map_batches(
        BatchDirector,
        batch_size=None,
        num_cpus=DIRECTOR_CPUS,
        compute=ActorPoolStrategy(
            size=1,
            max_concurrent_calls_per_actor=PARTS_AT_ONCE,
            max_tasks_in_flight_per_actor=PARTS_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        fn_constructor_args=(config, run_state),
    )
    return dataset.iter_batches(batch_size=1, prefetch_batches=0)


def _check_shared_folder(task: ShotTask, config: RunConfig) -> None:
    """Raise SetupError if the driver does not see a finished shot."""
    deadline = time.monotonic() + VISIBILITY_TIMEOUT_S
    while config.outputs.find_finished(task.plan) is None:
        if time.monotonic() > deadline:
            place = config.outputs.storage.place(f"shots/{task.plan.shot.id}")
            raise SetupError(
                f"a worker wrote {place}, but the driver does not see it. "
                "The driver and the workers need one shared output folder."
            )
        time.sleep(1)


def _configure(context: DataContext) -> None:
    context.target_max_block_size = BLOCK_BYTES
    context.execution_options.preserve_order = False
    # The director has its own timeouts, and cloud nodes may take hours to start.
    context.execution_no_progress_timeout_s = -1
    # With any other value, a block that raised would be dropped silently.
    context.max_errored_blocks = 0
    context.enable_progress_bars = False
    context.print_on_execution_start = False
