"""`vidgen render`, `demo` and `retry`: the run of a script with its messages, signals and exit code."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NamedTuple

import pyarrow
import typer

from vidgen_ray.batch.run_options import GRACE_S, RecordedOptions, RenderOptions
from vidgen_ray.cli.commands import RESUME, handling_signals, interruptible, note, note_no_face
from vidgen_ray.cli.file_options import JsonOption, LabelledMarkOptions, check_out
from vidgen_ray.cli.options import (
    PROFILE_HELP,
    AddressOption,
    ConsentOption,
    GpusOption,
    KeepOption,
    LineOptions,
    MaxCostOption,
    OutArgument,
    OutOption,
    PriceOption,
    ProfileOption,
    RequireLicenceOption,
    ScriptsArgument,
    SeedOption,
    StrictPromptsOption,
    UntilOption,
    WhereOption,
    example,
    given_words,
    ids_where,
    load_of_extra,
    reuse_option,
    run_option,
    script_option,
    stop_option,
    with_consent,
)
from vidgen_ray.cli.progress_display import run_view
from vidgen_ray.engine.processes import ATTEMPTS
from vidgen_ray.engine.storage_pause import MAX_WAIT_S
from vidgen_ray.errors import ScriptError, SetupError, UsageError
from vidgen_ray.licences import ShotLicences, UsedWeights, require_licence
from vidgen_ray.outputs.cleanup import PruneReport, prune_shots
from vidgen_ray.outputs.folder import OutputFolder, read_last_run
from vidgen_ray.outputs.lease import Lease
from vidgen_ray.outputs.manifest import manifest_files
from vidgen_ray.outputs.manifest_writer import FAILURES_FILE, failed_lines, to_utf8
from vidgen_ray.outputs.storage import URL, no_results, storage_at
from vidgen_ray.planner.cluster import Cluster, profile_for, this_machine
from vidgen_ray.profile import AUTO, Profile, is_auto
from vidgen_ray.render.cache_writer import DEFAULT_CACHE, CacheMode
from vidgen_ray.script.lines import Line, ScriptSettings
from vidgen_ray.script.read import iter_script
from vidgen_ray.system.quantities import count, duration, money

if TYPE_CHECKING:
    from vidgen_ray.batch.render_script import RunReport

SUMMED = ("done", "failed", "skipped", "rejected", "left", "seconds", "gpu_seconds", "lora_loads", "without_face")
"""Fields of a report that are added if lines were rendered by several runs."""


def demo(
    out: Annotated[str, typer.Option("--out", "-o", help="Output folder.", callback=check_out)] = "out/demo",
    profile: ProfileOption = "demo",
    with_film: Annotated[
        bool, typer.Option("--film", help="Render the screenplay of the demo instead, and join its shots to OUT/film.mp4.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Render the demo script on this machine: all stages, both modes."""
    if URL.match(out):
        raise UsageError(f"--out: got {out!r}, must be a folder on this machine")
    chosen = profile_for(profile)
    script = example("film.yaml" if with_film else "demo.jsonl")
    settings = ScriptSettings(script, profile_defaults=chosen.defaults)
    run_script(settings, chosen, out, RenderOptions(keep_stages=not with_film), as_json=as_json)
    if with_film:
        from vidgen_ray.cli.app import app

        options = ["--out", str(Path(out, "film.mp4")), "--script", str(script), *(["--json"] if as_json else [])]
        if code := app(["film", out, *options], standalone_mode=False):
            raise typer.Exit(code)


@contextmanager
def stoppable(grace_s: float, unit: str = "shots") -> Iterator[threading.Event]:
    """Yield an event that the first signal sets. A second signal raises KeyboardInterrupt in the block."""
    stop = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        note(f"stopping. Finishing the {unit} in progress for up to {grace_s:g} s. Press Ctrl-C again to stop now.")

    with handling_signals((signal.SIGINT, signal.SIGTERM), handle):
        yield stop


def script_licences(lines: Iterable[Line], profile: Profile, outputs: OutputFolder) -> tuple[UsedWeights, ...]:
    """Return the weights behind all valid lines, and behind the finished shots of `outputs` that they continue, each once."""
    licences = ShotLicences(profile)
    found = dict[UsedWeights, None]()
    for line in lines:
        if line.errors:
            continue
        if (source := line.shot.continue_from) is not None and (finished := outputs.find_by_id(source)) is not None:
            found |= dict.fromkeys(finished.licences)
        found |= dict.fromkeys(licences(line.shot))
    return tuple(found)


