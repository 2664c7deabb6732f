"""Scheduler: assignment of work to workers."""

import itertools
from collections import Counter

from vidgen_ray.engine.scheduler import CHUNK_LOAD, MAX_LORA_SKIPS, Scheduler, Work, WorkerState
from vidgen_ray.graph import STAGES
from vidgen_ray.planner.gpu_assignment import SHOTS_PER_SWAP
from vidgen_ray.planner.layout import WorkerSpec

POSITIONS = {stage.name: n for n, stage in enumerate(STAGES)}
ALL = tuple(POSITIONS)


def scheduler_with(*stages, swap_groups=(), adapters_kept=2):
    workers = [WorkerState(WorkerSpec(held, 1, 1, swap_groups), adapters_kept, live=True) for held in stages]
    return Scheduler(workers, POSITIONS), workers


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


def test_lora_preference_does_not_starve_a_shot():
    worker = WorkerState(WorkerSpec(("flux",), 1, 1), adapters_kept=1, live=True, adapters=["a"])
    scheduler = Scheduler([worker], POSITIONS)
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
    both = WorkerState(WorkerSpec(("flux", "svd"), 1, 1, (("flux",), ("svd",))), 2, live=True, group=("svd",), turn=1)
    scheduler = Scheduler([both, WorkerState(WorkerSpec(("svd",), 1, 1), 2, live=True)], POSITIONS)
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
