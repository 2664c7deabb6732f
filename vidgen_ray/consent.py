"""Consent to the use of a person's face: who is shown, on what basis, and where that is documented."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Basis = Literal["self", "written", "contract", "public-domain", "synthetic", "demo"]
DECLARED_BASES = ("self", "written", "contract", "public-domain", "synthetic")
"""Bases for photos of your own. `demo` is that of the photos that come with vidgen."""
EXAMPLE = '{"subject": "NAME", "basis": "written", "reference": "FILE OR URL"}'
TEXT_EXAMPLE = "subject=NAME,basis=written,reference=FILE"
"""The same as text, for the command line, tables and forms."""


class Consent(BaseModel):
    """Why a person's face may be used. May also be written as text: `subject=NAME,basis=written,reference=FILE`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    subject: str = Field(min_length=1, max_length=200, description="Name of the person in the photos.")
    basis: Basis = Field(
        description="self: my own face. written: written consent of the person, or of a guardian. contract: a contract or "
        "licence covers this use. public-domain: a portrait that anyone may use this way. synthetic: nobody, the face is drawn "
        "or generated. demo: a photo that comes with vidgen, set automatically."
    )
    reference: str | None = Field(
        None, min_length=1, max_length=1000, description="Where it is documented, such as a file name or a URL."
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return parse_consent(value) if isinstance(value, str) else value

    @field_validator("subject", "reference")
    @classmethod
    def _check_text(cls, value: str | None) -> str | None:
        if value is not None and (not value.strip() or not value.isprintable()):
            raise ValueError("must be printable and not blank")
        return value


def parse_consent(text: str) -> dict[str, str]:
    """Return the fields of `subject=NAME,basis=written,reference=FILE`. A comma that no field name follows is part of a value.

    Raises ValueError.
    """
    fields: dict[str, str] = {}
    name = None
    for part in text.split(","):
        head, equals, value = part.partition("=")
        if equals and head.strip() in Consent.model_fields:
            name = head.strip()
            if name in fields:
                raise ValueError(f"must have {name} only once")
            fields[name] = value
        elif name is None:
            raise ValueError(f"must be written as {TEXT_EXAMPLE}")
        else:
            fields[name] += f",{part}"
    return {name: value.strip() for name, value in fields.items()}
