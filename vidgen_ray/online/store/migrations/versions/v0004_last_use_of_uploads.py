"""Record when an upload was last used, so that unused ones can be deleted."""

import time

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    # SQLite cannot add a column that is not nullable without a default.
    op.add_column("vidgen_uploads", sa.Column("used_at", sa.Float(53)))
    uploads = sa.table("vidgen_uploads", sa.column("used_at", sa.Float))
    # Not the time of the upload: none may expire at the first start of a new version.
    op.execute(uploads.update().values(used_at=time.time()))
    op.create_index("vidgen_uploads_by_use", "vidgen_uploads", ["used_at"])
