"""One Ray Data pipeline for a run: fixed pools of actors, one-row blocks, failures as rows."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from vidgen_ray.batch.layout import Layout
from vidgen_ray.batch.operators import LOADING, Finisher, Job, operator_named
from vidgen_ray.batch.rows import unpack
from vidgen_ray.batch.upscaling import start_upscalers
from vidgen_ray.errors import SetupError
from vidgen_ray.graph import ShotPlan
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import Failure, ShotRecord

SHOTS_FINISHING_AT_ONCE = 2
"""While one clip is encoded the next one's chunks keep the upscalers busy."""
FINISHER_CPUS = 0.5
SPARE_CPUS = 1
"""For Ray Data's own tasks; with every CPU taken by actors it would stand still."""
BLOCK_BYTES = 1 << 20
"""Below the size of a row, so that Ray Data never merges rows: one row is one unit of work and of loss."""
NO_PROGRESS_S = 1800
"""Ray gives up when nothing moves for so long: longer than the slowest stage and the loading of a model together."""


def stream(
    todo: Sequence[ShotPlan], job: Job, layout: Layout, address: str | None
) -> Iterator[tuple[ShotPlan, ShotRecord | Failure]]:
    """Run the plans through the stages; each comes out once, in the order in which they finish.

    Raises SetupError where the cluster has not what the profile asks for, or an actor cannot load its weights.
    """
    if not todo:
        return
    outputs = OutputFolder(job.out)
    with connected(address, layout):
        # Held here for the whole run: an actor dies with the last handle to it.
        upscalers = start_upscalers(job.profile, layout.upscalers, job.run) if layout.upscalers else []
        try:
            for batch in _dataset(todo, job, layout, upscalers).iter_batches(batch_size=1, prefetch_batches=0):
                parcel = unpack(batch)
                if parcel.failure and parcel.failure.stage == LOADING:
                    # No shot of this run would fare better.
                    raise SetupError(parcel.failure.message)
                yield parcel.plan, parcel.failure or _committed(outputs, parcel.plan)
        except ray.exceptions.RayError as error:
            raise SetupError(f"Ray stopped the run: {str(error).strip().splitlines()[-1]}") from error
        finally:
            for actor in upscalers:
                ray.kill(actor)


def _dataset(todo: Sequence[ShotPlan], job: Job, layout: Layout, upscalers: Sequence[Any]) -> Any:
    _configure(DataContext.get_current())
    # The first data set of a driver starts Ray Data's coordinator, and would stall behind the loading of models.
    ray.data.range(1).materialize()
    dataset = ray.data.from_items([{"plan": plan.model_dump_json()} for plan in todo], override_num_blocks=len(todo))
    for pool in layout.chain:
        dataset = dataset.map_batches(
            operator_named(pool.name),
            batch_size=1,
            num_cpus=pool.cpus,
            num_gpus=pool.gpus or None,
            compute=ActorPoolStrategy(size=pool.actors, max_tasks_in_flight_per_actor=2),
            fn_constructor_args=(job, tuple(stage.name for stage in pool.stages)),
        )
    return dataset.map_batches(
        Finisher,
        batch_size=1,
        num_cpus=FINISHER_CPUS,
        compute=ActorPoolStrategy(
            size=1,
            max_concurrent_calls_per_actor=SHOTS_FINISHING_AT_ONCE,
            max_tasks_in_flight_per_actor=SHOTS_FINISHING_AT_ONCE,
            enable_true_multi_threading=True,
        ),
        fn_constructor_args=(job, upscalers),
    )


def _configure(context: DataContext) -> None:
    context.target_max_block_size = BLOCK_BYTES
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_S
    # A block that raised would be dropped without a word, were this not 0.
    context.max_errored_blocks = 0
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _committed(outputs: OutputFolder, plan: ShotPlan) -> ShotRecord | Failure:
    record = outputs.done(plan)
    if record is None:
        message = f"{outputs.shot_folder(plan.shot.id or '')} is not visible here; workers and driver need a shared folder"
        return Failure(stage="output", error="MissingResult", message=message, attempts=1, worker="driver")
    return record


@contextmanager
def connected(address: str | None, layout: Layout) -> Iterator[None]:
    """A Ray to run on: the one this process is connected to, the one at `address`, or one of its own that ends with it."""
    cpus = sum(pool.cpus * pool.actors for pool in layout.pools) + FINISHER_CPUS + SPARE_CPUS
    gpus = sum(pool.gpus * pool.actors for pool in layout.pools)
    ours = not ray.is_initialized()
    if ours:
        # What goes wrong is told once, by us; Ray would put each worker's traceback before it.
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
        if address:
            ray.init(address=address, **quiet)
        else:
            # The actors of a small machine take turns, which is the operating system's business, not Ray's.
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
            enough = max(os.cpu_count() or 1, math.ceil(cpus))
            ray.init(address="local", num_cpus=enough, include_dashboard=False, **quiet)
    try:
        have = ray.cluster_resources()
        for kind, needed in (("CPU", cpus), ("GPU", gpus)):
            if needed > have.get(kind, 0) + 1e-6:
                raise SetupError(
                    f"the profile needs {needed:g} {kind}s for this script, the cluster has {have.get(kind, 0):g}; "
                    "give more nodes, or fewer actors in the profile"
                )
        yield
    finally:
        if ours:
            ray.shutdown()
