"""Chaos tests: real processes, nodes, drivers and heads of clusters that are killed, frozen and lost during a run.

Every line ends once, every file equals that of an undisturbed run, and little is computed twice. `make chaos` runs all of them,
`make test-slow` some. Other tests that need several nodes are here, too.
"""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray
import yaml
from ray._private import ray_constants

from tests.batch.faulty_stages import append, stages
from tests.batch.test_batch import DONE, Events, digests
from tests.batch.test_health import images, profile, run  # noqa: F401  # a fixture
from tests.conftest import ASTRONAUT
from tests.fake_stages import FAKES, profile_of_fakes
from tests.ray_workers import small_cluster
from tests.small_disk import ext4_disk, frozen, mounted_disk
from vidgen_ray.batch import run_options
from vidgen_ray.batch.render_script import render_shots
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.cli import main
from vidgen_ray.engine import actor_start, storage_pause
from vidgen_ray.engine.fleet import labels_of
from vidgen_ray.errors import SetupError
from vidgen_ray.graph import STAGES
from vidgen_ray.outputs import lease as leases
from vidgen_ray.outputs import run_log
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import read_manifest
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.planner.choose_layout import plan_run
from vidgen_ray.planner.cluster import Cluster as Machines
from vidgen_ray.planner.cluster import Node, parse_gpus
from vidgen_ray.planner.demand import demand_of
from vidgen_ray.profile import ProvenanceSettings, load_profile
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import iter_script

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LOG = "VIDGEN_CHAOS_LOG"
"""Environment variable with the path of the log: the stage and the process of each call."""
MEMORY = {"object_store_memory": 200 << 20}
GPUS = "2x2x80GB"
"""Two nodes with two simulated GPUs each."""
POLL_S = 0.1


class ThreeNodes:
    """Cluster with a head that runs no work and two nodes with two simulated GPUs each."""

    def __init__(self, folder):
        os.environ.update({LOG: str(folder / "calls.jsonl"), "PYTHONPATH": str(ROOT)})
        self._cluster = small_cluster(num_cpus=0, **MEMORY)
        self.address = self._cluster.address
        self.nodes = [self._add(), self._add()]

    def _add(self):
        return self._cluster.add_node(num_cpus=8, num_gpus=2, **MEMORY)

    def replace_one(self, rng):
        """Remove a node without notice and add a new one, like a spot instance."""
        self._cluster.remove_node(self.nodes.pop(rng.randrange(2)), allow_graceful=False)
        self.nodes.append(self._add())

    def shutdown(self):
        self._cluster.shutdown()
        for name in (LOG, "PYTHONPATH"):
            os.environ.pop(name)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    cluster = ThreeNodes(tmp_path_factory.mktemp("chaos"))
    yield cluster
    cluster.shutdown()


@pytest.fixture
def connected(nodes):
    ray.init(address=nodes.address, log_to_driver=False)
    yield
    ray.shutdown()


# Driver processes


def start(function, *args, **options):
    """Start a process that calls a function of this module."""
    code = f"import sys; from tests.chaos.test_chaos import {function.__name__}; {function.__name__}(*sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, **options)


# Random crashes, with the tiny models

SIZES_GB = {"instantid": 1, "flux": 34, "hunyuan": 13, "svd": 20, "realesrgan": 6}
UNMARKED = ProvenanceSettings(metadata="off")
"""Marked files name their content key, which depends on the profile."""
ATTEMPTS = 10
"""More than usual: a line may be in progress during several kills that it did not cause."""
MAX_PENDING_CALLS = 8
"""Pending calls per process, at most: chunks with a quarter of a load each."""
WINDOW = 12
"""Shots in progress: three per slot, four slots."""


class Counted:
    """Mixin that logs calls. It comes before the real stage in the base classes."""

    def __init__(self, params):
        super().__init__(params.model_copy(update={"device": "cpu"}))

    def _log(self):
        append(Path(os.environ[LOG]), json.dumps([self.name, os.getpid()]))

    def __call__(self, item):
        result = super().__call__(item)
        self._log()
        return result

    def run_chunk(self, shot, frames, chunk=None):
        result = super().run_chunk(shot, frames, chunk)
        self._log()
        return result


COUNTED = {stage.name: type(f"Counted{stage.__name__}", (Counted, stage), {"__module__": __name__}) for stage in STAGES}
globals().update({stage.__name__: stage for stage in COUNTED.values()})  # pickle finds classes by their module attribute


