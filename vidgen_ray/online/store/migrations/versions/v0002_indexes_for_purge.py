"""Index the columns that removing old jobs and uploads searches, and make versions without Alembic refuse the store."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_index("vidgen_jobs_by_key", "vidgen_jobs", ["key"])
    op.create_index("vidgen_jobs_by_expiry", "vidgen_jobs", ["expires_at"])
    op.create_index("vidgen_jobs_by_deletion", "vidgen_jobs", ["deleted_at"])
    op.create_index("vidgen_uploads_by_file", "vidgen_uploads", ["file"])
    # Version 0.1 knows nothing of Alembic. It refuses a store whose `schema` is not 1.
    meta = sa.table("vidgen_meta", sa.column("name", sa.String), sa.column("value", sa.BigInteger))
    op.execute(meta.update().where(meta.c.name == "schema").values(value=2))
