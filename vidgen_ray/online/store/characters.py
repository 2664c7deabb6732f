"""People a tenant has named: a name and the photos that stand for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict, TypeAdapter
from sqlalchemy import delete, insert, or_, select

from vidgen_ray.errors import VidgenError
from vidgen_ray.online.store.database import Database
from vidgen_ray.online.store.jobs import new_id
from vidgen_ray.online.store.schema import CHARACTERS

PHOTOS = TypeAdapter(tuple[str, ...])


class NameTaken(VidgenError):
    """The tenant has a character of this name, of other photos."""


class Character(BaseModel):
    """A person by name. `photos` are ids of uploads, the first is the one that gives the keypoints."""

    model_config = ConfigDict(frozen=True)

    id: str
    tenant: str
    name: str
    photos: tuple[str, ...]
    created_at: float


class Characters:
    """Part of the store."""

    def __init__(self, database: Database, now: Callable[[], float]) -> None:
        self._database = database
        self._now = now

    def create(self, tenant: str, name: str, photos: Sequence[str]) -> Character:
        """Asked again with the same photos it gives what is there. Raises NameTaken."""
        with self._database.transaction() as change:
            known = select(CHARACTERS).where(CHARACTERS.c.tenant == tenant, CHARACTERS.c.name == name)
            if (row := change.connection.execute(known).one_or_none()) is not None:
                if (found := _character(row)).photos != tuple(photos):
                    raise NameTaken(name)
                return found
            made = Character(id=new_id("char"), tenant=tenant, name=name, photos=tuple(photos), created_at=self._now())
            row_values = {**made.model_dump(), "photos": PHOTOS.dump_json(made.photos).decode(), "seq": change.version}
            change.connection.execute(insert(CHARACTERS).values(**row_values))
            return made

    def get(self, id_or_name: str, tenant: str) -> Character | None:
        """None where the tenant has none of that id or name."""
        called = or_(CHARACTERS.c.id == id_or_name, CHARACTERS.c.name == id_or_name)
        with self._database.read_connection() as connection:
            query = select(CHARACTERS).where(CHARACTERS.c.tenant == tenant, called).limit(1)
            row = connection.execute(query).one_or_none()
        return None if row is None else _character(row)

    def list(self, tenant: str) -> list[Character]:
        """All of a tenant's, the newest first."""
        query = select(CHARACTERS).where(CHARACTERS.c.tenant == tenant).order_by(CHARACTERS.c.seq.desc())
        with self._database.read_connection() as connection:
            return [_character(row) for row in connection.execute(query)]

    def delete(self, character_id: str, tenant: str) -> bool:
        """False where the tenant has none of that id. Jobs that were made with it keep their photos."""
        own = [CHARACTERS.c.id == character_id, CHARACTERS.c.tenant == tenant]
        with self._database.transaction() as change:
            return change.connection.execute(delete(CHARACTERS).where(*own)).rowcount > 0


def _character(row: object) -> Character:
    fields = {name: getattr(row, name) for name in Character.model_fields}
    return Character.model_validate({**fields, "photos": PHOTOS.validate_json(fields["photos"])})
