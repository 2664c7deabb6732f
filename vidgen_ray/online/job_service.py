"""Turn requests of the API and the web page into stored jobs: resolve files, check the shot, plan its content key.

Also check the storage. Clients reference files by upload id and LoRAs by the names in the settings, so they cannot access
paths of the server.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, Protocol

from pydantic import JsonValue, TypeAdapter
from sqlalchemy.exc import SQLAlchemyError

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.errors import FieldError, MissingWeights, ProfileError, ScriptError, SetupError, StageError, VidgenError
from vidgen_ray.licences import UsedWeights
from vidgen_ray.online.api_error import ApiError, invalid, invalid_fields, not_found, too_many_requests, without_internals
from vidgen_ray.online.auth import LOCAL_TENANT, Tenant
from vidgen_ray.online.server_settings import Limits, OnlineSettings
from vidgen_ray.online.serving_profile import ServingProfile, expected_seconds
from vidgen_ray.online.store.budgets import BudgetExceeded
from vidgen_ray.online.store.database import in_write_thread
from vidgen_ray.online.store.inputs import Character
from vidgen_ray.online.store.jobs import JOB_ID, InputMissing, Job, JobKind, JobState, new_id, shot_id_of
from vidgen_ray.online.store.store import IdempotencyConflict, JobStore, LimitReached, QueueFull
from vidgen_ray.online.uploads import UPLOAD_ID, UploadFolder, upload_folder
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.storage import is_disk_full, low_space
from vidgen_ray.safety import Consent
from vidgen_ray.script.check import check_shot, consent_for_photos
from vidgen_ray.script.lines import WrongField
from vidgen_ray.shot import IMAGE_FIELDS, LORA_FIELDS, PRIORITIES, LoraRef, Priority, Shot, VideoLora

METADATA_BYTES = 64 << 10
"""Largest metadata of a job as JSON, in bytes. A page of a list contains a hundred of them."""
SCRIPT_ONLY_FIELDS = ("id", "variants")
"""Fields of a script line that a job cannot have."""
LORA_NAME_FIELDS = ("name", "lora_name", "adapter", "nickname", "lora_nickname")
LORA_PATH_FIELDS = ("path", "local_path", "lora_path", "lora_local_path")
"""Paths are only compared to those in the settings. No other file is opened."""
LORA_SCALE_FIELDS = ("scale", "weight", "lora_scale", "strength")
KNOWN_LORA_FIELDS = frozenset({*LORA_NAME_FIELDS, *LORA_PATH_FIELDS, *LORA_SCALE_FIELDS, "int_id", "lora_int_id"})
"""Fields of a LoRA in a request, by their names here, in vLLM-Omni and in SGLang. Ids are ignored: names identify LoRAs."""
EXPERT = "expert"
"""Further field of a LoRA of a video model."""
LICENCES = "licences"
"""Field of `Job.request` with the licences of a job that continues another video, which may be deleted before the job."""
LICENCE_LIST = TypeAdapter(tuple[UsedWeights, ...])
QUEUE_FULL_RETRY_S = 5
OPEN_JOBS_RETRY_S = 2
ERASE_RETRY_S = 2


class NotifyDirector(Protocol):
    """Wakes the director: there are new jobs, and jobs to cancel if `has_cancels`. Otherwise it finds them at its next poll."""

    def __call__(self, *, has_cancels: bool = False) -> None: ...


class Erased(NamedTuple):
    """Erased data of a character, and the jobs that were made with it."""

    characters: list[str]
    """Ids of this character and of others that share a photo with it."""
    photos: list[str]
    """Ids of the deleted uploads."""
    videos: list[str]
    """Ids of the jobs that used one of the photos."""
    cached_steps: int
    """Deleted entries of the stage cache."""


class JobService:
    """Creates, cancels and deletes jobs of tenants."""

    def __init__(
        self,
        settings: OnlineSettings,
        store: JobStore,
        outputs: OutputFolder,
        serving_profile: ServingProfile,
        jobs_changed: NotifyDirector,
    ) -> None:
        self._settings = settings
        self._store = store
        self._outputs = outputs
        self.jobs_changed = jobs_changed
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
        is_awaited: bool = False,
    ) -> list[Job]:
        """Store a job for each shot, all or none. Jobs whose shot is already rendered are completed immediately.

        `shots` have the fields of `Shot`, except that `image`, `last_image` and `face_image` are upload ids, `character` is the
        id or name of a character of the tenant, and LoRAs are names from the settings. `request` is returned to the client,
        and with several shots the ids of all jobs as `outputs`. `is_awaited`: the client waits for the results, so without a
        key the jobs are cancelled if this call is, because the client is gone.

        Raises ApiError: 400 for an invalid field, 409 for an idempotency key of a different request, 429 for a full queue.
        """
        if idempotency_key is not None:
            # Before the shots are planned: photos or weights may be gone since.
            try:
                earlier = await asyncio.to_thread(self._store.find_created, tenant.name, idempotency_key, fingerprint)
            except IdempotencyConflict:
                raise key_reused() from None
            if earlier:
                return earlier
        options = {"idempotency_key": idempotency_key, "fingerprint": fingerprint}
        storing = asyncio.ensure_future(in_write_thread(self._store_new, tenant, kind, shots, request, options))
        try:
            stored, created = await asyncio.shield(storing)
        except asyncio.CancelledError:
            # A thread that has begun still stores them.
            if is_awaited and idempotency_key is None:
                for job in (await storing)[0]:
                    await self.cancel(tenant, job.id)
            storing.cancel()
            raise
        except IdempotencyConflict:
            raise key_reused() from None
        except QueueFull as error:
            raise too_many_requests(str(error).capitalize(), "queue_full", QUEUE_FULL_RETRY_S) from None
        except LimitReached as error:
            raise too_many_requests(str(error).capitalize(), "too_many_jobs", OPEN_JOBS_RETRY_S) from None
        except InputMissing as error:
            raise input_missing(error) from None
        except BudgetExceeded as error:
            seconds = None if error.resets_at is None or not error.can_pass_later else error.resets_at - time.time()
            raise over_budget(str(error), seconds) from None
        if created:
            self.jobs_changed()
        return stored

    def _store_new(
        self,
        tenant: Tenant,
        kind: JobKind,
        shots: Sequence[Mapping[str, Any]],
        request: Mapping[str, JsonValue],
        options: Mapping[str, Any],
    ) -> tuple[list[Job], bool]:
        jobs = [self.new_job(tenant, kind, fields, request) for fields in shots]
        check_size(tenant.limits, max((job.shot for job in jobs), key=lambda shot: shot.width * shot.height), len(jobs))
        if len(jobs) > 1:
            outputs = {"outputs": [job.id for job in jobs]}
            jobs = [job.model_copy(update={"request": {**job.request, **outputs}}) for job in jobs]
        return self._store.create_all(
            jobs,
            **options,
            max_queued=self._settings.max_queued,
            max_open=tenant.limits.open_jobs,
            budgets=tenant.limits.budgets,
            files_exist=self.files_exist,
        )

    def files_exist(self, job: Job) -> bool:
        """Return whether the results of a completed job, or the inputs of another one, are stored."""
        if job.state.is_final:
            return self._outputs.find_by_key(job.key) is not None
        named = (getattr(job.shot, field) for field in IMAGE_FIELDS)
        files = [*(file for file in named if file is not None), *job.shot.face_image]
        return all(self._input_exists(job.tenant, file) for file in files)

    def _input_exists(self, tenant: str, file: str) -> bool:
        upload_id = self.uploads.id_of(file)
        # Else it is the last frame of another video.
        return os.path.exists(file) if upload_id is None else self.uploads.find(tenant, upload_id) is not None

    async def cancel(self, tenant: Tenant, job_id: str) -> Job | None:
        """Cancel a queued job or request the cancellation of one in progress. Return `None` if the tenant has no such job."""
        job = await in_write_thread(self._store.request_cancel, job_id, tenant.name)
        self.jobs_changed(has_cancels=True)
        return job

    async def delete(self, tenant: Tenant, job_id: str) -> bool:
        """Hide a job and cancel it. Return False if the tenant has no such job."""
        deleted = await in_write_thread(self._store.delete, job_id, tenant.name)
        self.jobs_changed(has_cancels=True)
        return deleted

    async def erase_character(self, tenant: Tenant, character: Character, *, with_videos: bool) -> Erased:
        """Erase a character, its photos and what is cached of them. Files of other tenants with the same photo are kept.

        Running jobs with its photos are cancelled first: then raises ApiError 409, and the call must be repeated.
        """
        deleted: Sequence[str] | None = None
        cached_steps = 0
        # Until no request has stored another job or character with the face meanwhile.
        while deleted is None:
            all_characters = await asyncio.to_thread(self._store.characters.list, tenant.name)
            characters = [each for each in all_characters if not set(each.photos).isdisjoint(character.photos)]
            photos = sorted({photo for each in (character, *characters) for photo in each.photos})
            files = [photo.removeprefix("file-") for photo in photos]
            jobs = await asyncio.to_thread(self._store.with_files, tenant.name, files)
            await self._end_all(tenant, jobs)
            cached_steps += await asyncio.to_thread(self._drop_cached, jobs)
            ids = [each.id for each in characters], photos, [job.id for job in jobs]
            deleted = await in_write_thread(self._store.erase, tenant.name, *ids, self.uploads.remove)
        if with_videos:
            for job in jobs:
                await self.delete(tenant, job.id)
        return Erased([each.id for each in characters], list(deleted), [job.id for job in jobs], cached_steps)

    async def _end_all(self, tenant: Tenant, jobs: Sequence[Job]) -> None:
        """Cancel the open ones of these jobs. Raises ApiError 409 if one is in progress, which ends later."""
        running = []
        for job in jobs:
            # `None` for one that was deleted, whose running stage continues for a moment.
            left = job if job.state.is_final else await self.cancel(tenant, job.id) or job
            if left.state == JobState.IN_PROGRESS:
                running.append(job.id)
        # A running stage would store features after they were deleted.
        if running:
            message = (
                f"Jobs with this face are running and were cancelled: {', '.join(running[:10])}. Repeat when they have ended."
            )
            headers = {"Retry-After": str(ERASE_RETRY_S), "retry-after-ms": str(ERASE_RETRY_S * 1000)}
            raise ApiError(409, message, code="jobs_running", headers=headers)

    def _drop_cached(self, jobs: Sequence[Job]) -> int:
        """Delete the cached results of these jobs, and return their number."""
        keys = {key for job in jobs for key in self._step_keys(job)}
        stored = [key for key in keys if self._outputs.stage_cache.has(key)]
        self._outputs.stage_cache.drop(stored)
        return len(stored)

    def _step_keys(self, job: Job) -> set[str]:
        keys = set[str]()
        if (finished := self._outputs.find_by_id(job.shot_id or "")) is not None:
            keys |= {step.key for step in finished.stages}
        try:
            plans = list(plans_of(job, self.serving_profile, self._settings))
        except (VidgenError, OSError):
            # The weights or a file of the job are gone, and with them the key.
            return keys
        # With another profile, some steps still have the keys under which the job stored results.
        return keys | {step.key for plan in plans for tried in (plan, *plan.again) for step in tried.steps}

    def plan(self, tenant: Tenant, fields: Mapping[str, Any]) -> ShotPlan:
        """Check the fields of a shot and return its steps and content key. Raises ApiError 400."""
        values = {name: value for name, value in fields.items() if value is not None}
        for name in SCRIPT_ONLY_FIELDS:
            if name in values:
                raise invalid(
                    name, "is only allowed in scripts; a job is one shot and its id is generated", "unknown_parameter"
                )
        values.setdefault("seed", secrets.randbelow(2**32))
        if "character" in values:
            if "face_image" in values:
                raise invalid("character", "cannot be combined with face_image")
            character = self._character(tenant, values.pop("character"))
            values["face_image"] = character.photos
            if character.consent is not None:
                values.setdefault("consent", character.consent)
        values = {**values, **self._file_paths(tenant, values)}
        try:
            profile = self.serving_profile.profile
            shot = check_shot(values, "request", profile.defaults, policy=profile.policy)
        except ScriptError as error:
            raise invalid_fields(error) from None
        allowed = allowed_priorities(tenant.limits)
        if shot.priority not in allowed:
            if "priority" in values:
                raise invalid("priority", f"got {shot.priority}, must be {' or '.join(allowed)} with this key")
            shot = shot.model_copy(update={"priority": allowed[-1]})
        source_licences: Sequence[UsedWeights] = ()
        if shot.continue_from is not None:
            frame, source_licences = self._last_frame(tenant, shot.continue_from)
            shot = shot.continued(frame)
        check_size(tenant.limits, shot)
        if len(json.dumps(shot.metadata, ensure_ascii=False).encode("utf-8", "replace")) > METADATA_BYTES:
            raise invalid("metadata", f"must be at most {METADATA_BYTES} bytes as JSON", "too_large")
        try:
            plan = self.serving_profile.plan(shot, key_salt(tenant.name, self._settings), source_licences)
        except (ProfileError, MissingWeights) as error:
            raise ApiError(400, without_internals(str(error)), code="not_served") from None
        except (StageError, SetupError) as error:
            raise ApiError(400, without_internals(str(error)), code="invalid_value") from None
        if (reason := self.serving_profile.too_large(shot)) is not None:
            raise ApiError(400, reason, code="too_large", param="num_frames" if shot.generate_video else "size")
        return plan

    def new_job(self, tenant: Tenant, kind: JobKind, fields: Mapping[str, Any], request: Mapping[str, JsonValue]) -> Job:
        """Return the job that `accept` would store, without storing it. It is completed if its shot is already rendered.

        Raises ApiError 400.
        """
        plan = self.plan(tenant, fields)
        if (character := fields.get("character")) is not None:
            request = {**request, "character": self._character(tenant, character).name}
        if plan.shot.face_image and plan.shot.consent is None:
            request = {**request, "require_consent": False}
        if plan.shot.continue_from is not None:
            request = {**request, LICENCES: LICENCE_LIST.dump_python(plan.licences, mode="json")}
        now, deadline_s = time.time(), request.get("deadline_s")
        job = Job(
            id=new_id(kind),
            tenant=tenant.name,
            kind=kind,
            priority=plan.shot.priority,
            shot=plan.shot.model_copy(update={"id": shot_id_of(plan.key)}),
            key=plan.key,
            created_at=now,
            key_id=tenant.key_id,
            estimate=self.serving_profile.gpu_seconds(expected_seconds(plan.shot, self.serving_profile.profile)),
            start_by=now + deadline_s if isinstance(deadline_s, int | float) else None,
            request=dict(request),
        )
        rendered = self._outputs.find_by_key(plan.key)
        if rendered is None:
            return job
        shot_id = rendered.shot.id
        completed = {"state": JobState.COMPLETED, "progress": 100, "started_at": now, "completed_at": now, "shot_id": shot_id}
        return job.model_copy(update=completed)

    def _file_paths(self, tenant: Tenant, fields: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields that reference files, with the paths of these files."""
        paths: dict[str, Any] = {}
        for field in IMAGE_FIELDS:
            if field in fields:
                paths[field] = self._upload(tenant, field, fields[field])
        if (photos := fields.get("face_image")) is not None:
            each = photos if isinstance(photos, list | tuple) else [photos]
            paths["face_image"] = [self._upload(tenant, "face_image", photo) for photo in each]
        for field in LORA_FIELDS:
            if field in fields:
                paths[field] = self._loras(field, fields[field])
        return paths

    def _last_frame(self, tenant: Tenant, video_id: str) -> tuple[str, Sequence[UsedWeights]]:
        """Return the file with the last frame of a completed video, and the licences of that video. Raises ApiError 400."""
        job = self._store.get(video_id, tenant.name) if JOB_ID.fullmatch(video_id) else None
        if job is None or job.state != JobState.COMPLETED:
            state = "there is no such video" if job is None else f"{video_id} is {job.state}"
            raise invalid("continue_from", f"must be the id of a completed video; {state}")
        finished = self._outputs.find_by_id(job.shot_id or "")
        try:
            frame = None if finished is None else self._outputs.last_frame(finished)
        except SetupError:
            raise invalid("continue_from", "is not supported by a server whose outputs are in an object store") from None
        if finished is None or frame is None:
            raise invalid(
                "continue_from", f"the last frame of {video_id} was not kept: it was rendered by a batch run or before"
            )
        return str(frame), finished.licences

    def _upload(self, tenant: Tenant, param: str, upload_id: object) -> str:
        path = (
            self.uploads.use(tenant.name, upload_id) if isinstance(upload_id, str) and UPLOAD_ID.fullmatch(upload_id) else None
        )
        if path is None:
            raise invalid(param, "must be a file or the id of a file that you have uploaded", "file_not_found")
        return str(path)

    def consent_of_character(self, tenant: Tenant, photos: Sequence[str], declared: Consent | None) -> Consent | None:
        """Return the consent to store with a character of these uploads. Raises ApiError 400 if there is none."""
        paths = [self._upload(tenant, "image", photo) for photo in photos]
        try:
            return consent_for_photos(paths, declared, required=self.serving_profile.profile.require_consent)
        except WrongField as error:
            raise invalid_fields(ScriptError([FieldError("request", None, error.field, error.got, error.allowed)])) from None

    def _character(self, tenant: Tenant, name: object) -> Character:
        is_valid = isinstance(name, str) and name.isprintable()
        character = self._store.characters.get(str(name), tenant.name) if is_valid else None
        if character is None:
            raise not_found("character", str(name), "character")
        return character

    def _loras(self, param: str, value: object) -> list[dict[str, Any]]:
        if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise invalid(
                    param, 'must be a name or JSON, for example {"name": "ink", "scale": 0.8}', "invalid_json"
                ) from None
        return [self._lora(param, entry) for entry in (value if isinstance(value, list | tuple) else [value])]

    def _lora(self, param: str, value: object) -> dict[str, Any]:
        fields = {"name": value} if isinstance(value, str) else value
        if not isinstance(fields, dict):
            raise invalid(param, 'must be a name, {"name": ..., "scale": ...}, or a list of these')
        own = {EXPERT} if param == "video_lora" else set()
        if unknown := fields.keys() - KNOWN_LORA_FIELDS - own:
            names = "name, scale and expert" if own else "name and scale"
            allowed = f"allowed are {names}, and vLLM-Omni's and SGLang's names for them"
            raise invalid(param, f"got {sorted(map(str, unknown))[0][:50]!r}; {allowed}", "unknown_parameter")
        path = self._registered_lora(
            param, [str(fields[name]) for name in (*LORA_NAME_FIELDS, *LORA_PATH_FIELDS) if fields.get(name) is not None]
        )
        scale = next((fields[name] for name in LORA_SCALE_FIELDS if fields.get(name) is not None), None)
        chosen = {EXPERT: fields[EXPERT]} if EXPERT in fields else {}
        return {"path": path, **chosen} if scale is None else {"path": path, "weight": scale, **chosen}

    def _registered_lora(self, param: str, references: Sequence[str]) -> str:
        """Return the file of the LoRA of the settings that is referenced by its name or its path. Raises ApiError 404."""
        known = {path: path for path in self._settings.loras.values()} | self._settings.loras
        paths = {known[reference] for reference in references if reference in known}
        if len(paths) > 1:
            raise invalid(param, f"{', '.join(map(repr, references))} are different LoRAs; send one of them")
        if not paths:
            names = (
                f"must be one of {', '.join(sorted(self._settings.loras))}" if self._settings.loras else "this server has none"
            )
            raise ApiError(404, f"{param}: no such LoRA; {names}", code="lora_not_found", param=param)
        return paths.pop()


