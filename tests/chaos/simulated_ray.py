"""Ray in one thread and simulated time: event loops, nodes, actors with their processes, object references and a fleet.

An actor holds a real `Worker` or `Encoder`. A driver has an event loop of its own, so that it can be stopped or killed.
"""

import asyncio
import math
from collections import deque
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from heapq import heappop, heappush
from itertools import count
from types import SimpleNamespace

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, ObjectLostError, RayTaskError

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine import fleet
from vidgen_ray.engine.calls import CallResult
from vidgen_ray.engine.encoder import Encoder
from vidgen_ray.engine.messages import OUTPUT
from vidgen_ray.engine.ray_cluster import LiveCluster
from vidgen_ray.engine.worker import ActorPlace, Worker
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.planner.cluster import Cluster
from vidgen_ray.planner.cluster import Node as PlannedNode
from vidgen_ray.planner.layout import complete_set

NODE_TIMEOUT_S = 30.0
"""Seconds of silence after which Ray declares a node dead."""
TRANSFER_S = 0.3
"""Seconds in which the input of a call comes from another node."""


class Clock:
    now = 1000.0


class Handle:
    """Callback of a loop."""

    __slots__ = ("args", "callback", "context")

    def __init__(self, callback, args, context):
        self.callback, self.args, self.context = callback, args, context

    def cancel(self):
        self.callback = None


class Loop(asyncio.AbstractEventLoop):
    """Event loop of one simulated process. Several share a clock.

    As in asyncio, an exception of a callback is reported to `on_exception`, and the loop continues.
    """

    get_debug = staticmethod(bool)

    def __init__(self, clock, on_exception):
        self.clock, self._on_exception = clock, on_exception
        self.frozen_until = 0.0
        self.ready, self.scheduled = deque(), []
        self._numbers = count()

    def time(self):
        return self.clock.now

    def call_soon(self, callback, *args, context=None):
        self.ready.append(handle := Handle(callback, args, context or copy_context()))
        return handle

    call_soon_threadsafe = call_soon

    def call_at(self, when, callback, *args, context=None):
        handle = Handle(callback, args, context or copy_context())
        heappush(self.scheduled, (when, next(self._numbers), handle))
        return handle

    def call_later(self, delay_s, callback, *args, context=None):
        return self.call_at(self.clock.now + delay_s, callback, *args, context=context)

    def create_future(self):
        return asyncio.Future(loop=self)

    def create_task(self, coroutine):
        return asyncio.Task(coroutine, loop=self)

    def call_exception_handler(self, context):
        pass

    def step(self):
        """Run the callbacks that are due."""
        asyncio._set_running_loop(self)
        scheduled, ready, now = self.scheduled, self.ready, self.clock.now
        while scheduled and (scheduled[0][0] <= now or scheduled[0][2].callback is None):
            ready.append(heappop(scheduled)[2])
        try:
            for _ in range(len(ready)):
                handle = ready.popleft()
                if handle.callback is not None:
                    self._run(handle)
        except KeyboardInterrupt:
            # Only this exception of a task is raised here, too.
            pass
        finally:
            asyncio._set_running_loop(None)

    def _run(self, handle):
        try:
            handle.context.run(handle.callback, *handle.args)
        except Exception as error:
            self._on_exception(error)

    def discard(self):
        """End all tasks, as if the process was killed: what their `finally` blocks do has no effect."""
        asyncio._set_running_loop(self)
        while tasks := asyncio.all_tasks(self):
            for task in tasks:
                task._log_destroy_pending = False
                with suppress(BaseException):
                    task.get_coro().close()
                asyncio._unregister_task(task)
        asyncio._set_running_loop(None)
        self.ready.clear()
        self.scheduled.clear()


class Sleep:
    """Future of `asyncio.sleep`. Continues its task when the time has come, instead of one round of the loop later."""

    def __init__(self, delay_s):
        self._delay_s, self._loop = delay_s, asyncio.get_running_loop()
        self._asyncio_future_blocking, self._cancelled = False, False

    def __await__(self):
        self._asyncio_future_blocking = True
        yield self

    def get_loop(self):
        return self._loop

    def add_done_callback(self, callback, context):
        self._handle = self._loop.call_later(self._delay_s, callback, self, context=context)

    def cancel(self, msg=None):
        if self._cancelled:
            return False
        self._cancelled = True
        self._loop.call_soon(self._handle.callback, self, context=self._handle.context)
        self._handle.cancel()
        return True

    def result(self):
        if self._cancelled:
            raise asyncio.CancelledError


