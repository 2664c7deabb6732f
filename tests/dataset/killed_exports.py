"""Exports that are killed at each change of a file, as a program: it imports little, and forks are killed."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import traceback
from contextlib import nullcontext
from pathlib import Path
from shutil import copytree

import pyarrow.parquet
import pytest
import scipy.sparse.csgraph  # noqa: F401  # once, instead of in each fork

from vidgen_ray.dataset import export
from vidgen_ray.dataset.export import export_folder
from vidgen_ray.dataset.export_formats import write_block
from vidgen_ray.dataset.export_rows import ExportSettings

HALVES = {"train": 0.5, "test": 0.5}


def run_inline(blocks, target):
    for block in blocks:
        yield write_block(block, target)


def work_inline(patch, *, with_card=False):
    """Do the tasks in this process. One round trip has them done by Ray Data."""
    if not with_card:
        patch.setattr(export, "write_card", lambda *_: None)
    patch.setattr(export, "_run_tasks", run_inline)
    patch.setattr(export, "connected", lambda *_, **__: nullcontext())
    patch.setattr(export, "own_context", nullcontext)


def export_to(dest, out, **settings):
    return export_folder(str(out), str(dest), ExportSettings(**settings))


def valid_rows(dest):
    """Return id -> digest of the clips that the metadata names. Each of them must be in its place."""
    rows = {}
    for metadata in Path(dest).glob("*/metadata.parquet"):
        for row in pyarrow.parquet.read_table(metadata, use_threads=False).to_pylist():
            clip = (metadata.parent / row["file_name"]).read_bytes()
            assert hashlib.sha256(clip).hexdigest() == row["sha256"], f"{row['id']} has another clip than its row says"
            rows[row["id"]] = row["sha256"]
    return rows


def in_fork(call, *arguments):
    """Return the exit code of a fork that makes a call, or minus the signal that ended it."""
    if (pid := os.fork()) == 0:
        try:
            call(*arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def export_until(dest, out, last):
    """Export, and kill this process before the change number `last` of a file."""
    changes = 0

    def count(event, arguments):
        nonlocal changes
        if event in ("os.rename", "os.link", "os.remove") and str(dest) in str(arguments) and ".running" not in str(arguments):
            changes += 1
            if changes == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    export_to(dest, out, splits=HALVES, split_by=("prompt",))


def check_kills(root):
    """Kill an export at every second change of a file. The data set is valid then, and the next call completes it."""
    with pytest.MonkeyPatch.context() as patch:
        work_inline(patch)
        before, after = valid_rows(root / "first"), valid_rows(root / "complete")
        code = last = 0
        for last in range(1, 100, 2):
            dest = copytree(root / "first", root / f"killed-{last}")
            code = in_fork(export_until, dest, root / "out", last)
            found = valid_rows(dest)
            assert all(digest in (before.get(id_), after.get(id_)) for id_, digest in found.items())
            if code != -signal.SIGKILL:
                break
            # The same code completes all of them.
            if last % 5 == 0:
                assert in_fork(export_until, dest, root / "out", 0) == 0
                assert valid_rows(dest) == after
                assert {path.name for path in dest.rglob("*.mp4")} == {path.name for path in (root / "complete").rglob("*.mp4")}
    assert code == 0
    assert last > 8


if __name__ == "__main__":
    check_kills(Path(sys.argv[1]))
