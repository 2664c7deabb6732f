"""Check that photos contain a face, with the models and rules that also render shots."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, overload

from vidgen_ray.errors import SetupError
from vidgen_ray.media import read_image
from vidgen_ray.online.api_error import ApiError, without_paths
from vidgen_ray.online.serving_profile import ServingProfile
from vidgen_ray.stages.base import Image
from vidgen_ray.stages.instantid import DetectedPhoto, InstantIDParams, InstantIDStage

T = TypeVar("T")


class PhotoFiles(Sequence[Image]):
    """Photos that are read from their files each time they are used, so that only one of them is in memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> Image: ...

    @overload
    def __getitem__(self, index: slice) -> PhotoFiles: ...

    def __getitem__(self, index: int | slice) -> Image | PhotoFiles:
        return PhotoFiles(self._files[index]) if isinstance(index, slice) else read_image(self._files[index])


class FaceCheck:
    """Face detector of an API replica. Loads its models at the first use, which most replicas never have."""

    def __init__(self, serving_profile: ServingProfile) -> None:
        self._serving_profile = serving_profile
        self._stage: InstantIDStage | None = None
        self._thread = ThreadPoolExecutor(1, "faces")

    async def run_exclusively(self, check: Callable[[], T]) -> T:
        """Run `check` in the thread of all checks and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, check)

    def check(self, photos: Sequence[Image]) -> list[DetectedPhoto]:
        """Return the faces of each photo. Raise StageError if the photos are unsuitable, ApiError 400 without face models.

        Call it inside `run_exclusively`.
        """
        return self._loaded_stage().detect_faces(photos)

    def _loaded_stage(self) -> InstantIDStage:
        if self._stage is None:
            params = self._serving_profile.params.get(InstantIDStage.name)
            if not isinstance(params, InstantIDParams):
                raise _not_served(self._serving_profile.unavailable.get(InstantIDStage.name, "the profile has no such stage"))
            # On the CPU: the GPUs are reserved for rendering.
            stage = InstantIDStage(params.model_copy(update={"device": "cpu"}))
            try:
                stage.load()
            except SetupError as error:
                raise _not_served(str(error)) from None
            self._stage = stage
        return self._stage


def _not_served(reason: str) -> ApiError:
    return ApiError(400, f"Faces are not served here: {without_paths(reason)}", code="not_served")