class Ref:
    """Reference of an object, or of a result that is not there yet."""

    def __init__(self, driver):
        self.driver = driver
        self.done, self.value, self.error, self.size = False, None, None, 0
        self.home = None
        """Node life that holds the object. `None` for a small one, which the driver has."""
        self._waiting = []

    def future(self):
        future = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        if self.done:
            self._wake()
        return future

    def __await__(self):
        return self.future().__await__()

    def resolve(self, value, error):
        """Set the result. Only the first one counts. Runs in the loop of the driver."""
        if not self.done:
            self.done, self.value, self.error = True, value, error
            self._wake()

    def _wake(self):
        waiting, self._waiting = self._waiting, []
        error = self.error
        if waiting:
            # Its traceback would keep this reference alive.
            self.error = None
        for future in waiting:
            if not future.done():
                if error is not None:
                    future.set_exception(error)
                    future.exception()
                else:
                    future.set_result(self.value)

    def __del__(self):
        self.driver.stored_bytes -= self.size


class Call:
    """One request to an actor."""

    def __init__(self, number, actor, driver, method, args, refs):
        self.number, self.actor, self.driver, self.method, self.args, self.refs = number, actor, driver, method, args, refs
        self.process, self.fault = None, None
        plan = next((arg for arg in args if isinstance(arg, ShotPlan)), None)
        if actor.kind is Encoder and args:
            plan = actor.sessions.setdefault(args[0], plan) if plan else actor.sessions.get(args[0])
        self.plan = plan
        self.shot = plan.shot.id if plan else None
        lists = [arg for arg in args if isinstance(arg, tuple)]
        self.stages = tuple(name for names in lists for name in names if isinstance(name, str) and name in STAGE_BY_NAME)
        if actor.kind is Encoder and method in ("begin", "add", "commit", "write"):
            self.stages = (OUTPUT,)
        chunk = next((arg for arg in args if isinstance(arg, slice)), None)
        self.unit = (plan and (plan.key, plan.number), self.stages, chunk and chunk.start)
        self.is_work = bool(plan and self.stages)
        self.is_control = hasattr(getattr(actor.kind, method), "__ray_concurrency_group__")


class Node:
    def __init__(self, name, gpus):
        self.name, self.life, self.up, self.draining, self.partition_until = name, 0, True, False, 0.0
        self.known_lost = False
        self.gpus = [Gpu(self, gb) for gb in gpus]

    @property
    def id(self):
        return f"{self.name}-{self.life}"

    @property
    def usable(self):
        return self.up and not self.draining and not self.known_lost


class Gpu:
    def __init__(self, node, gb):
        self.node, self.gb, self.holder, self.sick, self.slowness = node, gb, None, None, 1.0

    @property
    def sound(self):
        return self.sick is None and self.slowness == 1.0


