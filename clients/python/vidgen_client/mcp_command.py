"""`vidgen mcp`: let an assistant create videos on a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vidgen_ray.errors import SetupError


def mcp(
    url: Annotated[
        str | None, typer.Option("--url", envvar="VIDGEN_URL", help="URL of the server. Default: http://127.0.0.1:8000.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", envvar="VIDGEN_API_KEY", help="API key. Other users of this machine can see options."),
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
    """Start an MCP server, with which an assistant creates videos and images on a running server."""
    from vidgen_client import AsyncClient

    try:
        from vidgen_client.mcp_server import make_server
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "mcp":
            raise
        raise SetupError(
            "vidgen mcp needs the package mcp, version 2. Install it with: pip install 'vidgen-ray[mcp]'"
        ) from None
    # Few retries: the assistant can repeat a call itself, and sees within seconds that the server is down.
    server = make_server(AsyncClient(url, api_key, retries=3), folder.expanduser())
    try:
        if http is None:
            server.run("stdio")
        else:
            server.run("streamable-http", host="127.0.0.1", port=http)
    except KeyboardInterrupt:
        # Nothing is left to resume: jobs continue on the server.
        raise typer.Exit(130) from None
