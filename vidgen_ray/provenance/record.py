"""Provenance records: what a file says about its origin (AI-generated, tool, content key, sources), written as XMP and read
back, and the visible label.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vidgen_ray.errors import MediaError
from vidgen_ray.media import FileMetadata
from vidgen_ray.media.media_file import load_font, missing_letter, read_xmp
from vidgen_ray.stages.base import Frames
from vidgen_ray.version import __version__

MAX_LABEL_LETTERS = 60

Detail = Literal["full", "private", "off"]


class ProvenanceSettings(BaseModel):
    """Metadata, label and signature of images and clips. Every field but `c2pa_key` changes the bytes of files."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metadata: Detail = Field(
        "full",
        description="full: mark files as AI-generated, with the tool, the content key and the settings of the shot. private: "
        "without the settings of the shot and the digests of its photos. off: write nothing and do not sign.",
    )
    label: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_LABEL_LETTERS,
        description="Text that is drawn into the lower right corner of images and clips. Default: none.",
    )
    c2pa_key: Path | None = Field(
        None,
        description="File with a private key and its certificates, see `vidgen keys c2pa`, with which files are signed (C2PA). "
        "An absolute path that every machine of the run has. Default: files are not signed.",
    )

    @field_validator("label")
    @classmethod
    def _check_label(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip() or not value.isprintable()):
            raise ValueError("must be one line of printable letters")
        return value

    def for_key(self) -> dict[str, Any]:
        """Return the fields that change the bytes of files before they are signed."""
        return self.model_dump(exclude={"c2pa_key"})

    @property
    def signing_key(self) -> Path | None:
        """File with which to sign, or `None` if files are not signed."""
        return None if self.metadata == "off" else self.c2pa_key


DEFAULT = ProvenanceSettings()


NAMESPACES = {
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "vidgen": "urn:vidgen-ray:provenance:1",
}
NOT_IN_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"


def xmp_packet(properties: Mapping[str, str]) -> str:
    """Return a packet with these text properties, `prefix:Name` -> value. The same properties give the same packet."""
    lines = [f"   <{name}>{escape(_allowed_in_xml(value))}</{name}>" for name, value in properties.items()]
    prefixes = "".join(f' xmlns:{prefix}="{uri}"' for prefix, uri in NAMESPACES.items())
    return "\n".join(
        [
            '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>',
            '<x:xmpmeta xmlns:x="adobe:ns:meta/">',
            f' <rdf:RDF xmlns:rdf="{RDF}">',
            f'  <rdf:Description rdf:about=""{prefixes}>',
            *lines,
            "  </rdf:Description>",
            " </rdf:RDF>",
            "</x:xmpmeta>",
            '<?xpacket end="r"?>',
        ]
    )


def xmp_property(packet: str, name: str) -> str | None:
    """Return the text of a property, `prefix:Name`, or `None` if the packet has none or is not valid XML.

    Reads both forms of simple properties: elements and attributes.
    """
    prefix, _, local = name.partition(":")
    qualified = f"{{{NAMESPACES[prefix]}}}{local}"
    # Packets have no document type; one could define entities that expand to gigabytes.
    if "<!DOCTYPE" in packet:
        return None
    try:
        root = ElementTree.fromstring(packet.strip("\ufeff\0 \n"))
    except ElementTree.ParseError:
        return None
    for description in root.iter(f"{{{RDF}}}Description"):
        if (attribute := description.get(qualified)) is not None:
            return attribute
        if (element := description.find(qualified)) is not None:
            return element.get(f"{{{RDF}}}resource") or element.text
    return None


def _allowed_in_xml(text: str) -> str:
    """Return the text without control characters and surrogates, which XML does not allow."""
    return NOT_IN_XML.sub("", text)


TOOL = "vidgen-ray"
SOURCE_TYPE_URI = "http://cv.iptc.org/newscodes/digitalsourcetype/"

