"""What a person and a program see of a run, on a clock that the test turns."""

import io
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console

from vidgen_ray.batch.run_progress import Snapshot, StageStatus
from vidgen_ray.cli import progress
from vidgen_ray.cli.progress import FIRST_SHOTS, LOADING, LineView, TerminalView, Watchers, run_view
from vidgen_ray.cli.progress_file import ProgressFile
from vidgen_ray.cli.run_pace import RunPace, Stretch, duration, eta_range, span
from vidgen_ray.outputs.manifest import ManifestRow

IDLE = Snapshot({"flux": StageStatus(3, 0, 2, 0.0), "svd": StageStatus(0, 0, 2, 0.0)}, gpus_busy=0.0, in_progress=0)
BUSY = Snapshot({"flux": StageStatus(3, 2, 2, 0.5), "svd": StageStatus(14, 2, 2, 0.98)}, gpus_busy=0.93, in_progress=21)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def row(shot_id, status="done", **fields):
    if status == "failed":
        fields = {"failure_stage": "svd", "failure_error": "StageError", "failure_message": "it broke", **fields}
    return ManifestRow(run="r", script="s.jsonl", id=shot_id, line=1, status=status, **fields)


def lines(clock):
    console = Console(file=io.StringIO(), width=200)
    return LineView(console, clock), lambda: console.file.getvalue().splitlines()


def terminal(clock):
    view = TerminalView(Console(file=io.StringIO(), force_terminal=True, color_system=None, width=120), clock)

    def seen():
        console = Console(file=io.StringIO(), width=120)
        console.print(view._picture())
        return console.file.getvalue()

    return view, seen


# How long it will still take


def test_nothing_is_foretold_before_the_first_shot():
    assert eta_range(100, Stretch(0, 50.0), Stretch(0, 50.0)) is None


def test_a_steady_pace_gives_a_narrow_range_around_the_truth():
    low, high = eta_range(1000, Stretch(10_000, 10_000.0), Stretch(600, 600.0))
    assert low < 1000 < high
    assert high / low < 1.03


def test_few_shots_give_a_wide_range():
    low, high = eta_range(10, Stretch(1, 60.0), Stretch(1, 60.0))
    assert (low, high) == (300, 1200)


def test_the_range_spans_the_whole_run_and_its_recent_pace():
    """Half the nodes are gone: shots took 1 s, now they take 2."""
    low, high = eta_range(100, Stretch(10_000, 10_000.0), Stretch(100, 200.0))
    assert low == pytest.approx(100, rel=0.02)
    assert high == pytest.approx(200, rel=0.02)


def test_a_run_that_stands_still_is_expected_later_and_later():
    ends = [eta_range(10, Stretch(100, 100.0 + idle), Stretch(0, idle))[1] for idle in (60.0, 120.0, 240.0)]
    assert ends == sorted(ends)
    assert ends[-1] > 10 * 240


def test_loading_weights_and_lines_done_before_are_no_part_of_the_pace():
    pace = RunPace()
    pace.plan(total=1100, done_before=1000, refused=0, now=0)
    pace.see(IDLE, now=100)
    pace.see(BUSY, now=600)
    for n in range(50):
        pace.count(row(f"new{n}"), now=600 + 2 * (n + 1))
    low, high = pace.eta(now=700)
    assert pace.remaining == 50
    assert low < 100 < high < 130
    assert pace.per_minute(now=700) == pytest.approx(30, rel=0.05)


def test_refused_lines_do_not_make_a_run_look_fast():
    pace = RunPace()
    pace.plan(total=200, done_before=0, refused=100, now=0)
    assert pace.waits_for_first
    assert pace.eta(now=1) is None


def test_the_pace_of_a_long_run_is_that_of_its_last_minutes_and_costs_little(monkeypatch):
    monkeypatch.setattr("vidgen_ray.cli.run_pace.REMEMBERED", 100)
    pace = RunPace()
    pace.plan(total=20_000, done_before=0, refused=0, now=0)
    for n in range(10_000):
        pace.count(row("s"), now=float(n + 1))
    assert len(pace._ends) <= 200
    assert pace.per_minute(now=10_000) == pytest.approx(60, rel=0.05)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(8.4, "8 s"), (59.9, "60 s"), (61, "1 min"), (3599, "1 h 00 min"), (11_100, "3 h 05 min"), (360_000, "4 d 04 h")],
)
def test_durations_read_as_people_say_them(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("least", "most", "words"),
    [(720, 900, "12 to 15 min"), (60, 60, "1 min"), (30, 300, "30 s to 5 min"), (3000, 11_100, "50 min to 3 h 05 min")],
)
def test_a_range_names_its_unit_once(least, most, words):
    assert span(least, most) == words


