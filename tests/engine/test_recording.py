"""Recordings of engines: replays, and files that cannot be written or were not written to the end."""

from pathlib import Path

from tests.engine.farm import Farm, Proc
from vidgen_ray.engine.recording import Recorder, replay


def record(path, runs=1, **options):
    recorder = Recorder(path, **options)
    for number in range(runs):
        farm = Farm(Proc("a", fault=lambda call: "error" if call.order == 1 else ""), Proc("b"))
        recorder.begin(farm.core)
        for order in range(20):
            farm.ask(order + number)
        farm.run()
        for when, event, commands in farm.log:
            recorder.add(when, event, commands)
    recorder.close()


def test_replay_of_two_engines_and_of_a_file_that_ends_within_a_line_finds_what_differs(tmp_path):
    path = tmp_path / "events.jsonl"
    record(path, runs=2)
    text = path.read_text()
    path.write_text(text[:-20])
    assert replay(path) == []
    path.write_text(text.replace('"Finish", "call": 3,', '"Finish", "call": 4,', 1))
    assert len(replay(path)) == 1


def test_full_disk_ends_the_recording_and_not_the_run():
    messages = []
    record(Path("/dev/full"), runs=3, on_message=messages.append)
    assert messages == ["--record: the recording ends, because /dev/full cannot be written: No space left on device"]