def render_counted(script, out, address):
    """Render a script on a cluster, with each actor on its own GPU as far as there are GPUs."""
    tiny = load_profile("tiny")
    actors = {
        name: tiny.actors[name].model_copy(update={"device": "cuda", "memory_gb": gb, "cpus": 0.5, "seconds": {}})
        for name, gb in SIZES_GB.items()
    }
    staged = tiny.model_copy(update={"layout": "staged", "actors": actors, "cpu_workers": None}).with_provenance(UNMARKED)
    options = RenderOptions(address=address, cluster=parse_gpus(GPUS), stages=COUNTED, attempts=ATTEMPTS)
    report = render_shots(
        ScriptSettings(Path(script), profile_defaults=staged.defaults), staged, OutputFolder(out), options, listener=Events()
    )
    sys.exit(report.failed > 0)


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Script with six shots. Some have a face, a LoRA or a restyle."""
    path = tmp_path_factory.mktemp("script") / "script.jsonl"
    for n in range(6):
        line = {"id": f"s{n:02}", "prompt": f"shot {n}", "num_frames": 6}
        line |= {"face_image": str(ASTRONAUT)} if n % 3 == 0 else {}
        line |= {"lora": "builtin:tiny/lora.safetensors"} if n % 2 == 0 else {}
        line |= {"use_hunyuan_style": True} if n % 4 == 0 else {}
        with open(path, "a") as file:
            file.write(f"{json.dumps(line)}\n")
    return path


@pytest.fixture(scope="module")
def undisturbed(script, tiny, tmp_path_factory):
    """Result of the in-process pipeline for the script. `calls`: stage calls without repetition."""
    out = tmp_path_factory.mktemp("undisturbed")
    pipeline = VideoGenerationPipeline(tiny.with_provenance(UNMARKED), out)
    plans = [pipeline.plan(line.shot) for line in iter_script(ScriptSettings(script, profile_defaults=tiny.defaults))]
    for planned in plans:
        pipeline.render(planned.shot)
    pipeline.close()
    # Shots with the same photo share its face features.
    calls = len({step.key for planned in plans for step in planned.steps})
    return SimpleNamespace(ids=[planned.shot.id for planned in plans], digests=digests(out), calls=calls)


def calls():
    """Return stage and process of each call."""
    path = Path(os.environ[LOG])
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kill_one(title, rng, pids=None):
    """Kill a process of the cluster, a descendant of this one, whose title starts so. `pids`: one of these."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith(title) and process.pid in (pids or {process.pid}):
                found.append(process.pid)
    if found:
        os.kill(rng.choice(sorted(found)), signal.SIGKILL)
    return bool(found)


def kill_worker(nodes, rng):
    return kill_one("ray::Worker", rng)


def kill_upscaler(nodes, rng):
    pids = {pid for stage, pid in calls() if stage == "realesrgan"}
    return bool(pids) and kill_one("ray::Worker", rng, pids)


def kill_encoder(nodes, rng):
    return kill_one("ray::Encoder", rng)


def lose_node(nodes, rng):
    nodes.replace_one(rng)
    return True


def kill_driver(nodes, rng):
    """Marker: `render_with` kills the driver itself."""


def render_with(disturbances, script, out, nodes, total, rng):
    """Render the script, with `disturbances` at random points of its `total` calls. A killed driver is restarted.

    Return how many there were of each kind.
    """
    Path(os.environ[LOG]).unlink(missing_ok=True)
    counts, log = Counter(), out.with_suffix(".log")
    due = list(zip(sorted(rng.uniform(0.05, 0.95) * total for _ in disturbances), disturbances, strict=True))
    with open(log, "wb") as file:
        args, options = (render_counted, script, out, nodes.address), {"stdout": file, "stderr": subprocess.STDOUT}
        driver = start(*args, **options)
        while driver.poll() is None:
            if due and len(calls()) >= due[0][0]:
                disturb = due[0][1]
                if disturb is kill_driver:
                    driver.kill()
                    driver.wait()
                    driver = start(*args, **options)
                # If it finds no process, it waits for the next one.
                if disturb is kill_driver or disturb(nodes, rng):
                    due.pop(0)
                    counts[disturb] += 1
            time.sleep(POLL_S)  # polls: calls do not send events
    assert driver.returncode == 0, log.read_text()[-3000:]
    return counts


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.very_slow) for seed in range(1, 6))])
def test_run_survives_crashes_of_workers_encoders_nodes_and_drivers(nodes, script, undisturbed, tmp_path, seed):
    out, rng = tmp_path / "out", random.Random(seed)
    disturbances = [kill_upscaler, kill_encoder, kill_worker, lose_node]
    if seed:
        disturbances = rng.sample([*disturbances, kill_worker, kill_encoder, kill_driver], 7)
    counts = render_with(disturbances, script, out, nodes, undisturbed.calls, rng)
    assert counts.total() >= 3, counts
    rows = read_manifest(out)
    assert sorted(row.id for row in rows) == sorted(undisturbed.ids), "every line is in the manifest once"
    assert {row.status for row in rows} == {"done"}
    assert digests(out) == undisturbed.digests
    assert not list(out.rglob(".tmp-*"))
    assert not (out / "failures.jsonl").exists() or not (out / "failures.jsonl").read_text()
    # Calls pending on killed processes are repeated, and the shots of a lost node or driver.
    lost = counts[lose_node] + counts[kill_driver]
    assert len(calls()) - undisturbed.calls <= MAX_PENDING_CALLS * (counts.total() - lost) + WINDOW * lost


