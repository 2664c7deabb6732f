"""Tables of the job store, the same on SQLite and PostgreSQL. Values that are never searched are JSON in a text column.

A change here needs a migration in `migrations/versions`.
"""

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
    text,
)

TABLES = MetaData()


def _partial_index(name: str, where: str, *columns: str) -> Index:
    """Return an index of the rows that match `where`. A query uses it only if its own conditions include `where`."""
    return Index(name, *columns, sqlite_where=text(where), postgresql_where=text(where))


META = Table(
    "vidgen_meta",
    TABLES,
    Column("name", String(64), primary_key=True),
    Column("value", BigInteger, nullable=False),
)
"""One row, `changes`: number of the last write. Every transaction increments it first, which serializes all writers."""

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
    Column("search_text", Text, nullable=False),
    _partial_index("vidgen_jobs_by_open", "completed_at IS NULL", "state", "tenant", "seq"),
    _partial_index("vidgen_jobs_by_list", "deleted_at IS NULL", "tenant", "seq", "kind", "state"),
    _partial_index("vidgen_jobs_by_expiry", "expires_at IS NOT NULL AND deleted_at IS NULL", "expires_at"),
    _partial_index("vidgen_jobs_by_deletion", "deleted_at IS NOT NULL", "deleted_at"),
    Index("vidgen_jobs_by_version", "version"),
    Index("vidgen_jobs_by_tenant_version", "tenant", "version"),
    Index("vidgen_jobs_by_key", "key"),
)
"""`seq` is the order of creation. `completed_at` is set when a job ends, in any final state. A deleted job keeps its row for
some minutes, so that lists can continue after it and clients see the deletion. `search_text` is case-folded."""

IDEMPOTENCY = Table(
    "vidgen_idempotency",
    TABLES,
    Column("tenant", String(128), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("jobs", Text, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Index("vidgen_idempotency_by_time", "created_at"),
)
"""Idempotency keys and the ids of the jobs that they created."""

CHARACTERS = Table(
    "vidgen_characters",
    TABLES,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("name", String(128), nullable=False),
    Column("photos", Text, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("consent", Text),
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
    Column("used_at", Float(53), nullable=False),
    Index("vidgen_uploads_by_file", "file"),
    Index("vidgen_uploads_by_use", "used_at"),
)
"""Uploads of each tenant. `file` is the sha256 of the content and the file name in the data folder."""

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
"""Webhook messages that have not been delivered yet."""

SESSIONS = Table(
    "vidgen_page_sessions",
    TABLES,
    Column("digest", String(64), primary_key=True),
    Column("key_id", String(128), nullable=False),
    Column("expires_at", Float(53), nullable=False),
)
"""Sessions of the web page. `digest` is the sha256 of the token in the cookie."""
