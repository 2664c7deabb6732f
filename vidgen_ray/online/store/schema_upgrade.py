"""Create the tables of a store, or upgrade them to the newest revision, by the Alembic migrations in `migrations/`."""

from __future__ import annotations

from pathlib import Path
from threading import Lock

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Engine, text

from vidgen_ray.errors import SetupError

MIGRATIONS = Path(__file__).parent / "migrations"
VERSION_TABLE = "vidgen_alembic_version"
"""Not Alembic's default name: a PostgreSQL database may be shared with another application."""
POSTGRESQL_LOCK = 0x7669646765
"""Key of the advisory lock held during an upgrade."""

# Alembic keeps the running migration in global variables.
_upgrade_lock = Lock()


def upgrade_schema(engine: Engine) -> None:
    """Bring the tables to the newest revision, in one transaction.

    Processes that open the same store at once wait for each other: on SQLite by the write lock of BEGIN IMMEDIATE, on
    PostgreSQL by an advisory lock. Raises SetupError if the tables are newer than this program.
    """
    config = Config()
    # Config values are subject to %-interpolation.
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)
    newest = scripts.get_current_head()
    with _upgrade_lock, engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": POSTGRESQL_LOCK})
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
        revision = context.get_current_revision()
        if revision is not None and revision not in {script.revision for script in scripts.walk_revisions()}:
            raise SetupError(
                f"database {engine.url.render_as_string(hide_password=True)}: the tables have revision {revision}, which is "
                f"newer than {newest}, the newest that this version of vidgen-ray supports. Use the version that upgraded "
                "them, or another database."
            )
        if revision != newest:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