# Faults of processes, with stages that do nothing

WORK_S = 0.5
"""Simulated duration of a shot."""
SILENT_S = 3.0
STOPPED_S = 6.0
"""Seconds for which a node is stopped: longer than the deadline of a ping."""
SHOTS = 24


class Disturbed(Events):
    """Listener that calls `fault` after every `every` finished shots, `times` times."""

    def __init__(self, fault, every, times):
        super().__init__()
        self.faults_at = []
        self._fault, self._every, self._times = fault, every, times

    def on_finished(self, row):
        super().on_finished(row)
        if len(self.rows) % self._every == 0 and len(self.faults_at) < self._times:
            self.faults_at.append(time.monotonic())
            self._fault()


class Log:
    """Calls of all workers: shot, process, begin or end, time."""

    def __init__(self, path):
        self.path = path
        path.touch()

    def work(self, shot):
        for event in ("begin", "end"):
            append(self.path, json.dumps([shot.id, os.getpid(), event, time.monotonic()]))
            time.sleep(WORK_S if event == "begin" else 0)

    def calls(self):
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def begun(self):
        """Return shot -> number of its calls."""
        return Counter(shot for shot, _, event, _ in self.calls() if event == "begin")

    def busy(self):
        """Return the process of the call that began last and has not ended."""
        open_calls = {}
        for _, pid, event, at in self.calls():
            open_calls[pid] = at if event == "begin" else None
        return max((at, pid) for pid, at in open_calls.items() if at is not None)[1]

    def cost(self, at):
        """Return the repeated calls, and the seconds from a fault until the next call and until all interrupted shots ended."""
        begins, ends = ([each for each in self.calls() if each[2] == event] for event in ("begin", "end"))
        running = {each[0] for each in begins if each[3] < at} - {each[0] for each in ends if each[3] < at}
        first_ends = [min(each[3] for each in ends if each[0] == shot) for shot in running]
        return len(begins) - SHOTS, min(each[3] for each in ends if each[3] > at) - at, max(first_ends, default=at) - at


def stop_for_a_while(processes):
    for process in processes:
        process.suspend()

    def resume():
        for process in processes:
            if process.is_running():
                process.resume()

    threading.Timer(STOPPED_S, resume).start()


