"""Check that the use of a face is declared: the one check of scripts, the library, the API and the web page."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vidgen_ray.cache_dir import digest
from vidgen_ray.consent import DECLARED_BASES, EXAMPLE, Consent
from vidgen_ray.script.lines import WrongField


class ShippedPhoto(NamedTuple):
    """A photo that comes with vidgen."""

    subject: str
    name: str
    """File in `examples/faces`."""
    bytes: int


SHIPPED_PHOTOS = {
    "cb2d7d8680b3450e4851c19fb0471d5cb90f1089d097deddae60c4b88d5bd5bf": ShippedPhoto("ada (drawn)", "ada.png", 9942),
    "69b36e8e41819d71388d2c2a6632298dc3c868661c05f2bd97bdc7c578ae9190": ShippedPhoto("bo (drawn)", "bo.png", 11332),
    "1bc8c08c652c7217fff665d60318ad464259f5ede9d693559578aeec0a601147": ShippedPhoto("cleo (drawn)", "cleo.png", 11877),
    "36857b6ad04ceb78e932c3b1cb37f902255afd53fa15eb2f228654ca34de43ad": ShippedPhoto("dan (drawn)", "dan.png", 12217),
    "11bb779f62bc185ae7184a38d6ffbbc6395408231e90642e8bb9ba094f783427": ShippedPhoto("eve (drawn)", "eve.png", 9252),
    "370adb9cb9dd03ca911ea316fb227495e01095398bc1f71188a3995209b9c81a": ShippedPhoto("Eileen Collins", "astronaut.jpg", 74962),
}
"""sha256 -> photo: drawn people, and a portrait in the public domain."""
SHIPPED_SIZES = {photo.bytes for photo in SHIPPED_PHOTOS.values()}


def consent_for_photos(photos: Sequence[str], declared: Consent | None, *, required: bool) -> Consent | None:
    """Return the consent to record for face photos, which are paths: the declared one, or `demo` for shipped photos.

    Raises WrongField if there is none, unless consent is not `required`, and for the basis `demo` of other photos.
    """
    if declared is not None and declared.basis != "demo":
        return declared
    found = [_shipped(Path(photo)) for photo in photos]
    shipped = [photo for photo in found if photo is not None]
    if len(shipped) == len(found):
        subject = ", ".join(dict.fromkeys(photo.subject for photo in shipped))
        files = ", ".join(dict.fromkeys(photo.name for photo in shipped))
        return declared or Consent(subject=subject, basis="demo", reference=f"examples/faces: {files}")
    if declared is not None:
        raise WrongField(
            "consent.basis", "'demo'", f"is for the photos of vidgen only; must be one of {', '.join(DECLARED_BASES)}"
        )
    if required:
        raise WrongField("consent", "nothing", f"a face needs {EXAMPLE}; basis: {', '.join(DECLARED_BASES)}")
    return None


def _shipped(photo: Path) -> ShippedPhoto | None:
    """Return the shipped photo with the content of this file, or `None`. Hashes only files that have the size of one."""
    with suppress(OSError):
        if photo.stat().st_size in SHIPPED_SIZES:
            return SHIPPED_PHOTOS.get(digest(photo))
    return None
