"""How a request becomes a stored job: names become files, fields become a checked shot, the shot gets its key and its place.

Every way in, the API's and the page's, ends here. A client names files only by ids of what it brought, LoRAs only by the names
the server gave them: no path of the server's can be asked for.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from pydantic import JsonValue

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.errors import MissingWeights, ProfileError, ScriptError, SetupError, StageError
from vidgen_ray.online.api_error import ApiError, invalid, invalid_fields, not_found, too_many_requests, without_paths
from vidgen_ray.online.auth import Tenant
from vidgen_ray.online.inputs.uploads import UploadFolder, upload_folder
from vidgen_ray.online.limits import check_size
from vidgen_ray.online.serving_profile import ServingProfile
from vidgen_ray.online.settings import OnlineSettings
from vidgen_ray.online.store.jobs import Job, JobKind, JobState, new_id, shot_id_of
from vidgen_ray.online.store.store import IdempotencyConflict, JobStore, LimitReached, QueueFull
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.script.reader import check_shot
from vidgen_ray.shot import Shot

UPLOAD = re.compile(r"file-[0-9a-f]{64}")
METADATA_BYTES = 64 << 10
"""Of one job's, as JSON: a list of jobs holds it a hundred times."""
NOT_ASKED_FOR = ("id", "variants")
"""Fields of a script's line that one job has no use for."""
FULL_QUEUE_WAIT_S = 5
OPEN_JOBS_WAIT_S = 2

NotifyDirector = Callable[[], Awaitable[None] | None]
"""Is called when there is something new for the director."""


