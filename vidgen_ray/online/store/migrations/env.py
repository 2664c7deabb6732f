"""Alembic environment. Run by Alembic only; `schema_upgrade` passes a connection with an open transaction."""

from alembic import context

from vidgen_ray.online.store.database import TABLES, VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], target_metadata=TABLES, version_table=VERSION_TABLE)
context.run_migrations()