LISTENERS = "vidgen.run_listeners"
"""Group of entry points, name of an option of `vidgen render` -> listener of a run."""
ProfileOfLastRunOption = Annotated[
    str | None, typer.Option("--profile", "-p", help=f"{PROFILE_HELP} Default: that of the last run in the folder.")
]


@dataclass(frozen=True)
class RunOptions(RenderOptions):
    """Options of a run, with their help for `vidgen render`."""

    name: Annotated[
        str | None, run_option("--name", help="Name of the run in metrics, logs and the manifest. Default: its number.")
    ] = None
    team: Annotated[
        str | None, run_option("--team", envvar="VIDGEN_TEAM", help="Team of the run in metrics and the manifest.")
    ] = None
    address: AddressOption = None
    cluster: GpusOption = None
    price: PriceOption = None
    max_cost: MaxCostOption = None
    fresh: Annotated[bool, reuse_option("--fresh", help="Render finished shots again, without the cache.")] = False
    cache: Annotated[
        CacheMode,
        reuse_option(
            "--cache",
            help="Results of stages to keep for later runs: face features and images, or also the clips before upscaling.",
            show_default=True,
        ),
    ] = DEFAULT_CACHE
    cache_gb: Annotated[
        float | None,
        reuse_option(
            "--cache-gb",
            metavar="GB",
            min=0,
            help="GB that the run may add to the cache. Default: until less than 10% and less than 50 GB of the disk are free.",
        ),
    ] = None
    replace: Annotated[
        bool,
        reuse_option("--replace", help="Replace finished shots of other scripts with the same id. Default: reject the line."),
    ] = False
    strict_prompts: StrictPromptsOption = False
    attempts: Annotated[
        int, stop_option("--attempts", min=1, help="Attempts per call of a stage when it fails, times out or crashes.")
    ] = ATTEMPTS
    grace_s: Annotated[
        float,
        stop_option("--grace", metavar="SECONDS", min=0, help="How long shots in progress may finish after SIGTERM or Ctrl-C."),
    ] = GRACE_S
    wait_storage_s: Annotated[
        float,
        stop_option(
            "--wait-storage",
            metavar="SECONDS",
            min=0,
            help="How long the run waits while nothing can be written: the disk is full, or the file system or store is gone.",
        ),
    ] = MAX_WAIT_S
    record: Annotated[
        Path | None,
        stop_option(
            "--record",
            metavar="FILE",
            help="Write the engine's events and decisions to this file, one JSON object per line, for a report of a failure.",
        ),
    ] = None


RECORDED = frozenset(field.name for each in (LineOptions, LabelledMarkOptions) for field in fields(each)) | {"seed", "until"}
"""Parameters of `vidgen render` that decide what its files are, and can be published."""


