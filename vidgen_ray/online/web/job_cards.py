"""Job cards: the texts, numbers and URLs of a job for the template. No HTTP, no files."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from vidgen_ray.engine.calls import OUTPUT
from vidgen_ray.graph import STAGE_BY_NAME, file_sizes, stages_of
from vidgen_ray.online.delivered_size import delivered_artefact_of
from vidgen_ray.online.previews import previewed_stage
from vidgen_ray.online.queue_estimate import JobEstimate
from vidgen_ray.online.store.jobs import Job, JobError, JobKind, JobState
from vidgen_ray.report.shot_text import length_text, settings_text, size_text
from vidgen_ray.system.quantities import duration

SAVING = "Save", "Saving"
"""Label and activity of the step after all stages."""
NAME_LENGTH, ID_LENGTH = 40, 6
"""Characters of the prompt and of the id in a file name."""


@dataclass(frozen=True, slots=True)
class Card:
    """Values of the card template, beside those of the job itself."""

    job: Job
    title: str
    active: bool
    status: str
    stages: tuple[tuple[str, str], ...]
    """Label of each stage, and `done`, `current` or `ahead`."""
    preview: str | None
    """Newest finished stage whose result the preview shows."""
    is_clip: bool
    media: str
    width: int
    height: int
    """Pixels of the delivered file, like `width`."""
    hd_size: str | None
    """Size of the larger file, `None` without one."""
    facts: tuple[str, ...]
    """Length, size, seed and rendering time."""
    error: str | None
    settings: tuple[tuple[str, str], ...]
    created: datetime


def card_of(job: Job, base: str, lora_names: Mapping[str, str]) -> Card:
    """Return the card of a job.

    `base` is the path at which the app is mounted. `lora_names` maps the paths of the server's LoRAs to their names.
    """
    sizes, delivered = file_sizes(job.shot), delivered_artefact_of(job)
    width, height = sizes[delivered]
    finished = list(sizes)[-1]
    character = name if isinstance(name := job.request.get("character"), str) else None
    return Card(
        job=job,
        title=" ".join(job.shot.prompt.split()),
        active=not job.state.is_final,
        status=_status(job),
        stages=tuple(_card_stages(job)),
        preview=previewed_stage(job),
        is_clip=job.kind is not JobKind.IMAGE and job.shot.generate_video,
        media=f"{base}/v1/videos/{job.id}/content",
        width=width,
        height=height,
        hd_size=None if finished == delivered else size_text(*sizes[finished]),
        facts=tuple(_facts(job, width, height)),
        error=error_text(job.error) if job.error and job.state is JobState.FAILED else None,
        settings=tuple(settings_text(job.shot, (width, height), lora_names, character)),
        created=datetime.fromtimestamp(job.created_at, UTC),
    )


def file_name(job: Job) -> str:
    """Return the name of the file in a ZIP: the start of the prompt and the end of the id."""
    words = re.sub(r"[^a-z0-9]+", "-", job.shot.prompt.lower()).strip("-")[:NAME_LENGTH].strip("-")
    return f"{words or 'clip'}-{job.id[-ID_LENGTH:]}{'.mp4' if job.shot.generate_video else '.png'}"


def error_text(error: JobError) -> str:
    """Return an error in the words of the page: the label of the stage, and the photo in place of the field `face_image`."""
    stage = STAGE_BY_NAME.get(error.stage or "")
    text = error.message.removeprefix(f"{error.stage}: ")
    # The page shows the photos, not the names of their files on the server.
    text = re.sub(r"face_image( \d+ of \d+)? \([^)]*\): ", r"face_image\1: ", text)
    text = text.replace("face_image: ", "").replace("face_image ", "photo ")
    text = text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
    return f"{stage.label}: {text}" if stage else text


def estimate_text(estimate: JobEstimate) -> str:
    """Return the place in the queue and the time left, in words. Empty for a job that has ended."""
    if estimate.eta_s is None:
        return ""
    left = f"about {duration(max(1, round(estimate.eta_s)))} left"
    if estimate.queue_position is None:
        return left
    return f"Position {estimate.queue_position + 1}, {left}" if estimate.queue_position else f"Next in the queue, {left}"


def _status(job: Job) -> str:
    if job.cancel_requested:
        return "Cancelling after this step"
    if job.state is JobState.QUEUED:
        queued = "Queued" if job.attempts == 0 else "Queued again after an interruption"
        return queued if job.priority == "normal" else f"{queued}, {job.priority} priority"
    if job.stage is None:
        return "Starting"
    stage = STAGE_BY_NAME.get(job.stage)
    activity = stage.activity if stage else SAVING[1]
    if not job.steps:
        return f"{activity} ({job.progress} %)"
    unit = stage.progress_unit if stage else "steps"
    return f"{activity}, {job.step} of {job.steps} {unit} ({job.progress} %)"


def _card_stages(job: Job) -> Iterator[tuple[str, str]]:
    stages = stages_of(job.shot)
    names = [*(stage.name for stage in stages), OUTPUT]
    labels = [*(stage.label for stage in stages), SAVING[0]]
    reached = names.index(job.stage) if job.stage in names else -1
    for number, label in enumerate(labels):
        yield label, "done" if number < reached else "current" if number == reached else "ahead"


def _facts(job: Job, width: int, height: int) -> Iterator[str]:
    shot = job.shot
    if shot.generate_video:
        yield length_text(shot.clip_frames / shot.fps)
    yield size_text(width, height)
    yield f"seed {shot.seed}"
    if job.started_at is not None and job.completed_at is not None:
        duration_s = job.completed_at - job.started_at
        yield f"rendered in {duration(duration_s)}" if duration_s else "already rendered"