SourceType = Literal["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia", "algorithmicallyEnhanced"]
"""Terms of IPTC's digital source types: generated by a trained model; partly generated, such as an edited photo; recorded media
that an algorithm has altered without changing its content, such as a denoised or enlarged video."""
Operation = Literal["render", "film", "upscale", "stage"]
GENERATED: tuple[SourceType, ...] = ("trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class SourceFile(_Part):
    """A file that another file was made from."""

    sha256: str
    source_type: SourceType | None = None
    key: str | None = None
    """Content key of the shot, if the file is a shot's."""
    sources: tuple[SourceFile, ...] = ()
    """Files that this one was made from, as far as it says so."""


class ProvenanceRecord(_Part):
    """Provenance of one file. The same shot gives the same record: it has no dates, paths, ids or host names."""

    tool: str = TOOL
    version: str = __version__
    source_type: SourceType | None = None
    """`None` if it is not known: the pixels are those of an existing image, scaled and cropped."""
    operation: Operation = "render"
    key: str | None = None
    """Content key of the shot."""
    stages: tuple[str, ...] = ()
    """Stages behind the file, in order."""
    shot: dict[str, Any] | None = None
    """Script line of the shot with all values. Files are named by their digest, `sha256:...`."""
    sources: tuple[SourceFile, ...] = ()
    """Files that a film, an upscaled video or the result of a stage was made from."""

    @property
    def is_generated(self) -> bool:
        """Return whether a trained model has made the content, or a part of it."""
        return self.source_type in GENERATED

    @property
    def comment(self) -> str:
        """One sentence for people."""
        verb = "AI-generated" if self.is_generated else "Enhanced" if self.source_type else "Made"
        return f"{verb} with {self.tool} {self.version}"

    def metadata(self) -> FileMetadata:
        """Return the metadata that a file with this record gets."""
        prompt = self.shot.get("prompt") if self.shot else None
        properties = {
            "xmp:CreatorTool": f"{self.tool} {self.version}",
            "Iptc4xmpExt:DigitalSourceType": f"{SOURCE_TYPE_URI}{self.source_type}" if self.source_type else None,
            "Iptc4xmpExt:AISystemUsed": " ".join([self.tool, ", ".join(self.stages)]).strip() if self.source_type else None,
            "Iptc4xmpExt:AISystemVersionUsed": self.version if self.source_type else None,
            "Iptc4xmpExt:AIPromptInformation": prompt,
            "vidgen:record": json.dumps(self.model_dump(mode="json", exclude_none=True)),
        }
        return FileMetadata(self.comment, xmp_packet({name: value for name, value in properties.items() if value is not None}))


def metadata_of(record: ProvenanceRecord | None) -> FileMetadata | None:
    """Return the metadata of a file with this record, or `None` if it gets none."""
    return None if record is None else record.metadata()


def combined_source_type(types: Sequence[SourceType | None]) -> SourceType | None:
    """Return the source type of a file that shows all of these: generated only if every part is."""
    if not types or not any(types):
        return None
    if len(set(types)) == 1:
        return types[0]
    return "compositeWithTrainedAlgorithmicMedia" if set(types) & set(GENERATED) else "algorithmicallyEnhanced"


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


class InputFile(NamedTuple):
    """A file that another one is made from, and what its metadata says."""

    sha256: str
    found: FoundProvenance

    @staticmethod
    def read(path: Path, sha256: str) -> InputFile:
        return InputFile(sha256, provenance_of_input(path))

    @property
    def source(self) -> SourceFile:
        record = self.found.record
        if record is None:
            return SourceFile(sha256=self.sha256, source_type=self.found.known_type)
        return SourceFile(sha256=self.sha256, source_type=self.found.known_type, key=record.key, sources=record.sources)


def altered_record(
    source: InputFile,
    operation: Operation,
    stages: Sequence[str],
    settings: ProvenanceSettings,
    altered: SourceType = "algorithmicallyEnhanced",
) -> ProvenanceRecord | None:
    """Return the record of a file that one other file was turned into. `None` if nothing is written.

    What is AI-generated stays so, with its key and shot. Other media gets the source type `altered`.
    """
    if settings.metadata == "off":
        return None
    found, record = source.found, source.found.record
    return ProvenanceRecord(
        source_type=found.known_type if found.known_type in GENERATED else altered,
        operation=operation,
        key=record.key if record else None,
        stages=(*(record.stages if record else ()), *stages),
        shot=record.shot if record and settings.metadata == "full" else None,
        sources=(source.source,),
    )


def joined_record(sources: Sequence[InputFile], operation: Operation, settings: ProvenanceSettings) -> ProvenanceRecord | None:
    """Return the record of a file that shows several others. `None` if nothing is written."""
    if settings.metadata == "off":
        return None
    return ProvenanceRecord(
        source_type=combined_source_type([source.found.known_type for source in sources]),
        operation=operation,
        stages=tuple(dict.fromkeys(name for each in sources if each.found.record for name in each.found.record.stages)),
        sources=tuple(source.source for source in sources),
    )


LETTER_HEIGHT = 1 / 28
"""Size of the letters as a share of the shorter side."""
MIN_LETTER_PX = 8
MAX_WIDTH = 0.9
"""Widest label as a share of the image."""
INK, BOX = (255, 255, 255, 255), (0, 0, 0, 160)


def with_label(frames: Frames, settings: ProvenanceSettings) -> Frames:
    """Return frames (T, H, W, 3) with the label of the settings, or as they are if there is none. Raises MediaError."""
    return frames if settings.label is None else labelled(frames, settings.label)


def labelled(frames: Frames, text: str) -> Frames:
    """Return a copy of uint8 or uint16 frames (T, H, W, 3) with the label. Raises MediaError if they are too small for it."""
    rgba = _label(text, frames.shape[2], frames.shape[1]).astype(np.uint32)
    height, width, _ = rgba.shape
    colour, alpha = rgba[..., :3] * (np.iinfo(frames.dtype).max // 255), rgba[..., 3:]
    result = frames.copy()
    corner = result[:, -height:, -width:]
    # Rounded, in integers: the same on every machine.
    corner[...] = ((corner * (255 - alpha) + colour * alpha + 127) // 255).astype(frames.dtype)
    return result


@lru_cache(maxsize=16)
def _label(text: str, width_px: int, height_px: int) -> NDArray[np.uint8]:
    """Draw the label (H, W, 4) in the largest letters that fit, at most LETTER_HEIGHT."""
    from PIL import ImageDraw

    letter_px = max(MIN_LETTER_PX, round(min(width_px, height_px) * LETTER_HEIGHT))
    while letter_px >= MIN_LETTER_PX:
        font = load_font(None, letter_px)
        if (letter := missing_letter(text, font)) is not None:
            raise MediaError(f"label {text!r}: the font has no letter {letter!r}; use another text")
        left, top, right, bottom = (round(side) for side in font.getbbox(text))
        margin = max(2, letter_px // 3)
        width, height = right - left + 2 * margin, bottom - top + 2 * margin
        if width <= width_px * MAX_WIDTH and height <= height_px:
            image = PILImage.new("RGBA", (width, height), BOX)
            ImageDraw.Draw(image).text((margin - left, margin - top), text, INK, font)
            return np.asarray(image)
        letter_px -= 1
    raise MediaError(f"label {text!r}: too long for {width_px}×{height_px} pixels; shorten it or render a larger size")
