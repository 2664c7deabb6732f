"""What the store of jobs promises, on SQLite and on PostgreSQL alike."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from vidgen_ray.errors import SetupError
from vidgen_ray.online.store.characters import NameTaken
from vidgen_ray.online.store.jobs import Job, JobError, JobKind, JobState, new_id
from vidgen_ray.online.store.leases import JobProgress
from vidgen_ray.online.store.store import (
    PURGE_DELAY_S,
    IdempotencyConflict,
    JobStore,
    LimitReached,
    QueueFull,
    UnknownJob,
)
from vidgen_ray.shot import Shot


class Clock:
    def __init__(self) -> None:
        self.seconds = 1_000_000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(database_url, clock):
    with_targets = JobStore(database_url, retention_s=3600, targets=lambda tenant: ["hook"], now=clock)
    yield with_targets
    with_targets.close()


def a_job(tenant="ada", kind=JobKind.VIDEO, **fields) -> Job:
    shot = Shot(id="online-1", prompt="a man «ünter» 🌧", seed=7, metadata={"a": [1, None]})
    given = {"id": new_id(kind), "tenant": tenant, "kind": kind, "shot": shot, "key": "k" * 64, "created_at": 5.25}
    return Job(**{**given, "request": {"model": "tiny", "seconds": "1"}, **fields})


def test_a_job_comes_back_as_it_was_stored(store):
    stored, created = store.create(a_job())
    assert created
    assert store.get(stored.id, "ada") == stored
    assert stored.state == JobState.QUEUED
    assert stored.shot.metadata == {"a": [1, None]}


def test_another_tenants_job_is_not_there(store):
    job, _ = store.create(a_job())
    assert store.get(job.id, "bob") is None
    assert store.request_cancel(job.id, "bob") is None
    assert not store.delete(job.id, "bob")
    assert store.get(job.id, None) == job


def test_a_retried_create_finds_the_first_jobs(store):
    first, created = store.create_all([a_job(), a_job()], idempotency_key="x", fingerprint="f")
    again, created_again = store.create_all([a_job(), a_job()], idempotency_key="x", fingerprint="f", max_queued=0)
    assert (created, created_again) == (True, False)
    assert again == first
    assert store.find_created("ada", "x", "f") == first
    assert store.find_created("bob", "x", "f") == []
    with pytest.raises(IdempotencyConflict):
        store.create(a_job(), idempotency_key="x", fingerprint="other")
    assert len(store.list("ada").jobs) == 2


def test_a_key_whose_jobs_are_forgotten_creates_anew(store, clock):
    first, _ = store.create(a_job(), idempotency_key="x", fingerprint="f")
    store.delete(first.id, "ada")
    clock.seconds += PURGE_DELAY_S + 1
    store.purge(lambda key: None, 9)
    second, created = store.create(a_job(), idempotency_key="x", fingerprint="f")
    assert created
    assert store.create(a_job(), idempotency_key="x", fingerprint="f") == (second, False)


def test_the_same_key_at_the_same_time_creates_once(store):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: store.create(a_job(), idempotency_key="x", fingerprint="f"), range(24)))
    assert sum(created for _, created in made) == 1
    assert len({job.id for job, _ in made}) == 1


def test_the_queue_and_a_tenants_share_of_it_are_bounded(store):
    store.create(a_job(), max_queued=2)
    store.create(a_job("bob"), max_queued=2)
    with pytest.raises(QueueFull):
        store.create(a_job("eve"), max_queued=2)
    with pytest.raises(LimitReached):
        store.create(a_job(), max_open=1)
    # What is there already waits for nobody.
    _, created = store.create(a_job(state=JobState.COMPLETED, completed_at=5.0), max_queued=2, max_open=1)
    assert created


def test_a_bound_holds_when_many_come_at_once(store):
    def create(_):
        try:
            store.create(a_job(), max_queued=5)
        except QueueFull:
            return 0
        return 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(create, range(30))) == 5


def test_lists_go_page_by_page(store):
    ids = [store.create(a_job())[0].id for _ in range(5)]
    store.create(a_job("bob"))
    store.create(a_job(kind=JobKind.IMAGE))
    first = store.list("ada", kinds=[JobKind.VIDEO], limit=2)
    assert ([job.id for job in first.jobs], first.has_more) == ([ids[4], ids[3]], True)
    # Pages go on after a job that has been deleted meanwhile.
    store.delete(ids[3], "ada")
    second = store.list("ada", kinds=[JobKind.VIDEO], limit=3, after=ids[3])
    assert ([job.id for job in second.jobs], second.has_more) == ([ids[2], ids[1], ids[0]], False)
    oldest = store.list("ada", kinds=[JobKind.VIDEO], limit=2, order="asc")
    assert [job.id for job in oldest.jobs] == [ids[0], ids[1]]
    with pytest.raises(UnknownJob):
        store.list("bob", after=ids[0])


def test_lists_can_be_of_some_states(store):
    waiting, taken = store.create(a_job())[0], store.create(a_job())[0]
    store.request_cancel(taken.id, "ada")
    assert [job.id for job in store.list("ada", states=[JobState.QUEUED]).jobs] == [waiting.id]


def test_tenants_take_turns(store):
    ada = [store.create(a_job("ada"))[0].id for _ in range(4)]
    bob = [store.create(a_job("bob"))[0].id for _ in range(2)]
    claimed = [job.id for job in store.queue.claim("d", 30, 3)]
    assert claimed == [ada[0], bob[0], ada[1]]
    # Ada has two in progress, so Bob's next goes before hers.
    assert [job.id for job in store.queue.claim("d", 30, 9)] == [bob[1], ada[2], ada[3]]


def test_a_claimed_job_says_so(store, clock):
    job, _ = store.create(a_job())
    (claimed,) = store.queue.claim("d", 30, 5)
    assert (claimed.state, claimed.attempts, claimed.started_at) == (JobState.IN_PROGRESS, 1, clock.seconds)
    assert store.get(job.id, "ada") == claimed
    assert claimed.version > job.version
    assert store.queue.claim("e", 30, 5) == []


def test_no_job_is_claimed_twice(store):
    for _ in range(20):
        store.create(a_job())
    with ThreadPoolExecutor(4) as pool:
        taken = [job.id for jobs in pool.map(lambda n: store.queue.claim(f"d{n}", 30, 4), range(8)) for job in jobs]
    assert len(taken) == len(set(taken)) == 20


def test_a_lease_that_ran_out_is_another_ones(store, clock):
    store.create(a_job())
    (job,) = store.queue.claim("d", 30, 5)
    clock.seconds += 20
    assert store.queue.heartbeat("d", [job.id], 30) == set()
    clock.seconds += 20
    assert store.queue.claim("e", 30, 5) == []
    clock.seconds += 20
    (again,) = store.queue.claim("e", 30, 5)
    assert (again.id, again.attempts) == (job.id, 2)
    # The first owner has lost it, whatever it says now.
    assert store.queue.heartbeat("d", [job.id], 30) == {job.id}
    assert not store.queue.progress("d", [JobProgress(job.id, "flux", 1, 2, 50)])
    assert not store.queue.completed(job.id, "d", shot_id="s", stage_seconds={})
    assert not store.queue.failed(job.id, "d", JobError(code="x", message="y"))
    assert store.get(job.id, "ada") == again


def test_progress_never_goes_back(store):
    store.create(a_job())
    (job,) = store.queue.claim("d", 30, 5)
    assert store.queue.progress("d", [JobProgress(job.id, "flux", 3, 4, 40)])
    assert store.queue.progress("d", [JobProgress(job.id, "svd", 1, 25, 35)])
    now = store.get(job.id, "ada")
    assert (now.progress, now.stage, now.step, now.steps) == (40, "svd", 1, 25)


def test_what_has_ended_stays_as_it_ended(store, clock):
    store.create(a_job())
    (job,) = store.queue.claim("d", 30, 5)
    assert store.queue.completed(job.id, "d", shot_id="online-1", stage_seconds={"flux": 1.5})
    done = store.get(job.id, "ada")
    assert (done.state, done.progress, done.shot_id) == (JobState.COMPLETED, 100, "online-1")
    assert (done.completed_at, done.expires_at, done.stage_seconds) == (clock.seconds, clock.seconds + 3600, {"flux": 1.5})
    assert not store.queue.failed(job.id, "d", JobError(code="x", message="y"))
    assert not store.queue.cancelled(job.id, "d")
    assert store.request_cancel(job.id, "ada") == done


def test_a_failed_job_says_why(store):
    store.create(a_job())
    (job,) = store.queue.claim("d", 30, 5)
    why = JobError(code="stage_failed", message="no face in the photo", stage="instantid", param="face_image")
    assert store.queue.failed(job.id, "d", why)
    assert store.get(job.id, "ada").error == why


def test_a_queued_job_is_cancelled_at_once(store):
    job, _ = store.create(a_job())
    assert store.request_cancel(job.id, "ada").state == JobState.CANCELLED
    assert store.queue.claim("d", 30, 5) == []


def test_a_job_in_progress_is_cancelled_by_its_owner(store):
    store.create(a_job())
    (job,) = store.queue.claim("d", 30, 5)
    asked = store.request_cancel(job.id, "ada")
    assert (asked.state, asked.cancel_requested) == (JobState.IN_PROGRESS, True)
    assert store.queue.heartbeat("d", [job.id], 30) == {job.id}
    assert store.queue.cancelled(job.id, "d")
    assert store.get(job.id, "ada").state == JobState.CANCELLED


def test_a_job_whose_cancel_nobody_carried_out_is_not_begun_again(store, clock):
    store.create(a_job())
    (job,) = store.queue.claim("d", 30, 5)
    store.request_cancel(job.id, "ada")
    clock.seconds += 31
    assert store.queue.claim("e", 30, 5) == []
    assert store.get(job.id, "ada").state == JobState.CANCELLED


def test_a_deleted_job_is_unseen_and_ends(store):
    store.create(a_job())
    (job,) = store.queue.claim("d", 30, 5)
    cursor = store.latest_version()
    assert store.delete(job.id, "ada")
    assert store.get(job.id, "ada") is None
    assert store.list("ada").jobs == []
    assert not store.delete(job.id, "ada")
    assert store.changed_since(cursor, tenant="ada").deleted == [(job.id, "ada")]
    assert store.queue.heartbeat("d", [job.id], 30) == {job.id}
    assert store.queue.cancelled(job.id, "d")


def test_a_director_that_stops_gives_its_jobs_back(store):
    first, second = store.create(a_job())[0], store.create(a_job())[0]
    store.queue.claim("d", 30, 1)
    store.queue.release("d", [first.id])
    again = store.queue.claim("e", 30, 1)
    assert [(job.id, job.attempts) for job in again] == [(first.id, 1)]
    store.queue.release("e", [first.id])
    assert [job.id for job in store.queue.claim("f", 30, 5)] == [first.id, second.id]


def test_changes_are_told_once_and_in_order(store):
    jobs = [store.create(a_job())[0] for _ in range(3)]
    store.create(a_job("bob"))
    seen = store.changed_since(0, tenant="ada", limit=2)
    assert [job.id for job in seen.jobs] == [jobs[0].id, jobs[1].id]
    rest = store.changed_since(seen.cursor, tenant="ada", limit=2)
    assert [job.id for job in rest.jobs] == [jobs[2].id]
    assert store.changed_since(rest.cursor, tenant="ada").jobs == []
    store.queue.claim("d", 30, 9)
    # One change of several jobs comes whole, whatever the limit.
    assert len(store.changed_since(rest.cursor, tenant="ada", limit=1).jobs) == 3
    assert store.changed_since(store.latest_version()).jobs == []


def test_no_change_is_missed_while_many_are_made(store):
    seen: set[str] = set()
    with ThreadPoolExecutor(4) as pool:
        made = [pool.submit(store.create, a_job()) for _ in range(40)]
        cursor = 0
        while len(seen) < 40:
            changes = store.changed_since(cursor)
            assert not seen & {job.id for job in changes.jobs}
            seen |= {job.id for job in changes.jobs}
            cursor = changes.cursor
            if not changes.jobs and all(one.done() for one in made):
                last = store.changed_since(cursor).jobs
                seen |= {job.id for job in last}
                break
    assert seen == {one.result()[0].id for one in made}


def test_old_jobs_are_forgotten_with_the_files_that_nobody_else_has(store, clock):
    done = [store.create(a_job(key=key))[0] for key in ("shared", "shared", "own")]
    for job in store.queue.claim("d", 30, 9):
        store.queue.completed(job.id, "d", shot_id=job.key, stage_seconds={})
    store.delete(done[0].id, "ada")
    store.delete(done[2].id, "ada")
    gone = []
    assert store.purge(gone.append, 9) == 0
    clock.seconds += PURGE_DELAY_S + 1
    assert (store.purge(gone.append, 1), store.purge(gone.append, 1), store.purge(gone.append, 1)) == (1, 1, 0)
    assert gone == ["own"]
    clock.seconds += 3600
    store.purge(gone.append, 9)
    assert store.list("ada").jobs == []
    clock.seconds += PURGE_DELAY_S + 1
    assert store.purge(gone.append, 9) == 1
    assert gone == ["own", "shared"]


def test_what_could_not_be_removed_is_removed_the_next_time(store, clock):
    job, _ = store.create(a_job())
    store.delete(job.id, "ada")
    clock.seconds += PURGE_DELAY_S + 1

    def fails(key):
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        store.purge(fails, 9)
    assert store.purge(lambda key: None, 9) == 1


def test_a_job_whose_files_went_while_it_was_created_is_queued(store):
    done = a_job(state=JobState.COMPLETED, progress=100, completed_at=5.0, shot_id="online-1")
    (there, gone), _ = store.create_all(
        [done, done.model_copy(update={"id": "video_2"})], files_exist=lambda job: job.id == done.id
    )
    assert (there.state, gone.state, gone.progress, gone.shot_id) == (JobState.COMPLETED, JobState.QUEUED, 0, None)
    assert [job.id for job in store.queue.claim("d", 30, 9)] == ["video_2"]


def test_jobs_are_counted(store):
    store.create(a_job())
    store.create(a_job())
    store.create(a_job("bob", JobKind.IMAGE))
    store.queue.claim("d", 30, 1)
    assert store.counts() == {
        ("ada", JobKind.VIDEO, JobState.IN_PROGRESS): 1,
        ("ada", JobKind.VIDEO, JobState.QUEUED): 1,
        ("bob", JobKind.IMAGE, JobState.QUEUED): 1,
    }


def test_characters_belong_to_their_tenant(store):
    made = store.characters.create("ada", "Grace", ["a", "b"])
    assert store.characters.create("ada", "Grace", ["a", "b"]) == made
    with pytest.raises(NameTaken):
        store.characters.create("ada", "Grace", ["c"])
    other = store.characters.create("bob", "Grace", ["c"])
    assert store.characters.get(made.id, "ada") == store.characters.get("Grace", "ada") == made
    assert store.characters.get(made.id, "bob") is None
    assert not store.characters.delete(made.id, "bob")
    assert store.characters.delete(made.id, "ada")
    assert store.characters.list("ada") == []
    assert store.characters.list("bob") == [other]


def test_uploads_belong_to_who_brought_them(store):
    upload = store.uploads.add("ada", "file-1", "ab.png", 5)
    assert store.uploads.add("ada", "file-1", "ab.png", 5) == upload
    assert store.uploads.get("file-1", "ada") == upload
    assert store.uploads.get("file-1", "bob") is None
    removed = []
    assert not store.uploads.delete("file-1", "bob", removed.append)
    store.uploads.add("bob", "file-1", "ab.png", 5)
    assert store.uploads.delete("file-1", "ada", removed.append)
    assert store.uploads.get("file-1", "ada") is None
    assert removed == []
    assert store.uploads.delete("file-1", "bob", removed.append)
    store.uploads.remove_unreferenced(["cd.png"], removed.append)
    assert removed == ["ab.png", "cd.png"]


def test_the_end_of_a_job_leaves_a_message(store, clock):
    job, _ = store.create(a_job())
    store.queue.claim("d", 30, 1)
    assert store.outbox.claim_due(60) == []
    store.queue.completed(job.id, "d", shot_id="s", stage_seconds={})
    (message,) = store.outbox.claim_due(60)
    assert (message.event, message.job, message.target, message.tries) == ("video.completed", job.id, "hook", 0)
    assert store.outbox.claim_due(60) == []
    store.outbox.postpone(message.id, 10)
    clock.seconds += 11
    (again,) = store.outbox.claim_due(60)
    assert (again.id, again.tries) == (message.id, 1)
    store.outbox.delete(message.id)
    clock.seconds += 100
    assert store.outbox.claim_due(60) == []


def test_what_was_stored_outlives_a_killed_process(store, database_url):
    code = (
        "import os, sys; from vidgen_ray.online.store.store import JobStore; from tests.online.test_store import a_job\n"
        "store = JobStore(sys.argv[1]); print(store.create(a_job())[0].id, flush=True)\n"
        "with store._database.transaction() as change:\n"
        "    store._rows.insert(change, a_job()); os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, database_url], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [job.id for job in store.list("ada").jobs] == [killed.stdout.strip()]


@pytest.mark.parametrize("url", ["nonsense", "mysql://a@b/c", "sqlite://", "sqlite:////nowhere/at/all/jobs.db"])
def test_a_database_that_cannot_be_is_a_sentence(url):
    with pytest.raises(SetupError, match="database"):
        JobStore(url)


def test_a_password_is_not_told(tmp_path):
    with pytest.raises(SetupError) as told:
        JobStore(f"postgresql://ada:secret@/x?host={tmp_path}")
    assert "secret" not in str(told.value)
