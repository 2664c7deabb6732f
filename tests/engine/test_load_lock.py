"""A limited number of processes of a machine load weights at once."""

import multiprocessing
from pathlib import Path

import pytest

from vidgen_ray.engine.worker import load_lock

# Forks have imported everything.
FORK = multiprocessing.get_context("fork")


def hold(folder, limit, pipe):
    with load_lock(limit, folder):
        pipe.send("locked")
        pipe.recv()


@pytest.mark.parametrize("limit", [1, 2])
def test_one_process_more_than_the_limit_waits_until_one_is_killed(tmp_path, limit):
    def start():
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=hold, args=(tmp_path, limit, theirs), daemon=True)
        process.start()
        return process, ours

    holders = [start() for _ in range(limit)]
    assert [pipe.recv() for _, pipe in holders] == ["locked"] * limit
    last, waiting = start()
    while not any("->" in line and str(last.pid) in line.split() for line in Path("/proc/locks").read_text().splitlines()):
        assert last.is_alive()
        assert not waiting.poll(0.01), "it holds a lock, too"
    # All processes wait for the first lock, whose owner is likely to be done first.
    holders[0][0].kill()
    assert waiting.recv() == "locked"
    for process, _ in (*holders, (last, waiting)):
        process.kill()
        process.join()
