"""`vidgen render --to`: the lines of a script, rendered by a server, in an output folder like that of a run here.

A shot has its files, its record and its manifest row. Its key is the digest of what was sent: it says that this line is
finished, and never that a run here would make the same bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import typer
from pydantic import TypeAdapter, ValidationError

from vidgen_ray.batch.progress import RunListener
from vidgen_ray.batch.render_script import RunReport
from vidgen_ray.batch.results import RunResults
from vidgen_ray.batch.run_options import RecordedOptions
from vidgen_ray.cli.commands import interruptible
from vidgen_ray.cli.progress_display import run_view
from vidgen_ray.cli.run_script import RenderedRun, RunOptions, held_run, note_not_pruned, print_ended
from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.errors import LicenceError, MediaError, SetupError, TooExpensive, UsageError
from vidgen_ray.graph import STAGE_BY_NAME, file_sizes
from vidgen_ray.licences import Requirement, UsedWeights, require_licence
from vidgen_ray.media.decode import open_foreign_video
from vidgen_ray.media.images import verify_image
from vidgen_ray.outputs.cleanup import prune_shots
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.outputs.lease import Lease
from vidgen_ray.outputs.manifest import FinishedShots, id_is_taken
from vidgen_ray.outputs.manifest_writer import script_name
from vidgen_ray.outputs.records import CLIP_FILES, IMAGE_FILE, VIDEO_FILE, Failure, ShotRecord, StepRecord
from vidgen_ray.outputs.run_log import RunLabels
from vidgen_ray.profile import Profile
from vidgen_ray.report.gallery_page import write_gallery
from vidgen_ray.script.lines import PATH_FIELDS, Line, ScriptSettings
from vidgen_ray.script.read import iter_script
from vidgen_ray.shot import Shot
from vidgen_ray.system.cache_dir import sha256_of
from vidgen_ray.system.quantities import amount_text, count

_SECONDS_PER_HOUR = 3600
RESUME_ON_SERVER = "The batch continues on the server. Run the same command to collect it."
ON_SERVER = "rendering on the server"
OF_SERVER = "is a setting of the server"
WITHOUT_MEANING: Mapping[str, str] = {
    "keep": "a server sends no intermediate results",
    "score": "measure the clips afterwards, with vidgen score",
    "address": OF_SERVER,
    "cluster": OF_SERVER,
    "cache": OF_SERVER,
    "cache_gb": OF_SERVER,
    "strict_prompts": "text encoders run on the server; rows of cut prompts cannot be found here",
    "attempts": OF_SERVER,
    "grace_s": "Ctrl-C leaves the batch to the server, and the same command collects it",
    "wait_storage_s": "the same command resumes when the folder can be written",
    "record": OF_SERVER,
    "no_provenance": OF_SERVER,
    "private": OF_SERVER,
    "c2pa_key": OF_SERVER,
    "label": OF_SERVER,
}
"""Parameter of `vidgen render` -> why it cannot be combined with `--to`."""
_VARIANTS = {IMAGE_FILE: "image", VIDEO_FILE: "sd"}
"""File of a shot -> variant of `GET /v1/videos/{id}/content`. The upscaled clip is its main file."""
_OF_SCRIPT = {*PATH_FIELDS, "id", "variants", "character", "continue_from", "consent", "metadata"}
"""Fields that a record takes from the script, never from the answer of a server."""
_LICENCES = TypeAdapter(tuple[UsedWeights, ...])


def check_options(ctx: typer.Context) -> None:
    """Raise UsageError for an option of the command line that has no meaning with `--to`."""
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        why = WITHOUT_MEANING.get(parameter.name or "")
        if why is not None and source is not None and source.name == "COMMANDLINE":
            raise UsageError(f"{max(parameter.opts, key=len)}: cannot be combined with --to: {why}")


@dataclass(frozen=True)
class ServerRun:
    """Options of a run on a server."""

    url: str
    script: ScriptSettings
    profile: Profile
    options: RunOptions
    require: Requirement | None


def render_on_server(run: ServerRun, out: str, *, as_json: bool, then_prune: bool) -> None:
    """Render a script on a server and print the result. Raises SetupError, and typer.Exit unless all shots are done."""
    try:
        # A distribution of its own, which vidgen-ray works without.
        client = import_module("vidgen_client.script_batch")
    except ImportError as error:
        raise SetupError(f"--to: needs vidgen-client ({error}); pip install ./clients/python") from None
    with interruptible(RESUME_ON_SERVER), held_run(out, run.options) as lease:
        outputs = OutputFolder(out)
        try:
            with run_view(ON_SERVER) as view:
                report = _Collector(client, run, outputs, lease, view).run()
        except (client.ClientError, ValidationError) as error:
            raise SetupError(f"--to {_without_password(run.url)}: {_in_words(error)}") from None
        if then_prune:
            note_not_pruned(prune_shots(outputs, lease=lease))
        gallery = write_gallery(out)
    print_ended(out, [RenderedRun(report, gallery, run.profile)], as_json=as_json)


class _Collector:
    """Sends the lines of a script, and writes what comes back into the output folder."""

    def __init__(self, client: Any, run: ServerRun, outputs: OutputFolder, lease: Lease, view: RunListener) -> None:
        self._client = client
        self._run = run
        self._view = view
        self._lease = lease
        self._outputs = outputs.fenced(lease)
        self._source = script_name(outputs.storage, run.script.path, record=run.options.command)
        self._digests: Any = client.LineDigests()
        self._keys: dict[str, str] = {}
        self._lines: dict[str, Line] = {}

    def run(self) -> RunReport:
        """Render all lines. Raises ClientError, TooExpensive and LicenceError."""
        started, options = time.monotonic(), self._run.options
        finished = FinishedShots.load(self._outputs)
        recorded = RecordedOptions.of(self._run.profile, options, self._run.script.run_seed, self._run.script.changes)
        recorded = recorded.model_copy(update={"server": _without_password(self._run.url)})
        labels = RunLabels(
            run=self._lease.run,
            name=options.name,
            profile=self._run.profile.name,
            script=self._source,
            team=options.team,
            submission_id=None,
        )
        results = RunResults(self._outputs, labels, self._lease, self._view, None, recorded, is_script=True)
        with results:
            for line in iter_script(self._run.script):
                self._read(replace(line, script=self._source), finished, results)
            results.lines_read(complete=True)
            asyncio.run(self._rendered(results))
        report = _report(self._lease.run, results, time.monotonic() - started)
        content = {**asdict(report), "error": None, "name": options.name, "script": self._source, "team": options.team}
        profile = self._run.profile.model_dump(mode="json")
        self._outputs.write_run({**content, "profile": profile, "options": recorded.model_dump(mode="json")})
        return report

    def _read(self, line: Line, finished: FinishedShots, results: RunResults) -> None:
        """Count a line that is rejected or finished already, or keep it to be sent."""
        if line.errors:
            results.rejected(line)
            return
        shot_id = line.shot.id or ""
        try:
            key = self._digests(_sent_fields(line.shot))
        except (self._client.ClientError, OSError) as error:
            results.pending()
            results.failed(line, Failure.of("send", error))
            return
        owner = None if self._run.options.replace else finished.other_owner(shot_id, key, line.script)
        if owner is not None:
            taken = id_is_taken(line.source, line.number, shot_id, owner)
            results.rejected(replace(line, id="", errors=(taken,), shots=()))
            return
        self._keys[shot_id] = key
        record = None if self._run.options.fresh else self._outputs.find_by_id(shot_id)
        if record is not None and record.key == key:
            results.skipped(_with_settings(line, record), record)
            return
        results.pending()
        self._lines[shot_id] = line

    async def _rendered(self, results: RunResults) -> None:
        if not self._lines:
            return
        async with self._client.AsyncClient(self._run.url) as server:

            async def collect(name: str, result: Any) -> None:
                await self._collect(server, self._lines[name], result, results)

            batch = self._client.ScriptBatch(server, self._outputs.storage, self._keys, self._show, self._view.on_message)
            answered = await batch.resume(set(self._lines), collect, discard=self._run.options.fresh)
            left = {name: _sent_fields(line.shot) for name, line in self._lines.items() if name not in answered}
            if not left:
                return
            left = await batch.upload_images(left)
            await self._check_estimate(batch, left)
            self._view.on_message(f"sending {count(len(left), 'line')} to {_without_password(self._run.url)}")
            await batch.render(left, collect)

    async def _check_estimate(self, batch: Any, lines: Mapping[str, Any]) -> None:
        """Raise TooExpensive or LicenceError if the server's estimate of the lines says so. Nothing was created then."""
        limit, required = self._run.options.max_cost, self._run.require
        if limit is None and required is None:
            return
        estimates = await batch.estimate(lines)
        if required is not None:
            if any(each.licences is None for _, each in estimates):
                raise UsageError("--require-licence: the server does not say which weights it uses; it needs an update")
            used = [weights for _, each in estimates for weights in _licences_of(each)]
            require_licence(required, dict.fromkeys(used))
        if limit is None:
            return
        costs = [self._cost(each) for _, each in estimates]
        if any(cost is None for cost in costs):
            raise UsageError("--max-cost: the server has no price of a GPU-hour; pass --price")
        total = sum(lines_ * (cost or 0.0) for (lines_, _), cost in zip(estimates, costs, strict=True))
        if not isfinite(total) or total > limit:
            raise TooExpensive(
                f"--max-cost {amount_text(limit)}: {count(len(lines), 'line')} would cost about {amount_text(total)} on the "
                "server. Nothing was sent"
            )

    def _cost(self, estimate: Any) -> float | None:
        """Return the cost of a line: at `--price`, or at that of the server."""
        price = self._run.options.price
        cost: float | None = estimate.cost if price is None else estimate.gpu_seconds / _SECONDS_PER_HOUR * price
        return cost

    def _show(self, batch: Any) -> None:
        counts = batch.request_counts
        done = f"{counts.completed} of {counts.total} done, {counts.failed} failed"
        self._view.on_message(f"{batch.id} {batch.status}: {done}")

    async def _collect(self, server: Any, line: Line, result: Any, results: RunResults) -> None:
        """Write the shot of a line, or its failure."""
        if isinstance(result, self._client.LineProblem):
            self._fail(line, result.code or "Failed", result.message, results)
            return
        try:
            licences = _licences_of(result)
            require_licence(self._run.require, licences)
            record = await self._download(server, line, result, licences)
        except (LicenceError, MediaError) as error:
            results.failed(line, Failure.of("server", error))
        except ValidationError as error:
            self._fail(line, "InvalidAnswer", f"{result.id}: {_in_words(error)}", results)
        except self._client.ApiError as error:
            # The files of this job are gone; the next call sends the line again.
            self._fail(line, error.code or "ApiError", str(error), results)
        else:
            results.finished(_with_settings(line, record), record)

    def _fail(self, line: Line, code: str, message: str, results: RunResults) -> None:
        failure = Failure(
            stage="server", error=code[:100], message=message[:2000], attempts=1, worker=_without_password(self._run.url)
        )
        results.failed(line, failure)

    async def _download(self, server: Any, line: Line, video: Any, licences: tuple[UsedWeights, ...]) -> ShotRecord:
        shot = _shot_of(line.shot, await server.get_shot(video))
        photos = {photo: sha256_of(Path(photo)) for photo in shot.face_image}
        plan = ShotPlan(shot=shot, steps=(), key=self._keys[shot.id or ""], inputs=photos, licences=licences)
        with self._outputs.draft(plan) as draft:
            for artefact in file_sizes(shot):
                file = CLIP_FILES.get(artefact, IMAGE_FILE)
                path = draft.path(file)
                await server.download_video(video, path, variant=_VARIANTS.get(file, "video"))
                await asyncio.to_thread(_check_file, path, video.id)
            return draft.commit(_steps_of(video, plan.key, self._run.url), software={})


