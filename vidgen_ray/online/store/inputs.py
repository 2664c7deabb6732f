"""Inputs that tenants keep on the server: characters, and records of uploaded files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection, Text, cast, delete, func, insert, literal, or_, select, tuple_, update

from vidgen_ray.errors import VidgenError
from vidgen_ray.online.store.database import BATCHES, CHARACTERS, JOBS, UPLOADS, Database, Transaction
from vidgen_ray.online.store.jobs import new_id
from vidgen_ray.safety import Consent


class NameTaken(VidgenError):
    """The tenant already has a character with this name and other photos."""


class UploadMissing(VidgenError):
    """The tenant has no such upload."""


class UploadInUse(VidgenError):
    """The upload cannot be deleted. The message says what needs it and what to do."""


class Character(BaseModel):
    """Named person. `photos` are upload ids; the face keypoints come from the first one."""

    model_config = ConfigDict(frozen=True, from_attributes=True)

    id: str
    tenant: str
    name: str
    photos: tuple[str, ...]
    created_at: float
    consent: Consent | None = None
    """Why the face may be used. `None` if the server does not require one."""


class Characters:
    """Characters of the store."""

    def __init__(self, database: Database, now: Callable[[], float]) -> None:
        self._database = database
        self._now = now

    def create(self, tenant: str, name: str, photos: Sequence[str], consent: Consent | None = None) -> Character:
        """Create a character, or return the existing one if it has the same photos, with the new consent.

        Raises NameTaken, and UploadMissing if a photo is not an upload of the tenant any more.
        """
        with self._database.transaction() as transaction:
            query = select(CHARACTERS).where(CHARACTERS.c.tenant == tenant, CHARACTERS.c.name == name)
            if (row := transaction.connection.execute(query).one_or_none()) is not None:
                if (existing := Character.model_validate(row)).photos != tuple(photos):
                    raise NameTaken(name)
                if consent is None or consent == existing.consent:
                    return existing
                own = update(CHARACTERS).where(CHARACTERS.c.id == existing.id)
                transaction.connection.execute(own.values(consent=consent.model_dump(mode="json")))
                return existing.model_copy(update={"consent": consent})
            for photo in photos:
                keep_upload(transaction, tenant, photo, self._now())
            character = Character(
                id=new_id("char"),
                tenant=tenant,
                name=name,
                photos=tuple(photos),
                created_at=self._now(),
                consent=consent,
            )
            values = {**character.model_dump(mode="json"), "seq": transaction.version}
            transaction.connection.execute(insert(CHARACTERS).values(values))
            return character

    def get(self, id_or_name: str, tenant: str) -> Character | None:
        """Return the tenant's character with this id or name, or `None`."""
        matches = or_(CHARACTERS.c.id == id_or_name, CHARACTERS.c.name == id_or_name)
        found = self._database.rows(select(CHARACTERS).where(CHARACTERS.c.tenant == tenant, matches).limit(1))
        return Character.model_validate(found[0]) if found else None

    def list(self, tenant: str) -> list[Character]:
        """Return all characters of a tenant, newest first."""
        query = select(CHARACTERS).where(CHARACTERS.c.tenant == tenant).order_by(CHARACTERS.c.seq.desc())
        return [Character.model_validate(row) for row in self._database.rows(query)]

    def delete(self, character_id: str, tenant: str) -> bool:
        """Delete a character. Jobs created with it keep their photos. Return False if the tenant has no such character."""
        own = [CHARACTERS.c.id == character_id, CHARACTERS.c.tenant == tenant]

        def delete_row() -> bool:
            with self._database.transaction() as transaction:
                return transaction.connection.execute(delete(CHARACTERS).where(*own)).rowcount > 0

        return self._database.with_reserve(delete_row)


MIN_COUNTED_BYTES = 4096
"""Bytes that an upload counts at least: a block of the disk."""


USE_INTERVAL_S = 3600.0


Purpose = Literal["vision", "batch", "batch_output"]
PREFIXES: Mapping[Purpose, str] = {"batch": "file-batch-", "batch_output": "file-output-", "vision": "file-"}
"""Purpose of an upload -> start of its id, which ends with its sha256. Requests for images accept only ids of images."""


class StorageFull(VidgenError):
    """The tenant's uploads reach the limit."""


class Upload(BaseModel):
    """File uploaded by a tenant. `file` is its name in the upload folder, the sha256 of its content."""

    model_config = ConfigDict(frozen=True, from_attributes=True)

    id: str
    tenant: str
    file: str
    bytes: int
    created_at: float
    used_at: float
    """Time of the last request that named the upload or sent the file again."""
    filename: str | None = None
    """Name that the client gave. Never part of a path."""
    lines: int = 0
    """Most lines that the file of a batch may have."""
    expires_at: float | None = None
    """Time after which it is deleted, unless something needs it. `None`: when it was not used for a time."""

    @property
    def purpose(self) -> Purpose:
        """Purpose of the file, as its id says."""
        return next(purpose for purpose, prefix in PREFIXES.items() if self.id.startswith(prefix))


