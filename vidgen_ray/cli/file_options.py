"""Options that commands without a script share, too: output folder, marks on files, JSON. Does not import the stages."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from vidgen_ray.errors import UsageError, shortened_value
from vidgen_ray.outputs.storage import URL
from vidgen_ray.profile import MAX_LABEL_LETTERS, Profile, ProvenanceSettings

DETAILS_PANEL = "Details"
"""Panel of less common options."""
marks_option = partial(typer.Option, rich_help_panel="Marks on files")
details_option = partial(typer.Option, rich_help_panel=DETAILS_PANEL)
"""Like `typer.Option`, for less common options of the panel that is named."""

JOB_FOLDER = "working_dir_files"
"""Folder of Ray that has the working directories of submitted jobs."""


def check_out(value: str) -> str:
    """Return an output folder with `~` replaced, which a shell leaves in quotes.

    Rejects an empty one, which a shell passes for an unset variable, and one that Ray deletes with the job.
    """
    value = os.path.expanduser(value)
    if not value.strip():
        raise typer.BadParameter("got an empty text, must be a folder or its URL")
    if not URL.match(value) and JOB_FOLDER in Path(value).absolute().parts:
        allowed = (
            "is inside the copy of the working directory that Ray deletes after the job; use an absolute path of a shared disk"
        )
        raise typer.BadParameter(f"{value} {allowed}, or a URL such as s3://BUCKET/FOLDER")
    return value


JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on standard output.")]
C2paKeyOption = Annotated[
    Path | None,
    marks_option(
        "--c2pa-key",
        envvar="VIDGEN_C2PA_KEY",
        help="Sign files (C2PA) with this key, see `vidgen keys c2pa`. Default: that of the profile, or do not sign.",
    ),
]


@dataclass(frozen=True)
class MarkOptions:
    """Options for the provenance of files."""

    no_provenance: Annotated[
        bool,
        marks_option(
            "--no-provenance",
            help="Do not mark files as AI-generated, and do not sign them. Recorded in shot.json and run.json.",
        ),
    ] = False
    private: Annotated[
        bool,
        marks_option("--private", help="Mark files without the prompt and other settings of the shot. Default: with them."),
    ] = False
    c2pa_key: C2paKeyOption = None

    def settings(self, base: ProvenanceSettings, label: str | None = None) -> ProvenanceSettings:
        """Return the settings with the options. Raises UsageError, and SetupError if files cannot be signed."""
        if self.no_provenance and self.private:
            raise UsageError("--no-provenance: cannot be combined with --private")
        changes: dict[str, Any] = {"metadata": "off"} if self.no_provenance else {"metadata": "private"} if self.private else {}
        if label is not None:
            changes["label"] = label
        if self.c2pa_key is not None:
            changes["c2pa_key"] = self.c2pa_key.expanduser().absolute()
        try:
            return ProvenanceSettings.model_validate({**base.model_dump(), **changes})
        except ValidationError:
            allowed = f"must be one line of 1 to {MAX_LABEL_LETTERS} printable letters"
            raise UsageError(f"--label: got {shortened_value(label)}, {allowed}") from None


@dataclass(frozen=True)
class LabelledMarkOptions(MarkOptions):
    """Options for the provenance and the label of files."""

    label: Annotated[
        str | None,
        marks_option(
            "--label", metavar="TEXT", help="Draw this text into the lower right corner of images and clips. Default: none."
        ),
    ] = None

    def applied(self, profile: Profile) -> Profile:
        """Return the profile with the options."""
        return profile.with_provenance(self.settings(profile.provenance, self.label))
