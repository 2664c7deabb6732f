"""`vidgen-mcp`, and `vidgen mcp` beside vidgen-ray: let an assistant create videos on a server."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vidgen_client.async_client import DEFAULT_URL, KEY_VARIABLE, URL_VARIABLE, AsyncClient
from vidgen_client.errors import ClientError

if TYPE_CHECKING:
    from mcp.server.mcpserver import MCPServer


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
            _serve_stdio(server)
        else:
            _serve_http(server, http)
    except KeyboardInterrupt:
        # Nothing is left to resume: jobs continue on the server.
        raise typer.Exit(130) from None


def _serve_stdio(server: MCPServer) -> None:
    """Serve standard input and output until the assistant closes one of them, or the process is interrupted."""
    # The thread that reads standard input cannot be interrupted, and asyncio would wait for it.
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        server.run("stdio")
    except BaseExceptionGroup as errors:
        _, others = errors.split(BrokenPipeError)
        if others is not None:
            raise
    finally:
        signal.signal(signal.SIGINT, before)


def _serve_http(server: MCPServer, port: int) -> None:
    """Serve HTTP on the loopback address. h11 limits the headers of a request, and idle connections are closed."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class ClosesIdle(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            # uvicorn waits for the first request without a limit.
            self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    uvicorn.run(server.streamable_http_app(), host="127.0.0.1", port=port, http=ClosesIdle, ws="none")
