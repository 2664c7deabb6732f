"""Scheduler: assignment of work to workers."""

import dataclasses
import itertools
import random
import statistics
from collections import Counter

import pytest

from benchmarks.simulated_scheduling import LAYOUTS, Simulation
from vidgen_ray.engine.scheduler import CHUNK_LOAD, MAX_LORA_SKIPS, MAX_PREFETCH_LOAD, Scheduler, Work, WorkerState
from vidgen_ray.graph import STAGES
from vidgen_ray.planner.layout import SHOTS_PER_SWAP, WorkerSpec

POSITIONS = {stage.name: n for n, stage in enumerate(STAGES)}
ALL = tuple(POSITIONS)
MEASURES = {
    "makespan": lambda result: result.makespan_s,
    "slowest shot": lambda result: max(result.latency_s),
    "LoRA loads": lambda result: result.lora_loads,
    "swaps": lambda result: result.swaps,
    "remote inputs": lambda result: result.remote_inputs,
}


def scheduler_of(*workers):
    """Return a scheduler with these workers, all live."""
    scheduler = Scheduler(POSITIONS)
    for worker in workers:
        scheduler.add_worker(worker)
        scheduler.started(worker)
    return scheduler


def scheduler_with(*stages, swap_groups=()):
    workers = [WorkerState(WorkerSpec(held, 1, 1, swap_groups), adapters_kept=2) for held in stages]
    return scheduler_of(*workers), workers


def orders(assigned):
    return [work.order for _, work in assigned]


def test_later_stages_go_first_then_older_shots():
    scheduler, (worker,) = scheduler_with(ALL)
    for work in (Work("flux", 3), Work("flux", 2), Work("svd", 1), Work("realesrgan", 0)):
        scheduler.add(work)
    finished = []
    while assigned := scheduler.assign():
        for _, work in assigned:
            finished.append((work.stage, work.order))
            scheduler.finished(worker, work)
    assert finished == [("realesrgan", 0), ("svd", 1), ("flux", 2), ("flux", 3)]


def test_workers_get_only_their_stages_and_nothing_while_down():
    scheduler, (flux, svd) = scheduler_with(("flux", "lora"), ("svd",))
    scheduler.crashed(svd)
    scheduler.crashed(svd)
    scheduler.add(Work("svd", 0))
    scheduler.add(Work("flux", 1))
    assert [(worker, work.stage) for worker, work in scheduler.assign()] == [(flux, "flux")]
    scheduler.started(svd)
    assert [(worker, work.stage) for worker, work in scheduler.assign()] == [(svd, "svd")]


def test_work_is_prefetched_only_if_enough_is_queued():
    scheduler, workers = scheduler_with(("svd",), ("svd",))
    for order in range(3):
        scheduler.add(Work("svd", order))
    assert orders(scheduler.assign()) == [0, 1]
    scheduler.add(Work("svd", 3))
    assert orders(scheduler.assign()) == [2]
    assert sorted(worker.load for worker in workers) == [1, 2]


def test_worker_gets_several_chunks_at_once():
    scheduler, (_worker,) = scheduler_with(("realesrgan",))
    for order in range(20):
        scheduler.add(Work("realesrgan", order, load=CHUNK_LOAD))
    assert len(scheduler.assign()) == 2 / CHUNK_LOAD


def test_shots_go_to_the_worker_with_their_lora():
    scheduler, (first, second) = scheduler_with(("flux",), ("flux",))
    for order, lora in enumerate("ab"):
        scheduler.add(Work("flux", order, frozenset(lora)))
    for worker, work in scheduler.assign():
        scheduler.finished(worker, work)
    assert (first.adapters, second.adapters) == (["a"], ["b"])
    scheduler.add(Work("flux", 2, frozenset("b")))
    scheduler.add(Work("flux", 3, frozenset("a")))
    assert {(worker.adapters[-1], *work.adapters) for worker, work in scheduler.assign()} == {("a", "a"), ("b", "b")}


