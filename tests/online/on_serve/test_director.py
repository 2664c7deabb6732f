"""Job director on a real Ray: same bytes as the reference, and every job ends despite crashes."""

import os
import signal
import time
from collections.abc import Iterator

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group_table

from tests.conftest import ASTRONAUT
from tests.fake_stages import FakeSVD
from tests.online.on_serve.applications import ACTORS_GB, IMAGE_ONLY, LARGE_BUDGET_S, POLL_S, Running, run, scripted_profile
from tests.online.scripted_stages import SCRIPTED, pipes_open, steps_run
from vidgen_ray.errors import SetupError
from vidgen_ray.online.auth import LOCAL_TENANT
from vidgen_ray.online.server_plan import DIRECTOR, WORKERS
from vidgen_ray.online.store.jobs import FINAL, JobState, new_id
from vidgen_ray.outputs.folder import LAST_FRAME, OutputFolder
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.planner.cluster import parse_gpus, this_machine
from vidgen_ray.system.cache_dir import sha256_of

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def scripted(tiny, tmp_path_factory) -> Iterator[Running]:
    """Application with scripted stages on two simulated GPUs, with one process on each."""
    app = run("scripted", scripted_profile(tiny), parse_gpus("2x80GB"), tmp_path_factory.mktemp("scripted"), SCRIPTED)
    yield app
    app.stop()


def digests(outputs: OutputFolder, shot_id: str) -> dict[str, str]:
    """Return file name -> sha256 of all output files of a shot, except the last frame, which only a server always keeps."""
    folder = outputs.shot_folder(shot_id)
    return {file.name: sha256_of(file) for file in sorted(folder.iterdir()) if file.name not in ("shot.json", LAST_FRAME)}


def spend(app: Running, seconds: float) -> None:
    """Change the GPU-seconds that ended jobs of the key `local` have used."""
    with app.store.engine.begin() as connection:
        connection.exec_driver_sql(f"UPDATE vidgen_usage SET gpu_seconds = gpu_seconds + {seconds} WHERE key_id = 'local'")


class TestRealStages:
    def test_output_equals_the_pipeline_and_is_reused(self, real, tiny, tmp_path):
        fields = {"face_image": [str(ASTRONAUT)], "lora": "builtin:tiny/lora.safetensors", "use_hunyuan_style": True}
        job_id = real.accept(**fields)
        pipeline = VideoGenerationPipeline(tiny, tmp_path)
        record = pipeline.render(real.job(job_id).shot)
        job = real.wait_for_end(job_id)
        assert (job.state, job.progress, job.error) == (JobState.COMPLETED, 100, None)
        online = digests(real.outputs, job.shot_id)
        assert set(online) == {"image.png", "video.mp4", "hd.mp4"}
        assert online == digests(pipeline.outputs, job.shot.id)
        assert record.key == job.key
        assert set(job.stage_seconds) == {step.stage for step in record.stages}
        pipeline.generate_video("stops", continue_from=job.shot.id, seed=1, upscale_video=False, num_frames=2)
        last_frames = [outputs.shot_folder(job.shot_id) / LAST_FRAME for outputs in (real.outputs, pipeline.outputs)]
        assert len({sha256_of(frame) for frame in last_frames}) == 1
        # A second job for the same shot reuses the files.
        before = sorted(real.outputs.shot_folder(job.shot_id).iterdir())
        written = [file.stat().st_mtime_ns for file in before]
        again = real.wait_for_end(real.accept(**fields))
        assert (again.state, again.shot_id, again.stage_seconds) == (JobState.COMPLETED, job.shot_id, {})
        assert [file.stat().st_mtime_ns for file in before] == written


