"""What clusters and lines do to a run, on a real Ray with two simulated GPUs: who holds which GPU, and who pays for whom."""

import json
import os
import signal
import threading
from collections import Counter
from contextlib import suppress

import pytest
import ray

from tests.batch.test_batch import Events, digests
from tests.fake_stages import FAKES, fake_likeness
from vidgen_ray.batch.render import render
from vidgen_ray.engine.ray_cluster import expect_gpus
from vidgen_ray.errors import SetupError
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.manifest import read_manifest
from vidgen_ray.planner import parse_gpus
from vidgen_ray.script.reader import iter_script
from vidgen_ray.shot import Shot

GPUS = "2x80GB"


@pytest.fixture(scope="module", autouse=True)
def own_ray():
    ray.init(address="local", num_cpus=16, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def profile(tiny):
    """Every actor on a GPU, of sizes of which all fit on one."""
    sizes = {"instantid": 1, "flux": 34, "hunyuan": 13, "svd": 20, "realesrgan": 6}
    actors = {
        name: tiny.actors[name].model_copy(update={"device": "cuda", "memory_gb": gb, "timeout_s": 5, "cpus": 0.5})
        for name, gb in sizes.items()
    }
    return tiny.model_copy(update={"name": "fakes", "actors": actors, "cpu_workers": None})


def rendered(tmp_path, profile, lines, watcher=None, gpus=GPUS, **options):
    script = tmp_path / "s.jsonl"
    script.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    out = tmp_path / "out"
    report = render(
        iter_script(script, profile_defaults=profile.defaults),
        profile,
        OutputFolder(out),
        source=script.name,
        watcher=watcher or Events(),
        cluster=parse_gpus(gpus),
        stages=FAKES,
        **options,
    )
    return report, {row.id: row for row in read_manifest(out)}


def shots(count):
    return [{"id": f"s{n:02}", "prompt": f"shot {n}"} for n in range(count)]


def places():
    """Worker -> the GPU that it is on, asked of each process, and killed on the way."""
    found = {}
    for name in ray.util.list_named_actors():
        if "/worker/" in name:
            place = place_of(ray.get_actor(name))
            slot = name.split("/")[-2]
            found[name.split("/", 1)[1]] = (slot, place.gpus)
            os.kill(place.pid, signal.SIGKILL)
    return found


def place_of(worker):
    while True:
        with suppress(ray.exceptions.ActorUnavailableError):
            return ray.get(worker.place.remote())


@pytest.mark.parametrize("layout", ["fused", "colocated", "staged"])
def test_every_gpu_holds_what_the_layout_says_and_so_after_every_process_was_killed(tmp_path, profile, layout):
    seen = []
    report, _rows = rendered(
        tmp_path, profile.model_copy(update={"layout": layout}), shots(12), Events(lambda: seen.extend((places(), places())))
    )
    assert (report.done, report.failed, report.layout) == (12, 0, layout), [
        (r.id, r.failure_stage, r.failure_error, r.failure_attempts, r.failure_message)
        for r in _rows.values()
        if r.status == "failed"
    ]
    before, after = seen
    assert before == after
    by_slot = {}
    for slot, gpus in before.values():
        assert len(gpus) == 1
        by_slot.setdefault(slot, set()).update(gpus)
    assert sorted(gpu for gpus in by_slot.values() for gpu in gpus) == ["0", "1"], "a slot is one GPU, and no other has it"


def test_where_the_models_do_not_fit_together_they_take_turns(tmp_path, profile):
    report, _rows = rendered(tmp_path, profile, shots(20), gpus="2x48GB")
    assert (report.done, report.layout) == (20, "hybrid")


def test_a_poison_line_costs_its_own_attempts_and_no_neighbour(tmp_path, profile):
    poison = {
        "raises": ("raise", "RuntimeError", 3),
        "dies": ("die", "WorkerDied", 3),
        "hangs": ("hang", "TimedOut", 3),
        "fills": ("full", "StageError", 1),
    }
    lines = shots(12)
    for n, (name, (prompt, _, _)) in enumerate(poison.items()):
        lines.insert(3 * n, {"id": name, "prompt": prompt})
    report, rows = rendered(tmp_path, profile, lines)
    assert (report.done, report.failed) == (12, 4)
    for name, (_, error, attempts) in poison.items():
        row = rows[name]
        assert (row.status, row.failure_stage, row.failure_error, row.failure_attempts) == ("failed", "flux", error, attempts)
        assert "worker" in row.failure_worker or ":" in row.failure_worker
    failed = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert {line["id"]: line["failure"]["error"] for line in failed} == {name: error for name, (_, error, _) in poison.items()}


def test_a_picture_that_ends_encoders_costs_no_other(tmp_path, profile):
    only_pictures = {"generate_video": False}
    lines = [{**line, **only_pictures} for line in shots(8)]
    lines[3:3] = [{"id": f"poison{n}", "prompt": "end the encoder", **only_pictures} for n in range(2)]
    report, rows = rendered(tmp_path, profile, lines, use_cache=False)
    assert (report.done, report.failed) == (8, 2), {row.id: row.failure_message for row in rows.values()}
    for name in ("poison0", "poison1"):
        told = rows[name]
        assert (told.failure_stage, told.failure_error, told.failure_attempts) == ("output", "WorkerDied", 3)


def test_a_shot_that_cannot_be_written_is_tried_as_often_as_any(tmp_path, profile):
    folder = tmp_path / "out" / "shots"
    folder.mkdir(parents=True)
    (folder / "s01").touch()
    report, rows = rendered(tmp_path, profile, shots(3))
    assert (report.done, report.failed) == (2, 1)
    assert (rows["s01"].failure_stage, rows["s01"].failure_attempts) == ("output", 3)


def test_a_long_script_is_several_data_sets(tmp_path, profile, monkeypatch):
    monkeypatch.setattr("vidgen_ray.batch.task_files.LINES_PER_PART", 2)
    monkeypatch.setattr("vidgen_ray.batch.ray_data.PARTS_A_DATASET", 2)
    report, rows = rendered(tmp_path, profile, shots(9))
    assert (report.done, report.left, len(rows)) == (9, 0, 9)


def test_a_run_that_is_stopped_while_it_reads_its_script_starts_nothing(tmp_path, profile):
    stop = threading.Event()
    stop.set()
    report, rows = rendered(tmp_path, profile, shots(9), stop=stop)
    assert (report.done, report.layout, rows) == (0, None, {})
    assert report.left
    assert rendered(tmp_path, profile, shots(9))[0].done == 9


def test_cards_that_are_not_there_are_not_waited_for():
    expect_gpus(2)
    with pytest.raises(SetupError, match="the plan needs 3 GPUs, this machine has 2"):
        expect_gpus(3)


def test_what_goes_wrong_once_is_tried_again(tmp_path, profile):
    lines = [{"id": what, "prompt": f"{what} once {tmp_path / what}"} for what in ("raise", "die", "hang", "wedge", "full")]
    report, rows = rendered(tmp_path, profile, lines)
    assert (report.done, report.failed) == (5, 0), {row.id: row.failure_message for row in rows.values()}
    record = json.loads((tmp_path / "out" / "shots" / "full" / "shot.json").read_text())
    assert [step["recovered"] for step in record["stages"]] == ["memory freed", None, None]


def test_a_full_gpu_is_worked_on_with_less_and_that_is_written_down(tmp_path, profile):
    _, rows = rendered(tmp_path, profile, [{"id": "a", "prompt": "lean"}])
    assert rows["a"].status == "done"
    out = tmp_path / "out"
    record = json.loads((out / "shots" / "a" / "shot.json").read_text())
    flux, svd, _ = record["stages"]
    assert svd["recovered"] == "decode_chunk_frames=2"
    cached = {entry.name for entry in out.glob("cache/*/*")}
    assert flux["key"] in cached
    assert svd["key"] not in cached, "other settings than the key's made it"


def test_lines_with_the_same_lora_go_together(tmp_path, profile):
    loras = []
    for name in "abc":
        loras.append(tmp_path / f"{name}.safetensors")
        loras[-1].write_bytes(name.encode())
    lines = [{**line, "lora": str(loras[n % 3])} for n, line in enumerate(shots(12))]
    report, _ = rendered(tmp_path, profile, lines, gpus="1x80GB")
    assert report.done == 12
    assert (tmp_path / "worn").read_text() == "aaaabbbbcccc"


def test_a_shot_that_takes_long_keeps_no_other_from_being_told(tmp_path, profile):
    told = tmp_path / "told"
    events = Events(told.touch)
    report, _ = rendered(tmp_path, profile, [{"id": "slow", "prompt": f"until {told}"}, *shots(4)], events)
    assert (report.done, report.failed) == (5, 0), "the slow one waits for another to be told"
    assert events.rows[0].id != "slow"


def test_a_stopped_run_ends_what_it_began_and_the_next_does_the_rest(tmp_path, profile):
    stop = threading.Event()
    report, rows = rendered(tmp_path, profile, shots(400), Events(stop.set), stop=stop)
    assert report.failed == 0
    assert report.done >= 1
    assert report.left >= 1
    assert report.done + report.left == 400
    done = {row.id for row in rows.values() if row.status == "done"}
    assert len(done) == report.done == len(list((tmp_path / "out").glob("shots/*/shot.json")))
    first = digests(tmp_path / "out")
    again, _ = rendered(tmp_path, profile, shots(400))
    assert (again.skipped, again.done) == (report.done, report.left)
    after = digests(tmp_path / "out")
    assert {name: after[name] for name in first} == first
    assert not list((tmp_path / "out" / "spool").glob("*"))


def test_two_shots_with_the_same_photo_have_it_looked_at_once(tmp_path, profile):
    from tests.conftest import ASTRONAUT

    lines = [{**line, "face_image": str(ASTRONAUT)} for line in shots(6)]
    rendered(tmp_path, profile, lines, use_cache=False)
    records = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("shots/*/shot.json")]
    assert Counter(record["stages"][0]["cached"] for record in records) == {True: 5, False: 1}