# Lines


def test_a_small_run_has_a_line_for_every_shot(clock):
    view, printed = lines(clock)
    with view:
        view.on_planned(3, 1, 0)
        view.on_finished(row("ball"))
        clock.now = 1
        view.on_finished(row("cube", "failed"))
    assert [line.split("s  ", 1)[1] for line in printed()] == [
        "shots: 3, done before: 1, lines refused: 0",
        LOADING,
        "2/3 done ball",
        "3/3 failed cube in svd: it broke",
    ]


def test_a_large_run_has_a_line_every_ten_seconds_and_one_for_each_failure(clock):
    view, printed = lines(clock)
    with view:
        view.on_planned(10_000, 0, 0)
        for n in range(1000):
            clock.now = n / 10
            view.on_status(BUSY)
            view.on_finished(row(f"s{n}", "failed" if n in (500, 501) else "done"))
    text = printed()
    assert len([line for line in text if "failed s50" in line]) == 2
    summaries = [line for line in text if "/10,000 shots" in line]
    assert 9 <= len(summaries) <= 11
    assert len(text) == len(summaries) + 4
    middle = summaries[4]
    assert "0 failed" in middle
    assert "GPUs 93% busy, busiest svd 98% with 14 queued" in middle
    assert "a minute" in middle
    assert " left" in middle
    assert "1,000/10,000 shots: 998 done, 2 failed, 0 done before" in summaries[-1]


def test_a_small_run_that_works_for_minutes_says_so(clock):
    view, printed = lines(clock)
    with view:
        view.on_planned(2, 0, 0)
        for second in range(150):
            clock.now = second
            view.on_status(IDLE if second < 70 else BUSY)
    said = [line.split("s  ", 1)[1] for line in printed()[2:]]
    assert said == [LOADING, FIRST_SHOTS]


def test_a_failure_is_one_line_without_control_codes(clock):
    view, printed = lines(clock)
    with view:
        view.on_planned(1, 0, 0)
        view.on_finished(row("a", "failed", failure_message="CUDA error\n  at layer 3\r\x1b[2J" + "x" * 9000))
    assert len(printed()) == 3
    assert "CUDA error at layer 3 [2Jxxx" in printed()[-1]
    assert len(printed()[-1]) < 350


def test_a_script_in_which_every_line_fails_does_not_flood(clock):
    view, printed = lines(clock)
    with view:
        for n in range(5000):
            view.on_rejected(row(f"s{n}", "failed", failure_stage="script"))
        view.on_planned(5000, 0, 5000)
    assert len(printed()) == 1 + progress.FAILURES_SHOWN + 1 + 1
    assert "the others are in failures.jsonl" in printed()[-3]


# The terminal


def test_the_terminal_tells_the_phases_of_a_run(clock):
    view, seen = terminal(clock)
    assert "planning" in seen()
    view.on_planned(40, 4, 0)
    assert LOADING in seen()
    view.on_status(IDLE)
    assert LOADING in seen()
    view.on_status(BUSY)
    assert FIRST_SHOTS in seen()
    clock.now = 60
    for n in range(5):
        view.on_finished(row(f"new{n}"))
    view.on_finished(row("poison", "failed"))
    text = seen()
    assert "10/40" in text
    assert "5 done   1 failed   4 done before   21 in progress   GPUs 93% busy   0:01:00" in text
    assert "6.0 a minute" in text
    assert "4 to 7 min left" in text
    assert text.splitlines()[-1].split() == ["svd", "14", "2", "2", "98%"]


def test_the_last_picture_has_the_counts_and_no_forecast(clock):
    view, seen = terminal(clock)
    with view:
        view.on_planned(2, 0, 0)
        view.on_status(BUSY)
        clock.now = 10
        view.on_finished(row("a"))
        view.on_finished(row("b", "failed"))
    assert "failed b in svd: it broke" in view._live.console.file.getvalue()
    assert "2/2" in seen()
    assert "left" not in seen()
    assert "svd" not in seen()


def test_one_failed_shot_among_thousands_is_seen_on_the_bar():
    pace = RunPace()
    pace.plan(10_000, 0, 0, now=0)
    for n in range(5000):
        pace.count(row(f"s{n}"), now=1)
    pace.count(row("poison", "failed"), now=1)
    bar = progress._bar(pace)
    assert len(bar.plain) == progress.BAR_CELLS
    assert [str(part.style) for part in bar.spans] == ["green", "red", "bright_black"]
    assert bar.spans[1].end - bar.spans[1].start == 1


