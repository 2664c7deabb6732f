"""`--require-licence`, and the licences behind a script in `vidgen plan`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from vidgen_ray.profile import Profile
from vidgen_ray.script.checked_lines import CheckedLine, RejectedLine
from vidgen_ray.shot_licences import Requirement, ShotLicences, UsedWeights

RequireLicenceOption = Annotated[
    Requirement | None,
    typer.Option(
        "--require-licence",
        help="Exit with code 3, naming the weights, if a shot uses weights that may not be used commercially (commercial), or "
        "only under a condition (unconditional). Default: no requirement.",
    ),
]


def script_licences(lines: Iterable[CheckedLine | RejectedLine], profile: Profile) -> tuple[UsedWeights, ...]:
    """Return the weights behind all valid lines, each once."""
    licences = ShotLicences(profile)
    return tuple(dict.fromkeys(used for line in lines if isinstance(line, CheckedLine) for used in licences(line.shot)))
