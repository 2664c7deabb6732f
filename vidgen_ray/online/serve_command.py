"""`vidgen serve`: start a server and shut it down gracefully. `vidgen keys`: create API keys and signing keys."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from contextlib import closing, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from vidgen_ray.cli.commands import ModelOptions, interruptible, with_options
from vidgen_ray.cli.file_options import C2paKeyOption, JsonOption, MarkOptions
from vidgen_ray.cli.folder_commands import listen
from vidgen_ray.cli.options import AddressOption
from vidgen_ray.cli.run_script import stoppable
from vidgen_ray.errors import SetupError, UsageError
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.online.server_settings import OnlineSettings, read_settings_file
from vidgen_ray.planner.cluster import profile_for, this_machine
from vidgen_ray.stages.base import Stage

if TYPE_CHECKING:
    from vidgen_ray.online.store.store import JobStore

OTHER_SERVER_POLL_S = 0.5
SERVE_OPTIONS = ModelOptions.of(
    OnlineSettings,
    profile={"flag": "--profile/-p"},
    host={},
    port={"metavar": "PORT", "kind": int, "min": 1, "max": 65535},
    root_path={"metavar": "PATH"},
    data={},
    database={},
    keys_file={"flag": "--keys", "metavar": "FILE"},
    require_licence={"metavar": "commercial|unconditional"},
)


@with_options
def serve(
    options: Annotated[dict[str, Any], SERVE_OPTIONS],
    settings: Annotated[
        Path | None, typer.Option("--settings", help="YAML file with all settings. Command-line options override it.")
    ] = None,
    address: AddressOption = None,
    c2pa_key: C2paKeyOption = None,
    grace_s: Annotated[
        float,
        typer.Option("--grace", metavar="SECONDS", min=0, help="How long jobs in progress may finish after SIGTERM or Ctrl-C."),
    ] = 60,
    wait_s: Annotated[
        float,
        typer.Option(
            "--wait", metavar="SECONDS", min=0, help="How long to wait until another server with the same database has stopped."
        ),
    ] = 15,
) -> None:
    """Start a server with an OpenAI-compatible API and a web page.

    Jobs are stored before they are accepted. After a stop or a crash, the same command resumes them.
    """
    with interruptible(), redirect_stdout(sys.stderr):
        chosen = settings_of(settings, options)
        if c2pa_key is not None:
            base = chosen.provenance or profile_for(chosen.profile).provenance
            chosen = chosen.model_copy(update={"provenance": MarkOptions(c2pa_key=c2pa_key).settings(base)})
        serve_command(chosen, address=address, grace_s=grace_s, wait_s=wait_s)


def settings_of(file: Path | None, options: dict[str, Any]) -> OnlineSettings:
    """Return the settings of a YAML file, overridden by the options.

    Raises UsageError with the invalid setting and what is allowed.
    """
    content: Any = {}
    if file is not None:
        content = read_settings_file(file, f"settings {file}") or {}
        if not isinstance(content, dict):
            raise UsageError(f"settings {file}: must be a mapping of settings to values, e.g. `port: 8000`")
    try:
        return OnlineSettings.model_validate({**content, **options})
    except ValidationError as error:
        detail = error.errors(include_url=False, include_input=False)[0]
        setting = ".".join(map(str, detail["loc"])) or "settings"
        raise UsageError(f"{f'settings {file}' if file else 'serve'}, {setting}: {detail['msg']}") from None


def serve_command(
    settings: OnlineSettings,
    *,
    address: str | None,
    grace_s: float,
    wait_s: float = 15,
    stages: Mapping[str, type[Stage[Any]]] = STAGE_BY_NAME,
) -> None:
    """Run the server until it is stopped. `stages`: stage name -> class that implements it.

    Raises SetupError and ProfileError.
    """
    # Of its processes, too. Otherwise, glibc keeps the memory of large requests and images in an arena for each thread.
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")
    from vidgen_ray.engine.ray_cluster import connected, live_cluster
    from vidgen_ray.online.auth import check_bind_host, is_loopback, load_keys
    from vidgen_ray.online.server import serving
    from vidgen_ray.online.server_plan import check_exposure, server_plan
    from vidgen_ray.online.store.store import open_store

    keys = load_keys(settings.keys_file, settings.limits)
    check_bind_host(settings.host, keys)
    # Report database errors before anything is started.
    with closing(open_store(settings)) as store:
        _wait_for_other_server(store, wait_s)
    listening = listen(settings.host, settings.port)
    plan = server_plan(settings, this_machine) if address is None else None
    cpus = plan.cpus if plan else 0
    # Replicas of Ray Serve have runtime environments.
    with listening, stoppable(grace_s, "jobs") as stop, connected(address, cpus, agent_delay_s=0):
        check_exposure(settings)
        plan = plan or server_plan(settings, lambda: live_cluster().total)
        for stage, reason in plan.serving_profile.unavailable.items():
            typer.echo(f"Stage {stage} is unavailable until the next start of this server: {reason}", err=True)
        with serving(plan, listening, stages) as server:
            server.wait_until_accepting(stop)
            if not stop.is_set():
                if not is_loopback(settings.host):
                    typer.echo("Other machines must connect through a proxy that limits requests: deploy/nginx.conf.", err=True)
                key = "an API key" if keys.are_required else "no API key"
                typer.echo(f"Serving profile {settings.profile} at {server.url}/. {_storage(settings)}")
                typer.echo(
                    f"Open the URL in a browser, or use an OpenAI client with {server.url}/v1 and {key}. Ctrl-C to stop."
                )
            server.wait_until_ready(stop, lambda message: typer.echo(f"vidgen: {message}", err=True))
            if not stop.is_set():
                typer.echo("Models loaded.")
            server.wait(stop)
            if left := server.drain(grace_s):
                typer.echo(
                    f"Returned {left} job{'s' if left > 1 else ''} to the queue. Start the server again to resume.", err=True
                )


def _wait_for_other_server(store: JobStore, wait_s: float) -> None:
    """Wait until no other server works with the store. Raises SetupError after `wait_s` seconds.

    One that has crashed on another machine is only known by its missing heartbeats.
    """
    from vidgen_ray.online.store.jobs import CLAIM_S, director_text

    started = time.monotonic()
    while (other := store.queue.director(CLAIM_S)) is not None:
        waited_s, server = time.monotonic() - started, f"another server works with it, whose director is {director_text(other)}"
        if waited_s >= wait_s:
            raise SetupError(
                f"database {store.url}: {server}. Stop it, wait longer with --wait SECONDS, or use another folder with --data."
            )
        if waited_s < OTHER_SERVER_POLL_S:
            typer.echo(f"database {store.url}: {server}. Waiting up to {wait_s:g} s until it has stopped.", err=True)
        time.sleep(OTHER_SERVER_POLL_S)


def _storage(settings: OnlineSettings) -> str:
    """Describe where results and jobs are stored, without the database password."""
    from sqlalchemy import make_url

    if settings.database is None:
        return f"Results and jobs are stored in {settings.data}."
    database = make_url(settings.database).render_as_string(hide_password=True)
    return f"Results are stored in {settings.data}, jobs in {database}."


MAX_NAME_LETTERS = 64
"""Limit of organisation names in certificates."""

keys = typer.Typer(
    help="Create API keys of a server, and keys that sign files (C2PA).",
    no_args_is_help=True,
    add_completion=False,
)


@keys.command()
def new(
    tenant: Annotated[str, typer.Option("--tenant", help="Owner of the key. Keys of the same tenant share their jobs.")],
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Key file of the server to add the key to. Default: print it only.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Create an API key and print it once.

    Only its sha256 is stored. Servers read their key file when they start.
    """
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
    """Create a key that signs files, with a certificate for ten years.

    Needs the extra `c2pa`. Only who trusts the certificate can tell who has signed;
    everybody can tell whether a file was changed.
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
