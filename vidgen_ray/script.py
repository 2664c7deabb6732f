"""Scripts become checked shots: defaults and characters filled in, files found. All lines are checked before any is used."""

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vidgen_ray.errors import FieldError, ScriptError, SetupError
from vidgen_ray.script_files import Line, Unreadable, open_script, shortened
from vidgen_ray.shot import ID_PATTERN, LoraRef, Shot, derive_id, nest_flat_settings
from vidgen_ray.weights import resolve

FAILURE_FIELD = "failure"
"""What `failures.jsonl` adds to a line; ignored when that file is rendered again."""


@dataclass(frozen=True, slots=True)
class RejectedLine:
    """A line that cannot be rendered, with everything that is wrong with it."""

    id: str
    script: str
    """Where the line first stood: for a line of failures.jsonl, the script that it came from."""
    line: int
    fields: dict[str, Any]
    """With defaults filled in and paths made absolute, so that the line can stand in another script."""
    errors: tuple[FieldError, ...]


@dataclass(frozen=True, slots=True)
class Script:
    """The shots of a script, variants written out, seeds and files filled in; and the lines that were refused."""

    source: str
    shots: tuple[Shot, ...]
    lines: Mapping[str, int]
    """Shot id -> the line it came from, counted from 1."""
    rejected: tuple[RejectedLine, ...]
    replaces: Mapping[str, str]
    """Shot id -> the id under which its line failed before, where that was another one."""

    @property
    def errors(self) -> list[FieldError]:
        return [error for line in self.rejected for error in line.errors]


def read_script(
    path: Path,
    *,
    run_seed: int = 0,
    defaults: Mapping[str, Any] | None = None,
    profile_defaults: Mapping[str, Any] | None = None,
) -> Script:
    """Read and check a whole script.

    A field that a line leaves out comes from the script's header, then from `defaults` (the command line), then from
    `profile_defaults`. Raises ScriptError where the file cannot be read or holds no lines at all.
    """
    header, lines = open_script(path)
    fallback = _merged(profile_defaults or {}, defaults or {}, header.defaults)
    shots: list[Shot] = []
    rejected: list[RejectedLine] = []
    where: dict[str, int] = {}
    replaces: dict[str, str] = {}
    for number, parsed in lines:
        if isinstance(parsed, Unreadable):
            fields = {"unreadable": parsed.text} if parsed.text else {}
            rejected.append(RejectedLine("", path.name, number, fields, (parsed.error,)))
            continue
        line = _Checked(path.name, path.parent, parsed, fallback, header.characters)
        for shot in _variants(line.shot) if line.shot else ():
            assert shot.id is not None
            if shot.id in where:
                line.refuse("id", repr(shot.id), f"line {where[shot.id]} has it already; give each its own, or use variants")
                break
            where[shot.id] = number
            shots.append(shot.with_seed(run_seed))
            if line.failed_as and line.failed_as != shot.id:
                replaces[shot.id] = line.failed_as
        if line.shot is None:
            rejected.append(line.rejected())
    if not shots and not rejected:
        raise ScriptError([FieldError(path.name, None, None, "no lines", "give at least one shot")])
    return Script(path.name, tuple(shots), where, _with_ids_of_their_own(rejected, where), replaces)


def _with_ids_of_their_own(rejected: list[RejectedLine], taken: Collection[str]) -> tuple[RejectedLine, ...]:
    """Each refused line under an id that no shot and no other refused line has, so that each has a row of its own."""
    used = set(taken)
    out = []
    for line in rejected:
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(line.script).stem)[:60] or "script"
        candidates = chain([line.id], _numbered(f"{stem}-line-{line.line}"))
        line_id = next(c for c in candidates if c and c not in used)
        used.add(line_id)
        # An id that another line has would, once rendered, replace that line's clip.
        fields = {**line.fields, "id": line_id} if _is_in(line.fields.get("id"), taken) else line.fields
        out.append(replace(line, id=line_id, fields=fields))
    return tuple(out)


def _is_in(value: object, ids: Collection[str]) -> bool:
    return isinstance(value, str) and value in ids


def _numbered(name: str) -> Iterator[str]:
    yield name
    for number in count(2):
        yield f"{name}-{number}"


def check_shot(fields: Mapping[str, Any], source: str, profile_defaults: Mapping[str, Any], run_seed: int = 0) -> Shot:
    """One shot that does not come from a file. Raises ScriptError naming each wrong field."""
    line = _Checked(source, Path.cwd(), Line(None, dict(fields), strict=False), profile_defaults, {})
    if line.shot is not None and line.shot.variants > 1:
        line.refuse("variants", str(line.shot.variants), "this is one shot; variants are for scripts")
    if line.shot is None:
        raise ScriptError(line.errors)
    return line.shot.with_seed(run_seed)