class UploadDetails(NamedTuple):
    """What a client says about an upload, and the number of its lines."""

    filename: str | None = None
    expires_after_s: float | None = None
    lines: int = 0


NO_DETAILS = UploadDetails()


class UploadRecords:
    """Uploads of the store."""

    def __init__(self, database: Database, now: Callable[[], float]) -> None:
        self._database = database
        self._now = now

    def add(
        self,
        tenant: str,
        upload_id: str,
        file: str,
        size: int,
        max_bytes: int | None = None,
        *,
        details: UploadDetails = NO_DETAILS,
        place: Callable[[], object] = lambda: None,
    ) -> Upload:
        """Record an upload. If the tenant has uploaded the file before, its record gets the new name and the later expiry.

        `place` stores the file. If it raises OSError, nothing is recorded.

        Raises StorageFull if all uploads of the tenant would have more than `max_bytes` bytes.
        """
        own = [UPLOADS.c.tenant == tenant, UPLOADS.c.id == upload_id]
        with self._database.transaction() as transaction:
            if (row := transaction.connection.execute(select(UPLOADS).where(*own)).one_or_none()) is not None:
                ends = row.expires_at, self._expiry(details)
                expires_at = None if None in ends else max(ends)
                name = details.filename or row.filename
                place()
                again = update(UPLOADS).where(*own).values(used_at=self._now(), filename=name, expires_at=expires_at)
                return Upload.model_validate(transaction.connection.execute(again.returning(UPLOADS)).one())
            if max_bytes is not None:
                check_space(transaction.connection, tenant, size, max_bytes)
            now = self._now()
            upload = Upload(
                id=upload_id,
                tenant=tenant,
                file=file,
                bytes=size,
                created_at=now,
                used_at=now,
                filename=details.filename,
                lines=details.lines,
                expires_at=self._expiry(details),
            )
            transaction.connection.execute(insert(UPLOADS).values(**upload.model_dump()))
            place()
            return upload

    def _expiry(self, details: UploadDetails) -> float | None:
        return None if details.expires_after_s is None else self._now() + details.expires_after_s

    def get(self, upload_id: str, tenant: str) -> Upload | None:
        """Return the tenant's upload, or `None`."""
        found = self._database.rows(select(UPLOADS).where(UPLOADS.c.tenant == tenant, UPLOADS.c.id == upload_id))
        return Upload.model_validate(found[0]) if found else None

    def list(
        self, tenant: str, after: str | None, limit: int, order: Literal["asc", "desc"], purpose: Purpose | None = None
    ) -> list[Upload]:
        """Return a page of the tenant's uploads, of one purpose or all; `desc`: newest first.

        It starts after the upload with id `after`. If that was deleted, as all of its page may be by now, it is the first page.
        """
        query, place = select(UPLOADS).where(UPLOADS.c.tenant == tenant), (UPLOADS.c.created_at, UPLOADS.c.id)
        if purpose is not None:
            query = query.where(func.length(UPLOADS.c.id) == len(PREFIXES[purpose]) + 64)
        if after is not None and (last := self.get(after, tenant)) is not None:
            known = tuple_(literal(last.created_at), literal(last.id))
            query = query.where(tuple_(*place) < known if order == "desc" else tuple_(*place) > known)
        query = query.order_by(*(column.desc() if order == "desc" else column for column in place)).limit(limit)
        return [Upload.model_validate(row) for row in self._database.rows(query)]

    def use(self, upload_id: str, tenant: str) -> Upload | None:
        """Return the tenant's upload and record that it is used, or return `None`.

        Times less than `USE_INTERVAL_S` after the last recorded one are not recorded: most requests do not write.
        """
        if (upload := self.get(upload_id, tenant)) is None or self._now() - upload.used_at < USE_INTERVAL_S:
            return upload
        own = [UPLOADS.c.tenant == tenant, UPLOADS.c.id == upload_id]
        used = update(UPLOADS).where(*own).values(used_at=self._now()).returning(UPLOADS)
        with self._database.transaction() as transaction:
            row = transaction.connection.execute(used).one_or_none()
        return None if row is None else Upload.model_validate(row)

    def expire(self, unused_s: float | None, remove: Callable[[str], None]) -> None:
        """Delete the uploads that have expired, and those whose last use is more than `unused_s` seconds ago, if given.

        Photos of characters and files of unfinished jobs count as used. `remove` deletes files that are no longer referenced.
        """
        expired = UPLOADS.c.expires_at < self._now()
        if unused_s is not None:
            expired = or_(expired, UPLOADS.c.used_at < self._now() - unused_s)
        # One transaction each: they block other writes.
        for row in self._database.rows(select(UPLOADS).where(expired)):
            own = [UPLOADS.c.tenant == row.tenant, UPLOADS.c.id == row.id]
            with self._database.transaction() as transaction:
                if _is_needed(transaction.connection, row.tenant, row.id, row.file):
                    transaction.connection.execute(update(UPLOADS).where(*own).values(used_at=self._now()))
                # It may have been used since it was selected.
                elif transaction.connection.execute(delete(UPLOADS).where(*own, expired)).rowcount:
                    _remove_unreferenced(transaction.connection, [row.file], remove)

    def delete(self, upload_id: str, tenant: str, remove: Callable[[str], None]) -> bool:
        """Delete an upload, and call `remove` if its file is no longer referenced.

        Return False if the tenant has no such upload. Raises UploadInUse.
        """
        own = [UPLOADS.c.tenant == tenant, UPLOADS.c.id == upload_id]

        def delete_row() -> bool:
            with self._database.transaction() as transaction:
                files = transaction.connection.scalars(delete(UPLOADS).where(*own).returning(UPLOADS.c.file)).all()
                use = _use_of(transaction.connection, tenant, upload_id) if files else None
                if use is not None:
                    raise UploadInUse(f"{upload_id} is {use} first.")
                _remove_unreferenced(transaction.connection, files, remove)
            return bool(files)

        return self._database.with_reserve(delete_row)

    def remove_unreferenced(self, files: Iterable[str], remove: Callable[[str], None]) -> None:
        """Call `remove` for those of `files` that are no longer referenced. No upload can be recorded meanwhile."""
        uploaded = {row.file for row in self._database.rows(select(UPLOADS.c.file))}
        if candidates := [file for file in files if file not in uploaded]:
            with self._database.transaction() as transaction:
                _remove_unreferenced(transaction.connection, candidates, remove)


