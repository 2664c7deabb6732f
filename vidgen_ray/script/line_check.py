"""Check one line of a script: fill in defaults and characters, validate the fields and look for its files."""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

from pydantic import JsonValue, TypeAdapter, ValidationError

from vidgen_ray.errors import FieldError, SetupError
from vidgen_ray.invalid_fields import explain, shortened
from vidgen_ray.script.checked_lines import RejectedLine, ValidLine
from vidgen_ray.script.lines import Header, Line, UnreadableLine
from vidgen_ray.script.settings import ScriptSettings
from vidgen_ray.shot import ID_PATTERN, NESTED_FIELDS, LoraRef, Shot, derive_id, nest_flat_settings
from vidgen_ray.stages.identity import identities
from vidgen_ray.weights import resolve

FAILURE_FIELD = "failure"
"""Field that `failures.jsonl` adds to a line. Not a field of the shot."""
PATH_CACHE_SIZE = 4096
OUTER_LEVELS = 4
"""Nesting levels that a plan adds around a shot's metadata. JSON parsers limit the total depth."""
METADATA = TypeAdapter(JsonValue)


class LineChecker:
    """Checks the lines of one script. Can be pickled, so that lines can be checked by several processes."""

    def __init__(
        self,
        source: str,
        folder: Path,
        fallback: Mapping[str, Any],
        characters: Mapping[str, Mapping[str, Any]],
        run_seed: int,
        changes: Mapping[str, Any],
    ) -> None:
        self.source = source
        self.folder = folder
        self.fallback = fallback
        self.characters = characters
        self.run_seed = run_seed
        self.changes = changes

    @staticmethod
    def of(settings: ScriptSettings, header: Header) -> "LineChecker":
        fallback = merged(settings.profile_defaults, settings.defaults, header.defaults)
        path = settings.path
        return LineChecker(path.name, path.parent, fallback, header.characters, settings.run_seed, settings.changes)

    @staticmethod
    def for_rows(
        name: str, folder: Path, defaults: Mapping[str, Any], profile_defaults: Mapping[str, Any], run_seed: int
    ) -> "LineChecker":
        """Return the checker for rows that are not from a file. Relative paths are relative to `folder`."""
        return LineChecker(name, folder, merged(profile_defaults, defaults), {}, run_seed, {})

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "locate"}

    @cached_property
    def locate(self) -> Callable[[str], tuple[str, bool]]:
        """Path in a line -> absolute path, and true if the file exists."""
        return lru_cache(PATH_CACHE_SIZE)(partial(_locate, self.folder))

    def check(self, number: int, parsed: Line | UnreadableLine) -> ValidLine | RejectedLine:
        """Check one line. A rejected line has no id yet unless it brings a valid one."""
        if isinstance(parsed, UnreadableLine):
            fields = {"unreadable": parsed.text} if parsed.text else {}
            return RejectedLine("", self.source, number, self.source, fields, (parsed.error,))
        line = LineCheck(parsed, self)
        rejected = line.rejected()
        if line.errors:
            return rejected
        shots = tuple(shot.model_copy(update=self.changes) if self.changes else shot for shot in line.shots.values())
        return ValidLine(shots, rejected, line.failed_as)


def _locate(folder: Path, path: str) -> tuple[str, bool]:
    # os.path, unlike pathlib, accepts unknown users in `~user` and paths that are too long.
    absolute = os.path.abspath(os.path.join(folder, os.path.expanduser(path)))
    return absolute, os.path.isfile(absolute)


