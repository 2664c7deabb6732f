"""The tables of a server's database, the same in SQLite and PostgreSQL. What is not asked for by itself is JSON in a text."""

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

SCHEMA_VERSION = 1
"""Raised when a table changes. A database of another version is refused, not guessed at."""

TABLES = MetaData()

META = Table(
    "vidgen_meta",
    TABLES,
    Column("name", String(64), primary_key=True),
    Column("value", BigInteger, nullable=False),
)
"""`schema`, and `changes`: how many changes were made. Every change raises it first, so changes wait for one another and are
seen in their order."""

JOBS = Table(
    "vidgen_jobs",
    TABLES,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("seq", BigInteger, nullable=False, unique=True),
    Column("shot", Text, nullable=False),
    Column("key", String(64), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("progress", Integer, nullable=False),
    Column("stage", String(64)),
    Column("step", Integer, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("started_at", Float(53)),
    Column("completed_at", Float(53)),
    Column("expires_at", Float(53)),
    Column("error", Text),
    Column("shot_id", String(128)),
    Column("stage_seconds", Text, nullable=False),
    Column("request", Text, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("owner", String(128)),
    Column("lease_until", Float(53)),
    Column("deleted_at", Float(53)),
    Index("vidgen_jobs_by_state", "state", "seq"),
    Index("vidgen_jobs_by_tenant", "tenant", "seq"),
    Index("vidgen_jobs_by_version", "version"),
    Index("vidgen_jobs_by_shot_id", "shot_id"),
)
"""`seq` is the order of creation. A deleted job stays for a while, so that lists can go on after it and others see it go."""

IDEMPOTENCY = Table(
    "vidgen_idempotency",
    TABLES,
    Column("tenant", String(128), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("jobs", Text, nullable=False),
    Column("created_at", Float(53), nullable=False),
)

CHARACTERS = Table(
    "vidgen_characters",
    TABLES,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("name", String(128), nullable=False),
    Column("photos", Text, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("created_at", Float(53), nullable=False),
    UniqueConstraint("tenant", "name"),
)

UPLOADS = Table(
    "vidgen_uploads",
    TABLES,
    Column("tenant", String(128), primary_key=True),
    Column("id", String(80), primary_key=True),
    Column("file", String(128), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", Float(53), nullable=False),
)
"""Who brought which file. The file itself lies, by its digest, in the data folder."""

OUTBOX = Table(
    "vidgen_outbox",
    TABLES,
    Column("id", String(64), primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("tenant", String(128), nullable=False),
    Column("target", String(128), nullable=False),
    Column("event", String(64), nullable=False),
    Column("job", String(64), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("next_try_at", Float(53), nullable=False),
    Column("tries", Integer, nullable=False),
    Index("vidgen_outbox_by_time", "next_try_at"),
)
"""Messages that a webhook has not taken yet."""

SESSIONS = Table(
    "vidgen_page_sessions",
    TABLES,
    Column("digest", String(64), primary_key=True),
    Column("key_id", String(128), nullable=False),
    Column("expires_at", Float(53), nullable=False),
)
"""Who is signed in to the page: the digest of the cookie's token."""