def render(
    ctx: typer.Context,
    scripts: ScriptsArgument,
    lines: LineOptions,
    run: RunOptions,
    marks: LabelledMarkOptions,
    out: OutOption = "out",
    profile: ProfileOption = AUTO,
    seed: SeedOption = 0,
    until: UntilOption = None,
    keep: KeepOption = None,
    prune: Annotated[
        bool,
        reuse_option("--prune", help="Then remove the shots of lines that the script no longer has, as `vidgen prune` does."),
    ] = False,
    strict: Annotated[
        bool,
        script_option(
            "--strict", help="Check all lines first, and exit with code 3 if any is invalid. Default: render the valid lines."
        ),
    ] = False,
    require: RequireLicenceOption = None,
    score: Annotated[
        bool,
        run_option(
            "--score", help="Also measure the clips, as `vidgen score` does: on idle CPUs during the run, the rest after it."
        ),
    ] = False,
    to: Annotated[
        str | None,
        run_option(
            "--to",
            metavar="URL",
            help="Render on a server, as a batch, and download its files. Key: $VIDGEN_API_KEY. Without --profile, the "
            "server's defaults apply.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Render all shots of a script that are not finished.

    The same command resumes a run. SIGTERM or Ctrl-C stops it after the shots in progress, a second one at once.
    """
    words = ("vidgen", "render", *map(str, scripts), "--profile")
    if to is not None:
        from vidgen_ray.cli.render_on_server import ServerRun, check_options, render_on_server

        check_options(ctx)
        chosen = profile_for("demo" if is_auto(profile) else profile)
        settings = lines.settings(scripts, chosen, seed, until)
        settings = replace(settings, profile_defaults={}) if is_auto(profile) else settings
        check_lines(settings, strict=strict)
        options = replace(run, command=(*words, profile, *given_words(ctx, RECORDED), "--to", to))
        render_on_server(ServerRun(to, settings, chosen, options, require), out, as_json=as_json, then_prune=prune)
        return
    chosen = marks.applied(profile_for(profile, detected(run.address, run.cluster)))
    settings = lines.settings(scripts, chosen, seed, until)
    check_lines(settings, strict=strict)
    if require is not None:
        require_licence(require, script_licences(iter_script(settings), chosen, OutputFolder(out)))
    named = chosen.name if is_auto(profile) else profile
    command = (*words, named, *given_words(ctx, RECORDED - {"c2pa_key"}))
    options = replace(run, keep_stages=bool(keep), listener="score" if score else None, command=command)
    run_script(settings, chosen, out, options, as_json=as_json, then_prune=prune)


def check_lines(settings: ScriptSettings, *, strict: bool) -> None:
    """Raise ScriptError with `strict` if a line is invalid."""
    if strict and (errors := [error for line in iter_script(settings) for error in line.errors]):
        raise ScriptError(errors)


def retry(
    out: OutArgument = "out",
    rejected: Annotated[
        bool, typer.Option("--rejected", help="Instead render the shots whose clip was rejected in a review, with new seeds.")
    ] = False,
    where: WhereOption = None,
    profile: ProfileOfLastRunOption = None,
    address: AddressOption = None,
    gpus: GpusOption = None,
    consent: ConsentOption = None,
    as_json: JsonOption = False,
) -> None:
    """Render the failed lines of an output folder again.

    With the options of the run in which each has failed: profile, provenance, --keep, --cache, --cache-gb, --replace,
    --strict-prompts, --attempts, --seed, --until and --score. --where also renders the finished shots that match, with new
    seeds, which their script then keeps.
    """
    outputs = OutputFolder(out)
    last = options_of_last_run(outputs, profile)
    check_rendered_here(out, last)
    if rejected or where is not None:
        profile_for(last.profile)
        ids = None if where is None else frozenset(ids_where(outputs.storage, where))
        read = _chosen_lines(outputs, ids, rejected=rejected)
        nothing = "No finished shot is rejected." if where is None else "No shot matches."
    else:
        read = partial(failed_lines, outputs.storage)
        nothing = "No line has failed."
    if not read():
        _print_nothing_to_render(nothing, as_json=as_json)
        return
    render_again(out, read, last, profile, address, gpus, consent, as_json=as_json)


def _chosen_lines(outputs: OutputFolder, ids: frozenset[str] | None, *, rejected: bool) -> Callable[[], list[str]]:
    """Give finished shots new seeds, and return a function that returns their lines and, unless `rejected`, those that failed.

    `ids`: of the shots. Default: all.
    """
    from vidgen_ray.outputs.new_seeds import give_new_seeds

    repeated = give_new_seeds(outputs, ids, rejected=rejected)
    if repeated.continued:
        note(f"these shots continue one of them and change, too: {', '.join(repeated.continued)}")
    if repeated.unreadable:
        names = ", ".join(repeated.unreadable)
        note(f"files are missing or damaged, see vidgen verify. Left out: {names}")
    return lambda: [*([] if rejected else failed_lines(outputs.storage, ids or frozenset())), *repeated.lines]


def render_again(
    out: str,
    read: Callable[[], list[str]],
    last: RecordedOptions,
    profile: str | None,
    address: str | None,
    gpus: Cluster | None,
    consent: str | None = None,
    *,
    as_json: bool,
) -> None:
    """Render lines in the format of `failures.jsonl`, each with the options with which it failed.

    `read` returns the lines. It is called while no other run can change them. `last`: options of the last run, for lines that
    did not fail. `profile`: instead of theirs. Prints one result. Raises typer.Exit as `run_script`.
    """
    ended = list[RenderedRun]()
    for wanted in dict.fromkeys(options_of(line, last).model_dump_json() for line in read()):
        recorded = RecordedOptions.model_validate_json(wanted)
        check_rendered_here(out, recorded)
        chosen = profile_for(profile or recorded.profile).with_provenance(recorded.provenance)
        run_fields = recorded.model_dump(exclude={"profile", "provenance", "run_seed", "changes", "server"})
        options = RenderOptions(address=address, cluster=gpus, **run_fields)
        with interruptible(), held_run(out, options) as lease:
            lines = [line for line in read() if options_of(line, last) == recorded]
            if not lines:
                continue
            with TemporaryDirectory(prefix="vidgen-retry-") as folder:
                script = Path(folder) / FAILURES_FILE
                script.write_bytes(to_utf8("".join(f"{line}\n" for line in lines)))
                consented, changes = with_consent({}, consent), recorded.changes
                settings = ScriptSettings(script, recorded.run_seed, consented, chosen.defaults, changes, policy=chosen.policy)
                ended.append(_run(settings, chosen, out, options, lease))
        if ended[-1].is_stopped:
            break
    if not ended:
        # Another run has rendered them in the meantime.
        _print_nothing_to_render("No line has failed.", as_json=as_json)
        return
    print_ended(out, ended, as_json=as_json)


def _print_nothing_to_render(message: str, *, as_json: bool) -> None:
    typer.echo(message, err=True)
    if as_json:
        typer.echo(json.dumps({"done": 0, "skipped": 0, "failed": 0}))


def check_rendered_here(out: str, options: RecordedOptions) -> None:
    """Raise SetupError if shots with these options were rendered by a server."""
    if options.server is not None:
        raise SetupError(
            f"{out}: was rendered by {options.server}. Run its command again, which sends what has failed or is missing: "
            f"vidgen render SCRIPT --to {options.server} --out {out}"
        )


def options_of(line: str, last: RecordedOptions) -> RecordedOptions:
    """Return the options with which a line is rendered again: those with which it failed, or those of the last run.

    The changes of a run are part of the shot in a line that was written from a shot.
    """
    try:
        failure = json.loads(line)["failure"]
        return RecordedOptions.model_validate(failure["options"]) if "options" in failure else last.without_changes
    except (ValueError, KeyError, TypeError):
        return last


def detected(address: str | None, gpus: Cluster | None) -> Callable[[], Cluster]:
    """Return a function that returns these GPUs, the cluster at an address, or this machine. It connects once at most."""

    @cache
    def cluster() -> Cluster:
        if gpus is not None or address is None:
            return gpus or this_machine()
        from vidgen_ray.batch.render_script import cluster_at

        return cluster_at(address)

    return cluster


class RenderedRun(NamedTuple):
    """Report of a run, and its gallery."""

    report: RunReport
    gallery: Path | str | None
    profile: Profile

    @property
    def is_stopped(self) -> bool:
        return bool(self.report.left) or not self.report.complete


def run_script(
    script: ScriptSettings,
    profile: Profile,
    out: str,
    options: RenderOptions,
    *,
    as_json: bool,
    then_prune: bool = False,
) -> None:
    """Render a script, write the gallery and print the result. Raises typer.Exit unless all shots are done.

    The class of a listener in `options` gets the view, the output folder, the profile and Ray's address; `finish` is called
    after the run.
    """
    from vidgen_ray.batch.render_script import checked_start

    keep_pandas_out()
    checked_start(script, profile)
    with interruptible(), held_run(out, options) as lease:
        ended = _run(script, profile, out, options, lease, then_prune=then_prune)
    print_ended(out, [ended], as_json=as_json)


def keep_pandas_out() -> None:
    """Make the first array of pyarrow, which looks for pandas once. Its import takes half a second at the end of a run."""
    if "pandas" not in sys.modules:
        sys.modules["pandas"] = None  # type: ignore[assignment]  # as Python does for a module that cannot be imported
        with suppress(Exception):
            pyarrow.array([0])
        del sys.modules["pandas"]


@contextmanager
def held_run(out: str, options: RenderOptions) -> Iterator[Lease]:
    """Hold the lease of a folder for a run, of which nothing is written before. Raises SetupError or UsageError."""
    from vidgen_ray.batch.render_script import held_lease
    from vidgen_ray.report.gallery_page import check_no_other_page

    check_no_other_page(out)
    # Ray prints messages on standard output, which is reserved for the result.
    with redirect_stdout(sys.stderr), held_lease(OutputFolder(out), options) as lease:
        yield lease


def _run(
    script: ScriptSettings,
    profile: Profile,
    out: str,
    options: RenderOptions,
    lease: Lease,
    *,
    then_prune: bool = False,
) -> RenderedRun:
    from vidgen_ray.batch.render_script import render_shots
    from vidgen_ray.report.gallery_page import write_gallery

    outputs, gallery = OutputFolder(out), None
    try:
        with run_view() as view, stoppable(options.grace_s) as stop:
            added = None
            if (listener := options.listener) is not None:
                added = load_of_extra(LISTENERS, listener, f"--{listener}")(view, outputs, profile, options.address)
            report = render_shots(script, profile, outputs, options, listener=added or view, stop=stop, lease=lease)
        if added is not None and report.complete and not report.left:
            added.finish()
        if then_prune:
            note_not_pruned(prune_shots(outputs, lease=lease))
    finally:
        # A script that cannot be read has no results to show.
        if lease.is_sure and manifest_files(outputs.storage):
            gallery = write_gallery(out)
    return RenderedRun(report, gallery, profile)


def print_ended(out: str, ended: Sequence[RenderedRun], *, as_json: bool) -> None:
    """Print the results of one or more runs as one. Raises typer.Exit unless all shots are done."""
    reports = [each.report for each in ended]
    sums = {name: sum(getattr(each, name) for each in reports) for name in SUMMED}
    costs = [each.cost for each in reports if each.cost is not None]
    report = replace(reports[-1], **sums, cost=sum(costs) if costs else None)
    if as_json:
        typer.echo(json.dumps(asdict(report)))
    else:
        counts = f"{report.done} done, {report.skipped} already done, {report.failed} failed"
        cost = "" if report.cost is None else f", {money(report.cost, report.currency)}"
        gallery = ended[-1].gallery
        typer.echo(f"{counts} in {duration(report.seconds)}{cost}." + (f" Gallery: {gallery}" if gallery else ""))
        if report.failed:
            typer.echo(f"Failed lines with their errors: {storage_at(out).place(FAILURES_FILE)}")
    note_no_face(report.without_face, ended[-1].profile)
    if report.left or not report.complete:
        unread = "" if report.complete else " and the rest of the script"
        note(f"stopped. {count(report.left, 'line')}{unread} not started. {RESUME}")
        raise typer.Exit(130)
    if report.failed:
        nothing_to_render = report.failed == report.rejected and not report.done + report.skipped
        raise typer.Exit(ScriptError.exit_code if nothing_to_render else 1)


def note_not_pruned(report: PruneReport) -> None:
    """Say which scripts kept their replaced shots, and why."""
    for script, lines in report.rejected.items():
        rejected = f"{count(lines, 'line')} of it {'is' if lines == 1 else 'are'} rejected"
        note(f"{script}: nothing pruned, since {rejected}. Correct the script and render it again.")


def options_of_last_run(outputs: OutputFolder, profile: str | None = None) -> RecordedOptions:
    """Return the options of the last run in a folder. `profile`: instead of that of the run.

    Raises SetupError without a profile if there was no run, or if `run.json` is damaged.
    """
    try:
        if run := read_last_run(outputs):
            last = RecordedOptions.model_validate(run["options"])
            return last if profile is None else last.model_copy(update={"profile": profile})
        wrong = no_results(outputs.storage)
    except (ValueError, KeyError, TypeError):
        wrong = SetupError(f"{outputs.url}: run.json does not name the profile of the last run; pass --profile")
    if profile is None:
        raise wrong
    return RecordedOptions(profile=profile)


def profile_of_run(outputs: OutputFolder, name: str | None) -> Profile:
    """Return the profile with this name, or that of the last run. Raises SetupError or ProfileError if there is none."""
    return profile_for(options_of_last_run(outputs, name).profile)
