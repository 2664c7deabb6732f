"""The graph on a real Serve: the same bytes as the reference, and every job ends, whatever dies meanwhile."""

import os
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import pytest
import ray
from ray import serve

from tests.conftest import ASTRONAUT
from tests.online.obedient_stages import OBEDIENT
from vidgen_ray.cache_dir import sha256_of
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.online.deployments import DIRECTOR, graph, groups_of
from vidgen_ray.online.replica_config import ReplicaConfig
from vidgen_ray.online.serving_profile import ServingProfile, serving_profile
from vidgen_ray.online.settings import OnlineSettings
from vidgen_ray.online.store.jobs import Job, JobKind, JobState, new_id
from vidgen_ray.online.store.store import JobStore, open_store
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.planner import parse_gpus, plan, this_machine
from vidgen_ray.shot import Shot

pytestmark = pytest.mark.timeout(600)

LOOK_S = 0.02
HANGS_S = 2
"""After which a call of the faces' stage has hung. All others may take their time, on whatever machine this runs."""


@pytest.fixture(scope="module", autouse=True)
def own_serve():
    ray.init(address="local", num_cpus=16, num_gpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
    yield
    serve.shutdown()
    ray.shutdown()


@dataclass
class Running:
    """An application that serves, and the store by which it is told what to do."""

    name: str
    serving_profile: ServingProfile
    outputs: OutputFolder
    store: JobStore

    def shot(self, **fields) -> Shot:
        shot = Shot(**{**self.serving_profile.profile.defaults, "prompt": "a red ball", "seed": 3, **fields})
        key = self.serving_profile.plan(shot.model_copy(update={"id": "x"})).key
        return shot.model_copy(update={"id": f"online-{key[:32]}"})

    def accept(self, **fields) -> str:
        shot = self.shot(**fields)
        key = self.serving_profile.plan(shot).key
        job = Job(id=new_id("shot"), tenant="me", kind=JobKind.SHOT, shot=shot, key=key, created_at=time.time())
        self.store.create(job)
        self.director.wake.remote()
        return job.id

    def job(self, job_id) -> Job:
        return self.store.get(job_id, "me")

    def when(self, job_id, is_so) -> Job:
        while not is_so(job := self.job(job_id)):
            assert not job.state.is_final, job
            time.sleep(LOOK_S)
        return job

    def ended(self, job_id) -> Job:
        return self.when(job_id, lambda job: job.state.is_final)

    def cancel(self, job_id):
        self.store.request_cancel(job_id, "me")
        self.director.wake.remote()

    @property
    def director(self):
        return serve.get_deployment_handle(DIRECTOR, self.name)

    def pids(self, deployment):
        """Of the replicas of a deployment, by the titles that Ray gives them."""
        title = f"ray::ServeReplica:{self.name}:{deployment}"
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                    found.append(process.pid)
            except psutil.NoSuchProcess:
                continue
        return found


def run(name, profile, cluster, out, stages, in_progress=4) -> Running:
    found = serving_profile(profile)
    layout = plan(found.profile, found.demand(), cluster).layout
    outputs = OutputFolder(out / "out")
    outputs.prepare()
    settings = OnlineSettings(data=str(out / "out"))
    service = ReplicaConfig(found.profile, outputs, layout, {stage.name: stages[stage.name] for stage in found.stages})
    groups = groups_of(layout, found.profile, cluster)
    serve.run(graph(service, groups, settings, in_progress), name=name, route_prefix=None)
    return Running(name, found, outputs, open_store(settings))


@pytest.fixture(scope="module")
def real(tiny, tmp_path_factory) -> Running:
    """The real stages with random weights, all in one process."""
    return run("real", tiny, this_machine(), tmp_path_factory.mktemp("real"), STAGE_BY_NAME)


@pytest.fixture(scope="module")
def obedient(tiny, tmp_path_factory) -> Running:
    """Stages that do what the prompt says, on two simulated GPUs with a process for each actor on both."""
    sizes = {"instantid": 1, "flux": 34, "svd": 20, "realesrgan": 6}
    actors = {
        name: tiny.actors[name].model_copy(update={"device": "cuda", "memory_gb": gb, "cpus": 0.1})
        for name, gb in sizes.items()
    }
    actors["instantid"] = actors["instantid"].model_copy(update={"timeout_s": HANGS_S})
    changes = {"name": "obedient", "actors": actors, "cpu_workers": None, "layout": "colocated"}
    cluster = parse_gpus("2x80GB")
    return run("obedient", tiny.model_copy(update=changes), cluster, tmp_path_factory.mktemp("obedient"), OBEDIENT)


def digests(outputs: OutputFolder, shot_id: str) -> dict[str, str]:
    """File -> sha256 of all that a shot leaves to be looked at."""
    folder = outputs.shot_folder(shot_id)
    return {file.name: sha256_of(file) for file in sorted(folder.iterdir()) if file.name != "shot.json"}


class TestRealStages:
    @pytest.mark.parametrize(
        ("fields", "files"),
        [
            (
                {"face_image": [str(ASTRONAUT)], "lora": "builtin:tiny/lora.safetensors", "use_hunyuan_style": True},
                {"image.png", "video.mp4", "hd.mp4"},
            ),
            ({"prompt": "a blue ball", "generate_video": False}, {"image.png"}),
        ],
        ids=["a clip with everything", "a picture"],
    )
    def test_the_bytes_are_those_of_the_pipeline(self, real, tiny, tmp_path, fields, files):
        job = real.ended(real.accept(**fields))
        assert (job.state, job.progress, job.error) == (JobState.COMPLETED, 100, None)
        found = digests(real.outputs, job.shot_id)
        assert set(found) == files
        pipeline = VideoGenerationPipeline(tiny, tmp_path)
        record = pipeline.render(job.shot)
        assert found == digests(pipeline.outputs, job.shot.id)
        assert record.key == job.key
        assert set(job.stage_seconds) == {step.stage for step in record.stages}
        # What is there is not made again, for whomever.
        before = sorted(real.outputs.shot_folder(job.shot_id).iterdir())
        written = [file.stat().st_mtime_ns for file in before]
        again = real.ended(real.accept(**fields))
        assert (again.state, again.shot_id, again.stage_seconds) == (JobState.COMPLETED, job.shot_id, {})
        assert [file.stat().st_mtime_ns for file in before] == written

    def test_a_shot_of_a_batch_run_is_found_under_its_own_id(self, real, tiny):
        pipeline = VideoGenerationPipeline(tiny, real.outputs.root)
        pipeline.render(real.shot(prompt="of a batch", generate_video=False).model_copy(update={"id": "line-7"}))
        job = real.ended(real.accept(prompt="of a batch", generate_video=False))
        assert (job.state, job.shot_id) == (JobState.COMPLETED, "line-7")

    def test_denoising_ends_when_nobody_wants_it_and_the_weights_are_fine_afterwards(self, real):
        job_id = real.accept(prompt="long", generate_video=False, steps={"flux": 200})
        at = real.when(job_id, lambda job: job.step > 0)
        assert (at.stage, at.steps) == ("flux", 200)
        real.cancel(job_id)
        ended = real.ended(job_id)
        assert (ended.state, ended.error) == (JobState.CANCELLED, None)
        assert ended.step < 200
        assert real.ended(real.accept(prompt="next", generate_video=False)).state == JobState.COMPLETED


@pytest.fixture
def pipe(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    yield path
    with passing(path):
        pass  # a test that failed leaves nobody waiting


@contextmanager
def passing(*pipes):
    """Whoever waits at one of these named pipes goes on, and so does whoever comes to it until the block ends.

    A pipe that somebody has open both ways keeps no reader waiting. One that is opened for writing lets a single reader pass,
    which may be the thread of a process that nobody listens to any more.
    """
    both_ways = [os.open(pipe, os.O_RDWR) for pipe in pipes]
    try:
        yield
    finally:
        for each in both_ways:
            os.close(each)


def steps_run(pipe):
    return [int(line) for line in pipe.with_name("pipe.steps").read_text().split()]


PICTURE = {"generate_video": False}


class TestObedientStages:
    def test_shares_of_a_gpu_fit_by_memory_however_ray_packs_them(self, obedient):
        shares = {name: status.replica_states for name, status in serve.status().applications["obedient"].deployments.items()}
        assert shares.keys() == {"instantid", "flux", "svd", "realesrgan", "Encoder", "Director"}
        assert all(states == {"RUNNING": 2} for name, states in shares.items() if name not in ("Encoder", "Director"))

    def test_a_cancelled_job_ends_after_the_step_it_is_in(self, obedient, pipe):
        job_id = obedient.accept(prompt=f"steps 9 stop at 4 {pipe}", **PICTURE)
        obedient.when(job_id, lambda job: job.step == 3)
        obedient.cancel(job_id)
        assert obedient.ended(job_id).state == JobState.CANCELLED
        # The thread is still in its fourth step. Only now may it end that.
        with passing(pipe):
            jobs = [obedient.accept(prompt=f"next {n}", **PICTURE) for n in range(4)]
            assert {obedient.ended(job).state for job in jobs} == {JobState.COMPLETED}
        assert steps_run(pipe) == [1, 2, 3, 4]

    def test_a_job_that_waits_is_cancelled_before_it_begins(self, obedient, pipe):
        pipes = [pipe.with_name(f"pipe{n}") for n in range(4)]
        for path in pipes:
            os.mkfifo(path)
        leading = [obedient.accept(prompt=f"steps 2 stop at 1 {path}", **PICTURE) for path in pipes]
        waiting = obedient.accept(prompt="waits", **PICTURE)
        obedient.cancel(waiting)
        assert obedient.ended(waiting).state == JobState.CANCELLED
        # Which of them have begun, and in what order, is nobody's promise.
        with passing(*pipes):
            assert {obedient.ended(job).state for job in leading} == {JobState.COMPLETED}

    def test_progress_is_that_of_the_steps(self, obedient, pipe):
        job_id = obedient.accept(prompt=f"steps 4 stop at 3 {pipe}", **PICTURE)
        at = obedient.when(job_id, lambda job: job.step == 2)
        assert (at.state, at.stage, at.steps) == (JobState.IN_PROGRESS, "flux", 4)
        assert 40 <= at.progress <= 50
        with passing(pipe):
            assert obedient.ended(job_id).progress == 100

    @pytest.mark.parametrize(
        ("what", "fields"),
        [
            ("die", {}),
            ("raise", PICTURE),
            ("hang", {"face_image": [str(ASTRONAUT)], **PICTURE}),
            ("wedge", PICTURE),
        ],
    )
    def test_what_happens_once_costs_no_job(self, obedient, tmp_path, what, fields):
        job = obedient.ended(obedient.accept(prompt=f"{what} once {tmp_path / 'marker'}", **fields))
        assert (job.state, job.error, job.attempts) == (JobState.COMPLETED, None, 1)
        assert (tmp_path / "marker").exists()

    def test_two_jobs_for_the_same_shot_render_it_once(self, obedient, pipe):
        fields = {"prompt": f"steps 2 stop at 1 {pipe}", **PICTURE}
        first, second = obedient.accept(**fields), obedient.accept(**fields)
        for job_id in (first, second):
            obedient.when(job_id, lambda job: job.state == JobState.IN_PROGRESS)
        with passing(pipe):
            ended = [obedient.ended(job_id) for job_id in (first, second)]
        assert [job.state for job in ended] == [JobState.COMPLETED] * 2
        assert steps_run(pipe) == [1, 2]

    def test_an_error_of_the_shot_itself_is_final_and_says_what_to_do(self, obedient):
        job = obedient.ended(obedient.accept(prompt="full", **PICTURE))
        assert (job.state, job.error.code, job.error.stage) == (JobState.FAILED, "invalid_shot", "flux")
        assert "out of GPU memory" in job.error.message

    def test_a_shot_that_always_ends_its_process_fails_after_three(self, obedient):
        job = obedient.ended(obedient.accept(prompt="die", **PICTURE))
        assert (job.state, job.error.code, job.error.stage) == (JobState.FAILED, "replica_died", "flux")

    def test_a_director_that_is_killed_loses_nothing(self, obedient, pipe):
        job_id = obedient.accept(prompt=f"steps 3 stop at 2 {pipe}", **PICTURE)
        obedient.when(job_id, lambda job: job.step == 1)
        waiting = [obedient.accept(prompt=f"behind it {n}", **PICTURE) for n in range(6)]
        (pid,) = obedient.pids(DIRECTOR)
        os.kill(pid, signal.SIGKILL)
        # Begun again by the next one.
        with passing(pipe):
            assert {obedient.ended(job).state for job in (job_id, *waiting)} == {JobState.COMPLETED}
        assert obedient.job(job_id).attempts == 2

    def test_what_is_not_done_in_the_time_of_grace_is_queued_again(self, obedient, pipe):
        job_id = obedient.accept(prompt=f"steps 3 stop at 2 {pipe}", **PICTURE)
        obedient.when(job_id, lambda job: job.step == 1)
        assert obedient.director.drain.remote(0.1).result() == 1
        job = obedient.job(job_id)
        assert (job.state, job.attempts) == (JobState.QUEUED, 0)
        with passing(pipe):
            later = obedient.accept(prompt="later", **PICTURE)
            (pid,) = obedient.pids(DIRECTOR)
            os.kill(pid, signal.SIGKILL)
            assert {obedient.ended(job).state for job in (job_id, later)} == {JobState.COMPLETED}
