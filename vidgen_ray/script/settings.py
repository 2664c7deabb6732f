"""Settings for reading a script."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vidgen_ray.safety import DEFAULT_POLICY, ContentPolicy


@dataclass(frozen=True)
class ScriptSettings:
    """Settings for reading a script.

    Missing fields of a line come from the header, then from `defaults`, then from `profile_defaults`.
    """

    path: Path
    run_seed: int = 0
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults from the command line."""
    profile_defaults: Mapping[str, Any] = field(default_factory=dict)
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields that are set on every shot after its checks."""
    characters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Characters that are not from the script itself. See `named_fields.read_characters`."""
    policy: ContentPolicy = DEFAULT_POLICY
    """Rules for the content of lines."""

    @property
    def folder(self) -> Path:
        """Folder to which paths of the script are relative."""
        return self.path if self.path.is_dir() else self.path.parent
