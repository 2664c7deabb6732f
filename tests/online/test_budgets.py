"""Budgets of keys and usage: reserved, settled and capped, by the API and over a store with directors that crash."""

import time

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from starlette.testclient import TestClient

from tests.online.directors import client_of, local_server, settings_with_keys
from tests.online.test_batches import create, jsonl, line
from vidgen_ray.errors import SetupError
from vidgen_ray.online.api import batch_runner
from vidgen_ray.online.auth import load_keys
from vidgen_ray.online.server_settings import Budget, OnlineSettings
from vidgen_ray.online.serving_profile import ServingProfile
from vidgen_ray.online.store.batches import Batch, BatchLine
from vidgen_ray.online.store.budgets import BudgetExceeded
from vidgen_ray.online.store.jobs import Job, JobKind, JobProgress, JobState, new_id
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.shot import Shot

SMALL = {"prompt": "a man", "num_frames": 2, "size": "64x64", "upscale": False}
DAY_S = 86_400.0


def test_requests_over_a_budget_are_refused_with_what_is_left_and_usage_is_reported(tiny, tmp_path, monkeypatch):
    # As if all stages ran on GPUs.
    monkeypatch.setattr(ServingProfile, "gpu_seconds", lambda _, seconds: sum(seconds.values()))
    budgets = {"limits": {"budgets": [{"window": "day", "cost": 1.0}, {"window": "total", "gpu_seconds": 1e6}]}}
    settings = settings_with_keys(tmp_path, {"ada": budgets, "bob": {}}, gpu_hour_price=3600.0)
    with local_server(tiny, settings) as server:
        server.director.held.set()
        ada, estimate = client_of(server), client_of(server).post("/v1/videos/estimate", json=SMALL).json()
        fits = int(1.0 / estimate["cost"])
        assert 0 < fits < 30
        for seed in range(fits):
            created = ada.post("/v1/videos", json={**SMALL, "seed": seed, "model": ("tiny", "sora-2")[seed % 2]})
            assert (created.status_code, created.json()["model"]) == (200, ("tiny", "sora-2")[seed % 2])
        refused = ada.post("/v1/videos", json=SMALL)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], refused.headers["x-should-retry"]) == (429, "budget_exceeded", "false")
        assert "cost 1 a day" in error["message"]
        assert "It resets at" in error["message"]
        assert int(refused.headers["retry-after"]) <= DAY_S
        daily, total = ada.get("/v1/usage").json()["budgets"]
        assert (daily["unit"], daily["spent"], total["resets_at"]) == ("cost", 0.0, None)
        assert daily["reserved"] == pytest.approx(fits * estimate["cost"], rel=1e-2)
        assert client_of(server, "bob").post("/v1/videos", json=SMALL).status_code == 200
        jobs = server.store.queue.claim("d", None, 99)
        server.store.queue.end(jobs[0].id, "d", JobState.COMPLETED, gpu_seconds=0.5, shot_id="x")
        server.store.queue.end(jobs[1].id, "d", JobState.FAILED, gpu_seconds=0.25)
        rows = [*ada.get("/v1/usage").json()["data"], *client_of(server, "bob").get("/v1/usage").json()["data"]]
        assert sum(row["gpu_seconds"] for row in rows) == 0.75
        assert {row["model"] for row in rows} == {"tiny"}
        assert ada.get("/v1/usage", params={"last": "2020-01-01"}).json()["data"] == []
        for day in ("never", "0", "2020-01-01T00:00:00"):
            assert ada.get("/v1/usage", params={"first": day}).status_code == 400
        with server.store.engine.begin() as connection:
            more = "SELECT key_id, model, '2020-01-01', tenant, 1, 1, 0, 0, 0 FROM vidgen_usage"
            connection.exec_driver_sql(f"INSERT INTO vidgen_usage {more}")
        pages = [ada.get("/v1/usage", params={"limit": 1}).json()]
        pages.append(ada.get("/v1/usage", params={"limit": 1, "after": pages[0]["last_id"]}).json())
        assert [(page["data"][0]["day"] == "2020-01-01", page["has_more"]) for page in pages] == [(True, True), (False, False)]
    wrong = OnlineSettings(limits={"budgets": [{"window": "day", "cost": 1}]})
    with pytest.raises(SetupError, match="gpu_hour_price"):
        load_keys(None, wrong.limits).check_budgets(None)
    with pytest.raises(ValueError, match="either gpu_seconds or cost"):
        Budget(window="day")
    for wrong in ("5", True):
        with pytest.raises(ValueError, match="must be a number, without quotes"):
            OnlineSettings(limits={"budgets": [{"window": "day", "gpu_seconds": wrong}]})
        with pytest.raises(ValueError, match="must be a number, without quotes"):
            OnlineSettings(max_queued=wrong)


