"""Shared test setup: one torch thread (the number of threads changes the last bits), a private home folder, tiny weights."""

import atexit
import gc
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"
# Workers, and the process that they are forked from, may start slowly. See `LOCAL_SETTINGS` in engine/ray_cluster.py.
os.environ["RAY_prestart_worker_first_driver"] = "0"  # noqa: SIM112  # Ray's spelling
os.environ["RAY_worker_register_timeout_seconds"] = "300"  # noqa: SIM112
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  # Ray's spelling
HOME = os.environ["HOME"] = tempfile.mkdtemp(prefix="vidgen-test-home-")
# Built weights depend only on their recipe, so test runs of a checkout can share them.
os.environ.setdefault("VIDGEN_CACHE", str(Path(__file__).parent.parent / ".pytest_cache" / "vidgen"))

import numpy as np
import pytest
from PIL import Image

from tests import ray_workers
from tests.small_disk import mounted_disk
from vidgen_ray.profile import ActorProfile, Profile, load_profile
from vidgen_ray.render import cache_writer
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import FaceFeatures
from vidgen_ray.system.cache_dir import cache_dir

# The disk of the machine that runs the tests may be almost full.
cache_writer.KEPT_FREE_BYTES = 0
atexit.register(shutil.rmtree, HOME, ignore_errors=True)

TESTS = Path(__file__).parent
EXAMPLES = TESTS.parent / "examples"
ASTRONAUT = EXAMPLES / "faces" / "astronaut.jpg"
SYNTHETIC = {"subject": "an image made by a test", "basis": "synthetic"}
"""Consent for photos that tests make themselves."""
CONSENT_FIELD = {"consent": "subject=an image made by a test,basis=synthetic"}
"""The same as a form field."""


def pytest_configure(config):
    # A process of pytest-xdist imports all tests, unless folders are named, whose conftest.py have imported Ray by now.
    # Tests of stages also run on machines without Ray.
    if hasattr(config, "workerinput") and "ray" not in sys.modules and find_spec("ray"):
        ray_workers.prepare()


def pytest_collection(session):
    # Test modules and what they import are millions of objects that stay. With them, a full collection takes seconds.
    gc.disable()


def pytest_collection_finish(session):
    gc.freeze()
    gc.enable()
    # pytest-xdist adds the group to the id of a test.
    if getattr(session.config.option, "loadgroup", False) and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("pytest-xdist ignores the groups of tests: use versions that work together")


LONGEST = (
    *("local_ray", "model-0", "model-1", "local_serve"),
    *("meaning/test_meaning.py", "chaos/test_chaos.py", "engine/test_fleet.py"),
    *("online/test_serve.py", "online/test_lost_node.py", "test_contributing.py", "test_job.py", "planner/test_memory.py"),
    *("test_benchmarks.py", "stages/test_fake_cuda.py", "film/test_memory.py", "client/test_distribution.py"),
    "../examples/library.ipynb",
)
"""Groups of tests that start first, so that no process works alone at the end."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Let one process run all tests of a file, one all tests of `local_ray`, and one those of `local_serve`."""
    order = {name: number for number, name in enumerate(LONGEST)}
    places = {}
    for item in items:
        if item.path.suffix == ".ipynb":
            item.add_marker("slow")
        mark = item.get_closest_marker("xdist_group")
        shared = [name for name in ("local_serve", "local_ray") if name in getattr(item, "fixturenames", ())]
        group = mark.args[0] if mark else [*shared, os.path.relpath(item.path, TESTS)][0]
        if mark is None:
            item.add_marker(pytest.mark.xdist_group(group))
        places[item] = order.get(group, len(order))
    items.sort(key=places.get)


