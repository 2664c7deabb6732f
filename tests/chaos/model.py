"""A batch run in simulated time, from one seed: the real director and engine, simulated Ray, storage and models, and faults.

`simulate` returns the history of all runs until every line has a result. `tests/chaos/history.py` checks it.
"""

import asyncio
import errno
import gc
import hashlib
import inspect
import json
import math
import random
import sys
import threading
import time
from collections import namedtuple
from contextlib import contextmanager, nullcontext, suppress
from copy import copy
from dataclasses import replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray

from tests.chaos import simulated_ray
from tests.chaos.simulated_ray import Clock, Loop, Node, Sleep, place_of
from tests.conftest import SYNTHETIC
from tests.fake_stages import profile_of_fakes
from vidgen_ray import profile as profile_module
from vidgen_ray.batch import director as director_module
from vidgen_ray.batch import progress as progress_module
from vidgen_ray.batch import results as results_module
from vidgen_ray.batch.director import Director
from vidgen_ray.batch.progress import RunRecorder
from vidgen_ray.batch.results import RunResults
from vidgen_ray.batch.run_options import RecordedOptions, RenderOptions
from vidgen_ray.content_keys import ShotPlan, Step
from vidgen_ray.engine import actor_start, encoder, engine, route, shell, storage_pause, worker
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.encoder import Encoder
from vidgen_ray.engine.engine import OBJECT_STORE_SHARE
from vidgen_ray.engine.messages import OUTPUT
from vidgen_ray.engine.processes import CoreLimits
from vidgen_ray.errors import OutOfMemory, StageError
from vidgen_ray.graph import STAGE_BY_NAME, chunked_stages_of, clip_length, stages_of
from vidgen_ray.outputs.folder import LAST_FRAME
from vidgen_ray.outputs.lease import REFRESH_S, Fence, Holder, Lease
from vidgen_ray.outputs.records import FileRecord, ShotRecord
from vidgen_ray.outputs.run_log import RunLabels
from vidgen_ray.profile import load_profile
from vidgen_ray.render import shot_files, step_runner, weights_on_gpu
from vidgen_ray.script.lines import Line
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import FaceFeatures, Likeness

SECONDS = {"instantid": 1, "flux": 5, "image_likeness": 0.5, "svd": 20, "clip_likeness": 1, "realesrgan": 4}
"""Stage -> seconds of a shot."""
CHUNK_S = 1.5
LARGE_GB = 40.0
"""GPU memory of a worker that a `too_large` shot needs."""
SMALL_SHARE = 0.36
"""GPU memory of the models on small GPUs, as a share of the usual one: all fit together on 24 GB."""
LISTENER_FAILURES = 0.2
"""Share of the callbacks of a listener that raise."""
LORA_S = 3.0
"""Seconds in which a worker loads a LoRA. It keeps one."""
SLOW_FACTOR = 8.0
"""Factor of the seconds of all calls on a slow GPU."""
OUTPUT_S = {"begin": 0.5, "add": 0.5, "commit": 1, "write": 2}
FLUX_GB, PART_GB, FUSED_GB = 34, 42, 62
"""GPU memory of FLUX, of the larger of two workers that share all models, and of a worker with all models."""
FRAMES, CHUNK_FRAMES, SIDE_PX = 8, 4, 64
CALL_FAULTS = ("crash", "hang", "slow", "error", "duplicate", "inputs")
WRONG_DATA = ("foreign", "wrong_size", "constant", "wrong_content")
LOAD_FAULTS = ("crash_load", "hang_load")
TIMED_FAULTS = ("kill", "freeze", "partition", "node_lost", "node_gone", "drain")
STORAGE_FAULTS = ("storage", "storage_hang", "storage_long", "storage_often", "storage_end", "disk_full")
RUN_FAULTS = ("stop", "driver_kill", "driver_stop", "lease_lost")
SICK = ("sick_worker", "sick_node", "sick_pixels", "slow_gpu")
SHOT_FAULTS = ("poison", "refused", "too_large", "unlike")
CALLS, RUNS = (*CALL_FAULTS, *WRONG_DATA, *LOAD_FAULTS), (*TIMED_FAULTS, *STORAGE_FAULTS, *RUN_FAULTS, *SICK)
DRIVER_FAULTS = ("listener", "suspend")
"""With `listener`, callbacks of the user raise. With `suspend`, no process runs for some time, as in a frozen control group."""
FAULTS = (*CALLS, *RUNS, *SHOT_FAULTS, "all_poison", *DRIVER_FAULTS)
"""With `all_poison`, nearly every shot fails on every worker: the circuit breaker must stop the run."""
BAD_END, BAD_LINES = "bad_end", 8
"""Only if asked for: the last lines of the script fail on every worker."""
SURVIVED = tuple(kind for kind in FAULTS if kind != "wrong_content")
"""Faults that cost no promise. Nothing finds a single result with wrong pixels of the right size under the right key. A GPU
that makes them again and again (`sick_pixels`) is found by comparison."""
FAULTY_S = 400.0
"""Seconds of a run within which timed faults happen."""
CALM_AFTER = 3
"""Runs after which no more faults happen."""
MAX_RUNS = 8
MAX_RUN_S = 12 * 3600.0
"""Longest run: with pauses of the storage, lost nodes, and calls of an only, slow GPU that time out."""
TAKEOVER_S = 130.0
"""Seconds after which another driver takes the lease of one that is stopped."""
LIMITS = CoreLimits(first_checked_call=2, checked_calls=4)
CLUSTERS = ((2, 80), (1, 80), (2, 48), (2, 24))
"""GPUs of a node, and their GB."""


Event = namedtuple("Event", "at kind fields")


def tag_of(*parts):
    return hashlib.sha256(repr(parts).encode()).digest()


