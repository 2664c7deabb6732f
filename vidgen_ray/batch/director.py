"""Director of a batch run: feeds the renderer with shots, chooses the layouts, and records the results.

Everything runs in one event loop in the driver, except for the reader of the script, which is a thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import ray

from vidgen_ray.batch.line_planner import LinePlanner
from vidgen_ray.batch.progress import RunRecorder
from vidgen_ray.batch.results import RunMetrics, RunResults
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.batch.shot_queue import MAX_SHOTS, ContinuedShots, ShotQueue, Task
from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.calls import ShotFailed
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.engine import Engine, Renderer
from vidgen_ray.engine.fleet import FIRST_MESSAGE_S, MESSAGE_INTERVAL_S, PlacedSlot, labels_of, placed_more_slots
from vidgen_ray.engine.messages import Kind
from vidgen_ray.engine.ray_cluster import LiveCluster, connected, expect_gpus, live_cluster
from vidgen_ray.engine.recording import Recorder
from vidgen_ray.engine.status import Snapshot
from vidgen_ray.engine.storage_pause import StoragePause
from vidgen_ray.errors import (
    MAX_MESSAGES,
    OutOfMemory,
    ProfileError,
    ScriptError,
    SetupError,
    StorageHangs,
    TooExpensive,
    UsageError,
)
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.lease import Lease
from vidgen_ray.outputs.manifest import ManifestRow, ids_that_failed_before
from vidgen_ray.outputs.records import Failure, ShotRecord
from vidgen_ray.planner.choose_layout import Plan, cpus_needed, plan_run
from vidgen_ray.planner.cluster import Cluster, this_machine
from vidgen_ray.planner.demand import Demand, demand_of, load_calibration
from vidgen_ray.planner.gpu_memory import SizeCheck
from vidgen_ray.planner.layout import Slot
from vidgen_ray.profile import Profile
from vidgen_ray.render.cache_writer import bytes_per_worker, cache_settings
from vidgen_ray.script.lines import Line, ScriptIndex
from vidgen_ray.script.read import unique_lines
from vidgen_ray.shot import Shot
from vidgen_ray.system.quantities import amount_text, count, money
from vidgen_ray.system.threads import to_daemon_thread

Remaining = Callable[[], Iterator[Sequence[Line]]]
"""Starts to read the lines after the first ones. Needs a connection to Ray. Blocks while it waits for lines."""
STOP_POLL_S = 0.1
"""Seconds between two checks of the stop request."""
VISIBILITY_TIMEOUT_S = 60.0
"""Seconds until a file written by a worker must be visible to the driver. Network file systems cache that a file is missing."""
BREAKER_SHOTS = 20
"""Last shots that decide whether the run stops because nearly all shots fail."""
BREAKER_FAILURES = 18
MANY_SHOTS = 100
"""Factor for the demand of the first lines while the length of the script is unknown: all GPUs are worth starting."""


class Director:
    """Feeds the renderer with shots and records their results."""

    def __init__(
        self,
        profile: Profile,
        outputs: OutputFolder,
        options: RenderOptions,
        results: RunResults,
        listener: RunRecorder,
        stop: threading.Event,
        planner: LinePlanner,
        demand: Demand | None,
        lease: Lease,
    ) -> None:
        self._lease = lease
        self._run = listener.labels.run
        self._profile = profile
        self._outputs = outputs
        self._options = options
        self._results = results
        self._listener = listener
        self._stop = stop
        self._continued = ContinuedShots(outputs, planner.plan_shot, planner.find)
        self._index = ScriptIndex()
        self.queue = ShotQueue()
        self.plan: Plan | None = None
        self.left = 0
        self.cost: float | None = None
        self._gpu_cost = 0.0
        """Cost so far of the GPUs that the run holds. `None` without GPUs."""
        self._metered_at = 0.0
        """Time of the event loop until which `cost` is computed."""
        self._measured_from: tuple[int, float] | None = None
        """Finished shots, and the cost until then, from which the cost of a shot is measured: without loading the weights."""
        self._over_cost = False
        """The run stops because its cost reaches `max_cost`."""
        self._notes = 0
        """Settings without effect in the lines so far."""
        self._step_notes: set[str] = set()
        """Notes of stages so far."""
        self.quarantined: list[str] = []
        self.cluster = options.cluster
        self._demand = demand
        self._sizes: SizeCheck | None = None
        """Set when the GPUs are known, if there are any."""
        self._own_ray = False
        self._renderer: Renderer | None = None
        self._plans = self._engines = 0
        """Number of the last plan, and of the one that the last engine was started with."""
        self._rendering: dict[asyncio.Task[None], Task] = {}
        self._changed = asyncio.Event()
        """Set when the queue, the shots in progress or the reader have changed."""
        self._reading = False
        self._error: BaseException | None = None
        """Error that ends the run."""
        self._outcomes: deque[tuple[str, Failure | None]] = deque(maxlen=BREAKER_SHOTS)
        """Ids of the last shots, and the failure of those that failed on every worker."""
        self._breaker_lock = asyncio.Lock()
        self._failed_before: frozenset[str] | None = None
        """Ids that failed in earlier runs. Read when the circuit breaker would stop the run for the first time."""
        self._folder_checked = False
        self._storage = StoragePause(self._probe_storage, options.wait_storage_s, self._on_storage_change)
        self._metrics: RunMetrics | None = None
        # Before Ray starts.
        self._recorder = _opened(options.record, listener.on_message)
        self._stop_watch: asyncio.Task[None] | None = None
        """Ends after a stop request or an error."""
        self._idle_since, self._next_idle_message_s = time.monotonic(), FIRST_MESSAGE_S
        """Time since when all shots so far are rendered, and the seconds until the next message about that."""
        self._idle_message: asyncio.Task[None] | None = None
        """Kept, because an event loop may drop tasks that nothing refers to."""

    # Lines

    def accept(self, lines: Sequence[Line]) -> None:
        """Queue the pending shots of lines, and record the other ones."""
        for line in unique_lines(lines, self._index):
            self._report_notes(line.notes)
            if line.errors:
                self._results.rejected(line)
                self._settle(self._continued.failed(line.id, "its line was rejected"))
            elif isinstance(result := line.result, Failure):
                self._results.unplannable(line, result)
                self._settle(self._continued.failed(line.shot.id or "", result.message))
            elif isinstance(result, ShotRecord | ManifestRow):
                self._results.skipped(line, result)
            else:
                self._results.pending()
                self._settle(self._continued.accept(line)) if result is None else self._enqueue(Task(result, line))
        self._changed.set()

    def _enqueue(self, task: Task) -> None:
        self._continued.opened(task.plan.shot.id or "")
        self.queue.add(task)

    def _settle(self, decided: Sequence[Line]) -> None:
        """Queue the shots that no longer wait for another one, or record their results."""
        for line in decided:
            if isinstance(result := line.result, ShotPlan):
                self._enqueue(Task(result, line))
            elif isinstance(result, ShotRecord):
                self._results.found(line, result)
            elif isinstance(result, Failure):
                self._results.failed(line, result)
        while self._continued.repeated:
            self._enqueue(self._continued.repeated.pop())
        self._changed.set()

    def _report_notes(self, notes: Sequence[str]) -> None:
        """Report settings without effect."""
        for note in notes:
            self._notes += 1
            if self._notes <= MAX_MESSAGES:
                self._listener.on_message(f"note: {note}")
            elif self._notes == MAX_MESSAGES + 1:
                self._listener.on_message("note: more settings have no effect; `vidgen validate --json` lists all of them")

    def _report_step_notes(self, line: Line, record: ShotRecord) -> None:
        """Report what the stages noted about the inputs, each note once: every worker notes the LoRAs that it loads."""
        for note in (note for step in record.stages for note in step.notes):
            if note not in self._step_notes and len(self._step_notes) < MAX_MESSAGES:
                self._step_notes.add(note)
                self._listener.on_message(f"note: {line.script} line {line.script_line}, {note}")

    def connected(self, *, complete: bool, on_lost: Callable[[str], object]) -> AbstractContextManager[None]:
        """Return the context in which Ray is connected. `complete`: the queue has all shots of the script.

        `on_lost`: called in another thread before the process ends because Ray is lost, with the reason.
        """
        self._own_ray = self._options.address is None and not ray.is_initialized()
        cpus = 0.0
        if self._own_ray:
            self.cluster = self._options.cluster or this_machine()
            # CPUs for workers that a later plan may need.
            cpus = 0.0 if complete else 2 * self.cluster.cpus
            if self.queue:
                self._make_plan([*self.queue], LiveCluster(self.cluster, self.cluster), complete=complete)
                assert self.plan is not None
                cpus = max(cpus, cpus_needed(self.plan.layout))
        return connected(self._options.address, cpus, on_lost=on_lost)

    @property
    def complete(self) -> bool:
        """True if the script was read to its end."""
        return not self._reading

    # Rendering

    async def render(self, remaining: Remaining | None) -> None:
        """Render all shots. Returns when every line has a result, or after a stop request."""
        self._metrics = RunMetrics(self._listener.labels, self._on_quarantined, self._listener.on_attempt)
        self._reading = remaining is not None
        self._metered_at = asyncio.get_running_loop().time()
        self._stop_watch = asyncio.ensure_future(self._watch_stop())
        self._stop_watch.add_done_callback(lambda _: self._changed.set())
        self._renderer = Renderer(self._on_status, self._make_engine)
        if remaining is not None:
            self._start_reader(remaining)
        try:
            await self._feed(self._renderer)
            if self._error is not None:
                raise self._error
        except StorageHangs:
            self._lease.hangs = True
            raise
        finally:
            for task in (self._stop_watch, *self._rendering):
                task.cancel()
            self._meter_cost()
            await self._renderer.stop()
            if self._recorder is not None:
                self._recorder.close()

    async def _feed(self, renderer: Renderer) -> None:
        """Give shots to the renderer as long as there are any."""
        while self._error is None:
            if self._stop.is_set():
                self.left = len(self.queue) + len(self._continued)
                break
            if not self.queue:
                if not (self._reading or self._rendering):
                    return
                await self._next_change()
                continue
            task = self._continued.with_last_frame(self.queue.pop())
            if (failure := self._size_failure(task.plan.shot)) is not None:
                self._record(task, failure)
            elif not await self._admitted(task, renderer):
                self.left = len(self.queue) + len(self._continued) + 1
                break
        await self._finish_shots()
        if self._error is None and not self._stop.is_set():
            # The last rows of the manifest are written next.
            await self._storage.writable_again()

    def _size_failure(self, shot: Shot) -> Failure | None:
        """Return the failure of a shot that fits on no GPU. `None` if it fits, or while the GPUs are unknown."""
        refused = self._sizes.refused_by(shot) if self._sizes is not None else None
        return None if refused is None else Failure.of(refused[0], OutOfMemory(refused[1]))

    async def _next_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()

    async def _admitted(self, task: Task, renderer: Renderer) -> bool:
        """Start a shot. Waits until the window has room for it. Returns false if the run was stopped before that."""
        admitted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Called again if another engine renders the shot.
        rendering = asyncio.ensure_future(self._render(task, renderer, admitted.cancel))
        self._rendering[rendering] = task
        rendering.add_done_callback(self._ended)
        assert self._stop_watch is not None
        await asyncio.wait([admitted, rendering, self._stop_watch], return_when=asyncio.FIRST_COMPLETED)
        if admitted.done() or rendering.done():
            return True
        rendering.cancel()
        return False

    def _ended(self, rendering: asyncio.Task[None]) -> None:
        del self._rendering[rendering]
        if not rendering.cancelled() and (error := rendering.exception()) is not None:
            self._fail(error)
        self._changed.set()

    def _fail(self, error: BaseException) -> None:
        """End the run with this error, unless it ends with another one."""
        self._error = self._error or error
        self._changed.set()

    async def _finish_shots(self) -> None:
        """Wait for the shots in progress. Raises KeyboardInterrupt if they take longer than the grace period.

        Raises TooExpensive instead if the run stops because of its cost.
        """
        # After an unreadable part of the script, the engine is still in order.
        if not self._rendering or not isinstance(self._error, ScriptError | None):
            return
        _, unfinished = await asyncio.wait(list(self._rendering), timeout=self._options.grace_s)
        if unfinished:
            self.left += len(unfinished)
            raise self.cost_error() or KeyboardInterrupt

    async def _render(self, task: Task, renderer: Renderer, on_admitted: Callable[[], object]) -> None:
        result: ShotRecord | Failure
        kind: Kind | None = None
        try:
            result = await renderer.render(task.plan, on_admitted=on_admitted)
        except ShotFailed as failed:
            result, kind = failed.failure, failed.kind
            fatal = renderer.engine.fatal_failure if renderer.engine is not None else None
            if fatal is not None and fatal.stage == result.stage:
                raise SetupError(fatal.message) from None
        # No engine can be planned or started, or the output folder cannot be written.
        except (SetupError, ProfileError, TooExpensive, ray.exceptions.RayError):
            raise
        # A bug in vidgen fails the shot, not the run.
        except Exception as error:
            result, kind = Failure.of("director", error), Kind.ERROR
        if isinstance(result, ShotRecord) and not self._folder_checked:
            self._folder_checked = True
            await self._check_folder(task.plan)
        self._record(task, result)
        shot_id = task.plan.shot.id or ""
        # One after another: reading the earlier failures takes time, in which others would change the number in the message.
        async with self._breaker_lock:
            await self._check_breaker(
                shot_id, result if isinstance(result, Failure) and kind in (Kind.ERROR, Kind.NODE) else None
            )

    async def _check_folder(self, plan: ShotPlan) -> None:
        """Raise SetupError if the driver does not see a finished shot."""
        while True:
            try:
                return await to_daemon_thread(_check_shared_folder, plan, self._outputs)
            except OSError as error:
                await self._storage.wait(str(error))

    def _record(self, task: Task, result: ShotRecord | Failure) -> None:
        """Record the result of a shot, and settle the shots that wait for it."""
        if self._metrics is not None:
            self._metrics.shot_ended("failed" if isinstance(result, Failure) else "done")
        shot_id = task.plan.shot.id or ""
        if isinstance(result, Failure):
            if task.line is not None:
                self._results.failed(task.line, result)
            self._settle(self._continued.failed(shot_id, result.message))
        else:
            if task.line is not None:
                self._results.finished(task.line, result)
                self._report_step_notes(task.line, result)
            self._settle(self._continued.done(shot_id))

    async def _check_breaker(self, shot_id: str, failure: Failure | None) -> None:
        """Record the outcome of a shot. Raises SetupError if nearly all of the last shots failed on every worker.

        Failures of shots that failed in an earlier run as well do not count: the run would stop before all other lines again.
        """
        if failure is not None and shot_id in (self._failed_before or ()):
            return
        self._outcomes.append((shot_id, failure))
        if len(self._failures()) >= BREAKER_FAILURES and self._failed_before is None:
            try:
                known = await to_daemon_thread(ids_that_failed_before, self._outputs.storage, self._run)
            except OSError:
                # Asked again after the next shot, when the storage may respond.
                return
            self._failed_before = known
            counted = [outcome for outcome in self._outcomes if outcome[1] is None or outcome[0] not in known]
            self._outcomes = deque(counted, maxlen=BREAKER_SHOTS)
        if len(failures := self._failures()) >= BREAKER_FAILURES:
            raise SetupError(
                f"stopped, because {len(failures)} of the last {len(self._outcomes)} shots failed on every worker that was "
                f"tried, the last one in {failures[-1].stage}: {failures[-1].message}. Remove the cause and start again"
            )

    def _failures(self) -> list[Failure]:
        return [failure for _, failure in self._outcomes if failure is not None]

    # Engines

    async def _make_engine(self, needed: ShotPlan) -> Engine:
        """Start an engine for the shots so far. Raises ShotFailed if the needed one fits on no GPU, else as `plan_run`."""
        shots = [*self._rendering.values(), *self.queue]
        if self._engines == self._plans:
            known = self.cluster if self._own_ray else self._options.cluster
            live = LiveCluster(known, known) if known else await asyncio.to_thread(live_cluster)
            self._make_plan(shots, live, complete=not self._reading)
        if (failure := self._size_failure(needed.shot)) is not None:
            # The GPUs are known only now.
            raise ShotFailed(failure, Kind.MEMORY)
        assert self.plan is not None
        assert self.cluster is not None
        layout, options = self.plan.layout, self._options
        if self._own_ray:
            expect_gpus(sum(slot.gpus for slot in layout.slots))
        self._engines = self._plans
        config = EngineConfig(
            name=f"{self._run}/{self._engines}",
            profile=self._profile.with_options(self.plan.options).pinned([STAGE_BY_NAME[name] for name in layout.stages]),
            outputs=self._outputs,
            stages=options.stages,
            planned_s=self.plan.reference_s,
            cache=cache_settings(options.cache, options.keep_stages, max_bytes=bytes_per_worker(options.cache_gb, layout)),
            keep_stages=options.keep_stages,
            attempts=options.attempts,
            circuit_breaker=True,
        )
        assert self._metrics is not None
        # With --gpus, the plan uses all GPUs that there will be.
        may_grow = not self._own_ray and options.cluster is None
        more = self._more_slots if may_grow else None
        engine = Engine(config, layout, self._metrics, self._storage, more, self._listener.on_message, self._recorder)
        try:
            await engine.start(labels_of(self.plan, self.cluster))
        except BaseException:
            await engine.stop()
            raise
        return engine

    def _make_plan(self, tasks: Sequence[Task], live: LiveCluster, *, complete: bool) -> None:
        """Choose the layout for these shots and, if the script has more, for many like them. Raises TooExpensive."""
        gpus = live.total.gpus
        self._sizes = SizeCheck(self._profile, max(gpus)) if gpus else None
        shots = [*(task.plan.shot for task in tasks), *self._continued.shots]
        # If none fits, the planner says why.
        demand = demand_of([shot for shot in shots if not self._size_failure(shot)] or shots)
        if not complete:
            demand = self._demand or demand.scaled(MANY_SHOTS)

        def planned(cluster: Cluster) -> Plan:
            calibration = load_calibration(self._profile.name, cluster.card)
            return plan_run(self._profile, demand, cluster, calibration=calibration, price=self._options.price)

        self.plan, self.cluster = live.plan(planned)
        self._results.price, self._results.currency = self.plan.price_per_gpu_hour, self.plan.currency
        self._plans += 1
        # Later plans are for the shots that are left, and the demand of a data set is unknown: the running cost limits them.
        if self._plans == 1 and (complete or self._demand is not None):
            self.plan.check_cost(self._options.max_cost)
        if self._options.max_cost is not None and self.plan.cost is None:
            self._listener.on_message("--max-cost has no effect: a run without GPUs and priced servers has no price")

    def _more_slots(self, present: Sequence[Slot], free: Cluster) -> list[PlacedSlot]:
        """Return the slots to add for GPUs that have become free. None if all shots have been started."""
        if self.plan is None or not (self.queue or self._reading):
            return []
        return placed_more_slots(self.plan.stage_seconds, present, free)

    # Cost

    def _cost_per_second(self) -> float | None:
        """Return the price of the GPUs that the run holds now: on this machine, all that it was planned for."""
        if self.plan is None or self.cluster is None or (price := self.plan.price_per_gpu_hour) is None:
            return None
        engine = self._renderer.engine if self._renderer is not None else None
        gpus = len(self.cluster.gpus) if self._own_ray else engine.held_gpus if engine is not None else 0
        return gpus * price / 3600

    def _meter_cost(self) -> None:
        """Add the cost since the last call, and stop the run if it will exceed `max_cost` when the shots in progress end."""
        now = asyncio.get_running_loop().time()
        seconds, self._metered_at = now - self._metered_at, now
        per_second = self._cost_per_second()
        if self.plan is None or (per_second is None and not self._results.prices):
            return
        per_second = per_second or 0.0
        self._gpu_cost += per_second * seconds
        self.cost = self._gpu_cost + self._results.prices
        if self._options.max_cost is None or self._stop.is_set():
            return
        done = self._results.counts["done"]
        if done and self._measured_from is None:
            self._measured_from = done, self.cost
        first_done, first_cost = self._measured_from or (done, 0.0)
        measured = (self.cost - first_cost) / (done - first_done) if done > first_done else None
        planned = self.plan.server_cost / self.plan.shots + per_second * 3600 / self.plan.shots_per_hour
        per_shot = planned if measured is None else measured
        finishing = per_shot * len(self._rendering)
        if not self.plan.server_cost:
            # Servers charge all jobs that they have accepted, GPUs are released after the grace period.
            finishing = min(finishing, per_second * self._options.grace_s)
        waiting = self.queue or self._continued or self._reading
        if self.cost + (finishing if waiting else 0.0) > self._options.max_cost:
            self._over_cost = True
            self._listener.on_message(
                f"--max-cost: stopping at {money(self.cost, self.plan.currency)}; finishing the shots in progress may cost "
                f"{amount_text(finishing)}. They have {self._options.grace_s:g} s (--grace)"
            )
            self._stop.set()

    def cost_error(self) -> TooExpensive | None:
        """Return the error of a run that was stopped by `max_cost` before its last shot. `None` if it was not."""
        limit = self._options.max_cost
        if not self._over_cost or not (self.left or self._reading) or limit is None or self.plan is None:
            return None
        unread = " and the rest of the script" if self._reading else ""
        return TooExpensive(
            f"stopped by --max-cost {amount_text(limit)}: the run has cost {money(self.cost or 0.0, self.plan.currency)}. "
            f"{count(self.left, 'line')}{unread} left. Run the same command to resume; the limit is for each run"
        )

    # Reading

    def _start_reader(self, remaining: Remaining) -> None:
        """Read the remaining lines in a thread. Pauses while the queue is full."""
        loop = asyncio.get_running_loop()
        room = threading.Semaphore(1)

        def read() -> None:
            error: BaseException | None = None
            try:
                for block in remaining():
                    room.acquire()
                    loop.call_soon_threadsafe(accept, block)
            except BaseException as reason:
                error = reason
            with suppress(RuntimeError):  # the loop is closed: the run has ended
                loop.call_soon_threadsafe(end, error)

        async def release() -> None:
            while len(self.queue) + len(self._continued) >= MAX_SHOTS:
                await self._next_change()
            room.release()

        def accept(lines: Sequence[Line]) -> None:
            try:
                self.accept(lines)
                self._results.lines_read(complete=False)
            except Exception as error:
                # The event loop would log it, and the run would wait for the lines forever.
                self._fail(error)
                return
            task = asyncio.ensure_future(release())
            releasing.add(task)
            task.add_done_callback(releasing.discard)

        def end(error: BaseException | None) -> None:
            self._reading = False
            if error is None:
                self._results.lines_read(complete=True)
                self._changed.set()
            else:
                self._fail(error)

        releasing: set[asyncio.Task[None]] = set()
        threading.Thread(target=read, daemon=True).start()

    # Status

    def _on_status(self, snapshot: Snapshot) -> None:
        assert self._metrics is not None
        self._metrics.snapshot(snapshot)
        self._listener.on_status(snapshot)
        if self.queue or self._rendering or not self._reading:
            self._idle_since, self._next_idle_message_s = time.monotonic(), FIRST_MESSAGE_S
        elif (idle_s := time.monotonic() - self._idle_since) >= self._next_idle_message_s:
            self._next_idle_message_s += MESSAGE_INTERVAL_S
            self._idle_message = asyncio.ensure_future(self._report_idle(idle_s))

    async def _report_idle(self, idle_s: float) -> None:
        assert self._renderer is not None
        if (engine := self._renderer.engine) is not None:
            self._listener.on_message(
                f"all shots so far are rendered, and no line has come for {idle_s:.0f} s. Rendering holds "
                f"{await engine.holdings()}. A step that makes the lines waits forever if it needs more than that"
            )

    async def _watch_stop(self) -> None:
        while not self._stop.is_set() and self._error is None:
            await asyncio.sleep(STOP_POLL_S)
            # An exception of the watch would look like a stop request.
            try:
                self._meter_cost()
                if self._lease.lost.is_set():
                    # Another run may be writing to the folder.
                    self._lease.check()
                elif not self._lease.is_sure:
                    self._storage.begin("the lease of the output folder is not refreshed")
                self._storage.check()
            except Exception as error:
                self._fail(error)

    def _probe_storage(self) -> str | None:
        """Return why nothing can be written to the output folder now. `None` if it can. Blocks."""
        if (problem := self._outputs.write_problem()) is not None:
            return problem
        with suppress(OSError):
            self._lease.refresh()
        return None if self._lease.is_sure else "its lease cannot be refreshed"

    def _on_storage_change(self, problem: str | None) -> None:
        if problem is None:
            self._listener.on_message("the output folder can be written again")
        else:
            self._listener.on_message(
                f"no file can be written to {self._outputs.url}: {problem}. Finished shots wait for up to "
                f"{self._options.wait_storage_s:.0f} s (--wait-storage); no shot fails meanwhile"
            )

    def _on_quarantined(self, process: str, reason: str) -> None:
        message = f"{process} is quarantined: {reason}"
        self.quarantined.append(message)
        self._listener.on_message(message)


def _opened(path: Path | None, on_message: Callable[[str], object]) -> Recorder | None:
    """Return the recorder of a run. Raises UsageError if the file cannot be written."""
    try:
        return None if path is None else Recorder(path, on_message)
    except OSError as error:
        raise UsageError(f"--record: cannot write {path}: {error.strerror}") from None


def _check_shared_folder(plan: ShotPlan, outputs: OutputFolder) -> None:
    """Raise SetupError if the driver does not see a finished shot, OSError if the storage fails. Blocks."""
    deadline = time.monotonic() + VISIBILITY_TIMEOUT_S
    while outputs.find_finished(plan) is None:
        if time.monotonic() > deadline:
            raise SetupError(
                f"a worker wrote {outputs.place(plan.shot.id or '', 'shot.json')}, but the driver does not see it. "
                "The driver and the workers need one shared output folder."
            )
        time.sleep(1)
