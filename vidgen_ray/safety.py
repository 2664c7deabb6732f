"""Safety of a profile: consent to the use of a person's face, and a checker of prompts and images that refuses what the
profile does not allow.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, JsonValue, field_validator, model_validator
from pydantic.config import JsonDict

from vidgen_ray.errors import SetupError, StageError, StrictModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


Basis = Literal["self", "written", "contract", "public-domain", "synthetic", "demo"]
DECLARED_BASES = ("self", "written", "contract", "public-domain", "synthetic")
"""Bases for photos of your own. `demo` is that of the photos that come with vidgen."""
EXAMPLE = '{"subject": "NAME", "basis": "written", "reference": "FILE OR URL"}'
TEXT_EXAMPLE = "subject=NAME,basis=written,reference=FILE"
"""The same as text, for the command line, tables and forms."""


PRINTABLE: JsonDict = {"pattern": r"^[^\x00-\x1f\x7f-\x9f]*[^\s\x00-\x1f\x7f-\x9f][^\x00-\x1f\x7f-\x9f]*$"}


class Consent(StrictModel):
    """Why a person's face may be used. May also be written as text: `subject=NAME,basis=written,reference=FILE`."""

    subject: str = Field(
        min_length=1, max_length=200, description="Name of the person in the photos.", json_schema_extra=PRINTABLE
    )
    basis: Basis = Field(
        description="self: my own face. written: written consent of the person, or of a guardian. contract: a contract or "
        "licence covers this use. public-domain: a portrait that anyone may use this way. synthetic: nobody, the face is drawn "
        "or generated. demo: a photo that comes with vidgen, set automatically."
    )
    reference: str | None = Field(
        default=None,
        min_length=1,
        max_length=1000,
        description="Where it is documented, such as a file name or a URL.",
        json_schema_extra=PRINTABLE,
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


CHECKED_FRAMES = 4
"""Frames of a clip that are checked, spread evenly, with the last one among them."""

log = logging.getLogger("vidgen_ray")


class SafetyChecker(Protocol):
    """Checks prompts and images. Created once per process; several threads may call it."""

    version: str
    """Recorded with each shot, such as `words 1`. Change it with the rules."""

    def check_prompt(self, text: str) -> str | None:
        """Return why the text is refused, as the end of a sentence, or `None`."""

    def check_images(self, images: NDArray[np.uint8]) -> str | None:
        """Return why one of the images, RGB (N, H, W, 3), is refused, as the end of a sentence, or `None`."""


class UnsafeContent(StageError):
    """The safety checker refuses a prompt or an image, or it failed."""


class SafetySettings(StrictModel):
    """Safety checker of a profile."""

    checker: str = Field(
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="`module:function`, importable in every process. The function returns the checker.",
    )
    options: dict[str, JsonValue] = Field(default_factory=dict, description="Arguments of the function.")
    on_error: Literal["refuse", "allow"] = Field(
        default="refuse",
        description="refuse: nothing passes while the checker fails. allow: it passes, with a warning in the log.",
    )


class ContentPolicy(StrictModel):
    """Rules of a profile for the content of lines and results."""

    require_consent: bool = True
    safety: SafetySettings | None = None


DEFAULT_POLICY = ContentPolicy()
NO_POLICY = ContentPolicy(require_consent=False)
"""For lines that are not rendered."""


class Safety:
    """Safety checker of this process, with the rule for errors of the checker itself."""

    def __init__(self, settings: SafetySettings) -> None:
        self._settings = settings

    @cached_property
    def checker(self) -> SafetyChecker:
        """Load the checker. Raises SetupError."""
        module, _, function = self._settings.checker.partition(":")
        try:
            checker: SafetyChecker = getattr(importlib.import_module(module), function)(**self._settings.options)
            if not isinstance(checker.version, str):
                raise TypeError("its version must be text")
        # The function is not part of this package.
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise SetupError(f"safety checker {self._settings.checker}: cannot be loaded ({reason})") from error
        return checker

    def load(self) -> None:
        """Load the checker. Raises SetupError if that is impossible and errors are not allowed."""
        _ = self.version

    @property
    def version(self) -> str | None:
        """Checker and its version, for records. `None` if it cannot be loaded and errors are allowed."""
        try:
            return f"{self._settings.checker} {self.checker.version}"
        except SetupError:
            if self._settings.on_error == "refuse":
                raise
            return None

    def check_prompt(self, text: str) -> None:
        """Raises UnsafeContent if the text is refused."""
        self._check(lambda checker: checker.check_prompt(text))

    def check_image(self, image: NDArray[np.uint8]) -> None:
        """Raises UnsafeContent if the image, RGB (H, W, 3), is refused."""
        self._check(lambda checker: checker.check_images(image[None]))

    def check_clip(self, frames: NDArray[np.uint8]) -> None:
        """Raises UnsafeContent if one of some frames of a clip, RGB (T, H, W, 3), is refused. See `CHECKED_FRAMES`."""
        last = len(frames) - 1
        some = sorted({round(last * number / (CHECKED_FRAMES - 1)) for number in range(CHECKED_FRAMES)})
        self._check(lambda checker: checker.check_images(frames[some]))

    def _check(self, check: Any) -> None:
        try:
            reason = check(self.checker)
            if reason is not None and not isinstance(reason, str):
                raise TypeError(f"the checker returned {type(reason).__name__}, must be text or None")
        except Exception as error:
            message = str(error) if isinstance(error, SetupError) else f"{type(error).__name__}: {error}"
            if self._settings.on_error == "allow":
                log.warning("the safety checker failed, its content passes: %s", message)
                return
            raise UnsafeContent(f"not checked, since the safety checker failed: {message}") from error
        if reason is not None:
            raise UnsafeContent(f"refused by the safety checker: {reason}")


@lru_cache(8)
def _safety_of(settings: str) -> Safety:
    return Safety(SafetySettings.model_validate_json(settings))


def safety_of(settings: SafetySettings) -> Safety:
    """Return the safety checker of these settings, the same object for the same settings."""
    return _safety_of(json.dumps(settings.model_dump(), sort_keys=True))


class WordList:
    """Checker that refuses prompts with one of some words. It does not look at images."""

    def __init__(self, words: Sequence[str], version: str = "1") -> None:
        """`words`: words or phrases, without regard to case. `*` at the end of one stands for any ending.

        Raises ValueError for an empty list, which would allow everything.
        """
        if not words or not all(isinstance(word, str) and word.strip("* ") for word in words):
            raise ValueError("words: must be a list of at least one word")
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(_pattern, words))})(?!\w)", re.IGNORECASE)
        self.version = version

    def check_prompt(self, text: str) -> str | None:
        found = self._pattern.search(text)
        return None if found is None else f"the text has {found[0]!r}"

    def check_images(self, images: NDArray[np.uint8]) -> str | None:
        return None


def _pattern(words: str) -> str:
    phrase = r"\s+".join(map(re.escape, words.removesuffix("*").split()))
    return rf"{phrase}\w*" if words.endswith("*") else phrase
