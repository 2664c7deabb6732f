"""Fleet: the worker and encoder actors of an engine, and their placement groups.

A slot is a bundle of a placement group. A bundle with whole GPUs owns them: only the actors of the slot use them, and a crashed
actor restarts in the same bundle. With GPU fractions alone, Ray could put actors of two slots on one GPU.

The first placement group holds a complete set: the fewest slots that hold every stage, and an encoder. Ray places all of its
bundles or none, so two runs never hold half a set each and wait for the other half.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import count
from typing import Any, NamedTuple, Protocol, TypeVar

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.encoder import encoder_class
from vidgen_ray.engine.ray_cluster import NODE_ID_LABEL, live_cluster, within
from vidgen_ray.engine.ray_internals import actor_table, dashboard_url
from vidgen_ray.engine.worker import worker_class
from vidgen_ray.errors import SetupError
from vidgen_ray.planner.choose_layout import Plan
from vidgen_ray.planner.cluster import Cluster, Label
from vidgen_ray.planner.layout import Layout, Slot, WorkerSpec, complete_set
from vidgen_ray.planner.solver import ENCODER_CPUS, more_slots
from vidgen_ray.system.files import ProcessId, this_process

FIRST_POLL_S, POLL_S = 0.1, 10.0
"""Seconds between two looks at the cluster: while a request is new, and at most."""
FIRST_MESSAGE_S, MESSAGE_INTERVAL_S = 30.0, 60.0
"""Seconds until the first message about what the fleet waits for, and between two messages."""
LOST_AFTER_S, LAST_LOST_AFTER_S = 60.0, 600.0
"""Seconds without a node after which the workers of a slot are given up. The second value is for a slot with a stage that no
other slot has: waiting for a new node, which may take minutes, can be better than another layout."""
_CLOSE_TIMEOUT_S = 5.0
"""Seconds that workers may take to write their queued cache entries when the fleet stops."""
WITHDRAW_AFTER_S = 10.0
"""Seconds after which the request for an added slot is withdrawn: the GPU that was free is in use."""

GROUP_NAME = re.compile(r"(?P<engine>.+?)(/\d+)? in (?P<folder>.+) since (?P<since>.+)/group/(?P<process>.+)/\d+")
"""Name of a placement group: the engine, its output folder, its start, its process and a number. Other fleets show it."""
STATE_TIMEOUT_S = 10.0
"""Seconds that Ray's dashboard may take to say who holds resources."""
MAX_ACTORS = 1000
SHOWN_HOLDERS = 5
DATA_ACTOR = "MapWorker("
"""Start of the class name of Ray Data's actors, before the name of their step."""
_UNPLACED = ("PENDING", "PREPARED", "RESCHEDULING")
"""States of a placement group with bundles that have no node."""

_T = TypeVar("_T")
PlacedSlot = tuple[Slot, Label | None]
"""A slot, and the label that its node must have."""
MoreSlots = Callable[[Sequence[Slot], Cluster], Sequence[PlacedSlot]]
"""Present slots with a node, free resources -> slots to add."""

_group_numbers = count()
_log = logging.getLogger(__name__)


class FleetListener(Protocol):
    """Receives the events of a fleet, in the engine's event loop."""

    def worker_started(self, name: str, spec: WorkerSpec, actor: Any) -> None:
        """Called when a worker or an encoder was created, with its GPU reserved. Its process may still start."""

    def worker_lost(self, name: str) -> None:
        """Called when a worker was removed for good: its node is gone, and there is no room elsewhere.

        If there is room later, a new worker starts under a new name. In place of an encoder, another one was created.
        """

    def not_placeable(self, reason: str) -> None:
        """Called if the cluster has been too small for the complete set for LAST_LOST_AFTER_S: nodes were lost before that.

        Called again every MESSAGE_INTERVAL_S as long as that is so. A listener that looks for missing stages itself needs none.
        """

    def waiting(self, reason: str | None) -> None:
        """Called after 30 s without enough resources, and then every minute. `None`: the fleet waits no longer."""


