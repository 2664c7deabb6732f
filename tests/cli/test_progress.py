"""Progress of a run: tracker, line view and terminal view, with a fake clock."""

import io
import logging
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, suppress
from threading import Barrier, BrokenBarrierError

import pytest
import typer
from rich.console import Console, Group

from vidgen_ray.batch.progress import CONNECTING, FIRST_SHOTS, PLANNING, STARTING, ProgressTracker, Throughput, eta_range
from vidgen_ray.cli import progress_display
from vidgen_ray.cli.progress_display import LineDisplay, RunView, TerminalDisplay, run_view
from vidgen_ray.engine.status import Snapshot
from vidgen_ray.outputs.manifest import ManifestRow
from vidgen_ray.outputs.run_log import StageStatus
from vidgen_ray.system import console
from vidgen_ray.system.console import table_of
from vidgen_ray.system.terminal_text import escaped_output

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


def line_view(clock):
    """Return a line view, and a function that returns the printed lines."""
    console, tracker = Console(file=io.StringIO(), width=200), ProgressTracker(clock)
    view = RunView(tracker, LineDisplay(console, tracker, clock))
    return view, lambda: console.file.getvalue().splitlines()


def terminal_view(clock):
    """Return a terminal view, a function that returns its current frame, and one that returns all that was printed."""
    tracker = ProgressTracker(clock)
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=120)
    display = TerminalDisplay(console, tracker, clock)

    def frame():
        console = Console(file=io.StringIO(), width=120)
        console.print(Group(*display.get_renderables()))
        return console.file.getvalue()

    return RunView(tracker, display), frame, console.file.getvalue


def test_eta_range():
    assert eta_range(100, Throughput(0, 50.0), Throughput(0, 50.0)) is None, "unknown before the first shot"
    for remaining, whole, recent, expected in (
        (1000, (10_000, 10_000.0), (600, 600.0), (1000, 1000)),
        # Half of the nodes are lost: a shot took 1 s, now it takes 2 s.
        (100, (10_000, 10_000.0), (100, 200.0), (100, 200)),
    ):
        assert eta_range(remaining, Throughput(*whole), Throughput(*recent)) == pytest.approx(expected, rel=0.02)
    assert eta_range(10, Throughput(1, 60.0), Throughput(1, 60.0)) == (300, 1200), "wide after few shots"
    highest = [eta_range(10, Throughput(100, 100.0 + idle), Throughput(0, idle))[1] for idle in (60.0, 120.0, 240.0)]
    assert highest == sorted(highest), "grows while no shot finishes"
    assert highest[-1] > 10 * 240


def test_eta_excludes_weight_loading_and_skipped_lines(clock):
    tracker = ProgressTracker(clock)
    tracker.on_lines(1100, 1000, 0, complete=True)
    clock.now = 100
    tracker.on_status(IDLE)
    clock.now = 600
    tracker.on_status(BUSY)
    for n in range(50):
        clock.now += 2
        tracker.on_finished(row(f"new{n}"))
    low, high = tracker.eta_s
    assert tracker.remaining == 50
    assert low < 100 < high < 130
    assert tracker.shots_per_minute == pytest.approx(30, rel=0.05)


def test_line_view_prints_lines_phases_messages_and_shots_of_a_small_run(clock):
    view, printed = line_view(clock)
    with view:
        view.on_lines(500, 0, 1, complete=False)
        view.on_message("run/1/worker/0/0 is quarantined")
        view.on_lines(3, 1, 1, complete=True)
        for clock.now in range(150):
            view.on_status(IDLE if clock.now < 70 else BUSY)
        view.on_finished(row("ball"))
        view.on_finished(row("cube", "failed"))
    assert [line.split("s  ", 1)[1] for line in printed()] == [
        "500 shots so far, 0 already done, 1 line rejected",
        CONNECTING,
        "run/1/worker/0/0 is quarantined",
        "3 shots, 1 already done, 1 line rejected",
        *(STARTING, STARTING),
        *(FIRST_SHOTS, FIRST_SHOTS),
        "2/3 done ball",
        "3/3 failed s.jsonl line 1 cube in svd: it broke",
    ]


