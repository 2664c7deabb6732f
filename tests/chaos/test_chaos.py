"""A cluster of three nodes from which processes, nodes and drivers are taken at random moments while it renders with the
tiny models: every line is accounted for, every file is the one of an undisturbed run, and little is computed twice.

`make chaos` has the long form and prints what was done; `make test` the short one. What else needs several nodes is here, too.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import ray
from ray.cluster_utils import Cluster

from tests.batch.test_batch import Events, digests
from tests.chaos.counted_stages import LOG
from tests.conftest import ASTRONAUT
from tests.fake_stages import FAKES
from vidgen_ray.batch.render import render
from vidgen_ray.batch.start_actors import labels_of
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import read_manifest
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.planner import Cluster as Machines
from vidgen_ray.planner import Node, demand_of, parse_gpus, plan
from vidgen_ray.script.reader import iter_script

ROOT = Path(__file__).parent.parent.parent
MARK = "VIDGEN_CHAOS"
"""In the environment of all processes of the cluster, to tell them from those of another Ray on this machine."""
LOOK_S = 0.1
IN_HAND = 8
"""Calls that one process has at hand at most: chunks of a quarter of a load."""
WINDOW = 12
"""Shots in progress: three a slot, four slots."""


def processes(title):
    """Pids of the cluster's processes whose title begins so."""
    found = []
    for process in psutil.process_iter():
        try:
            if " ".join(process.cmdline()).startswith(title) and MARK in process.environ():
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return sorted(found)


class ThreeNodes:
    """A head that runs no work, and two nodes with two pretended GPUs each."""

    def __init__(self, folder):
        os.environ.update({MARK: uuid.uuid4().hex, LOG: str(folder / "calls.jsonl"), "PYTHONPATH": str(ROOT)})
        options = {"object_store_memory": 200 << 20, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **options})
        self.nodes = [self._add(), self._add()]

    @property
    def address(self):
        return self._cluster.address

    def _add(self):
        return self._cluster.add_node(num_cpus=8, num_gpus=2, object_store_memory=200 << 20)

    def replace_one(self, rng):
        """A node vanishes without a word, and another comes, as with spot machines."""
        lost = self.nodes.pop(rng.randrange(len(self.nodes)))
        self._cluster.remove_node(lost, allow_graceful=False)
        self.nodes.append(self._add())

    def shutdown(self):
        self._cluster.shutdown()
        for name in (MARK, LOG, "PYTHONPATH"):
            os.environ.pop(name, None)


@dataclass
class SkippedLines:
    """What happened in one run."""

    drivers: int = 0
    done_to_it: Counter = field(default_factory=Counter)
    calls: list = field(default_factory=list)
    seconds: float = 0.0


