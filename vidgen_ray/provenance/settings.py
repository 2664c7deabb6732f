"""Settings of the provenance of written files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

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
