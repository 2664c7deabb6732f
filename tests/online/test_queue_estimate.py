"""Queue position, remaining seconds and the time of the next poll."""

import asyncio

import pytest

from tests.online.test_store import Clock, new_job
from vidgen_ray.online.queue_estimate import MAX_POLL_AFTER_S, SNAPSHOT_VALID_S, QueueEstimator, expected_seconds
from vidgen_ray.online.store.jobs import JobProgress, JobState
from vidgen_ray.online.store.store import JobStore

SLOWNESS = 3.0
"""Duration of the jobs of these tests, as a multiple of what the profile expects."""


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(tmp_path, clock):
    store = JobStore(f"sqlite:///{tmp_path}/jobs.db", now=clock)
    yield store
    store.close()


@pytest.fixture
def estimator(store, tiny, clock):
    return QueueEstimator(store, tiny, clock)


@pytest.fixture
def expected_s(tiny):
    return sum(expected_seconds(new_job().shot, tiny).values())


def complete_jobs(store, clock, seconds, count=5):
    for _ in range(count):
        store.create(new_job())
        (job,) = store.queue.claim("d", 10**6, 1)
        clock.seconds += seconds
        store.queue.end(job.id, "d", JobState.COMPLETED, shot_id="s", stage_seconds={})


def test_queue_position_follows_from_turns_and_priority(store, estimator):
    ada = [store.create(new_job("ada"))[0] for _ in range(3)]
    bob, low = store.create(new_job("bob"))[0], store.create(new_job("bob", priority="low"))[0]

    async def positions():
        known = [(await estimator.estimate(job)).queue_position for job in (*ada, bob, low)]
        new = [new_job("bob", priority=each) for each in ("high", "normal", "low")]
        return known, [(await estimator.estimate_new(job)).queue_position for job in new]

    assert asyncio.run(positions()) == ([0, 2, 4, 1, 3], [1, 3, 5])
    assert [job.id for job in store.queue.claim("d", 30, 4)] == [ada[0].id, bob.id, ada[1].id, low.id]


def test_eta_follows_progress_and_the_speed_of_recent_jobs(store, estimator, clock, expected_s):
    duration_s = SLOWNESS * expected_s
    complete_jobs(store, clock, duration_s)
    for _ in range(2):
        store.create(new_job())
    job, _ = store.queue.claim("d", 10**6, 2)

    def eta(percent):
        store.queue.progress("d", [JobProgress(job.id, "flux", 1, 4, percent)])
        return asyncio.run(estimator.estimate(store.get(job.id, "ada"))).eta_s

    assert [eta(percent) for percent in (0, 50, 90)] == pytest.approx([duration_s * left for left in (1, 0.5, 0.1)], abs=0.1)
    assert asyncio.run(estimator.queue_s()) == 0
    queued = [store.create(new_job())[0] for _ in range(4)]
    clock.seconds += SNAPSHOT_VALID_S
    estimates = [asyncio.run(estimator.estimate(job)) for job in queued]
    # Two jobs run at once, so one ends every half duration.
    assert [estimate.eta_s for estimate in estimates] == pytest.approx([duration_s * n for n in (1.5, 2, 2.5, 3)], abs=0.1)
    # The last of four queued jobs starts after four others, those in progress counted as one.
    assert asyncio.run(estimator.queue_s()) == pytest.approx(4 * duration_s / 2)


def test_poll_interval_grows_with_the_remaining_time(store, estimator, clock):
    complete_jobs(store, clock, 40)
    first, *_, last = [store.create(new_job())[0] for _ in range(30)]
    poll_after = [asyncio.run(estimator.estimate(job)).poll_after_s for job in (first, last)]
    assert poll_after == [pytest.approx(4, rel=0.1), MAX_POLL_AFTER_S]
    store.request_cancel(first.id, "ada")
    ended = asyncio.run(estimator.estimate(store.get(first.id, "ada")))
    assert ended == (None, None, 1.0)
