"""Ray actor of an engine that writes the files of several shots at once. After a crash, its unfinished shots start again."""

from __future__ import annotations

import os
from typing import Any

import ray

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.engine_config import EngineConfig
from vidgen_ray.engine.shot_writer import ShotFiles
from vidgen_ray.engine.step_groups import OUTPUT, CallResult
from vidgen_ray.engine.step_runner import StepFailed
from vidgen_ray.engine.worker import ActorPlace, place_of_process
from vidgen_ray.outputs.records import ShotRecord, StepRecord
from vidgen_ray.stages.base import Artefacts, Item

ENCODER_NICENESS = 10
"""Added to the niceness of encoders. Encoding can wait, but a GPU is idle while its process waits for a CPU core."""


class Encoder:
    """Actor that encodes and commits shots."""

    def __init__(self, config: EngineConfig) -> None:
        os.nice(ENCODER_NICENESS)
        self._config = config
        self._open: dict[str, ShotFiles] = {}
        self._director: str | None = None

    def place(self) -> ActorPlace:
        return place_of_process()

    def load(self) -> None:
        """Do nothing. An encoder has no weights."""

    def attach(self, director: str) -> None:
        """Start to work for a director. Deletes the unfinished files of an earlier one, which has crashed."""
        if director != self._director:
            self._director = director
            for shot in list(self._open):
                self.abandon(shot)

    def begin(self, plan: ShotPlan, artefacts: Artefacts) -> CallResult:
        """Start a shot: write the image and the original clip."""
        shot_id = plan.shot.id or ""
        self.abandon(shot_id)
        try:
            encode = self._config.profile.encode
            item = Item(plan.shot, artefacts)
            self._open[shot_id] = ShotFiles(plan, item, self._config.outputs, encode, self._config.keep_stages)
        # Any error, such as a full disk or an unreadable start image, fails this shot only.
        except Exception as error:
            return CallResult.of_failure(StepFailed(OUTPUT, error))
        return CallResult()

    def add(self, shot_id: str, chunk: Artefacts) -> CallResult:
        """Encode the next chunk of the clips made by chunked stages."""
        if shot_id not in self._open:
            return CallResult(session_lost=True)
        try:
            self._open[shot_id].add(chunk)
        except Exception as error:
            return CallResult.of_failure(StepFailed(OUTPUT, error))
        return CallResult()

    def commit(self, shot_id: str, records: tuple[StepRecord, ...]) -> tuple[CallResult, ShotRecord | None]:
        """Finish the files and commit the shot."""
        if shot_id not in self._open:
            return CallResult(session_lost=True), None
        try:
            record = self._open[shot_id].commit(records)
        except Exception as error:
            return CallResult.of_failure(StepFailed(OUTPUT, error)), None
        finally:
            self.abandon(shot_id)
        return CallResult(), record

    def abandon(self, shot_id: str) -> None:
        """Delete the files of a shot that is not committed."""
        files = self._open.pop(shot_id, None)
        if files is not None:
            files.close()


def encoder_class() -> Any:
    """Return the Ray actor class of encoders. Ray restarts a crashed process; its caller decides about retries."""
    return ray.remote(max_restarts=-1, max_task_retries=0)(Encoder)
