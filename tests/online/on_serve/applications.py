"""Directors with workers on Ray, without an API, their stores and processes."""

import time
from contextlib import suppress
from dataclasses import dataclass

import psutil
import ray

from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.fleet import labels_of
from vidgen_ray.online.auth import ApiKeys
from vidgen_ray.online.server import Handle, Watched
from vidgen_ray.online.server_plan import DIRECTOR, WORKERS
from vidgen_ray.online.server_settings import Budget, Limits, OnlineSettings
from vidgen_ray.online.serving_profile import ServingProfile, serving_profile
from vidgen_ray.online.store.jobs import Job, JobKind, new_id
from vidgen_ray.online.store.store import JobStore, open_store
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner.choose_layout import plan_run
from vidgen_ray.render.cache_writer import CacheSettings
from vidgen_ray.shot import Shot

POLL_S = 0.02
LARGE_BUDGET_S = 1e9
"""Budget in GPU-seconds of the key `local`."""
ACTORS_GB = {"instantid": 1, "flux": 34, "svd": 20, "realesrgan": 6}
"""Actors with scripted stages, and their GPU memory."""


@dataclass
class Running:
    """Director and workers of a server, and its job store."""

    name: str
    serving_profile: ServingProfile
    outputs: OutputFolder
    store: JobStore
    director: Handle
    workers: Handle
    watched: tuple[Watched, ...] = ()
    """They keep what the processes need when Ray starts them again."""

    def shot(self, **fields) -> Shot:
        shot = Shot(**{**self.serving_profile.profile.defaults, "prompt": "a red ball", "seed": 3, **fields})
        key = self.serving_profile.plan(shot.model_copy(update={"id": "x"})).key
        return shot.model_copy(update={"id": f"online-{key[:32]}"})

    def accept(self, key=None, key_id="", **fields) -> str:
        shot = self.shot(**fields)
        key = key or self.serving_profile.plan(shot).key
        named = {"id": new_id("shot"), "tenant": "me", "key_id": key_id}
        job = Job(**named, kind=JobKind.SHOT, shot=shot, key=key, created_at=time.time())
        self.store.create(job)
        self.director.wake.remote()
        return job.id

    def job(self, job_id) -> Job:
        return self.store.get(job_id, "me")

    def wait_until(self, job_id, condition) -> Job:
        while not condition(job := self.job(job_id)):
            assert not job.state.is_final, job
            time.sleep(POLL_S)
        return job

    def wait_for_end(self, job_id) -> Job:
        return self.wait_until(job_id, lambda job: job.state.is_final)

    def cancel(self, job_id):
        self.store.request_cancel(job_id, "me")
        self.director.wake.remote()

    def stop(self):
        with suppress(ray.exceptions.RayActorError):  # stopped before
            ray.get(self.workers.stop.remote())  # as `vidgen serve` does: Ray keeps placement groups until its job ends
        for handle in (self.director, self.workers):
            ray.kill(handle.actor)

    def pid(self, process):
        """Return the pid of the director or the owner of the workers, by its process title."""
        title = f"ray::{self.name}{process}"
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                    return process.pid
        raise AssertionError(f"no process {title}")

    def pids(self, kind):
        """Return name -> pid of the `worker` or `encoder` processes."""
        return {name: pid_of(ray.get_actor(name, space)) for name, space in self.actors().items() if f"/{kind}/" in name}

    def actors(self):
        """Return name -> namespace of the workers and encoders."""
        named = ray.util.list_named_actors(all_namespaces=True)
        return {actor["name"]: actor["namespace"] for actor in named if actor["name"].startswith(f"{self.name}-")}


def pid_of(actor):
    while True:
        with suppress(ray.exceptions.ActorUnavailableError):
            return ray.get(actor.place.remote()).pid


def run(name, profile, cluster, out, stages, database=None) -> Running:
    served = serving_profile(profile)
    chosen = plan_run(served.profile, served.demand(), cluster)
    outputs = OutputFolder(out / "out")
    outputs.prepare()
    limits = Limits(budgets=(Budget(window="total", gpu_seconds=LARGE_BUDGET_S),))
    settings = OnlineSettings(data=str(out / "out"), database=database, limits=limits)
    stages_served = {stage.name: stages[stage.name] for stage in served.stages}
    config = EngineConfig(name, served.profile, outputs, stages_served, CacheSettings("all", wait=True))
    labels = labels_of(chosen, cluster)
    keys = ApiKeys([], settings.limits)
    workers = Watched(name + WORKERS, "vidgen_ray.online.workers:Workers", config, chosen.layout, labels)
    of_director = (config, settings, chosen.layout, keys, workers.handle)
    director = Watched(name + DIRECTOR, "vidgen_ray.online.job_director:JobDirector", *of_director)
    return Running(name, served, outputs, open_store(settings), director.handle, workers.handle, (director, workers))


def scripted_profile(tiny, actors_gb=ACTORS_GB):
    on_gpu = {"device": "cuda", "cpus": 0.1}
    actors = {name: tiny.actors[name].model_copy(update={**on_gpu, "memory_gb": gb}) for name, gb in actors_gb.items()}
    return tiny.model_copy(update={"name": "scripted", "actors": actors, "cpu_workers": None, "layout": "fused"})


IMAGE_ONLY = {"generate_video": False}
