"""One Ray Data pipeline for a run: fixed pools of actors, one-row blocks, failures as rows."""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from vidgen_ray.batch.layout import Layout, fits
from vidgen_ray.batch.operators import LOADING, Finisher, Job, operator_named
from vidgen_ray.batch.rows import unpack
from vidgen_ray.batch.upscaling import clips_at_once, start_upscalers
from vidgen_ray.errors import SetupError
from vidgen_ray.graph import ShotPlan
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.records import Failure, ShotRecord

CLIPS_PER_FINISHER = 2
"""While one clip is encoded the next one's chunks keep the upscalers busy."""
FINISHER_CPUS = 0.5
SPARE_CPUS = 1
"""For Ray Data's own tasks; with every CPU taken by actors it would stand still."""
BLOCK_BYTES = 1 << 20
"""Small, so that Ray Data never merges rows: one row is one unit of work and of loss."""
CONNECT_S = 10
NO_PROGRESS_S = 1800
"""Ray gives up when nothing moves for so long: longer than the slowest stage and the loading of a model together."""


def stream(
    todo: Sequence[ShotPlan], job: Job, layout: Layout, frames_per_call: int, address: str | None
) -> Iterator[tuple[ShotPlan, ShotRecord | Failure]]:
    """Run the plans through the stages; each comes out exactly once, in the order in which they finish.

    Raises SetupError where the cluster has not what the profile asks for, an actor cannot load its weights, or the driver
    does not see what the workers write.
    """
    if not todo:
        return
    outstanding = {plan.shot.id: plan for plan in todo}
    with connected(address, layout):
        # Held here for the whole run: an actor dies with the last handle to it.
        upscalers = start_upscalers(job.profile, layout.upscalers, job.run) if layout.upscalers else []
        try:
            dataset = _dataset(todo, job, layout, upscalers, frames_per_call)
            for batch in dataset.iter_batches(batch_size=1, prefetch_batches=0):
                parcel = unpack(batch)
                result = parcel.failure or parcel.result
                # A row may come twice when a worker died after it was done.
                if result is None or outstanding.pop(parcel.plan.shot.id, None) is None:
                    continue
                if parcel.failure and parcel.failure.stage == LOADING:
                    # No shot of this run would fare better.
                    raise SetupError(parcel.failure.message)
                if isinstance(result, ShotRecord):
                    _expect_to_see(parcel.plan, job)
                yield parcel.plan, result
        except ray.exceptions.RayError as error:
            raise SetupError(f"Ray stopped the run: {str(error).strip().splitlines()[0]}") from error
        finally:
            for actor in upscalers:
                ray.kill(actor)
    for plan in outstanding.values():
        message = "came out of no stage; render it again"
        yield plan, Failure(stage="ray", error="LostShot", message=message, attempts=1, worker="driver")


def _expect_to_see(plan: ShotPlan, job: Job) -> None:
    folder = OutputFolder(job.out).shot_folder(plan.shot.id or "")
    if not folder.is_dir():
        raise SetupError(f"a worker wrote {folder}, the driver does not see it; both need one shared output folder")


def _dataset(todo: Sequence[ShotPlan], job: Job, layout: Layout, upscalers: Sequence[Any], frames_per_call: int) -> Any:
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
            size=_finishers(layout),
            max_concurrent_calls_per_actor=CLIPS_PER_FINISHER,
            max_tasks_in_flight_per_actor=CLIPS_PER_FINISHER,
            enable_true_multi_threading=True,
        ),
        fn_constructor_args=(job, upscalers, frames_per_call),
    )


def _finishers(layout: Layout) -> int:
    return math.ceil(clips_at_once(layout.upscalers.actors if layout.upscalers else 0) / CLIPS_PER_FINISHER)


def _configure(context: DataContext) -> None:
    context.target_max_block_size = BLOCK_BYTES
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = NO_PROGRESS_S
    # A block that raised would be dropped without a word, were this not 0.
    context.max_errored_blocks = 0
    context.enable_progress_bars = False
    context.print_on_execution_start = False


@contextmanager
def connected(address: str | None, layout: Layout) -> Iterator[None]:
    """A Ray to run on: the one this process is connected to, the one at `address`, or one of its own that ends with it."""
    cpus = sum(pool.cpus * pool.actors for pool in layout.pools) + FINISHER_CPUS * _finishers(layout) + SPARE_CPUS
    ours = not ray.is_initialized()
    if ours:
        _start_ray(address, cpus)
    try:
        have = ray.cluster_resources().get("CPU", 0)
        if cpus > have:
            raise SetupError(f"the profile needs {cpus:g} CPUs for this script, the cluster has {have:g}")
        gpus = [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]
        if not fits(layout, gpus):
            asked = ", ".join(f"{pool.actors} {pool.name} of {pool.gpus:g}" for pool in layout.pools if pool.gpus)
            raise SetupError(
                f"the profile asks for GPUs as {asked}; they do not fit on the {sum(gpus)} of this cluster, where an "
                "actor's share lies on one GPU"
            )
        yield
    finally:
        if ours:
            ray.shutdown()


def _start_ray(address: str | None, cpus: float) -> None:
    # What goes wrong is told once, by us; Ray would put each worker's traceback before it.
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if address:
        try:
            _knock(address)
            ray.init(address=address, **quiet)
        except (OSError, ValueError) as error:
            raise SetupError(f"no Ray cluster at {address!r}: {str(error).strip().splitlines()[0]}") from None
        return
    # The actors of a small machine take turns, which is the operating system's business, not Ray's.
    enough = max(os.cpu_count() or 1, math.ceil(cpus))
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with _muted_stderr():
        ray.init(address="local", num_cpus=enough, include_dashboard=False, **quiet)


@contextmanager
def _muted_stderr() -> Iterator[None]:
    """Ray's C++ core tells standard error that it was told to be quiet. What goes wrong is raised all the same."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _knock(address: str) -> None:
    """OSError where nobody listens at HOST:PORT; Ray would try again for minutes. `auto` and the like pass."""
    place = urlsplit(address if "//" in address else f"//{address}")
    if place.hostname and place.port:
        socket.create_connection((place.hostname, place.port), CONNECT_S).close()
