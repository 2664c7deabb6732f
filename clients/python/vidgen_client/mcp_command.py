"""`vidgen-mcp`, and `vidgen mcp` beside vidgen-ray: let an assistant create videos on a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vidgen_client.async_client import DEFAULT_URL, KEY_VARIABLE, URL_VARIABLE, AsyncClient
from vidgen_client.errors import ClientError


def mcp(
    url: Annotated[
        str | None, typer.Option("--url", envvar=URL_VARIABLE, help=f"URL of the server. Default: {DEFAULT_URL}.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar=KEY_VARIABLE, help="API key. Other users of this machine can see options."),
    ] = None,
    folder: Annotated[Path, typer.Option("--folder", help="Folder for downloads.")] = Path("~/vidgen"),
    http: Annotated[
        int | None,
        typer.Option(
            "--http",
            metavar="PORT",
            min=1,
            max=65535,
            help="Serve streamable HTTP at http://127.0.0.1:PORT/mcp, without authentication. "
            "Default: use standard input and output.",
        ),
    ] = None,
) -> None:
    """Start an MCP server: an assistant makes videos on a running server."""
    try:
        from vidgen_client.mcp_server import make_server
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "mcp":
            raise
        typer.echo(
            "The MCP server needs the package mcp, version 2. Install it with: pip install 'vidgen-client[mcp]'", err=True
        )
        raise typer.Exit(4) from None
    try:
        # Few retries: the assistant can repeat a call itself, and sees within seconds that the server is down.
        client = AsyncClient(url, api_key, retries=3)
    except ClientError as error:
        raise typer.BadParameter(str(error)) from None
    server = make_server(client, folder.expanduser())
    try:
        if http is None:
            server.run("stdio")
        else:
            server.run("streamable-http", host="127.0.0.1", port=http)
    except KeyboardInterrupt:
        # Nothing is left to resume: jobs continue on the server.
        raise typer.Exit(130) from None