class _Checked:
    """A line with its defaults: either a shot, or what is wrong with it."""

    def __init__(
        self,
        source: str,
        folder: Path,
        line: Line,
        fallback: Mapping[str, Any],
        characters: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.errors: list[FieldError] = []
        self._source = source
        self._folder = folder
        self._line = line
        failure = line.fields.get(FAILURE_FIELD)
        self._failure = failure if isinstance(failure, dict) else {}
        own = {name: value for name, value in line.fields.items() if name != FAILURE_FIELD}
        self._fields = _merged(fallback, own)
        if own.get("id") is None:
            # Of the line's own words alone: defaults that change must not change its id, and with it its seed.
            self._fields["id"] = derive_id(own)
        self._take_character(characters)
        shot = None if self.errors else self._validated()
        found = None if shot is None else self._with_files(shot)
        self.shot = None if self.errors else found

    def refuse(self, field: str | None, got: str, allowed: str) -> None:
        self.errors.append(FieldError(self._source, self._line.number, field, got, allowed))
        self.shot = None

    @property
    def failed_as(self) -> str | None:
        """The id under which this line of failures.jsonl failed."""
        known = self._failure.get("id")
        return known if isinstance(known, str) and ID_PATTERN.fullmatch(known) else None

    def rejected(self) -> RejectedLine:
        given = self._fields.get("id")
        own_id = given if isinstance(given, str) and ID_PATTERN.fullmatch(given) else ""
        script = self._failure.get("script")
        fields = {name: self._absolute(name, value) for name, value in self._fields.items()}
        return RejectedLine(
            self.failed_as or own_id,
            script if isinstance(script, str) else self._source,
            self._line.number or 0,
            fields,
            tuple(self.errors),
        )

    def _take_character(self, characters: Mapping[str, Mapping[str, Any]]) -> None:
        name = self._fields.get("character")
        if name is None:
            return
        if not isinstance(name, str) or name not in characters:
            known = ", ".join(characters) or "none; characters stand in the header of a .yaml script"
            self.refuse("character", shortened(name), f"the script's characters are: {known}")
            return
        brought = {field: value for field, value in characters[name].items() if field != "trigger"}
        # What a character brings stays with the line; its name is known in this script only.
        self._fields = {**brought, **{field: value for field, value in self._fields.items() if field != "character"}}
        trigger, prompt = characters[name].get("trigger"), self._fields.get("prompt")
        if trigger and isinstance(prompt, str) and prompt.strip():
            self._fields["prompt"] = f"{trigger}, {prompt}"

    def _validated(self) -> Shot | None:
        try:
            shot = Shot.model_validate(self._fields, strict=self._line.strict)
            # A shot travels between machines as JSON; what does not survive that is refused here.
            if Shot.model_validate_json(shot.model_dump_json()) == shot:
                return shot
            self.refuse("metadata", shortened(shot.metadata), "must be plain JSON, without NaN, Infinity or broken text")
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                self.refuse(*_explained(detail))
        except (ValueError, RecursionError) as error:
            self.refuse("metadata", "what cannot be written as JSON", f"must be plain JSON, not nested deeply ({error})")
        return None

    def _with_files(self, shot: Shot) -> Shot:
        for field in ("image", "face_image"):
            value = getattr(shot, field)
            if value is not None and not self._is_file(value):
                self.refuse(field, shortened(value), f"must be an existing file (looked for {self._path(value)})")
        for lora in shot.lora:
            # A built-in name stays a name: each machine builds its own copy.
            if lora.path.startswith("builtin:") and lora.path.endswith(".safetensors"):
                self._check_builtin(lora.path)
            elif not self._is_file(lora.path) or not lora.path.endswith(".safetensors"):
                allowed = f"must be an existing .safetensors file (looked for {self._path(lora.path)})"
                self.refuse("lora", shortened(lora.path), allowed)
        files = {field: self._absolute(field, getattr(shot, field)) for field in ("image", "face_image")}
        loras = tuple(LoraRef(path=self._absolute("lora", lora.path), weight=lora.weight) for lora in shot.lora)
        return shot.model_copy(update={**files, "lora": loras})

    def _check_builtin(self, name: str) -> None:
        try:
            resolve(name)
        except SetupError as error:
            self.refuse("lora", shortened(name), str(error))

    def _is_file(self, value: str) -> bool:
        try:
            return Path(self._path(value)).is_file()
        except OSError:
            return False

    def _path(self, value: str) -> str:
        # os.path, for it leaves the home of an unknown user as it is.
        return os.path.abspath(self._folder / os.path.expanduser(value))

    def _absolute(self, field: str, value: Any) -> Any:
        """Paths of a field as absolute ones, whatever its shape; everything else as it is."""
        if field not in ("image", "face_image", "lora") or value is None:
            return value
        if isinstance(value, str):
            return value if value.startswith("builtin:") else self._path(value)
        if isinstance(value, list | tuple):
            return [one if isinstance(one, list | tuple) else self._absolute(field, one) for one in value]
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            return {**value, "path": self._absolute(field, value["path"])}
        return value


def _variants(shot: Shot) -> Iterator[Shot]:
    if shot.variants == 1:
        yield shot
        return
    for number in range(shot.variants):
        # Variants of a line with a seed of its own take the seeds after it; without one, each is seeded by its id.
        seed = None if shot.seed is None else (shot.seed + number) % 2**32
        yield shot.model_copy(update={"id": f"{shot.id}-v{number}", "variants": 1, "seed": seed})


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers win; `steps` and `guidance` are merged stage by stage."""
    out: dict[str, Any] = {}
    for layer in layers:
        for key, value in nest_flat_settings(dict(layer)).items():
            both = key in ("steps", "guidance") and isinstance(value, dict) and isinstance(out.get(key), dict)
            out[key] = {**out[key], **value} if both else value
    return out


def _explained(detail: Any) -> tuple[str | None, str, str]:
    """Field, what was got and what is allowed, out of one of pydantic's errors."""
    # `lora.weight` and `steps.flux`; deeper only metadata goes, to any depth.
    field = ".".join([part for part in detail["loc"] if isinstance(part, str)][:2]) or None
    if detail["type"] == "extra_forbidden" and field and "." in field:
        return field, "an unknown field", f"{field.split('.')[0]} has none of that name"
    if detail["type"] == "extra_forbidden":
        return field, "an unknown field", f"the fields are {', '.join(Shot.model_fields)}"
    if detail["type"] == "missing":
        return field, "nothing", "this field is required"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should", "must").replace("String should", "must")
    got = "the line" if field is None else shortened(detail["input"])
    return field, got, message[:1].lower() + message[1:]
