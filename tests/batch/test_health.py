"""Faults that are not crashes, on real processes: sick GPUs and failing loads. Also a layout that grows."""

import os
import time

import pytest

from tests.batch.conftest import change_limits
from tests.batch.faulty_stages import actor_name, append, gpu, stages
from tests.batch.test_batch import Events
from tests.batch.test_faults import GPUS, render_lines
from tests.fake_stages import FAKES, FakeFlux, profile_of_fakes
from vidgen_ray.planner.cluster import Cluster, Node

pytestmark = pytest.mark.usefixtures("local_ray", "short_waits")
IMAGE = {"generate_video": False}


@pytest.fixture(scope="module")
def profile(tiny):
    """Profile with one worker per GPU."""
    return profile_of_fakes(tiny, layout="fused")


def run(tmp_path, profile, lines, fakes=FAKES, gpus=GPUS, **options):
    return render_lines(tmp_path, profile, lines, fakes=fakes, gpus=gpus, **options)


def images(count):
    return [{"id": f"s{n:02}", "prompt": f"shot {n}", **IMAGE} for n in range(count)]


def test_worker_that_makes_other_images_than_two_others_is_quarantined(tiny, tmp_path, monkeypatch):
    change_limits(monkeypatch, first_checked_call=2)
    loads = tmp_path / "loads"

    class Sick(FakeFlux):
        """The first process is sick. Waits until all three have loaded."""

        def load(self):
            super().load()
            self.is_sick = append(loads, str(os.getpid())) == 1

        def one(self, shot, artefacts):
            while len(loads.read_text().splitlines()) < 3:
                time.sleep(0.01)  # polls: files do not send events
            made = super().one(shot, artefacts)
            return {"image": 255 - made["image"]} if self.is_sick else made

    three = tiny.model_copy(update={"cpu_workers": 3})
    machine = Cluster((Node((), 8, None),))
    report, _ = run(tmp_path, three, images(60), {**FAKES, FakeFlux.name: Sick}, gpus=machine)
    assert (report.done, report.failed) == (60, 0)
    assert len(report.quarantined) == 1
    assert "makes other images than two workers" in report.quarantined[0]


# Loading


def test_load_that_fails_twice_on_one_gpu_costs_no_line(profile, tmp_path):
    """The load is retried in new processes."""
    loads, tried = tmp_path / "loads", tmp_path / "tried"

    def load():
        if gpu() != "0":
            return
        number = append(loads, f"{os.getpid()}")
        if number > 2:
            tried.touch()
        if number <= 2:
            raise RuntimeError("CUDA error: cannot load")

    listener = Events()
    lines = [{"id": "late", "prompt": f"until {tried}", **IMAGE}, *images(6)]
    report, _ = run(tmp_path, profile, lines, stages(on_load=load), listener=listener)
    assert (report.done, report.failed) == (7, 0)
    assert len(set(loads.read_text().split())) == 3, "each attempt has a process of its own"
    assert any("cannot load its weights: CUDA error: cannot load" in message for message in listener.messages)


# Layout


def test_layout_is_extended_for_a_stage_that_later_lines_need(profile, tmp_path, monkeypatch):
    monkeypatch.setattr("vidgen_ray.batch.line_planner.FIRST_LOOK_LINES", 2)
    monkeypatch.setattr("vidgen_ray.batch.line_planner.BLOCK_LINES", 2)
    log = tmp_path / "log"

    def record(shot):
        append(log, f"{shot.id} {actor_name()}")

    lines = [*images(6), {"id": "clip", "prompt": "a"}, {"id": "image", "prompt": "b", **IMAGE}]
    report, rows = run(tmp_path, profile, lines, stages(record))
    assert (report.done, report.failed) == (8, 0)
    assert rows["clip"].hd_video
    engine_of = {shot: name.split("/")[1] for shot, name in (line.split() for line in log.read_text().splitlines())}
    assert (engine_of["s00"], engine_of["clip"]) == ("1", "2")
