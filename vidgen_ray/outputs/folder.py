"""The output folder `OUT/`: write, commit, find and delete the files of shots.

`shots/<id>/shot.json` is the commit point and is written last. A shot is finished if this file exists and has the shot's
content key. `keys/<key>` holds the id of the shot with that key, for look-ups by key alone.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pydantic_core

from vidgen_ray.atomic_files import remove, write_atomically
from vidgen_ray.cache_dir import cache_dir, sha256_of
from vidgen_ray.content_keys import ShotPlan, is_result_of
from vidgen_ray.errors import SetupError
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.outputs.lease import Lease, lease
from vidgen_ray.outputs.records import DoneShot, FileRecord, LikenessRecord, ShotRecord, ShotSummary, StepRecord
from vidgen_ray.outputs.stage_cache import StageCache
from vidgen_ray.outputs.storage import Storage, absolute, storage_at
from vidgen_ray.shot import ID_PATTERN
from vidgen_ray.version import __version__

RECORD = "shot.json"
KEYS = "keys"
SWEEP_FOLDERS = ("", "shots", KEYS, "cache", "manifest", "failures", "inputs")
"""Folders that may contain temporary files."""
REQUESTS_AT_ONCE = 32
"""Concurrent requests to an object store. Each takes tens of milliseconds."""


class ShotDraft:
    """The files of one shot before the commit, in a temporary local folder."""

    def __init__(self, storage: Storage, plan: ShotPlan, workspace: Path) -> None:
        self.plan = plan
        self._storage = storage
        self._workspace = workspace

    def path(self, name: str) -> Path:
        """Return the path at which to write the file `name`."""
        return self._workspace / name

    def commit(self, stages: Sequence[StepRecord], likeness: LikenessRecord | None = None) -> ShotRecord:
        """Publish the files in the output folder, and `shot.json` last."""
        files = sorted(self._workspace.iterdir())
        record = ShotRecord(
            key=self.plan.key,
            shot=self.plan.shot,
            tries=self.plan.number,
            likeness=likeness,
            seeds={step.stage: self.plan.shot.generator_seed(step.stage) for step in self.plan.steps},
            stages=tuple(stages),
            files={f.name: FileRecord(sha256=sha256_of(f), bytes=f.stat().st_size) for f in files},
            software=software_versions(),
        )
        self.path(RECORD).write_text(record.model_dump_json(indent=1), encoding="utf-8")
        folder = _shot_folder(self.plan)
        # Delete the record of an earlier render of this id before its first file is replaced.
        self._storage.delete(f"{folder}/{RECORD}")
        # The key file comes before the record, so that every finished shot can be found by its key. A key file without a
        # finished shot is harmless.
        self._storage.write(key_file(self.plan.key), folder.removeprefix("shots/"))
        self._storage.publish(self._workspace, folder, [file.name for file in files])
        for stale in self._storage.files(folder).keys() - record.files.keys():
            self._storage.delete(f"{folder}/{stale}")
        self._storage.publish(self._workspace, folder, [RECORD])
        return record


class OutputFolder:
    """The output folder `OUT/`: shots, manifest, failures, `run.json` and, unless it is disabled, the stage cache.

    `root` is a local path or the URL of an object store. Instances can be pickled: credentials are part of the URL or come
    from the environment of the process. Raises SetupError if a URL is passed as a Path. Methods raise OSError if the
    storage fails.
    """

    def __init__(self, root: str | Path) -> None:
        self._root = absolute(root)

    def __reduce__(self) -> tuple[Any, ...]:
        return OutputFolder, (self._root,)

    def __repr__(self) -> str:
        return f"OutputFolder({self.url})"

    @cached_property
    def storage(self) -> Storage:
        return storage_at(self._root)

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
    def stage_cache(self) -> StageCache:
        return StageCache(self.storage)

    def shot_folder(self, shot_id: str) -> Path:
        """Return the local folder of a shot. Raises SetupError if it is in an object store; see `place`."""
        return self.root / "shots" / shot_id

    def place(self, shot_id: str, name: str) -> Path | str:
        """Return the location of a shot's file, for messages: a path, or a URL without credentials."""
        return self.storage.place(f"shots/{shot_id}/{name}")

    def read(self, shot_id: str, name: str) -> bytes:
        """Return the content of a shot's file. Raises FileNotFoundError."""
        content = self.storage.read(f"shots/{shot_id}/{name}")
        if content is None:
            raise FileNotFoundError(f"{self.url}/shots/{shot_id}/{name}")
        return content

    def find_finished(self, plan: ShotPlan, with_stages: bool = False) -> DoneShot | None:
        """Return the shot if it is finished with the key of the plan, or another key for the same result, else `None`.

        `with_stages` also requires the files of `--keep stages`. Only the sizes of files are checked: reading them would be
        too slow for runs with many shots.
        """
        debug_files = {STAGE_BY_NAME[step.stage].debug_file for step in plan.steps} - {None} if with_stages else set()
        return self._read_finished(_shot_folder(plan), plan.key, lambda record: is_result_of(plan, record), debug_files)

    def find_by_key(self, key: str) -> DoneShot | None:
        """Return the shot that is finished with this key under any id, else `None`.

        Also returns `None` if the storage fails: the caller can render the shot again.
        """
        try:
            shot_id = (self.storage.read(key_file(key)) or b"").decode()
            if not ID_PATTERN.fullmatch(shot_id):
                return None
            return self._read_finished(f"shots/{shot_id}", key, lambda record: record["key"] == key, set())
        except (OSError, ValueError):
            return None

    def _read_finished(
        self, folder: str, key: str, is_result: Callable[[Mapping[str, Any]], bool], debug_files: Set[str | None]
    ) -> DoneShot | None:
        """Return the shot in this folder if its record is a result for this key and has all `debug_files`, else `None`."""
        try:
            text = self.storage.read(f"{folder}/{RECORD}")
            if text is None:
                return None
            record = pydantic_core.from_json(text)
            if not is_result(record):
                return None
            files, stages, likeness = record["files"], record["stages"], record["likeness"]
            if not debug_files <= files.keys():
                return None
            if not self.storage.has(folder, {name: file["bytes"] for name, file in files.items()}):
                return None
            summary = ShotSummary(
                key=key,
                seed=record["shot"]["seed"],
                likeness=likeness and {name: likeness[name] for name in LikenessRecord.model_fields},
                sha256={name: file["sha256"] for name, file in files.items()},
                seconds=sum([step["seconds"] for step in stages]),
                gpu_seconds=sum([step["gpu_seconds"] for step in stages]),
                lora_loads=sum([step["adapter_loads"] for step in stages]),
            )
        # A damaged record counts as missing. An OSError of the storage does not.
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return DoneShot(summary, text)

    def find_finished_each(
        self, plans: Iterable[ShotPlan], with_stages: bool = False
    ) -> Iterator[tuple[ShotPlan, DoneShot | None]]:
        """Yield each plan with the result of `find_finished`, in order. Sends concurrent requests to an object store."""
        if self.storage.local is not None:
            for plan in plans:
                yield plan, self.find_finished(plan, with_stages)
            return
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            pending = deque[tuple[ShotPlan, Any]]()
            for plan in plans:
                pending.append((plan, pool.submit(self.find_finished, plan, with_stages)))
                if len(pending) > 2 * REQUESTS_AT_ONCE:
                    oldest, future = pending.popleft()
                    yield oldest, future.result()
            for plan, future in pending:
                yield plan, future.result()

    @contextmanager
    def draft(self, plan: ShotPlan) -> Iterator[ShotDraft]:
        """Open a draft for the shot's files. Files that are not committed are deleted at the end of the block."""
        with self.storage.workspace("shots") as workspace:
            yield ShotDraft(self.storage, plan, workspace)

    def keep_input(self, content: bytes, suffix: str) -> Path:
        """Store an input file under the hash of its content and return its path, so that the shot can be rendered again.

        Files are in `OUT/inputs`, or in the cache folder of this machine if `OUT` is in an object store.
        """
        folder = (self.storage.local or cache_dir()) / "inputs"
        path = folder / f"{hashlib.sha256(content).hexdigest()[:16]}{suffix}"
        if not path.exists():
            write_atomically(path, content)
        return path

    def delete_shot(self, shot_id: str) -> None:
        """Delete a shot's files and its stage cache entries. Other shots that share a cached step compute it again."""
        folder = f"shots/{shot_id}"
        text = self.storage.read(f"{folder}/{RECORD}")
        if text is not None:
            with suppress(ValueError, KeyError, TypeError):
                record = pydantic_core.from_json(text)
                if self.storage.read(key_file(record["key"])) == shot_id.encode():
                    self.storage.delete(key_file(record["key"]))
                self.stage_cache.drop([step["key"] for step in record["stages"]])
        self.storage.delete_folder(folder)

    def write_run(self, content: dict[str, Any]) -> None:
        """Write `run.json`: the last run in this folder."""
        self.storage.write("run.json", json.dumps(content, indent=1))

    def lease(self, run: str) -> AbstractContextManager[Lease]:
        """Hold the lease of the folder for a run. Raises SetupError if another run holds it."""
        return lease(self.storage, run)

    def prepare(self) -> None:
        """Check that the folder is writable. Raises SetupError if it is not."""
        try:
            self.storage.write(".writable", "")
            self.storage.delete(".writable")
        except OSError as error:
            raise SetupError(f"output folder {self.url}: cannot be written ({error.strerror or error})") from None

    def sweep(self) -> None:
        """Remove the temporary files of killed processes. Call it only while holding the lease of the folder."""
        for path in self.storage.abandoned(SWEEP_FOLDERS):
            remove(path)


def key_file(key: str) -> str:
    """Return the path of the file that holds the id of the shot with this content key."""
    return f"{KEYS}/{key}"


def _shot_folder(plan: ShotPlan) -> str:
    assert plan.shot.id is not None
    return f"shots/{plan.shot.id}"


@cache
def software_versions() -> dict[str, str]:
    """Return the versions of the packages that may affect output bytes."""
    packages = ("torch", "diffusers", "transformers", "peft", "spandrel", "av")
    return {"vidgen-ray": __version__, **{name: version(name) for name in packages}}
