"""A limited number of processes of a machine load weights at once."""

import multiprocessing
from pathlib import Path

import pytest

from vidgen_ray.engine.worker import load_lock

# Forks have imported everything.
FORK = multiprocessing.get_context("fork")


def hold(folder, processes, pipe):
    pipe.recv()
    with load_lock(processes, folder):
        pipe.send("locked")
        pipe.recv()


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a process, which holds a lock from its first message to its second.

    Start it before this process has a lock: a fork has the files of this process, and with them its locks.
    """
    started = []

    def start(processes):
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=hold, args=(tmp_path, processes, theirs), daemon=True)
        process.start()
        started.append(process)
        return process, ours

    yield start
    for process in started:
        process.kill()
        process.join()


def waits(process):
    """Return whether the process waits for a file lock."""
    return any("->" in line and str(process.pid) in line.split() for line in Path("/proc/locks").read_text().splitlines())


@pytest.mark.parametrize("limit", [1, 2])
def test_one_process_more_than_the_limit_waits(tmp_path, start, limit):
    holders, (last, waiting) = [pipe for _, pipe in (start(limit) for _ in range(limit - 1))], start(limit)
    with load_lock(limit, tmp_path):
        for pipe in holders:
            pipe.send("lock")
            assert pipe.recv() == "locked"
        waiting.send("lock")
        while not waits(last):
            assert last.is_alive()
            assert not waiting.poll(0.01), "it holds a lock, too"
    assert waiting.recv() == "locked"


def test_killed_process_releases_the_lock(tmp_path, start):
    holder, pipe = start(1)
    pipe.send("lock")
    assert pipe.recv() == "locked"
    holder.kill()
    with load_lock(1, tmp_path):
        holder.join()
