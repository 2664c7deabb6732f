"""Stream of planned lines: the first ones are planned in this process, the rest by parallel tasks of a Ray Data pipeline."""

from __future__ import annotations

import gc
import logging
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow
import ray
from more_itertools import batched

from vidgen_ray.batch.line_planner import LinePlanner, NumberedLine, PlannedBlock
from vidgen_ray.errors import ScriptError, SetupError, VidgenError
from vidgen_ray.outputs.finished import FinishedShots
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.script.check import LineChecker
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import no_lines, open_lines

if TYPE_CHECKING:
    from ray.data import Dataset

FIRST_LOOK_LINES = 500
"""Lines that are planned before Ray starts. They determine the first layout. A short script needs no pipeline at all."""
BLOCK_LINES = 1_000
"""Lines per task."""
BLOCK_BYTES = 1 << 20
"""Size above which Ray Data starts a new block."""
MAX_TASKS = 16
"""Maximum number of parallel tasks. One task plans some thousand lines per second."""
NODE_LABEL = "ray.io/node-id"


def first_lines(settings: ScriptSettings) -> tuple[LineChecker, list[NumberedLine], bool]:
    """Return the checker and the first lines of a script, and whether these are all.

    Raises ScriptError if it cannot be read or has no lines.
    """
    checker, lines = open_lines(settings)
    first = list(islice(lines, FIRST_LOOK_LINES + 1))
    if not first:
        raise no_lines(settings.path)
    return checker, first[:FIRST_LOOK_LINES], len(first) <= FIRST_LOOK_LINES


def remaining_lines(settings: ScriptSettings, planner: LinePlanner) -> Iterator[PlannedBlock]:
    """Yield the lines after the first ones, planned by parallel tasks on the node of this process, in order.

    That node can read the script and its files. Needs a connection to Ray. Raises what reading and planning raise.
    """

    def blocks() -> Iterator[pyarrow.Table]:
        try:
            _, lines = open_lines(settings)
            for batch in batched(islice(lines, FIRST_LOOK_LINES, None), BLOCK_LINES):
                yield pyarrow.table({"lines": [pickle.dumps(batch)]})
        except ScriptError as error:
            yield pyarrow.table({"lines": [pickle.dumps(error)]})

    with own_context():
        dataset = ray.data.read_datasource(one_task_source(blocks), override_num_blocks=1, **on_this_node())
        yield from planned_rows(dataset, planner)


def planned_rows(dataset: Dataset, planner: LinePlanner) -> Iterator[PlannedBlock]:
    """Plan the lines of a data set, in order. Each row has a pickled sequence of lines in its column `lines`."""
    finished = ray.remote(_load_finished).options(**on_this_node()).remote(planner.outputs, planner.changed_by)
    tasks = max(1, min(MAX_TASKS, os.cpu_count() or 1))
    planned = dataset.map_batches(
        _plan_block,
        batch_size=None,
        batch_format="pyarrow",
        # Loaded by a task and in a list: then the driver has no copy, and the tasks of a node share one.
        fn_kwargs={"planner": pickle.dumps(planner), "finished": [finished]},
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(size=tasks),
        label_selector=on_this_node()["label_selector"],
    )
    for block in planned.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        for text in block["planned"].to_pylist():
            result: PlannedBlock | VidgenError = pickle.loads(text)
            if isinstance(result, VidgenError):
                raise result
            yield result


def _load_finished(outputs: OutputFolder, changed_by: Sequence[str] | None) -> FinishedShots:
    return FinishedShots.load(outputs, changed_by)


def _plan_block(block: pyarrow.Table, planner: bytes, finished: list[ray.ObjectRef]) -> pyarrow.Table:
    """Task of Ray Data: plan the lines of each row. An error that ends the run is returned in place of the planned lines."""

    def planned(text: bytes) -> PlannedBlock | VidgenError:
        lines: Sequence[NumberedLine] | VidgenError = pickle.loads(text)
        try:
            return lines if isinstance(lines, VidgenError) else _planner(planner, finished[0]).plan_block(lines, text)
        except VidgenError as error:
            return error

    return pyarrow.table({"planned": [pickle.dumps(planned(text)) for text in block["lines"].to_pylist()]})


_planners: dict[bytes, LinePlanner] = {}
"""Planner of the last run in this process. It keeps the digests of files, and tasks of a run share processes."""


def _planner(pickled: bytes, finished: ray.ObjectRef) -> LinePlanner:
    if pickled not in _planners:
        _planners.clear()
        planner: LinePlanner = pickle.loads(pickled)
        planner.finished = ray.get(finished)
        _planners[pickled] = planner
        # Otherwise the collector checks all objects of the imported modules after every few blocks: a seventh of the CPU time.
        gc.collect()
        gc.freeze()
    return _planners[pickled]


def one_task_source(blocks: Callable[[], Iterator[pyarrow.Table]]) -> Any:
    """Return a data source of Ray Data with one task, which yields these blocks."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class OneTask(Datasource):  # type: ignore[misc]  # Ray Data has no types
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *args: Any, **kwargs: Any) -> list[ReadTask]:
            metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(blocks, metadata)]

    return OneTask()


def on_this_node() -> dict[str, Any]:
    """Return the options of tasks that run on the node of this process, which may offer no CPUs to Ray."""
    return {"num_cpus": 0, "label_selector": {NODE_LABEL: ray.get_runtime_context().get_node_id()}}


@contextmanager
def own_context(block_bytes: int = BLOCK_BYTES, *, ordered: bool = True) -> Iterator[None]:
    """Configure Ray Data for the data sets of the block, without changing the settings of others in this process."""
    from ray.data import DataContext

    # Importing Ray Data enables its log messages about every data set. Errors are reported by vidgen itself.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    before = DataContext.get_current()
    context = before.copy()
    context.target_max_block_size = block_bytes
    context.execution_options.preserve_order = ordered
    context.execution_no_progress_timeout_s = -1
    context.max_errored_blocks = 0
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    DataContext._set_current(context)
    try:
        yield
    except ray.exceptions.RayError as error:
        raise SetupError(f"Ray Data cannot read the script: {str(error).strip().splitlines()[0]}") from error
    finally:
        DataContext._set_current(before)