def allowed_priorities(limits: Limits) -> Sequence[Priority]:
    """Return the priorities that a job may have with these limits, the lowest first."""
    return PRIORITIES[: PRIORITIES.index(limits.max_priority) + 1]


def check_size(limits: Limits, shot: Shot, count: int = 1) -> None:
    """Raises ApiError 400 if the models would draw more pixels for `count` such shots than the limit allows."""
    frames = shot.clip_frames if shot.generate_video else 1
    total, allowed = shot.width * shot.height * frames * count, limits.pixel_frames
    if total > allowed:
        results = f" x {count} results" if count > 1 else ""
        raise ApiError(
            400,
            f"{shot.width} x {shot.height} pixels x {frames} frames{results} is {total}, "
            f"must be at most {allowed} for this key. Request fewer frames, fewer results or a smaller size.",
            code="too_large",
            param="num_frames" if shot.generate_video else "size",
        )


def key_salt(tenant: str, settings: OnlineSettings) -> str:
    """Return the text that keeps the content keys of a tenant apart from those of other tenants, empty if they are shared."""
    return "" if settings.share_results_between_tenants or tenant == LOCAL_TENANT else tenant


def plan_job(job: Job, serving_profile: ServingProfile, settings: OnlineSettings) -> ShotPlan:
    """Return the plan of a stored job. The last frames of videos are kept, since any of them may be continued later.

    Raises what `ServingProfile.plan` raises, and ProfileError if the key of the job has changed: the client was promised other
    bytes, and its files are found by that key.
    """
    plan = next((plan for plan in plans_of(job, serving_profile, settings) if plan.key == job.key), None)
    if plan is None:
        raise ProfileError("the server has other weights or another profile than when the job was created; create it again")
    return plan.with_last_frame() if plan.shot.generate_video else plan


