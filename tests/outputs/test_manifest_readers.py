"""The lines of docs/outputs.md that read the manifest with other libraries, and its schema."""

import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from tests.outputs.test_outputs import commit
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import SCHEMA, SETTINGS, VERSION, ManifestRow, read_manifest
from vidgen_ray.outputs.manifest_writer import ManifestWriter
from vidgen_ray.outputs.records import Failure
from vidgen_ray.shot import Shot

PAGE = (Path(__file__).parents[2] / "docs" / "outputs.md").read_text()
LIBRARIES = ("pyarrow", "pandas", "duckdb", "datasets")
RUNS = ("1-r", "2-r")


@pytest.fixture
def out(tmp_path, plan_of):
    """Two shots that a second run has reused, and one that has failed in both."""
    outputs = OutputFolder(tmp_path / "out")
    plans = [plan_of(name, metadata={"matrix": {"scale": 2}}) for name in "ab"]
    records = [commit(outputs, plan) for plan in plans]
    for run, last_run in zip(RUNS, ("rendered", "reused"), strict=True):
        writer = ManifestWriter(outputs, run, "s.jsonl")
        for number, (plan, record) in enumerate(zip(plans, records, strict=True), start=1):
            writer.add(ManifestRow.of_shot(run, "s.jsonl", plan.shot, number, record, last_run))
        failure = Failure(stage="svd", error="E", message="m", attempts=1, worker="w")
        writer.add(ManifestRow.of_shot(run, "s.jsonl", plan_of("c").shot, 3, failure, "failed"))
        writer.close()
    return tmp_path / "out"


@pytest.mark.parametrize("library", LIBRARIES)
def test_documented_line_reads_the_finished_shots_of_several_runs(out, library):
    pytest.importorskip(library)
    (line,) = re.findall(rf"^(rows = .*\b{library}\b.*)$", PAGE, re.MULTILINE)
    names: dict = {}
    exec(f"import {library}\n{line.replace('OUT/', f'{out}/')}", names)
    assert len(names["rows"]) == 2


def test_status_is_that_of_the_shot_and_last_run_that_of_the_run(out):
    rows = sorted(read_manifest(out), key=lambda row: row.id)
    assert [(row.status, row.last_run) for row in rows] == [("done", "reused"), ("done", "reused"), ("failed", "failed")]
    assert all(row.metadata == '{"matrix": {"scale": 2}}' for row in rows[:2])


def test_every_setting_of_a_shot_is_a_typed_column(out):
    not_settings = {"id", "prompt", "mode", "seed", "width", "height", "num_frames", "fps", "consent", "metadata"}
    assert set(SETTINGS.values()) == Shot.model_fields.keys() - not_settings - {"variants", "character", "priority"}
    columns = {name: SCHEMA.field(column).type for column, name in SETTINGS.items()}
    for name, kind in {
        "lora": pyarrow.list_(pyarrow.struct([("path", pyarrow.string()), ("weight", pyarrow.float64())])),
        "scale": pyarrow.int64(),
        "lora_strength": pyarrow.float64(),
        "upscale_video": pyarrow.bool_(),
        "video_model": pyarrow.string(),
    }.items():
        assert columns[name] == kind, name
    table = pyarrow.parquet.read_table(out / "manifest")
    assert table.schema.metadata[b"vidgen.manifest"] == str(VERSION).encode()
    schema = ManifestRow.model_json_schema()
    assert schema["version"] == VERSION
    assert schema["properties"]["duration_s"]["description"] == "Seconds that the clip lasts."
    assert schema["properties"]["scale"]["description"] == Shot.model_fields["scale"].description


def test_lora_steps_and_size_are_those_of_the_shot(plan_of):
    fields = {"lora": [{"path": "a.safetensors", "weight": 0.5}], "steps": {"flux": 3}, "scale": 2, "width": 128, "height": 64}
    shot = Shot(id="x", prompt="a", seed=1, num_frames=10, fps=4, **fields)
    failure = Failure(stage="svd", error="E", message="m", attempts=1, worker="w")
    row = ManifestRow.of_shot("r", "s", shot, 1, failure, "failed")
    assert (row.lora, row.steps, row.scale) == ([{"path": "a.safetensors", "weight": 0.5}], {"flux": 3}, 2)
    assert (row.hd_width, row.hd_height, row.duration_s) == (256, 128, 2.5)
