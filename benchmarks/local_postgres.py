"""Private PostgreSQL server on a local socket, for benchmarks and tests. Uses the newest of Debian's packages."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PREFIX = Path("/usr/lib/postgresql")
USER = "vidgen"


def is_installed() -> bool:
    return bool(_initdb_programs())


@contextmanager
def postgres_server(*, fsync: bool) -> Iterator[str]:
    """Run a server. Yields the URL of its databases with the placeholder `{name}`. With `fsync`, commits are durable."""
    programs = max(_initdb_programs(), key=lambda path: int(path.parent.parent.name)).parent
    home = Path(tempfile.mkdtemp(prefix="vidgen-pg-", dir="/tmp"))  # the path of a socket is limited to 107 characters
    run_as: dict[str, Any] = {}
    if os.geteuid() == 0:
        # PostgreSQL does not run as root.
        account = pwd.getpwnam("postgres")
        os.chown(home, account.pw_uid, account.pw_gid)
        run_as = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}

    def call(program: str, *args: str) -> None:
        subprocess.run([programs / program, *args], check=True, capture_output=True, cwd=home, timeout=60, **run_as)

    data = home / "data"
    call("initdb", "-D", str(data), "-U", USER, "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync")
    sync = "on" if fsync else "off"
    options = f"-c listen_addresses='' -c unix_socket_directories='{home}' -c fsync={sync} -c max_connections=50"
    call("pg_ctl", "-D", str(data), "-w", "-l", str(home / "log"), "-o", options, "start")
    try:
        yield f"postgresql://{USER}@/{{name}}?host={home}"
    finally:
        call("pg_ctl", "-D", str(data), "-m", "immediate", "stop")
        shutil.rmtree(home, ignore_errors=True)


def create_database(server: str, name: str) -> str:
    """Create a database on the server that `postgres_server` yielded. Return its URL."""
    import psycopg

    with psycopg.connect(server.format(name="postgres"), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return server.format(name=name)


def _initdb_programs() -> list[Path]:
    return [*PREFIX.glob("*/bin/initdb")]
