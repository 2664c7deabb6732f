"""`vidgen keys new`: create an API key for a server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from vidgen_ray.cli.options import JsonOption
from vidgen_ray.errors import UsageError

keys = typer.Typer(help="Manage the API keys of a server.", no_args_is_help=True)


@keys.callback()
def _keep_subcommand() -> None:
    # Without a callback, typer would turn a group with one command into the command itself.
    return


@keys.command()
def new(
    tenant: Annotated[str, typer.Option("--tenant", help="Owner of the key. Keys of the same tenant share their jobs.")],
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Key file of the server to add the key to. Default: print it only.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Create a key and print it once. Only its sha256 is stored. Servers read their key file when they start."""
    from vidgen_ray.online.auth import KeyRecord, add_key, hash_key, new_key

    key = new_key()
    try:
        record = KeyRecord(tenant=tenant, sha256=hash_key(key))
    except ValidationError:
        allowed = "must be 1 to 64 characters of A-Z a-z 0-9 . _ -, starting with a letter or a digit"
        raise UsageError(f"--tenant: got {tenant!r}, {allowed}") from None
    if file is not None:
        add_key(file, record)
    if as_json:
        typer.echo(json.dumps({"tenant": tenant, "key": key, "sha256": record.sha256}))
        return
    typer.echo(key)
    usage = f"Its sha256 was added to {file}." if file else f"Start the server with VIDGEN_API_KEYS={tenant}={record.sha256}"
    typer.echo(f"This key is shown only once. {usage}", err=True)
