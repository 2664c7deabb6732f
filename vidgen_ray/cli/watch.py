"""`vidgen watch`: show the gallery of an output folder while a run fills it."""

from __future__ import annotations

from pathlib import Path

import typer

HOST = "127.0.0.1"


def watch_command(out: Path, port: int) -> None:
    """Serve the gallery on this machine until Ctrl-C. Raises SetupError for a folder that does not exist or a port in use."""
    import uvicorn

    from vidgen_ray.online.server import check_port
    from vidgen_ray.report.gallery_page import gallery_app

    app = gallery_app(out)
    check_port(HOST, port)
    typer.echo(f"Gallery of {out}: http://{HOST}:{port}/. Ctrl-C to stop.", err=True)
    uvicorn.run(app, host=HOST, port=port, log_level="warning")
