"""Which worker does what next, without Ray and without time."""

import itertools
from collections import Counter

from vidgen_ray.batch.scheduler import CHUNK_LOAD, MAX_LORA_SKIPS, Scheduler, Work, WorkerState
from vidgen_ray.graph import STAGES
from vidgen_ray.planner.gpu_assignment import TURN_SHOTS
from vidgen_ray.planner.layout import WorkerSpec

POSITIONS = {stage.name: n for n, stage in enumerate(STAGES)}
ALL = tuple(POSITIONS)


def scheduler_with(*stages, turns=(), adapters_kept=2):
    workers = [WorkerState(WorkerSpec(held, 1, 1, turns), adapters_kept, live=True) for held in stages]
    return Scheduler(workers, POSITIONS), workers


def orders(given):
    return [work.order for _, work in given]


def test_what_is_nearest_to_a_clip_goes_first_then_what_is_oldest():
    scheduler, (worker,) = scheduler_with(ALL)
    for work in (Work("flux", 3), Work("flux", 2), Work("svd", 1), Work("realesrgan", 0)):
        scheduler.add(work)
    done = []
    while given := scheduler.assign():
        for _, work in given:
            done.append((work.stage, work.order))
            scheduler.done(worker, work)
    assert done == [("realesrgan", 0), ("svd", 1), ("flux", 2), ("flux", 3)]


def test_a_worker_gets_only_what_it_holds_and_nothing_while_it_is_down():
    scheduler, (flux, svd) = scheduler_with(("flux", "lora"), ("svd",))
    svd.live = False
    scheduler.add(Work("svd", 0))
    scheduler.add(Work("flux", 1))
    assert [(worker, work.stage) for worker, work in scheduler.assign()] == [(flux, "flux")]
    svd.live = True
    assert [(worker, work.stage) for worker, work in scheduler.assign()] == [(svd, "svd")]


def test_the_next_is_handed_over_early_only_where_plenty_waits():
    scheduler, workers = scheduler_with(("svd",), ("svd",))
    for order in range(3):
        scheduler.add(Work("svd", order))
    assert orders(scheduler.assign()) == [0, 1]
    scheduler.add(Work("svd", 3))
    assert orders(scheduler.assign()) == [2]
    assert sorted(worker.load for worker in workers) == [1, 2]


def test_several_chunks_are_at_hand_at_once():
    scheduler, (_worker,) = scheduler_with(("realesrgan",))
    for order in range(20):
        scheduler.add(Work("realesrgan", order, load=CHUNK_LOAD))
    assert len(scheduler.assign()) == 2 / CHUNK_LOAD


def test_a_lora_goes_where_it_is_laid_on():
    scheduler, (first, second) = scheduler_with(("flux",), ("flux",))
    for order, lora in enumerate("ab"):
        scheduler.add(Work("flux", order, frozenset(lora)))
    for worker, work in scheduler.assign():
        scheduler.done(worker, work)
    assert (first.adapters, second.adapters) == (["a"], ["b"])
    scheduler.add(Work("flux", 2, frozenset("b")))
    scheduler.add(Work("flux", 3, frozenset("a")))
    assert {(worker.adapters[-1], *work.adapters) for worker, work in scheduler.assign()} == {("a", "a"), ("b", "b")}


def test_a_shot_is_not_passed_over_for_ever_for_a_loras_sake():
    scheduler, (worker,) = scheduler_with(("flux",), adapters_kept=1)
    worker.adapters = ["a"]
    scheduler.add(Work("flux", 0, frozenset("b")))
    for order in range(1, MAX_LORA_SKIPS + 1):
        scheduler.add(Work("flux", order, frozenset("a")))
    given = scheduler.assign()
    assert orders(given) == [1, 2]
    for worker, work in given:
        scheduler.done(worker, work)
    scheduler.add(Work("flux", MAX_LORA_SKIPS + 1, frozenset("a")))
    assert orders(scheduler.assign())[0] == 0


def test_a_suspect_is_alone_with_its_worker():
    scheduler, (worker,) = scheduler_with(("svd",))
    may_have_caused_crash = Work("svd", 0, alone=True)
    for work in (Work("svd", 1), may_have_caused_crash, Work("svd", 2)):
        scheduler.add(work)
    assert orders(scheduler.assign()) == [0]
    scheduler.done(worker, may_have_caused_crash)
    assert orders(scheduler.assign()) == [1, 2]
    scheduler.add(Work("svd", 0, alone=True))
    assert scheduler.assign() == []


def test_what_a_dead_worker_had_laid_on_is_forgotten():
    scheduler, (worker,) = scheduler_with(("flux",))
    scheduler.add(Work("flux", 0, frozenset("a")))
    scheduler.assign()
    scheduler.died(worker)
    assert (worker.live, worker.load, worker.adapters) == (False, 0, [])


def test_groups_take_turns_in_runs():
    turns = (("flux",), ("svd",))
    scheduler, (worker,) = scheduler_with(("flux", "svd"), turns=turns)
    for order in range(4 * TURN_SHOTS):
        scheduler.add(Work("flux", order))
        scheduler.add(Work("svd", order))
    done = []
    while given := scheduler.assign():
        for _, work in given:
            done.append(work.stage)
            scheduler.done(worker, work)
    swaps = sum(a != b for a, b in itertools.pairwise(done))
    assert Counter(done) == {"flux": 4 * TURN_SHOTS, "svd": 4 * TURN_SHOTS}
    assert swaps <= 2 * 4


def test_a_worker_that_takes_turns_makes_work_before_the_others_run_out():
    scheduler, (both, svd) = scheduler_with(("flux", "svd"), ("svd",), turns=(("flux",), ("svd",)))
    svd.spec = WorkerSpec(("svd",), 1, 1)
    both.group, both.turn = ("svd",), 1
    scheduler.add(Work("svd", 0))
    scheduler.add(Work("flux", 1))
    given = {worker.spec.stages: work.stage for worker, work in scheduler.assign()}
    assert given == {("flux", "svd"): "flux", ("svd",): "svd"}


def test_steps_go_together_only_where_the_first_brings_the_turn_that_the_others_need():
    turns = (("flux", "lora"), ("svd",))
    worker = WorkerSpec(ALL, 1, 1, turns)
    assert worker.can_run("flux", "lora", "image_likeness")
    assert worker.can_run("instantid", "image_likeness")
    assert not worker.can_run("instantid", "flux"), "it would be begun in svd's turn"
    assert not worker.can_run("lora", "svd")
    assert WorkerSpec(ALL, 1, 1).can_run("instantid", "flux", "svd")