@dataclass(eq=False)
class _Bundle:
    """A bundle of a placement group: for a slot, or for an encoder if `slot` is `None`."""

    slot: Slot | None
    label: Label | None
    group: PlacementGroup
    bundle: int
    added: bool
    """Added for a GPU that was free, or in a copy of the layout. Dropped as soon as it has no node."""
    unplaced_since: float | None
    """Time since when it has no node. `None` if it has one."""
    actors: dict[str, Any] = field(default_factory=dict)
    """Name -> actor."""

    def __str__(self) -> str:
        return "encoder" if self.slot is None else f"slot of {'+'.join(stage for w in self.slot.workers for stage in w.stages)}"


class Fleet:
    """Creates the actors of a layout as soon as Ray has nodes for them, and keeps them until `stop`.

    All methods run in the engine's event loop, and so do the calls of the listener.
    """

    def __init__(self, config: EngineConfig, listener: FleetListener, more_slots: MoreSlots | None = None) -> None:
        """`more_slots` is called in a thread when GPUs are free while the fleet runs, for example on a new node.

        With `None`, the fleet adds no slots.
        """
        self._config = config
        self._listener = listener
        self._more_slots = more_slots
        self._slot_numbers = count()
        self._encoder_numbers = count()
        self._since = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        self._groups: list[PlacementGroup] = []
        """All placement groups. The first one is that of the complete set."""
        self._reservations: list[_Bundle] = []
        self._encoders: list[Any] = []
        """Encoders outside the complete set. Ray places them on any node, and restarts them on another one."""
        self._further: list[PlacedSlot] = []
        """Slots of the layout that are requested once the complete set has nodes."""
        self._copy_requested = False
        self._released: frozenset[str] = frozenset()
        self._offered: Cluster | None = None
        """Free resources that `more_slots` was called with last."""
        self._parallel_loads = 1
        self._keeper: asyncio.Task[None] | None = None
        self._change: asyncio.Future[Any] | None = None

    async def start(self, layout: Layout, labels: Sequence[Label | None]) -> None:
        """Request the complete set of the layout. Returns before it has nodes.

        `labels`: for each slot the label that its node must have; see `labels_of`. After `stop`, the fleet can start again with
        another layout.
        """
        slots = list(zip(layout.slots, labels, strict=True))
        # A server that computes stages has its worker already.
        self._copied_slots = [(slot, label) for slot, label in slots if not any(worker.server for worker in slot.workers)]
        first = complete_set(layout.slots)
        self._offered = None
        self._parallel_loads = layout.parallel_loads
        self._further = [slot for index, slot in enumerate(slots) if index not in first]
        await self._do(self._reserve, [*(slots[index] for index in first), (None, None)], False)
        if all(slot.stages == frozenset(layout.stages) for slot in layout.slots):
            # Each slot is a complete set of its own. Waiting for the first one would leave the other GPUs idle.
            await self._request(self._further, added=False)
            self._further = []
        self._keeper = asyncio.create_task(self._keep(layout))

    def request_copy(self) -> None:
        """Request nodes for a copy of the layout, if all of it has nodes. Only for a fleet without `more_slots`."""
        self._copy_requested = True

    @property
    def newest_copy(self) -> frozenset[str]:
        """Names of the workers and encoders of the newest copy of the layout that has nodes. Empty if there is none."""
        copies = [bundle for bundle in self._copies if bundle.actors]
        return frozenset(name for bundle in copies if bundle.group is copies[-1].group for name in bundle.actors)

    def release(self, names: frozenset[str]) -> None:
        """Stop the actors of a copy, which must have no calls, and give its nodes back. Withdraws copies without nodes."""
        self._released = names

    async def stop(self) -> None:
        """Kill the actors and remove the placement groups."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        if self._change is not None:
            # A thread cannot be cancelled. Wait for it, and then remove what it has created.
            await asyncio.wait([self._change])
        await asyncio.to_thread(self._remove_all)

    @property
    def held_gpus(self) -> int:
        """Number of GPUs that the fleet has reserved on nodes."""
        slots = (bundle.slot for bundle in list(self._reservations) if bundle.unplaced_since is None)
        return sum(slot.gpus for slot in slots if slot is not None)

    async def holdings(self) -> str:
        """Return which GPUs and CPUs the fleet holds, and what is free."""
        held = _total([reservation for reservation in self._reservations if reservation.unplaced_since is None])
        held["CPU"] = held.get("CPU", 0.0) + len(self._encoders) * ENCODER_CPUS
        available = await asyncio.to_thread(ray.available_resources)
        return f"{_text(held)}; {_text({name: available.get(name, 0) for name in held})} are free"

    @property
    def _copies(self) -> list[_Bundle]:
        return [bundle for bundle in self._reservations if bundle.added and self._more_slots is None]

    async def _do(self, change: Callable[..., _T], *args: Any) -> _T:
        """Create or remove actors and placement groups in a thread: these calls of Ray block."""
        change_in_thread = asyncio.ensure_future(asyncio.to_thread(change, *args))
        self._change = change_in_thread
        return await asyncio.shield(change_in_thread)

    # Supervision

    async def _keep(self, layout: Layout) -> None:
        """Create actors where there are nodes, give up lost slots, add slots, and report what the fleet waits for."""
        started, complete = time.monotonic(), False
        waiting_since, next_message_s, last_offer, could_hold_at = started, FIRST_MESSAGE_S, started, started
        while True:
            now = time.monotonic()
            try:
                groups = await asyncio.to_thread(placement_group_table)
                self._update(groups, now)
                await self._start_placed(layout)
                await self._give_up(now)
                is_placed = all(r.unplaced_since is None for r in self._reservations)
                complete = complete or is_placed
                if self._released:
                    names, self._released = self._released, frozenset()
                    await self._stop_copy(names)
                if complete and self._further:
                    await self._request(self._further, added=False)
                    self._further = []
                    continue
                if self._copy_requested and is_placed:
                    await self._do(self._reserve, [*self._copied_slots, *[(None, None)] * layout.encoders], True)
                self._copy_requested = False
                if complete and now - last_offer >= POLL_S and self._more_slots is not None and not self._others_wait(groups):
                    last_offer = now
                    await self._add_slots(self._more_slots)
                waiting = [r for r in self._reservations if r.unplaced_since is not None and not r.added]
                if not waiting:
                    if next_message_s > FIRST_MESSAGE_S:
                        self._listener.waiting(None)
                    waiting_since, next_message_s, could_hold_at = now, FIRST_MESSAGE_S, now
                elif now - waiting_since >= next_message_s:
                    next_message_s += MESSAGE_INTERVAL_S
                    reason = await asyncio.to_thread(self._wait_reason, waiting)
                    self._listener.waiting(reason)
                    if complete or await asyncio.to_thread(_cluster_could_hold, waiting):
                        could_hold_at = now
                    elif now - could_hold_at >= LAST_LOST_AFTER_S:
                        self._listener.not_placeable(reason)
            # Supervision must continue after any error, such as a restart of Ray's head process.
            except Exception:
                _log.warning("cannot supervise the placement groups, trying again", exc_info=True)
                waiting = []
            pause_s = max(FIRST_POLL_S, (time.monotonic() - waiting_since) / 10) if waiting else POLL_S
            await asyncio.sleep(min(POLL_S, pause_s))

    def _update(self, groups: Mapping[str, Any], now: float) -> None:
        """Set which reservations have a node. `groups`: Ray's table of placement groups."""
        for reservation in self._reservations:
            entry = groups.get(reservation.group.id.hex())
            if entry is not None and entry["bundles_to_node_id"].get(reservation.bundle):
                reservation.unplaced_since = None
            elif reservation.unplaced_since is None:
                reservation.unplaced_since = now

    async def _start_placed(self, layout: Layout) -> None:
        """Create the actors of reservations that have a node, and further encoders in proportion to the slots."""
        # Ray starts their processes in this order, as many at a time as there are CPUs. Encoders are not needed before workers.
        for reservation in sorted(self._reservations, key=lambda reservation: reservation.slot is None):
            if reservation.actors or reservation.unplaced_since is not None:
                continue
            await self._do(self._create_actors, reservation)
            specs = (self._config.encoder,) if reservation.slot is None else reservation.slot.workers
            for (name, actor), spec in zip(reservation.actors.items(), specs, strict=True):
                self._listener.worker_started(name, spec, actor)
        copies = self._copies
        started = sum(bool(r.actors) for r in self._reservations if r.slot is not None and r not in copies)
        share = started / len(layout.slots) if layout.slots else 1.0
        for _ in range(math.ceil(layout.encoders * share) - len(self._encoders) - 1):
            name = self._config.encoder_name(next(self._encoder_numbers))
            self._listener.worker_started(name, self._config.encoder, await self._do(self._create_encoder, name, "SPREAD"))

    async def _give_up(self, now: float) -> None:
        """Kill the workers of slots that have had no node for too long. Withdraw requests that cannot be met.

        The request for a slot of the layout stays: its workers start again as soon as there is a node.
        """
        for reservation in list(self._reservations):
            if reservation.unplaced_since is None:
                continue
            if reservation.slot is None and not reservation.added:
                await self._replace_encoder(reservation)
                continue
            limit_s = self._give_up_after_s(reservation)
            if now - reservation.unplaced_since < limit_s:
                continue
            lost, reservation.actors = reservation.actors, {}
            await self._do(_kill, list(lost.values()))
            for name in lost:
                self._listener.worker_lost(name)
            # Only the lost node has this label.
            needs_lost_node = bool(lost) and reservation.label is not None and reservation.label[0] == NODE_ID_LABEL
            if reservation.added or needs_lost_node:
                self._reservations.remove(reservation)
                await self._do(self._remove_unused_groups)

    async def _replace_encoder(self, reservation: _Bundle) -> None:
        """Start another encoder on any node if that of the complete set was lost with its node.

        Ray places all lost bundles of a placement group together, so the encoder would wait for a GPU.
        """
        lost, reservation.actors = reservation.actors, {}
        if lost:
            name = self._config.encoder_name(next(self._encoder_numbers))
            self._listener.worker_started(name, self._config.encoder, await self._do(self._create_encoder, name, "SPREAD"))
            await self._do(_kill, list(lost.values()))
            for name in lost:
                self._listener.worker_lost(name)

    def _give_up_after_s(self, reservation: _Bundle) -> float:
        """Return the seconds after which a slot without a node is given up."""
        if not reservation.actors:
            # Ray's autoscaler starts nodes for a copy.
            return LAST_LOST_AFTER_S if self._more_slots is None else WITHDRAW_AFTER_S
        others = (r.slot.stages for r in self._reservations if r.slot is not None and r.unplaced_since is None)
        has_last_stage = reservation.slot is not None and reservation.slot.stages - frozenset().union(*others)
        return LAST_LOST_AFTER_S if has_last_stage else LOST_AFTER_S

    async def _stop_copy(self, names: frozenset[str]) -> None:
        released = [bundle for bundle in self._copies if not bundle.actors or bundle.actors.keys() & names]
        self._reservations = [bundle for bundle in self._reservations if bundle not in released]
        for name in names:
            self._listener.worker_lost(name)
        await self._do(self._stop_actors, released)

    def _others_wait(self, groups: Mapping[str, Any]) -> bool:
        """Return whether another user of the cluster waits for resources."""
        own = {group.id.hex() for group in self._groups}
        return any(entry["state"] in _UNPLACED for group, entry in groups.items() if group not in own)

    async def _add_slots(self, more_slots: MoreSlots) -> None:
        """Request the slots that `more_slots` returns for the free GPUs, unless it was asked about the same before."""
        free = (await asyncio.to_thread(live_cluster)).free
        # Ray gives these GPUs to slots that wait for a node.
        wanted = {r.label for r in self._reservations if r.slot is not None and r.slot.has_gpu and r.unplaced_since is not None}
        nodes = (replace(node, gpus=()) if None in wanted or node.label in wanted else node for node in free.nodes)
        free = replace(free, nodes=tuple(nodes))
        if not free.gpus or free == self._offered:
            return
        self._offered = free
        present = [r.slot for r in self._reservations if r.slot is not None and r.unplaced_since is None]
        slots = await asyncio.to_thread(more_slots, present, free)
        if slots:
            await self._request(slots, added=True)

    async def _request(self, slots: Sequence[PlacedSlot], *, added: bool) -> None:
        """Request a node for each slot."""
        for slot in slots:
            await self._do(self._reserve, [slot], added)

    # Calls of Ray that block, in a thread

    def _reserve(self, slots: Sequence[tuple[Slot | None, Label | None]], added: bool) -> None:
        """Request one placement group with a bundle for each slot. `None` in place of a slot is an encoder."""
        group = placement_group(
            [_resources(slot) for slot, _ in slots],
            name=(
                f"{self._config.name} in {self._config.outputs.url} since {self._since}"
                f"/group/{this_process()}/{next(_group_numbers)}"
            ),
            bundle_label_selector=[dict([label]) if label else {} for _, label in slots],
        )
        self._groups.append(group)
        now = time.monotonic()
        self._reservations += [_Bundle(slot, label, group, n, added, now) for n, (slot, label) in enumerate(slots)]

    def _create_actors(self, reservation: _Bundle) -> None:
        place = PlacementGroupSchedulingStrategy(reservation.group, placement_group_bundle_index=reservation.bundle)
        if reservation.slot is None:
            name = self._config.encoder_name(next(self._encoder_numbers))
            reservation.actors = {name: self._create_encoder(name, place)}
            return
        number = next(self._slot_numbers)
        for k, spec in enumerate(reservation.slot.workers):
            name = self._config.worker_name(number, k)
            worker = worker_class(spec.parallel).options(
                name=name, num_cpus=spec.cpus, num_gpus=spec.gpus, scheduling_strategy=place
            )
            reservation.actors[name] = worker.remote(self._config, spec, self._parallel_loads)

    def _create_encoder(self, name: str, place: Any) -> Any:
        actor = encoder_class(self._config.encoder.parallel)
        encoder = actor.options(name=name, num_cpus=ENCODER_CPUS, scheduling_strategy=place).remote(self._config)
        if place == "SPREAD":
            self._encoders.append(encoder)
        return encoder

    def _wait_reason(self, waiting: Sequence[_Bundle]) -> str:
        """Return what these reservations wait for, what the cluster has, and who holds it."""
        needed, own = _total(waiting), _total([r for r in self._reservations if r.unplaced_since is None])
        in_cluster, available = ray.cluster_resources(), ray.available_resources()
        total, free = (_text({name: amounts.get(name, 0) for name in needed}) for amounts in (in_cluster, available))
        kinds = Counter(map(str, waiting)).items()
        listed = ", ".join(f"{number} {kind if number == 1 else kind.replace('slot', 'slots')}" for kind, number in kinds)
        reason = f"waiting for {_text(needed)} ({listed}): the cluster has {total}, {free} are free"
        held = {
            name: max(0.0, round(in_cluster.get(name, 0) - available.get(name, 0) - own.get(name, 0), 2)) for name in needed
        }
        if any(held.values()):
            own_groups = {group.id.hex() for group in self._groups}
            reason += f"; others hold {_text(held)}{_holders(own_groups, self._config.name, needed) or _data_steps()}"
        nodes = [node for node in ray.nodes() if node["Alive"]]
        for reservation in {str(r): r for r in waiting if not any(_could_hold(node, r) for node in nodes)}.values():
            label = f" and the label {'='.join(reservation.label)}" if reservation.label else ""
            reason += f". No node has {_text(_resources(reservation.slot))}{label}, which one {reservation} needs"
        return reason

    def _remove_unused_groups(self) -> None:
        used = {reservation.group.id for reservation in self._reservations}
        for group in [group for group in self._groups if group.id not in used]:
            self._groups.remove(group)
            remove_placement_group(group)

    def _remove_all(self) -> None:
        stopped, self._reservations = self._reservations, []
        self._stop_actors(stopped)
        _kill(self._encoders)
        self._encoders.clear()

    def _stop_actors(self, reservations: Sequence[_Bundle]) -> None:
        """Stop the actors of former reservations, and remove their placement groups."""
        workers = [
            actor for reservation in reservations if reservation.slot is not None for actor in reservation.actors.values()
        ]
        # A worker that has crashed or hangs loses its queued cache entries.
        if workers:
            ray.wait([worker.close.remote() for worker in workers], num_returns=len(workers), timeout=_CLOSE_TIMEOUT_S)
        _kill([actor for reservation in reservations for actor in reservation.actors.values()])
        self._remove_unused_groups()


