"""Store the consent to the use of a character's face. Characters of earlier versions have none."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("vidgen_characters", sa.Column("consent", sa.Text))
