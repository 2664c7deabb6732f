"""Faults of real processes in a run on two nodes: frozen workers, encoders and nodes, workers that are killed again and again.

Every line ends as done, no shot is committed twice, and each test prints what the fault cost.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import ray
from ray._private import ray_constants

from tests.batch.faulty_stages import append, stages
from tests.batch.test_batch import DONE, Events
from tests.batch.test_health import images, profile, run  # noqa: F401  # a fixture
from tests.ray_workers import own_workers, small_cluster
from vidgen_ray.engine import actor_client
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.manifest import read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster", "second_node")]
ROOT = Path(__file__).parents[2]
MEMORY = {"object_store_memory": 200 << 20}
TWO_NODES = "2x2x80GB"
WORK_S = 0.5
"""Simulated duration of a shot."""
SILENT_S = 3.0
STOPPED_S = 6.0
"""Seconds for which a node is stopped: longer than the deadline of a ping."""
SHOTS = 24


@pytest.fixture(scope="module")
def cluster():
    """Cluster whose first node has two simulated GPUs."""
    os.environ["PYTHONPATH"] = str(ROOT)
    cluster = small_cluster(num_cpus=12, num_gpus=2, **MEMORY)
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    os.environ.pop("PYTHONPATH")


@pytest.fixture
def second_node(cluster):
    """Node with two more GPUs."""
    added = cluster.add_node(num_cpus=12, num_gpus=2, **MEMORY, **own_workers())
    cluster.wait_for_nodes()
    yield added
    if added in cluster.worker_nodes:
        cluster.remove_node(added)


class Disturbed(Events):
    """Listener that calls `fault` after every `every` finished shots, `times` times."""

    def __init__(self, fault, every=6, times=1):
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
        "frozen encoder",
        "frozen node",
        # As the encoder, and as in test_run_survives_crashes_of_workers_encoders_and_node.
        *(pytest.param(fault, marks=pytest.mark.very_slow) for fault in ("frozen worker", "workers killed")),
    ],
)
def test_fault_of_a_process_costs_no_line(request, profile, tmp_path, monkeypatch, capsys, fault):  # noqa: F811
    monkeypatch.setattr(actor_client, "SILENT_S", SILENT_S)
    log, every, times = Log(tmp_path / "log"), 6, 1

    def freeze_encoder():
        ours = psutil.Process().children(recursive=True)
        next(each for each in ours if "".join(each.cmdline()).startswith("ray::Encoder")).suspend()

    def freeze_node():
        raylet = psutil.Process(request.getfixturevalue("second_node").all_processes["raylet"][0].process.pid)
        stop_for_a_while([raylet, *raylet.children(recursive=True)])

    begin = {
        "frozen worker": lambda: os.kill(log.busy(), signal.SIGSTOP),
        "frozen encoder": freeze_encoder,
        "frozen node": freeze_node,
        "workers killed": lambda: os.kill(log.busy(), signal.SIGKILL),
    }[fault]
    if fault == "workers killed":
        every, times = 4, 4
    listener = Disturbed(begin, every, times)
    started = time.monotonic()
    report, rows = run(tmp_path, profile, images(SHOTS), stages(log.work), gpus=TWO_NODES, listener=listener)
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


DRIVER = """
import sys
from pathlib import Path
from tests.batch.faulty_stages import stages
from tests.batch.test_batch import Events
from tests.chaos.test_real_faults import Log, use_up_memory
from tests.fake_stages import profile_of_fakes
from vidgen_ray.batch.render_script import render
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.planner import parse_gpus
from vidgen_ray.profile import load_profile
from vidgen_ray.script.lines import ScriptSettings
folder, address = Path(sys.argv[1]), sys.argv[2]
profile = profile_of_fakes(load_profile("tiny"), layout="fused")
work = use_up_memory if "memory" in sys.argv else Log(folder / "log").work
options = RenderOptions(address=address, cluster=parse_gpus("2x80GB"), stages=stages(work))
script = ScriptSettings(folder / "s.jsonl", profile_defaults=profile.defaults)
render(script, profile, OutputFolder(folder / "out"), options, listener=Events())
"""


def wait_for_shots(driver, out, count):
    """Wait until a driver process has finished this number of shots."""
    deadline = time.monotonic() + 200
    while len(list(out.glob(DONE))) < count:
        assert driver.poll() is None, "the driver ended before its first shot"
        assert time.monotonic() < deadline
        time.sleep(0.02)  # polls: files do not send events


def test_lost_head_ends_the_run_and_the_next_one_resumes(cluster, second_node, tmp_path):
    (tmp_path / "s.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in images(SHOTS)))
    environment = {**os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "2", "RAY_BACKEND_LOG_LEVEL": "error"}
    other = small_cluster(num_cpus=8, num_gpus=2, **MEMORY)
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    driver = subprocess.Popen([*command, other.address], env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    wait_for_shots(driver, tmp_path / "out", 4)
    other.head_node.kill_gcs_server()
    _, errors = driver.communicate(timeout=200)
    done = len(list((tmp_path / "out").glob(DONE)))
    other.shutdown()
    assert driver.returncode == SetupError.exit_code
    assert "lost connection to Ray: no response of its head node for 1.5 s" in errors
    subprocess.run([*command, cluster.address], env=environment, check=True, timeout=200, cwd=ROOT)
    assert len(list((tmp_path / "out").glob(DONE))) == SHOTS
    rows = read_manifest(tmp_path / "out")
    # Encoders of the lost cluster may still have committed shots after the count.
    assert done <= sum(row.last_run == "reused" for row in rows) < SHOTS


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


def test_job_suspended_by_kueue_repeats_only_shots_in_progress(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_constants, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 1.0)
    (tmp_path / "s.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in images(SHOTS)))
    suspended = small_cluster(num_cpus=0, **MEMORY)
    suspended.add_node(num_cpus=8, num_gpus=2, **MEMORY)
    command = [sys.executable, "-c", DRIVER, str(tmp_path)]
    driver = subprocess.Popen([*command, suspended.address], cwd=ROOT)
    wait_for_shots(driver, tmp_path / "out", 4)
    delete_pods([suspended.head_node, *suspended.worker_nodes], driver)
    assert driver.wait() == -signal.SIGKILL
    suspended.shutdown()
    done = {json.loads(record.read_text())["shot"]["id"] for record in (tmp_path / "out").glob(DONE)}
    calls_before = Log(tmp_path / "log").begun()
    lost = set(calls_before) - done
    assert 0 < len(lost) <= 8
    assert len(done) + len(lost) < SHOTS
    # KubeRay submits the same command to a new cluster.
    subprocess.run([*command, cluster.address], check=True, timeout=200, cwd=ROOT)
    rows = read_manifest(tmp_path / "out")
    assert sorted(row.id for row in rows if row.status == "done") == sorted(line["id"] for line in images(SHOTS))
    assert {row.id for row in rows if row.last_run == "reused"} == done
    calls = Log(tmp_path / "log").begun()
    repeated = {shot for shot, count in calls.items() if count > 1}
    assert repeated <= lost
    assert sum(calls.values()) == SHOTS + len(repeated)


def use_up_memory(shot):
    """Let one shot use more and more memory of its node, up to 8 GB."""
    kept = []
    while shot.id == "large" and len(kept) < 128:
        kept.append(bytearray(os.urandom(1 << 20) * 64))
        time.sleep(0.1)  # Ray looks at the memory now and then


@pytest.mark.very_slow
def test_line_that_uses_up_the_memory_of_its_node_fails_alone(tmp_path):
    """Ray's memory monitor kills its worker each time. Linux would end it with the same signal."""
    lines = [*images(8), {**images(1)[0], "id": "large"}]
    (tmp_path / "s.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    memory = psutil.virtual_memory()
    limit = (memory.total - memory.available + (4 << 30)) / memory.total
    settings = {"memory_usage_threshold": limit, "memory_monitor_refresh_ms": 100}
    other = small_cluster(num_cpus=8, num_gpus=2, _system_config=settings, **MEMORY)
    driver = subprocess.run([sys.executable, "-c", DRIVER, str(tmp_path), other.address, "memory"], timeout=400, cwd=ROOT)
    log = (Path(other.head_node.get_logs_dir_path()) / "raylet.out").read_text()
    other.shutdown()
    assert driver.returncode == 0
    assert log.count("Memory on the node") >= 3, "Ray killed the worker each time"
    rows = {row.id: row for row in read_manifest(tmp_path / "out")}
    assert {row.status for name, row in rows.items() if name != "large"} == {"done"}
    assert (rows["large"].failure_error, rows["large"].failure_attempts) == ("WorkerDied", 3)