class Undisturbed(NamedTuple):
    """What every run must come to."""

    ids: list[str]
    digests: dict[str, str]
    calls: int
    """Of stages, each thing computed once."""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    cluster = ThreeNodes(tmp_path_factory.mktemp("chaos"))
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Six shots; some with a face, a LoRA, a restyle."""
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


def rendered(script, out, nodes, disturbances, total, rng):
    """Run the script to its end, with `disturbances` at random shares of its `total` calls.

    A killed driver is started again.
    """
    Path(os.environ[LOG]).unlink(missing_ok=True)
    account, begun = SkippedLines(), time.monotonic()
    moments = sorted(rng.uniform(0.05, 0.95) * total for _ in disturbances)
    due = list(zip(moments, disturbances, strict=True))
    with open(out.with_suffix(".log"), "wb") as log:
        driver = start(script, out, nodes, log)
        account.drivers += 1
        while driver.poll() is None:
            if due and len(calls()) >= due[0][0]:
                _, disturb = due.pop(0)
                if disturb is kill_driver:
                    driver.kill()
                    driver.wait()
                    driver = start(script, out, nodes, log)
                    account.drivers += 1
                    account.done_to_it[disturb.__name__] += 1
                elif disturb(nodes, rng):
                    account.done_to_it[disturb.__name__] += 1
            time.sleep(LOOK_S)  # nobody announces a call
    account.calls, account.seconds = calls(), time.monotonic() - begun
    assert driver.returncode == 0, out.with_suffix(".log").read_text()[-3000:]
    return account


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


def kill_coordinator(nodes, rng):
    return kill_one(processes("ray::MapWorker(MapBatches(Director))"), rng)


def lose_node(nodes, rng):
    nodes.replace_one(rng)
    return True


def kill_driver(nodes, rng):
    """The loop does it, which has the driver."""


def allowed_rework(account):
    """What was in hand of the processes that were killed, and of the shots in progress where a node or a driver went."""
    done = account.done_to_it
    killed = done.total() - done["lose_node"] - done["kill_driver"]
    return IN_HAND * killed + WINDOW * (done["lose_node"] + done["kill_driver"])


def expect_as_undisturbed(out, account, undisturbed):
    rows = read_manifest(out)
    assert sorted(row.id for row in rows) == sorted(undisturbed.ids), "every line once"
    assert {row.status for row in rows} <= {"done", "skipped"}
    assert digests(out) == undisturbed.digests
    assert not list(out.rglob(".tmp-*"))
    assert not list(out.glob("spool/*"))
    assert not (out / "failures.jsonl").exists() or not (out / "failures.jsonl").read_text()
    assert len(account.calls) - undisturbed.calls <= allowed_rework(account)


def told(account, undisturbed):
    kinds = ", ".join(f"{count} x {name}" for name, count in sorted(account.done_to_it.items()))
    again = f"{len(account.calls) - undisturbed.calls} of {undisturbed.calls} calls again"
    return f"{kinds}; {account.drivers} drivers, {account.seconds:.0f} s, {again} (allowed {allowed_rework(account)})"


@pytest.fixture(scope="module")
def undisturbed(script, tiny, tmp_path_factory):
    """The script by the in-process pipeline, where nothing can happen to it."""
    out = tmp_path_factory.mktemp("undisturbed")
    pipeline = VideoGenerationPipeline(tiny, out)
    plans = [pipeline.plan(line.shot) for line in iter_script(script, profile_defaults=tiny.defaults)]
    for planned in plans:
        pipeline.render(planned.shot)
    pipeline.close()
    # Shots share the features of a photo.
    calls = len({step.key for planned in plans for step in planned.steps})
    return Undisturbed([planned.shot.id for planned in plans], digests(out), calls)


SMALL_GB, LARGE_GB = 24.0, 80.0


@pytest.fixture(scope="module")
def with_large_flux(tiny):
    """A profile whose FLUX fits on the larger cards alone."""
    sizes = {"instantid": 1, "flux": 60, "svd": 16, "realesrgan": 4}
    on_gpu = {"device": "cuda", "cpus": 0.5}
    actors = {name: tiny.actors[name].model_copy(update={**on_gpu, "memory_gb": gb}) for name, gb in sizes.items()}
    return tiny.model_copy(update={"name": "fakes", "actors": actors, "cpu_workers": None})


def nodes_of_the_workers():
    workers = [ray.get_actor(name) for name in ray.util.list_named_actors() if "/worker/" in name]
    return {ray.get(worker.place.remote()).node for worker in workers}


def test_where_cards_differ_a_model_is_on_one_that_holds_it(nodes, with_large_flux, tmp_path):
    script = tmp_path / "s.jsonl"
    script.write_text("".join(json.dumps({"id": f"s{n}", "prompt": "a", "generate_video": False}) + "\n" for n in range(4)))
    small, large = (node.node_id for node in nodes.nodes)
    cards = ((SMALL_GB, small), (LARGE_GB, large))
    found = set()
    ray.init(address=nodes.address, log_to_driver=False)
    try:
        report = render(
            iter_script(script, profile_defaults=with_large_flux.defaults),
            with_large_flux,
            OutputFolder(tmp_path / "out"),
            source=script.name,
            watcher=Events(lambda: found.update(nodes_of_the_workers())),
            cluster=Machines(tuple(Node((gb, gb), 8, None, ("ray.io/node-id", node)) for gb, node in cards)),
            stages=FAKES,
        )
    finally:
        ray.shutdown()
    assert (report.done, report.failed) == (4, 0)
    assert found == {large}, "a picture needs FLUX alone, which the small cards do not hold"


def test_where_ray_cannot_tell_cards_apart_nothing_is_begun(with_large_flux, make_shot):
    demand = demand_of([make_shot()])
    for machines, says in (
        (parse_gpus("1x24GB+1x80GB"), "is not told by --gpus"),
        (Machines((Node((SMALL_GB, LARGE_GB), 16, None, ("a", "b")),)), "cannot be told apart"),
    ):
        with pytest.raises(SetupError, match=says):
            labels_of(plan(with_large_flux, demand, machines), machines)
    alike = parse_gpus("2x80GB")
    assert set(labels_of(plan(with_large_flux, demand, alike), alike)) == {None}


@pytest.mark.timeout(900)
def test_a_run_from_which_all_kinds_of_things_are_taken_ends_as_if_nothing_had_been(nodes, script, undisturbed, tmp_path):
    out, rng = tmp_path / "out", random.Random(1)
    account = rendered(script, out, nodes, [kill_upscaler, kill_encoder, kill_coordinator, lose_node], undisturbed.calls, rng)
    assert account.done_to_it.total() >= 3, told(account, undisturbed)
    expect_as_undisturbed(out, account, undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(5))
def test_many_random_moments(nodes, script, undisturbed, tmp_path, seed, capsys):
    out, rng = tmp_path / "out", random.Random(seed)
    kinds = [kill_worker, kill_worker, kill_upscaler, kill_encoder, kill_coordinator, lose_node, kill_driver]
    account = rendered(script, out, nodes, rng.sample(kinds, len(kinds)), undisturbed.calls, rng)
    with capsys.disabled():
        print(f"\nseed {seed}: {told(account, undisturbed)}")  # noqa: T201  # the report is what the long form is for
    expect_as_undisturbed(out, account, undisturbed)
