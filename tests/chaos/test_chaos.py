"""Chaos tests: kill processes, nodes and drivers of a three-node cluster at random while it renders with the tiny models.

Every line is in the manifest, every file equals that of an undisturbed run, and little is computed twice. `make chaos` runs the
long form and prints a summary, `make test` the short form. Other tests that need several nodes are here, too.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import ray

from tests.batch.test_batch import Events, digests
from tests.chaos.counted_stages import LOG
from tests.chaos.driver import UNMARKED
from tests.conftest import ASTRONAUT
from tests.fake_stages import FAKES
from tests.ray_workers import small_cluster
from vidgen_ray.batch.render_script import render
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.engine.fleet import labels_of
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import read_manifest
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.planner import Cluster as Machines
from vidgen_ray.planner import Node, demand_of, parse_gpus, plan
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import iter_script

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
POLL_S = 0.1
MAX_PENDING_CALLS = 8
"""Pending calls per process, at most: chunks with a quarter of a load each."""
WINDOW = 12
"""Shots in progress: three per slot, four slots."""


def processes(title):
    """Return the pids of the cluster's processes whose title starts with `title`. All are descendants of this process."""
    pids = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith(title):
                pids.append(process.pid)
    return sorted(pids)


class ThreeNodes:
    """Cluster with a head that runs no work and two nodes with two simulated GPUs each."""

    def __init__(self, folder):
        os.environ.update({LOG: str(folder / "calls.jsonl"), "PYTHONPATH": str(ROOT)})
        self._cluster = small_cluster(num_cpus=0, object_store_memory=200 << 20)
        self.nodes = [self._add(), self._add()]

    @property
    def address(self):
        return self._cluster.address

    def _add(self):
        return self._cluster.add_node(num_cpus=8, num_gpus=2, object_store_memory=200 << 20)

    def replace_one(self, rng):
        """Remove a node without notice and add a new one, like a spot instance."""
        lost = self.nodes.pop(rng.randrange(len(self.nodes)))
        self._cluster.remove_node(lost, allow_graceful=False)
        self.nodes.append(self._add())

    def shutdown(self):
        self._cluster.shutdown()
        for name in (LOG, "PYTHONPATH"):
            os.environ.pop(name, None)


@dataclass
class Disturbances:
    """Disturbances of one run, and its calls."""

    drivers: int = 0
    counts: Counter = field(default_factory=Counter)
    calls: list = field(default_factory=list)
    seconds: float = 0.0