def test_shot_with_several_loras_goes_to_the_worker_that_has_them_all():
    worker = WorkerState(WorkerSpec(("flux",), 1, 1), adapters_kept=3, adapters=["a", "b", "c"])
    scheduler = scheduler_of(worker)
    for order, loras in enumerate(("ad", "ac", "a")):
        scheduler.add(Work("flux", order, frozenset(loras)))
    assert orders(scheduler.assign()) == [1, 2]


def test_lora_preference_does_not_starve_a_shot():
    worker = WorkerState(WorkerSpec(("flux",), 1, 1), adapters_kept=1, adapters=["a"])
    scheduler = scheduler_of(worker)
    scheduler.add(Work("flux", 0, frozenset("b")))
    for order in range(1, MAX_LORA_SKIPS + 1):
        scheduler.add(Work("flux", order, frozenset("a")))
    assigned = scheduler.assign()
    assert orders(assigned) == [1, 2]
    for worker, work in assigned:
        scheduler.finished(worker, work)
    scheduler.add(Work("flux", MAX_LORA_SKIPS + 1, frozenset("a")))
    assert orders(scheduler.assign())[0] == 0


def test_work_that_may_have_crashed_a_worker_runs_alone():
    scheduler, (worker,) = scheduler_with(("svd",))
    suspect = Work("svd", 0, alone=True)
    for work in (Work("svd", 1), suspect, Work("svd", 2)):
        scheduler.add(work)
    assert orders(scheduler.assign()) == [0]
    scheduler.finished(worker, suspect)
    assert orders(scheduler.assign()) == [1, 2]
    scheduler.add(Work("svd", 0, alone=True))
    assert scheduler.assign() == []


def test_crash_resets_the_active_loras_of_a_worker():
    scheduler, (worker,) = scheduler_with(("flux",))
    scheduler.add(Work("flux", 0, frozenset("a")))
    scheduler.assign()
    scheduler.crashed(worker)
    assert (worker.live, worker.load, worker.adapters) == (False, 0, [])


def test_swapped_groups_run_in_batches():
    swap_groups = (("flux",), ("svd",))
    scheduler, (worker,) = scheduler_with(("flux", "svd"), swap_groups=swap_groups)
    for order in range(4 * SHOTS_PER_SWAP):
        scheduler.add(Work("flux", order))
        scheduler.add(Work("svd", order))
    finished = []
    while assigned := scheduler.assign():
        for _, work in assigned:
            finished.append(work.stage)
            scheduler.finished(worker, work)
    swaps = sum(a != b for a, b in itertools.pairwise(finished))
    assert Counter(finished) == {"flux": 4 * SHOTS_PER_SWAP, "svd": 4 * SHOTS_PER_SWAP}
    assert swaps <= 2 * 4


def test_worker_swaps_groups_before_other_workers_run_out_of_work():
    both = WorkerState(WorkerSpec(("flux", "svd"), 1, 1, (("flux",), ("svd",))), 2, group=("svd",), turn=1)
    scheduler = scheduler_of(both, WorkerState(WorkerSpec(("svd",), 1, 1), 2))
    scheduler.add(Work("svd", 0))
    scheduler.add(Work("flux", 1))
    assigned = {worker.spec.stages: work.stage for worker, work in scheduler.assign()}
    assert assigned == {("flux", "svd"): "flux", ("svd",): "svd"}


def test_steps_are_fused_only_if_they_need_the_same_group_on_the_gpu():
    swap_groups = (("flux", "lora"), ("svd",))
    worker = WorkerSpec(ALL, 1, 1, swap_groups)
    assert worker.can_run("flux", "lora", "image_likeness")
    assert worker.can_run("instantid", "image_likeness")
    assert not worker.can_run("instantid", "flux"), "instantid may start while the group of svd is on the GPU"
    assert not worker.can_run("lora", "svd")
    assert WorkerSpec(ALL, 1, 1).can_run("instantid", "flux", "svd")


