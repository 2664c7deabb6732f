"""What the routes of one app share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends
from starlette.requests import Request

from vidgen_ray.online.api.job_feed import JobFeed
from vidgen_ray.online.api_error import ApiError
from vidgen_ray.online.auth import Keys, Tenant
from vidgen_ray.online.inputs.face_check import FaceCheck
from vidgen_ray.online.inputs.image_references import ImageReferences
from vidgen_ray.online.job_service import JobService
from vidgen_ray.online.limits import RequestRate
from vidgen_ray.online.serving_profile import ServingProfile
from vidgen_ray.online.settings import OnlineSettings
from vidgen_ray.online.store.store import JobStore
from vidgen_ray.outputs.folder import OutputFolder


@dataclass(frozen=True)
class Server:
    """Made once by `make_app`."""

    settings: OnlineSettings
    store: JobStore
    outputs: OutputFolder
    serving_profile: ServingProfile
    keys: Keys
    rate: RequestRate
    intake: JobService
    references: ImageReferences
    followers: JobFeed
    faces: FaceCheck
    started_at: int

    @property
    def models(self) -> dict[str, dict[str, str]]:
        """Name -> what it means for a shot; the first is the one that is meant where none is named."""
        own = {self.serving_profile.profile.name: {}, f"{self.serving_profile.profile.name}-fast": {"mode": "fast"}}
        return {**own, **{alias: own[name] for alias, name in self.settings.models.items() if name in own}}

    def model(self, name: object) -> tuple[str, dict[str, str]]:
        """The model's name and what it means. Raises ApiError 404."""
        models = self.models
        if name is None:
            name = next(iter(models))
        if not isinstance(name, str) or name not in models:
            message = f"No such model: {str(name)[:100]!r}; the models are {', '.join(models)}"
            raise ApiError(404, message, code="model_not_found", param="model")
        return name, models[name]

    def cookie_tenant(self, request: Request) -> Tenant | None:
        """Who is signed in to the page, if there is a page."""
        found = getattr(request.app.state, "cookie_tenant", None)
        tenant = None if found is None else found(request)
        return tenant if isinstance(tenant, Tenant) else None


def server_of(request: Request) -> Server:
    server: Server = request.app.state.server
    return server


ServerDep = Annotated[Server, Depends(server_of)]
