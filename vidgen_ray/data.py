"""Ray Data processor: maps a data set of script rows to a data set of result rows.

    processor = build_processor("gpu-80gb", "s3://bucket/clips", name="prompts")
    results = processor(ray.data.read_parquet("prompts.parquet"))

So rendering is one step of a Ray Data pipeline: a model may write the prompts before it, and a filter may follow it.
"""

from __future__ import annotations

import logging
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import pyarrow
import ray
from more_itertools import batched

from vidgen_ray.batch.line_planner import (
    BLOCK_BYTES,
    BLOCK_LINES,
    LinePlanner,
    on_this_node,
    one_task_source,
    own_context,
    planned_rows,
    recorded_options,
)
from vidgen_ray.batch.progress import RunListener
from vidgen_ray.batch.render_script import render_lines
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.engine.fleet import remove_leaked_groups
from vidgen_ray.engine.ray_cluster import live_cluster
from vidgen_ray.engine.ray_internals import task_attempt
from vidgen_ray.engine.status import Snapshot
from vidgen_ray.errors import SetupError, UsageError
from vidgen_ray.graph import check_profile
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.lease import PeriodicTask
from vidgen_ray.outputs.manifest import SCHEMA, SHOT_FILES, ManifestRow
from vidgen_ray.planner.cluster import Cluster, profile_for, this_machine
from vidgen_ray.profile import Profile
from vidgen_ray.script.check import LineChecker, merged
from vidgen_ray.script.formats import table_lines
from vidgen_ray.script.lines import Columns

if TYPE_CHECKING:
    from ray.data import Dataset

_WATCH_INTERVAL_S = 2.0
"""Seconds between two looks for placement groups of executions that were left."""
_BLOCK_ROWS = 100
"""Maximum number of results per block."""
BLOCK_WAIT = 0.2
"""Maximum time that a result waits for others of its block, as a share of the time since rendering started."""
MAX_BLOCK_WAIT_S = 600.0
PADDING = "padding"
"""Column that makes Ray Data pass a block on at once."""
PADDED_BYTES = 5 * BLOCK_BYTES // 4
"""Ray Data collects rows until it has BLOCK_BYTES, and splits blocks of 1.5 times as many."""
_POLL_S = 1.0
_GRACE_S = 5.0
"""Maximum seconds that shots in progress may take to finish if a later step fails. GPUs must be free within 10 s."""
_log = logging.getLogger("vidgen_ray")

Fields = dict[str, Any]
Processor = Callable[["Dataset"], "Dataset"]


def build_processor(
    profile: str | Profile,
    out: str | Path,
    *,
    name: str,
    seed: int = 0,
    defaults: Mapping[str, Any] | None = None,
    to_fields: Callable[[Fields], Fields] | None = None,
    keep_columns: bool = False,
    options: RenderOptions | None = None,
    on_message: Callable[[str], None] | None = None,
) -> Processor:
    """Return a function that maps a data set of shots to a data set of their results.

    The columns of the input are the fields of a script line; `to_fields` maps a row with other columns, `None` for nulls, to
    them, and `keep_columns` copies columns that are no fields to `metadata`, instead of rejecting the row. Nulls are missing
    fields, which come from `defaults`, then from the profile. `seed` is the run seed of shots without a seed.

    The output has one row per shot, in the order in which they end, with the columns of the manifest: `id`, `status` (done or
    failed), `last_run` (rendered, reused or failed), `image`, `video`, `hd_video` (absolute paths or URLs), `seconds`,
    `failure_stage`, `failure_error`, `failure_message`, `metadata` (JSON), the settings of the shot and others. A wrong row is
    a result whose status is failed. Finished shots are reused, so the same pipeline resumes. `out` gets the files, the manifest
    and failures.jsonl, as `vidgen render` writes them. `name` stands for the script there: rows of a
    data set with the same name and the same ids replace finished shots, those of another name are refused.

    Rows come in blocks of up to 100. A row waits for others of its block for at most a fifth of the time since rendering
    started, and at most ten minutes.

    The data set is lazy. When it is executed, one task, on the node of this process, hosts the director. Its workers use the
    GPUs that are free when the first row arrives; to leave some for later steps, pass `RenderOptions(cluster=...)`. If the task
    or its node is lost, the execution fails; run it again to resume. Steps before this one keep their GPUs and CPUs while rows
    flow: leave enough for rendering. `on_message` gets messages for the user, such as what rendering waits for; it is called in
    the task, and pickled. Default: log them, and Ray prints them in this process.

    Raises ProfileError for an unknown profile. The function raises UsageError for a data set with `preserve_order`.
    """
    chosen = profile_for(profile, partial(_cluster_of, options)) if isinstance(profile, str) else profile
    check_profile(chosen)
    if not name or "/" in name:
        raise UsageError(f"name: got {name!r}, must be a name without slashes")
    outputs = OutputFolder(out)
    options = options or RenderOptions()
    options = replace(options, grace_s=min(options.grace_s, _GRACE_S))
    chosen = recorded_options(chosen.with_commits(), outputs)
    checker = LineChecker(name, Path.cwd(), merged(chosen.defaults, defaults or {}), seed, policy=chosen.policy)
    planner = LinePlanner(checker, chosen, outputs, options)

    def processor(dataset: Dataset) -> Dataset:
        if dataset.context.execution_options.preserve_order:
            raise UsageError(
                "preserve_order: got True, must be False: results have the order in which shots end. "
                "To sort them, pass the number of the row as a field of `metadata`"
            )
        _watch_groups()
        lines = dataset.map_batches(
            _pickled_lines,
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0,
            fn_kwargs={"name": name, "to_fields": to_fields, "columns": Columns(keep_unknown=keep_columns)},
        )
        with own_context(ordered=False):
            listener = _MessageListener(on_message or _log.warning)
            source = one_task_source(partial(_render_rows, lines, planner, name, chosen, outputs, options, listener))
            padded = ray.data.read_datasource(source, override_num_blocks=1, **on_this_node())
            # With a strategy of its own, so that Ray Data does not run it in the task before it.
            own_tasks = ray.data.TaskPoolStrategy(size=1)
            return padded.map_batches(_without_padding, batch_size=None, batch_format="pyarrow", num_cpus=0, compute=own_tasks)

    return processor


