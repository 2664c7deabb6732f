"""Serving profile, estimates of progress and queue, metric labels, and errors of jobs and of Serve."""

import asyncio
import logging
import re
from pathlib import Path

import pytest

from tests.online.test_store import Clock, new_job
from vidgen_ray.engine.calls import CallResult
from vidgen_ray.engine.engine_metrics import OTHER, LabelLimit
from vidgen_ray.engine.messages import OUTPUT, Kind
from vidgen_ray.engine.status import Progress
from vidgen_ray.errors import MissingWeights, OutOfMemory, ProfileError, SetupError, StageError
from vidgen_ray.graph import STAGES
from vidgen_ray.licences import UsedWeights
from vidgen_ray.online.auth import ApiKeys, KeyRecord
from vidgen_ray.online.job_director import JOB_METRICS, ServerMetrics, error_of
from vidgen_ray.online.queue_estimate import (
    MAX_POLL_AFTER_S,
    SNAPSHOT_VALID_S,
    ProgressEstimator,
    QueueEstimator,
    expected_seconds,
)
from vidgen_ray.online.recent_warnings import RecentWarnings
from vidgen_ray.online.server_plan import server_plan
from vidgen_ray.online.server_settings import Limits, OnlineSettings
from vidgen_ray.online.serving_profile import serving_profile
from vidgen_ray.online.store.jobs import JobProgress, JobState
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.outputs.records import StepRecord
from vidgen_ray.planner.cluster import this_machine
from vidgen_ray.render.step_runner import StepFailed
from vidgen_ray.shot import Shot
from vidgen_ray.weights.ledger import WeightLicence

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_job_error_names_stage_and_cause_but_not_the_server():
    for failure, kind, code, caused_by in (
        (StageError("svd: got an image of 10x10"), Kind.INPUT, "invalid_shot", "invalid_request_error"),
        (OutOfMemory("svd: out of GPU memory"), Kind.MEMORY, "invalid_shot", "invalid_request_error"),
        (MissingWeights("no weights"), Kind.INPUT, "not_served", "server_error"),
        (RuntimeError("a fault"), Kind.ERROR, "stage_failed", "server_error"),
    ):
        result = CallResult.of_failure(StepFailed("svd", failure))
        error = error_of(result.failure, result.kind)
        assert (result.kind, error.code, error.type, error.stage) == (kind, code, caused_by, "svd")
        assert result.failure.worker not in error.message


def test_stages_without_weights_are_unavailable_with_a_reason(tiny):
    actors = {**tiny.actors, "hunyuan": tiny.actors["hunyuan"].model_copy(update={"weights": "gone"})}
    del actors["instantid_sdxl"]
    served = serving_profile(tiny.model_copy(update={"actors": actors}))
    assert set(served.unavailable) == {"hunyuan", "instantid_sdxl"}
    names = [{stage.name for stage in stages} for stages in (STAGES, served.demand().stages)]
    assert names[0] - names[1] == {"hunyuan", "instantid_sdxl", "refine"}
    plain = Shot(**tiny.defaults, id="s", prompt="p", seed=1)
    assert [step.stage for step in served.plan(plain).steps] == ["flux", "svd", "realesrgan"]
    with pytest.raises(ProfileError, match=r"hunyuan is not served here, as checked at the start: .*gone"):
        served.plan(plain.model_copy(update={"use_hunyuan_style": True}))
    without_flux = {name: tiny.actors[name] for name in ("svd", "realesrgan")}
    with pytest.raises(SetupError, match=r"nothing to serve.*flux: profile tiny has no entry actors\.flux"):
        serving_profile(tiny.model_copy(update={"actors": without_flux}))


def test_server_knows_which_shots_fit_on_its_gpus(tiny, tmp_path):
    svd = tiny.actors["svd"].model_copy(update={"device": "cuda", "memory_gb": 0})
    content = tiny.model_copy(update={"actors": {**tiny.actors, "svd": svd}}).model_dump_json(exclude_none=True)
    (tmp_path / "p.yaml").write_text(content)
    settings = OnlineSettings(profile=str(tmp_path / "p.yaml"), data=str(tmp_path / "out"), gpus="1x24GB")
    shot = Shot(**{**tiny.defaults, "width": 1024, "height": 1024, "num_frames": 100}, prompt="p")

    def refusal(gpus):
        served = server_plan(settings.model_copy(update={"gpus": gpus}), this_machine).serving_profile
        assert served.too_large(Shot(**tiny.defaults, prompt="p")) is None
        return served.too_large(shot)

    assert re.search(r"stage svd: .* the largest GPU has 24; at most .* with \d+ frames", refusal("1x24GB"))
    assert refusal("1x141GB") is None