def plans_of(job: Job, serving_profile: ServingProfile, settings: OnlineSettings) -> Iterator[ShotPlan]:
    """Yield the plans that a stored job has now, perhaps with other keys: the setting of shared results may have changed."""
    licences, salt = stored_licences(job), key_salt(job.tenant, settings)
    # Stored shots have no priority.
    shot = job.shot.model_copy(update={"priority": job.priority})
    for each in (salt, "" if salt else job.tenant):
        yield serving_profile.plan(shot, each, licences)


def stored_licences(job: Job) -> tuple[UsedWeights, ...]:
    """Return the licences behind a job that continues another video, with those of that video. Empty for other jobs."""
    return LICENCE_LIST.validate_python(job.request.get(LICENCES, ()))


def client_fields(shot: Shot, settings: OnlineSettings, uploads: UploadFolder) -> dict[str, JsonValue]:
    """Return the fields of a shot as a client would send them: upload ids and LoRA names instead of paths of the server."""
    exclude = {"id", "variants", "character", *IMAGE_FIELDS, "face_image", *LORA_FIELDS}
    fields = shot.model_dump(mode="json", exclude=exclude, exclude_none=True)
    for name in ("steps", "guidance"):
        fields[name] = {stage: value for stage, value in fields[name].items() if value is not None}
    for field in IMAGE_FIELDS:
        if (image := getattr(shot, field)) is not None and (upload := uploads.id_of(image)):
            fields[field] = upload
    if photos := [upload for photo in shot.face_image if (upload := uploads.id_of(photo))]:
        fields["face_image"] = photos
    names = {path: name for name, path in settings.loras.items()}
    for field in LORA_FIELDS:
        if loras := [_client_lora(lora, names) for lora in getattr(shot, field) if lora.path in names]:
            fields[field] = loras
    return fields


