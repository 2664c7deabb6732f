"""One database, SQLite or PostgreSQL, behind two kinds of transaction. Knows the tables' version, not what is in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, insert, make_url, select, text, update
from sqlalchemy.exc import ArgumentError, OperationalError, SQLAlchemyError

from vidgen_ray.errors import SetupError
from vidgen_ray.online.store.schema import META, SCHEMA_VERSION, TABLES

BUSY_S = 30
"""How long a change waits for others to end theirs."""
READS = {"vidgen_reads": True}
"""Execution option of transactions that change nothing."""
SCHEMA_LOCK = 0x7669646765
"""Of PostgreSQL, for the moment in which the tables are made."""


class Database:
    """Makes the tables where they are missing.

    SQLite is for servers whose processes are all on one machine: its write-ahead log does not work over a network.
    Raises SetupError where the database cannot be opened, or is of another version of the tables.
    """

    def __init__(self, url: str, *, durable: bool = True) -> None:
        """`url` as SQLAlchemy has it: sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME.

        Changes that need not be `durable` are seen by everybody and survive any process, and the last of them may be lost
        with the machine's power: for who can do again what was lost. PostgreSQL keeps its own counsel.
        """
        self.engine = _engine(url, durable)
        try:
            self._prepare()
        except OperationalError as error:
            raise SetupError(f"database {self._shown}: cannot be opened ({_first_line(error)})") from None
        except SQLAlchemyError as error:
            raise SetupError(f"database {self._shown}: {_first_line(error)}") from None

    @property
    def _shown(self) -> str:
        return self.engine.url.render_as_string(hide_password=True)

    @contextmanager
    def read_connection(self) -> Iterator[Connection]:
        """A transaction that changes nothing."""
        with self.engine.connect() as connection:
            yield connection.execution_options(**READS)

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """A transaction that is alone in changing anything, and on the disk when the block ends."""
        with self.engine.begin() as connection:
            yield Transaction(connection)

    def ping(self) -> None:
        """Raises SQLAlchemyError where the database does not answer."""
        with self.read_connection() as connection:
            connection.execute(select(META.c.value).limit(1))

    def close(self) -> None:
        self.engine.dispose()

    def _prepare(self) -> None:
        with self.engine.begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": SCHEMA_LOCK})
            TABLES.create_all(connection)
            found = connection.execute(select(META.c.value).where(META.c.name == "schema")).scalar()
            if found is None:
                rows = [{"name": "schema", "value": SCHEMA_VERSION}, {"name": "changes", "value": 0}]
                connection.execute(insert(META), rows)
            elif found != SCHEMA_VERSION:
                raise SetupError(
                    f"database {self._shown}: has tables of version {found}, this program wants {SCHEMA_VERSION}; "
                    "use the program that made it, or an empty database"
                )


class Transaction:
    """A transaction under way. Asking for its first number makes it wait until it is alone."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.version = self.next_number()
        """What everything that this transaction changes is stamped with."""

    def next_number(self) -> int:
        """A number that no other change has, larger than those of all changes before."""
        return int(self.connection.execute(NEXT_NUMBER).scalar_one())


NEXT_NUMBER = update(META).where(META.c.name == "changes").values(value=META.c.value + 1).returning(META.c.value)


def _engine(url: str, durable: bool) -> Engine:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise SetupError("database: must be a URL, sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME") from None
    kind = parsed.get_backend_name()
    if kind == "postgresql":
        try:
            return create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True, pool_timeout=BUSY_S)
        except ModuleNotFoundError:
            raise SetupError("database: PostgreSQL needs `pip install vidgen-ray[postgres]`") from None
    if kind != "sqlite" or parsed.database in (None, "", ":memory:"):
        raise SetupError(
            "database: must be a file of SQLite, sqlite:///FILE, or PostgreSQL, postgresql://USER:PASSWORD@HOST/NAME"
        )
    engine = create_engine(parsed, connect_args={"timeout": BUSY_S}, pool_timeout=BUSY_S)
    event.listen(engine, "connect", _set_up_sqlite)
    if not durable:
        event.listen(engine, "connect", _wait_for_no_disk)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _: object) -> None:
    # The module's own transactions begin too late to keep two changes apart.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={BUSY_S * 1000}")
    cursor.execute("PRAGMA journal_mode=WAL")
    # What was accepted must outlive a loss of power, too; WAL's default outlives only the process.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _wait_for_no_disk(connection: Any, _: object) -> None:
    connection.execute("PRAGMA synchronous=NORMAL").close()


def _begin_sqlite(connection: Connection) -> None:
    reads = connection.get_execution_options().get("vidgen_reads")
    connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")


def _first_line(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
