"""Options of a batch run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, JsonValue

from vidgen_ray.engine.processes import ATTEMPTS
from vidgen_ray.engine.storage_pause import MAX_WAIT_S
from vidgen_ray.errors import FrozenModel, UsageError
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.planner.cluster import Cluster
from vidgen_ray.profile import Profile, ProvenanceSettings
from vidgen_ray.render.cache_writer import DEFAULT_CACHE, CacheMode
from vidgen_ray.stages.base import Stage

GRACE_S = 60.0
"""Seconds that shots in progress may take to finish after a stop request."""
LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""Names of runs and teams. They are part of file names and of metrics."""


@dataclass(frozen=True)
class RenderOptions:
    """Options of a run. Raises UsageError for a wrong name or team."""

    name: str | None = None
    """Name of the run in metrics, logs and the manifest. Default: a number and the time."""
    team: str | None = None
    """Team of the run, likewise."""
    address: str | None = None
    """Address of a Ray cluster. Default: a new local Ray, or the one that is connected."""
    cluster: Cluster | None = None
    """GPUs to plan for. Default: detect."""
    price: float | None = None
    """Price of a GPU-hour."""
    max_cost: float | None = None
    """Maximum cost of the run. The whole script is read and estimated first; a data set is not."""
    fresh: bool = False
    """Render finished shots again, without the cache."""
    cache: CacheMode = DEFAULT_CACHE
    """Results of stages that are kept."""
    cache_gb: float | None = None
    """GB that the run may add to the stage cache. `None`: until the disk is almost full."""
    replace: bool = False
    """Replace finished shots of other scripts that have the same id. Otherwise such lines are rejected."""
    keep_stages: bool = False
    """Also write the intermediate images."""
    strict_prompts: bool = False
    """Reject lines whose prompt a text encoder would cut."""
    attempts: int = ATTEMPTS
    """Attempts per call before the shot has failed. The first one counts."""
    grace_s: float = GRACE_S
    """Seconds that shots in progress may take to finish after a stop request."""
    listener: str | None = None
    """Name of an entry point of `vidgen.run_listeners`, such as `score`, that the command adds to the run."""
    command: tuple[str, ...] = ()
    """Words of the command that renders the script, without its output folder. They are recorded with the script."""
    wait_storage_s: float = MAX_WAIT_S
    """Seconds that the run waits while no file can be written to the output folder."""
    record: Path | None = None
    """File to which the events of the engine are written, to replay a failure. `None`: they are not."""
    stages: Mapping[str, type[Stage[Any]]] = field(default_factory=lambda: STAGE_BY_NAME)
    """Stage name -> class that implements it."""

    def __post_init__(self) -> None:
        for option, value in (("name", self.name), ("team", self.team)):
            if value is not None and not LABEL.fullmatch(value):
                raise UsageError(f"--{option}: got {value!r}, must be at most 63 letters, digits, and after the first . _ -")
        if self.record is not None and (self.record.is_dir() or not self.record.parent.is_dir()):
            raise UsageError(f"--record: got {self.record}, must be a file in an existing folder")


class RecordedOptions(FrozenModel):
    """Options that decide what a run writes.

    `run.json` and the failed lines record them, and `vidgen retry` renders with them again.
    """

    profile: str = ""
    """Name or file of the profile."""
    provenance: ProvenanceSettings = ProvenanceSettings()
    name: str | None = None
    team: str | None = None
    cache: CacheMode = DEFAULT_CACHE
    cache_gb: float | None = None
    replace: bool = False
    keep_stages: bool = False
    strict_prompts: bool = False
    attempts: int = ATTEMPTS
    listener: str | None = None
    server: str | None = None
    """URL of the server that has rendered the shots. `None`: they were rendered here."""
    run_seed: int = 0
    """Seed of the run, for lines without a seed that were rejected. Other failed lines are stored with theirs."""
    changes: dict[str, JsonValue] = Field(default_factory=dict)
    """Fields set on every shot, such as those of `--until`."""

    @property
    def without_changes(self) -> RecordedOptions:
        return self.model_copy(update={"changes": {}})

    @classmethod
    def of(cls, profile: Profile, options: RenderOptions, run_seed: int, changes: Mapping[str, Any]) -> RecordedOptions:
        """Return the options of a run with these settings."""
        of_run = {"profile": str(profile.source or profile.name), "run_seed": run_seed, "changes": dict(changes)}
        return cls.model_validate({**vars(options), **of_run, "provenance": profile.provenance})
