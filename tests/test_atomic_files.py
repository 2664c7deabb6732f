"""Temporary files of killed processes."""

import os
import time

from vidgen_ray.system.files import abandoned, temporary_folder, temporary_prefix, this_process

OURS = this_process()
ELSEWHERE = OURS._replace(namespace="0" * 16)


def make(parent, owner, days_ago=0.0):
    """Create a temporary folder of a process with a file in it, both of this age."""
    folder = parent / f"{temporary_prefix(owner)}x{days_ago}"
    folder.mkdir()
    (folder / "clip.mp4").write_text("")
    age(folder / "clip.mp4", days_ago)
    age(folder, days_ago)
    return folder


def age(path, days_ago):
    os.utime(path, (time.time() - 86_400 * days_ago,) * 2)


def test_files_of_a_process_in_this_namespace_are_abandoned_when_it_has_ended(tmp_path):
    ended = make(tmp_path, OURS._replace(started=1))
    make(tmp_path, OURS, days_ago=30)
    temporary_folder(tmp_path)
    assert list(abandoned(tmp_path)) == [ended]


def test_files_of_a_process_elsewhere_are_abandoned_a_day_after_the_last_write(tmp_path):
    make(tmp_path, ELSEWHERE, days_ago=0.9)
    old = make(tmp_path, ELSEWHERE, days_ago=1.1)
    in_use = make(tmp_path, ELSEWHERE, days_ago=2)
    age(in_use / "clip.mp4", 0)
    legacy = tmp_path / f".tmp-{os.uname().nodename}-{2**22 - 1}-abc"
    legacy.touch()
    assert list(abandoned(tmp_path)) == [old]
    age(legacy, 1.1)
    assert set(abandoned(tmp_path)) == {old, legacy}


def test_folder_without_temporary_files(tmp_path):
    (tmp_path / ".tmpfile").touch()
    assert list(abandoned(tmp_path)) == list(abandoned(tmp_path / "missing")) == []