def remove_leaked_groups() -> None:
    """Remove the placement groups of fleets whose process was on this machine and has ended.

    Ray kills the actors of such a process, but keeps its placement groups until the job ends.
    """
    for group in placement_group_table().values():
        match = GROUP_NAME.fullmatch(group["name"])
        process = ProcessId.parse(match["process"]) if match else None
        if process is not None and process.is_running() is False and group["state"] != "REMOVED":
            with suppress(ValueError):  # it was removed meanwhile
                remove_placement_group(get_placement_group(group["name"]))


def labels_of(chosen: Plan, cluster: Cluster) -> list[Label | None]:
    """Return for each slot the label of the node that it is planned on. `None` if all GPUs are alike.

    Raises SetupError if GPUs differ and Ray cannot tell them apart.
    """
    if len(frozenset().union(*(node.sizes_gb for node in cluster.nodes))) < 2:
        return [None] * len(chosen.nodes)
    nodes = [cluster.nodes[number] for number in chosen.nodes]
    if any(len(node.sizes_gb) > 1 for node in nodes):
        raise SetupError(
            f"{cluster}: Ray cannot distinguish GPUs of different sizes on one node. "
            "Set CUDA_VISIBLE_DEVICES to GPUs of one size, or start one Ray node per size."
        )
    if any(node.label is None for node in nodes):
        raise SetupError(f"{cluster}: --gpus does not say which node has which GPUs. Leave it out to detect them.")
    return [node.label for node in nodes]


