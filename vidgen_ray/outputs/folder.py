"""`OUT/`: where the files of a shot are made, committed and found again.

`shots/<id>/shot.json` is the commit point: written last, whole. A shot is done when it is there with the shot's key. By its
key alone it is found through `keys/<key>`, which names its id.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pydantic_core

from vidgen_ray.atomic_files import remove, write_atomically
from vidgen_ray.cache_dir import cache_dir, sha256_of
from vidgen_ray.content_keys import ShotPlan
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
SWEPT = ("", "shots", KEYS, "cache", "manifest", "failures", "inputs")
"""Where temporaries may lie."""
REQUESTS_AT_ONCE = 32
"""To an object store, of which each takes tens of milliseconds."""


class ShotDraft:
    """The files of one shot while they are made, in a local folder that nobody looks into."""

    def __init__(self, storage: Storage, plan: ShotPlan, work: Path) -> None:
        self.plan = plan
        self._storage = storage
        self._work = work

    def path(self, name: str) -> Path:
        """Where to write a file that will be called `name`."""
        return self._work / name

    def commit(self, stages: Sequence[StepRecord], likeness: LikenessRecord | None = None) -> ShotRecord:
        """Make the files visible under their names and, last, the shot done."""
        files = sorted(self._work.iterdir())
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
        # An older render of this id stops being done before its first file is replaced.
        self._storage.delete(f"{folder}/{RECORD}")
        # Before the shot is done: one that is done is always found, and what points to one that is not is no harm.
        self._storage.write(key_file(self.plan.key), folder.removeprefix("shots/"))
        self._storage.publish(self._work, folder, [file.name for file in files])
        for stale in self._storage.files(folder).keys() - record.files.keys():
            self._storage.delete(f"{folder}/{stale}")
        self._storage.publish(self._work, folder, [RECORD])
        return record


class OutputFolder:
    """`OUT/`: shots, manifest, failures, run.json and, unless it is switched off, the stage cache.

    `root` is a local path or the URL of an object store. It may travel between processes; credentials travel in the URL or
    are found in the environment there. Raises SetupError for a URL given as a Path; methods raise OSError where the storage
    fails.
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
        """The place as a person may see it: without credentials."""
        return self.storage.url

    @property
    def root(self) -> Path:
        """The folder on this machine. Raises SetupError where it lies in an object store."""
        if self.storage.local is None:
            raise SetupError(f"output folder {self.url}: lies in an object store, this needs a local folder")
        return self.storage.local

    @property
    def stage_cache(self) -> StageCache:
        return StageCache(self.storage)

    def shot_folder(self, shot_id: str) -> Path:
        """On this machine. Raises SetupError where it lies in an object store; see `place`."""
        return self.root / "shots" / shot_id

    def place(self, shot_id: str, name: str) -> Path | str:
        """Where a person finds a file of a shot: a path, or a URL without credentials."""
        return self.storage.place(f"shots/{shot_id}/{name}")

    def read(self, shot_id: str, name: str) -> bytes:
        """The content of a shot's file. Raises FileNotFoundError."""
        content = self.storage.read(f"shots/{shot_id}/{name}")
        if content is None:
            raise FileNotFoundError(f"{self.url}/shots/{shot_id}/{name}")
        return content

    def find_finished(self, plan: ShotPlan, with_stages: bool = False) -> DoneShot | None:
        """The shot if it is finished with this very key, else none.

        `with_stages` asks for the files of `--keep stages`, too. Files are there at their full length; reading them would
        cost a run of many shots too much.
        """
        debug_files = {STAGE_BY_NAME[step.stage].debug_file for step in plan.steps} - {None} if with_stages else set()
        return self._read_finished(_shot_folder(plan), plan.key, debug_files)

    def find_by_key(self, key: str) -> DoneShot | None:
        """The shot that is finished with this key, whatever its id, else none. None, too, where the storage does not answer:
        whoever asks can make it."""
        try:
            shot_id = (self.storage.read(key_file(key)) or b"").decode()
            return self._read_finished(f"shots/{shot_id}", key, set()) if ID_PATTERN.fullmatch(shot_id) else None
        except (OSError, ValueError):
            return None

    def _read_finished(self, folder: str, key: str, debug_files: Set[str | None]) -> DoneShot | None:
        """The shot of this folder, if it is finished with this key and has the files `debug_files`, too."""
        try:
            text = self.storage.read(f"{folder}/{RECORD}")
            if text is None:
                return None
            found = pydantic_core.from_json(text)
            if found["key"] != key:
                return None
            files, stages, likeness = found["files"], found["stages"], found["likeness"]
            if not debug_files <= files.keys():
                return None
            if not self.storage.has(folder, {name: file["bytes"] for name, file in files.items()}):
                return None
            summary = ShotSummary(
                key=key,
                seed=found["shot"]["seed"],
                likeness=likeness and {name: likeness[name] for name in LikenessRecord.model_fields},
                sha256={name: file["sha256"] for name, file in files.items()},
                seconds=sum([step["seconds"] for step in stages]),
                gpu_seconds=sum([step["gpu_seconds"] for step in stages]),
                lora_loads=sum([step["adapter_loads"] for step in stages]),
            )
        # A damaged record is no record; a storage that does not answer is no answer.
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        return DoneShot(summary, text)

    def find_finished_each(
        self, plans: Iterable[ShotPlan], with_stages: bool = False
    ) -> Iterator[tuple[ShotPlan, DoneShot | None]]:
        """Each plan with what `find_finished` returns, in order. An object store is asked for many at once."""
        if self.storage.local is not None:
            for plan in plans:
                yield plan, self.find_finished(plan, with_stages)
            return
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            asked = deque[tuple[ShotPlan, Any]]()
            for plan in plans:
                asked.append((plan, pool.submit(self.find_finished, plan, with_stages)))
                if len(asked) > 2 * REQUESTS_AT_ONCE:
                    ready, found = asked.popleft()
                    yield ready, found.result()
            for ready, found in asked:
                yield ready, found.result()

    @contextmanager
    def draft(self, plan: ShotPlan) -> Iterator[ShotDraft]:
        """A place to make the shot's files; what was not committed at the end is gone."""
        with self.storage.workspace("shots") as work:
            yield ShotDraft(self.storage, plan, work)

    def keep_input(self, content: bytes, suffix: str) -> Path:
        """A file given in memory, stored by its content so that its shot can be repeated: in OUT/inputs, or in this
        machine's cache folder where OUT lies in an object store."""
        folder = (self.storage.local or cache_dir()) / "inputs"
        path = folder / f"{hashlib.sha256(content).hexdigest()[:16]}{suffix}"
        if not path.exists():
            write_atomically(path, content)
        return path

    def delete_shot(self, shot_id: str) -> None:
        """Delete a shot's files, and what its stages left in the cache: another shot that shares a step makes it again."""
        folder = f"shots/{shot_id}"
        text = self.storage.read(f"{folder}/{RECORD}")
        if text is not None:
            with suppress(ValueError, KeyError, TypeError):
                found = pydantic_core.from_json(text)
                if self.storage.read(key_file(found["key"])) == shot_id.encode():
                    self.storage.delete(key_file(found["key"]))
                self.stage_cache.drop([step["key"] for step in found["stages"]])
        self.storage.delete_folder(folder)

    def write_run(self, content: dict[str, Any]) -> None:
        """`run.json`: what ran last in this folder."""
        self.storage.write("run.json", json.dumps(content, indent=1))

    def lease(self, run: str) -> AbstractContextManager[Lease]:
        """Hold the folder for a run. Raises SetupError where another run holds it."""
        return lease(self.storage, run)

    def prepare(self) -> None:
        """Make the folder ready to be written to. Raises SetupError where it cannot be."""
        try:
            self.storage.write(".writable", "")
            self.storage.delete(".writable")
        except OSError as error:
            raise SetupError(f"output folder {self.url}: cannot be written ({error.strerror or error})") from None
        self.sweep()

    def sweep(self) -> None:
        """Remove what killed processes left half made."""
        for path in self.storage.abandoned(SWEPT):
            remove(path)


def key_file(key: str) -> str:
    """Where the id of the shot with this content key is written."""
    return f"{KEYS}/{key}"


def _shot_folder(plan: ShotPlan) -> str:
    assert plan.shot.id is not None
    return f"shots/{plan.shot.id}"


@cache
def software_versions() -> dict[str, str]:
    """What a result's bytes may depend on beside the weights."""
    packages = ("torch", "diffusers", "transformers", "peft", "spandrel", "av")
    return {"vidgen-ray": __version__, **{name: version(name) for name in packages}}
