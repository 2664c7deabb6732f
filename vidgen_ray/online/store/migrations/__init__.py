"""Alembic migrations of the job store, run when a store is opened (see `schema_upgrade`).

To change a table: edit `schema.py` and add `versions/v000N_TITLE.py`, whose `down_revision` is the last revision.
A test compares the migrated tables with `schema.py`. Migrations are one-way and must run on SQLite and PostgreSQL.
"""