def _check_file(path: Path, job: str) -> None:
    """Raise MediaError unless a file of a job is a whole image or clip. A proxy may end an answer early."""
    try:
        if path.name == IMAGE_FILE:
            verify_image(path)
            return
        with open_foreign_video(path) as video:
            video.frames_at([video.frame_count - 1])
    except MediaError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise MediaError(f"{job}: the server has sent an unusable {path.name}: {reason}") from None


def _in_words(error: Exception) -> str:
    """Return an error in one sentence."""
    if not isinstance(error, ValidationError):
        return str(error)
    detail = error.errors(include_url=False, include_input=False)[0]
    return f"unusable answer: {'.'.join(map(str, detail['loc']))}: {detail['msg']}"


def _sent_fields(shot: Shot) -> dict[str, Any]:
    """Return the fields of a line that are sent."""
    return shot.model_dump(mode="json", exclude_unset=True, exclude_none=True, exclude={"id", "variants"})


def _shot_of(shot: Shot, answered: Mapping[str, Any]) -> Shot:
    """Return the shot of a line with the settings that the server has added. Raises ValidationError."""
    added = {name: value for name, value in answered.items() if name in Shot.model_fields and name not in _OF_SCRIPT}
    given = shot.model_dump(include=shot.model_fields_set)
    return Shot.model_validate({**added, **given})


