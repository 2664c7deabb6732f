"""The output folder `OUT/`: write, commit, find and delete the files of shots.

`shot.json` in the folder of a shot is the commit point and is written last. A shot is finished if this file exists and has the
shot's content key. `keys/<2>/<key>` holds the id of the shot with that key, for look-ups by key alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, cached_property, reduce
from importlib.metadata import version
from operator import getitem
from pathlib import Path
from typing import Any, TypeVar

import pydantic_core
from pydantic import BaseModel

from vidgen_ray.content_keys import ShotPlan, is_result_of
from vidgen_ray.errors import SetupError
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.outputs.lease import Fence, Lease, lease
from vidgen_ray.outputs.records import (
    KEYS,
    RECORD,
    SCORES,
    SHOTS,
    FileRecord,
    LikenessRecord,
    ProvenanceNote,
    ShotRecord,
    StepRecord,
    key_path,
    shot_path,
)
from vidgen_ray.outputs.stage_cache import RemoteJobs, StageCache
from vidgen_ray.outputs.storage import Storage, absolute, storage_at
from vidgen_ray.shot import ID_PATTERN
from vidgen_ray.system.cache_dir import cache_dir, sha256_of
from vidgen_ray.system.files import remove, write_atomically
from vidgen_ray.version import __version__

SWEEP_FOLDERS = ("", SHOTS, KEYS, "cache", "manifest", "failures", "inputs", "logs", "reviews")
"""Folders that may contain temporary files."""
IsResult = Callable[[Mapping[str, Any]], bool]
"""Tells whether a record, parsed from JSON, is the wanted result."""
_M = TypeVar("_M", bound=BaseModel)
TEST_FILE = "write-test"
TEST_BYTES = 4096
LAST_FRAME = "last_frame.png"
"""Last frame of a generated clip. Only for shots that another one continues."""


class ShotDraft:
    """The files of one shot before the commit, in a temporary local folder."""

    def __init__(self, outputs: OutputFolder, plan: ShotPlan, workspace: Path) -> None:
        self.plan = plan
        self._outputs = outputs
        self._storage = outputs.storage
        self._workspace = workspace

    def path(self, name: str) -> Path:
        """Return the path at which to write the file `name`."""
        return self._workspace / name

    def commit(
        self,
        stages: Sequence[StepRecord],
        likeness: LikenessRecord | None = None,
        provenance: ProvenanceNote | None = None,
        sign: Callable[[Path], bool] = lambda path: False,
        safety: str | None = None,
        software: Mapping[str, str] | None = None,
    ) -> ShotRecord:
        """Publish the files in the output folder, and `shot.json` last. Raises OSError, also if the run has lost its lease.

        `sign` signs a file in place if it is to be signed. Returns whether it was.

        `safety`: the checker that has passed the shot. `software`: with which it was rendered; default: that of this process.
        """
        files = sorted(self._workspace.iterdir())
        record = ShotRecord(
            key=self.plan.key,
            shot=self.plan.shot,
            tries=self.plan.number,
            likeness=likeness,
            seeds={step.stage: STAGE_BY_NAME[step.stage].generator_seed(self.plan.shot) for step in self.plan.steps},
            stages=tuple(stages),
            files={file.name: _file_record(file, sign) for file in files},
            software=dict(software_versions() if software is None else software),
            cut_texts=self.plan.cut_texts,
            licences=self.plan.licences,
            safety=safety,
            face_photos=tuple(self.plan.inputs[photo] for photo in self.plan.shot.face_image if photo in self.plan.inputs),
            provenance=provenance,
        )
        self.path(RECORD).write_text(record.model_dump_json(indent=1, exclude={"committed_at"}), encoding="utf-8")
        # Renaming the file keeps its time.
        committed_at = None if self._storage.local is None else self.path(RECORD).stat().st_mtime
        shot_id = _id_of(self.plan)
        self._outputs.check_lease()
        # The key file comes before the record, so that every finished shot can be found by its key. A key file without a
        # finished shot is harmless. It is renamed from the workspace, so `keys/` has no temporary files.
        self.path(self.plan.key).write_text(shot_id, encoding="utf-8")
        key_file = {self.plan.key: key_path(self.plan.key)}
        self._storage.replace_folder(self._workspace, shot_path(shot_id), RECORD, key_file)
        return record.model_copy(update={"committed_at": committed_at})


def store_input(folder: Path, content: bytes, suffix: str) -> Path:
    """Store a file under the hash of its content and return its path."""
    path = folder / f"{hashlib.sha256(content).hexdigest()[:16]}{suffix}"
    if not path.exists():
        write_atomically(path, content)
    return path


class OutputFolder:
    """The output folder `OUT/`: shots, manifest, failures, `run.json` and, unless it is disabled, the stage cache.

    `root` is a local path or the URL of an object store. Instances can be pickled: credentials are part of the URL or come
    from the environment of the process. Raises SetupError if a URL is passed as a Path. Methods raise OSError if the
    storage fails.
    """

    def __init__(self, root: str | Path, fence: Fence | None = None) -> None:
        """`fence`: lease of the run that writes. Nothing is committed without it. `None` for writers that take no lease."""
        self._root = absolute(root)
        self._fence = fence

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._root, self._fence)

    def __repr__(self) -> str:
        return f"OutputFolder({self.url})"

    @cached_property
    def storage(self) -> Storage:
        return storage_at(self._root, None if self._fence is None else self._fence.name)

    @property
    def url(self) -> str:
        """URL or path without credentials, for messages."""
        return self.storage.url

    @property
    def root(self) -> Path:
        """Local path of the folder. Raises SetupError if the folder is in an object store."""
        if self.storage.local is None:
            raise SetupError(f"output folder {self.url}: is in an object store, this command needs a local folder")
        return self.storage.local

    @property
    def remote_jobs(self) -> RemoteJobs:
        return RemoteJobs(self.storage)

    @property
    def stage_cache(self) -> StageCache:
        return StageCache(self.storage)

    def shot_folder(self, shot_id: str) -> Path:
        """Return the local folder of a shot. Raises SetupError if it is in an object store; see `place`."""
        return self.root / shot_path(shot_id)

    def place(self, shot_id: str, name: str) -> Path | str:
        """Return the location of a shot's file, for messages: a path, or a URL without credentials."""
        return self.storage.place(f"{shot_path(shot_id)}/{name}")

    def read(self, shot_id: str, name: str) -> bytes:
        """Return the content of a shot's file. Raises FileNotFoundError."""
        path = f"{shot_path(shot_id)}/{name}"
        content = self.storage.read(path)
        if content is None:
            raise FileNotFoundError(f"{self.url}/{path}")
        return content

    def find_finished(self, plan: ShotPlan, with_stages: bool = False) -> ShotRecord | None:
        """Return the shot if it is finished with the key of the plan, or another key for the same result, else `None`.

        `with_stages` also requires the files of `--keep stages`. Only the sizes of files are checked: reading them would be
        too slow for runs with many shots.
        """
        debug_files = {STAGE_BY_NAME[step.stage].debug_file for step in plan.steps} - {None} if with_stages else set()
        needed = debug_files | {LAST_FRAME} if plan.keep_last_frame else debug_files
        return self._find(_id_of(plan), lambda record: is_result_of(plan, record), needed)

    def last_frame(self, shot: ShotRecord) -> Path | None:
        """Return the file with the last frame of a finished shot, or `None` if it was not kept.

        Raises SetupError if the folder is in an object store.
        """
        return self.shot_folder(shot.shot.id or "") / LAST_FRAME if LAST_FRAME in shot.files else None

    def find_by_key(self, key: str) -> ShotRecord | None:
        """Return the shot that is finished with this key under any id, else `None`.

        Also returns `None` if the storage fails: the caller can render the shot again.
        """
        try:
            content = self.storage.read(key_path(key)) or b""
            shot_id = content.decode()
            if not ID_PATTERN.fullmatch(shot_id):
                return None
            return self._find(shot_id, lambda record: record["key"] == key)
        except (OSError, ValueError):
            return None

    def find_by_id(self, shot_id: str) -> ShotRecord | None:
        """Return the finished shot with this id and any key, else `None`."""
        if not ID_PATTERN.fullmatch(shot_id):
            return None
        return self._find(shot_id, lambda record: True)

    def _find(self, shot_id: str, is_result: IsResult, needed: Set[str | None] = frozenset()) -> ShotRecord | None:
        """Return the shot if its record is a result with the `needed` files, and all of its files are right, else `None`."""
        folder = shot_path(shot_id)
        # The time before the content: if the record is replaced in between, its time does not match in the next run.
        committed_at = None
        if self.storage.local is not None:
            with suppress(FileNotFoundError, NotADirectoryError):
                committed_at = os.stat(f"{self.storage.local}/{folder}/{RECORD}").st_mtime
        text = self.storage.read(f"{folder}/{RECORD}")
        if text is None:
            return None
        try:
            if not is_result(pydantic_core.from_json(text)):
                return None
            record = ShotRecord.model_validate_json(text)
            sizes = {name: file.bytes for name, file in record.files.items()}
            if record.shot.id != shot_id or not needed <= sizes.keys() or not self.storage.has(folder, sizes):
                return None
            return record.model_copy(update={"committed_at": committed_at})
        # A damaged record counts as missing. An OSError of the storage does not.
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    @contextmanager
    def draft(self, plan: ShotPlan) -> Iterator[ShotDraft]:
        """Open a draft for the shot's files. Files that are not committed are deleted at the end of the block."""
        with self.storage.workspace(SHOTS) as workspace:
            yield ShotDraft(self, plan, workspace)

    def keep_input(self, content: bytes, suffix: str) -> Path:
        """Store an input file under the hash of its content and return its path, so that the shot can be rendered again.

        Files are in `OUT/inputs`, or in the cache folder of this machine if `OUT` is in an object store.
        """
        return store_input(self.inputs, content, suffix)

    @property
    def inputs(self) -> Path:
        """Folder of input files."""
        return (self.storage.local or cache_dir()) / "inputs"

    def delete_shot(self, shot_id: str) -> None:
        """Delete a shot's files and its stage cache entries. Other shots that share a cached step compute it again."""
        text = self.storage.read(f"{shot_path(shot_id)}/{RECORD}")
        if text is not None:
            with suppress(ValueError, KeyError, TypeError):
                record = pydantic_core.from_json(text)
                key_file = key_path(record["key"])
                if self.storage.read(key_file) == shot_id.encode():
                    self.storage.delete(key_file)
                self.stage_cache.drop([step["key"] for step in record["stages"]])
        self.storage.delete_folder(shot_path(shot_id))

    def write_run(self, content: dict[str, Any]) -> None:
        """Write `run.json`: the last run in this folder. Raises OSError, also if the run has lost its lease."""
        self.check_lease()
        self.storage.write("run.json", json.dumps(content, indent=1))

    @contextmanager
    def lease(self, run: str) -> Iterator[Lease]:
        """Hold the lease of the folder for a run. Raises SetupError if another run holds it, or if nothing can be written."""
        with ExitStack() as stack:
            try:
                held = stack.enter_context(lease(self.storage, run))
            except OSError as error:
                raise self._unusable(error) from None
            yield held

    def fenced(self, lease: Lease) -> OutputFolder:
        """Return the folder for a run that writes only while it has this lease."""
        return type(self)(self._root, lease.fence)

    def check_lease(self) -> None:
        """Raise LeaseLost, an OSError, if the run that writes does not hold its lease any more."""
        if self._fence is not None:
            self._fence.check(self.storage)

    def write_problem(self) -> str | None:
        """Return why no file can be written now, or `None` if a test file can. Blocks."""
        try:
            # Without a lease, the write would create a missing folder, on another disk if its file system is gone.
            if self.storage.local is not None:
                os.stat(self.storage.local)
            self.storage.write(TEST_FILE, bytes(TEST_BYTES))
            self.storage.delete(TEST_FILE)
        except OSError as error:
            return error.strerror or str(error) or type(error).__name__
        return None

    def prepare(self) -> None:
        """Check that the folder is writable, and create it if needed. Raises SetupError if it is not."""
        try:
            self.storage.write(".writable", "")
            self.storage.delete(".writable")
        except OSError as error:
            raise self._unusable(error) from None

    def _unusable(self, error: OSError) -> SetupError:
        is_file = self.storage.local is not None and os.path.isfile(self.storage.local)
        reason = "is a file, must be a folder" if is_file else f"cannot be written ({error.strerror or error})"
        return SetupError(f"output folder {self.url}: {reason}")

    def sweep(self) -> None:
        """Remove the temporary files of killed processes. Call it only while holding the lease of the folder."""
        for path in self.abandoned():
            remove(path)

    def abandoned(self) -> Iterator[Path]:
        """Yield the temporary files of killed processes. Call it only while holding the lease of the folder."""
        scores = (f"{SCORES}/{name}" for name in self.storage.folders(SCORES))
        return self.storage.abandoned([*SWEEP_FOLDERS, *scores])


def _file_record(path: Path, sign: Callable[[Path], bool]) -> FileRecord:
    sha256 = sha256_of(path)
    signed_sha256 = sha256_of(path) if sign(path) else None
    return FileRecord(sha256=sha256, bytes=path.stat().st_size, signed_sha256=signed_sha256)


def _id_of(plan: ShotPlan) -> str:
    assert plan.shot.id is not None
    return plan.shot.id


@cache
def software_versions() -> dict[str, str]:
    """Return the versions of the packages that may affect output bytes."""
    packages = ("torch", "diffusers", "transformers", "peft", "spandrel", "av")
    return {"vidgen-ray": __version__, **{name: version(name) for name in packages}}


def read_last_run(outputs: OutputFolder) -> Any:
    """Return the content of `run.json`, or an empty mapping if there was no run. Raises ValueError if it is damaged."""
    return json.loads(outputs.storage.read("run.json") or b"{}")


def setting_of_last_run(outputs: OutputFolder, model: type[_M], *keys: str) -> _M | None:
    """Return the part of `run.json` at these keys, or `None` if there was no run."""
    try:
        return model.model_validate(reduce(getitem, keys, read_last_run(outputs)))
    except (ValueError, KeyError, TypeError):
        return None
