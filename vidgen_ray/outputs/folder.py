"""`OUT/`: where the files of a shot are made, committed and found again.

`shots/<id>/shot.json` is the commit point: written last, by rename. A shot is done when it is there with the shot's key.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path

from vidgen_ray.atomic import flush_to_disk, is_temporary, sweep, temporary_folder, write_atomically
from vidgen_ray.errors import SetupError
from vidgen_ray.graph import STAGE_BY_NAME, ShotPlan
from vidgen_ray.local_cache import sha256_of
from vidgen_ray.outputs.records import FileRecord, ShotRecord, StepRecord
from vidgen_ray.outputs.stage_cache import StageCache
from vidgen_ray.version import __version__


class ShotDraft:
    """The files of one shot while they are made, in a hidden folder beside their final place."""

    def __init__(self, folder: Path, plan: ShotPlan) -> None:
        self.plan = plan
        self._folder = folder
        self._work = temporary_folder(folder)

    def path(self, name: str) -> Path:
        """Where to write a file that will be called `name`."""
        return self._work / name

    def commit(self, stages: Sequence[StepRecord]) -> ShotRecord:
        """Make the files visible under their names and, last, the shot done."""
        files = sorted(self._work.iterdir())
        record = ShotRecord(
            key=self.plan.key,
            shot=self.plan.shot,
            seeds={step.stage: self.plan.shot.generator_seed(step.stage) for step in self.plan.steps},
            stages=tuple(stages),
            files={f.name: FileRecord(sha256=sha256_of(f), bytes=f.stat().st_size) for f in files},
            software=software_versions(),
        )
        # An older render of this id stops being done before its first file is replaced.
        (self._folder / "shot.json").unlink(missing_ok=True)
        for file in files:
            flush_to_disk(file)
            os.replace(file, self._folder / file.name)
        kept = {f.name for f in files}
        for stale in self._folder.iterdir():
            if stale.is_file() and stale.name not in kept and not is_temporary(stale):
                stale.unlink(missing_ok=True)
        write_atomically(self._folder / "shot.json", record.model_dump_json(indent=1))
        return record

    def discard(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)


class OutputFolder:
    """`OUT/`: shots, manifest, failures, run.json and, unless it is switched off, the stage cache."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def stage_cache(self) -> StageCache:
        return StageCache(self.root / "cache")

    def shot_folder(self, shot_id: str) -> Path:
        return self.root / "shots" / shot_id

    def done(self, plan: ShotPlan, with_stages: bool = False) -> ShotRecord | None:
        """The record of the shot if it is finished with this very key, else none.

        `with_stages` asks for the files of `--keep stages`, too.
        """
        assert plan.shot.id is not None
        try:
            text = (self.shot_folder(plan.shot.id) / "shot.json").read_text(encoding="utf-8")
            record = ShotRecord.model_validate_json(text)
        except (OSError, ValueError):
            return None
        expected = {STAGE_BY_NAME[step.stage].keeps for step in plan.steps} - {None} if with_stages else set()
        whole = record.key == plan.key and expected <= set(record.files) and self._has(plan.shot.id, record)
        return record if whole else None

    def _has(self, shot_id: str, record: ShotRecord) -> bool:
        """Whether the files are there at their full length. Reading them would cost a run of many shots too much."""
        folder = self.shot_folder(shot_id)
        try:
            return all((folder / name).stat().st_size == file.bytes for name, file in record.files.items())
        except FileNotFoundError:
            return False

    @contextmanager
    def draft(self, plan: ShotPlan) -> Iterator[ShotDraft]:
        """A place to make the shot's files; what was not committed at the end is gone."""
        assert plan.shot.id is not None
        draft = ShotDraft(self.shot_folder(plan.shot.id), plan)
        try:
            yield draft
        finally:
            draft.discard()

    def prepare(self) -> None:
        """Make the folder ready to be written to. Raises SetupError where it cannot be."""
        try:
            write_atomically(self.root / ".writable", "")
            (self.root / ".writable").unlink(missing_ok=True)
        except OSError as error:
            raise SetupError(f"output folder {self.root}: cannot be written ({error.strerror})") from None
        self.sweep()

    def sweep(self) -> None:
        """Remove what killed processes left half made."""
        for pattern in ("shots/*/*", "cache/*/*", "manifest/*", "inputs/*", "*"):
            sweep(self.root, pattern)


@cache
def software_versions() -> dict[str, str]:
    """What a result's bytes may depend on beside the weights."""
    packages = ("torch", "diffusers", "transformers", "peft", "spandrel", "av")
    return {"vidgen-ray": __version__, **{name: version(name) for name in packages}}
