"""Records of uploads by tenant. The files are stored by `inputs.uploads`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection, delete, func, insert, select

from vidgen_ray.online.store.database import Database
from vidgen_ray.online.store.jobs import FINAL
from vidgen_ray.online.store.schema import JOBS, UPLOADS


class Upload(BaseModel):
    """File uploaded by a tenant. `file` is its name in the upload folder, the sha256 of its content."""

    model_config = ConfigDict(frozen=True)

    id: str
    tenant: str
    file: str
    bytes: int
    created_at: float


class UploadRecords:
    """Uploads of the store."""

    def __init__(self, database: Database, now: Callable[[], float]) -> None:
        self._database = database
        self._now = now

    def add(self, tenant: str, upload_id: str, file: str, size: int) -> Upload:
        """Record an upload. Return the existing record if the tenant has uploaded the file before."""
        own = [UPLOADS.c.tenant == tenant, UPLOADS.c.id == upload_id]
        with self._database.transaction() as transaction:
            if (row := transaction.connection.execute(select(UPLOADS).where(*own)).one_or_none()) is not None:
                return _upload(row)
            upload = Upload(id=upload_id, tenant=tenant, file=file, bytes=size, created_at=self._now())
            transaction.connection.execute(insert(UPLOADS).values(**upload.model_dump()))
            return upload

    def get(self, upload_id: str, tenant: str) -> Upload | None:
        """Return the tenant's upload, or `None`."""
        query = select(UPLOADS).where(UPLOADS.c.tenant == tenant, UPLOADS.c.id == upload_id)
        with self._database.read_connection() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _upload(row)

    def delete(self, upload_id: str, tenant: str, remove: Callable[[str], None]) -> bool:
        """Delete an upload, and call `remove` if its file is no longer referenced.

        Return False if the tenant has no such upload.
        """
        own = [UPLOADS.c.tenant == tenant, UPLOADS.c.id == upload_id]
        with self._database.transaction() as transaction:
            files = transaction.connection.scalars(delete(UPLOADS).where(*own).returning(UPLOADS.c.file)).all()
            _remove_unreferenced(transaction.connection, files, remove)
        return bool(files)

    def remove_unreferenced(self, files: Iterable[str], remove: Callable[[str], None]) -> None:
        """Call `remove` for those of `files` that are no longer referenced. No upload can be recorded meanwhile."""
        with self._database.read_connection() as connection:
            uploaded = set(connection.scalars(select(UPLOADS.c.file)))
        if candidates := [file for file in files if file not in uploaded]:
            with self._database.transaction() as transaction:
                _remove_unreferenced(transaction.connection, candidates, remove)


def _remove_unreferenced(connection: Connection, files: Iterable[str], remove: Callable[[str], None]) -> None:
    """Remove files that belong to no upload and to no job that is queued or in progress."""
    for file in files:
        uploaded = select(func.count()).where(UPLOADS.c.file == file)
        # The name is a sha256, so it cannot match other text by chance.
        used = select(func.count()).where(JOBS.c.state.not_in(FINAL), JOBS.c.shot.contains(file))
        if not any(connection.execute(query).scalar_one() for query in (uploaded, used)):
            remove(file)


def _upload(row: object) -> Upload:
    return Upload.model_validate({name: getattr(row, name) for name in Upload.model_fields})
