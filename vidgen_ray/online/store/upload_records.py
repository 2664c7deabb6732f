"""Which tenant brought which file. The files themselves are elsewhere, by their digest; see `uploads`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection, delete, func, insert, select

from vidgen_ray.online.store.database import Database
from vidgen_ray.online.store.jobs import FINAL
from vidgen_ray.online.store.schema import JOBS, UPLOADS


class Upload(BaseModel):
    """A file that a tenant brought. `file` is its name in the folder of uploads: its digest."""

    model_config = ConfigDict(frozen=True)

    id: str
    tenant: str
    file: str
    bytes: int
    created_at: float


class UploadRecords:
    """Part of the store."""

    def __init__(self, database: Database, now: Callable[[], float]) -> None:
        self._database = database
        self._now = now

    def add(self, tenant: str, upload_id: str, file: str, size: int) -> Upload:
        """Note that a tenant has brought a file; once more changes nothing."""
        own = [UPLOADS.c.tenant == tenant, UPLOADS.c.id == upload_id]
        with self._database.transaction() as change:
            if (row := change.connection.execute(select(UPLOADS).where(*own)).one_or_none()) is not None:
                return _upload(row)
            upload = Upload(id=upload_id, tenant=tenant, file=file, bytes=size, created_at=self._now())
            change.connection.execute(insert(UPLOADS).values(**upload.model_dump()))
            return upload

    def get(self, upload_id: str, tenant: str) -> Upload | None:
        """None where this tenant has not brought it, whoever else has."""
        query = select(UPLOADS).where(UPLOADS.c.tenant == tenant, UPLOADS.c.id == upload_id)
        with self._database.read_connection() as connection:
            row = connection.execute(query).one_or_none()
        return None if row is None else _upload(row)

    def delete(self, upload_id: str, tenant: str, remove: Callable[[str], None]) -> bool:
        """Take a file from a tenant; `remove` it where nobody wants it then. False where this tenant has not brought it."""
        own = [UPLOADS.c.tenant == tenant, UPLOADS.c.id == upload_id]
        with self._database.transaction() as change:
            files = change.connection.scalars(delete(UPLOADS).where(*own).returning(UPLOADS.c.file)).all()
            _remove_unwanted(change.connection, files, remove)
        return bool(files)

    def remove_unreferenced(self, files: Iterable[str], remove: Callable[[str], None]) -> None:
        """Remove those that nobody has brought, or has any more. Nobody brings one meanwhile."""
        with self._database.read_connection() as connection:
            brought = set(connection.scalars(select(UPLOADS.c.file)))
        if left := [file for file in files if file not in brought]:
            with self._database.transaction() as change:
                _remove_unwanted(change.connection, left, remove)


def _remove_unwanted(connection: Connection, files: Iterable[str], remove: Callable[[str], None]) -> None:
    """Unless somebody else has brought it, or a job that has not ended is made from it."""
    for file in files:
        brought = select(func.count()).where(UPLOADS.c.file == file)
        # Its name is a digest, so that it stands in no text by chance.
        used = select(func.count()).where(JOBS.c.state.not_in(FINAL), JOBS.c.shot.contains(file))
        if not any(connection.execute(query).scalar_one() for query in (brought, used)):
            remove(file)


def _upload(row: object) -> Upload:
    return Upload.model_validate({name: getattr(row, name) for name in Upload.model_fields})