class Process:
    """Process of an actor. Runs one call at a time, some encoders several, and those of the control group beside them."""

    def __init__(self, actor, node):
        self.actor, self.world, self.node, self.life = actor, actor.world, node, node.id
        self.pid = next(self.world.pids)
        self.alive, self.lost, self.instance, self.frozen_until = True, False, None, 0.0
        self.started = asyncio.Event()
        self.calls, self.cancelled = {}, set()
        """Pending call -> its task, and numbers of calls that stop at once."""
        self.turn = asyncio.Semaphore(actor.spec.parallel if actor.kind is Encoder else 1)
        self.loaded, self.loaded_at, self.gone_at, self.adapters = False, math.inf, math.inf, []
        self.world.processes.append(self)
        self.task = self.world.spawn(self._start())

    async def _start(self):
        await asyncio.sleep(self.world.rng.uniform(1, 3))
        self.instance = self.actor.kind(*self.actor.args)
        self.started.set()

    async def run(self, call):
        """Run a call that has arrived, and return its result."""
        # Not those of other calls: they keep results in the object store.
        control_args = call.args if call.is_control else ()
        await self.started.wait()
        if call.is_control:
            await self._thaw()
            if call.method == "cancel":
                self.cancelled.add(control_args[0])
            return self._invoke(call, control_args)
        # Ray fetches the inputs of a call while it waits behind others.
        inputs = self.world.spawn(self._inputs(call))
        try:
            async with self.turn:
                await self._thaw()
                return await self._execute(call, inputs)
        finally:
            inputs.cancel()

    async def _inputs(self, call):
        """Return the arguments of a call, or the error of the first one that is lost."""
        try:
            return [await self._fetch(arg, call) if isinstance(arg, Ref) else arg for arg in call.args], None
        except ray.exceptions.RayError as error:
            return None, error

    async def _thaw(self):
        while self.frozen_until > self.world.now:
            await asyncio.sleep(self.frozen_until - self.world.now)

    async def _execute(self, call, inputs):
        world = self.world
        if not call.refs:
            # Its node was declared dead meanwhile.
            await asyncio.Event().wait()
        seconds = 0.01 if call.is_work and call.args[0] in self.cancelled else world.seconds(call)
        args, lost = await inputs
        if lost is not None:
            raise lost
        kind = world.draw_fault(call)
        if call.is_work:
            world.log("start", call=call, process=self)
        if kind == "slow":
            seconds *= world.rng.uniform(5, 20)
        if kind in ("hang", "hang_load"):
            await asyncio.sleep(seconds / 2)
            await asyncio.Event().wait()
        if kind in ("crash", "crash_load"):
            await asyncio.sleep(seconds / 2)
            self.die()
            await asyncio.Event().wait()
        if OUTPUT in call.stages:
            await world.storage.respond()
        await asyncio.sleep(seconds)
        await self._thaw()
        value = self._invoke(call, args)
        if call.method == "load" and self.actor.kind is Worker:
            self.loaded, self.loaded_at = True, world.now
            world.log("loaded", process=self)
        returned = world.exchanged(call, value) if kind == "foreign" else value
        if call.is_work:
            world.worked(call, self, seconds, value)
        if kind == "duplicate":
            world.spawn(self._again(call, args))
        return returned

    async def _again(self, call, args):
        """Run a call a second time and drop the result."""
        await asyncio.sleep(self.world.rng.uniform(0, 60))
        if self.alive:
            self._invoke(call, args)

    async def _fetch(self, ref, call):
        if ref.error is not None or ref.home is None:
            return ref.value
        await self.world.network(self.node)
        node, life = ref.home
        if node is not self.node:
            await self.world.network(node)
        while node.id == life and not node.up:
            await asyncio.sleep(1.0)
        if node is not self.node and node.id == life:
            self.world.transfers += 1
            await asyncio.sleep(TRANSFER_S)
        if node.id != life or ref.value is None:
            await asyncio.sleep(self.world.rng.uniform(0, 2))
            self.world.fault("inputs", [call], own=False)
            raise lost_object(self.world.rng)
        return ref.value

    def _invoke(self, call, args):
        """Run the real method, in no time."""
        self.world.begin(call, self)
        try:
            value = getattr(self.instance, call.method)(*args)
            return value[::-1] if isinstance(value, tuple) and isinstance(value[-1], CallResult) else value
        finally:
            self.world.end()

    def die(self, notice_s=None, *, preempted=False):
        """End the process. Its driver learns it after `notice_s` seconds."""
        if not self.alive:
            return
        self.alive = False
        self._log_gone()
        self.task.cancel()
        for task in self.calls.values():
            task.cancel()
        self.world.spawn(self._notice(self.world.rng.uniform(0.05, 2) if notice_s is None else notice_s, preempted))

    def _log_gone(self):
        self.gone_at = min(self.gone_at, self.world.now)
        if self.loaded:
            self.world.log("gone", process=self)

    async def _notice(self, seconds, preempted):
        await asyncio.sleep(seconds)
        self.report_lost(preempted=preempted)

    def report_lost(self, *, preempted=False):
        """Let Ray fail the pending calls of the process and restart the actor. The process itself may go on."""
        if self.lost:
            return
        self.lost = True
        self._log_gone()
        calls, self.calls = self.calls, {}
        for call in calls:
            error = died(preempted) if preempted else unavailable("timed out" if self.alive else "the process has crashed")
            self.world.answer(call, None, error)
        if self.actor.process is self:
            self.actor.process = None
            self.actor.restart(preempted)


def unavailable(text="The actor is restarting"):
    return ActorUnavailableError(text, None)


def died(preempted):
    error = ActorDiedError()
    error._preempted = preempted
    return error


def lost_object(rng):
    error = ObjectLostError("00" * 28, None, "")
    return error if rng.random() < 0.5 else RayTaskError("run", "", error, "worker", 1, "sim")


