"""Database of the job store, SQLite or PostgreSQL: tables and transactions."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import secrets
import sqlite3
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    Engine,
    Float,
    Index,
    Integer,
    MetaData,
    Row,
    Select,
    String,
    Table,
    Text,
    UniqueConstraint,
    create_engine,
    event,
    insert,
    inspect,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, SQLAlchemyError

from vidgen_ray.errors import SetupError, install_command
from vidgen_ray.outputs.storage import is_disk_full

BUSY_TIMEOUT_S = 30
"""Seconds that a transaction waits for a lock or for a pooled connection."""
WAL_RETRY_S = 0.05
READER_THREADS, WRITERS = 36, 12
"""Threads of an API process for calls that only read, and for calls that write: only one of these writes at a time."""
POOL_SIZE = READER_THREADS + WRITERS
"""Connections of a process: one for each thread that uses the database, or requests wait for each other."""
RESERVE_BYTES = 8 << 20
"""Size of the file `DATABASE-reserve` beside an SQLite database: twice that of its write-ahead log, which is used again."""
READS = {"vidgen_reads": True}
"""Execution option of connections that only read. On SQLite they open no transaction: each statement sees the last commit."""
POSTGRESQL_LOCK = 0x7669646765
"""Key of the advisory lock held while tables are created."""

_T = TypeVar("_T")
_Args = TypeVarTuple("_Args")
TABLES = MetaData()


def _partial_index(name: str, where: str, *columns: str) -> Index:
    """Return an index of the rows that match `where`. A query uses it only if its own conditions include `where`."""
    return Index(name, *columns, sqlite_where=text(where), postgresql_where=text(where))


SECRET_PARTS, SECRET_BITS = 4, 62
"""Rows of the secret, and bits of each."""
MAX_URL = 1000
"""Characters of the URL of a webhook that a request names."""
META = Table(
    "vidgen_meta",
    TABLES,
    Column("name", String(64), primary_key=True),
    Column("value", BigInteger, nullable=False),
)
"""Row `tables`: `tables_version()`. Row `changes`: number of the last write; every transaction increments it first, which
serializes all writers. Rows `secret_N`: random bits of the secret that signs URLs."""
NEXT_NUMBER = update(META).where(META.c.name == "changes").values(value=META.c.value + 1).returning(META.c.value)
SECRET = select(META.c.value).where(META.c.name.like("secret_%")).order_by(META.c.name)
LAST_NUMBER = select(META.c.value).where(META.c.name == "changes")

JOBS = Table(
    "vidgen_jobs",
    TABLES,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("state", String(16), nullable=False),
    Column("seq", BigInteger, nullable=False, unique=True),
    Column("place", BigInteger, nullable=False),
    Column("priority", String(16), nullable=False),
    Column("overtaken", Integer, nullable=False),
    Column("start_by", Float(53)),
    Column("shot", JSON, nullable=False),
    Column("key", String(64), nullable=False),
    Column("claims", Integer, nullable=False),
    Column("progress", Integer, nullable=False),
    Column("stage", String(64)),
    Column("step", Integer, nullable=False),
    Column("steps", Integer, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("started_at", Float(53)),
    Column("completed_at", Float(53)),
    Column("expires_at", Float(53)),
    Column("error", JSON(none_as_null=True)),
    Column("shot_id", String(128)),
    Column("stage_seconds", JSON, nullable=False),
    Column("request", JSON, nullable=False),
    Column("cancel_requested", Boolean, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("owner", String(128)),
    Column("heartbeat", BigInteger),
    Column("deleted_at", Float(53)),
    Column("search_text", Text, nullable=False),
    Column("batch", String(64)),
    Column("key_id", String(128), nullable=False),
    Column("estimate", Float(53), nullable=False),
    Column("reserved", Float(53), nullable=False),
    Column("gpu_seconds", Float(53), nullable=False),
    _partial_index("vidgen_jobs_by_batch", "batch IS NOT NULL", "batch", "state", "deleted_at"),
    _partial_index("vidgen_jobs_by_open", "completed_at IS NULL", "state", "tenant", "place"),
    _partial_index("vidgen_jobs_by_list", "deleted_at IS NULL", "tenant", "seq", "kind", "state"),
    _partial_index("vidgen_jobs_by_expiry", "expires_at IS NOT NULL AND deleted_at IS NULL", "expires_at"),
    _partial_index("vidgen_jobs_by_deletion", "deleted_at IS NOT NULL", "deleted_at"),
    Index("vidgen_jobs_by_version", "version"),
    Index("vidgen_jobs_by_tenant_version", "tenant", "version"),
    Index("vidgen_jobs_by_key", "key"),
)
"""`seq` is the order of creation, `place` that in the queue, `overtaken` the number of later jobs with an earlier place.
`heartbeat` is the number of the last claim or heartbeat of a job in progress. `completed_at` is set when a job ends, in any
final state. A deleted job keeps its row for some minutes, so that lists can continue after it and clients see the deletion.
`search_text` is case-folded."""

DIRECTOR_TABLE = Table(
    "vidgen_director",
    TABLES,
    Column("owner", String(128), primary_key=True),
    Column("heartbeat", BigInteger, nullable=False),
)
"""At most one row: the director that claims jobs, with the number of its last heartbeat."""

IDEMPOTENCY = Table(
    "vidgen_idempotency",
    TABLES,
    Column("tenant", String(128), primary_key=True),
    Column("key", String(255), primary_key=True),
    Column("fingerprint", String(64), nullable=False),
    Column("jobs", JSON, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Index("vidgen_idempotency_by_time", "created_at"),
)
"""Idempotency keys and the ids of the jobs that they created."""

BATCHES = Table(
    "vidgen_batches",
    TABLES,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("key_id", String(128), nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(80), nullable=False),
    Column("completion_window", String(16), nullable=False),
    Column("metadata", JSON, nullable=False),
    Column("status", String(16), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("expires_at", Float(53), nullable=False),
    Column("in_progress_at", Float(53)),
    Column("finalizing_at", Float(53)),
    Column("cancelling_at", Float(53)),
    Column("ended_at", Float(53)),
    Column("total", Integer, nullable=False),
    Column("rejected", Integer, nullable=False),
    Column("accepted", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("line", Integer, nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("output_file_id", String(80)),
    Column("error_file_id", String(80)),
    Column("error", JSON(none_as_null=True)),
    Column("model", String(128)),
    Column("reserved_bytes", BigInteger, nullable=False),
    Column("output_expires_s", Integer),
    _partial_index("vidgen_batches_by_open", "ended_at IS NULL", "seq"),
    _partial_index("vidgen_batches_by_end", "ended_at IS NOT NULL", "ended_at"),
    Index("vidgen_batches_by_tenant", "tenant", "seq"),
)
"""Batches. `line` and `offset`: lines and bytes of the input file that are read; `rejected`: those of them without a job,
`accepted`: those with one. `reserved_bytes`: of the stored bytes of the tenant, for the output files of a running batch."""

BATCH_LINES = Table(
    "vidgen_batch_lines",
    TABLES,
    Column("batch", String(64), primary_key=True),
    Column("line", Integer, primary_key=True),
    Column("custom_id", String(512)),
    Column("job", String(64)),
    Column("error", JSON(none_as_null=True)),
    UniqueConstraint("batch", "custom_id"),
)
"""Lines of batches that are read: each has a job or an error."""

USAGE = Table(
    "vidgen_usage",
    TABLES,
    Column("key_id", String(128), primary_key=True),
    Column("model", String(128), primary_key=True),
    Column("day", String(10), primary_key=True),
    Column("tenant", String(128), primary_key=True),
    Column("jobs", Integer, nullable=False),
    Column("gpu_seconds", Float(53), nullable=False),
    Column("cost", Float(53), nullable=False),
    Column("compared", Float(53), nullable=False),
    Column("estimate", Float(53), nullable=False),
    Index("vidgen_usage_by_tenant", "tenant", "day"),
    Index("vidgen_usage_by_model", "model"),
)
"""Jobs that have ended, by the UTC day. `compared`: GPU-seconds of those whose `estimate` is counted."""

CHARACTERS = Table(
    "vidgen_characters",
    TABLES,
    Column("id", String(64), primary_key=True),
    Column("tenant", String(128), nullable=False),
    Column("name", String(128), nullable=False),
    Column("photos", JSON, nullable=False),
    Column("seq", BigInteger, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("consent", JSON(none_as_null=True)),
    UniqueConstraint("tenant", "name"),
)

UPLOADS = Table(
    "vidgen_uploads",
    TABLES,
    Column("tenant", String(128), primary_key=True),
    Column("id", String(80), primary_key=True),
    Column("file", String(128), nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("used_at", Float(53), nullable=False),
    Column("filename", String(255)),
    Column("lines", Integer, nullable=False),
    Column("expires_at", Float(53)),
    Index("vidgen_uploads_by_file", "file"),
    Index("vidgen_uploads_by_use", "used_at"),
)
"""Uploads of each tenant. `file` is the sha256 of the content and the file name in the data folder, `filename` the name that
the client gave, which is only returned."""

OUTBOX = Table(
    "vidgen_outbox",
    TABLES,
    Column("id", String(64), primary_key=True),
    Column("seq", BigInteger, nullable=False),
    Column("tenant", String(128), nullable=False),
    Column("target", String(MAX_URL), nullable=False),
    Column("event", String(64), nullable=False),
    Column("job", String(64), nullable=False),
    Column("created_at", Float(53), nullable=False),
    Column("next_try_at", Float(53), nullable=False),
    Column("tries", Integer, nullable=False),
    Column("usage", JSON(none_as_null=True)),
    Index("vidgen_outbox_by_time", "next_try_at"),
)
"""Webhook messages that have not been delivered yet."""

SESSIONS = Table(
    "vidgen_page_sessions",
    TABLES,
    Column("digest", String(64), primary_key=True),
    Column("key_id", String(128), nullable=False),
    Column("expires_at", Float(53), nullable=False),
)
"""Sessions of the web page. `digest` is the sha256 of the token in the cookie."""


def tables_version() -> int:
    """Return a digest of the definition of all tables, less than 2**63. Not of SQL: SQLAlchemy may write that another way."""
    parts = [
        (
            table.name,
            [(column.name, str(column.type), column.nullable, column.primary_key) for column in table.columns],
            sorted(
                (str(index.name), str(index.dialect_options["sqlite"]["where"]), index.columns.keys())
                for index in table.indexes
            ),
            sorted(each.columns.keys() for each in table.constraints if isinstance(each, UniqueConstraint)),
        )
        for table in TABLES.sorted_tables
    ]
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:7])


_writers = ThreadPoolExecutor(WRITERS, "write")


async def in_write_thread(call: Callable[[*_Args], _T], *args: *_Args) -> _T:
    """Run a call that writes to the store. If the store is locked, such calls wait here, and reads still have their threads."""
    return await asyncio.get_running_loop().run_in_executor(_writers, call, *args)


class Database:
    """Open database with its tables.

    SQLite is for servers whose processes run on one machine: its write-ahead log does not work on a network file system.
    """

    def __init__(self, url: str, durable: bool = True) -> None:
        """Open a database and create its tables if there are none.

        `url` is an SQLAlchemy URL: sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME. `durable=False`: the last changes
        by this object in an SQLite file are lost in a power failure, but not in a crash of processes.

        Raises SetupError if the database cannot be opened or has the tables of another version.
        """
        self.engine = _engine(url, durable)
        self._reading = self.engine.execution_options(**READS)
        # Threads of this process wait here in turn. In SQLite's own lock they would poll with pauses of up to 100 ms.
        self._writing = threading.Lock()
        self._thread = threading.local()
        self._reserve = Path(f"{self.engine.url.database}-reserve") if self.engine.dialect.name == "sqlite" else None
        try:
            create_tables(self.engine)
        except OperationalError as error:
            raise SetupError(f"database {self.url_without_password}: cannot be opened ({_first_line(error)})") from None
        except SQLAlchemyError as error:
            raise SetupError(f"database {self.url_without_password}: {_first_line(error)}") from None
        self.keep_reserve()

    @property
    def url_without_password(self) -> str:
        return self.engine.url.render_as_string(hide_password=True)

    @contextmanager
    def read_connection(self) -> Iterator[Connection]:
        """Open a connection that only reads."""
        with self._reading.connect() as connection:
            yield connection

    def rows(self, query: Select[Any], parameters: Mapping[str, Any] | None = None) -> Sequence[Row[Any]]:
        """Return the rows of a query."""
        with self.read_connection() as connection:
            return connection.execute(query, parameters).all()

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Open the only write transaction. It is committed when the block ends, and rolled back on an exception.

        Inside a block of the same thread, returns the transaction of that block.
        """
        if (outer := getattr(self._thread, "transaction", None)) is not None:
            yield outer
            return
        with self._writing, self.engine.begin() as connection:
            self._thread.transaction = Transaction(connection)
            try:
                yield self._thread.transaction
            finally:
                self._thread.transaction = None

    def keep_reserve(self) -> None:
        """Reserve space on the disk of an SQLite database, if there is room."""
        if self._reserve is None or self._reserve.exists():
            return
        with suppress(OSError), ExitStack() as undo:
            undo.callback(self._reserve.unlink, missing_ok=True)
            self._reserve.touch(0o600)
            with self._reserve.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
            undo.pop_all()

    def with_reserve(self, delete: Callable[[], _T]) -> _T:
        """Run a call that deletes records. On a full disk, it uses the reserved space: otherwise nothing could be deleted."""
        try:
            return delete()
        except OperationalError as error:
            if self._reserve is None or not is_disk_full(error):
                raise
            self._reserve.unlink(missing_ok=True)
            return delete()

    def close(self) -> None:
        self.engine.dispose()


