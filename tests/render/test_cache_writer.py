"""Stage cache of a process: what is kept, writing in the background, limits, and storage that cannot be written."""

import subprocess
import sys
import threading
from unittest.mock import Mock

import numpy as np
import pytest

from tests.fake_stages import FAKES
from vidgen_ray.engine.config import EngineConfig
from vidgen_ray.engine.worker import Worker
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.stage_cache import StageCache
from vidgen_ray.planner.layout import Layout, Slot, WorkerSpec
from vidgen_ray.render import cache_writer
from vidgen_ray.render.cache_writer import CacheSettings, CacheWriter, bytes_per_worker
from vidgen_ray.stages.base import Likeness

KEYS = [f"{number:02x}" * 32 for number in range(8)]
IMAGE = np.arange(3 * 64 * 64, dtype=np.uint8).reshape(64, 64, 3)


@pytest.fixture
def cache(tmp_path):
    return OutputFolder(tmp_path).stage_cache


@pytest.mark.parametrize(("mode", "kept"), [("images", [True, True, False]), ("all", [True, True, True])])
def test_mode_decides_what_is_kept(cache, mode, kept):
    writer = CacheSettings(mode).open(cache)
    results = [{"image": IMAGE}, {"clip_likeness": Likeness((0.5, None))}, {"frames": np.stack([IMAGE, IMAGE])}]
    for key, result in zip(KEYS, results, strict=False):
        writer.put(key, result)
    writer.close()
    assert [cache.has(key) for key in KEYS[:3]] == kept
    np.testing.assert_array_equal(writer.get(KEYS[0], ["image"])["image"], IMAGE)
    assert CacheSettings("none").open(cache) is None


def test_put_does_not_wait_for_the_storage_and_drops_results_while_too_much_is_queued(cache, monkeypatch):
    monkeypatch.setattr(cache_writer, "MAX_QUEUED_BYTES", 2 * IMAGE.nbytes)
    begun, released, put = threading.Event(), threading.Event(), StageCache.put

    def slow_put(self, key, artefacts):
        begun.set()
        assert released.wait(60)
        return put(self, key, artefacts)

    monkeypatch.setattr(StageCache, "put", slow_put)
    writer, image = CacheSettings().open(cache), IMAGE.copy()
    for key in KEYS[:4]:
        writer.put(key, {"image": image})
    assert begun.wait(60)
    assert not cache.has(KEYS[0])
    with pytest.raises(ValueError, match="read-only"):
        image[:] = 0
    released.set()
    writer.close()
    assert [cache.has(key) for key in KEYS[:4]] == [True, True, False, False]
    writer.put(KEYS[4], {"image": IMAGE})
    assert not cache.has(KEYS[4]), "it is closed"


def test_queued_results_are_written_at_the_end_of_the_process_and_failures_are_reported_once(cache, tmp_path):
    """The kernel refuses to let a file grow, as on a full disk."""
    code = f"""
import logging, resource
import numpy as np
from vidgen_ray.render.cache_writer import CacheSettings
from vidgen_ray.outputs.folder import OutputFolder
logging.basicConfig()
writer = CacheSettings("all").open(OutputFolder({str(tmp_path)!r}).stage_cache)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
noise = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
writer.put("00" * 32, {{"image": noise[0]}})
writer.put("01" * 32, {{"frames": noise}})
writer.put("02" * 32, {{"image": np.zeros((8, 8, 3), np.uint8)}})
"""
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert [cache.has(key) for key in KEYS[:3]] == [False, False, True], "an entry that fits is still written"
    assert ended.stderr.count("is not cached") == 1
    assert "File too large" in ended.stderr
    assert not list((tmp_path / "cache").glob(".tmp-*"))


@pytest.mark.parametrize(("total_gb", "free_gb", "kept"), [(99, 9, False), (99, 11, True), (990, 49, False), (990, 51, True)])
def test_caching_stops_when_the_disk_is_almost_full(cache, monkeypatch, total_gb, free_gb, kept):
    monkeypatch.setattr(cache_writer, "KEPT_FREE_BYTES", 50 * 10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Mock(total=total_gb * 10**9, free=free_gb * 10**9))
    CacheWriter(cache, CacheSettings(wait=True)).put(KEYS[0], {"image": IMAGE})
    assert cache.has(KEYS[0]) is kept


def test_limit_of_a_run_is_divided_among_the_workers_that_write(cache):
    writer = CacheWriter(cache, CacheSettings(max_bytes=1, wait=True))
    for key in KEYS[:3]:
        writer.put(key, {"image": IMAGE})
    assert [cache.has(key) for key in KEYS[:3]] == [True, False, False]

    def slot(*stages):
        return Slot((WorkerSpec(stages, cpus=1, gpus=1),), memory_gb=1)

    def layout(*slots):
        return Layout("staged", slots, encoders=1, window=1)

    assert bytes_per_worker(3, layout(slot("flux", "svd"), slot("realesrgan"))) == 3_000_000_000
    assert bytes_per_worker(3, layout(slot("flux"), slot("svd", "realesrgan"))) == 1_500_000_000
    assert bytes_per_worker(None, layout(slot("flux"))) is None


def test_worker_that_stops_frees_its_gpu_before_it_writes_its_cache(tiny, tmp_path):
    """The write may hang."""
    worker = Worker(EngineConfig("run", tiny, OutputFolder(tmp_path), FAKES), WorkerSpec(("flux",), cpus=1, gpus=0))
    assert worker.load() is None
    runner, loaded = worker._loaded, []
    runner.close = lambda: loaded.append("loaded" in vars(runner.stages["flux"]))
    assert runner.stages["flux"].loaded
    worker.close()
    assert loaded == [False]
