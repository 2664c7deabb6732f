"""Plan script lines: check them, hash their files, plan content keys and look up finished shots. Estimate a run.

The first lines are planned in this process, and those that a resumed run finds finished. The rest is planned by parallel tasks
of a Ray Data stream. Ray is imported for these only.
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow
from more_itertools import batched

from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.content_keys import ShotPlan, ShotPlanner, params_of
from vidgen_ray.errors import MissingWeights, ScriptError, SetupError, VidgenError
from vidgen_ray.graph import check_profile, stages_of
from vidgen_ray.licences import ShotLicences
from vidgen_ray.nets.deferred_imports import rare_garbage_collection
from vidgen_ray.outputs.folder import OutputFolder, read_last_run
from vidgen_ray.outputs.manifest import FinishedShots, id_is_taken
from vidgen_ray.outputs.manifest_writer import script_name
from vidgen_ray.outputs.new_seeds import Seeds, read_seeds, with_new_seed
from vidgen_ray.outputs.records import Failure, ShotRecord
from vidgen_ray.planner.demand import Demand, demand_of
from vidgen_ray.planner.speed_trials import as_recorded
from vidgen_ray.profile import Profile
from vidgen_ray.script.check import LineChecker, with_cut_prompts
from vidgen_ray.script.formats import ScriptVersion, script_version
from vidgen_ray.script.lines import Line, ScriptIndex, ScriptSettings
from vidgen_ray.script.read import file_problem, iter_script, no_lines, open_lines, unique_lines
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Stage

if TYPE_CHECKING:
    import ray
    from ray.data import Dataset


FIRST_LOOK_LINES = 500
"""Lines that are planned before Ray starts. They determine the first layout. A short script needs no pipeline at all."""
BLOCK_LINES = 1_000
"""Lines per task."""
RESUME_S = 6.0
"""CPU seconds in which this process plans lines while all of them are finished. Ray and its tasks take as long to start."""
BLOCK_BYTES = 1 << 20
"""Size above which Ray Data starts a new block."""
MAX_TASKS = 16
"""Maximum number of parallel tasks. One task plans some thousand lines per second."""
NODE_LABEL = "ray.io/node-id"
ESTIMATED_LINES = 500
"""Lines that are planned together in an estimate."""


DEFAULT_OPTIONS = RenderOptions()


class LinePlanner:
    """Plans the lines of one run. Can be pickled."""

    def __init__(
        self,
        checker: LineChecker,
        profile: Profile,
        outputs: OutputFolder,
        options: RenderOptions = DEFAULT_OPTIONS,
    ) -> None:
        """Only `fresh`, `replace`, `keep_stages` and `strict_prompts` of the options count."""
        self.outputs = outputs
        self.finished: FinishedShots | None = None
        """Must be set to plan lines. Not part of the pickled planner, since it may take hundreds of megabytes."""
        checker.inputs = outputs.inputs
        self.checker = checker
        self._profile = profile
        self._fresh = options.fresh
        self._replace = options.replace
        self._keep_stages = options.keep_stages
        self._strict_prompts = options.strict_prompts
        self._planners: dict[tuple[type[Stage[Any]], ...], ShotPlanner] = {}
        self._seeds: Seeds = {}
        self.found_all = True
        """No line that was planned needs to be rendered."""

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_planners": {}, "finished": None}

    def load_finished(self) -> None:
        """Read the finished shots, and the new seeds of shots. Raises OSError if the storage fails.

        Call it before the run writes its own marker, see `FinishedShots.load`.
        """
        self._seeds = read_seeds(self.outputs.storage)
        self.finished = FinishedShots.load(self.outputs)

    def take_finished(self) -> FinishedShots | None:
        """Return the finished shots, and keep none."""
        finished, self.finished = self.finished, None
        return finished

    def plan(self, lines: Iterable[Line]) -> list[Line]:
        """Return the planned lines, in order, compared with the finished shots of the folder.

        Raises MissingWeights if this machine has not the weights that a shot needs.
        """
        planned = [*map(self._checked, lines)]
        for line in planned:
            line.results = tuple(map(self._plan_of_line, line.shots))
        if not self._replace:
            planned = [self._with_own_ids(line) for line in planned]
        if self._strict_prompts:
            planned = [_with_cut_prompts(line, strict=True) for line in planned]
        planned = self._without_cached(planned) if self._fresh else self._with_finished(planned)
        self.found_all &= not any(isinstance(each, ShotPlan | None) for line in planned for each in line.results)
        return [_with_cut_prompts(self._with_checked_files(line), strict=False) for line in planned]

    def _checked(self, line: Line) -> Line:
        """Return the line with its shots, which have the new seeds of the folder, or its errors."""
        checked = self.checker.check(line)
        return (
            replace(checked, shots=tuple(with_new_seed(shot, self._seeds) for shot in checked.shots))
            if self._seeds
            else checked
        )

    def _plan_of_line(self, shot: Shot) -> ShotPlan | Failure | None:
        if shot.continue_from is None:
            return self.plan_shot(shot)
        self._planner_of(stages_of(shot))  # Missing weights must end the run before the other shot is rendered.
        return None

    def find(self, plan: ShotPlan) -> ShotRecord | None:
        """Return the finished shot of a plan, or `None`. With `fresh`, drop its cached results instead."""
        if self._fresh:
            self._drop_cached(plan)
            return None
        found = self.outputs.find_finished(plan, self._keep_stages)
        return found and found.model_copy(update={"key": plan.key})

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
            return Failure.of("plan", error)

    def _planner_of(self, stages: tuple[type[Stage[Any]], ...]) -> ShotPlanner:
        """Return the planner for shots with these stages. Raises MissingWeights."""
        if stages not in self._planners:
            params = params_of(self._profile, stages)
            for stage in stages:
                stage.check_weights(params[stage.name])
            profile = self._profile
            self._planners[stages] = ShotPlanner(params, profile.encode, ShotLicences(profile), profile.provenance)
        return self._planners[stages]

    def _with_checked_files(self, line: Line) -> Line:
        """Return the line with a failure in place of each plan with an unusable file. Finished shots are not checked."""
        for number, (shot, result) in enumerate(zip(line.shots, line.results, strict=True)):
            if isinstance(result, ShotPlan | None) and (wrong := file_problem(shot, self._profile, line.source, line.number)):
                line.results = (*line.results[:number], Failure.of("plan", wrong), *line.results[number + 1 :])
        return line

    def _with_own_ids(self, line: Line) -> Line:
        """Reject the line if its id belongs to a finished shot of another script."""
        assert self.finished is not None
        for shot, plan in zip(line.shots, line.results, strict=True):
            if isinstance(plan, ShotPlan | None):
                key = None if plan is None else plan.key
                owner = self.finished.other_owner(shot.id or "", key, line.script)
                if owner is not None:
                    return _reject_taken_id(line, shot.id, owner)
        return line

    def _with_finished(self, planned: Sequence[Line]) -> list[Line]:
        assert self.finished is not None
        found = iter(self.finished.find(_plans(planned), self._keep_stages))
        for line in planned:
            line.results = tuple([(next(found) or each) if isinstance(each, ShotPlan) else each for each in line.results])
        return [*planned]

    def _without_cached(self, planned: list[Line]) -> list[Line]:
        for plan in _plans(planned):
            self._drop_cached(plan)
        return planned

    def _drop_cached(self, plan: ShotPlan) -> None:
        for tried in (plan, *plan.again):
            self.outputs.stage_cache.drop(step.key for step in tried.steps)


def _plans(planned: Sequence[Line]) -> list[ShotPlan]:
    return [plan for line in planned for plan in line.results if isinstance(plan, ShotPlan)]


def _with_cut_prompts(line: Line, *, strict: bool) -> Line:
    """Add notes about the prompts that text encoders cut. `strict`: reject the line instead."""
    return with_cut_prompts(line, [cut for plan in _plans([line]) for cut in plan.cut_texts], strict=strict)


def _reject_taken_id(line: Line, shot_id: str | None, owner: str) -> Line:
    error = id_is_taken(line.source, line.number, str(shot_id), owner)
    # Under the id of the shot, the row of the rejected line would replace the row of its owner.
    own_ids = {shot.id for shot in line.shots} | {line.fields.get("id")}
    return replace(line, id="" if line.id in own_ids else line.id, errors=(error,), shots=(), results=(), notes=())


def first_lines(settings: ScriptSettings) -> tuple[LineChecker, list[Line], ScriptVersion | None]:
    """Return the checker and the first lines of a script, and the version of the script if it has more lines.

    Raises ScriptError if it cannot be read or has no lines.
    """
    version = script_version(settings)
    checker, lines = open_lines(settings, version)
    first = list(islice(lines, FIRST_LOOK_LINES + 1))
    if not first:
        raise no_lines(settings.path)
    return checker, first[:FIRST_LOOK_LINES], version if len(first) > FIRST_LOOK_LINES else None


class LaterLines:
    """The lines of a script after the first ones, planned in order."""

    def __init__(self, settings: ScriptSettings, version: ScriptVersion, planner: LinePlanner) -> None:
        self._settings, self._version, self._planner = settings, version, planner
        self._read = FIRST_LOOK_LINES
        """Lines of the script that are planned already."""

    def _blocks(self) -> Iterator[tuple[Line, ...]]:
        _, lines = open_lines(self._settings, self._version)
        return batched(islice(lines, self._read, None), BLOCK_LINES)

    def finished(self) -> Iterator[list[Line] | None]:
        """Yield lines that are planned in this process, while all are finished, for `RESUME_S`; `None` after the last line.

        Raises what reading and planning raise.
        """
        deadline_s = time.thread_time() + RESUME_S
        blocks = self._blocks()
        with rare_garbage_collection():
            while self._planner.found_all and time.thread_time() < deadline_s:
                if (block := next(blocks, None)) is None:
                    yield None
                    return
                self._read += len(block)
                yield self._planner.plan(block)

    def rest(self) -> Iterator[list[Line]]:
        """Yield the other lines, planned by parallel tasks on this node, which can read the script and its files.

        Needs a connection to Ray. Raises what reading and planning raise.
        """
        import ray.data

        def tables() -> Iterator[pyarrow.Table]:
            try:
                for block in self._blocks():
                    yield pyarrow.table({"lines": [pickle.dumps(block)]})
            except ScriptError as error:
                yield pyarrow.table({"lines": [pickle.dumps(error)]})

        with own_context():
            dataset = ray.data.read_datasource(one_task_source(tables), override_num_blocks=1, **on_this_node())
            yield from planned_rows(dataset, self._planner)


def planned_rows(dataset: Dataset, planner: LinePlanner) -> Iterator[list[Line]]:
    """Plan the lines of a data set, in order. Each row has a pickled sequence of lines in its column `lines`."""

    import ray.data

    finished = ray.put(planner.take_finished())
    tasks = max(1, min(MAX_TASKS, os.cpu_count() or 1))
    planned = dataset.map_batches(
        _plan_block,
        batch_size=None,
        batch_format="pyarrow",
        # In a list, Ray passes the reference on, and the tasks of a node share one copy.
        fn_kwargs={"execution": secrets.token_hex(8), "planner": pickle.dumps(planner), "finished": [finished]},
        num_cpus=0,
        compute=ray.data.TaskPoolStrategy(size=tasks),
        label_selector=on_this_node()["label_selector"],
    )
    for block in planned.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1):
        for text in block["planned"].to_pylist():
            result: list[Line] | VidgenError = pickle.loads(text)
            if isinstance(result, VidgenError):
                raise result
            yield result


def _plan_block(block: pyarrow.Table, execution: str, planner: bytes, finished: list[ray.ObjectRef]) -> pyarrow.Table:
    """Task of Ray Data: plan the lines of each row. An error that ends the run is returned in place of the planned lines."""

    def planned(text: bytes) -> list[Line] | VidgenError:
        lines: Sequence[Line] | VidgenError = pickle.loads(text)
        try:
            return lines if isinstance(lines, VidgenError) else _planner(execution, planner, finished[0]).plan(lines)
        except VidgenError as error:
            return error

    return pyarrow.table({"planned": [pickle.dumps(planned(text)) for text in block["lines"].to_pylist()]})


_planners: dict[str, LinePlanner] = {}
"""Execution -> its planner, of the last one in this process. It keeps finished shots and the digests of files."""


def _planner(execution: str, pickled: bytes, finished: ray.ObjectRef) -> LinePlanner:
    import ray

    if execution not in _planners:
        _planners.clear()
        planner: LinePlanner = pickle.loads(pickled)
        planner.finished = ray.get(finished)
        _planners[execution] = planner
        # Otherwise the collector checks all objects of the imported modules after every few blocks: a seventh of the CPU time.
        gc.collect()
        gc.freeze()
    return _planners[execution]


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

    import ray

    return {"num_cpus": 0, "label_selector": {NODE_LABEL: ray.get_runtime_context().get_node_id()}}


@contextmanager
def own_context(*, ordered: bool = True) -> Iterator[None]:
    """Configure Ray Data for the data sets of the block, without changing the settings of others in this process."""
    import ray
    from ray.data import DataContext

    # Importing Ray Data enables its log messages about every data set. Errors are reported by vidgen itself.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    before = DataContext.get_current()
    context = before.copy()
    context.target_max_block_size = BLOCK_BYTES
    context.execution_options.preserve_order = ordered
    context.execution_no_progress_timeout_s = -1
    context.max_errored_blocks = 0
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    DataContext._set_current(context)
    try:
        yield
    except ray.exceptions.RayError as error:
        raise SetupError(f"Ray Data failed: {str(error).strip().splitlines()[0]}") from error
    finally:
        DataContext._set_current(before)


@dataclass(frozen=True, slots=True)
class ScriptCounts:
    """Line counts of a script before a run."""

    lines: int
    """Lines, with variants expanded."""
    done: int | None
    """Finished shots that are skipped. `None` if the weights needed to look them up are not on this machine."""
    rejected: int
    """Rejected lines and lines that cannot be planned."""
    cached_steps: int | None
    """Steps of pending shots whose result is in the stage cache. `None` as for `done`."""


def estimate_run(script: ScriptSettings, profile: Profile, outputs: OutputFolder) -> tuple[Demand, ScriptCounts]:
    """Return the demand and the line counts. If the weights are not on this machine, no shot counts as done."""
    check_profile(profile)
    try:
        return count_pending(script, profile, outputs)
    except SetupError:
        return _count_all(iter_script(script))


def count_pending(script: ScriptSettings, profile: Profile, outputs: OutputFolder) -> tuple[Demand, ScriptCounts]:
    done = failed = cached = 0

    def pending() -> Iterator[Shot]:
        nonlocal done, failed, cached
        for line in _planned(script, profile, outputs):
            if line.errors or isinstance(line.result, Failure):
                failed += 1
            elif isinstance(line.result, ShotPlan | None):
                if line.result is not None:
                    cached += sum(outputs.stage_cache.has(step.key) for step in line.result.steps)
                yield line.shot
            else:
                done += 1

    demand = demand_of(pending())
    return demand, ScriptCounts(demand.shots + done + failed, done, failed, cached)


def _planned(script: ScriptSettings, profile: Profile, outputs: OutputFolder) -> Iterator[Line]:
    checker, lines = open_lines(script)
    checker.script = script_name(outputs.storage, script.path)
    planner = LinePlanner(checker, profile, outputs)
    planner.load_finished()
    empty, index = True, ScriptIndex()
    for batch in batched(lines, ESTIMATED_LINES):
        empty = False
        yield from unique_lines(planner.plan(batch), index)
    if empty:
        raise no_lines(script.path)


def _count_all(lines: Iterable[Line]) -> tuple[Demand, ScriptCounts]:
    failed = 0

    def valid() -> Iterator[Shot]:
        nonlocal failed
        for line in lines:
            yield from line.shots
            failed += bool(line.errors)

    demand = demand_of(valid())
    return demand, ScriptCounts(demand.shots + failed, None, failed, None)


def recorded_options(profile: Profile, outputs: OutputFolder) -> Profile:
    """Return the profile with the tried options of the folder's last run, so that its shots keep their content keys."""
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        return as_recorded(profile, read_last_run(outputs)["profile"])
    return profile