def test_work_goes_to_active_loras_then_inputs_then_their_node():
    with_lora, source, neighbour, _elsewhere = workers = [
        WorkerState(WorkerSpec(("flux", "svd"), 1, 1), 2, node=node) for node in "abbc"
    ]
    with_lora.adapters.append("x")
    scheduler = scheduler_of(*workers)
    scheduler.add(Work("flux", 0, frozenset("x"), near=source))
    for order in (1, 2):
        scheduler.add(Work("svd", order, near=source))
    assert {work.order: worker for worker, work in scheduler.assign()} == {0: with_lora, 1: source, 2: neighbour}


def test_load_goes_before_locality():
    scheduler, (source, other) = scheduler_with(("svd",), ("svd",))
    scheduler.add(Work("svd", 0, near=source))
    scheduler.add(Work("svd", 1, near=source))
    assert [worker for worker, _ in scheduler.assign()] == [source, other]


def test_workers_come_and_go():
    scheduler, (old,) = scheduler_with(("svd",))
    running, waiting = Work("svd", 0), Work("svd", 1)
    scheduler.add(running)
    assert scheduler.assign() == [(old, running)]
    scheduler.remove_worker(old)
    scheduler.add(waiting)
    new = WorkerState(WorkerSpec(("svd",), 1, 1), 2)
    scheduler.add_worker(new)
    assert list(scheduler.holders("svd")) == [new]
    assert scheduler.assign() == []
    for late in (scheduler.started, scheduler.crashed, scheduler.remove_worker):
        late(old)
    scheduler.finished(old, running)
    assert scheduler.assign() == []
    scheduler.started(new)
    assert scheduler.assign() == [(new, waiting)]


def test_late_end_of_a_call_does_not_count_after_a_restart():
    scheduler, (worker,) = scheduler_with(("svd",))
    before, after = Work("svd", 0), Work("svd", 1)
    scheduler.add(before)
    scheduler.assign()
    scheduler.crashed(worker)
    scheduler.started(worker)
    scheduler.add(after)
    assert scheduler.assign() == [(worker, after)]
    scheduler.finished(worker, before)
    assert worker.load == 1


def test_cancelled_work_is_not_assigned():
    scheduler, _ = scheduler_with(("svd",))
    works = [Work("svd", order) for order in range(3)]
    for work in works:
        scheduler.add(work)
    scheduler.remove(works[0])
    scheduler.remove(works[0])
    assert scheduler.queued("svd") == 2
    assert orders(scheduler.assign()) == [1, 2]


# Probation


def test_worker_on_probation_gets_one_call_at_a_time_and_is_chosen_last():
    scheduler, (probed, healthy) = scheduler_with(("svd",), ("svd",))
    scheduler.set_probation(probed, True)
    works = [Work("svd", order) for order in range(6)]
    scheduler.add(works[0])
    assert scheduler.assign() == [(healthy, works[0])]
    scheduler.add(works[1])
    assert scheduler.assign() == [(probed, works[1])], "no healthy worker can start it now"
    for work in works[2:]:
        scheduler.add(work)
    assert scheduler.assign() == [(healthy, works[2])]
    scheduler.finished(probed, works[1])
    assert scheduler.assign() == [(probed, works[3])]
    scheduler.set_probation(probed, False)
    assert scheduler.assign() == [(probed, works[4])]


# Work that failed on a worker


def test_failed_work_waits_for_another_worker():
    scheduler, (sick, healthy) = scheduler_with(("svd",), ("svd",))
    running = [Work("svd", order) for order in range(2)]
    for work in running:
        scheduler.add(work)
    assigned = {work: worker for worker, work in scheduler.assign()}
    on_sick, on_healthy = (next(work for work in running if assigned[work] is worker) for worker in (sick, healthy))
    retried, younger = Work("svd", 0, avoid=frozenset([sick])), Work("svd", 9)
    scheduler.finished(sick, on_sick)
    scheduler.add(retried)
    assert scheduler.assign() == [], "the healthy worker is busy, and too little waits to prefetch"
    scheduler.add(younger)
    assert scheduler.assign() == [(sick, younger)]
    scheduler.finished(healthy, on_healthy)
    assert scheduler.assign() == [(healthy, retried)]


