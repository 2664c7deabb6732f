"""Alembic migrations of the job store, run when a store is opened.

To change a table: edit `store/database.py` and add `versions/v000N_TITLE.py`, whose `down_revision` is the last revision.
A test compares the migrated tables with those of the code. Migrations are one-way and must run on SQLite and PostgreSQL.
"""
