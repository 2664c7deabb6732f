"""Client of a module's server. Test databases: SQLite, and a private PostgreSQL server if Debian's packages are installed."""

import os
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from benchmarks.local_postgres import create_database, is_installed, postgres_server
from tests.online.directors import LOCAL
from tests.online.scripted_stages import pipes_open

numbers = count()
DATABASES = ["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)]
"""Databases of the store tests: PostgreSQL in `make test-slow` only."""


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Start a PostgreSQL server on a private socket. Return the URL of its databases, with a placeholder for the name."""
    if not is_installed():
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    with postgres_server(fsync=False) as server:
        yield server


@pytest.fixture(params=DATABASES)
def new_database(request, tmp_path) -> Callable[[], str]:
    """Function that creates an empty database and returns its URL."""
    if request.param == "sqlite":
        return lambda: f"sqlite:///{tmp_path}/{next(numbers)}.db"
    server = request.getfixturevalue("postgres")
    return lambda: create_database(server, f"test{next(numbers)}")


@pytest.fixture
def database_url(new_database) -> str:
    """URL of an empty database."""
    return new_database()


@pytest.fixture
def pipe(tmp_path) -> Iterator[Path]:
    """Named pipe that scripted stages wait for. At the end of the test they are released."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    yield path
    with pipes_open(path):
        pass


@pytest.fixture(scope="module")
def client(server) -> TestClient:
    """Client on this machine. `server`: the fixture of the test's module, a LocalServer."""
    return TestClient(server.app, **LOCAL, raise_server_exceptions=False)