@pytest.mark.parametrize(
    "fault",
    [
        "frozen node",
        # As in tests/engine/test_actor_start.py, and as in test_run_survives_crashes_of_workers_encoders_nodes_and_drivers.
        *(pytest.param(fault, marks=pytest.mark.very_slow) for fault in ("frozen encoder", "frozen worker", "workers killed")),
    ],
)
def test_fault_of_a_process_costs_no_line(nodes, connected, profile, tmp_path, monkeypatch, capsys, fault):  # noqa: F811
    monkeypatch.setattr(actor_start, "SILENT_S", SILENT_S)
    log = Log(tmp_path / "log")

    def freeze_encoder():
        ours = psutil.Process().children(recursive=True)
        next(each for each in ours if "".join(each.cmdline()).startswith("ray::Encoder")).suspend()

    def freeze_node():
        raylet = psutil.Process(nodes.nodes[1].all_processes["raylet"][0].process.pid)
        stop_for_a_while([raylet, *raylet.children(recursive=True)])

    begin, every, times = {
        "frozen worker": (lambda: os.kill(log.busy(), signal.SIGSTOP), 6, 1),
        "frozen encoder": (freeze_encoder, 6, 1),
        "frozen node": (freeze_node, 6, 1),
        "workers killed": (lambda: os.kill(log.busy(), signal.SIGKILL), 4, 4),
    }[fault]
    listener = Disturbed(begin, every, times)
    started = time.monotonic()
    report, rows = run(tmp_path, profile, images(SHOTS), stages(log.work), gpus=GPUS, listener=listener)
    assert len(listener.faults_at) == times
    assert (report.done, report.failed, len(rows)) == (SHOTS, 0, SHOTS), {r.id: r.failure_message for r in rows.values()}
    done = [row.id for row in listener.rows if row.status == "done"]
    assert len(done) == len(set(done)) == SHOTS
    assert not list((tmp_path / "out").rglob(".tmp-*"))
    repeated, next_step_s, interrupted_s = log.cost(listener.faults_at[0])
    # A killed process loses the call in progress and those that it has been sent.
    assert repeated <= 8 * times
    with capsys.disabled():
        print(  # noqa: T201  # the figures of docs/reliability.md
            f"\n{fault}: {repeated} calls repeated = {repeated * WORK_S:.1f} GPU-seconds at most, next step after "
            f"{next_step_s:.1f} s, interrupted shots after {interrupted_s:.1f} s, run {time.monotonic() - started:.0f} s"
        )


def write_script(folder, lines):
    (folder / "s.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def render_folder(folder, address, *words):
    """Render the script of a folder on a cluster."""
    folder, fused = Path(folder), profile_of_fakes(load_profile("tiny"), layout="fused")
    fakes = stages(use_up_memory if words else Log(folder / "log").work)
    script = ScriptSettings(folder / "s.jsonl", profile_defaults=fused.defaults)
    options = RenderOptions(address=address, cluster=parse_gpus("2x80GB"), stages=fakes)
    render_shots(script, fused, OutputFolder(folder / "out"), options, listener=Events())


def wait_for_shots(driver, out, count):
    """Wait until a driver process has finished this number of shots."""
    deadline = time.monotonic() + 200
    while len(list(out.glob(DONE))) < count:
        assert driver.poll() is None, "the driver ended before its first shot"
        assert time.monotonic() < deadline
        time.sleep(0.02)  # polls: files do not send events


def render_with_fakes(folder, out, address):
    """Run the command with stages that do nothing and short deadlines.

    While the file `hang` of the folder exists, calls of this process to `out` hang as those to a network file system whose
    server is gone. The kernel can end those, but no process that writes to a frozen disk.
    """
    run_options.STAGE_BY_NAME = FAKES
    storage_pause.PROBE_INTERVAL_S, storage_pause.PROBE_TIMEOUT_S = 0.5, 2.0
    leases.REFRESH_S, leases.UNSURE_AFTER_S, leases.STOP_S, run_log.CLOSE_S = 0.5, 3.0, 1.0, 1.0

    def block(_, arguments):
        while any(str(each).startswith(out) for each in arguments) and os.path.exists(f"{folder}/hang"):
            time.sleep(POLL_S)  # polls: the end of a hang sends no event

    sys.addaudithook(block)
    options = ["--address", address, "--gpus", GPUS, "--profile", f"{folder}/p.yaml", "--wait-storage", "10"]
    sys.exit(main(["render", f"{folder}/s.jsonl", "--out", out, *options]))


@pytest.fixture
def command(nodes, tiny, tmp_path):
    """Return a function that starts `render_with_fakes`. Half of the lines wait until the file `gate` exists."""
    gate = [f"until {tmp_path / 'gate'}"]
    lines = [{"id": f"s{n:02}", "prompt": prompt, "num_frames": 2} for n, prompt in enumerate(["a ball"] * 4 + gate * 4)]
    write_script(tmp_path, lines)
    fakes = profile_of_fakes(tiny).model_dump(mode="json", exclude={"encode", "provenance"})
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(fakes))

    def run(out):
        with (tmp_path / "log").open("wb") as log:
            return start(render_with_fakes, tmp_path, out, nodes.address, stdout=log, stderr=subprocess.STDOUT)

    return run


