"""Read the provenance of a file: our own record, or the digital source type that another tool has written."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, get_args

from PIL import Image as PILImage
from pydantic import ValidationError

from vidgen_ray.errors import MediaError
from vidgen_ray.media import FileMetadata
from vidgen_ray.media.file_metadata import read_xmp
from vidgen_ray.provenance.record import ProvenanceRecord, SourceType
from vidgen_ray.provenance.xmp import xmp_property

SOURCE_TYPE_PROPERTY = "Iptc4xmpExt:DigitalSourceType"


class FoundProvenance(NamedTuple):
    """Content of a file's metadata. Both are `None` for a file without metadata."""

    record: ProvenanceRecord | None
    """Record that vidgen-ray has written."""
    source_type: str | None
    """Last part of the URI of the IPTC digital source type, also of other tools."""

    @property
    def known_type(self) -> SourceType | None:
        """The source type, if it is one that vidgen-ray writes."""
        for known in get_args(SourceType):
            if known == self.source_type:
                return known  # type: ignore[no-any-return]
        return None


def read_provenance(path: Path) -> FoundProvenance:
    """Return what the metadata of an image or a video says. Raises MediaError if the file is neither."""
    packet = read_xmp(path)
    if packet is None:
        return FoundProvenance(None, None)
    uri = xmp_property(packet, SOURCE_TYPE_PROPERTY)
    content = xmp_property(packet, "vidgen:record")
    record = None
    if content is not None:
        # A record of a later version, or a damaged one.
        with suppress(ValidationError):
            record = ProvenanceRecord.model_validate_json(content)
    return FoundProvenance(record, uri.rstrip("/").rpartition("/")[2] if uri else None)


def mark_of(image: PILImage.Image) -> FileMetadata | None:
    """Return the metadata of an image that Pillow has read, if it names a digital source type, for a file with the same image.

    Pillow keeps it in `info` and does not write it again.
    """
    packet = image.info.get("xmp")
    text = packet.decode("utf-8", "replace") if isinstance(packet, bytes) else packet
    if not text or xmp_property(text, SOURCE_TYPE_PROPERTY) is None:
        return None
    comment = str(image.info.get("Comment", ""))
    return FileMetadata(comment.encode("latin-1", "replace").decode("latin-1"), text)


def provenance_of_input(path: Path) -> FoundProvenance:
    """Return what the metadata of an input says; nothing if it cannot be read."""
    try:
        return read_provenance(path)
    except MediaError:
        return FoundProvenance(None, None)
