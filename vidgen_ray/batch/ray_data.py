"""The parts of a script through Ray Data's one operator, the director; what became of each line comes back as it is known."""

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
from vidgen_ray.batch.run_config import RunConfig
from vidgen_ray.batch.run_state import RunStateHandle
from vidgen_ray.batch.task_files import ShotTask, TaskResult, read_part
from vidgen_ray.engine.step_groups import LOADING
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.records import Failure, ShotRecord
from vidgen_ray.planner.solver import DIRECTOR_CPUS

# Importing Ray Data makes it tell of every data set; what goes wrong is told once, by us.
logging.getLogger("ray.data").setLevel(logging.CRITICAL)

PARTS_AT_ONCE = 2
"""The next part begins while the last shots of this one end."""
BLOCK_BYTES = 1
"""So small that every result is a block of its own, and is known as soon as it is there."""
PARTS_A_DATASET = 40
"""Ray Data keeps an account of every block that a data set gave, some 2 KB, for as long as it lasts. So a long script is
several, one after another; the workers stay."""
SEEN_S = 60
"""After which everybody sees a file that somebody wrote: a network's file system may remember that it was not there."""


def stream(parts: Sequence[str], job: RunConfig, board: RunStateHandle) -> Iterator[tuple[ShotTask, TaskResult] | None]:
    """Run the parts; each of their lines comes out exactly once, or as none where the run was told to stop before it.

    Raises SetupError where actors cannot load their weights, or the driver does not see what the workers write.
    """
    received: dict[str, set[int] | None] = {part: set() for part in parts}
    seen_a_shot = False
    try:
        for batch in chain.from_iterable(_results(some, job, board) for some in batched(parts, PARTS_A_DATASET)):
            part, number, text = str(batch["part"][0]), int(batch["number"][0]), str(batch["outcome"][0])
            numbers = received[part]
            # A director that was started again may give again what its predecessor gave.
            if numbers is None or number in numbers or not text:
                continue
            numbers.add(number)
            if len(numbers) == batch["of"][0]:
                received[part] = None
                board.received.remote(part)
            errand, outcome = ShotTask.from_line(batch["line"][0]), TaskResult.from_line(text)
            if isinstance(outcome.result, Failure) and outcome.result.stage == LOADING:
                # No shot of this run would fare better.
                raise SetupError(outcome.result.message)
            if isinstance(outcome.result, ShotRecord) and not seen_a_shot:
                _expect_to_see(errand, job)
                seen_a_shot = True
            yield errand, outcome
    except ray.exceptions.RayError as error:
        raise SetupError(f"Ray stopped the run: {str(error).strip().splitlines()[0]}") from error
    stopped = ray.get(board.stopping.remote())
    for part, numbers in received.items():
        if numbers is None:
            continue
        for number, line in enumerate(read_part(job.outputs, part)):
            if number in numbers:
                continue
            if stopped:
                yield None
                continue
            message = "came out of no stage; render it again"
            lost = Failure(stage="ray", error="LostShot", message=message, attempts=1, worker="driver")
            yield ShotTask.from_line(line), TaskResult(lost)


def _results(parts: Sequence[str], job: RunConfig, board: RunStateHandle) -> Any:
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
        fn_constructor_args=(job, board),
    )
    return dataset.iter_batches(batch_size=1, prefetch_batches=0)


def _expect_to_see(errand: ShotTask, job: RunConfig) -> None:
    seen_by = time.monotonic() + SEEN_S
    while job.outputs.find_finished(errand.plan) is None:
        if time.monotonic() > seen_by:
            place = job.outputs.storage.place(f"shots/{errand.plan.shot.id}")
            raise SetupError(f"a worker wrote {place}, the driver does not see it; both need one shared output folder")
        time.sleep(1)


def _configure(context: DataContext) -> None:
    context.target_max_block_size = BLOCK_BYTES
    context.execution_options.preserve_order = False
    # The director has its own limits, and nodes of a cloud may take hours to come.
    context.execution_no_progress_timeout_s = -1
    # A block that raised would be dropped without a word, were this not 0.
    context.max_errored_blocks = 0
    context.enable_progress_bars = False
    context.print_on_execution_start = False
