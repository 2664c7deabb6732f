"""Create the tables of stores created without Alembic."""

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
    op.bulk_insert(meta, [{"name": "schema", "value": 1}, {"name": "changes", "value": 0}])
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
    )
    op.create_index("vidgen_jobs_by_state", "vidgen_jobs", ["state", "seq"])
    op.create_index("vidgen_jobs_by_tenant", "vidgen_jobs", ["tenant", "seq"])
    op.create_index("vidgen_jobs_by_version", "vidgen_jobs", ["version"])
    op.create_index("vidgen_jobs_by_shot_id", "vidgen_jobs", ["shot_id"])
    op.create_table(
        "vidgen_idempotency",
        sa.Column("tenant", sa.String(128), primary_key=True),
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("jobs", sa.Text, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
    )
    op.create_table(
        "vidgen_characters",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("tenant", sa.String(128), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("photos", sa.Text, nullable=False),
        sa.Column("seq", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
        sa.UniqueConstraint("tenant", "name"),
    )
    op.create_table(
        "vidgen_uploads",
        sa.Column("tenant", sa.String(128), primary_key=True),
        sa.Column("id", sa.String(80), primary_key=True),
        sa.Column("file", sa.String(128), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.Float(53), nullable=False),
    )
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
