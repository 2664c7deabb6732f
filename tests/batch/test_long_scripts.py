"""Long scripts: constant memory, and an order of shots that minimizes LoRA changes."""

import json
import random
import subprocess
import sys
from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vidgen_ray.batch.shot_queue import ShotQueue, Task
from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.script.lines import ScriptSettings
from vidgen_ray.script.read import iter_script
from vidgen_ray.shot import Shot

SHORT = 300
GROWTH_MB = 24
"""Allowed growth of peak memory from a script of this many lines to one with ten times as many or more."""
READ_AND_PLAN = """
import json, sys
from pathlib import Path
from vidgen_ray.graph import STAGES
from vidgen_ray.content_keys import ShotPlanner
from vidgen_ray.media.encode import Mp4Settings
from vidgen_ray.remote.stages import RemoteParams
from vidgen_ray.script.read import iter_script
from vidgen_ray.script.lines import ScriptSettings

weights = Path(sys.argv[1])
params = {
    stage.name: stage.Params(weights=weights, extra_weights=dict.fromkeys(stage.extra_weights, weights))
    for stage in STAGES
    if not issubclass(stage.Params, RemoteParams)
}

def peak_mb():
    # Unlike getrusage, VmHWM does not include the peak of the parent process.
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024

def run(script):
    counts = {"shots": 0, "rejected": 0, "plans": 0}
    def shots():
        for line in iter_script(ScriptSettings(script, profile_defaults={"scale": 2, "steps": {"flux": 4}})):
            counts["rejected" if line.errors else "shots"] += 1
            yield from line.shots
    for plan in map(ShotPlanner(params, Mp4Settings()), shots()):
        counts["plans"] += 1
        plan.model_dump_json()
    return {**counts, "peak_mb": peak_mb()}

print(json.dumps([run(Path(script)) for script in sys.argv[2:]]))
"""


def fields_of(number):
    """Return one line of a mixed script: every 20th is rejected, every 50th repeats an id, every second refers to files."""
    fields = {"id": f"shot-{number * 7919 % 1_000_003}", "prompt": f"shot {number}: a red ball rolls over a meadow at dawn"}
    if number % 20 == 5:
        fields["fps"] = 0
    elif number % 50 == 7:
        fields["id"] = f"shot-{(number - 1) * 7919 % 1_000_003}"
    if number % 2:
        fields |= {
            "consent": "subject=x,basis=synthetic",
            "face_image": f"face{number % 11}.jpg",
            "lora": f"lora{number % 5}.safetensors",
        }
    if number % 3 == 0:
        fields["metadata"] = {"scene": number, "take": "first"}
    return fields


def write_script(path, lines):
    if path.suffix == ".parquet":
        names = sorted({name for number in range(100) for name in fields_of(number)})
        schema = pa.schema([(name, pa.array([fields_of(n).get(name) for n in range(100)]).type) for name in names])
        batches = (map(fields_of, range(first, min(first + 50_000, lines))) for first in range(0, lines, 50_000))
        table = pa.concat_tables([pa.Table.from_pylist(list(batch), schema=schema) for batch in batches])
        # A single row group: the worst case for the memory of a reader.
        pq.write_table(table, path, row_group_size=lines)
        return path
    with path.open("w") as file:
        file.writelines(json.dumps(fields_of(number)) + "\n" for number in range(lines))
    return path


@pytest.fixture
def input_folder(tmp_path):
    """Folder with the files that the lines refer to."""
    for name in [f"face{n}.jpg" for n in range(11)] + [f"lora{n}.safetensors" for n in range(5)]:
        (tmp_path / name).write_text(name)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "animevideov3.safetensors").write_text("weights")
    return tmp_path


@pytest.mark.parametrize(
    "lines", [10 * SHORT, pytest.param(1_000_000, marks=[pytest.mark.very_slow, pytest.mark.timeout(1800)])]
)
def test_memory_does_not_grow_with_the_script(input_folder, lines):
    scripts = [write_script(input_folder / f"{n}.{ending}", n) for n in (SHORT, lines) for ending in ("jsonl", "parquet")]
    command = [sys.executable, "-c", READ_AND_PLAN, str(input_folder / "weights"), *map(str, scripts)]
    _, short, *both = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    for long in both:
        assert long["rejected"] == lines // 20 + lines // 50
        assert long["shots"] == long["plans"] == lines - long["rejected"]
    assert both[-1]["peak_mb"] - short["peak_mb"] < GROWTH_MB


def test_many_lines_with_the_same_generated_id_are_numbered_quickly(tmp_path):
    script = tmp_path / "s.yaml"
    script.write_text(f"shots: [{'7, ' * 2000}]")
    ids = [line.id for line in iter_script(ScriptSettings(script))]
    assert (ids[:2], ids[-1], len(set(ids))) == (["s.yaml:1", "s.yaml:1-2"], "s.yaml:1-2000", 2000)


def plan(number, prompt, *loras, priority="normal"):
    shot = Shot(id=f"s{number}", prompt=prompt, seed=1, lora=[f"{lora}.safetensors" for lora in loras], priority=priority)
    return ShotPlan(shot=shot, steps=(), key="")


def in_order(plans, room):
    """Return the plans in the order in which a queue gives them, filled up to `room` whenever one has left."""
    queue, ordered = ShotQueue(), []
    for plan in plans:
        if len(queue) == room:
            ordered.append(queue.pop().plan)
        queue.add(Task(plan, None))
    while queue:
        ordered.append(queue.pop().plan)
    return ordered


def test_loras_change_rarely():
    draw = random.Random(1)
    mixed = [plan(n, f"prompt {draw.randrange(20)}", *draw.choice([(), *("abcde")])) for n in range(2000)]
    ordered = in_order(mixed, room=500)
    assert sorted(p.shot.id for p in ordered) == sorted(p.shot.id for p in mixed)
    loras = [p.shot.lora for p in ordered if p.shot.lora]
    assert sum(a != b for a, b in pairwise(loras)) <= 4 * 5


def test_order_is_stable_and_ignores_the_order_of_loras():
    plans = [plan(0, "x", "a", "b"), plan(1, "y"), plan(2, "y", "b", "a"), plan(3, "x", "a", "b"), plan(4, "y")]
    assert [p.shot.id for p in in_order(plans, room=9)] == ["s0", "s3", "s2", "s1", "s4"]


def test_shots_with_a_higher_priority_come_first_and_lora_groups_within_a_priority():
    of_line = [("low", "a"), ("normal", "a"), ("normal", "b"), ("normal", "a"), ("high", "a")]
    plans = [plan(number, "x", lora, priority=priority) for number, (priority, lora) in enumerate(of_line)]
    assert [p.shot.id for p in in_order(plans, room=9)] == ["s4", "s1", "s3", "s2", "s0"]
    assert [p.shot.id for p in in_order(plans, room=2)] == ["s1", "s2", "s3", "s4", "s0"], "only read shots are ordered"


def test_shot_with_other_loras_is_not_overtaken_forever(monkeypatch):
    monkeypatch.setattr("vidgen_ray.batch.shot_queue.MAX_SKIPS", 0)
    monkeypatch.setattr("vidgen_ray.batch.shot_queue.MAX_SHOTS", 10)
    plans = [plan(0, "x", "a"), plan(1, "y", "b"), *(plan(n, "x", "a") for n in range(2, 40))]
    assert [p.shot.id for p in in_order(plans, room=2)].index("s1") < 15