def _client_lora(lora: LoraRef, names: Mapping[str, str]) -> dict[str, JsonValue]:
    expert: dict[str, JsonValue] = {EXPERT: lora.expert} if isinstance(lora, VideoLora) and lora.expert != "both" else {}
    return {"name": names[lora.path], "scale": lora.weight, **expert}


RESULT_VALID_S = 2.0
"""Seconds for which a result of `StorageCheck` is reused."""


class StorageCheck:
    """Checks of the storage, for requests without a key: at most one at a time. Use it inside an event loop."""

    def __init__(self, store: JobStore, outputs: OutputFolder) -> None:
        self._check = partial(storage_problem, store, outputs)
        self._last: asyncio.Future[str | None] | None = None
        self._valid_until = 0.0

    async def problem(self) -> str | None:
        """Return what `storage_problem` does: of the running check, or of one that ended less than `RESULT_VALID_S` ago."""
        if self._last is None or (self._last.done() and time.monotonic() >= self._valid_until):
            self._last = asyncio.ensure_future(in_write_thread(self._check))
            self._last.add_done_callback(self._ended)
        # A request that does not wait any longer must not end it.
        return await asyncio.shield(self._last)

    def _ended(self, _: object) -> None:
        self._valid_until = time.monotonic() + RESULT_VALID_S