class LineCheck:
    """Validates a line and fills in its defaults. The result is either shots or errors."""

    def __init__(self, line: Line, context: LineChecker) -> None:
        self.errors: list[FieldError] = []
        self.shots: dict[str, Shot] = {}
        """Id -> shot. Empty if there are errors."""
        self._line = line
        self._context = context
        own = dict(line.fields)
        failure = own.pop(FAILURE_FIELD, None)
        self._failure = failure if isinstance(failure, dict) else {}
        self._fields = merged(context.fallback, own)
        if own.get("id") is None:
            # Derived from the line's own fields only: changed defaults must not change its id and seed.
            self._fields["id"] = derive_id(own)
        self._apply_character(own)
        shot = None if self.errors else self._validate()
        if shot is not None:
            shot = self._with_absolute_paths(shot)
        if shot is not None and not self.errors:
            self.shots = dict(_seeded_variants(shot, context.run_seed))

    def reject(self, field: str | None, got: str, allowed: str) -> None:
        """Add an error and drop the shots."""
        self.errors.append(FieldError(self._context.source, self._line.number, field, got, allowed))
        self.shots = {}

    @property
    def number(self) -> int:
        """Line number, from 1. 0 for a shot that is not from a file."""
        return self._line.number or 0

    @property
    def failed_as(self) -> str | None:
        """Id under which a line of failures.jsonl failed."""
        failed_id = self._failure.get("id")
        return failed_id if isinstance(failed_id, str) and ID_PATTERN.fullmatch(failed_id) else None

    def rejected(self) -> RejectedLine:
        """Return the line as a rejected line."""
        line_id = self._fields.get("id")
        own_id = line_id if isinstance(line_id, str) and ID_PATTERN.fullmatch(line_id) else ""
        script = self._failure.get("script")
        fields = {name: self._absolute_paths(name, value) for name, value in self._fields.items()}
        return RejectedLine(
            self.failed_as or own_id,
            script if isinstance(script, str) else self._context.source,
            self.number,
            self._context.source,
            fields,
            tuple(self.errors),
        )

    def _apply_character(self, own: Mapping[str, Any]) -> None:
        """Merge the fields of the line's character. They override the defaults, not the line's own fields."""
        name = self._fields.get("character")
        if name is None:
            return
        characters = self._context.characters
        if not isinstance(name, str) or name not in characters:
            names = ", ".join(characters) or "none; define characters in the header of a .yaml script"
            self.reject("character", shortened(name), f"must be one of the script's characters: {names}")
            return
        inherited = {field: value for field, value in characters[name].items() if field not in own and field != "trigger"}
        # The name is dropped: characters exist only in this script, but the line may move to failures.jsonl.
        self._fields = {**{field: value for field, value in self._fields.items() if field != "character"}, **inherited}
        trigger, prompt = characters[name].get("trigger"), self._fields.get("prompt")
        if trigger and isinstance(prompt, str) and prompt.strip():
            self._fields["prompt"] = f"{trigger}, {prompt}"

    def _validate(self) -> Shot | None:
        try:
            shot = Shot.model_validate(self._fields, strict=self._line.strict)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                self.reject(*explain(detail, Shot.model_fields))
            return None
        except (ValueError, RecursionError) as error:
            self.reject(None, "invalid values", f"must be plain JSON, not nested deeply ({error})")
            return None
        if shot.identity not in identities():
            self.reject("identity", shortened(shot.identity), f"must be one of {', '.join(identities())}")
        # Shots are sent between machines as JSON. `metadata` is the only field that may not survive it unchanged.
        if shot.metadata and not _is_plain_json(shot.metadata):
            allowed = "must be plain JSON, not nested deeply, without NaN, Infinity or invalid Unicode"
            self.reject("metadata", shortened(shot.metadata), allowed)
        return shot

    def _with_absolute_paths(self, shot: Shot) -> Shot:
        """Return the shot with absolute paths. Files that do not exist are errors of the line."""
        paths: dict[str, Any] = {}
        if shot.image is not None:
            paths["image"] = self._existing_file("image", shot.image)
        if shot.face_image:
            paths["face_image"] = tuple(self._existing_file("face_image", photo) for photo in shot.face_image)
        if shot.lora:
            paths["lora"] = tuple(map(self._existing_lora, shot.lora))
        return shot.model_copy(update=paths) if paths else shot

    def _existing_file(self, field: str, path: str) -> str:
        absolute, exists = self._context.locate(path)
        if not exists:
            self.reject(field, shortened(path), f"must be an existing file (looked for {absolute})")
        return absolute

    def _existing_lora(self, lora: LoraRef) -> LoraRef:
        is_weights = lora.path.endswith(".safetensors")
        # A built-in name is not resolved to a path, because each machine builds its own copy.
        if lora.path.startswith("builtin:") and is_weights:
            try:
                resolve(lora.path)
            except SetupError as error:
                self.reject("lora", shortened(lora.path), str(error))
            return lora
        absolute, exists = self._context.locate(lora.path)
        if not exists or not is_weights:
            self.reject("lora", shortened(lora.path), f"must be an existing .safetensors file (looked for {absolute})")
        return lora.model_copy(update={"path": absolute})

    def _absolute_paths(self, field: str, value: Any) -> Any:
        """Return a field's unvalidated value with absolute paths. Other fields are unchanged."""
        if field not in ("image", "face_image", "lora") or value is None:
            return value
        if isinstance(value, str):
            return value if value.startswith("builtin:") else self._context.locate(value)[0]
        if isinstance(value, list | tuple):
            return [item if isinstance(item, list | tuple) else self._absolute_paths(field, item) for item in value]
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            return {**value, "path": self._absolute_paths(field, value["path"])}
        return value


def _is_plain_json(metadata: JsonValue) -> bool:
    """Return true if the metadata can be sent as JSON inside a plan."""
    for _ in range(OUTER_LEVELS):
        metadata = [metadata]
    try:
        return METADATA.validate_json(METADATA.dump_json(metadata)) == metadata
    except (ValueError, RecursionError):
        return False


def _seeded_variants(shot: Shot, run_seed: int) -> Iterator[tuple[str, Shot]]:
    """Yield the id and the shot of each variant."""
    assert shot.id is not None
    if shot.variants == 1:
        yield shot.id, shot.with_seed(run_seed)
        return
    for number in range(shot.variants):
        # Variants use consecutive seeds from the line's seed. Without one, each seed is derived from the variant's id.
        seed = None if shot.seed is None else (shot.seed + number) % 2**32
        shot_id = f"{shot.id}-v{number}"
        yield shot_id, shot.model_copy(update={"id": shot_id, "variants": 1, "seed": seed}).with_seed(run_seed)


def merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Merge fields. Later layers win. `steps` and `guidance` are merged per stage."""
    out: dict[str, Any] = {}
    for layer in layers:
        fields = nest_flat_settings(dict(layer))
        previous = {name: out[name] for name in NESTED_FIELDS if name in out and name in fields}
        out.update(fields)
        for name, settings in previous.items():
            if isinstance(settings, dict) and isinstance(fields[name], dict):
                out[name] = {**settings, **fields[name]}
    return out