def placed_more_slots(stage_seconds: Mapping[str, float], present: Sequence[Slot], free: Cluster) -> list[PlacedSlot]:
    """Return the slots to add for GPUs that have become free, with the labels of their nodes. See `more_slots`."""
    return [(slot, free.nodes[node].label) for slot, node in more_slots(present, stage_seconds, free)]


def _kill(actors: Sequence[Any]) -> None:
    for actor in actors:
        ray.kill(actor)


def _resources(slot: Slot | None) -> dict[str, float]:
    if slot is None:
        return {"CPU": ENCODER_CPUS}
    return {"CPU": slot.cpus, **({"GPU": slot.gpus} if slot.gpus else {})}


def _total(reservations: Sequence[_Bundle]) -> dict[str, float]:
    """Return the resources of all these reservations."""
    total: dict[str, float] = {}
    for reservation in reservations:
        for name, amount in _resources(reservation.slot).items():
            total[name] = total.get(name, 0.0) + amount
    return total


class _JobHoldings(NamedTuple):
    """Resources of jobs, as far as Ray's dashboard knows them."""

    jobs: dict[str, str]
    """Id -> submission id."""
    group_jobs: dict[str, str]
    """Placement group -> id of its job."""
    actors: list[Any]
    """Actors outside of placement groups."""