def check_space(connection: Connection, tenant: str, size: int, max_bytes: int) -> None:
    """Raise StorageFull if the tenant may not store that many more bytes, beside those reserved for its running batches."""
    counted = func.sum(UPLOADS.c.bytes), func.count()
    stored, number = connection.execute(select(*counted).where(UPLOADS.c.tenant == tenant)).one()
    running = BATCHES.c.ended_at.is_(None), BATCHES.c.tenant == tenant
    reserved = int(connection.scalar(select(func.sum(BATCHES.c.reserved_bytes)).where(*running)) or 0)
    used = max(int(stored or 0), number * MIN_COUNTED_BYTES)
    if used + reserved + max(size, MIN_COUNTED_BYTES) > max_bytes:
        batches = f", {reserved} are reserved for running batches" if reserved else ""
        raise StorageFull(f"Uploads use {used} bytes{batches}, this needs {size}; all together may use {max_bytes}")


def keep_upload(transaction: Transaction, tenant: str, upload_id: str, now: float) -> Upload:
    """Record in the transaction that stores a reference to an upload that it is used. Return it. Raises UploadMissing."""
    own = UPLOADS.c.tenant == tenant, UPLOADS.c.id == upload_id
    used = update(UPLOADS).where(*own).values(used_at=now).returning(UPLOADS)
    row = transaction.connection.execute(used).one_or_none()
    if row is None:
        raise UploadMissing(upload_id)
    return Upload.model_validate(row)


def _is_needed(connection: Connection, tenant: str, upload_id: str, file: str) -> bool:
    """Return whether an upload is a photo of a character, the input of a running batch, or its file that of an open job."""
    return _use_of(connection, tenant, upload_id) is not None or _has_open_job(connection, file)


def _use_of(connection: Connection, tenant: str, upload_id: str) -> str | None:
    """Return what needs an existing upload, and how to end that. `None` if it may be deleted."""
    own = BATCHES.c.tenant == tenant, BATCHES.c.input_file_id == upload_id
    batch = connection.scalar(select(BATCHES.c.id).where(BATCHES.c.ended_at.is_(None), *own).limit(1))
    if batch is not None:
        return f"the input of the running batch {batch}. Cancel the batch"
    is_photo = cast(CHARACTERS.c.photos, Text).contains(upload_id)
    name = connection.scalar(select(CHARACTERS.c.name).where(CHARACTERS.c.tenant == tenant, is_photo).limit(1))
    return None if name is None else f"a photo of the character {name!r}. Delete the character"


def _has_open_job(connection: Connection, file: str) -> bool:
    # The name is a sha256, so it cannot match other text by chance.
    query = select(JOBS.c.id).where(JOBS.c.completed_at.is_(None), cast(JOBS.c.shot, Text).contains(file)).limit(1)
    return connection.execute(query).first() is not None


def _remove_unreferenced(connection: Connection, files: Iterable[str], remove: Callable[[str], None]) -> None:
    """Remove files that belong to no upload and to no job that is queued or in progress."""
    for file in files:
        uploaded = select(UPLOADS.c.id).where(UPLOADS.c.file == file).limit(1)
        if connection.execute(uploaded).first() is None and not _has_open_job(connection, file):
            remove(file)