@pytest.mark.timeout(600)
def test_run_whose_storage_hangs_ends_and_gives_its_gpus_back(connected, command, tmp_path):
    log, hang = tmp_path / "log", tmp_path / "hang"
    with ext4_disk(tmp_path / "disk") as disk:
        out = disk.folder / "out"
        driver = command(out)
        wait_for_shots(driver, out, 4)
        with frozen(disk.folder):
            hang.touch()
            (tmp_path / "gate").touch()
            # Workers and encoders hang in the kernel, which cannot end them.
            assert driver.wait(120) == 4, log.read_text()
            while ray.available_resources().get("GPU") != 4:
                time.sleep(POLL_S)  # polls: the cluster sends no event
        said = log.read_text()
        assert "stopped, because no file could be written to the output folder for 1" in said
        assert "Traceback" not in said
        hang.unlink()
        assert command(out).wait(300) == 0, log.read_text()
        assert {(row.id, row.status) for row in read_manifest(out)} == {(f"s{n:02}", "done") for n in range(8)}


@pytest.mark.very_slow
@pytest.mark.timeout(600)
def test_run_continues_when_its_output_folder_is_mounted_again(nodes, command, tmp_path):
    out, stored, log = tmp_path / "out", tmp_path / "stored", tmp_path / "log"
    stored.mkdir()
    with mounted_disk(out, "bind", stored, None):
        driver = command(out)
        wait_for_shots(driver, out, 4)
    (tmp_path / "gate").touch()
    while "no file can be written to" not in log.read_text():
        assert driver.poll() is None, log.read_text()
        time.sleep(POLL_S)  # polls: files do not send events
    assert not list(out.iterdir()), "nothing is written to the disk below"
    with mounted_disk(out, "bind", stored, None):
        assert driver.wait(300) == 0, log.read_text()
        assert "quarantined" not in log.read_text()
        assert {(row.id, row.status) for row in read_manifest(out)} == {(f"s{n:02}", "done") for n in range(8)}