def _cluster_of(options: RenderOptions | None) -> Cluster:
    """Return the GPUs that the options name, or those of the cluster that this process is connected to, or of this machine."""
    if options is not None and options.cluster is not None:
        return options.cluster
    return live_cluster().total if ray.is_initialized() else this_machine()


@cache
def _watch_groups() -> PeriodicTask:
    """Return the GPUs of executions that were left, as by `break` in a loop over the results. Ray then kills the task."""
    return PeriodicTask(_WATCH_INTERVAL_S, _remove_leaked_groups)


def _remove_leaked_groups() -> None:
    if not ray.is_initialized():
        return
    try:
        remove_leaked_groups()
    # Ray's head process may be restarting.
    except Exception:
        _log.debug("cannot look for placement groups, trying again", exc_info=True)


def _pickled_lines(
    block: pyarrow.Table, name: str, to_fields: Callable[[Fields], Fields] | None, columns: Columns
) -> pyarrow.Table:
    batches = batched(table_lines(name, block, to_fields, columns), BLOCK_LINES)
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
    if task_attempt() > 0:
        raise SetupError("the task that rendered the data set was lost with its process. Execute the data set again to resume")
    rows: SimpleQueue[ManifestRow | BaseException | None] = SimpleQueue()
    stop = threading.Event()

    def run() -> None:
        try:
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
        for block in _blocks(rows):
            table = pyarrow.Table.from_pylist([_with_absolute_paths(row, outputs) for row in block], schema=SCHEMA)
            padding = [bytes(max(0, PADDED_BYTES - table.nbytes)), *[None] * (len(block) - 1)]
            yield table.append_column(PADDING, pyarrow.array(padding, pyarrow.binary()))
    finally:
        stop.set()
        thread.join()


def _blocks(rows: SimpleQueue[ManifestRow | BaseException | None]) -> Iterator[list[ManifestRow]]:
    """Yield the rows before the `None` in blocks. Raises an exception that takes the place of a row."""
    now = started = time.monotonic()
    deadline = 0.0
    block: list[ManifestRow] = []
    while True:
        if block and (now >= deadline or len(block) == _BLOCK_ROWS):
            yield block
            block = []
        try:
            # When Ray cancels the task, it interrupts the thread only between two calls.
            row = rows.get(timeout=min(_POLL_S, deadline - now) if block else _POLL_S)
        except Empty:
            now = time.monotonic()
            continue
        now = time.monotonic()
        if row is None:
            break
        if isinstance(row, BaseException):
            raise row
        if not block:
            deadline = now + min(BLOCK_WAIT * (now - started), MAX_BLOCK_WAIT_S)
        block.append(row)
    if block:
        yield block


def _without_padding(block: pyarrow.Table) -> pyarrow.Table:
    return block.drop_columns(PADDING)


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
