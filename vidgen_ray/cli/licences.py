"""`--require-licence`, and the licences behind a script in `vidgen plan`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

import typer

from vidgen_ray.licences import Requirement, ShotLicences, UsedWeights
from vidgen_ray.outputs.folder import OutputFolder
from vidgen_ray.profile import Profile
from vidgen_ray.script.lines import Line

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
