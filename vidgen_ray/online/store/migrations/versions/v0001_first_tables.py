"""Create the tables of the first version."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    meta = op.create_table(
        "vidgen_meta",
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("value", sa.BigInteger, nullable=False),
    )
    op.bulk_insert(meta, [{"name": "changes", "value": 0}])
    op.create_table(
        "vidgen_jobs",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False, unique=True),
        sa.Column("shot", sa.Text, nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("progress", sa.Integer, nullable=False),
        sa.Column("stage", sa.String(64)),
        sa.Column("step", sa.Integer, nullable=False),
        sa.Column("steps", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("started_at", sa.Float(53)),
        sa.Column("completed_at", sa.Float(53)),
        sa.Column("expires_at", sa.Float(53)),
        sa.Column("error", sa.Text),
        sa.Column("shot_id", sa.String(128)),
        sa.Column("stage_seconds", sa.Text, nullable=False),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("owner", sa.String(128)),
        sa.Column("lease_until", sa.Float(53)),
        sa.Column("deleted_at", sa.Float(53)),
        sa.Column("search_text", sa.Text, nullable=False),
    )
    _create_partial_index("by_open", ["state", "tenant", "seq"], "completed_at IS NULL")
    _create_partial_index("by_list", ["tenant", "seq", "kind", "state"], "deleted_at IS NULL")
    _create_partial_index("by_expiry", ["expires_at"], "expires_at IS NOT NULL AND deleted_at IS NULL")
    _create_partial_index("by_deletion", ["deleted_at"], "deleted_at IS NOT NULL")
    op.create_index("vidgen_jobs_by_version", "vidgen_jobs", ["version"])
    op.create_index("vidgen_jobs_by_tenant_version", "vidgen_jobs", ["tenant", "version"])
    op.create_index("vidgen_jobs_by_key", "vidgen_jobs", ["key"])
    op.create_table(
        "vidgen_idempotency",
        sa.Column("tenant", sa.String(128), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("jobs", sa.Text, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
    )
    op.create_index("vidgen_idempotency_by_time", "vidgen_idempotency", ["created_at"])
    op.create_table(
        "vidgen_characters",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("photos", sa.Text, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("consent", sa.Text),
        sa.UniqueConstraint("tenant", "name"),
    )
    op.create_table(
        "vidgen_uploads",
        sa.Column("tenant", sa.String(128), primary_key=True),
        sa.Column("id", sa.String(80), primary_key=True),
        sa.Column("file", sa.String(128), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("used_at", sa.Float(53), nullable=False),
    )
    op.create_index("vidgen_uploads_by_file", "vidgen_uploads", ["file"])
    op.create_index("vidgen_uploads_by_use", "vidgen_uploads", ["used_at"])
    op.create_table(
        "vidgen_outbox",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("target", sa.String(128), nullable=False),
        sa.Column("event", sa.String(64), nullable=False),
        sa.Column("job", sa.String(64), nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.Column("next_try_at", sa.Float(53), nullable=False),
        sa.Column("tries", sa.Integer, nullable=False),
    )
    op.create_index("vidgen_outbox_by_time", "vidgen_outbox", ["next_try_at"])
    op.create_table(
        "vidgen_page_sessions",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("key_id", sa.String(128), nullable=False),
        sa.Column("expires_at", sa.Float(53), nullable=False),
    )


def _create_partial_index(name: str, columns: list[str], where: str) -> None:
    rows = sa.text(where)
    op.create_index(f"vidgen_jobs_{name}", "vidgen_jobs", columns, sqlite_where=rows, postgresql_where=rows)