class Transaction:
    """Open write transaction. Creating it waits until all other write transactions have ended."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.version = self.next_number()
        """Version of all rows that this transaction changes."""

    def next_number(self) -> int:
        """Return a unique number, larger than all numbers of earlier transactions."""
        return int(self.connection.execute(NEXT_NUMBER).scalar_one())


def read_secret(engine: Engine) -> bytes:
    """Return the secret of the server, which signs URLs and the messages to receivers that requests name."""
    with engine.connect() as connection:
        connection.execution_options(**READS)
        return b"".join(part.to_bytes(8, "big") for part in connection.scalars(SECRET))


def webhook_secret(secret: bytes, tenant: str) -> str:
    """Return the secret of the messages to the receivers that requests of a tenant name, as in Standard Webhooks."""
    return f"whsec_{b64encode(hmac.digest(secret, f'webhook {tenant}'.encode(), 'sha256')).decode()}"


def create_tables(engine: Engine) -> None:
    """Create the tables if there are none, in one transaction.

    Processes that open the same store at once wait for each other: on SQLite by the write lock of BEGIN IMMEDIATE, on
    PostgreSQL by an advisory lock. Raises SetupError for the tables of another version.
    """
    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": POSTGRESQL_LOCK})
        if not inspect(connection).has_table(META.name):
            TABLES.create_all(connection, checkfirst=False)
            secret = {f"secret_{number}": secrets.randbits(SECRET_BITS) for number in range(SECRET_PARTS)}
            rows = {"changes": 0, "tables": tables_version(), **secret}
            connection.execute(insert(META), [{"name": name, "value": value} for name, value in rows.items()])
        found = connection.scalar(select(META.c.value).where(META.c.name == "tables"))
        has_secret = len(connection.scalars(SECRET).all()) == SECRET_PARTS
    if found != tables_version() or not has_secret:
        raise SetupError(
            f"database {engine.url.render_as_string(hide_password=True)}: its tables are those of another version of "
            "vidgen-ray. Use the version that created them, or another database: --database sqlite:///FILE."
        )


def _engine(url: str, durable: bool) -> Engine:
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
                pool_use_lifo=True,
            )
        except ModuleNotFoundError:
            raise SetupError(f"database: PostgreSQL needs {install_command('postgres')}") from None
    if backend != "sqlite" or parsed.database in (None, "", ":memory:"):
        raise SetupError(
            "database: must be an SQLite file, sqlite:///FILE, or PostgreSQL, postgresql://USER:PASSWORD@HOST/NAME"
        )
    _make_private(parsed.database)
    engine = create_engine(
        parsed,
        connect_args={"timeout": BUSY_TIMEOUT_S},
        pool_size=POOL_SIZE,
        pool_timeout=BUSY_TIMEOUT_S,
        # The connection that was used last has its statements and pages in memory.
        pool_use_lifo=True,
    )
    event.listen(engine, "connect", partial(_set_up_sqlite, "FULL" if durable else "NORMAL"))
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _make_private(database: str) -> None:
    """Create the files of an SQLite database for their owner only: they contain prompts."""
    with suppress(OSError):  # opening the database reports it
        Path(database).touch(mode=0o600)
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError, PermissionError):
            Path(f"{database}{suffix}").chmod(0o600)


def _set_up_sqlite(synchronous: str, connection: Any, _: object) -> None:
    # The sqlite3 module would open transactions only before the first write, after the reads that decide on it.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}")
    _enable_write_ahead_log(cursor)
    cursor.execute(f"PRAGMA synchronous={synchronous}")
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
    if not connection.get_execution_options().get("vidgen_reads"):
        try:
            connection.connection.cursor().execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise DBAPIError.instance("BEGIN IMMEDIATE", None, error, sqlite3.Error) from error


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
