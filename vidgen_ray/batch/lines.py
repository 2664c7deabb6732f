"""Plan script lines: check them, hash their files, plan content keys and look up finished shots.

The first lines are planned in this process, the rest by parallel tasks of a Ray Data stream.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow
import ray
from more_itertools import batched
from numpy.typing import NDArray

from vidgen_ray.content_keys import ShotPlan, ShotPlanner, params_of
from vidgen_ray.engine.step_runner import StepFailed
from vidgen_ray.errors import FieldError, MissingWeights, ScriptError, SetupError, VidgenError
from vidgen_ray.graph import stages_of
from vidgen_ray.licences import ShotLicences
from vidgen_ray.outputs.finished import FinishedShots, id_is_taken
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.id_index import id_hashes
from vidgen_ray.outputs.manifest import ManifestRow, rows_as_columns
from vidgen_ray.outputs.records import DoneShot, Failure
from vidgen_ray.profile import Profile
from vidgen_ray.script.check import LineChecker
from vidgen_ray.script.lines import Line, ScriptIndex, ScriptSettings
from vidgen_ray.script.read import check_files, default_id, ids_of, no_lines, open_lines, unique_lines
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Stage

if TYPE_CHECKING:
    from ray.data import Dataset


class Continued(NamedTuple):
    """In place of a plan: the shot starts from the last frame of another one, and is planned when that one is finished."""

    shot: Shot


class PlannedLine(NamedTuple):
    """A checked line and, for each of its shots, what is to be done."""

    line: Line
    plans: tuple[ShotPlan | Continued | Failure | None, ...] = ()
    """Plan of each shot. A failure if it names a file that does not exist or cannot be read. `None` if the shot is finished."""
    done: tuple[DoneShot | None, ...] = ()
    """Each shot that an earlier run has finished."""


class FinishedLines(NamedTuple):
    """Lines whose shots are all finished, as columns."""

    rows: pyarrow.RecordBatch
    """Manifest rows of their shots. The run is still missing."""
    hashes: NDArray[np.bytes_]
    """Hash of the id of each row. See `id_hashes`."""
    positions: tuple[int, ...]
    """Position of each line in its block."""
    notes: tuple[str, ...]
    """Notes of all lines."""
    lines: bytes
    """The lines before their check, a pickled sequence of `Line`. Only needed if an id is taken."""


class PlannedBlock(NamedTuple):
    """Planned lines that follow each other in a script."""

    others: tuple[PlannedLine, ...]
    """All lines but the finished ones, in order."""
    finished: FinishedLines | None


class LinePlanner:
    """Plans the lines of one run. Can be pickled."""

    def __init__(
        self,
        checker: LineChecker,
        profile: Profile,
        outputs: OutputFolder,
        *,
        fresh: bool = False,
        replace: bool = False,
        keep_stages: bool = False,
    ) -> None:
        """`fresh`: do not look up finished shots, and drop their cached results. `replace`: also those of other scripts."""
        self.outputs = outputs
        self.finished: FinishedShots | None = None
        """Must be set to plan lines. Not part of the pickled planner, since it may take hundreds of megabytes."""
        self.changed_by: Sequence[str] | None = None
        """See `FinishedShots.load`. Set it before the run writes its own marker."""
        self.checker = checker
        self._profile = profile
        self._fresh = fresh
        self._replace = replace
        self._keep_stages = keep_stages
        self._planners: dict[tuple[type[Stage[Any]], ...], ShotPlanner] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_planners": {}, "finished": None}

    def load_finished(self, only: Sequence[str] | None = None) -> None:
        """Read the finished shots, or those with the ids `only`. Raises OSError if the storage fails."""
        self.finished = FinishedShots.load(self.outputs, self.changed_by, only)
        self.changed_by = self.finished.changed_by

    def plan_first(self, lines: Sequence[Line]) -> PlannedBlock:
        """Return these lines as `plan_block` does. Reads only what the manifest says about them."""
        checked = self._check(lines)
        self.load_finished([plan.shot.id or "" for plan in _plans(checked)])
        planned = self._compared(checked)
        self.finished = None
        return _as_block(lines, planned)

    def plan_block(self, lines: Sequence[Line], pickled: bytes | None = None) -> PlannedBlock:
        """Return the planned lines, finished ones as columns. Raises the errors of `plan`. `pickled`: these lines, if known."""
        return _as_block(lines, self.plan(lines), pickled)

    def plan(self, lines: Iterable[Line]) -> list[PlannedLine]:
        """Return the planned lines, in order. Raises MissingWeights if this machine has not the weights that a shot needs."""
        return self._compared(self._check(lines))

    def _check(self, lines: Iterable[Line]) -> list[PlannedLine]:
        planned = []
        for line in map(self.checker.check, lines):
            planned.append(PlannedLine(line, tuple(map(self._plan_of_line, line.shots)), (None,) * len(line.shots)))
        return planned

    def _compared(self, planned: list[PlannedLine]) -> list[PlannedLine]:
        """Compare the lines with the finished shots of the folder."""
        if not self._replace:
            planned = self._without_taken_ids(planned)
        planned = self._without_cached(planned) if self._fresh else self._with_done(planned)
        return [self._with_checked_files(line) for line in planned]

    def _plan_of_line(self, shot: Shot) -> ShotPlan | Continued | Failure:
        if shot.continue_from is None:
            return self.plan_shot(shot)
        self._planner_of(stages_of(shot))  # Missing weights must end the run before the other shot is rendered.
        return Continued(shot)

    def find(self, plan: ShotPlan) -> DoneShot | None:
        """Return the finished shot of a plan, or `None`. With `fresh`, drop its cached results instead."""
        if not self._fresh:
            return self.outputs.find_finished(plan, self._keep_stages)
        self._drop_cached(plan)
        return None

    def plan_shot(self, shot: Shot) -> ShotPlan | Failure:
        """Plan a shot with all of its files. Raises MissingWeights."""
        # Outside the `try`: missing weights fail the run, not the line.
        stages = stages_of(shot)
        planner = self._planner_of(stages)
        try:
            return planner(shot, stages=stages)
        except MissingWeights:
            raise
        except (VidgenError, OSError) as error:
            return StepFailed("plan", error).failure()

    def _planner_of(self, stages: tuple[type[Stage[Any]], ...]) -> ShotPlanner:
        """Return the planner for shots with these stages. Raises MissingWeights."""
        if stages not in self._planners:
            params = params_of(self._profile, stages)
            for stage in stages:
                stage.check_weights(params[stage.name])
            profile = self._profile
            self._planners[stages] = ShotPlanner(params, profile.encode, ShotLicences(profile), profile.provenance)
        return self._planners[stages]

    def _with_checked_files(self, line: PlannedLine) -> PlannedLine:
        """Return the line with a failure in place of each plan with an unusable file. Finished shots are not checked."""

        def checked(plan: ShotPlan | Continued | Failure | None) -> ShotPlan | Continued | Failure | None:
            if isinstance(plan, ShotPlan | Continued) and (wrong := check_files(plan.shot)):
                source, number = line.line.source, line.line.number
                errors = [FieldError(source, number, field, "an unusable file", str(error)) for field, error in wrong]
                return StepFailed("plan", ScriptError(errors)).failure()
            return plan

        return line._replace(plans=tuple(map(checked, line.plans)))

    def _without_taken_ids(self, planned: Sequence[PlannedLine]) -> list[PlannedLine]:
        """Reject the lines whose id belongs to a finished shot of another script."""
        assert self.finished is not None
        owners = iter(
            self.finished.other_owners(
                _with_ids(planned),
                [line.line.script for line in planned for _ in _with_ids([line])],
            )
        )
        checked = []
        for each in planned:
            taken = [(plan.shot.id, owner) for plan in _with_ids([each]) if (owner := next(owners)) is not None]
            if taken:
                each = PlannedLine(_reject_taken_id(each.line, *taken[0]))
            checked.append(each)
        return checked

    def _with_done(self, planned: Sequence[PlannedLine]) -> list[PlannedLine]:
        assert self.finished is not None
        found = iter(self.finished.find(_plans(planned), self._keep_stages))
        looked_up = []
        for line in planned:
            done = tuple(next(found) if isinstance(plan, ShotPlan) else None for plan in line.plans)
            # Plans are large, and those of finished shots are not needed.
            plans = tuple(plan if shot is None else None for plan, shot in zip(line.plans, done, strict=True))
            looked_up.append(line._replace(plans=plans, done=done))
        return looked_up

    def _without_cached(self, planned: list[PlannedLine]) -> list[PlannedLine]:
        for plan in _plans(planned):
            self._drop_cached(plan)
        return planned

    def _drop_cached(self, plan: ShotPlan) -> None:
        for attempt in (plan, *plan.again):
            self.outputs.stage_cache.drop(step.key for step in attempt.steps)


def _plans(planned: Sequence[PlannedLine]) -> list[ShotPlan]:
    return [plan for line in planned for plan in line.plans if isinstance(plan, ShotPlan)]


def _with_ids(planned: Sequence[PlannedLine]) -> list[ShotPlan]:
    """Return the plans, with a plan that equals no finished shot for each shot that has none yet."""
    plans = [plan for line in planned for plan in line.plans if isinstance(plan, ShotPlan | Continued)]
    return [plan if isinstance(plan, ShotPlan) else ShotPlan(shot=plan.shot, steps=(), key="") for plan in plans]


def _reject_taken_id(line: Line, shot_id: str | None, owner: str) -> Line:
    error = id_is_taken(line.source, line.number, str(shot_id), owner)
    # Under the id of the shot, the row of the rejected line would replace the row of its owner.
    own_ids = {shot.id for shot in line.shots} | {line.fields.get("id")}
    return replace(line, id="" if line.id in own_ids else line.id, errors=(error,), shots=(), notes=())


def _as_block(lines: Sequence[Line], planned: Sequence[PlannedLine], pickled: bytes | None = None) -> PlannedBlock:
    others, positions, rows, notes = list[PlannedLine](), list[int](), list[ManifestRow](), list[str]()
    for position, each in enumerate(planned):
        line = each.line
        if line.errors or line.failed_as is not None or None in each.done:
            others.append(each)
            continue
        positions.append(position)
        notes += line.notes
        rows += [
            ManifestRow.of_shot("", line.script, shot, line.number, done, "skipped")
            for shot, done in zip(line.shots, each.done, strict=True)
            if done is not None
        ]
    if not positions:
        return PlannedBlock(tuple(others), None)
    hashes = id_hashes(row.id for row in rows)
    if pickled is None or len(positions) < len(lines):
        pickled = pickle.dumps([lines[position] for position in positions])
    return PlannedBlock(tuple(others), FinishedLines(rows_as_columns(rows), hashes, tuple(positions), tuple(notes), pickled))


class PlannedShot(NamedTuple):
    """A shot with a unique id and what is to be done, or a rejected line."""

    line: Line
    """Line with this shot only, or with errors."""
    plan: ShotPlan | Continued | Failure | None = None
    """`None` if the shot is finished."""
    done: DoneShot | None = None
    """The finished shot. `None` if it is not finished or has a row in `FinishedLines`."""


def _claimed_ids(line: Line) -> set[str]:
    """Return the ids that `unique_lines` may give to the shots of the line or to the line."""
    ids = {*ids_of(line)}
    return ids if line.shots or line.id else ids | {default_id(line)}


def unique_shots_of_block(
    block: PlannedBlock, index: ScriptIndex, check: Callable[[Line], Line]
) -> tuple[list[PlannedShot], pyarrow.RecordBatch | None]:
    """Return what `unique_shots` yields for the lines of the block, but finished shots as manifest rows, if there are any.

    `check`: `LineChecker.check`.
    """
    if block.finished is None:
        return list(unique_shots(block.others, index)), None
    rows, hashes, positions, _, text = block.finished
    other_ids = id_hashes(id_ for each in block.others for id_ in _claimed_ids(each.line))
    if index.are_new(np.concatenate([hashes, other_ids])):
        index.add_hashes(hashes, rows.column("line").to_numpy())
        return list(unique_shots(block.others, index)), rows
    # Rare: compare the lines one by one, in order.
    planned = list(block.others)
    for position, line in zip(positions, map(check, pickle.loads(text)), strict=True):
        none = (None,) * len(line.shots)
        planned.insert(position, PlannedLine(line, none, none))
    first_row = {id_: number for number, id_ in reversed([*enumerate(rows.column("id").to_pylist())])}
    shots, kept = list[PlannedShot](), list[int]()
    for shot in unique_shots(planned, index):
        if shot.line.shots and shot.plan is None and shot.done is None:
            kept.append(first_row[shot.line.shot.id])
        else:
            shots.append(shot)
    return shots, rows.take(pyarrow.array(kept, pyarrow.int64()))


def unique_shots(planned: Sequence[PlannedLine], index: ScriptIndex) -> Iterator[PlannedShot]:
    """Yield the shots and the rejected lines, each with an id that no earlier line has. See `unique_lines`."""
    first_with_id: dict[str | None, tuple[ShotPlan | Continued | Failure | None, DoneShot | None]] = {}
    for each in reversed(planned):
        first_with_id.update(
            (shot.id, (plan, done)) for shot, plan, done in zip(each.line.shots, each.plans, each.done, strict=True)
        )
    for line in unique_lines([each.line for each in planned], index):
        yield PlannedShot(line) if line.errors else PlannedShot(line, *first_with_id[line.shot.id])


FIRST_LOOK_LINES = 500
"""Lines that are planned before Ray starts. They determine the first layout. A short script needs no pipeline at all."""
BLOCK_LINES = 1_000
"""Lines per task."""
BLOCK_BYTES = 1 << 20
"""Size above which Ray Data starts a new block."""
MAX_TASKS = 16
"""Maximum number of parallel tasks. One task plans some thousand lines per second."""
NODE_LABEL = "ray.io/node-id"


def first_lines(settings: ScriptSettings) -> tuple[LineChecker, list[Line], bool]:
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
        lines: Sequence[Line] | VidgenError = pickle.loads(text)
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
