"""Characters: named sets of photos of a person, used in place of a face image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict, TypeAdapter
from sqlalchemy import delete, insert, or_, select, update

from vidgen_ray.consent import Consent
from vidgen_ray.errors import VidgenError
from vidgen_ray.online.store.database import Database
from vidgen_ray.online.store.jobs import new_id
from vidgen_ray.online.store.schema import CHARACTERS

PHOTOS = TypeAdapter(tuple[str, ...])


class NameTaken(VidgenError):
    """The tenant already has a character with this name and other photos."""


class Character(BaseModel):
    """Named person. `photos` are upload ids; the face keypoints come from the first one."""

    model_config = ConfigDict(frozen=True)

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
        """Create a character, or return the existing one if it has the same photos, with the new consent. Raises NameTaken."""
        with self._database.transaction() as transaction:
            query = select(CHARACTERS).where(CHARACTERS.c.tenant == tenant, CHARACTERS.c.name == name)
            if (row := transaction.connection.execute(query).one_or_none()) is not None:
                if (existing := _character(row)).photos != tuple(photos):
                    raise NameTaken(name)
                if consent is None or consent == existing.consent:
                    return existing
                own = update(CHARACTERS).where(CHARACTERS.c.id == existing.id)
                transaction.connection.execute(own.values(consent=consent.model_dump_json()))
                return existing.model_copy(update={"consent": consent})
            character = Character(
                id=new_id("char"),
                tenant=tenant,
                name=name,
                photos=tuple(photos),
                created_at=self._now(),
                consent=consent,
            )
            values = {
                **character.model_dump(),
                "photos": PHOTOS.dump_json(character.photos).decode(),
                "consent": consent.model_dump_json() if consent else None,
                "seq": transaction.version,
            }
            transaction.connection.execute(insert(CHARACTERS).values(**values))
            return character

    def get(self, id_or_name: str, tenant: str) -> Character | None:
        """Return the tenant's character with this id or name, or `None`."""
        matches = or_(CHARACTERS.c.id == id_or_name, CHARACTERS.c.name == id_or_name)
        with self._database.read_connection() as connection:
            query = select(CHARACTERS).where(CHARACTERS.c.tenant == tenant, matches).limit(1)
            row = connection.execute(query).one_or_none()
        return None if row is None else _character(row)

    def list(self, tenant: str) -> list[Character]:
        """Return all characters of a tenant, newest first."""
        query = select(CHARACTERS).where(CHARACTERS.c.tenant == tenant).order_by(CHARACTERS.c.seq.desc())
        with self._database.read_connection() as connection:
            return [_character(row) for row in connection.execute(query)]

    def delete(self, character_id: str, tenant: str) -> bool:
        """Delete a character. Jobs created with it keep their photos. Return False if the tenant has no such character."""
        own = [CHARACTERS.c.id == character_id, CHARACTERS.c.tenant == tenant]
        with self._database.transaction() as transaction:
            return transaction.connection.execute(delete(CHARACTERS).where(*own)).rowcount > 0


def _character(row: object) -> Character:
    fields = {name: getattr(row, name) for name in Character.model_fields}
    consent = Consent.model_validate_json(fields["consent"]) if fields["consent"] else None
    return Character.model_validate({**fields, "photos": PHOTOS.validate_json(fields["photos"]), "consent": consent})
