"""Files: atomic writes on a local or shared file system, the identity of the process that writes them, and YAML files of
users.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vidgen_ray.limits import MAX_NUMBER_CHARACTERS, MAX_YAML_BYTES

UNKNOWN = "unknown"
PATTERN = re.compile(rf"([0-9a-f]{{16}}|{UNKNOWN})-(\d{{1,7}})-(\d{{1,19}})")


class ProcessId(NamedTuple):
    """Identity of a process. `str()` of it is part of file names; `parse` reads it."""

    namespace: str
    """Hash of the machine's boot id and the PID namespace, or "unknown"."""
    pid: int
    started: int
    """Start time in clock ticks since the boot. Distinguishes processes that get the same PID one after another."""

    def __str__(self) -> str:
        return f"{self.namespace}-{self.pid}-{self.started}"

    @classmethod
    def parse(cls, text: str) -> ProcessId | None:
        """Return the process id in `text`, or `None` if it contains something else."""
        match = PATTERN.fullmatch(text)
        return cls(match[1], int(match[2]), int(match[3])) if match else None

    def is_running(self) -> bool | None:
        """Return whether the process is running. `None` if it is in another PID namespace or of another boot."""
        if self.namespace == UNKNOWN or self.namespace != this_process().namespace:
            return None
        try:
            # Not the existence of /proc/PID: some machines hide the processes of other users there.
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass  # it exists and belongs to another user
        try:
            state, started = _state_and_start(str(self.pid))
        except OSError:
            return True
        return state not in "ZX" and started == self.started


@cache
def this_process() -> ProcessId:
    """Return the identity of this process. The namespace is unknown without a Linux /proc of the own PID namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        # A /proc of another PID namespace shows other processes under the same PIDs.
        if os.readlink("/proc/self") == str(os.getpid()):
            hashed = hashlib.sha256(f"{boot} {namespace}".encode()).hexdigest()[:16]
            return ProcessId(hashed, os.getpid(), _state_and_start("self")[1])
    except OSError:
        pass
    return ProcessId(UNKNOWN, os.getpid(), 0)


os.register_at_fork(after_in_child=this_process.cache_clear)


def _state_and_start(pid: str) -> tuple[str, int]:
    """Return the state letter of a process and its start time in clock ticks since the boot. Raises OSError."""
    # The second field is the program's name in parentheses, which may contain spaces and parentheses.
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    return fields[0], int(fields[19])


PREFIX = ".tmp-"
ABANDONED_AFTER_S = 86_400
"""Age in seconds at which the temporary file of a process in another container or on another machine counts as abandoned.

If the process was in this PID namespace, its files are abandoned as soon as it has ended.
"""


def temporary_prefix(owner: ProcessId | None = None) -> str:
    """Return the name prefix of the temporary files and folders of a process. Default: this process."""
    return f"{PREFIX}{owner or this_process()}-"


def temporary_folder(parent: Path) -> Path:
    """Create a hidden folder in `parent`, and `parent` if needed."""
    folder = parent / f"{temporary_prefix()}{secrets.token_hex(8)}"
    folder.mkdir(parents=True)
    return folder


def temporary_file(parent: Path, mode: int = 0o644) -> Path:
    """Create a hidden file in `parent`, and `parent` if needed."""
    parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=parent, prefix=temporary_prefix())
    os.fchmod(handle, mode)
    os.close(handle)
    return Path(name)


def private_folder(folder: Path) -> Path:
    """Create a folder that only its owner can enter, or end the access of other users to an existing one. Return it.

    Access that a group was given to an existing folder stays. A folder that belongs to another user does not change.
    """
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
    mode = stat.S_IMODE(folder.stat().st_mode)
    if mode & stat.S_IRWXO:
        with suppress(PermissionError):
            folder.chmod(mode & ~stat.S_IRWXO)
    return folder


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name, flush it to disk and rename it."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with new_file(path) as tmp:
        tmp.write_bytes(data)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` at the end of the block, or deleted if the block raises."""
    tmp = temporary_file(path.parent)
    try:
        yield tmp
        flush_to_disk(tmp)
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Flush a written file to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def abandoned(folder: Path) -> Iterator[Path]:
    """Yield the temporary files and folders in `folder` that no process uses any more."""
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:
        return
    with entries:
        # Filter by name first: folders with many shots are scanned at every start.
        for name in [entry.name for entry in entries if entry.name.startswith(PREFIX)]:
            if _is_abandoned(folder / name):
                yield folder / name


def remove(path: Path) -> None:
    """Remove a file or a folder tree, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    owner = ProcessId.parse(path.name.removeprefix(PREFIX).rpartition("-")[0])
    running = owner.is_running() if owner else None
    if running is not None:
        return not running
    try:
        # Writing to a file in a folder does not change the time of the folder.
        files = [path, *(path.iterdir() if path.is_dir() else ())]
        last_write: float = max(file.stat().st_mtime for file in files)
    except FileNotFoundError:
        return False
    return time.time() - last_write > ABANDONED_AFTER_S


LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")


class StrictLoader(yaml.SafeLoader):
    """Safe loader without aliases, a few lines of which can expand to gigabytes, and without duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed", self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = set[str]()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
                keys.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: Any) -> Any:
        # PyYAML reads 1:30:00 as a number of base 60, in a time that grows with the square of its length.
        if len(node.value) > MAX_NUMBER_CHARACTERS:
            text = f"a number with more than {MAX_NUMBER_CHARACTERS} characters"
            raise yaml.constructor.ConstructorError(None, None, text, node.start_mark)
        is_integer = node.tag == "tag:yaml.org,2002:int"
        # PyYAML reads 017 as 15. It is text here: an id, or an error in a field of numbers.
        if is_integer and LEADING_ZERO.fullmatch(node.value):
            return node.value
        return self.construct_yaml_int(node) if is_integer else self.construct_yaml_float(node)


for kind in ("int", "float"):
    StrictLoader.add_constructor(f"tag:yaml.org,2002:{kind}", StrictLoader.construct_number)


def load_yaml(path: Path) -> Any:
    """Return the content of a YAML file in UTF-8. Raises OSError and ValueError."""
    if (size := path.stat().st_size) > MAX_YAML_BYTES:
        raise ValueError(f"got {size:,} bytes, must be at most {MAX_YAML_BYTES:,}")
    return parse_yaml(path.read_text(encoding="utf-8-sig"))


def parse_yaml(text: str) -> Any:
    """Return the content of a YAML document. Raises ValueError, with a message on one line."""
    try:
        return yaml.load(text, StrictLoader)  # noqa: S506  # a subclass of SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(yaml_problem(error)) from None


def yaml_problem(error: Exception) -> str:
    """Return the place and the reason of an error of PyYAML, on one line."""
    text = str(error)
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        context = f" {error.context}" if error.context else ""
        text = f"line {error.problem_mark.line + 1}: {error.problem}{context}"
    return " ".join(text.split())