def _with_settings(line: Line, record: ShotRecord) -> Line:
    """Return the line with the settings of its finished shot, which the server has completed."""
    return replace(line, shots=(record.shot,))


def _licences_of(video: Any) -> tuple[UsedWeights, ...]:
    """Return the weights that an answer names. Raises ValidationError."""
    return _LICENCES.validate_python(getattr(video, "licences", None) or ())


def _steps_of(video: Any, key: str, url: str) -> list[StepRecord]:
    """Return the steps of a shot, with the cost of all at the last one."""
    stages = [(stage, seconds) for stage, seconds in video.stage_durations.items() if stage in STAGE_BY_NAME]
    origin = _without_password(url)
    steps = [
        StepRecord(stage=stage, key=key, weights=(), seconds=seconds, gpu_seconds=0.0, cached=False, origin=origin)
        for stage, seconds in stages
    ]
    return [*steps[:-1], *(step.model_copy(update={"price": video.cost}) for step in steps[-1:])]


def _report(run: str, results: RunResults, seconds: float) -> RunReport:
    return RunReport(
        run=run,
        done=results.counts["done"],
        failed=results.counts["failed"],
        skipped=results.counts["skipped"],
        rejected=results.rejected_lines,
        left=0,
        complete=True,
        seconds=round(seconds, 2),
        gpu_seconds=0.0,
        cost=round(results.prices, 6) if results.prices else None,
        currency=None,
        lora_loads=0,
        peak_share={},
        layout=None,
        quarantined=(),
    )


def _without_password(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