def _job_holdings() -> _JobHoldings:
    """Ask Ray's dashboard. Without one, nothing is known."""
    # Without its address, each call looks for it with a client of its own for 40 s, and Ray ends this process if the cluster is
    # gone by then.
    url, timeout_s = dashboard_url(), int(STATE_TIMEOUT_S)
    if url is None:
        return _JobHoldings({}, {}, [])
    from ray.util.state import list_actors, list_jobs, list_placement_groups

    alive = list_actors(url, [("state", "=", "ALIVE")], MAX_ACTORS, timeout_s, detail=True, raise_on_missing_output=False)
    groups = list_placement_groups(url, limit=MAX_ACTORS, timeout=timeout_s, raise_on_missing_output=False)
    jobs = {job.job_id: job.submission_id for job in list_jobs(url, timeout=timeout_s, raise_on_missing_output=False)}
    return _JobHoldings(
        {job: submission for job, submission in jobs.items() if job and submission},
        {group.placement_group_id: group.creator_job_id for group in groups},
        [actor for actor in alive if not actor.placement_group_id],
    )


def _holders(own_groups: Collection[str], engine: str, needed: Collection[str]) -> str:
    """Return who holds these resources: other runs and servers with their folders, and jobs with their actors."""
    known = _JobHoldings({}, {}, [])
    # If the dashboard does not respond, other jobs are not named.
    with suppress(Exception):
        known = within(STATE_TIMEOUT_S, _job_holdings)
    held = defaultdict[str, Counter[str]](Counter)
    for group, entry in placement_group_table().items():
        if group in own_groups or entry["state"] not in ("CREATED", "RESCHEDULING"):
            continue
        job = known.group_jobs.get(group, "")
        for number, resources in entry["bundles"].items():
            if entry["bundles_to_node_id"].get(number):
                held[_group_holder(entry["name"] or group, known.jobs.get(job, job))].update(resources)
    for actor in known.actors:
        if not (actor.name or "").startswith(f"{engine}/"):
            job = known.jobs.get(actor.job_id, actor.job_id)
            held[f"job {job} with {actor.class_name}"].update(actor.required_resources or {})
    holders = [
        (amounts["GPU"], amounts["CPU"], name) for name, amounts in held.items() if any(amounts[each] for each in needed)
    ]
    shown = [
        f"{name} ({_text({each: held[name][each] for each in needed})})"
        for *_, name in sorted(holders, reverse=True)[:SHOWN_HOLDERS]
    ]
    return f": {', '.join(shown)}" if shown else ""


