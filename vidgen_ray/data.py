"""Ray Data processor: maps a data set of script rows to a data set of result rows.

    processor = build_processor("gpu-80gb", "s3://bucket/clips")
    results = processor(ray.data.read_parquet("prompts.parquet"))

So rendering is one step of a Ray Data pipeline: a model may write the prompts before it, and a filter may follow it.
"""

from __future__ import annotations

import inspect
import logging
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import pyarrow
import ray
from more_itertools import batched

from vidgen_ray.batch.line_planner import BLOCK_LINES, LinePlanner, on_this_node, one_task_source, own_context, planned_rows
from vidgen_ray.batch.render import render_lines
from vidgen_ray.batch.results import RunListener
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.engine.fleet import remove_leaked_groups
from vidgen_ray.engine.status import Snapshot
from vidgen_ray.errors import SetupError, UsageError
from vidgen_ray.graph import check_profile
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.lease import PeriodicTask
from vidgen_ray.outputs.manifest import SCHEMA, SHOT_FILES, ManifestRow, open_writers
from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.script.check import LineChecker, merged
from vidgen_ray.script.formats import table_lines

if TYPE_CHECKING:
    from ray.data import Dataset

WATCH_INTERVAL_S = 2.0
"""Seconds between two looks for placement groups of executions that were left."""
_log = logging.getLogger("vidgen_ray")

Fields = dict[str, Any]
Processor = Callable[["Dataset"], "Dataset"]


def build_processor(
    profile: str | Profile,
    out: str | Path,
    *,
    name: str = "dataset",
    seed: int = 0,
    defaults: Mapping[str, Any] | None = None,
    to_fields: Callable[[Fields], Fields] | None = None,
    options: RenderOptions | None = None,
    on_message: Callable[[str], None] | None = None,
) -> Processor:
    """Return a function that maps a data set of shots to a data set of their results.

    The columns of the input are the fields of a script line; `to_fields` maps a row with other columns to them. Nulls are
    missing fields, which come from `defaults`, then from the profile. `seed` is the run seed of shots without a seed.

    The output has one row per shot, as soon as it has ended, with the columns of the manifest: `id`, `status` (done, failed or
    skipped), `image`, `video`, `hd_video` (absolute paths or URLs), `seconds`, `failure_stage`, `failure_error`,
    `failure_message`, `metadata` (JSON) and others. A wrong row is a result whose status is failed. Finished shots are skipped,
    so the same pipeline resumes. `out` gets the files, the manifest and failures.jsonl, as `vidgen render` writes them. `name`
    stands for the script there.

    The data set is lazy. When it is executed, one task, on the node of this process, hosts the director. Its workers use the
    GPUs that are free when the first row arrives; to leave some for later steps, pass `RenderOptions(cluster=...)`. If the task
    or its node is lost, the execution fails; run it again to resume. Steps before this one keep their GPUs and CPUs while rows
    flow: leave enough for rendering. `on_message` gets messages for the user, such as what rendering waits for; it is called in
    the task, and pickled. Default: log them, and Ray prints them in this process.

    Raises ProfileError for an unknown profile.
    """
    chosen = load_profile(profile) if isinstance(profile, str) else profile
    check_profile(chosen)
    if not name or "/" in name:
        raise UsageError(f"name: got {name!r}, must be a name without slashes")
    outputs = OutputFolder(out)
    options = options or RenderOptions()
    chosen = chosen.with_commits()
    checker = LineChecker(name, Path.cwd(), merged(chosen.defaults, defaults or {}), seed, policy=chosen.policy)
    planner = LinePlanner(
        checker, chosen, outputs, fresh=options.fresh, replace=options.replace, keep_stages=options.keep_stages
    )

    def processor(dataset: Dataset) -> Dataset:
        _watch_groups()
        lines = dataset.map_batches(
            _pickled_lines,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0,
            fn_kwargs={"name": name, "to_fields": to_fields},
        )
        # One block per result, so that every result is passed on at once.
        with own_context(block_bytes=1, ordered=False):
            listener = _MessageListener(on_message or _log.warning)
            source = one_task_source(partial(_render_rows, lines, planner, name, chosen, outputs, options, listener))
            return ray.data.read_datasource(source, override_num_blocks=1, **_once(), **on_this_node())

    return processor


@cache
def _watch_groups() -> PeriodicTask:
    """Return the GPUs of executions that were left, as by `break` in a loop over the results. Ray then kills the task."""
    return PeriodicTask(WATCH_INTERVAL_S, _remove_leaked_groups)


def _remove_leaked_groups() -> None:
    if not ray.is_initialized():
        return
    try:
        remove_leaked_groups()
    # Ray's head process may be restarting.
    except Exception:
        _log.debug("cannot look for placement groups, trying again", exc_info=True)


def _once() -> Fields:
    """Return the options of a task of Ray Data that runs once, if this version of Ray has them.

    Ray 2.64 removes the argument. There, `_render_rows` refuses to run again.
    """
    supported = "ray_remote_args" in inspect.signature(ray.data.read_datasource).parameters
    return {"ray_remote_args": {"max_retries": 0}} if supported else {}


def _pickled_lines(block: pyarrow.Table, name: str, to_fields: Callable[[Fields], Fields] | None) -> pyarrow.Table:
    batches = batched(table_lines(name, block, to_fields), BLOCK_LINES)
    return pyarrow.table({"lines": pyarrow.array([pickle.dumps(batch) for batch in batches], pyarrow.binary())})


def _render_rows(
    lines: Dataset,
    planner: LinePlanner,
    name: str,
    profile: Profile,
    outputs: OutputFolder,
    options: RenderOptions,
    listener: RunListener,
) -> Iterator[pyarrow.Table]:
    """Render the lines in a thread, and yield the results as they arrive."""
    # Ray would skip as many results of a retry as it has of the first attempt, but their order differs.
    if ray._private.worker.global_worker.core_worker.get_current_task_attempt_number() > 0:
        raise SetupError("the task that rendered the data set was lost with its process. Execute the data set again to resume")
    rows: SimpleQueue[ManifestRow | BaseException | None] = SimpleQueue()
    stop = threading.Event()

    def run() -> None:
        try:
            planner.changed_by = open_writers(outputs.storage)
            render_lines(
                planner,
                [],
                partial(planned_rows, lines, planner),
                name,
                profile,
                options,
                listener=listener,
                stop=stop,
                on_row=rows.put,
            )
            rows.put(None)
        except BaseException as error:
            rows.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while (row := rows.get()) is not None:
            if isinstance(row, BaseException):
                raise row
            yield pyarrow.Table.from_pylist([_with_absolute_paths(row, outputs)], schema=SCHEMA)
    finally:
        stop.set()
        thread.join()


def _with_absolute_paths(row: ManifestRow, outputs: OutputFolder) -> Fields:
    columns = dict(vars(row))
    for name in SHOT_FILES:
        if columns[name] is not None:
            columns[name] = str(outputs.storage.place(columns[name]))
    return columns


class _MessageListener(RunListener):
    """Listener that passes messages on, and ignores other events: results are rows."""

    def __init__(self, on_message: Callable[[str], None]) -> None:
        self._on_message = on_message

    def on_rejected(self, row: ManifestRow) -> None: ...

    def on_lines(self, total: int, skipped: int, rejected: int, complete: bool) -> None: ...

    def on_finished(self, row: ManifestRow) -> None: ...

    def on_status(self, snapshot: Snapshot) -> None: ...

    def on_message(self, message: str) -> None:
        self._on_message(message)