class Actor:
    """Handle of an actor, and the actor itself. `home` returns the node for its next process, or `None`."""

    def __init__(self, world, kind, args, spec, home, driver):
        self.world, self.kind, self.args, self.spec, self.home, self.driver = world, kind, args, spec, home, driver
        self.process, self.dead, self.preempted = None, False, False
        self.sessions = {}
        self.gpu = None
        self.arrival, self.was_up = 0.0, False
        world.actors.append(self)
        self._starting = world.spawn(self._start(0.0))

    def restart(self, preempted):
        self.preempted = preempted
        if not self.dead:
            self._starting = self.world.spawn(self._start(self.world.rng.uniform(0.5, 2)))

    async def _start(self, delay_s):
        await asyncio.sleep(delay_s)
        while not self.dead and (node := self.home()) is None:
            await asyncio.sleep(10.0)
        if not self.dead:
            self.process, self.preempted, self.was_up = Process(self, node), False, True

    def kill(self, *, no_restart):
        self.dead = self.dead or no_restart
        self.world.spawn(self._kill(self.process))

    async def _kill(self, process):
        if process is not None:
            await self.world.network(process.node)
            process.die(0.05)

    def __getattr__(self, method):
        if method.startswith("_") or not hasattr(self.kind, method):
            raise AttributeError(method)
        return SimpleNamespace(
            remote=partial(self._send, method, 1),
            options=lambda num_returns: SimpleNamespace(remote=partial(self._send, method, num_returns)),
        )

    def _send(self, method, num_returns, *args):
        driver = self.world.driver_of(asyncio.get_running_loop())
        refs = [Ref(driver) for _ in range(num_returns)]
        call = Call(next(self.world.numbers), self, driver, method, args, refs)
        if call.is_work:
            self.world.log("send", call=call)
        self.world.spawn(self._deliver(call, self.process))
        # The result of the call comes last, and behind it in the model.
        return refs[0] if num_returns == 1 else refs[::-1]

    async def _deliver(self, call, process):
        world = self.world
        while process is None and not (self.dead or self._starting.done() or self.preempted or self.was_up):
            # The first process of the actor starts.
            await asyncio.sleep(5.0)
            process = self.process
        if process is None:
            await asyncio.sleep(0.01)
            world.answer(call, None, died(self.preempted) if self.dead or self.preempted else unavailable())
            return
        call.process = process
        process.calls[call] = asyncio.current_task()
        if process.lost:
            process.calls.pop(call)
            world.answer(call, None, unavailable())
            return
        if not call.is_control:
            # Requests to one process arrive in order.
            self.arrival = max(self.arrival + 1e-6, world.now + world.rng.uniform(0.001, 0.03))
            await asyncio.sleep(self.arrival - world.now)
        await world.network(process.node)
        if not process.alive:
            await asyncio.Event().wait()
        value, error = None, None
        try:
            value = await process.run(call)
        except ray.exceptions.RayError as raised:
            error = raised
        except Exception as raised:
            world.log("raised", call=call, error=repr(raised))
            error = RayTaskError(call.method, "", raised, "worker", 1, "sim")
        process.calls.pop(call, None)
        await asyncio.sleep(world.rng.uniform(0.001, 0.03))
        await world.network(process.node)
        world.answer(call, value, error)


