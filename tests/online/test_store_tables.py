"""Creation of the tables of the job store, on SQLite and PostgreSQL."""

import multiprocessing

import pytest
from sqlalchemy import create_engine, inspect, make_url, text, update

from vidgen_ray.errors import SetupError
from vidgen_ray.online.store.database import META
from vidgen_ray.online.store.store import JobStore


def test_store_of_another_version_is_refused(database_url):
    store = JobStore(database_url)
    with store.engine.begin() as connection:
        connection.execute(update(META).where(META.c.name == "tables").values(value=99))
    with pytest.raises(SetupError, match="its tables have version 99, this version of vidgen-ray has 1"):
        JobStore(database_url)
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
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(3)

    def open_at_once():
        start.wait()
        JobStore(database_url)

    processes = [fork.Process(target=open_at_once) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
