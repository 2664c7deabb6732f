"""Run a script for the commands that render one: settings of its lines, the run with its messages, and the exit code."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vidgen_ray.batch.run_options import RecordedOptions
from vidgen_ray.cli.options import parse_fields, with_consent
from vidgen_ray.cli.progress_display import run_view
from vidgen_ray.errors import ScriptError, SetupError, UsageError
from vidgen_ray.graph import WITHOUT_CHUNKED_STAGES, WITHOUT_CLIP
from vidgen_ray.invalid_fields import wrong_defaults
from vidgen_ray.licences import Requirement, ShotLicences, UsedWeights
from vidgen_ray.outputs.folder import OutputFolder, read_last_run
from vidgen_ray.outputs.manifest import manifest_files
from vidgen_ray.outputs.manifest_writer import FILE
from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.script.expansion import read_characters
from vidgen_ray.script.lines import Line, ScriptSettings

if TYPE_CHECKING:
    from vidgen_ray.batch.render import RenderOptions


@contextmanager
def stoppable(grace_s: float, unit: str = "shots") -> Iterator[threading.Event]:
    """Yield an event that the first signal sets. A second signal raises KeyboardInterrupt in the block."""
    stop = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        typer.echo(
            f"vidgen: stopping. Finishing the {unit} in progress for up to {grace_s:g} s. Press Ctrl-C again to stop now.",
            err=True,
        )

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def remembered_interrupt() -> Iterator[Callable[[], None]]:
    """Yield a function that raises KeyboardInterrupt if Ctrl-C was pressed in the block.

    Ctrl-C itself raises it, too. But Python drops an exception that is raised in a destructor or a callback of the interpreter,
    and libraries that are imported catch some. Call the function about once a second in long work.
    """
    pressed = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        pressed.set()
        raise KeyboardInterrupt

    def check() -> None:
        if pressed.is_set():
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)


RequireLicenceOption = Annotated[
    Requirement | None,
    typer.Option(
        "--require-licence",
        help="Exit with code 3, naming the weights, if a shot uses weights that may not be used commercially (commercial), or "
        "only under a condition (unconditional). Default: no requirement.",
    ),
]


def script_licences(lines: Iterable[Line], profile: Profile, outputs: OutputFolder) -> tuple[UsedWeights, ...]:
    """Return the weights behind all valid lines, and behind the finished shots of `outputs` that they continue, each once."""
    licences = ShotLicences(profile)
    found = dict[UsedWeights, None]()
    for line in lines:
        if line.errors:
            continue
        if (source := line.shot.continue_from) is not None and (finished := outputs.find_by_id(source)) is not None:
            found |= dict.fromkeys(finished.record().licences)
        found |= dict.fromkeys(licences(line.shot))
    return tuple(found)


RESUME = "Run the same command to resume."


@contextmanager
def interruptible() -> Iterator[None]:
    """Exit with code 130 and a hint to resume when the block is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"vidgen: interrupted. {RESUME}", err=True)
        raise typer.Exit(130) from None


def script_settings(
    script: Path,
    profile: Profile,
    fields: list[str] | None,
    characters: Path | None,
    mode: str | None,
    seed: int,
    until: str | None,
    consent: str | None,
) -> ScriptSettings:
    """Return the settings of a script from the options of a command. Raises UsageError and ScriptError."""
    if mode is not None and (wrong := wrong_defaults({"mode": mode})):
        raise UsageError(f"--mode: got {wrong[0][1]}, {wrong[0][2]}")
    defaults = with_consent(parse_fields(fields), consent) | ({"mode": mode} if mode else {})
    if "id" in defaults:
        raise UsageError("--set id: must be set by each line of the script, not for all of them")
    people = read_characters(characters) if characters else {}
    changes = changes_until(until)
    return ScriptSettings(script, seed, defaults, profile.defaults, changes, people, policy=profile.policy)


def changes_until(until: str | None) -> dict[str, Any]:
    """Return the fields of a shot that has no stages after `until`."""
    changes: dict[str | None, dict[str, Any]] = {
        None: {},
        "image": dict(WITHOUT_CLIP),
        "video": dict(WITHOUT_CHUNKED_STAGES),
    }
    if until not in changes:
        raise typer.BadParameter(f"got {until!r}, must be image or video", param_hint="--until")
    return changes[until]


def run_script(
    script: ScriptSettings, profile: Profile, out: str, options: RenderOptions, *, as_json: bool, then_prune: bool = False
) -> None:
    """Render a script, write the gallery and print the result. Raises typer.Exit unless all shots are done."""
    from vidgen_ray.batch.render import render
    from vidgen_ray.outputs.cleanup import prune as prune_folder
    from vidgen_ray.report.gallery_page import check_no_other_page, write_gallery

    outputs = OutputFolder(out)
    outputs.prepare()
    check_no_other_page(out)
    local = outputs.storage.local
    try:
        # Ray prints messages on standard output, which is reserved for the result.
        with (
            interruptible(),
            redirect_stdout(sys.stderr),
            run_view(local / "progress.jsonl" if local else None) as view,
            stoppable(options.grace_s) as stop,
        ):
            report = render(script, profile, outputs, options, listener=view, stop=stop)
        if then_prune:
            prune_folder(outputs)
    finally:
        # A script that cannot be read has no results to show.
        gallery = write_gallery(out) if manifest_files(outputs.storage) else None
    if as_json:
        typer.echo(json.dumps(asdict(report)))
    else:
        counts = f"{report.done} done, {report.skipped} already done, {report.failed} failed"
        typer.echo(f"{counts} in {report.seconds:.1f} s." + (f" Gallery: {gallery}" if gallery else ""))
        if report.failed:
            typer.echo(f"Failed lines with their errors: {outputs.storage.place('failures.jsonl')}")
    if report.left:
        typer.echo(f"vidgen: stopped. {report.left} lines not started. {RESUME}", err=True)
        raise typer.Exit(130)
    if report.failed:
        nothing_to_render = report.failed == report.rejected and not report.done + report.skipped
        raise typer.Exit(ScriptError.exit_code if nothing_to_render else 1)


def last_profile(outputs: OutputFolder) -> Profile:
    """Return the profile of the last run, which `run.json` names.

    Raises SetupError if it names none, and ProfileError if its profile does not exist any more.
    """
    try:
        if not (run := read_last_run(outputs)):
            raise SetupError(f"{outputs.url}: has no results; pass the output folder of `vidgen render`")
        name = run["profile_source"] or run["profile"]["name"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SetupError(f"{outputs.url}: run.json does not name the profile of the last run; pass --profile") from None
    return load_profile(name)


def last_options(outputs: OutputFolder) -> RecordedOptions:
    """Return the options of the last run, or the defaults if there was none, or one of a version that did not record them."""
    try:
        return RecordedOptions.model_validate(read_last_run(outputs)["options"])
    except (ValueError, KeyError, TypeError):
        return RecordedOptions()


@contextmanager
def failed_lines(outputs: OutputFolder) -> Iterator[Path]:
    """Yield the file of failed lines, as a script. Raises SetupError if no line has failed."""
    lines = outputs.storage.read(FILE)
    if lines is None:
        raise SetupError(f"{outputs.url}: no line has failed, there is no {FILE}")
    if outputs.storage.local is not None:
        yield outputs.storage.local / FILE
        return
    with TemporaryDirectory(prefix="vidgen-retry-") as folder:
        (Path(folder) / FILE).write_bytes(lines)
        yield Path(folder) / FILE
