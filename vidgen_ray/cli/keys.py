"""`vidgen keys new`: an API key for a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from vidgen_ray.cli.options import JsonOption
from vidgen_ray.errors import UsageError

keys = typer.Typer(help="The API keys of a server.", no_args_is_help=True)


@keys.callback()
def _keeps_its_name() -> None:
    # With one command alone typer would leave out the word `new`.
    return


@keys.command()
def new(
    tenant: Annotated[str, typer.Option("--tenant", help="Whose key it is. Keys of one tenant see the same clips.")],
    file: Annotated[Path | None, typer.Option("--file", "-f", help="The server's file of keys, to add it to.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key, show it once, and keep its sha256 only. Servers read their file when they start."""
    from vidgen_ray.online.auth import KeyRecord, add_key, hash_key, new_key

    key = new_key()
    try:
        record = KeyRecord(tenant=tenant, sha256=hash_key(key))
    except ValidationError:
        allowed = "must be 1 to 64 of A-Z a-z 0-9 . _ - and begin with a letter or a digit"
        raise UsageError(f"--tenant: got {tenant!r}, {allowed}") from None
    if file is not None:
        add_key(file, record)
    if as_json:
        typer.echo(json.dumps({"tenant": tenant, "key": key, "sha256": record.sha256}))
        return
    typer.echo(key)
    kept = f"Its sha256 is in {file}." if file else f"For the server's environment: VIDGEN_API_KEYS={tenant}={record.sha256}"
    typer.echo(f"This is shown once. {kept}", err=True)