def test_reserved_seconds_follow_a_machine_that_becomes_slower(tmp_path):
    store = JobStore(f"sqlite:///{tmp_path}/jobs.db")
    shot = Shot(id="online-1", prompt="a", seed=7)

    def stored(budgets=()):
        values = {"id": new_id("shot"), "tenant": "t", "kind": JobKind.SHOT, "shot": shot, "key": "k", "key_id": "ada"}
        job = Job(**values, estimate=2.0, created_at=0, request={"model": "gpt-image-1", "usage_model": "tiny"})
        return store.create(job, budgets=budgets)[0]

    for seconds in [*[2.0] * 90, *[8.0] * 10]:
        stored()
        (job,) = store.queue.claim("d", 10**6, 1)
        store.queue.end(job.id, "d", JobState.COMPLETED, gpu_seconds=seconds)
    assert stored().reserved == pytest.approx(2.6)
    assert stored([Budget(window="day", gpu_seconds=1e6)]).reserved == 8.0
    store.close()


def test_batch_that_waits_for_a_budget_delays_no_other_batch(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(ServingProfile, "gpu_seconds", lambda _, seconds: sum(seconds.values()))
    monkeypatch.setattr(batch_runner, "LOST_S", 10_000)
    with local_server(tiny, settings_with_keys(tmp_path, {"ada": {}, "bob": {}})) as server:
        estimate = client_of(server).post("/v1/videos/estimate", json=SMALL).json()["gpu_seconds"]
    budget = {"window": "day", "gpu_seconds": 1.5 * estimate}
    settings = settings_with_keys(tmp_path, {"ada": {"limits": {"budgets": [budget]}}, "bob": {}})
    with local_server(tiny, settings) as server, TestClient(server.app):
        server.director.held.set()
        lines = jsonl(*(line(f"{seed}", seed=seed, **SMALL) for seed in range(3)))
        for tenant, queued in (("ada", 1), ("bob", 4)):
            create(client_of(server, tenant), lines)
            while server.store.open_counts()["queued"] < queued:
                time.sleep(0.02)


KEYS = ("ada", "bob")
MODELS = ("quality", "fast")
BUDGETS = {
    "ada": [Budget(window="day", gpu_seconds=40), Budget(window="total", cost=100)],
    "bob": [Budget(window="month", cost=60)],
}
STEP_S = 5.0
"""Longest GPU-seconds of a step."""
PRICE = 3600.0
"""Of a GPU-hour: a GPU-second costs 1."""


class Directors(RuleBasedStateMachine):
    """Two API replicas store jobs and lines of a batch, and two directors run them in steps, lose leases and crash.

    Jobs take up to four times their estimate. The clock moves over windows in both directions.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.now = self.steady = 20_000 * DAY_S
        self.budgets = {key: list(budgets) for key, budgets in BUDGETS.items()}
        self.stores = [self.open() for _ in range(2)]
        self.running: list[dict[str, Job]] = [{}, {}]
        self.spent: list[dict[str, float]] = [{}, {}]
        self.over = dict.fromkeys(KEYS, 0.0)
        """Most that was spent beyond a budget when it or the window changed."""
        self.counted: dict[tuple[str, str], float] = {}
        names = dict.fromkeys(("endpoint", "input_file_id", "completion_window"), "x")
        batch = Batch(id="b", tenant="t", key_id="ada", metadata={}, created_at=0, expires_at=1e12, **names)
        self.stores[0].uploads.add(batch.tenant, batch.input_file_id, "x", 1)
        self.stores[0].batches.create(batch)
        self.stores[0].batches.start(batch, 10**6, 1)

    def open(self) -> JobStore:
        return JobStore(self.url, now=lambda: self.now, steady=lambda: self.steady, durable=False, gpu_hour_price=PRICE)

    def teardown(self) -> None:
        for store in self.stores:
            store.close()

    def job(self, key: str, model: str, estimate: float, **fields) -> Job:
        shot = Shot(id="online-1", prompt="a", seed=7)
        values = {"id": new_id("shot"), "tenant": "t", "kind": JobKind.SHOT, "shot": shot, "key": "k" * 64}
        return Job(**values, key_id=key, estimate=estimate, created_at=self.now, request={"model": model}, **fields)

    @rule(api=st.integers(0, 1), key=st.sampled_from(KEYS), model=st.sampled_from(MODELS), estimate=st.floats(0.5, 9))
    def request(self, api, key, model, estimate):
        before = self.stores[api].usage.states(key, self.budgets[key])
        try:
            self.stores[api].create(self.job(key, model, estimate), budgets=self.budgets[key])
        except BudgetExceeded:
            return
        after = self.stores[api].usage.states(key, self.budgets[key])
        assert all(state.reserved + state.spent <= state.budget.amount + 1e-6 for state in after), (before, after)

    @rule(api=st.integers(0, 1), estimates=st.lists(st.floats(0.5, 9), min_size=1, max_size=4))
    def lines(self, api, estimates):
        batch = self.stores[api].batches.get("b", "t")
        jobs = [self.job("ada", "fast", estimate, batch="b") for estimate in estimates]
        lines = [BatchLine(batch.line + n, batch.offset + n, None, job) for n, job in enumerate(jobs, 1)]
        self.stores[api].batches.add(batch, lines, lambda job: True, self.budgets["ada"])

    def stop_over_budget(self, director):
        """What a director does after each exchange with the store."""
        store, running = self.stores[director], self.running[director]
        owner = f"d{director}"
        for job_id in store.queue.heartbeat(owner, list(running)):
            self.end(director, job_id, JobState.CANCELLED)
        for job_id in store.usage.over(list(running), lambda key: self.budgets[key]):
            self.end(director, job_id, JobState.FAILED)

    def end(self, director, job_id, state):
        self.running[director].pop(job_id)
        spent = self.spent[director].pop(job_id)
        self.stores[director].queue.end(job_id, f"d{director}", state, gpu_seconds=spent)

    @rule(director=st.integers(0, 1), limit=st.integers(1, 3))
    def claim(self, director, limit):
        for job in self.stores[director].queue.claim(f"d{director}", 10.0, limit):
            self.running[director][job.id] = job
            self.spent[director][job.id] = job.gpu_seconds
        self.stop_over_budget(director)

    @precondition(lambda self: any(self.running))
    @rule(number=st.integers(0, 9), seconds=st.floats(0.1, STEP_S), crashes=st.integers(0, 9), is_last=st.booleans())
    def step(self, number, seconds, crashes, is_last):
        busy = [(n, job_id) for n in (0, 1) for job_id in self.running[n]]
        director, job_id = busy[number % len(busy)]
        if crashes == 0:
            # Its other jobs are lost, too, between their steps.
            self.running[director], self.spent[director] = {}, {}
            self.stores[director].close()
            self.stores[director] = self.open()
            return
        self.spent[director][job_id] += seconds
        if is_last:
            self.end(director, job_id, JobState.COMPLETED)
        else:
            update = JobProgress(job_id, "flux", 1, 2, 50, self.spent[director][job_id])
            self.stores[director].queue.progress(f"d{director}", [update])
        for each in (0, 1):
            self.stop_over_budget(each)

    @rule(job=st.integers(0, 50))
    def cancel(self, job):
        if ids := self.stores[0].queue_order():
            self.stores[0].request_cancel(ids[job % len(ids)], "t")

    @rule()
    def leases_expire(self):
        self.steady += 11.0
        for director, store in enumerate(self.stores):
            store.queue.heartbeat(f"d{director}", list(self.running[director]))

    @rule(days=st.sampled_from([-1, 1, 1, 31]))
    def jump(self, days):
        self.now += days * DAY_S
        self.note_spent()

    @rule(key=st.sampled_from(KEYS), share=st.floats(0.1, 1.0))
    def lower(self, key, share):
        """A restart with a smaller budget, which may be less than what is spent."""
        first, *others = self.budgets[key]
        smaller = {name: value * share for name, value in first.model_dump(exclude_none=True, exclude={"window"}).items()}
        self.budgets[key] = [Budget(window=first.window, **smaller), *others]
        self.note_spent()

    def note_spent(self):
        for key in KEYS:
            states = self.stores[0].usage.states(key, self.budgets[key])
            self.over[key] = max(0.0, *(state.spent - state.budget.amount for state in states))

    @invariant()
    def spending_is_capped(self):
        for key in KEYS:
            for state in self.stores[0].usage.states(key, self.budgets[key]):
                assert state.spent <= state.budget.amount + self.over[key] + STEP_S + 1e-6, state

    @invariant()
    def sums_are_equal(self):
        store = self.stores[0]
        rows = store.list("t", limit=10_000).jobs
        totals = store.usage.totals()
        for (key, model), seconds in totals.items():
            ended = [job for job in rows if job.state.is_final and (job.key_id, job.request["model"]) == (key, model)]
            assert sum(job.gpu_seconds for job in ended) == pytest.approx(seconds)
            # As the metric counts.
            new = seconds - self.counted.get((key, model), 0.0)
            assert new >= 0
            self.counted[key, model] = self.counted.get((key, model), 0.0) + new
        usage = store.usage.rows("t", "", "9999")
        assert sum(row.gpu_seconds for row in usage) == pytest.approx(sum(totals.values()))
        assert sum(row.jobs for row in usage) == sum(job.state.is_final for job in rows)
        assert sum(row.cost for row in usage) == pytest.approx(sum(totals.values()))


def test_spending_is_capped_while_directors_crash(new_database):
    settings = hypothesis_settings(max_examples=8, stateful_step_count=30, deadline=None)
    run_state_machine_as_test(lambda: Directors(new_database()), settings=settings)
