"""Whether there is a face in a photo, by the same models and rules as when a shot is made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from threading import Lock
from typing import TypeVar

from vidgen_ray.errors import SetupError
from vidgen_ray.online.api_error import ApiError, without_paths
from vidgen_ray.online.serving_profile import ServingProfile
from vidgen_ray.stages.base import Image
from vidgen_ray.stages.face_models import InstantIDParams
from vidgen_ray.stages.instantid import InstantIDStage

T = TypeVar("T")


class FaceCheck:
    """Loads the models when they are first needed: most replicas of the API never do."""

    def __init__(self, serving_profile: ServingProfile) -> None:
        self._served = serving_profile
        self._stage: InstantIDStage | None = None
        self._alone = Lock()
        self._turn = asyncio.Semaphore(1)

    async def run_exclusively(self, look: Callable[[], T]) -> T:
        """What the look gives, in a thread, one look of this process after another: those who wait hold no thread, which others
        need for what takes no time."""
        async with self._turn:
            return await asyncio.to_thread(look)

    def check(self, photos: list[Image]) -> None:
        """Raises StageError with what is wrong with them, ApiError 400 where faces are not served."""
        with self._alone:
            self._loaded().detect_faces(photos)

    def _loaded(self) -> InstantIDStage:
        if self._stage is None:
            params = self._served.params.get(InstantIDStage.name)
            if not isinstance(params, InstantIDParams):
                raise _not_served(self._served.unavailable.get(InstantIDStage.name, "the profile has no such stage"))
            # Beside what the machine renders with its accelerators, which are spoken for.
            stage = InstantIDStage(params.model_copy(update={"device": "cpu"}))
            try:
                stage.load()
            except SetupError as error:
                raise _not_served(str(error)) from None
            self._stage = stage
        return self._stage


def _not_served(why: str) -> ApiError:
    return ApiError(400, f"Faces are not served here: {without_paths(why)}", code="not_served")