def test_failed_work_returns_to_the_only_live_worker():
    scheduler, (sick, other) = scheduler_with(("svd",), ("svd",))
    scheduler.set_probation(other, True)
    scheduler.add(occupying := Work("svd", 0, avoid=frozenset([sick])))
    assert scheduler.assign() == [(other, occupying)], "a worker on probation is better than the one that failed"
    scheduler.add(retried := Work("svd", 1, avoid=frozenset([sick])))
    assert scheduler.assign() == []
    scheduler.crashed(other)
    assert scheduler.assign() == [(sick, retried)]


# Work that must run alone


def busy_scheduler(*stages):
    """Return a scheduler whose workers all run one call and have prefetched another, and its workers."""
    scheduler, workers = scheduler_with(*stages)
    for order in range(100, 100 + 4 * len(workers)):
        scheduler.add(Work(stages[0][0], order))
    scheduler.assign()
    assert all(worker.load == 2 for worker in workers)
    return scheduler, workers


def finish_first(scheduler, worker):
    scheduler.finished(worker, next(iter(worker.assigned)))


def test_suspect_gets_a_reserved_worker_while_all_workers_are_kept_busy():
    scheduler, workers = busy_scheduler(*[("svd",)] * 4)
    scheduler.add(suspect := Work("svd", 0, alone=True))
    younger = itertools.count(1000)
    for worker in 3 * workers:
        scheduler.add(Work("svd", next(younger)))
        if suspect not in worker.assigned:
            finish_first(scheduler, worker)
        scheduler.assign()
        assert sum(worker.load < 2 for worker in workers) <= 1, "only one worker is reserved"
    (ran_on,) = (worker for worker in workers if suspect in worker.assigned)
    assert list(ran_on.assigned) == [suspect]
    scheduler.finished(ran_on, suspect)
    assert ran_on in [worker for worker, _ in scheduler.assign()]


def drained(scheduler, workers):
    """Finish all assigned work of these workers without assigning new work."""
    for worker in workers:
        while worker.assigned:
            finish_first(scheduler, worker)


@pytest.mark.parametrize("lost", ["crashed", "remove_worker"])
def test_suspect_gets_another_worker_if_the_reserved_one_is_lost(lost):
    scheduler, workers = busy_scheduler(("svd",), ("svd",))
    scheduler.add(suspect := Work("svd", 0, alone=True))
    assert scheduler.assign() == []
    finish_first(scheduler, workers[0])
    finish_first(scheduler, workers[1])
    reserved = ({*workers} - {worker for worker, _ in scheduler.assign()}).pop()
    getattr(scheduler, lost)(reserved)
    (other,) = {*workers} - {reserved}
    drained(scheduler, [other])
    assert scheduler.assign()[0] == (other, suspect)


def test_cancelled_suspect_releases_its_worker():
    scheduler, (worker,) = busy_scheduler(("svd",))
    scheduler.add(suspect := Work("svd", 0, alone=True))
    scheduler.assign()
    drained(scheduler, [worker])
    scheduler.remove(suspect)
    assert orders(scheduler.assign()) == [102, 103]


def test_suspect_prefers_an_idle_worker_to_the_reserved_one():
    scheduler, (first, second) = busy_scheduler(("svd",), ("svd",))
    scheduler.add(suspect := Work("svd", 0, alone=True))
    assert scheduler.assign() == []
    finish_first(scheduler, first)
    scheduler.crashed(second)
    scheduler.started(second)
    assert scheduler.assign()[0] == (second, suspect)
    assert first.load == 2, "the worker is no longer reserved"