def test_stages_with_other_licences_than_required_are_not_served(tiny):
    svd, infusenet = (
        WeightLicence(id=name, name=name, weights=(f"builtin:tiny/{name}",), licence="NC", url="u", commercial_use="no")
        for name in ("svd", "infusenet")
    )
    served = serving_profile(tiny.model_copy(update={"licences": (svd, infusenet)}), "commercial")
    # The licence of the models of servers is unknown.
    assert set(served.unavailable) == {"svd", "remote", "remote_image"}
    assert "builtin:tiny/svd (NC: no commercial use)" in served.unavailable["svd"]
    still = Shot(id="s", prompt="p", seed=1, generate_video=False)
    assert served.plan(still).steps
    # Extra weights are needed by some shots only.
    with pytest.raises(ProfileError, match="builtin:tiny/infusenet"):
        served.check(still.model_copy(update={"face_image": ("x.jpg",)}))
    source = UsedWeights.of("builtin:tiny/svd", svd)
    with pytest.raises(ProfileError, match="builtin:tiny/svd"):
        served.plan(still, source_licences=[source])
    unchecked = serving_profile(tiny).plan(still, source_licences=[source])
    assert [each.weights for each in unchecked.licences] == ["builtin:tiny/svd", "builtin:tiny/flux"]


def test_progress_is_weighted_by_expected_seconds_and_never_decreases(tiny, make_shot):
    seconds = {"flux": {"flux": 10.0}, "svd": {"svd": 30.0}, "realesrgan": {"realesrgan": 60.0}}
    actors = {name: tiny.actors[name].model_copy(update={"seconds": expected}) for name, expected in seconds.items()}
    profile = tiny.model_copy(update={"actors": actors})
    shot = make_shot(width=1024, height=576, num_frames=25, steps={"flux": 28, "svd": 25})
    estimator = ProgressEstimator(serving_profile(profile).plan(shot), profile)
    updates = [("flux", 0, 0), ("flux", 14, 28), ("svd", 0, 0), ("svd", 5, 25)]
    updates += [("flux", 1, 28), ("realesrgan", 5, 25), (OUTPUT, 0, 0)]
    # Encoding takes a second or two.
    assert [estimator.percent(Progress(*update)) for update in updates] == [0, 4, 9, 15, 15, 51, 98]


def test_metrics_are_documented_have_few_labels_and_do_not_name_the_tenants(monkeypatch):
    keys = ApiKeys([KeyRecord(tenant="ada", sha256=digest * 64) for digest in "ab"], Limits())
    metrics = ServerMetrics("tiny", keys.public_name)
    labels = []
    for method in ("_count", "_observe"):
        monkeypatch.setattr(metrics, method, lambda name, value, **of_value: labels.append(of_value["tenant"]))
    step = StepRecord(stage="flux", key="k", weights=(), seconds=1, gpu_seconds=1, cached=False)
    for tenant in ("ada", "whose key was removed"):
        metrics.job_started(tenant, 1.0)
        metrics.job_ended(tenant, "completed", 2.0)
        metrics.shot_rendered(tenant, [step])
    assert labels == ["a" * 12] * 4 + ["local"] * 4
    limit = LabelLimit(2)
    assert [limit(name) for name in ("a", "b", "c", "a", "d")] == ["a", "b", OTHER, "a", OTHER]
    text = (DOCS / "online.md").read_text()
    for name, spec in JOB_METRICS.items():
        assert f"{name}_total`" in text if spec.kind == "counter" else f"`{name}`" in text


def test_caller_that_logs_a_warning_does_not_fail(capsys):
    kept, logger = RecentWarnings(), logging.Logger("a")
    logger.addHandler(kept)
    logger.error("job %s failed", 1, exc_info=False)
    logger.warning("%s without its number %s", "a text")
    assert kept.take() == ["job 1 failed"]
    assert "Logging error" in capsys.readouterr().err


def test_revision_names_what_decides_the_bytes_of_clips(tiny):
    def revision(**fields):
        return serving_profile(tiny.model_copy(update=fields)).revision

    def with_svd(**fields):
        return {"actors": {**tiny.actors, "svd": tiny.actors["svd"].model_copy(update=fields)}}

    assert revision() == revision() == revision(**with_svd(timeout_s=9))
    changed = (with_svd(options={"decode_chunk_frames": 1}), {"encode": tiny.encode.model_copy(update={"crf": 30})})
    assert len({revision(), *(revision(**fields) for fields in changed)}) == 3


# Queue position, remaining seconds and the time of the next poll.

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


def test_eta_follows_progress_and_the_speed_of_recent_jobs(store, estimator, clock, tiny):
    duration_s = SLOWNESS * sum(expected_seconds(new_job().shot, tiny).values())
    complete_jobs(store, clock, duration_s)
    for _ in range(2):
        store.create(new_job())
    job, _ = store.queue.claim("d", 10**6, 2)

    def eta(percent):
        store.queue.progress("d", [JobProgress(job.id, "flux", 1, 4, percent, 0.0)])
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
