"""State shared by the routes of the API and of the web page, with the face detector of an API process."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from vidgen_ray.errors import SetupError, StageError
from vidgen_ray.graph import file_sizes
from vidgen_ray.media.images import read_image
from vidgen_ray.online.api_error import ApiError, invalid, without_internals
from vidgen_ray.online.auth import Authenticator, Tenant
from vidgen_ray.online.delivered_size import SizeRules, delivered_artefact
from vidgen_ray.online.event_streams import EventStreams, JobFeed
from vidgen_ray.online.job_service import JobService, StorageCheck
from vidgen_ray.online.queue_estimate import QueueEstimator
from vidgen_ray.online.server_settings import OnlineSettings
from vidgen_ray.online.serving_profile import ServingProfile
from vidgen_ray.online.store.budgets import USAGE_MODEL
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.online.uploads import BodyBudget, FairThread, ImageReferences
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Image
from vidgen_ray.stages.instantid import DetectedPhoto, InstantIDParams, InstantIDStage
from vidgen_ray.video_models import DEFAULT_MODEL, VIDEO_MODELS


class FaceCheck:
    """Face detector of an API replica. Loads its models at the first use, which most replicas never have."""

    def __init__(self, serving_profile: ServingProfile) -> None:
        self._serving_profile = serving_profile
        self._stage: InstantIDStage | None = None
        self.thread = FairThread("faces")
        """Thread of all checks."""

    def check(self, photos: Iterable[Image], count: int = 1) -> list[DetectedPhoto]:
        """Return the faces of each of `count` photos. Call it in `thread`.

        Raises StageError if the photos are unsuitable, ApiError 400 without face models.
        """
        return self._loaded_stage().detect_faces(photos, count)

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
    return ApiError(400, f"Faces are not served here: {without_internals(reason)}", code="not_served")


OPENAI_MODELS = ("sora-2", "sora-2-pro")
"""Names that clients of OpenAI's API send. They mean the default model, unless the setting `models` says otherwise."""
OPENAI_IMAGE_MODELS = re.compile(r"(gpt-image|chatgpt-image|dall-e)-[\w.-]{1,64}")
"""Such names of models of images."""


@dataclass(frozen=True)
class ServerContext:
    """Services of one API process. Created once by `make_app`."""

    settings: OnlineSettings
    store: JobStore
    outputs: OutputFolder
    serving_profile: ServingProfile
    auth: Authenticator
    job_service: JobService
    job_feed: JobFeed
    event_streams: EventStreams
    queue_estimator: QueueEstimator
    storage_check: StorageCheck
    image_references: ImageReferences
    face_check: FaceCheck
    body_budget: BodyBudget
    started_at: int
    """Seconds since 1970."""
    missing: Callable[[], Awaitable[str | None]]
    """Returns what the server lacks to run jobs. `None` if nothing is missing."""

    @cached_property
    def models(self) -> dict[str, dict[str, str]]:
        """Model name -> the shot fields that it sets. The first is the default."""
        name = self.serving_profile.profile.name
        own = {name: {}, f"{name}-fast": {"mode": "fast"}}
        default = self.serving_profile.profile.defaults.get("video_model", DEFAULT_MODEL)
        others = [model for model in VIDEO_MODELS if model in self.serving_profile.params and model != default]
        own |= {f"{name}-{model}": {"video_model": model} for model in others}
        return {**own, **{alias: own[target] for alias, target in self.settings.models.items() if target in own}}

    @cached_property
    def default_shot(self) -> Shot:
        """Shot with the profile's defaults."""
        return Shot.model_validate({"prompt": "-", **self.serving_profile.profile.defaults})

    @cached_property
    def size_rules(self) -> SizeRules:
        """Sizes that this server can draw."""
        default = self.default_shot
        can_upscale = any("scale" in stage.reads for stage in self.serving_profile.stages)
        drawn = default.width, default.height
        makes_clips = any("frames" in stage.writes for stage in self.serving_profile.stages)
        finished = file_sizes(default)[delivered_artefact(default, hd_beside=False)] if makes_clips else drawn
        return SizeRules(*drawn, can_upscale, finished)

    def model(self, name: object, *, for_images: bool = False) -> tuple[str, dict[str, str]]:
        """Return a model's name and the shot fields that it sets; the default model for `None`. Raises ApiError 404."""
        models = self.models
        default = next(iter(models))
        models = {**dict.fromkeys(OPENAI_MODELS, models[default]), **models}
        if for_images and isinstance(name, str) and OPENAI_IMAGE_MODELS.fullmatch(name):
            models.setdefault(name, models[default])
        if name is None:
            name = default
        if not isinstance(name, str) or name not in models:
            message = (
                f"No such model: {str(name)[:100]!r}; the models are {', '.join(self.models)}. "
                "The setting `models` of the server adds other names."
            )
            raise ApiError(404, message, code="model_not_found", param="model")
        return name, models[name]

    def stored_model(self, name: str) -> dict[str, str]:
        """Return the values to store with a job of this model: the name that was sent, and the one that usage counts."""
        target = self.settings.models.get(name, name)
        return {"model": name, USAGE_MODEL: target if target in self.models else next(iter(self.models))}

    async def faces_of(self, tenant: Tenant, photos: Sequence[str], param: str) -> list[DetectedPhoto]:
        """Return the faces of each of these uploads. Raises ApiError 400 if one is not a photo of a face."""

        def check() -> list[DetectedPhoto]:
            found = [self.job_service.uploads.find(tenant.name, photo) for photo in photos]
            paths = [path for path in found if path is not None]
            # Only one photo is in memory.
            return self.face_check.check(map(read_image, paths), len(paths))

        try:
            return await self.face_check.thread.run(tenant.name, check)
        except StageError as error:
            raise invalid(param, str(error).removeprefix("face_image: "), "no_face") from None
