"""Index open jobs, the lists and changes of each tenant, and old idempotency keys, so that no query scans all jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    for name in ("by_state", "by_tenant", "by_shot_id", "by_expiry", "by_deletion"):
        op.drop_index(f"vidgen_jobs_{name}", "vidgen_jobs")
    _create_partial_index("by_open", ["state", "tenant", "seq"], "completed_at IS NULL")
    _create_partial_index("by_list", ["tenant", "kind", "state", "seq"], "deleted_at IS NULL")
    _create_partial_index("by_expiry", ["expires_at"], "expires_at IS NOT NULL AND deleted_at IS NULL")
    _create_partial_index("by_deletion", ["deleted_at"], "deleted_at IS NOT NULL")
    op.create_index("vidgen_jobs_by_tenant_version", "vidgen_jobs", ["tenant", "version"])
    op.create_index("vidgen_idempotency_by_time", "vidgen_idempotency", ["created_at"])


def _create_partial_index(name: str, columns: list[str], where: str) -> None:
    rows = sa.text(where)
    op.create_index(f"vidgen_jobs_{name}", "vidgen_jobs", columns, sqlite_where=rows, postgresql_where=rows)