class TestScriptedStages:
    def test_progress_follows_the_steps_until_a_cancel_stops_the_job(self, scripted, pipe):
        job_id = scripted.accept(prompt=f"steps 9 pause at 4 {pipe}", **IMAGE_ONLY)
        at = scripted.wait_until(job_id, lambda job: job.step == 3)
        assert (at.state, at.stage, at.steps) == (JobState.IN_PROGRESS, "flux", 9)
        assert 25 <= at.progress <= 34
        scripted.cancel(job_id)
        cancelled = scripted.wait_for_end(job_id)
        assert cancelled.state == JobState.CANCELLED
        assert cancelled.gpu_seconds > 0
        # The thread is still in step 4. Release it now.
        with pipes_open(pipe):
            jobs = [scripted.accept(prompt=f"next {n}", **IMAGE_ONLY) for n in range(4)]
            assert {scripted.wait_for_end(job).state for job in jobs} == {JobState.COMPLETED}
        assert steps_run(pipe) == [1, 2, 3, 4]

    def test_job_of_another_profile_fails(self, scripted):
        job = scripted.wait_for_end(scripted.accept(key="0" * 64, **IMAGE_ONLY))
        assert (job.state, job.error.code, job.error.stage) == (JobState.FAILED, "not_served", None)
        assert job.error.message.endswith("another profile than when the job was created; create it again")

    def test_crash_is_retried_and_a_failed_job_names_the_stage(self, scripted, tmp_path):
        prompts = (f"crash once {tmp_path / 'marker'}", "raise", "good")
        crashed, bad, good = (scripted.accept(prompt=prompt, **IMAGE_ONLY) for prompt in prompts)
        job = scripted.wait_for_end(crashed)
        assert (job.state, job.error, job.claims) == (JobState.COMPLETED, None, 1)
        assert (tmp_path / "marker").exists()
        job = scripted.wait_for_end(bad)
        assert (job.state, job.error.code, job.error.stage) == (JobState.FAILED, "stage_failed", "flux")
        assert "a transient fault" in job.error.message
        assert scripted.wait_for_end(good).state == JobState.COMPLETED

    @pytest.mark.slow
    def test_job_that_finds_the_disk_full_is_completed_later(self, tiny, small_disk, tmp_path, pipe):
        """The encoder of this application really gets ENOSPC. The database is on another disk."""
        database = f"sqlite:///{tmp_path}/jobs.db"
        profile = tiny.model_copy(update={"actors": {name: tiny.actors[name] for name in ACTORS_GB}})
        app = run("full", profile, this_machine(), small_disk.folder, SCRIPTED, database=database)
        try:
            job_id = app.accept(prompt=f"steps 2 pause at 2 {pipe}", **IMAGE_ONLY)
            app.wait_until(job_id, lambda job: job.step == 1)
            small_disk.fill()
            with pipes_open(pipe):
                app.wait_until(job_id, lambda job: job.stage == "output")
                # Its files wait for room, and a new job is not claimed.
                next_job_id = app.accept(prompt="next", **IMAGE_ONLY)
                assert not ray.get(app.director.check_health.remote(), timeout=60)
                assert [app.job(each).state for each in (job_id, next_job_id)] == [JobState.IN_PROGRESS, JobState.QUEUED]
                small_disk.make_room()
                ended = [app.wait_for_end(each) for each in (job_id, next_job_id)]
            assert [(job.state, job.claims) for job in ended] == [(JobState.COMPLETED, 1)] * 2
        finally:
            app.stop()

    def test_killed_director_loses_no_job_and_no_worker(self, scripted, pipe):
        job_id = scripted.accept(prompt=f"steps 3 pause at 2 {pipe}", **IMAGE_ONLY)
        scripted.wait_until(job_id, lambda job: job.step == 1)
        waiting = [scripted.accept(prompt=f"behind it {n}", **IMAGE_ONLY) for n in range(6)]
        before = scripted.pids("worker")
        os.kill(scripted.pid(DIRECTOR), signal.SIGKILL)
        # The restarted director starts them again, and stops the call of the killed one.
        scripted.wait_until(job_id, lambda job: job.claims == 2 and job.step == 1)
        with pipes_open(pipe):
            assert {scripted.wait_for_end(job).state for job in (job_id, *waiting)} == {JobState.COMPLETED}
        assert steps_run(pipe) == [1, 2, 1, 2, 3]
        assert scripted.pids("worker") == before

    @pytest.mark.slow
    def test_killed_owner_of_the_workers_loses_no_job(self, scripted, pipe):
        job_id = scripted.accept(prompt=f"steps 3 pause at 2 {pipe}", **IMAGE_ONLY)
        scripted.wait_until(job_id, lambda job: job.step == 1)
        before = scripted.pids("worker")
        os.kill(scripted.pid(WORKERS), signal.SIGKILL)
        with pipes_open(pipe):
            assert scripted.wait_for_end(job_id).state == JobState.COMPLETED
        # Ray lists dead actors for a moment, and the further slots follow the first one.
        while set(scripted.actors()) & set(before) or len(scripted.pids("worker")) < len(before):
            time.sleep(POLL_S)
        assert not any(psutil.pid_exists(pid) for pid in before.values())

    def test_running_and_new_jobs_fail_when_a_budget_is_spent(self, scripted, pipe):
        fields = {"key_id": LOCAL_TENANT, **IMAGE_ONLY}
        done = scripted.wait_for_end(scripted.accept(prompt="measured", **fields))
        assert done.gpu_seconds > 0
        jobs = scripted.store.list("me", states=FINAL, limit=1_000).jobs
        assert sum(scripted.store.usage.totals().values()) == pytest.approx(sum(job.gpu_seconds for job in jobs))
        running = scripted.accept(prompt=f"steps 9 pause at 4 {pipe}", **fields)
        scripted.wait_until(running, lambda job: job.step == 3)
        spend(scripted, LARGE_BUDGET_S)
        ended = scripted.wait_for_end(running)
        assert (ended.state, ended.error.code) == (JobState.FAILED, "budget_exceeded")
        assert ended.gpu_seconds > 0
        # The thread is still in step 4. Release it now.
        with pipes_open(pipe):
            new = scripted.wait_for_end(scripted.accept(prompt="new", **fields))
            assert (new.error.code, new.gpu_seconds) == ("budget_exceeded", 0)
            of_others = scripted.accept(prompt="of another key", **IMAGE_ONLY)
            assert scripted.wait_for_end(of_others).state == JobState.COMPLETED
            spend(scripted, -LARGE_BUDGET_S)
            assert scripted.wait_for_end(scripted.accept(prompt="new", **fields)).state == JobState.COMPLETED

    # The last test of this application: its director starts no more jobs.
    def test_drain_requeues_jobs_that_exceed_the_grace_period(self, scripted, pipe):
        job_id = scripted.accept(prompt=f"steps 3 pause at 2 {pipe}", **IMAGE_ONLY)
        scripted.wait_until(job_id, lambda job: job.step == 1)
        assert ray.get(scripted.director.drain.remote(0.1)) == 1
        job = scripted.job(job_id)
        assert (job.state, job.claims) == (JobState.QUEUED, 0)
        # The deadlines of queued jobs pass although it starts none.
        late = job.model_copy(update={"id": new_id("shot"), "started_at": None, "start_by": time.time()})
        scripted.store.create(late)
        assert scripted.wait_for_end(late.id).error.code == "deadline_exceeded"


class WithoutWeights(FakeSVD):
    def load(self):
        raise SetupError("its weights are damaged")


@pytest.mark.slow
def test_failure_to_load_is_an_error_of_the_owner_of_the_workers(tiny, tmp_path, scripted):
    scripted.stop()
    app = run("broken", scripted_profile(tiny), parse_gpus("1x80GB"), tmp_path, {**SCRIPTED, "svd": WithoutWeights})
    for method in ("ready", "start_state", "check_health"):  # one after another: the others do not wait for the weights
        with pytest.raises(SetupError, match=r"^loading: its weights are damaged$"):
            raise ray_error(getattr(app.workers, method).remote())
    app.stop()
    # Nothing is left of both.
    while app.actors() or scripted.actors() or states_of_gpu_groups() != {"REMOVED"}:
        time.sleep(POLL_S)


def states_of_gpu_groups():
    groups = placement_group_table().values()
    return {group["state"] for group in groups if any("GPU" in bundle for bundle in group["bundles"].values())}


def ray_error(call):
    """Return the error that a call of an actor has raised."""
    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        ray.get(call)
    return raised.value.cause
