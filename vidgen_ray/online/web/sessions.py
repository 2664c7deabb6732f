"""Who is signed in to the page: a random token in a cookie, its digest in the database. A key that expires
ends its sessions at once, since each request asks for the key again; one that is taken out of the keys file does when the
server starts again."""

import hashlib
import secrets
import time

from sqlalchemy import Engine, delete, insert, select

from vidgen_ray.online.store.database import READS
from vidgen_ray.online.store.schema import SESSIONS

COOKIE = "vidgen_session"
LIFE_S = 7 * 24 * 3600


class Sessions:
    """Kept in the store's database, so that every replica of the page knows them and a restart signs nobody out."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def open(self, key_id: str) -> str:
        """A new token for whoever proved to have the key. Sessions that ran out are forgotten on the way."""
        token = secrets.token_urlsafe(32)
        now = time.time()
        with self._engine.begin() as connection:
            connection.execute(delete(SESSIONS).where(SESSIONS.c.expires_at < now))
            connection.execute(insert(SESSIONS).values(digest=_digest(token), key_id=key_id, expires_at=now + LIFE_S))
        return token

    def key_id(self, token: str) -> str | None:
        """Of the key that the session was opened with; none for a token that is unknown or has run out."""
        valid = SESSIONS.c.digest == _digest(token), SESSIONS.c.expires_at > time.time()
        with self._engine.connect() as connection:
            found = connection.execution_options(**READS).execute(select(SESSIONS.c.key_id).where(*valid))
            return found.scalar_one_or_none()

    def close(self, token: str) -> None:
        with self._engine.begin() as connection:
            connection.execute(delete(SESSIONS).where(SESSIONS.c.digest == _digest(token)))


def _digest(token: str) -> str:
    """A token has 256 random bits, so a plain digest of it cannot be turned back."""
    return hashlib.sha256(token.encode()).hexdigest()
