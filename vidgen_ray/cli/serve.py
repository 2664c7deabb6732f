"""`vidgen serve`: one command from a profile to a server that answers, and its orderly end."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
import yaml
from pydantic import ValidationError

from vidgen_ray.errors import UsageError
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.online.settings import OnlineSettings
from vidgen_ray.stages.base import Stage
from vidgen_ray.strict_yaml import StrictLoader

GRACE_S = 60.0


def settings_of(file: Path | None, told: dict[str, Any]) -> OnlineSettings:
    """The settings of a YAML file, and over them those that are told and not none.

    Raises UsageError with the setting, what was got and what is allowed.
    """
    content: Any = {}
    if file is not None:
        try:
            content = yaml.load(file.read_text(encoding="utf-8"), StrictLoader) or {}
        except OSError as error:
            raise UsageError(f"settings {file}: cannot be read ({error.strerror})") from None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise UsageError(f"settings {file}: not YAML: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict):
            raise UsageError(f"settings {file}: must be names and values, as `port: 8000`")
    try:
        return OnlineSettings.model_validate({**content, **{name: value for name, value in told.items() if value is not None}})
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, detail["loc"])) or "the settings"
        raise UsageError(f"{f'settings {file}' if file else 'serve'}, {where}: {detail['msg']}") from None


def serve_command(
    settings: OnlineSettings,
    *,
    address: str | None,
    grace_s: float,
    stages: Mapping[str, type[Stage[Any]]] = STAGE_BY_NAME,
) -> None:
    """The body of the command; until it is told to stop. `stages` are what runs under each stage's name.

    Raises SetupError, ProfileError.
    """
    from vidgen_ray.cli.stop_signals import stoppable
    from vidgen_ray.engine.ray_cluster import connected, live_cluster
    from vidgen_ray.online.application import server_plan
    from vidgen_ray.online.auth import check_bind_host, load_keys
    from vidgen_ray.online.server import check_port, serving, wait_for
    from vidgen_ray.online.store.store import open_store
    from vidgen_ray.planner import this_machine

    keys = load_keys(settings.keys_file, settings.limits)
    check_bind_host(settings.host, keys)
    if address is None:
        check_port(settings.host, settings.port)
    # What is wrong with the database is told here, before anything is started.
    open_store(settings).close()
    of = server_plan(settings, this_machine) if address is None else None
    # A busy machine takes longer than the 5 s after which Serve gives its proxy up. Its controller reads this.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")
    with stoppable(grace_s, "jobs") as stop, connected(address, of.cpus if of else 0):
        of = of or server_plan(settings, live_cluster)
        for stage, why in of.serving_profile.unavailable.items():
            typer.echo(f"{stage} is not served: {why}", err=True)
        with serving(of, stages) as server:
            server.wait_until_it_answers(stop)
            if not stop.is_set():
                key = "a key of yours" if keys.are_required else "no key"
                typer.echo(f"{server.url}/ is up, with profile {settings.profile}; {_kept(settings)}")
                typer.echo(f"open it in a browser, or point an OpenAI client at {server.url}/v1 with {key}; Ctrl-C ends it")
            server.wait_until_it_renders(stop, lambda why: typer.echo(f"vidgen: {why}", err=True))
            if not stop.is_set():
                typer.echo("models are loaded")
            wait_for(stop, server)
            if left := server.drain(grace_s):
                typer.echo(
                    f"{left} job{'s' if left > 1 else ''} went back into the queue; the next start goes on with them", err=True
                )


def _kept(settings: OnlineSettings) -> str:
    """Where what outlives the server is; of a database's URL nothing that opens it."""
    from sqlalchemy import make_url

    if settings.database is None:
        return f"results and jobs are in {settings.data}"
    return f"results are in {settings.data}, jobs in {make_url(settings.database).render_as_string(hide_password=True)}"
