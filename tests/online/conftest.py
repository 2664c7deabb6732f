"""Test databases: SQLite, and a private PostgreSQL server if Debian's packages are installed."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

POSTGRES_PREFIX = Path("/usr/lib/postgresql")
numbers = count()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Start a PostgreSQL server on a private socket. Return the URL of its databases, with a placeholder for the name."""
    folders = sorted(POSTGRES_PREFIX.glob("*/bin/initdb"), key=lambda path: int(path.parent.parent.name))
    if not folders:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql)")
    programs = folders[-1].parent
    home = Path(tempfile.mkdtemp(prefix="vidgen-pg-", dir="/tmp"))  # the path of a socket is limited to 107 characters
    user, run_as = "vidgen", {}
    if os.geteuid() == 0:
        # PostgreSQL does not run as root.
        account = pwd.getpwnam("postgres")
        os.chown(home, account.pw_uid, account.pw_gid)
        run_as = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}

    def call(program: str, *args: str) -> None:
        subprocess.run([programs / program, *args], check=True, capture_output=True, cwd=home, timeout=60, **run_as)

    data = home / "data"
    call("initdb", "-D", str(data), "-U", user, "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync")
    options = f"-c listen_addresses='' -c unix_socket_directories='{home}' -c fsync=off -c max_connections=50"
    call("pg_ctl", "-D", str(data), "-w", "-l", str(home / "log"), "-o", options, "start")
    try:
        yield f"postgresql://{user}@/{{name}}?host={home}"
    finally:
        call("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path) -> str:
    """URL of an empty database, SQLite and PostgreSQL in turn."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.db"
    server = request.getfixturevalue("postgres")
    name = f"test{next(numbers)}"
    import psycopg

    with psycopg.connect(server.format(name="postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server.format(name=name)