class Fleet:
    """Places the slots of a layout on GPUs of the world. Replaces `fleet.Fleet`."""

    def __init__(self, world, config, listener, more_slots=None):
        self.world, self.config, self.listener = world, config, listener
        self.driver = world.driver_of(asyncio.get_running_loop())
        self._numbers = count()
        self._slots, self._encoders = [], []
        self._keeper = None

    async def start(self, layout, labels):
        self._layout = layout
        self._slots = [
            SimpleNamespace(slot=slot, label=label, gpu=None, node=None, actors={}, since=self.world.now)
            for slot, label in zip(layout.slots, labels, strict=True)
        ]
        # As in the fleet, slots that hold every stage are placed together, and the others are asked for after them.
        self._first = [self._slots[index] for index in complete_set(layout.slots)]
        self._could_hold_at = self.world.now
        self._place()
        self._keeper = asyncio.ensure_future(self._keep())

    async def stop(self):
        if self._keeper is not None:
            self._keeper.cancel()
        self.kill()

    def kill(self):
        """Kill all actors and free the GPUs. Also after the driver was killed."""
        for actor in (*(actor for slot in self._slots for actor in slot.actors.values()), *self._encoders):
            actor.kill(no_restart=True)
        for slot in self._slots:
            self._free(slot)

    @property
    def held_gpus(self):
        return sum(slot.gpu is not None for slot in self._slots)

    async def holdings(self):
        return "GPUs"

    async def _keep(self):
        while True:
            await asyncio.sleep(10.0)
            for slot in self._slots:
                if slot.gpu is not None and (slot.gpu.node.known_lost or (slot.gpu.node.up and slot.node != slot.gpu.node.id)):
                    self._free(slot)
            self._place()
            self._give_up()

    def _free(self, slot):
        if slot.gpu is not None and slot.gpu.holder is slot:
            slot.gpu.holder = None
        slot.gpu, slot.since = None, self.world.now

    def _place(self):
        first = self._first
        if not all(slot.actors for slot in first):
            if not all(map(self._take_gpu, first)):
                for slot in first:
                    if slot.gpu is not None and not slot.actors:
                        slot.gpu.holder = slot.gpu = None
            to_start = first if all(slot.gpu for slot in first) else []
        else:
            to_start = [slot for slot in self._slots if self._take_gpu(slot)]
        for slot in to_start:
            if not slot.actors:
                self._create(slot)
            for actor in slot.actors.values():
                actor.gpu = slot.gpu
        missing = self._layout.encoders - len(self._encoders)
        for _ in range(missing if any(slot.actors for slot in self._slots) else 0):
            name = self.config.encoder_name(next(self._numbers))
            encoder = Actor(self.world, Encoder, (self.config,), self.config.encoder, self.world.any_node, self.driver)
            self._encoders.append(encoder)
            self.listener.worker_started(name, self.config.encoder, encoder)

    def _take_gpu(self, slot):
        """Give the slot a GPU, if it has none. Return whether it has one."""
        gpu = slot.gpu or next((gpu for gpu in self._gpus_for(slot) if gpu.holder is None), None)
        if gpu is not None and slot.gpu is None:
            slot.gpu, gpu.holder, slot.node = gpu, slot, gpu.node.id
        return gpu is not None

    def _gpus_for(self, slot):
        """Yield the GPUs that the slot could have, free or not."""
        for node in self.world.nodes:
            if node.usable and slot.label in (None, ("node", node.name)):
                yield from (gpu for gpu in node.gpus if gpu.gb >= slot.slot.memory_gb - 0.01)

    def _create(self, slot):
        number = next(self._numbers)

        def home():
            return slot.gpu.node if slot.gpu is not None and slot.gpu.node.up and slot.node == slot.gpu.node.id else None

        for k, spec in enumerate(slot.slot.workers):
            name = self.config.worker_name(number, k)
            slot.actors[name] = Actor(self.world, Worker, (self.config, spec, 1), spec, home, self.driver)
        for (name, actor), spec in zip(slot.actors.items(), slot.slot.workers, strict=True):
            self.listener.worker_started(name, spec, actor)

    def _give_up(self):
        if any(slot.actors or any(self._gpus_for(slot)) for slot in self._slots):
            self._could_hold_at = self.world.now
        elif self.world.now - self._could_hold_at > fleet.LAST_LOST_AFTER_S:
            self.listener.not_placeable("the nodes are gone")
        for slot in self._slots:
            if slot.gpu is None and slot.actors and self.world.now - slot.since > fleet.LOST_AFTER_S:
                placed = [each.slot.stages for each in self._slots if each.gpu is not None]
                is_last = slot.slot.stages - frozenset().union(*placed)
                if not is_last or self.world.now - slot.since > fleet.LAST_LOST_AFTER_S:
                    lost, slot.actors = slot.actors, {}
                    for name, actor in lost.items():
                        actor.kill(no_restart=True)
                        self.listener.worker_lost(name)


def live_cluster(world):
    """Return the nodes of the world as `ray_cluster.live_cluster` does."""

    def nodes(free):
        return tuple(
            PlannedNode(
                tuple(gpu.gb for gpu in node.gpus if not (free and gpu.holder is not None)), 32.0, 512.0, ("node", node.name)
            )
            for node in world.nodes
            if node.usable
        )

    return LiveCluster(Cluster(nodes(False)), Cluster(nodes(True)))


def place_of(process):
    return ActorPlace(process.life, process.pid, (), "")
