"""Store the text that a search looks for, and index the ended jobs of each tenant, so that the database can search."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
BATCH = 1_000
COLUMNS = ("id", "seq", "shot", "request", "search_text")


def upgrade() -> None:
    # SQLite cannot add a column that is not nullable without a default.
    op.add_column("vidgen_jobs", sa.Column("search_text", sa.Text))
    jobs = sa.table("vidgen_jobs", *map(sa.column, COLUMNS))
    connection = op.get_bind()
    fill = jobs.update().where(jobs.c.id == sa.bindparam("job")).values(search_text=sa.bindparam("text"))
    last = -1
    while rows := connection.execute(jobs.select().where(jobs.c.seq > last).order_by(jobs.c.seq).limit(BATCH)).all():
        connection.execute(fill, [{"job": row.id, "text": _search_text(row)} for row in rows])
        last = rows[-1].seq
    condition = sa.text("completed_at IS NOT NULL AND deleted_at IS NULL")
    op.create_index("vidgen_jobs_by_end", "vidgen_jobs", ["tenant", "seq"], sqlite_where=condition, postgresql_where=condition)


def _search_text(row: sa.Row[tuple[str, ...]]) -> str:
    shot, request = json.loads(row.shot), json.loads(row.request)
    texts = (shot["prompt"], shot.get("style_prompt"), request.get("character"), f"seed:{shot.get('seed')}", row.id)
    return " ".join(str(text) for text in texts if text).casefold()