def test_lost_head_ends_the_run_and_the_next_one_resumes(nodes, tmp_path):
    write_script(tmp_path, images(SHOTS))
    environment = {**os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "12", "RAY_BACKEND_LOG_LEVEL": "error"}
    other = small_cluster(num_cpus=8, num_gpus=2, **MEMORY)
    driver = start(render_folder, tmp_path, other.address, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for_shots(driver, tmp_path / "out", 4)
    other.head_node.kill_gcs_server()
    _, errors = driver.communicate(timeout=200)
    done = len(list((tmp_path / "out").glob(DONE)))
    other.shutdown()
    assert driver.returncode == SetupError.exit_code
    assert "lost connection to Ray: no response of its head node for 9 s" in errors
    status = json.loads((tmp_path / "out" / "status.json").read_text())
    assert (status["ended"], status["error"]) == (True, "SetupError")
    saved = [row.id for row in read_manifest(tmp_path / "out")]
    assert (len(saved), set(Counter(saved).values())) == (status["done"], {1})
    assert start(render_folder, tmp_path, nodes.address, env=environment).wait(200) == 0
    assert len(list((tmp_path / "out").glob(DONE))) == SHOTS
    rows = read_manifest(tmp_path / "out")
    # Encoders of the lost cluster may still have committed shots after the count.
    assert done <= sum(row.last_run == "reused" for row in rows) <= SHOTS


def delete_pods(nodes, driver):
    """Do to a cluster and its driver what a suspended RayJob does: KubeRay deletes all pods at once, and stops no job before.

    In each pod the main process, `ray start --block`, gets SIGTERM. It drains its node, which accepts no new actors, and then
    stops the processes of Ray. When it has ended, the kernel kills the rest of the pod. The driver is in that of the head.
    """

    def end(node):
        node._drain_node_before_shutdown()
        node.kill_all_processes(check_alive=False, allow_graceful=True, wait=True)

    with ThreadPoolExecutor(len(nodes)) as threads:
        list(threads.map(end, nodes))
    driver.kill()


def test_job_suspended_by_kueue_repeats_only_shots_in_progress(nodes, tmp_path, monkeypatch):
    write_script(tmp_path, images(SHOTS))
    monkeypatch.setattr(ray_constants, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 1.0)
    suspended = small_cluster(num_cpus=0, **MEMORY)
    suspended.add_node(num_cpus=8, num_gpus=2, **MEMORY)
    driver = start(render_folder, tmp_path, suspended.address)
    wait_for_shots(driver, tmp_path / "out", 4)
    delete_pods([suspended.head_node, *suspended.worker_nodes], driver)
    assert driver.wait() == -signal.SIGKILL
    suspended.shutdown()
    done = {json.loads(record.read_text())["shot"]["id"] for record in (tmp_path / "out").glob(DONE)}
    lost = set(Log(tmp_path / "log").begun()) - done
    assert 0 < len(lost) <= 8
    assert len(done) + len(lost) < SHOTS
    # KubeRay submits the same command to a new cluster.
    assert start(render_folder, tmp_path, nodes.address).wait(200) == 0
    rows = read_manifest(tmp_path / "out")
    assert sorted(row.id for row in rows if row.status == "done") == sorted(line["id"] for line in images(SHOTS))
    assert {row.id for row in rows if row.last_run == "reused"} == done
    begun = Log(tmp_path / "log").begun()
    repeated = {shot for shot, count in begun.items() if count > 1}
    assert repeated <= lost
    assert begun.total() == SHOTS + len(repeated)


def use_up_memory(shot):
    """Let one shot use more and more memory of its node, up to 8 GB."""
    kept = []
    while shot.id == "large" and len(kept) < 128:
        kept.append(bytearray(os.urandom(1 << 20) * 64))
        time.sleep(0.1)  # Ray looks at the memory now and then


@pytest.mark.very_slow
def test_line_that_uses_up_the_memory_of_its_node_fails_alone(tmp_path):
    """Ray's memory monitor kills its worker each time. Linux would end it with the same signal."""
    write_script(tmp_path, [*images(8), {**images(1)[0], "id": "large"}])
    memory = psutil.virtual_memory()
    limit = (memory.total - memory.available + (4 << 30)) / memory.total
    settings = {"memory_usage_threshold": limit, "memory_monitor_refresh_ms": 100}
    other = small_cluster(num_cpus=8, num_gpus=2, _system_config=settings, **MEMORY)
    assert start(render_folder, tmp_path, other.address, "memory").wait(400) == 0
    log = (Path(other.head_node.get_logs_dir_path()) / "raylet.out").read_text()
    other.shutdown()
    assert log.count("Memory on the node") >= 3, "Ray killed the worker each time"
    rows = {row.id: row for row in read_manifest(tmp_path / "out")}
    assert {row.status for name, row in rows.items() if name != "large"} == {"done"}
    assert (rows["large"].failure_error, rows["large"].failure_attempts) == ("WorkerDied", 3)


# Placement

SMALL_GB, LARGE_GB = 24.0, 80.0


@pytest.fixture(scope="module")
def with_large_flux(tiny):
    """Profile whose FLUX fits only on the larger GPUs."""
    sizes = {"instantid": 1, "flux": 60, "svd": 16, "realesrgan": 4}
    on_gpu = {"device": "cuda", "cpus": 0.5}
    actors = {name: tiny.actors[name].model_copy(update={**on_gpu, "memory_gb": gb}) for name, gb in sizes.items()}
    return tiny.model_copy(update={"name": "fakes", "actors": actors, "cpu_workers": None})


def test_large_models_are_placed_on_large_gpus(nodes, connected, with_large_flux, tmp_path):
    write_script(tmp_path, images(4))
    gpus = zip((SMALL_GB, LARGE_GB), (node.node_id for node in nodes.nodes), strict=True)
    cluster = Machines(tuple(Node((gb, gb), 8, None, ("ray.io/node-id", node)) for gb, node in gpus))
    settings = ScriptSettings(tmp_path / "s.jsonl", profile_defaults=with_large_flux.defaults)
    used = set()

    def note_nodes():
        workers = [ray.get_actor(name) for name in ray.util.list_named_actors() if "/worker/" in name]
        used.update(ray.get(worker.place.remote()).node for worker in workers)

    options = RenderOptions(cluster=cluster, stages=FAKES)
    report = render_shots(settings, with_large_flux, OutputFolder(tmp_path / "out"), options, listener=Events(note_nodes))
    assert (report.done, report.failed) == (4, 0)
    assert used == {nodes.nodes[1].node_id}, "images need only FLUX, which does not fit on the small GPUs"


def test_gpus_that_ray_cannot_distinguish_are_an_error(with_large_flux, make_shot):
    demand = demand_of([make_shot()])
    for cluster, message in (
        (parse_gpus("1x24GB+1x80GB"), "--gpus does not say which node has which GPUs"),
        (Machines((Node((SMALL_GB, LARGE_GB), 16, None, ("a", "b")),)), "Ray cannot distinguish GPUs of different sizes"),
    ):
        with pytest.raises(SetupError, match=message):
            labels_of(plan_run(with_large_flux, demand, cluster), cluster)
    alike = parse_gpus("2x80GB")
    assert set(labels_of(plan_run(with_large_flux, demand, alike), alike)) == {None}
