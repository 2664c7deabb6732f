"""Licences of weights: the ledger `licences.yaml`, and the licence that belongs to a weight reference."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib import resources
from pathlib import PurePosixPath
from typing import Literal

from pydantic import Field, TypeAdapter

from vidgen_ray.errors import SetupError, StrictModel
from vidgen_ray.system.cache_dir import CacheFile
from vidgen_ray.system.files import parse_yaml


class WeightLicence(StrictModel):
    """Licence of one set of weights. A summary for people, not the licence itself."""

    id: str = Field(
        pattern=r"[a-z0-9]+(-[a-z0-9]+)*", description="Short name, used to remember that the licence was accepted."
    )
    name: str = Field(description="Name of the weights.")
    weights: tuple[str, ...] = Field(
        min_length=1,
        description="References: hub:OWNER/NAME[:SUBFOLDER] without revision, builtin:NAME, remote:NAME, package:NAME/FILE or "
        "path:NAME for a file or folder of that name. `*` stands for any text.",
    )
    licence: str = Field(description="SPDX identifier, or the licence's own name.")
    url: str = Field(description="Text of the licence.")
    commercial_use: Literal["yes", "no", "conditional"] = Field(
        description="Whether the weights may be used commercially. `conditional`: under the condition."
    )
    condition: str | None = Field(default=None, description="Condition of commercial use, in a sentence or two.")
    gated: str | None = Field(default=None, description="Page on which access must be requested before a download.")
    notes: str | None = Field(default=None, description="Anything else that a user should know.")
    source: str = Field(default="unchecked", description="How this entry was verified, or `unchecked`.")

    @property
    def needs_acceptance(self) -> bool:
        """True if the licence restricts the use, so that a download asks for its acceptance."""
        return self.commercial_use != "yes"


_Ledger = TypeAdapter(tuple[WeightLicence, ...])
_accepted = CacheFile("accepted-licences.json", TypeAdapter(dict[str, str]))
"""Id of a licence -> time of its acceptance."""


@lru_cache(maxsize=1)
def licence_ledger() -> tuple[WeightLicence, ...]:
    """Return all entries of the ledger."""
    text = (resources.files("vidgen_ray.weights") / "licences.yaml").read_text("utf-8")
    return _Ledger.validate_python(parse_yaml(text))


def licence_of(reference: str, own: Iterable[WeightLicence] = ()) -> WeightLicence | None:
    """Return the licence of a weight reference as profiles write it. `None` if it is unknown.

    `own`: licences of a profile, which take precedence over the ledger. Of several matching entries of one of them, the most
    specific one is returned.
    """
    names = _match_names(reference)
    for entries in (own, licence_ledger()):
        matches = [
            (len(pattern.rstrip("*")), entry)
            for entry in entries
            for pattern in entry.weights
            if any(fnmatchcase(name, pattern) for name in names)
        ]
        if matches:
            return max(matches, key=lambda match: match[0])[1]
    return None


def _match_names(reference: str) -> tuple[str, ...]:
    """Return the names under which a ledger may list a reference.

    `hub:a/b@main:c/d` -> hub:a/b:c/d, hub:a/b:c, hub:a/b. `~/models/antelopev2` -> path:antelopev2.
    """
    if reference.startswith("hub:"):
        repo, _, subfolder = reference.partition(":")[2].partition(":")
        repo = f"hub:{repo.partition('@')[0]}"
        folders = (PurePosixPath(subfolder), *PurePosixPath(subfolder).parents) if subfolder else ()
        return (*(f"{repo}:{folder}" for folder in folders if folder.name), repo)
    if reference.startswith(("builtin:", "package:", "remote:")):
        return (reference,)
    return (f"path:{PurePosixPath(reference).name}",)


def accepted_licences() -> set[str]:
    """Return the ids of the licences that were accepted on this machine, with `accept_licences`."""
    return set(_accepted.read())


def accept_licences(ids: Iterable[str]) -> None:
    """Remember on this machine that the licences with these ids were accepted. Raises SetupError if that cannot be stored."""
    try:
        with _accepted.update() as accepted:
            accepted |= dict.fromkeys(ids, datetime.now(UTC).isoformat(timespec="seconds"))
    except OSError as error:
        text = f"cannot write {_accepted.path} ({error.strerror}); set VIDGEN_CACHE to a writable folder"
        raise SetupError(text) from None