def test_suspect_waits_for_a_healthy_worker_rather_than_use_one_on_probation():
    scheduler, (reserved,) = busy_scheduler(("svd",))
    scheduler.add(suspect := Work("svd", 0, alone=True))
    scheduler.assign()
    on_probation = WorkerState(WorkerSpec(("svd",), 1, 1), 2, probation=True)
    scheduler.add_worker(on_probation)
    scheduler.started(on_probation)
    assert suspect not in [work for _, work in scheduler.assign()]
    drained(scheduler, [reserved])
    assert scheduler.assign()[0] == (reserved, suspect)


def test_suspect_does_not_wait_for_a_worker_whose_call_hangs():
    scheduler, workers = busy_scheduler(*[("svd",)] * 3)
    scheduler.add(suspect := Work("svd", 0, alone=True))
    scheduler.assign()
    for worker in workers:
        finish_first(scheduler, worker)
    assigned_to = [worker for worker, _ in scheduler.assign()]
    (hanging,) = (worker for worker in workers if worker not in assigned_to)
    # Its call takes too long.
    scheduler.set_probation(hanging, True)
    others = [worker for worker in workers if worker is not hanging]
    for order in range(1000, 1100):
        scheduler.add(Work("svd", order))
    for _ in range(20):
        for worker in others:
            if worker.assigned and suspect not in worker.assigned:
                finish_first(scheduler, worker)
                scheduler.assign()
    assert any(suspect in worker.assigned for worker in others)
    assert hanging.load >= 1


def test_one_worker_is_reserved_per_stage_for_the_oldest_suspect():
    scheduler, (worker,) = busy_scheduler(("flux", "svd"))
    older, younger, other_stage = Work("svd", 1, alone=True), Work("svd", 2, alone=True), Work("flux", 0, alone=True)
    for work in (younger, older, other_stage):
        scheduler.add(work)
    ran = []
    for _ in range(8):
        drained(scheduler, [worker])
        ran += orders(scheduler.assign())
    assert ran[:3] == [0, 1, 2]


def test_suspect_avoids_the_worker_on_which_it_failed():
    scheduler, (sick, other) = scheduler_with(("svd",), ("svd",))
    scheduler.add(suspect := Work("svd", 0, alone=True, avoid=frozenset([sick])))
    assert scheduler.assign() == [(other, suspect)]


# A call that hangs


def test_hanging_call_occupies_only_its_worker():
    scheduler, (hanging, other) = busy_scheduler(("svd",), ("svd",))
    stuck, behind = hanging.assigned
    scheduler.set_probation(hanging, True)
    assert scheduler.recall(hanging) == [behind]
    done = []
    while other.assigned:
        done.append(next(iter(other.assigned)).order)
        finish_first(scheduler, other)
        scheduler.assign()
    assert list(hanging.assigned) == [stuck]
    assert sorted([*done, stuck.order]) == list(range(100, 108))


# Random runs