class Undisturbed(NamedTuple):
    """Expected result of every run."""

    ids: list[str]
    digests: dict[str, str]
    calls: int
    """Stage calls without repetition."""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    cluster = ThreeNodes(tmp_path_factory.mktemp("chaos"))
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Script with six shots. Some have a face, a LoRA or a restyle."""
    lines = []
    for n in range(6):
        line = {"id": f"s{n:02}", "prompt": f"shot {n}", "num_frames": 6}
        if n % 3 == 0:
            line["face_image"] = str(ASTRONAUT)
        if n % 2 == 0:
            line["lora"] = "builtin:tiny/lora.safetensors"
        if n % 4 == 0:
            line["use_hunyuan_style"] = True
        lines.append(line)
    path = tmp_path_factory.mktemp("script") / "script.jsonl"
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def start(script, out, nodes, log):
    command = [sys.executable, "-m", "tests.chaos.driver", str(script), str(out), nodes.address]
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def calls():
    path = Path(os.environ[LOG])
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def render_with(disturbances, script, out, nodes, total, rng):
    """Render the script, with `disturbances` at random points of its `total` calls. A killed driver is restarted."""
    Path(os.environ[LOG]).unlink(missing_ok=True)
    record, started = Disturbances(), time.monotonic()
    moments = sorted(rng.uniform(0.05, 0.95) * total for _ in disturbances)
    due = list(zip(moments, disturbances, strict=True))
    with open(out.with_suffix(".log"), "wb") as log:
        driver = start(script, out, nodes, log)
        record.drivers += 1
        while driver.poll() is None:
            if due and len(calls()) >= due[0][0]:
                disturb = due[0][1]
                if disturb is kill_driver:
                    driver.kill()
                    driver.wait()
                    driver = start(script, out, nodes, log)
                    record.drivers += 1
                # If it finds no process, it waits for the next one.
                if disturb is kill_driver or disturb(nodes, rng):
                    due.pop(0)
                    record.counts[disturb.__name__] += 1
            time.sleep(POLL_S)  # polls: calls do not send events
    record.calls, record.seconds = calls(), time.monotonic() - started
    assert driver.returncode == 0, out.with_suffix(".log").read_text()[-3000:]
    return record


def kill_one(pids, rng):
    if pids:
        os.kill(rng.choice(pids), signal.SIGKILL)
    return bool(pids)


def kill_worker(nodes, rng):
    return kill_one(processes("ray::Worker"), rng)


def kill_upscaler(nodes, rng):
    alive = processes("ray::Worker")
    return kill_one(sorted({call["pid"] for call in calls() if call["stage"] == "realesrgan"} & set(alive)), rng)


def kill_encoder(nodes, rng):
    return kill_one(processes("ray::Encoder"), rng)


def lose_node(nodes, rng):
    nodes.replace_one(rng)
    return True


def kill_driver(nodes, rng):
    """Marker: `render_with` kills the driver itself."""


def allowed_rework(record):
    """Return how many calls may be repeated: those pending on killed processes, and shots of a lost node or driver."""
    counts = record.counts
    killed = counts.total() - counts["lose_node"] - counts["kill_driver"]
    return MAX_PENDING_CALLS * killed + WINDOW * (counts["lose_node"] + counts["kill_driver"])


def check_results(out, record, undisturbed):
    rows = read_manifest(out)
    assert sorted(row.id for row in rows) == sorted(undisturbed.ids), "every line is in the manifest once"
    assert {row.status for row in rows} <= {"done"}
    assert digests(out) == undisturbed.digests
    assert not list(out.rglob(".tmp-*"))
    assert not (out / "failures.jsonl").exists() or not (out / "failures.jsonl").read_text()
    assert len(record.calls) - undisturbed.calls <= allowed_rework(record)


def summary(record, undisturbed):
    kinds = ", ".join(f"{count} x {name}" for name, count in sorted(record.counts.items()))
    repeated = f"{len(record.calls) - undisturbed.calls} of {undisturbed.calls} calls repeated"
    return f"{kinds}; {record.drivers} drivers, {record.seconds:.0f} s, {repeated} (allowed {allowed_rework(record)})"


@pytest.fixture(scope="module")
def undisturbed(script, tiny, tmp_path_factory):
    """Result of the in-process pipeline for the script."""
    out = tmp_path_factory.mktemp("undisturbed")
    pipeline = VideoGenerationPipeline(tiny.with_provenance(UNMARKED), out)
    plans = [pipeline.plan(line.shot) for line in iter_script(ScriptSettings(script, profile_defaults=tiny.defaults))]
    for planned in plans:
        pipeline.render(planned.shot)
    pipeline.close()
    # Shots with the same photo share its face features.
    calls = len({step.key for planned in plans for step in planned.steps})
    return Undisturbed([planned.shot.id for planned in plans], digests(out), calls)


SMALL_GB, LARGE_GB = 24.0, 80.0


@pytest.fixture(scope="module")
def with_large_flux(tiny):
    """Profile whose FLUX fits only on the larger GPUs."""
    sizes = {"instantid": 1, "flux": 60, "svd": 16, "realesrgan": 4}
    on_gpu = {"device": "cuda", "cpus": 0.5}
    actors = {name: tiny.actors[name].model_copy(update={**on_gpu, "memory_gb": gb}) for name, gb in sizes.items()}
    return tiny.model_copy(update={"name": "fakes", "actors": actors, "cpu_workers": None})


def nodes_of_the_workers():
    workers = [ray.get_actor(name) for name in ray.util.list_named_actors() if "/worker/" in name]
    return {ray.get(worker.place.remote()).node for worker in workers}


def test_large_models_are_placed_on_large_gpus(nodes, with_large_flux, tmp_path):
    script = tmp_path / "s.jsonl"
    script.write_text("".join(json.dumps({"id": f"s{n}", "prompt": "a", "generate_video": False}) + "\n" for n in range(4)))
    small, large = (node.node_id for node in nodes.nodes)
    gpus = ((SMALL_GB, small), (LARGE_GB, large))
    used_nodes = set()
    ray.init(address=nodes.address, log_to_driver=False)
    try:
        report = render(
            ScriptSettings(script, profile_defaults=with_large_flux.defaults),
            with_large_flux,
            OutputFolder(tmp_path / "out"),
            RenderOptions(
                cluster=Machines(tuple(Node((gb, gb), 8, None, ("ray.io/node-id", node)) for gb, node in gpus)), stages=FAKES
            ),
            listener=Events(lambda: used_nodes.update(nodes_of_the_workers())),
        )
    finally:
        ray.shutdown()
    assert (report.done, report.failed) == (4, 0)
    assert used_nodes == {large}, "images need only FLUX, which does not fit on the small GPUs"


def test_gpus_that_ray_cannot_distinguish_are_an_error(with_large_flux, make_shot):
    demand = demand_of([make_shot()])
    for cluster, message in (
        (parse_gpus("1x24GB+1x80GB"), "--gpus does not say which node has which GPUs"),
        (Machines((Node((SMALL_GB, LARGE_GB), 16, None, ("a", "b")),)), "Ray cannot distinguish GPUs of different sizes"),
    ):
        with pytest.raises(SetupError, match=message):
            labels_of(plan(with_large_flux, demand, cluster), cluster)
    alike = parse_gpus("2x80GB")
    assert set(labels_of(plan(with_large_flux, demand, alike), alike)) == {None}


@pytest.mark.timeout(900)
def test_run_survives_crashes_of_workers_encoders_and_node(nodes, script, undisturbed, tmp_path):
    out, rng = tmp_path / "out", random.Random(1)
    disturbances = [kill_upscaler, kill_encoder, kill_worker, lose_node]
    record = render_with(disturbances, script, out, nodes, undisturbed.calls, rng)
    assert record.counts.total() >= 3, summary(record, undisturbed)
    check_results(out, record, undisturbed)


@pytest.mark.very_slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(5))
def test_run_survives_random_crashes(nodes, script, undisturbed, tmp_path, seed, capsys):
    out, rng = tmp_path / "out", random.Random(seed)
    kinds = [kill_worker, kill_worker, kill_upscaler, kill_encoder, kill_encoder, lose_node, kill_driver]
    record = render_with(rng.sample(kinds, len(kinds)), script, out, nodes, undisturbed.calls, rng)
    with capsys.disabled():
        print(f"\nseed {seed}: {summary(record, undisturbed)}")  # noqa: T201  # the long form prints a summary
    check_results(out, record, undisturbed)
