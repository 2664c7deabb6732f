"""Connection to the store's database, SQLite or PostgreSQL, with one kind of transaction for reads and one for writes."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, make_url, select, update
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

from vidgen_ray.errors import SetupError
from vidgen_ray.online.store.schema import META
from vidgen_ray.online.store.schema_upgrade import upgrade_schema

BUSY_TIMEOUT_S = 30
"""Seconds that a transaction waits for a lock or for a pooled connection."""
WAL_RETRY_S = 0.05
POOL_SIZE = 48
"""Connections of a process: one for each thread that uses the database, or requests wait for each other."""
READS = {"vidgen_reads": True}
"""Execution option of transactions that only read."""


class Database:
    """Open database whose tables are up to date.

    SQLite is for servers whose processes run on one machine: its write-ahead log does not work on a network file system.
    """

    def __init__(self, url: str) -> None:
        """Open a database and create or upgrade its tables.

        `url` is an SQLAlchemy URL: sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME.

        Raises SetupError if the database cannot be opened or is newer than this program.
        """
        self.engine = _engine(url)
        # Threads of this process wait here in turn. In SQLite's own lock they would poll with pauses of up to 100 ms.
        self._writing = threading.Lock()
        try:
            upgrade_schema(self.engine)
        except OperationalError as error:
            raise SetupError(f"database {self._url_without_password}: cannot be opened ({_first_line(error)})") from None
        except SQLAlchemyError as error:
            raise SetupError(f"database {self._url_without_password}: {_first_line(error)}") from None

    @property
    def _url_without_password(self) -> str:
        return self.engine.url.render_as_string(hide_password=True)

    @contextmanager
    def read_connection(self) -> Iterator[Connection]:
        """Open a read-only transaction."""
        with self.engine.connect() as connection:
            yield connection.execution_options(**READS)

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Open the only write transaction. It is committed when the block ends, and rolled back on an exception."""
        with self._writing, self.engine.begin() as connection:
            yield Transaction(connection)

    def ping(self) -> None:
        """Run a query. Raises SQLAlchemyError if the database does not answer."""
        with self.read_connection() as connection:
            connection.execute(select(META.c.value).limit(1))

    def close(self) -> None:
        self.engine.dispose()


class Transaction:
    """Open write transaction. Creating it waits until all other write transactions have ended."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.version = int(connection.execute(NEXT_NUMBER).scalar_one())
        """Version of all rows that this transaction writes."""
        self._version_is_unused = True

    def next_number(self) -> int:
        """Return a unique number, larger than all numbers of earlier transactions. The first one is the version."""
        if self._version_is_unused:
            self._version_is_unused = False
            return self.version
        return int(self.connection.execute(NEXT_NUMBER).scalar_one())


NEXT_NUMBER = update(META).where(META.c.name == "changes").values(value=META.c.value + 1).returning(META.c.value)


def _engine(url: str) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise SetupError("database: must be a URL, sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME") from None
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        try:
            return create_engine(
                parsed.set(drivername="postgresql+psycopg"),
                pool_pre_ping=True,
                # PostgreSQL allows 100 connections by default, so those beyond a few are closed after use.
                pool_size=POOL_SIZE // 4,
                max_overflow=POOL_SIZE - POOL_SIZE // 4,
                pool_timeout=BUSY_TIMEOUT_S,
            )
        except ModuleNotFoundError:
            raise SetupError("database: PostgreSQL needs `pip install vidgen-ray[postgres]`") from None
    if backend != "sqlite" or parsed.database in (None, "", ":memory:"):
        raise SetupError(
            "database: must be an SQLite file, sqlite:///FILE, or PostgreSQL, postgresql://USER:PASSWORD@HOST/NAME"
        )
    _make_private(parsed.database)
    engine = create_engine(parsed, connect_args={"timeout": BUSY_TIMEOUT_S}, pool_size=POOL_SIZE, pool_timeout=BUSY_TIMEOUT_S)
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _make_private(database: str) -> None:
    """Create the files of an SQLite database for their owner only: they contain prompts."""
    with suppress(OSError):  # opening the database reports it
        Path(database).touch(mode=0o600)
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError, PermissionError):
            Path(f"{database}{suffix}").chmod(0o600)


def _set_up_sqlite(connection: Any, _: object) -> None:
    # The sqlite3 module would open transactions only before the first write, after the reads that decide on it.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}")
    _enable_write_ahead_log(cursor)
    # An accepted job must survive a power failure. The default of WAL mode survives only a crash of the process.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _enable_write_ahead_log(cursor: Any) -> None:
    # SQLite does not apply its busy timeout to this change, so processes that open a new file at the same time retry here.
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(WAL_RETRY_S)


def _begin_sqlite(connection: Connection) -> None:
    reads = connection.get_execution_options().get("vidgen_reads")
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