def test_a_picture_too_unlike_is_tried_with_other_seeds_before_a_clip_is_made_of_it(tmp_path, profile):
    from tests.conftest import ASTRONAUT

    def tries(seed):
        shot = Shot(prompt="a", id="a", seed=seed)
        return [fake_likeness(shot.with_retry_seed(number).seed) for number in range(3)]

    third = next(seed for seed in range(1000) if [one >= 0.5 for one in tries(seed)] == [False, False, True])
    never = next(seed for seed in range(1000) if max(tries(seed)) < 0.5)
    asked = {"prompt": "a", "face_image": str(ASTRONAUT), "min_identity": 0.5, "retries": 2}
    lines = [{"id": "third", "seed": third, **asked}, {"id": "never", "seed": never, **asked}]
    layout = {"layout": "fused"}
    report, rows = rendered(tmp_path, profile.model_copy(update=layout), lines)
    assert (report.done, report.failed) == (1, 1)
    assert rows["third"].image_likeness == tries(third)[2]
    record = json.loads((tmp_path / "out" / "shots" / "third" / "shot.json").read_text())
    assert (record["tries"], record["shot"]["seed"]) == (3, Shot(prompt="a", id="a", seed=third).with_retry_seed(2).seed)
    assert (rows["never"].failure_stage, rows["never"].failure_error, rows["never"].failure_attempts) == (
        "likeness",
        "LikenessTooLow",
        3,
    )
    assert f"{max(tries(never)):g}" in rows["never"].failure_message
    assert len(list((tmp_path / "out").glob("cache/*/*/frames.mkv"))) == 1, "what a bad picture fails needs no clip"
    again, _ = rendered(tmp_path, profile.model_copy(update=layout), lines)
    assert (again.skipped, again.failed) == (1, 1)