def test_line_view_prints_summaries_and_failures_of_a_large_run(clock):
    view, printed = line_view(clock)
    with view:
        view.on_lines(10_000, 0, 0, complete=True)
        for n in range(1000):
            clock.now = n / 10
            view.on_status(BUSY)
            view.on_finished(row(f"s{n}", "failed" if n in (500, 501) else "done"))
    text = printed()
    assert len([line for line in text if "failed s.jsonl line 1 s50" in line]) == 2
    summaries = [line for line in text if "/10,000 shots" in line]
    assert 9 <= len(summaries) <= 11
    assert len(text) == len(summaries) + 5
    middle = summaries[4]
    assert "0 failed" in middle
    assert "GPUs 93% busy, busiest stage svd (98%, 14 queued)" in middle
    assert "shots/min, 15 min" in middle
    assert " left" in middle
    assert "1,000/10,000 shots: 998 done, 2 failed, 0 already done" in summaries[-1]


def test_failures_are_printed_as_limited_lines_without_control_characters(clock):
    view, printed = line_view(clock)
    with view:
        for n in range(5000):
            message = "CUDA error\n  at layer 3\r\x1b[2J" + "x" * 9000
            view.on_rejected(row(f"s{n}", "failed", failure_stage="script", failure_message=message))
        view.on_lines(5000, 0, 5000, complete=True)
    assert "CUDA error at layer 3 [2Jxxx" in printed()[0]
    assert len(printed()[0]) < 350
    assert len(printed()) == 1 + progress_display.MAX_MESSAGES + 1 + 1
    assert "all of them are in failures.jsonl" in printed()[-3]


def test_terminal_view_shows_phases_and_estimates_and_ends_without_one(clock):
    view, frame, printed = terminal_view(clock)
    assert PLANNING in frame()
    with view:
        view.on_lines(40, 4, 0, complete=True)
        assert CONNECTING in frame()
        view.on_status(IDLE)
        assert STARTING in frame()
        view.on_status(BUSY)
        assert FIRST_SHOTS in frame()
        clock.now = 60
        for n in range(5):
            view.on_finished(row(f"new{n}"))
        view.on_finished(row("poison", "failed"))
        text = frame()
        assert "shots ━━━━" in text
        assert "10/40 6.0 shots/min, 3 min 33 s to 7 min 2 s left 1 min elapsed" in text
        assert "5 done   1 failed   4 already done   21 in progress   GPUs 93% busy" in text
        assert text.splitlines()[-1].split() == ["svd", "14", "2", "2", "98%"]
        clock.now = 120
        view.on_status(BUSY)
        assert "7 min 6 s to 42 min 15 s left 2 min elapsed" in frame()
    assert "failed s.jsonl line 1 poison in svd: it broke" in printed()
    assert "10/40" in frame()
    assert not any(text in frame() for text in ("left", "in progress", "svd"))


def test_text_of_others_is_escaped_in_messages_and_tables_but_not_the_colours_of_rich(capsys):
    hostile = "\x1b[2J\x9b1A\u202e"
    with escaped_output():
        table = table_of("prompt")
        table.add_row(hostile)
        screen = console.Console(force_terminal=True, color_system="standard", width=80)
        screen.print(table)
        screen.print("all done", style="red")
        console.Console(stderr=True).print(hostile, markup=False)
        typer.echo(hostile, err=True, color=True)
        sys.stdout.write(f"{hostile}\n")
        logging.getLogger("vidgen_ray").warning(hostile)
    printed = capsys.readouterr()
    escaped = "\\u001b[2J\\u009b1A\\u202e"
    assert [line.strip() for line in printed.out.splitlines()] == ["prompt", escaped, "\x1b[31mall done\x1b[0m", escaped]
    assert printed.err.splitlines()[:2] == [escaped, escaped]
    assert "\x1b" not in printed.err


def test_run_view_prints_lines_to_stderr(capsys):
    with run_view() as view:
        view.on_lines(1, 0, 0, complete=True)
        view.on_finished(row("ball"))
    printed = capsys.readouterr()
    assert ("1/1 done ball" in printed.err, printed.out) == (True, "")


def test_closed_pipe_of_messages_does_not_end_a_run():
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", buffering=1) as pipe, redirect_stderr(pipe):
        with suppress(BrokenPipeError), run_view() as view:
            # `GuardedListener` keeps exceptions out of the run, and lets SystemExit end it.
            with pytest.raises(BrokenPipeError):
                view.on_lines(1, 0, 0, complete=True)
            view.on_finished(row("ball"))
        with suppress(BrokenPipeError):
            pipe.close()


def test_events_are_handled_one_at_a_time(clock):
    """Two threads meet if they can: each waits for the other while it handles an event."""
    both = Barrier(2)

    class Display:
        overlaps = 0

        def show_status(self):
            with suppress(BrokenBarrierError):
                both.wait(0.05)
                self.overlaps += 1

    display = Display()
    view = RunView(ProgressTracker(clock), display)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: view.on_status(BUSY), range(2)))
    assert display.overlaps == 0