def _group_holder(group: str, job: str) -> str:
    """Return who holds a placement group. `group`: its name or id. `job`: that of its creator, if it is known."""
    if match := GROUP_NAME.fullmatch(group):
        return f"{match['engine']} in {match['folder']} since {match['since']}"
    return f"{f'job {job} with ' if job else ''}placement group {group}"


def _data_steps() -> str:
    """Return which steps of Ray Data pipelines have actors. They hold their resources while rows flow."""
    alive = (actor["ActorClassName"] for actor in actor_table().values() if actor["State"] == "ALIVE")
    steps = Counter(name.removeprefix(DATA_ACTOR).removesuffix(")") for name in alive if name.startswith(DATA_ACTOR))
    listed = ", ".join(f"{step} with {count} actor{'' if count == 1 else 's'}" for step, count in steps.items())
    return f", among them the steps of data sets: {listed}" if listed else ""


def _cluster_could_hold(reservations: Sequence[_Bundle]) -> bool:
    """Return whether the nodes could hold all these reservations if nothing else ran there."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    needed = _total(reservations).items()
    enough = all(sum(node["Resources"].get(name, 0.0) for node in nodes) >= amount for name, amount in needed)
    return enough and all(any(_could_hold(node, reservation) for node in nodes) for reservation in reservations)


def _could_hold(node: Mapping[str, Any], reservation: _Bundle) -> bool:
    """Return whether the node could hold the reservation if nothing else ran there."""
    has_label = reservation.label is None or node["Labels"].get(reservation.label[0]) == reservation.label[1]
    needed = _resources(reservation.slot)
    return has_label and all(node["Resources"].get(name, 0) >= amount for name, amount in needed.items())


def _text(resources: Mapping[str, float]) -> str:
    """Return for example `2 GPUs and 1.5 CPUs`."""
    return " and ".join(
        f"{resources[name]:g} {name}{'' if resources[name] == 1 else 's'}" for name in ("GPU", "CPU") if name in resources
    )