MODULE = pytest.StashKey[Path]()
"""File of the last test."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    # A full collection would look at all that earlier files have imported: stages start one whenever they free memory of a GPU.
    if item.session.stash.get(MODULE, None) != item.path:
        item.session.stash[MODULE] = item.path
        gc.collect()
        gc.freeze()


class LocalRay:
    """Ray with 16 CPUs and two simulated GPUs of 80 GB, shared by the test modules of a process."""

    running = False

    @classmethod
    def start(cls):
        if cls.running:
            return
        # Tests of stages also run on machines without Ray.
        from vidgen_ray.engine.ray_cluster import init_local_ray
        from vidgen_ray.online import ENVIRONMENT

        os.environ.update(ENVIRONMENT)
        ray_workers.start()
        with ray_workers.gpus_of_80_gb(2):
            init_local_ray(num_cpus=16, num_gpus=2, log_to_driver=False, object_store_memory=512 << 20)
        cls.running = True

    @classmethod
    def stop(cls):
        if cls.running:
            import ray

            ray.shutdown()
            cls.running = False


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if "local_ray" not in item.fixturenames:
        LocalRay.stop()


def pytest_sessionfinish():
    LocalRay.stop()


LEFT_S = 60
"""Seconds in which the processes of tests may end after the last one."""


@pytest.fixture(scope="session", autouse=True)
def no_process_is_left():
    """Fail at the end if processes that tests have started are left, which this process will not end. End them."""
    yield
    LocalRay.stop()
    deadline = time.monotonic() + LEFT_S
    while (left := orphans()) and time.monotonic() < deadline:
        time.sleep(0.2)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert not left, "tests have left these processes"


def orphans():
    """Return the id and command of each running process with the home of these tests that does not descend from this one."""
    parents, found = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is another user's
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            parents[int(folder.name)] = int(parent)
            variables = (folder / "environ").read_bytes().split(b"\0")
            if state not in "ZX" and f"HOME={HOME}".encode() in variables:
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return {pid: command for pid, command in found.items() if os.getpid() not in ancestors(pid, parents)}


def ancestors(pid, parents):
    """Yield a process and those that it descends from. `parents`: process -> the one that has started it."""
    while pid:
        yield pid
        pid = parents.get(pid)


@pytest.fixture(scope="module")
def local_ray():
    """Use the shared Ray. It stops before the first test that does not use it."""
    LocalRay.start()


@pytest.fixture(scope="session")
def tiny() -> Profile:
    """The profile tiny, with actors of servers that do not respond."""
    profile = load_profile("tiny")
    options = {"servers": ["http://127.0.0.1:9"], "reported": "unknown"}
    remote = ActorProfile(weights="remote:tiny", cpus=0.25, options=options)
    return profile.model_copy(update={"actors": {**profile.actors, "remote": remote, "remote_image": remote}})


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """Photo of a face, (512, 512, 3)."""
    return np.asarray(Image.open(ASTRONAUT).convert("RGB"))


@pytest.fixture(scope="session")
def make_shot(tiny):
    """Return a function that creates a shot with the tiny profile's defaults and a fixed seed."""

    def make(**fields) -> Shot:
        return Shot(**{**tiny.defaults, "id": "s", "prompt": "a photo of a man", "seed": 7, **fields})

    return make


@pytest.fixture
def face():
    """Features of a face that no model has found."""
    rng = np.random.default_rng(0)
    unit = rng.standard_normal(512).astype("f")
    embeddings = {"antelopev2": rng.standard_normal(512).astype("f"), "ir_se50": unit / np.linalg.norm(unit)}
    points = np.array([[40, 30], [60, 30], [50, 40], [42, 50], [58, 50]], "f")
    return FaceFeatures(embeddings, points, (30, 20, 70, 60), 0.9, 1, (100, 80), "d")


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Cache folder of one test, with the weights that all tests build."""
    built, folder = cache_dir() / "builtin", tmp_path / "own-cache"
    built.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    (folder / "builtin").symlink_to(built)
    monkeypatch.setenv("VIDGEN_CACHE", str(folder))
    return folder


@pytest.fixture
def small_disk(tmp_path):
    with mounted_disk(tmp_path / "disk") as disk:
        yield disk


@pytest.fixture
def held(server):
    """Keep jobs in the queue during the test. `server`: the fixture of the test's module, a LocalServer."""
    server.director.held.set()
    yield
    # What the test has created needs no rendering.
    for job_id in server.store.queue_order():
        server.store.request_cancel(job_id, None)
    server.director.held.clear()
    server.director.wake()
