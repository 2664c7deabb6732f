"""Records of files that are made from other files: films, upscaled videos, and results of a single stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from vidgen_ray.provenance.reading import FoundProvenance, provenance_of_input
from vidgen_ray.provenance.record import (
    GENERATED,
    Operation,
    ProvenanceRecord,
    SourceFile,
    SourceType,
    combined_source_type,
)
from vidgen_ray.provenance.settings import ProvenanceSettings


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


def altered_type(*, is_interpolated: bool) -> SourceType:
    """Return the source type of recorded video after upscaling: partly generated if a network has drawn frames of it."""
    return "compositeWithTrainedAlgorithmicMedia" if is_interpolated else "algorithmicallyEnhanced"


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
