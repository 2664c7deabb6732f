"""Create the tables of the first version.

Until version 0.1.0 is tagged these are the tables of the code. With the tag, copy them here: later migrations change them.
"""

from alembic import op

from vidgen_ray.online.store.database import META, TABLES

revision = "0001"
down_revision = None


def upgrade() -> None:
    TABLES.create_all(op.get_bind(), checkfirst=False)
    op.bulk_insert(META, [{"name": "changes", "value": 0}])