def test_the_bar_is_full_only_at_the_end():
    pace = RunPace()
    pace.plan(10_000, 0, 0, now=0)
    for n in range(9999):
        pace.count(row(f"s{n}"), now=1)
    assert str(progress._bar(pace).spans[-1].style) == "bright_black"
    pace.count(row("last"), now=1)
    assert [str(part.style) for part in progress._bar(pace).spans] == ["green"]


# The file


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_file_has_one_object_an_event(tmp_path, clock):
    path = tmp_path / "out" / "progress.jsonl"
    with ProgressFile(path, clock) as file:
        file.on_planned(4, 1, 0)
        for second in range(12):
            clock.now = second
            file.on_status(BUSY)
        file.on_finished(row("ball", seconds=3.5))
        file.on_finished(row("cube", "failed"))
        assert len(read(path)) == 6, "whole lines are there at once"
    events = read(path)
    assert [event["event"] for event in events] == ["planned", "status", "status", "status", "ended", "ended", "finished"]
    assert events[0].items() >= {"total": 4, "done_before": 1, "refused": 0}.items()
    assert events[1]["stages"]["svd"] == {"queued": 14, "running": 2, "workers": 2, "busy": 0.98}
    assert events[1].items() >= {"gpus_busy": 0.93, "in_progress": 21, "remaining": 3, "eta_s": None}.items()
    assert events[4].items() >= {"id": "ball", "status": "done", "seconds": 3.5, "elapsed_s": 11.0}.items()
    assert events[5].items() >= {"id": "cube", "status": "failed", "stage": "svd", "error": "StageError"}.items()
    assert events[6].items() >= {"done": 1, "failed": 1, "skipped": 1, "complete": False, "error": None}.items()
    assert all(event["at"].endswith("+00:00") for event in events)


def test_an_interrupted_run_says_so_in_its_file(tmp_path):
    path = tmp_path / "progress.jsonl"
    file = ProgressFile(path)
    file.on_planned(1, 0, 0)
    file.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert read(path)[-1].items() >= {"event": "finished", "complete": False, "error": "KeyboardInterrupt"}.items()


def test_the_file_of_the_run_before_is_kept(tmp_path):
    path = tmp_path / "progress.jsonl"
    for total in (1, 2, 3):
        with ProgressFile(path) as file:
            file.on_planned(total, 0, 0)
    assert read(path)[0]["total"] == 3
    assert read(tmp_path / "progress.1.jsonl")[0]["total"] == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_a_run_that_was_never_planned_leaves_the_last_file_alone(tmp_path):
    path = tmp_path / "progress.jsonl"
    path.write_text("{}\n")
    with ProgressFile(path):
        pass
    assert path.read_text() == "{}\n"


def test_a_disk_that_takes_no_more_ends_the_file_and_not_the_run(tmp_path):
    with ProgressFile(tmp_path / "progress.jsonl") as file:
        file.on_planned(1, 0, 0)
        file._file.close()
        file._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
        file.on_finished(row("a"))
        file.on_finished(row("b"))
    (tmp_path / "taken").write_text("")
    with ProgressFile(tmp_path / "taken" / "progress.jsonl") as file:
        file.on_planned(1, 0, 0)
        file.on_finished(row("a"))


# Together


def test_a_run_is_told_to_the_view_and_to_the_file(tmp_path, capsys):
    with run_view(tmp_path / "progress.jsonl") as view:
        view.on_planned(1, 0, 0)
        view.on_status(BUSY)
        view.on_finished(row("ball"))
    printed = capsys.readouterr()
    assert "1/1 done ball" in printed.err
    assert printed.out == ""
    assert [event["event"] for event in read(tmp_path / "progress.jsonl")] == ["planned", "status", "ended", "finished"]


def test_views_are_told_one_event_at_a_time_by_whichever_thread():
    class Slow:
        """Is told something while it is being told something?"""

        def __init__(self):
            self.told = self.inside = self.most = 0

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def _event(self):
            self.inside += 1
            self.most = max(self.most, self.inside)
            time.sleep(0.001)
            self.inside -= 1
            self.told += 1

        def on_finished(self, row):
            self._event()

        def on_status(self, snapshot):
            self._event()

    slow = Slow()
    with Watchers(slow) as views, ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda n: views.on_finished(row("a")) if n % 2 else views.on_status(BUSY), range(50)))
    assert (slow.told, slow.most) == (50, 1)


def test_every_view_is_closed_when_one_cannot_open():
    class View:
        def __init__(self, opens=True):
            self.opens, self.closed = opens, False

        def __enter__(self):
            if not self.opens:
                raise OSError
            return self

        def __exit__(self, *_):
            self.closed = True

    first = View()
    with pytest.raises(OSError), Watchers(first, View(opens=False)):  # noqa: PT011
        pass
    assert first.closed
