"""Ray Data processor: rendering as a step of a Ray Data pipeline."""

import json
import os
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import ray.data

from tests.fake_stages import FAKES, profile_of_fakes
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.data import build_processor
from vidgen_ray.planner import parse_gpus

pytestmark = pytest.mark.usefixtures("local_ray")


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


def test_leaving_the_loop_returns_the_gpus(tiny, tmp_path):
    def free():
        return ray.available_resources().get("GPU", 0)

    before = free()
    assert before
    rows = [{"id": f"s{n}", "prompt": "a"} for n in range(40)]
    options = RenderOptions(cluster=parse_gpus("1x80GB"), stages=FAKES)
    for _ in build_processor(profile_of_fakes(tiny), tmp_path / "out", options=options)(ray.data.from_items(rows)).iter_rows():
        assert free() == before - 1
        break
    deadline = time.monotonic() + 60
    while free() != before:
        assert time.monotonic() < deadline
        time.sleep(0.1)  # no notification is available


def test_wrong_rows_are_failed_results(tiny, tmp_path):
    dataset = ray.data.from_items([{"id": "a", "prompt": "x", "fps": 0}, {"id": "b", "prompt": None, "fps": None}])
    results = build_processor(tiny, tmp_path / "out", options=RenderOptions(stages=FAKES))(dataset)
    rows = {row["id"]: row for row in results.iter_rows()}
    assert rows["a"]["status"] == "failed"
    assert rows["a"]["failure_message"].startswith("dataset, fps: got 0")
    assert rows["b"]["failure_message"].startswith("dataset, prompt: got nothing")


def test_lost_task_is_refused_a_second_attempt_by_ray_without_the_option_to_run_once(tiny, tmp_path, monkeypatch):
    """Ray 2.64 has no such option, and would repeat the task and skip as many results as the first attempt has returned."""
    monkeypatch.setattr("vidgen_ray.data._once", dict)
    lost = tmp_path / "lost"

    def lose_task(message):
        lost.touch()
        os._exit(1)

    # A setting without effect is a message, which this task receives.
    dataset = ray.data.from_items([{"id": f"s{n}", "prompt": "a", "generate_video": False, "fps": 6} for n in range(3)])
    processor = build_processor(tiny, tmp_path / "out", options=RenderOptions(stages=FAKES), on_message=lose_task)
    with pytest.raises(ray.exceptions.RayError, match="was lost with its process"):
        processor(dataset).take_all()
    assert lost.exists()
