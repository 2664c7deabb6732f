"""Ray Data processor: rendering as a step of a Ray Data pipeline."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import ray
import ray.data

from tests.fake_stages import FAKES
from vidgen_ray.batch.render import RenderOptions
from vidgen_ray.data import build_processor
from vidgen_ray.engine.ray_cluster import init_local_ray


@pytest.fixture(scope="module", autouse=True)
def own_ray():
    init_local_ray(num_cpus=8, log_to_driver=False)
    yield
    ray.shutdown()


def test_rows_become_result_rows_between_other_steps(tiny, tmp_path):
    rows = [{"id": f"s{n}", "caption": f"shot {n}", "extra": n} for n in range(5)]
    rows[3]["caption"] = "raise"
    prompts = ray.data.from_items(rows).map(lambda row: {**row, "caption": row["caption"].strip()})
    processor = build_processor(
        tiny,
        tmp_path / "out",
        name="captions",
        defaults={"scale": 2},
        to_fields=lambda row: {"id": row["id"], "prompt": row["caption"], "metadata": {"extra": row["extra"]}},
        options=RenderOptions(stages=FAKES),
    )
    results = processor(prompts).map(
        lambda row: {**row, "bytes": Path(row["hd_video"]).stat().st_size if row["hd_video"] else 0}
    )
    by_id = {row["id"]: row for row in results.iter_rows()}
    assert sorted(by_id) == ["s0", "s1", "s2", "s3", "s4"]
    assert {name: row["status"] for name, row in by_id.items()} == {
        "s0": "done", "s1": "done", "s2": "done", "s3": "failed", "s4": "done",
    }  # fmt: skip
    assert (by_id["s3"]["failure_stage"], by_id["s3"]["failure_error"]) == ("flux", "RuntimeError")
    assert by_id["s0"]["bytes"] > 0
    assert by_id["s0"]["seconds"] > 0
    assert json.loads(by_id["s2"]["metadata"]) == {"extra": 2}
    manifest = {row["id"]: row for row in pq.read_table(tmp_path / "out" / "manifest").to_pylist()}
    assert manifest["s0"]["script"] == "captions"
    assert by_id["s0"]["hd_video"] == str(tmp_path / "out" / manifest["s0"]["hd_video"])
    again = {row["id"]: row["status"] for row in processor(prompts).iter_rows()}
    assert again["s0"] == "skipped"


def test_wrong_rows_are_failed_results(tiny, tmp_path):
    dataset = ray.data.from_items([{"id": "a", "prompt": "x", "fps": 0}, {"id": "b", "prompt": None, "fps": None}])
    results = build_processor(tiny, tmp_path / "out", options=RenderOptions(stages=FAKES))(dataset)
    rows = {row["id"]: row for row in results.iter_rows()}
    assert rows["a"]["status"] == "failed"
    assert rows["a"]["failure_message"].startswith("dataset, fps: got 0")
    assert rows["b"]["failure_message"].startswith("dataset, prompt: got nothing")


class HoldsCpus:
    """Step that passes its first row on, and the others when rendering has said what it waits for."""

    def __init__(self, message):
        self._message, self._rows = message, 0

    def __call__(self, batch):
        while self._rows and not self._message.exists():
            time.sleep(0.1)  # polls: files do not send events
        self._rows += 1
        return batch


@pytest.mark.slow
def test_message_names_the_step_that_holds_what_rendering_waits_for(tiny, tmp_path):
    message = tmp_path / "message"
    rows = ray.data.from_items(
        [{"id": f"s{n}", "prompt": "x", "generate_video": False} for n in range(3)], override_num_blocks=3
    )
    step = rows.map_batches(
        HoldsCpus,
        fn_constructor_args=(message,),
        batch_size=1,
        num_cpus=8,
        compute=ray.data.ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=1),
    )
    options = RenderOptions(stages=FAKES)
    results = build_processor(tiny, tmp_path / "out", options=options, on_message=message.write_text)(step)
    assert [row["status"] for row in results.iter_rows()] == ["done"] * 3
    text = message.read_text()
    assert text.startswith("waiting for ")
    assert "others hold 8 CPUs, among them the steps of data sets: MapBatches(HoldsCpus) with 1 actor" in text


@pytest.mark.slow
def test_message_says_that_the_steps_before_may_wait_for_what_rendering_holds(tiny, tmp_path):
    message = tmp_path / "message"

    @ray.remote(num_cpus=0)
    def execute():
        rows = [{"id": f"s{n}", "prompt": "x", "generate_video": False} for n in range(20)]
        step = ray.data.from_items(rows, override_num_blocks=20).map(lambda row: row, num_cpus=6, concurrency=1)
        options = RenderOptions(stages=FAKES)
        list(build_processor(tiny, tmp_path / "out", options=options, on_message=message.write_text)(step).iter_rows())

    execution = execute.remote()
    while not message.exists():
        assert not ray.wait([execution], timeout=0.2)[0], "it does not end"
    assert "no line has come for 30 s. Rendering holds" in message.read_text()
    ray.cancel(execution, force=True)


def kill_director(row, driver):
    """Kill the task that renders, which is a child of the driver's processes."""
    for process in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "OneTask" in "".join(process.cmdline()[:1]):
                process.kill()
    return row


def test_lost_task_fails_the_execution(tiny, tmp_path):
    shots = [{"id": "done", "prompt": "x"}, {"id": "waits", "prompt": f"until {tmp_path / 'never'}"}]
    rows = ray.data.from_items([{**shot, "generate_video": False} for shot in shots])
    processor = build_processor(tiny, tmp_path / "out", options=RenderOptions(stages=FAKES))
    with pytest.raises(Exception, match="worker died unexpectedly"):
        list(processor(rows).map(kill_director, fn_kwargs={"driver": os.getpid()}).iter_rows())