def storage_problem(store: JobStore, outputs: OutputFolder) -> str | None:
    """Return a sentence that tells why jobs cannot be stored or finished, without paths. `None` if they can be. Blocks."""
    with suppress(OSError):
        if outputs.storage.local is not None and (free := low_space(outputs.storage.local)):
            return f"The disk of the output folder is almost full: {free}. Delete files, or set retention_s."
    if (problem := outputs.write_problem()) is not None:
        return f"The output folder cannot be written: {without_internals(problem)}."
    try:
        if store.folder is not None and (free := low_space(store.folder)):
            return f"The disk of the database is almost full: {free}."
        store.write_nothing()
    except (SQLAlchemyError, OSError) as error:
        return f"The database {'is full' if is_disk_full(error) else 'does not respond'}."
    return None


def over_budget(message: str, reset_s: float | None) -> ApiError:
    """Return a 429 error. `reset_s`: seconds after which the request may pass."""
    error = too_many_requests(message, "budget_exceeded", reset_s or 1)
    # Clients would repeat it for hours.
    headers = {**(error.headers if reset_s is not None else {}), "x-should-retry": "false"}
    return ApiError(429, message, code="budget_exceeded", type="insufficient_quota", headers=headers)


def input_missing(error: InputMissing) -> ApiError:
    """Return a 400 error."""
    return ApiError(400, str(error), code="file_not_found")


def key_reused() -> ApiError:
    """Return the error of an `Idempotency-Key` that was used before with another request."""
    return ApiError(
        409,
        "This Idempotency-Key was used before with a different request",
        code="idempotency_key_reused",
        param="Idempotency-Key",
        headers={"x-should-retry": "false"},
    )
