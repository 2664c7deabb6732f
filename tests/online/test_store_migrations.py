"""Tables of the job store: created by migrations, on SQLite and PostgreSQL."""

import subprocess
import sys

import pytest
from sqlalchemy import create_engine, inspect, make_url, text

from vidgen_ray.errors import SetupError
from vidgen_ray.online.store.database import VERSION_TABLE
from vidgen_ray.online.store.store import JobStore

NEWEST = "0001"


def revisions(store):
    with store.engine.connect() as connection:
        return list(connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalars())


def test_store_of_a_newer_version_is_refused(database_url):
    store = JobStore(database_url)
    with store.engine.begin() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '0099'"))
    with pytest.raises(SetupError, match=f"revision 0099, which is newer than {NEWEST}"):
        JobStore(database_url)
    assert revisions(store) == ["0099"]
    store.close()


def test_failed_creation_changes_nothing(database_url):
    engine = create_engine(make_url(database_url.replace("postgresql://", "postgresql+psycopg://")))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE vidgen_outbox (id INTEGER)"))
    with pytest.raises(SetupError, match="already exists"):
        JobStore(database_url)
    assert inspect(engine).get_table_names() == ["vidgen_outbox"]
    engine.dispose()


def test_processes_that_open_a_store_at_once_create_the_tables_once(database_url):
    code = (
        "import sys; from vidgen_ray.online.store.store import JobStore\n"
        "print('ready', flush=True); sys.stdin.readline(); JobStore(sys.argv[1])"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([sys.executable, "-c", code, database_url], **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
