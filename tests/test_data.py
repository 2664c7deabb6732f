"""Ray Data processor: rendering as a step of a Ray Data pipeline."""

import json
import os
import time
import warnings
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
import ray.data
from PIL import Image
from ray.util.annotations import RayDeprecationWarning

from tests.fake_stages import FAKES, profile_of_fakes
from vidgen_ray.batch.run_options import RenderOptions
from vidgen_ray.data import build_processor
from vidgen_ray.errors import UsageError
from vidgen_ray.planner.cluster import parse_gpus

pytestmark = pytest.mark.usefixtures("local_ray")


def test_rows_become_result_rows_between_other_steps(tiny, tmp_path):
    photo = tmp_path / "photo.png"
    Image.new("RGB", (64, 64)).save(photo)
    rows = [{"id": f"s{n}", "caption": f"shot {n}", "extra": n, "fps": 6, "photo": None if n else str(photo)} for n in range(7)]
    rows[3]["caption"] = "raise"
    rows[5]["fps"] = 0
    rows[6]["caption"] = " "
    prompts = ray.data.from_items(rows).map(lambda row: {**row, "caption": row["caption"].strip()})
    processor = build_processor(
        tiny,
        tmp_path / "out",
        name="captions",
        defaults={"scale": 2},
        to_fields=lambda row: {
            "id": row["id"],
            "prompt": row["caption"],
            "fps": row["fps"],
            "image": row["photo"],
            "extra": row["extra"],
        },
        keep_columns=True,
        options=RenderOptions(stages=FAKES),
    )
    results = processor(prompts).map(
        lambda row: {**row, "bytes": Path(row["hd_video"]).stat().st_size if row["hd_video"] else 0}
    )
    by_id = {row["id"]: row for row in results.iter_rows()}
    failures = {"s3": ("flux", "RuntimeError"), "s5": ("script", "ScriptError"), "s6": ("script", "ScriptError")}
    failed = {name: (row["failure_stage"], row["failure_error"]) for name, row in by_id.items() if row["status"] != "done"}
    assert (len(by_id), failed) == (7, failures)
    assert by_id["s5"]["failure_message"].startswith("captions, fps: got 0")
    assert by_id["s6"]["failure_message"].startswith("captions, prompt: got ")
    assert by_id["s0"]["bytes"] > 0
    assert by_id["s0"]["seconds"] > 0
    assert json.loads(by_id["s2"]["metadata"]) == {"extra": 2}
    manifest = {row["id"]: row for row in pq.read_table(tmp_path / "out" / "manifest").to_pylist()}
    assert manifest["s0"]["script"] == "captions"
    assert by_id["s0"]["hd_video"] == str(tmp_path / "out" / manifest["s0"]["hd_video"])
    # Another data set replaces none of them.
    other = build_processor(tiny, tmp_path / "out", name="other", options=RenderOptions(stages=FAKES))
    (row,) = other(ray.data.from_items([{"id": "s2", "prompt": "another"}])).iter_rows()
    assert "which is a finished shot of captions" in row["failure_message"]
    with pytest.raises(TypeError, match="'name'"):
        build_processor(tiny, tmp_path / "out")


def test_leaving_the_results_returns_the_gpus(tiny, tmp_path):
    def wait_for(free_gpus):
        deadline = time.monotonic() + 240
        while ray.available_resources().get("GPU", 0) != free_gpus:
            assert time.monotonic() < deadline
            time.sleep(0.1)  # no notification is available

    total = ray.cluster_resources()["GPU"]
    # The first result is there at once, the second never.
    dataset = ray.data.from_items([{"id": "wrong", "prompt": "a", "fps": 0}, {"id": "hangs", "prompt": "hang", "fps": 6}])
    options = RenderOptions(cluster=parse_gpus("1x80GB"), stages=FAKES)
    results = build_processor(profile_of_fakes(tiny), tmp_path / "out", name="prompts", options=options)(dataset)
    # By default, Ray passes a block on when it has the next one.
    rows = results.iter_batches(batch_size=None, prefetch_batches=0)
    next(iter(rows))
    wait_for(total - 1)
    del rows
    wait_for(total)


def test_lost_task_is_refused_a_second_attempt(tiny, tmp_path):
    """Ray would repeat the task and skip as many results as the first attempt has returned."""
    lost = tmp_path / "lost"

    def lose_task(message):
        lost.touch()
        os._exit(1)

    # A setting without effect is a message, which this task receives.
    dataset = ray.data.from_items([{"id": f"s{n}", "prompt": "a", "generate_video": False, "fps": 6} for n in range(3)])
    processor = build_processor(
        tiny, tmp_path / "out", name="prompts", options=RenderOptions(stages=FAKES), on_message=lose_task
    )
    with pytest.raises(ray.exceptions.RayError, match="was lost with its process"):
        processor(dataset).take_all()
    assert lost.exists()


def test_results_have_blocks_of_several_rows_and_no_deprecated_arguments_of_ray(tiny, tmp_path):
    dataset = ray.data.from_items([{"id": f"s{n}", "prompt": "a", "generate_video": False} for n in range(40)])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RayDeprecationWarning)
        options = RenderOptions(cluster=parse_gpus("1x80GB"), stages=FAKES)
        processor = build_processor(profile_of_fakes(tiny), tmp_path / "out", name="prompts", options=options)
        ids = [row["id"] for row in processor(dataset).map(lambda row: {"id": row["id"]}).iter_rows()]
    assert sorted(ids) == sorted(f"s{n}" for n in range(40))
    # All shots are skipped, so the results of a block are there at once. Blocks grow with the time since the start.
    samples = processor(dataset).map(lambda row: {"__key__": row["id"], "bin": Path(row["image"]).read_bytes()})
    samples.write_webdataset(tmp_path / "tars")
    assert 1 <= len(list((tmp_path / "tars").glob("*.tar"))) < 20


def test_preserve_order_is_refused(tiny, tmp_path):
    dataset = ray.data.from_items([{"prompt": "a"}])
    dataset.context.execution_options.preserve_order = True
    with pytest.raises(UsageError, match="preserve_order: got True, must be False"):
        build_processor(tiny, tmp_path / "out", name="prompts")(dataset)