@pytest.mark.parametrize("seed", range(20))
def test_every_call_finishes_in_random_runs_with_faults(seed):
    rng = random.Random(seed)
    kinds = [("flux",), ("svd",), ("flux", "svd", "realesrgan"), ("svd", "realesrgan")]
    groups = {("flux", "svd", "realesrgan"): (("flux",), ("svd",))}
    scheduler = Scheduler(POSITIONS)
    workers, lost, waiting, done, total = [], [], set(), set(), 0

    def add_worker(stages):
        worker = WorkerState(WorkerSpec(stages, 1, 1, groups.get(stages, ())), 2, node=rng.choice("ab"))
        scheduler.add_worker(worker)
        scheduler.started(worker)
        workers.append(worker)

    def add(work):
        waiting.add(work)
        scheduler.add(work)

    def retry(work, worker):
        add(dataclasses.replace(work, alone=rng.random() < 0.5, avoid=work.avoid | {worker}))

    for stages in kinds * 2:
        add_worker(stages)
    for step in range(1500):
        event = rng.random()
        live = [worker for worker in workers if worker.live]
        busy = [worker for worker in live if worker.assigned]
        if step < 1000 and event < 0.45:
            stage = rng.choice(["flux", "svd", "realesrgan"])
            load = CHUNK_LOAD if stage == "realesrgan" else 1.0
            add(Work(stage, total, frozenset(rng.sample("xyz", rng.randrange(3))), load, near=rng.choice([None, *workers])))
            total += 1
        elif busy and event < 0.9:
            worker = rng.choice(busy)
            work = next(iter(worker.assigned))
            scheduler.finished(worker, work)
            if rng.random() < 0.1 and step < 1000:
                retry(work, worker)
            else:
                done.add(work)
        elif live and event < 0.94 and step < 1000:
            worker = rng.choice(live)
            works = list(worker.assigned)
            scheduler.crashed(worker)
            lost.append(worker)
            for work in works:
                retry(work, worker)
        elif lost:
            worker = lost.pop()
            if rng.random() < 0.3:
                scheduler.remove_worker(worker)
                workers.remove(worker)
                add_worker(worker.spec.stages)
            else:
                scheduler.started(worker)
        elif live and event < 0.97:
            scheduler.set_probation(worker := rng.choice(live), not worker.probation)
        elif waiting and step < 1000:
            work = rng.choice(sorted(waiting, key=lambda work: work.order))
            scheduler.remove(work)
            waiting.remove(work)
            done.add(work)
        for worker, work in scheduler.assign():
            waiting.remove(work)
            assert worker.live
            assert work.stage in worker.spec.stages
            assert worker.load <= MAX_PREFETCH_LOAD
            assert list(worker.assigned) == [work] or not worker.probation
            assert not any(other.alone for other in worker.assigned) or len(worker.assigned) == 1
            if worker in work.avoid:
                assert all(other in work.avoid for other in scheduler.holders(work.stage) if other.live)
    while busy := [worker for worker in workers if worker.assigned]:
        for worker in busy:
            while worker.assigned:
                done.add(next(iter(worker.assigned)))
                finish_first(scheduler, worker)
        for worker in lost:
            scheduler.started(worker)
        for _, work in scheduler.assign():
            waiting.remove(work)
    assert not waiting
    assert {work.order for work in done} == set(range(total))


REFERENCE = {
    ("fused", 4, 3): (370.0, 156.2, 7.5, 0, 93),
    ("fused", 16, 12): (376.2, 180.3, 40.75, 0, 422.25),
    ("staged", 4, 3): (563.2, 161.8, 3, 0, 384),
    ("staged", 16, 12): (424.0, 187.9, 18.75, 0, 1536),
    ("hybrid", 4, 3): (392.9, 162.8, 3, 0, 275.5),
    ("hybrid", 16, 12): (396.6, 178.5, 40.5, 0, 1208.25),
    ("swapping", 4, 3): (393.2, 393.2, 9, 15.25, 258),
    ("swapping", 16, 12): (395.2, 395.2, 82.25, 59.75, 1288.25),
}
"""Layout, slots and LoRAs -> `MEASURES` of a scheduler that compares all work with all workers in each decision."""


@pytest.mark.parametrize(("layout", "slots", "loras"), REFERENCE)
def test_runs_as_well_as_a_scheduler_that_compares_everything(layout, slots, loras):
    results = [Simulation(LAYOUTS[layout](slots), 12 * slots, loras=loras, seed=seed).run() for seed in range(4)]
    assert all(len(result.latency_s) == 12 * slots for result in results)
    for (name, measure), reference in zip(MEASURES.items(), REFERENCE[layout, slots, loras], strict=True):
        allowed = {"makespan": 1.03, "slowest shot": 1.2, "LoRA loads": 1.15}.get(name, 1.1)
        assert statistics.mean(map(measure, results)) <= allowed * reference, name