def image_of(tag, height=SIDE_PX, width=SIDE_PX):
    """Return an image that contains a tag."""
    row = np.frombuffer((tag * (width * 3 // len(tag) + 1))[: width * 3], np.uint8).reshape(1, width, 3)
    return np.broadcast_to(row, (height, width, 3))


def clip_of(tag, frames, height=SIDE_PX, width=SIDE_PX):
    """Return a clip that contains a tag and the numbers of its frames."""
    rows = np.repeat(image_of(tag, 1, width)[None], len(frames), axis=0)
    rows[:, 0, -1, 0] = frames
    return np.broadcast_to(rows, (len(frames), height, width, 3))


def tag_in(array):
    """Return the tag of an image or a clip."""
    row = array[0] if array.ndim == 3 else array[0, 0]
    return row.tobytes()[:32]


def frames_in(array):
    return array[:, 0, -1, 0].tolist()


def expected_tags(plan):
    """Return artefact -> tag of the right results of a plan."""
    tags = {"photos": tag_of(plan.shot.face_image)}
    if plan.shot.continue_from is not None:
        tags["image"] = WORLD.last_frames[plan.shot.continue_from]
    for step in plan.steps:
        stage = STAGE_BY_NAME[step.stage]
        tag = tag_of(stage.name, plan.shot.prompt, plan.shot.seed, [tags[name] for name in used_inputs(stage, plan.shot, tags)])
        tags |= dict.fromkeys(stage.writes, tag)
        if stage.name == "instantid":
            tags |= dict.fromkeys(stage.writes, tag_of("face", plan.shot.face_image))
    return tags


def used_inputs(stage, shot, present):
    return [name for name in stage.needs(shot) if name in present and name in ("face", "image", "frames")]


class SimulatedStage:
    """Mixin of all simulated models."""

    adapter_loads = 0
    load = move = lambda *_: None
    chunk_frames = classmethod(lambda cls, params: CHUNK_FRAMES)

    def __call__(self, item):
        return WORLD.compute(self, item.shot, item.artefacts)

    def run_chunk(self, shot, frames, chunk=None):
        fault = WORLD.fail(self, shot)
        tag = tag_of(self.name, shot.prompt, shot.seed, [tag_in(frames)])
        clip = clip_of(tag, frames_in(frames), frames.shape[1] * shot.scale, frames.shape[2] * shot.scale)
        return WORLD.spoilt(clip, fault)


STAGES = {name: type(f"Simulated{STAGE_BY_NAME[name].__name__}", (SimulatedStage, STAGE_BY_NAME[name]), {}) for name in SECONDS}
WORLD = None
"""The world of the running simulation. Stages and files are created by the engine, so they cannot have it as an argument."""


class Storage:
    """Output folder in memory, with an outage. `number`: that of the run that writes."""

    url = "simulated"
    stage_cache = None

    def __init__(self, world, number=0):
        self._world = world
        self.storage = SimpleNamespace(local=world.local, read=self._read, url=self.url)
        self.fence = Fence("lease", number)

    def _read(self, path):
        """Return the content of the lease file."""
        return json.dumps(Holder("", "", "", "", self._world.holder, 0)._asdict()).encode()

    @property
    def down(self):
        return self._world.now < self._world.down_until

    async def respond(self):
        """Wait while the storage hangs."""
        while self.down and self._world.outage == "hang":
            await asyncio.sleep(self._world.down_until - self._world.now)

    def write(self):
        """Raise OSError if nothing can be written."""
        if self.down and self._world.outage != "hang":
            raise OSError(errno.ENOSPC if self._world.outage == "full" else errno.EIO, f"storage: {self._world.outage}")
        call = self._world.current
        if call is not None and call.process.node.name == self._world.sick_encoder_node:
            self._world.fault("sick", [call], own=False)
            raise OSError(errno.EIO, "the local disk is sick")

    def write_problem(self):
        if not self.down:
            return None
        return self.respond() if self._world.outage == "hang" else f"storage: {self._world.outage}"

    def find_finished(self, plan, with_stages=False):
        done = self.find_by_id(plan.shot.id)
        lacks = plan.keep_last_frame and done is not None and LAST_FRAME not in done.files
        return done if done is not None and done.key == plan.key and not lacks else None

    def find_by_id(self, shot_id):
        return self._world.committed.get(shot_id)

    def last_frame(self, done):
        return frame_of(done.shot.id) if LAST_FRAME in done.files else None

    def draft(self, plan):
        return Draft(self._world, self, plan)


class Draft:
    """Files of a shot. Compares what is written with what the plan must give."""

    def __enter__(self):
        self._world.log("draft", call=self._call, draft=self)
        return self

    def __exit__(self, *_):
        self.closed_at = self._world.now

    def __init__(self, world, outputs, plan):
        outputs.write()
        self._world, self._outputs, self._plan, self._call = world, outputs, plan, world.current
        self.closed_at = math.inf
        self._expected, self._wrong = expected_tags(plan), []
        self._hd_frames = 0

    def path(self, name):
        """Return a function that writes an image, or frames of a clip."""
        return partial(self._written, name)

    def _written(self, name, array):
        self._outputs.write()
        artefact = {"image.png": "image", "video.mp4": "frames", "hd.mp4": "hd_frames", LAST_FRAME: "frames"}[name]
        scale = self._plan.shot.scale if artefact == "hd_frames" else 1
        if (tag_in(array), array.shape[-3:]) != (self._expected[artefact], (SIDE_PX * scale, SIDE_PX * scale, 3)):
            self._wrong.append(artefact)
        elif artefact == "hd_frames" and frames_in(array) != [self._hd_frames + n for n in range(len(array))]:
            self._world.log("disorder", shot=self._plan.shot.id, frames=frames_in(array), expected=self._hd_frames)
        if artefact == "hd_frames":
            self._hd_frames += len(array)

    def commit(self, records, *_):
        self._outputs.write()
        world, plan = self._world, self._plan
        if chunked_stages_of(plan.shot) and self._hd_frames != clip_length(plan.shot)[0]:
            self._wrong.append(f"{self._hd_frames} frames")
        self._outputs.fence.check(self._outputs.storage)
        record = record_of(plan, records)
        world.log("commit", call=world.current, shot=plan.shot.id, number=plan.number, wrong=self._wrong)
        world.commit(plan, record)
        world.homes.pop(plan.shot.id, None)
        return record


def record_of(plan, records=()):
    names = ("image.png", *([LAST_FRAME] if plan.keep_last_frame else ()))
    return ShotRecord(
        key=plan.key,
        shot=plan.shot,
        tries=plan.number,
        likeness=None,
        seeds={},
        stages=tuple(records),
        files={name: FileRecord(sha256="0" * 64, bytes=1) for name in names},
        software={},
    )


def frame_of(shot_id):
    """Return the file with the last frame of a shot."""
    return Path(f"/simulated/{shot_id}/{LAST_FRAME}")


class LeaseFile:
    """File of the lease of a run."""

    name = "lease"

    def __init__(self, world, number):
        self._world, self._number = world, number
        self.holder = SimpleNamespace(token=number, run=f"run-{number}")
        world.holder = number

    def refresh(self):
        self._world.storage.write()
        if self._world.storage.down:
            raise OSError("no response")
        return self._world.holder == self._number


class Manifest:
    """Rows of one run. Replaces `ManifestWriter`."""

    def __init__(self, outputs, run, *_):
        self._run = run

    def add(self, row, *, fields=None, replaces=None):
        logged = {"run": self._run, "line": row.line, "shot": row.id, "status": row.status}
        if fields is not None:
            live = WORLD.live_workers(row.failure_stage)
            healthy = row.failure_stage not in STAGES or any(actor.gpu.sound for actor in live)
            large = any(actor.spec.gpu_gb >= LARGE_GB and actor.gpu.sound for actor in live)
            logged |= {"error": f"{row.failure_stage}: {row.failure_message}", "healthy": healthy, "large": large}
        WORLD.log("row", **logged)

    def discard(self):
        WORLD.log("discard", run=self._run)

    def close(self, **_):
        return []


class Listener:
    """Logs messages. Some of its callbacks raise, as if a terminal was closed."""

    def on_message(self, message):
        WORLD.log("message", text=message)
        self._end()

    def __getattr__(self, name):
        return lambda *_: self._end()

    def _end(self):
        if "listener" in WORLD.kinds and WORLD.edge_rng.random() < LISTENER_FAILURES:
            raise OSError(errno.EIO, "the terminal is closed")


class Metrics:
    """Replaces `RunMetrics`."""

    def __init__(self, labels, on_quarantined, on_attempt):
        self.quarantined, self.attempt_ended = on_quarantined, on_attempt

    def __getattr__(self, name):
        return lambda *_: None


class RunLog:
    """Replaces the log of a run, and drops what is not wrong."""

    def __init__(self, storage, run, status, may_write):
        self._status = status

    def add(self, **fields):
        json.dumps(fields)

    def close(self):
        self._status().model_dump_json()


class Driver:
    """One run: a process with the director."""

    def __init__(self, world, number):
        self.world, self.number = world, number
        self.loop = Loop(world.clock, lambda error: world.log("unhandled", driver=number, error=repr(error)))
        self.stop = threading.Event()
        self.fleets = []
        self.task = self.loop.create_task(self._run())
        self.killed = self.frozen = False
        self.frozen_at = 0.0
        self.stored_bytes = self.peak_bytes = 0
        """Bytes of its objects in Ray's object store."""
        self.error = self.left = None

    async def _run(self):
        world, outputs = self.world, Storage(self.world, self.number)
        self.lease = Lease(outputs.url, LeaseFile(world, self.number), world.now)
        keeper = asyncio.ensure_future(self._refresh())
        planner = SimpleNamespace(outputs=outputs, plan_shot=plan_of, find=outputs.find_finished)
        run = f"run-{self.number}"
        labels = RunLabels(run=run, name=None, profile="fake", script="s", team=None, submission_id=None)
        listener = RunRecorder(outputs.storage, self.lease, labels, Listener())
        results = RunResults(outputs, labels, self.lease, listener, None, RecordedOptions(), is_script=True)
        options = RenderOptions(address="simulated", cache="none", stages=STAGES, wait_storage_s=world.wait_storage_s)
        director = Director(world.profile, outputs, options, results, listener, self.stop, planner, None, self.lease)
        try:
            with listener, results:
                director.accept([world.planned(line) for line in world.script])
                results.lines_read(complete=True)
                if director.queue:
                    await director.render(None)
                with suppress(OSError):
                    self.lease.refresh()
                self.lease.check()
        except (Exception, KeyboardInterrupt) as error:
            self.error = error
            raise
        finally:
            self.left = director.left
            keeper.cancel()

    async def _refresh(self):
        while True:
            await asyncio.sleep(REFRESH_S)
            with suppress(OSError):
                self.lease.refresh()

    @property
    def ended(self):
        return self.killed or self.task.done()

    @property
    def completed(self):
        return self.ended and not self.killed and self.error is None and not self.left


class World:
    """Cluster, storage, script and faults of one seed."""

    def __init__(self, seed, faults, lines=None):
        """`lines`: of the script. Default: 10 to 28."""
        self._lines = lines
        self.seed, self.rng, self.clock = seed, random.Random(seed), Clock()
        self.loop = Loop(self.clock, self._failed)
        self.history = []
        self.numbers, self.pids, self.actors = count(1), count(1), []
        self.current = self.process = None
        """Call that runs now, and its process."""
        self.spent = 0.0
        """Simulated seconds that the present call has taken so far."""
        self.transfers = self.adapter_loads = 0
        """Inputs that came from another node, and LoRAs that were loaded."""
        self._tasks, self._last = set(), {}
        self.processes, self.homes = [], {}
        """All processes. Id of a shot in progress -> names of the nodes with its results."""
        self._error, self._over, self._calm = None, False, False
        self.local = self.rng.choice((Path("/simulated"), None))
        """Folder of the outputs. `None`: they are in an object store."""
        self.storage, self.drivers = Storage(self), []
        self.holder = 0
        """Number of the run that holds the lease of the output folder."""
        self.committed = {}
        """Id -> finished shot."""
        self.last_frames = {}
        """Id of a finished shot -> tag of its last frame."""
        self.finished_before = set()
        """Ids of shots that were finished before the first run, without their last frames."""
        self.down_until, self.outage = 0.0, "error"
        self.sick_encoder_node = None
        self.could_hold = True
        """The usable nodes could hold all models when a director last looked at them."""
        rng = self.rng
        chosen = [kind for kind in FAULTS if kind not in DRIVER_FAULTS and rng.random() < 0.25]
        # Drawn apart: all other faults of a seed are the same without these.
        self.edge_rng = random.Random(f"edges {seed}")
        chosen += [kind for kind in DRIVER_FAULTS if self.edge_rng.random() < 0.25]
        self.kinds = [kind for kind in (*chosen, BAD_END) if kind in faults]
        self.rates = {kind: rng.choice((0.01, 0.05)) for kind in CALLS if kind in self.kinds}
        shape, gb = rng.choice(CLUSTERS)
        self.nodes = [Node(f"n{n}", [gb] * shape) for n in range(rng.randint(1 if shape > 1 and gb > 48 else 2, 3))]
        if "too_large" in self.kinds:
            self.nodes[0] = Node("n0", [80] * shape)
        self.profile = profile(SMALL_SHARE if gb < LARGE_GB else 1.0)
        self.wait_storage_s = 200.0 if "storage_often" in self.kinds else 1800.0
        self.script = self._script()
        self.store_bytes = rng.choice((3e6, 8e6, 1e9))

    def fleet(self, config, listener, more_slots=None):
        fleet = simulated_ray.Fleet(self, config, listener, more_slots)
        fleet.driver.fleets.append(fleet)
        return fleet

    def live_cluster(self):
        self.could_hold = self.can_hold()
        return simulated_ray.live_cluster(self)

    def ray_nodes(self):
        return [{"NodeID": node.id, "Alive": not node.known_lost} for node in self.nodes]

    def failed_before(self, storage, run):
        earlier = (event.fields for event in self.history if event.kind == "row" and event.fields["run"] != run)
        rows = {row["shot"]: row for row in earlier}
        return frozenset(shot for shot, row in rows.items() if row["status"] == "failed")

    # The script

    def _script(self):
        rng, lines = self.rng, []
        with_loras = rng.random() < 0.3
        is_long = "sick_pixels" in self.kinds and "all_poison" not in self.kinds
        lines_of_script = self._lines or rng.randint(10, 28) * (1 + 2 * is_long)
        for number in range(1, lines_of_script + 1):
            fields = {"generate_video": rng.random() < 0.7, "upscale_video": rng.random() < 0.7}
            flaw = next((flaw for flaw in SHOT_FAULTS if flaw in self.kinds and rng.random() < 0.06), "")
            source = rng.choice(lines)[1].shot if lines and self.local and not flaw and rng.random() < 0.15 else None
            if "all_poison" in self.kinds and rng.random() < 0.97:
                flaw, source = "poison", None
            prompt = f"shot {number}"
            if BAD_END in self.kinds and number > lines_of_script - BAD_LINES:
                prompt, source = f"poison error {number}", None
            if flaw:
                prompt = f"{flaw} {rng.choice(('crash', 'hang', 'error'))} {number}"
            if source is not None and source.generate_video:
                fields |= {"continue_from": source.id, "generate_video": True, "image": str(frame_of(source.id))}
            elif flaw == "unlike" or rng.random() < 0.3:
                photo = f"/photos/{rng.randint(0, 3)}.png"
                fields |= {"face_image": photo, "consent": SYNTHETIC, "min_identity": 0.5, "max_tries": 3}
            elif rng.random() < 0.3:
                fields |= {"face_image": f"/photos/{rng.randint(0, 3)}.png", "consent": SYNTHETIC}
            if with_loras and rng.random() < 0.7:
                fields |= {"mode": "fast", "lora": f"/loras/{rng.randint(0, 3)}.safetensors"}
            fields |= {"width": SIDE_PX, "height": SIDE_PX, "num_frames": FRAMES}
            shot = Shot(**{**self.profile.defaults, "id": f"s{number}", "prompt": prompt, "seed": number, **fields})
            line = Line(number, {}, script="s.jsonl", script_line=number, id=shot.id, shots=(shot,))
            lines.append((line, plan_of(shot)))
            if source is not None and source.continue_from is None and source.min_identity is None and rng.random() < 0.2:
                self._finish_before(source.id, lines)
        return lines

    def _finish_before(self, shot_id, lines):
        """Let a shot be finished before the first run, when no other shot needed its last frame."""
        plan = next(plan for _, plan in lines if plan.shot.id == shot_id)
        if plan.shot.generate_video and plan.shot.prompt.startswith("shot"):
            self.finished_before.add(shot_id)
            self.commit(plan, record_of(plan))

    def commit(self, plan, record):
        """Make a shot finished."""
        self.committed[plan.shot.id] = record
        if plan.shot.generate_video:
            self.last_frames[plan.shot.id] = expected_tags(plan)["frames"]

    def planned(self, line):
        line, plan = line
        if plan.shot.continue_from is not None:
            return replace(line, results=(None,))
        return replace(line, results=(self.storage.find_finished(plan) or plan,))

    def read_image(self, path, digest=None):
        """Return an input: a photo, or the last frame of a finished shot."""
        is_frame = path.name == LAST_FRAME
        return image_of(self.last_frames[path.parent.name]) if is_frame else np.zeros((8, 8, 3), np.uint8)

    def likeness(self, shot):
        """Return the likeness of a shot: 0.9, or 0.1 for a third of the seeds, or for all of an `unlike` one."""
        return 0.1 if shot.prompt.startswith("unlike") or tag_of("likeness", shot.seed)[0] < 80 else 0.9

    # Time

    @property
    def now(self):
        return self.clock.now

    def spawn(self, coroutine):
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._spawned)
        return task

    def _spawned(self, task):
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failed(task.exception())

    def _failed(self, error):
        """End the simulation: it has a bug."""
        self._error = error

    def run(self):
        """Run until the last run has completed. Faults stop after some runs."""
        try:
            for number in range(1, MAX_RUNS + 1):
                if number > CALM_AFTER:
                    self._heal()
                driver = Driver(self, number)
                self.drivers.append(driver)
                self.log("run", number=number)
                self.spawn(self._adversary(driver))
                started = self.now
                self._step_until(
                    lambda driver=driver: driver.task.done() or driver.killed or (driver.frozen and self._is_stopped(driver)),
                    started + MAX_RUN_S,
                )
                self.log("ended", number=number, error=driver.error, can_hold=self.could_hold and self.can_hold())
                if driver.completed:
                    break
                self._interrupt("end of the run", driver)
                if not driver.ended and not self._is_stopped(driver):
                    break
                # The user runs the command again, when there are machines.
                again = self.now + (10 if driver.ended else 0)
                self._step_until(lambda again=again: self.now > again and self.any_node() is not None, self.now + 1000)
            # Earlier drivers that were stopped wake, and the calls that are left end.
            end = max([self.now, *(driver.loop.frozen_until for driver in self.drivers if not driver.killed)]) + 300
            self._step_until(lambda: self.now >= end, end)
        finally:
            self._over = True
            for loop in (*(driver.loop for driver in self.drivers), self.loop):
                loop.discard()
        return self

    def _is_stopped(self, driver):
        """Return whether another driver may take over."""
        return driver.frozen and driver.loop.frozen_until - driver.frozen_at > TAKEOVER_S < self.now - driver.frozen_at

    def _step_until(self, done, limit):
        """Run callbacks until `done()`. Return False if that takes until `limit`."""
        clock, loops = self.clock, [self.loop, *(driver.loop for driver in self.drivers)]
        while not done():
            first, when = None, limit
            for loop in loops:
                at = clock.now if loop.ready else loop.scheduled[0][0] if loop.scheduled else math.inf
                at = at if at > loop.frozen_until else loop.frozen_until
                if at < when or (first is None and at == when):
                    first, when = loop, at
            if when > clock.now:
                clock.now = when
            if first is None:
                return False
            first.step()
            if self._error is not None:
                raise self._error
        return True

    def live_workers(self, stage):
        """Return the workers with a stage that have loaded their weights."""
        actors = [process.actor for process in self.processes if process.alive and process.loaded]
        return [actor for actor in actors if actor.gpu is not None and stage in actor.spec.stages]

    def can_hold(self):
        """Return whether the usable nodes can hold all models now."""
        free = sorted(gpu.gb for node in self.nodes if node.usable for gpu in node.gpus)
        share = self.profile.actors["flux"].memory_gb / FLUX_GB
        return bool(free) and (free[-1] >= FUSED_GB * share or (len(free) > 1 and free[-1] >= PART_GB * share <= free[-2]))

    # What simulated Ray asks

    def log(self, kind, **fields):
        if not self._over:
            self.history.append(Event(self.now, kind, fields))

    def driver_of(self, loop):
        return next(driver for driver in self.drivers if driver.loop is loop)

    def any_node(self):
        """Return a node for an encoder."""
        usable = [node for node in self.nodes if node.usable]
        return self.rng.choice(usable) if usable else None

    async def network(self, node):
        """Wait while a node is cut off."""
        while node.partition_until > self.now:
            await asyncio.sleep(node.partition_until - self.now + self.rng.uniform(0.001, 0.5))

    def answer(self, call, value, error):
        """Give the driver the result of a call. A stopped driver gets it when it continues, after its timers."""
        driver = call.driver
        if driver.ended or not call.refs:
            return
        if driver.loop.frozen_until > self.now:
            self.loop.call_at(driver.loop.frozen_until + self.rng.uniform(0.01, 0.5), self.answer, call, value, error)
            return
        refs, call.refs, call.args = call.refs, (), ()
        values = [None] * len(refs) if error is not None else [value] if len(refs) == 1 else value
        for n, (ref, each) in enumerate(zip(refs, values, strict=True)):
            if n > 0 and error is None and not ref.done:
                ref.home, ref.size = (call.process.node, call.process.life), size_of(each)
                driver.stored_bytes += ref.size
                if driver.stored_bytes > max(driver.peak_bytes, OBJECT_STORE_SHARE * self.store_bytes):
                    # Some are garbage, in cycles of exceptions and their tracebacks.
                    gc.collect()
                driver.peak_bytes = max(driver.peak_bytes, driver.stored_bytes)
            # A copy: the tracebacks of the first one keep the arguments of the call alive.
            driver.loop.call_soon(ref.resolve, each, error and copy(error))
        if call.is_work:
            slow = call.actor.gpu is not None and call.actor.gpu.slowness > 1.0
            failed = getattr(values[0], "failure", None)
            self.log("answer", call=call, error=error and repr(error), failed=failed, slow=slow)

    def seconds(self, call):
        """Return how long a call takes."""
        if call.method == "load":
            return self.rng.uniform(5, 20) if call.actor.kind is not Encoder else 0.1
        if call.stages == (OUTPUT,):
            return OUTPUT_S[call.method]
        slowness = call.actor.gpu.slowness if call.actor.gpu is not None else 1.0
        if call.unit[2] is not None:
            usual_s = CHUNK_S if len(call.stages) == 1 and not call.method.endswith("clip") else SECONDS["realesrgan"]
            return slowness * usual_s
        seconds = sum(SECONDS[stage] for stage in call.stages) * self.rng.uniform(0.8, 1.2) or 0.01
        return slowness * (seconds + self._lora_s(call))

    def _lora_s(self, call):
        """Let the process of a call activate its LoRAs. Return the seconds that this takes."""
        paths = [lora.path for lora in call.plan.shot.all_loras] if call.plan and "flux" in call.stages else []
        if not set(paths) - {*call.process.adapters}:
            return 0.0
        call.process.adapters = paths
        self.adapter_loads += 1
        return LORA_S

    def draw_fault(self, call):
        """Return the fault of a call, or `None`."""
        if not call.is_work and call.method != "load":
            return None
        words = (call.plan.shot.prompt if call.plan else "").split()
        if words[:1] == ["poison"] and words[1] in ("crash", "hang") and "flux" in call.stages:
            self.fault(words[1], self._beside(call), own=False)
            return words[1]
        gpu = call.actor.gpu
        if gpu is not None and gpu.sick == "crash" and call.is_work:
            self.fault("sick", self._beside(call), own=False, others=self.alike(call.actor))
            return "crash"
        kinds = LOAD_FAULTS if call.method == "load" else CALL_FAULTS if OUTPUT in call.stages else (*CALL_FAULTS, *WRONG_DATA)
        kind = next((kind for kind in kinds if kind in self.rates and self.rng.random() < self.rates[kind]), None)
        if kind in ("error", "wrong_size", "constant", "wrong_content"):
            call.fault = kind
        elif kind is not None and kind != "foreign":
            self.fault(kind, self._beside(call) if kind in ("crash", "hang") else [call])
        if kind == "inputs":
            lost = [arg for arg in call.args if isinstance(arg, simulated_ray.Ref) and arg.home is not None]
            for ref in lost:
                ref.value = None
        return kind

    @staticmethod
    def _beside(call):
        return list(call.process.calls)

    def alike(self, actor):
        """Return the number of other workers of this kind on sound GPUs that have loaded their weights."""
        others = (other for other in self.live_workers(actor.spec.stages[0]) if other is not actor and other.gpu.sound)
        return sum(other.spec == actor.spec and other.driver is actor.driver for other in others)

    def fault(self, kind, calls, *, own=True, node=None, process=None, others=0):
        """Log a fault and the shots whose work it can cost. `own`: it hits these calls themselves.

        `others`: sound workers that could have run them.
        """
        shots = {call.shot for call in calls if call.shot}
        if node is not None:
            shots |= {shot for shot, names in self.homes.items() if node.name in names}
        numbers = [call.number for call in calls]
        self.log("fault", fault=kind, calls=numbers, shots=shots, own=own, process=process, others=others)

    def worked(self, call, process, seconds, value):
        """A call has ended."""
        self.log("work", call=call, process=process, seconds=seconds)
        if OUTPUT not in call.stages:
            self.homes.setdefault(call.shot, set()).add(process.node.name)
            if value[0].failure is None:
                self._last[call.method] = call.unit, value

    def exchanged(self, call, value):
        """Return the result of another shot, if there is one."""
        other = self._last.get(call.method)
        if other is None or other[0] == call.unit:
            return value
        self.fault("foreign", [call])
        return other[1]

    def begin(self, call, process):
        self.current, self.process, self.spent = call, process, 0.0

    def end(self):
        self.current, self.process, self.spent = None, None, 0.0

    # Models and files

    def fail(self, stage, shot):
        """Let a stage take its time, and raise what it raises. Return what is wrong with its result, if anything."""
        call, gpu = self.current, self.current.actor.gpu
        self.spent += SECONDS[stage.name] * (gpu.slowness if gpu is not None else 1.0)
        if gpu is not None and gpu.sick not in (None, "pixels"):
            self.fault("sick", [call], own=False, others=self.alike(call.actor))
            raise RuntimeError("sick") if gpu.sick == "error" else StageError("sick")
        flaw = shot.prompt.split()
        if flaw[0] == "refused" and stage.name == "flux":
            raise StageError("unreadable photo")
        if flaw[:2] == ["poison", "error"] and stage.name == "flux":
            raise RuntimeError("poison")
        if flaw[0] == "too_large" and stage.name == "flux" and call.actor.spec.gpu_gb < LARGE_GB:
            raise OutOfMemory("too large")
        kind, call.fault = call.fault, None
        if kind is not None:
            self.fault(kind, [call])
        if kind == "error":
            raise RuntimeError("a transient fault")
        if kind is None and gpu is not None and gpu.sick == "pixels":
            kind = "wrong_content"
            self.fault("pixels", [call], own=False, others=self.alike(call.actor))
        return kind

    def compute(self, stage, shot, artefacts):
        fault = self.fail(stage, shot)
        present = {name: artefacts[name] for name in used_inputs(stage, shot, artefacts)}
        tags = [bytes.fromhex(value.digest) if name == "face" else tag_in(value) for name, value in present.items()]
        tag = tag_of(stage.name, shot.prompt, shot.seed, tags)
        if stage.name == "instantid":
            tag = tag_of("face", shot.face_image)
            face = FaceFeatures({}, np.zeros((5, 2), np.float32), (0, 0, 1, 1), 1.0, 1, (1, 1), tag.hex())
            return {name: face if name == "face" else self.spoilt(image_of(tag), fault) for name in stage.writes}
        made = {}
        for name in stage.writes:
            if name.endswith("likeness"):
                made[name] = Likeness((self.likeness(shot),))
            elif name == "image":
                made[name] = self.spoilt(image_of(tag), fault)
            else:
                made[name] = self.spoilt(clip_of(tag, list(range(shot.clip_frames))), fault)
        return made

    def spoilt(self, array, fault):
        match fault:
            case "constant":
                return np.broadcast_to(np.uint8(0), array.shape)
            case "wrong_size":
                return array[..., ::2, :]
            case "wrong_content":
                tag = tag_of("wrong", self.current.number)
                return image_of(tag) if array.ndim == 3 else clip_of(tag, frames_in(array), *array.shape[1:3])
        return array

    # Timed faults

    def _heal(self):
        self.rates.clear()
        self._calm = True
        if self.storage.down:
            self.log("fault", fault="storage over", calls=[], shots=set(), own=False)
        self.down_until = 0.0
        self.sick_encoder_node = None
        for node in self.nodes:
            # A new life, so that the loss of the node that is in progress has no effect.
            node.life += not node.up
            node.up, node.known_lost, node.draining, node.partition_until = True, False, False, 0.0
            for gpu in node.gpus:
                gpu.sick, gpu.slowness = None, 1.0

    async def _adversary(self, driver):
        for kind in RUNS:
            if kind in self.kinds and not self._calm and (kind not in RUN_FAULTS or self.rng.random() < 0.4):
                for _ in range(self.rng.choice((1, 1, 2, 4)) if kind in TIMED_FAULTS else 1):
                    from_start = kind in ("sick_pixels", "slow_gpu") and self.rng.random() < 0.7
                    self.spawn(self._strike(kind, driver, 0.0 if from_start else self.rng.uniform(5, FAULTY_S)))

        if "suspend" in self.kinds and not self._calm:
            self.spawn(self._suspend(self.edge_rng.uniform(5, FAULTY_S), self.edge_rng.choice((30, 300, 2000))))

    async def _suspend(self, delay_s, seconds):
        await asyncio.sleep(delay_s)
        self.log("fault", fault="suspend", calls=[], shots=set(), own=False, until=self.now + seconds)
        # What runs continues later. Only the drivers see that their clock has gone on.
        self.loop.scheduled = [(when + seconds, *others) for when, *others in self.loop.scheduled]
        for loop in (self.loop, *(driver.loop for driver in self.drivers)):
            loop.frozen_until = max(loop.frozen_until, self.now + seconds)
        await asyncio.sleep(seconds)
        self.log("fault", fault="suspend over", calls=[], shots=set(), own=False)

    async def _strike(self, kind, driver, delay_s):
        await asyncio.sleep(delay_s)
        if driver.ended or self._calm:
            return
        processes = [actor.process for actor in self.actors if actor.process is not None and actor.process.alive]
        process = self.rng.choice(processes) if processes else None
        node, rng = self.rng.choice(self.nodes), self.rng
        match kind:
            case "kill" if process:
                self.fault(kind, process.calls)
                process.die()
            case "freeze" if process and not process.frozen_until:
                self.fault(kind, process.calls, process=process)
                process.frozen_until = self.now + rng.choice((20, 300, 1e9))
            case "partition" if node.up:
                await self._partition(node, rng.uniform(2, 90))
            case "node_lost" if node.up:
                await self._lose(node, rng.uniform(60, 900))
            case "node_gone" if node.up and sum(each.up for each in self.nodes) > 1:
                await self._lose(node, None)
            case "drain" if node.up:
                node.draining = True
                self.fault(kind, [], own=False)
                await asyncio.sleep(rng.uniform(5, 60))
                if node.up:
                    await self._lose(node, rng.uniform(60, 900), preempted=True)
            case "storage" | "storage_hang" | "storage_long" | "disk_full":
                self.outage = {"storage_hang": "hang", "disk_full": "full"}.get(kind, "error")
                await self._outage(kind, rng.uniform(2000, 2600) if kind == "storage_long" else rng.uniform(20, 400))
            case "storage_often":
                for _ in range(5):
                    self.outage = rng.choice(("error", "full"))
                    await self._outage(kind, rng.uniform(30, 100))
                    await asyncio.sleep(rng.uniform(60, 120))
            case "storage_end":
                self.outage = rng.choice(("error", "full", "hang"))
                await self._outage(kind, self.wait_storage_s + 600)
            case "stop":
                self._interrupt(kind, driver)
                driver.stop.set()
            case "driver_kill":
                self._interrupt(kind, driver)
                driver.killed, driver.loop.frozen_until = True, float("inf")
                await asyncio.sleep(rng.uniform(0.1, 5))
                for fleet in driver.fleets:
                    fleet.kill()
            case "driver_stop":
                self._interrupt(kind, driver)
                driver.frozen, driver.frozen_at = True, self.now
                driver.loop.frozen_until = self.now + rng.uniform(5, 400)
                await asyncio.sleep(TAKEOVER_S + 0.001)
            case "lease_lost":
                self._interrupt(kind, driver)
                driver.lease.lost.set()
                self.holder = -driver.number
            case "sick_pixels":
                rng.choice(rng.choice(self.nodes).gpus).sick = "pixels"
            case "slow_gpu":
                rng.choice(node.gpus).slowness = SLOW_FACTOR
            case "sick_worker" | "sick_node":
                gpus = [gpu for each in self.nodes for gpu in each.gpus]
                gpus = node.gpus if kind == "sick_node" else rng.sample(gpus, min(len(gpus) - 1, rng.choice((1, 1, 3))))
                mode = rng.choice(("error", "input", "crash"))
                for gpu in gpus:
                    gpu.sick = mode
                if kind == "sick_node" and len(self.nodes) > 1:
                    self.sick_encoder_node = node.name

    async def _outage(self, kind, seconds):
        self.down_until = max(self.down_until, self.now + seconds)
        self.log("fault", fault=kind, calls=[], shots=set(), own=False)
        await asyncio.sleep(seconds)
        self.log("fault", fault="storage over", calls=[], shots=set(), own=False)

    def _interrupt(self, kind, driver):
        """Log a fault that can cost the work of all shots in progress."""
        self.log("fault", fault=kind, calls=[], shots={*self.homes}, own=False, driver=driver.number)

    async def _partition(self, node, seconds):
        node.partition_until = self.now + seconds
        self.fault("partition", self._calls_on(node), own=False, node=node)
        life = node.life
        if seconds < simulated_ray.NODE_TIMEOUT_S:
            return
        await asyncio.sleep(simulated_ray.NODE_TIMEOUT_S)
        if node.life != life or not node.up:
            return
        node.known_lost = True
        node.life += 1
        processes = self._processes_on(node)
        for process in processes:
            process.report_lost()
        await asyncio.sleep(node.partition_until - self.now)
        for process in processes:
            process.die()
        node.known_lost = False

    async def _lose(self, node, seconds, *, preempted=False):
        self.fault("node", self._calls_on(node), own=False, node=node)
        node.up, notice_s, life = False, self.rng.uniform(5, 35), node.life
        for process in self._processes_on(node):
            process.die(notice_s, preempted=preempted)
        await asyncio.sleep(notice_s)
        if node.life != life:
            return
        node.known_lost = True
        node.life = life + 1
        if seconds is not None:
            await asyncio.sleep(seconds)
            node.up, node.known_lost, node.draining = True, False, False

    def _processes_on(self, node):
        return [process for process in self.processes if process.alive and process.node is node]

    def _calls_on(self, node):
        return [call for process in self._processes_on(node) for call in process.calls]


def size_of(value):
    """Return the bytes of the arrays in a result, as if they were not shared."""
    return sum(array.nbytes for array in (value or {}).values() if isinstance(array, np.ndarray))


def plan_of(shot):
    """Return the plan of a shot, with further tries if it has a lowest likeness."""

    def planned(number):
        tried = shot if number == 1 else shot.model_copy(update={"seed": shot.seed + 1000 * number})
        photos = tried.face_image
        steps = tuple(
            Step(
                stage=stage.name,
                key=tag_of("instantid", photos).hex()
                if stage.name == "instantid"
                else tag_of(stage.name, tried.id, number).hex(),
                weights=(),
            )
            for stage in stages_of(tried)
        )
        again = tuple(map(planned, range(2, shot.max_tries + 1))) if number == 1 and shot.min_identity is not None else ()
        inputs = dict.fromkeys((*photos, *([tried.image] if tried.image else ())), "0" * 64)
        return ShotPlan(shot=tried, steps=steps, key=tag_of("shot", shot.id).hex(), number=number, inputs=inputs, again=again)

    return planned(1)


class _Time:
    """Stands for the module `time` in the engine."""

    perf_counter = staticmethod(time.perf_counter)
    process_time = staticmethod(time.process_time)

    @staticmethod
    def monotonic():
        return WORLD.now + WORLD.spent

    time = monotonic

    @staticmethod
    def time_ns():
        return int(1e9 * WORLD.now)


async def _to_thread(function, *args):
    await asyncio.sleep(0.01)
    result = function(*args)
    return await result if inspect.isawaitable(result) else result


@contextmanager
def patched(world):
    """Let the engine run in a world."""
    global WORLD
    WORLD = world
    with pytest.MonkeyPatch.context() as patch:
        for name, module in [*sys.modules.items()]:
            if (
                name.startswith(("vidgen_ray.engine", "vidgen_ray.render", "vidgen_ray.batch", "vidgen_ray.outputs.lease"))
                and getattr(module, "time", None) is time
            ):
                patch.setattr(module, "time", _Time)
        patch.setattr(asyncio, "to_thread", _to_thread)
        for module in (storage_pause, director_module):
            patch.setattr(module, "to_daemon_thread", lambda *call: asyncio.ensure_future(_to_thread(*call)))
        patch.setattr(asyncio, "sleep", Sleep)
        patch.setattr(ray, "kill", lambda actor, *, no_restart=True: actor.kill(no_restart=no_restart))
        patch.setattr(ray, "nodes", world.ray_nodes)
        patch.setattr(actor_start, "process_of", lambda actor: actor.process)
        patch.setattr(ray, "cluster_resources", lambda: {"object_store_memory": world.store_bytes})
        patch.setattr(engine, "Fleet", world.fleet)
        patch.setattr(director_module, "live_cluster", world.live_cluster)
        patch.setattr(director_module, "RunMetrics", Metrics)
        patch.setattr(progress_module, "RunLog", RunLog)
        patch.setattr(director_module, "ids_that_failed_before", world.failed_before)
        # Polls take most of the time of a simulation.
        patch.setattr(director_module, "STOP_POLL_S", 10.0)
        patch.setattr(shell, "PING_S", 60.0)
        patch.setattr(actor_start, "RETRY_S", 20.0)
        patch.setenv(shell.CHECK_ENGINE, "1")
        patch.setattr(engine, "STATUS_INTERVAL_S", 600.0)
        patch.setattr(director_module, "load_calibration", lambda *_: None)
        patch.setattr(profile_module, "resolve", cache(profile_module.resolve))
        patch.setattr(results_module, "ManifestWriter", Manifest)
        patch.setattr(route, "CHUNK_BYTES", 1)
        patch.setattr(shot_files, "write_png", lambda write, image, metadata=None: write(image))
        patch.setattr(shot_files, "Mp4Writer", lambda write, *_: nullcontext(SimpleNamespace(write=write)))
        patch.setattr(shot_files, "provenance_records", lambda plan, artefacts, *_: dict.fromkeys(artefacts))
        patch.setattr(encoder, "ENCODER_NICENESS", 0)
        patch.setattr(worker, "prepare_gpu", lambda *_: None)
        patch.setattr(worker, "gpu_of_process", lambda: "a GPU")
        patch.setattr(director_module, "EngineConfig", partial(EngineConfig, limits=LIMITS))
        patch.setattr(worker, "load_lock", lambda *_: nullcontext())
        for module in (worker, encoder):
            patch.setattr(module, "place_of_process", lambda: place_of(world.process), raising=False)
            patch.setattr(module, "activity_of_process", lambda *_: 0.0, raising=False)
        patch.setattr(weights_on_gpu.WeightsCheck, "before_load", lambda self, stages: None)
        patch.setattr(step_runner, "read_image", world.read_image)
        patch.setattr(step_runner, "with_local_loras", lambda shot, inputs: shot)
        try:
            yield
        finally:
            WORLD = None


@cache
def profile(share):
    """Return the profile of the simulated models. `share`: of their usual GPU memory."""
    usual = profile_of_fakes(load_profile("tiny"), ("instantid", "flux", "svd", "realesrgan"))
    actors = {
        name: actor.model_copy(update={"memory_gb": actor.memory_gb * share, "options": {**actor.options, "adapters_kept": 1}})
        if name == "flux"
        else actor.model_copy(update={"memory_gb": actor.memory_gb * share})
        for name, actor in usual.actors.items()
    }
    return usual.model_copy(update={"actors": actors})


def simulate(seed, faults=(), lines=None):
    """Return the world of a seed after all runs. `faults`: kinds that may happen. `lines`: see `World`."""
    world = World(seed, faults, lines)
    with patched(world):
        return world.run()


def worlds(seeds, faults=(), lines=None):
    """Yield the world of each seed."""
    often = gc.get_threshold()
    gc.set_threshold(20_000)
    try:
        for seed in seeds:
            yield simulate(seed, faults, lines)
    finally:
        gc.set_threshold(*often)