class JobService:
    """Takes in what tenants ask for."""

    def __init__(
        self,
        settings: OnlineSettings,
        store: JobStore,
        outputs: OutputFolder,
        serving_profile: ServingProfile,
        accepted: NotifyDirector = lambda: None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._outputs = outputs
        self._accepted = accepted
        self.serving_profile = serving_profile
        self.uploads = upload_folder(outputs, store.uploads, settings.uploads)

    async def accept(
        self,
        tenant: Tenant,
        kind: JobKind,
        shots: Sequence[Mapping[str, Any]],
        request: Mapping[str, JsonValue],
        *,
        idempotency_key: str | None = None,
        fingerprint: str = "",
    ) -> list[Job]:
        """A stored job for each shot, all or none. What is rendered already is completed at once.

        The fields are a Shot's, but `image` and `face_image` are ids of uploads, `character` the id or the name of one of the
        tenant's, `lora` names of the server's. `request` is what the client gets back with the job.
        Raises ApiError: 400 names the field, 409 for an idempotency key of another request, 429 for a full queue.
        """
        if idempotency_key is not None:
            try:
                before = await asyncio.to_thread(self._store.find_created, tenant.name, idempotency_key, fingerprint)
            except IdempotencyConflict:
                raise _key_reused() from None
            if before:
                return before
        jobs = [await asyncio.to_thread(self._job, tenant, kind, fields, request) for fields in shots]
        try:
            stored, created = await asyncio.to_thread(
                self._store.create_all,
                jobs,
                idempotency_key=idempotency_key,
                fingerprint=fingerprint,
                max_queued=self._settings.max_queued,
                max_open=tenant.limits.open_jobs,
                files_exist=lambda job: self._outputs.find_by_key(job.key) is not None,
            )
        except IdempotencyConflict:
            raise _key_reused() from None
        except QueueFull as full:
            raise too_many_requests(str(full).capitalize(), "queue_full", FULL_QUEUE_WAIT_S) from None
        except LimitReached as reached:
            raise too_many_requests(str(reached).capitalize(), "too_many_jobs", OPEN_JOBS_WAIT_S) from None
        if created:
            await self.notify_director()
        return stored

    async def cancel(self, tenant: Tenant, job_id: str) -> Job | None:
        """Ask for the end of a job; none where the tenant has no such job."""
        job = await asyncio.to_thread(self._store.request_cancel, job_id, tenant.name)
        await self.notify_director()
        return job

    async def delete(self, tenant: Tenant, job_id: str) -> bool:
        """Make a job unseen and end it; False where the tenant has no such job."""
        deleted = await asyncio.to_thread(self._store.delete, job_id, tenant.name)
        await self.notify_director()
        return deleted

    async def notify_director(self) -> None:
        """Tell the director that there is something new. It looks by itself, too, only later."""
        told = self._accepted()
        if inspect.isawaitable(told):
            await told

    def plan(self, tenant: Tenant, fields: Mapping[str, Any]) -> ShotPlan:
        """The checked shot with its steps and key. Raises ApiError 400."""
        given = {name: value for name, value in fields.items() if value is not None}
        for name in NOT_ASKED_FOR:
            if name in given:
                raise invalid(name, "is a field of scripts; a job is one shot, and gets its own id", "unknown_parameter")
        given.setdefault("seed", secrets.randbelow(2**32))
        given = {**given, **self._files(tenant, given)}
        given.pop("character", None)
        try:
            shot = check_shot(given, "request", self.serving_profile.profile.defaults)
        except ScriptError as error:
            raise invalid_fields(error) from None
        check_size(tenant.limits, shot)
        if len(json.dumps(shot.metadata, ensure_ascii=False).encode("utf-8", "replace")) > METADATA_BYTES:
            raise invalid("metadata", f"is larger than {METADATA_BYTES} bytes as JSON", "too_large")
        try:
            return self.serving_profile.plan(shot)
        except (ProfileError, MissingWeights) as error:
            raise ApiError(400, without_paths(str(error)), code="not_served") from None
        except (StageError, SetupError) as error:
            raise ApiError(400, without_paths(str(error)), code="invalid_value") from None

    def _job(self, tenant: Tenant, kind: JobKind, fields: Mapping[str, Any], request: Mapping[str, JsonValue]) -> Job:
        plan = self.plan(tenant, fields)
        now = time.time()
        job = Job(
            id=new_id(kind),
            tenant=tenant.name,
            kind=kind,
            shot=plan.shot.model_copy(update={"id": shot_id_of(plan.key)}),
            key=plan.key,
            created_at=now,
            request=dict(request),
        )
        done = self._outputs.find_by_key(plan.key)
        if done is None:
            return job
        shot_id = done.record().shot.id
        ended = {"state": JobState.COMPLETED, "progress": 100, "started_at": now, "completed_at": now, "shot_id": shot_id}
        return job.model_copy(update=ended)

    def _files(self, tenant: Tenant, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that name files, by the paths of these files."""
        found: dict[str, Any] = {}
        if "image" in fields:
            found["image"] = self._upload(tenant, "image", fields["image"])
        photos = fields.get("face_image")
        if "character" in fields:
            if photos is not None:
                raise invalid("character", "cannot be given beside face_image: either of them says who it is")
            photos = self._photos(tenant, fields["character"])
        if photos is not None:
            each = photos if isinstance(photos, list | tuple) else [photos]
            found["face_image"] = [self._upload(tenant, "face_image", photo) for photo in each]
        if "lora" in fields:
            found["lora"] = self._loras(fields["lora"])
        return found

    def _upload(self, tenant: Tenant, param: str, upload_id: object) -> str:
        path = self.uploads.find(tenant.name, upload_id) if isinstance(upload_id, str) and UPLOAD.fullmatch(upload_id) else None
        if path is None:
            raise invalid(param, "must be a file, or the id of a file that you have uploaded", "file_not_found")
        return str(path)

    def _photos(self, tenant: Tenant, name: object) -> Sequence[str]:
        known = isinstance(name, str) and name.isprintable()
        character = self._store.characters.get(str(name), tenant.name) if known else None
        if character is None:
            raise not_found("character", str(name)[:100], "character")
        return character.photos

    def _loras(self, given: object) -> list[dict[str, Any]]:
        if isinstance(given, str) and given.lstrip().startswith(("{", "[")):
            try:
                given = json.loads(given)
            except (ValueError, RecursionError):
                raise invalid("lora", 'must be a name or JSON, as {"name": "ink", "scale": 0.8}', "invalid_json") from None
        return [self._lora(one) for one in (given if isinstance(given, list | tuple) else [given])]

    def _lora(self, given: object) -> dict[str, Any]:
        known = f"the names are {', '.join(sorted(self._settings.loras))}" if self._settings.loras else "this server has none"
        settings = {"name": given} if isinstance(given, str) else given
        if not isinstance(settings, dict):
            raise invalid("lora", 'must be a name, or {"name": ..., "scale": ...}, or a list of these')
        if unknown := settings.keys() - {"name", "scale", "weight"}:
            raise invalid("lora", f"got {sorted(map(str, unknown))[0][:50]!r}; a LoRA has name and scale", "unknown_parameter")
        path = self._settings.loras.get(str(settings.get("name")))
        if path is None:
            raise ApiError(404, f"lora: no such LoRA; {known}", code="lora_not_found", param="lora")
        scale = settings.get("scale", settings.get("weight"))
        return {"path": path} if scale is None else {"path": path, "weight": scale}


def client_fields(shot: Shot, settings: OnlineSettings, uploads: UploadFolder) -> dict[str, JsonValue]:
    """The shot's fields as its client may give them again: files by their ids, LoRAs by their names, nothing of the server's
    disks."""
    fields = shot.model_dump(
        mode="json", exclude={"id", "variants", "character", "image", "face_image", "lora"}, exclude_none=True
    )
    for name in ("steps", "guidance"):
        fields[name] = {stage: value for stage, value in fields[name].items() if value is not None}
    if shot.image is not None and (upload := uploads.id_of(shot.image)):
        fields["image"] = upload
    if photos := [upload for photo in shot.face_image if (upload := uploads.id_of(photo))]:
        fields["face_image"] = photos
    named = {path: name for name, path in settings.loras.items()}
    if loras := [{"name": named[lora.path], "scale": lora.weight} for lora in shot.lora if lora.path in named]:
        fields["lora"] = loras
    return fields


def _key_reused() -> ApiError:
    return ApiError(
        409,
        "This Idempotency-Key was used before, with another request",
        code="idempotency_key_reused",
        param="Idempotency-Key",
        headers={"x-should-retry": "false"},
    )
