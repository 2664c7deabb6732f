"""Migrations of the job store, on SQLite and PostgreSQL."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect, make_url, text

from vidgen_ray.errors import SetupError
from vidgen_ray.online.store.jobs import JobKind, JobState
from vidgen_ray.online.store.schema import TABLES
from vidgen_ray.online.store.schema_upgrade import MIGRATIONS, VERSION_TABLE
from vidgen_ray.online.store.store import JobStore

NEWEST = "0006"
VERSION_0_1 = (Path(__file__).parent / "store_0_1.sql").read_text(encoding="utf-8")


def engine_of(database_url):
    return create_engine(make_url(database_url.replace("postgresql://", "postgresql+psycopg://")))


@pytest.fixture
def version_0_1_url(database_url):
    """URL of a store of version 0.1 with one queued job, one character and one upload."""
    engine = engine_of(database_url)
    with engine.begin() as connection:
        for statement in filter(None, VERSION_0_1.split(";\n")):
            connection.exec_driver_sql(statement)
    engine.dispose()
    return database_url


def schema_differences(store):
    with store.engine.connect() as connection:
        options = {"version_table": VERSION_TABLE, "compare_type": True, "compare_server_default": True}
        return compare_metadata(MigrationContext.configure(connection, opts=options), TABLES)


def revisions(store):
    with store.engine.connect() as connection:
        return list(connection.execute(text(f"SELECT version_num FROM {VERSION_TABLE}")).scalars())


def test_new_store_has_the_tables_of_the_metadata(database_url):
    store = JobStore(database_url)
    assert schema_differences(store) == []
    assert revisions(store) == [NEWEST]
    store.close()


def test_store_of_version_0_1_is_upgraded(version_0_1_url):
    store = JobStore(version_0_1_url)
    assert schema_differences(store) == []
    assert revisions(store) == [NEWEST]
    job = store.get("video_1", "ada")
    assert (job.kind, job.state, job.shot.prompt) == (JobKind.VIDEO, JobState.QUEUED, "a man «ünter» 🌧")
    assert store.find_created("ada", "x", "f") == [job]
    with store.engine.connect() as connection:
        text_of_job = connection.execute(text("SELECT search_text FROM vidgen_jobs")).scalar_one()
    assert text_of_job.startswith("a man «ünter» 🌧 ")
    assert text_of_job.endswith(" video_1")
    character = store.characters.get("Grace", "ada")
    assert (character.photos, character.consent) == (("file-1",), None)
    assert store.uploads.get("file-1", "ada").file == "ab"
    (claimed,) = store.queue.claim("d", 30, 5)
    # Numbers continue after those of version 0.1.
    assert (claimed.id, claimed.version) == ("video_1", 5)
    store.close()


def test_upgraded_and_new_stores_have_the_same_indexes(version_0_1_url, tmp_path):
    upgraded, new = JobStore(version_0_1_url), JobStore(f"sqlite:///{tmp_path}/new.db")
    for table in TABLES.tables:
        names = [{index["name"] for index in inspect(store.engine).get_indexes(table)} for store in (upgraded, new)]
        assert {name for name in names[0] if name.startswith("vidgen_") and "_by_" in name} == names[1]
    upgraded.close()
    new.close()


def test_version_0_1_refuses_an_upgraded_store(version_0_1_url):
    """Version 0.1 opens only stores whose `schema` is 1."""
    store = JobStore(version_0_1_url)
    with store.engine.connect() as connection:
        assert connection.execute(text("SELECT value FROM vidgen_meta WHERE name = 'schema'")).scalar_one() == 2
    store.close()


def test_store_of_a_newer_version_is_refused(database_url):
    store = JobStore(database_url)
    with store.engine.begin() as connection:
        connection.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '0099'"))
    with pytest.raises(SetupError, match=f"revision 0099, which is newer than {NEWEST}"):
        JobStore(database_url)
    assert revisions(store) == ["0099"]
    store.close()


def test_store_without_its_revision_is_refused(database_url):
    store = JobStore(database_url)
    with store.engine.begin() as connection:
        connection.execute(text(f"DROP TABLE {VERSION_TABLE}"))
    with pytest.raises(SetupError, match=f"schema 2, but the table {VERSION_TABLE} is missing"):
        JobStore(database_url)
    store.close()


def test_failed_upgrade_changes_nothing(version_0_1_url):
    engine = engine_of(version_0_1_url)
    with engine.begin() as connection:
        # The last index of revision 0002 already exists, so that creating it fails.
        connection.execute(text("CREATE INDEX vidgen_uploads_by_file ON vidgen_uploads (bytes)"))
    with pytest.raises(SetupError, match="already exists"):
        JobStore(version_0_1_url)
    assert {index["name"] for index in inspect(engine).get_indexes("vidgen_uploads")} == {"vidgen_uploads_by_file"}
    assert not inspect(engine).has_table(VERSION_TABLE)
    assert "vidgen_jobs_by_key" not in {index["name"] for index in inspect(engine).get_indexes("vidgen_jobs")}
    engine.dispose()


def test_threads_that_open_a_store_at_once_create_the_tables_once(database_url):
    with ThreadPoolExecutor(6) as pool:
        stores = list(pool.map(JobStore, [database_url] * 6))
    for store in stores:
        store.ping()
        store.close()
    assert schema_differences(stores[0]) == []


def test_processes_that_open_a_store_at_once_upgrade_it_once(version_0_1_url):
    code = (
        "import sys; from vidgen_ray.online.store.store import JobStore\n"
        "print('ready', flush=True); sys.stdin.readline(); JobStore(sys.argv[1]).ping()"
    )
    command = [sys.executable, "-c", code, version_0_1_url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(3)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    store = JobStore(version_0_1_url)
    assert store.get("video_1", "ada") is not None
    assert revisions(store) == [NEWEST]
    store.close()


def test_migrations_are_one_sequence():
    files = sorted(file.stem for file in (MIGRATIONS / "versions").glob("v*.py"))
    assert [name[:5] for name in files] == [f"v{number:04}" for number in range(1, len(files) + 1)]
    assert files[-1].startswith(f"v{NEWEST}_")
