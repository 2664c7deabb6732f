"""`vidgen keys`: create an API key for a server, or a key that signs files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from vidgen_ray.cli.options import JsonOption
from vidgen_ray.errors import UsageError

MAX_NAME_LETTERS = 64
"""Limit of organisation names in certificates."""

keys = typer.Typer(help="Create API keys of a server, and keys that sign files (C2PA).", no_args_is_help=True)


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


@keys.command()
def c2pa(
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write, readable by you only.")] = Path("c2pa.pem"),
    name: Annotated[
        str, typer.Option("--name", help="Organisation that signed files name as their signer.", show_default=True)
    ] = "vidgen-ray user",
    as_json: JsonOption = False,
) -> None:
    """Create a key that signs files, with a certificate for ten years. Needs the extra `c2pa`.

    Only who trusts the certificate can tell who has signed; everybody can tell whether a file was changed.
    """
    from vidgen_ray.provenance.signing import create_signing_key

    if not 1 <= len(name.strip()) <= MAX_NAME_LETTERS:
        raise UsageError(f"--name: got {len(name)} letters, must be 1 to {MAX_NAME_LETTERS}")
    certificates = create_signing_key(out, name.strip())
    if as_json:
        typer.echo(json.dumps({"key": str(out), "certificates": str(certificates)}))
        return
    typer.echo(f"{out}: private key. Sign with --c2pa-key {out} or VIDGEN_C2PA_KEY={out}")
    typer.echo(f"{certificates}: certificates. Give it to those who verify: vidgen show FILE --verify --trust {certificates}")
