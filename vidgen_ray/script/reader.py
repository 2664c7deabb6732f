"""Scripts become checked shots: defaults and characters filled in, files found. Memory does not grow with the script."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, count, groupby
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import JsonValue, TypeAdapter, ValidationError

from vidgen_ray.errors import FieldError, ScriptError, SetupError
from vidgen_ray.script.formats import Line, Unreadable, open_script, shortened
from vidgen_ray.script.spill_index import ScriptIndex
from vidgen_ray.shot import ID_PATTERN, NESTED_FIELDS, LoraRef, Shot, derive_id, nest_flat_settings
from vidgen_ray.stages.identity import identities
from vidgen_ray.weights import resolve

FAILURE_FIELD = "failure"
"""What `failures.jsonl` adds to a line; ignored when that file is rendered again."""
IDS_AT_ONCE = 512
"""Shots whose ids are looked up together."""
PATHS_REMEMBERED = 4096
LEVELS_AROUND = 4
"""What a shot is wrapped in on its way: metadata that fits a shot by itself may be too deep inside of a plan."""
METADATA = TypeAdapter(JsonValue)


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


class CheckedLine(NamedTuple):
    """A shot that can be rendered, its seed and files filled in. A line with variants is several of these."""

    shot: Shot
    line: int
    """The line it came from, counted from 1."""
    replaces: str | None
    """The id under which the line failed before, where that was another one."""


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


def iter_script(
    path: Path,
    *,
    run_seed: int = 0,
    defaults: Mapping[str, Any] | None = None,
    profile_defaults: Mapping[str, Any] | None = None,
) -> Iterator[CheckedLine | RejectedLine]:
    """Read and check a script of any length: first its shots, in order, then the lines that were refused, in order.

    A refused line has an id that no shot and no other refused line has, which is not known before the last shot is. Nothing
    of the script stays in memory; its ids and refused lines are in TMPDIR meanwhile. A .yaml script alone is read whole.

    A field that a line leaves out comes from the script's header, then from `defaults` (the command line), then from
    `profile_defaults`. Raises ScriptError, on the way, where the file cannot be read, and at the end where it has no lines
    at all.
    """
    header, lines = open_script(path)
    fallback = _merged(profile_defaults or {}, defaults or {}, header.defaults)
    setting = _Setting(path.name, path.parent, fallback, header.characters, run_seed)
    empty = True
    with ScriptIndex() as index:
        for window in _windows(_checked(number, parsed, setting) for number, parsed in lines):
            empty = False
            yield from _without_doubles(window, index)
        for name, refused in groupby(index.all_set_aside(), _name_of):
            names = _numbered(name)
            for line in refused:
                yield _with_an_id_of_its_own(line, names, index)
    if empty:
        raise ScriptError([FieldError(path.name, None, None, "no lines", "give at least one shot")])


def read_script(
    path: Path,
    *,
    run_seed: int = 0,
    defaults: Mapping[str, Any] | None = None,
    profile_defaults: Mapping[str, Any] | None = None,
) -> Script:
    """`iter_script` all at once, for a script that fits into memory."""
    checked = list(iter_script(path, run_seed=run_seed, defaults=defaults, profile_defaults=profile_defaults))
    good = [line for line in checked if isinstance(line, CheckedLine)]
    return Script(
        path.name,
        tuple(line.shot for line in good),
        {line.shot.id: line.line for line in good if line.shot.id},
        tuple(line for line in checked if isinstance(line, RejectedLine)),
        {line.shot.id: line.replaces for line in good if line.shot.id and line.replaces},
    )


def _checked(number: int, parsed: Line | Unreadable, setting: "_Setting") -> "_Checked | RejectedLine":
    if isinstance(parsed, Line):
        return _Checked(parsed, setting)
    fields = {"unreadable": parsed.text} if parsed.text else {}
    return RejectedLine("", setting.source, number, fields, (parsed.error,))


def _windows(lines: Iterable["_Checked | RejectedLine"]) -> Iterator[list["_Checked | RejectedLine"]]:
    """Lines in groups of about IDS_AT_ONCE shots."""
    window: list[_Checked | RejectedLine] = []
    ids = 0
    for line in lines:
        window.append(line)
        ids += len(line.shots) if isinstance(line, _Checked) else 1
        if ids >= IDS_AT_ONCE or len(window) >= IDS_AT_ONCE:
            yield window
            window, ids = [], 0
    if window:
        yield window


def _without_doubles(window: Iterable["_Checked | RejectedLine"], index: ScriptIndex) -> Iterator[CheckedLine]:
    """The shots of these lines; lines that are refused, for an id that stands before them too, are set aside."""
    taken = index.lines_of([shot_id for line in window if isinstance(line, _Checked) for shot_id in line.shots])
    fresh: dict[str, int] = {}
    for line in window:
        if isinstance(line, RejectedLine):
            _set_aside(line, index)
            continue
        if twice := next((shot_id for shot_id in line.shots if shot_id in taken), None):
            line.refuse("id", repr(twice), f"line {taken[twice]} has it already; give each its own, or use variants")
        if not line.shots:
            _set_aside(line.rejected(), index)
        for shot_id, shot in line.shots.items():
            fresh[shot_id] = taken[shot_id] = line.number
            yield CheckedLine(shot, line.number, line.failed_as if line.failed_as != shot_id else None)
    index.add(fresh)


def _set_aside(line: RejectedLine, index: ScriptIndex) -> None:
    try:
        index.set_aside(line)
    except RecursionError:
        shallow = {name: value for name, value in line.fields.items() if not isinstance(value, dict | list)}
        index.set_aside(replace(line, fields=shallow))


def _name_of(line: RejectedLine) -> str:
    """What a line without an id is called, after the place where it first stood."""
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(line.script).stem)[:60] or "script"
    return f"{stem}-line-{line.line}"


def _with_an_id_of_its_own(line: RejectedLine, names: Iterator[str], index: ScriptIndex) -> RejectedLine:
    """The refused line under an id that no other line has, so that it has a row of its own."""
    given = line.fields.get("id")
    # An id that another line has would, once rendered, replace that line's clip.
    anothers = isinstance(given, str) and given in index.lines_of([given])
    line_id = next(name for name in chain([line.id] if line.id else [], names) if index.claim(name))
    return replace(line, id=line_id, fields={**line.fields, "id": line_id} if anothers else line.fields)


def _numbered(name: str) -> Iterator[str]:
    yield name
    for number in count(2):
        yield f"{name}-{number}"


def check_shot(fields: Mapping[str, Any], source: str, profile_defaults: Mapping[str, Any], run_seed: int = 0) -> Shot:
    """One shot that does not come from a file. Raises ScriptError naming each wrong field."""
    setting = _Setting(source, Path.cwd(), _merged(profile_defaults), {}, run_seed)
    line = _Checked(Line(None, dict(fields), strict=False), setting)
    if len(line.shots) > 1:
        line.refuse("variants", str(len(line.shots)), "this is one shot; variants are for scripts")
    if line.errors:
        raise ScriptError(line.errors)
    (shot,) = line.shots.values()
    return shot


class _Setting:
    """What the lines of one script share."""

    def __init__(
        self,
        source: str,
        folder: Path,
        fallback: Mapping[str, Any],
        characters: Mapping[str, Mapping[str, Any]],
        run_seed: int,
    ) -> None:
        self.source = source
        self.fallback = fallback
        self.characters = characters
        self.run_seed = run_seed
        self.locate = lru_cache(PATHS_REMEMBERED)(partial(_located, folder))
        """A path as a line has it -> the absolute path, and whether a file is there."""


def _located(folder: Path, path: str) -> tuple[str, bool]:
    # os.path, for it leaves the home of an unknown user as it is, and takes paths that are too long.
    place = os.path.abspath(os.path.join(folder, os.path.expanduser(path)))
    return place, os.path.isfile(place)


class _Checked:
    """A line with its defaults: either shots, or what is wrong with it."""

    def __init__(self, line: Line, setting: _Setting) -> None:
        self.errors: list[FieldError] = []
        self.shots: dict[str, Shot] = {}
        """By id; none where there are errors."""
        self._line = line
        self._setting = setting
        own = dict(line.fields)
        failure = own.pop(FAILURE_FIELD, None)
        self._failure = failure if isinstance(failure, dict) else {}
        self._fields = _merged(setting.fallback, own)
        if own.get("id") is None:
            # Of the line's own words alone: defaults that change must not change its id, and with it its seed.
            self._fields["id"] = derive_id(own)
        self._take_character(own)
        shot = None if self.errors else self._validated()
        found = None if shot is None else self._with_files(shot)
        if found is not None and not self.errors:
            self.shots = dict(_seeded_variants(found, setting.run_seed))

    def refuse(self, field: str | None, got: str, allowed: str) -> None:
        self.errors.append(FieldError(self._setting.source, self._line.number, field, got, allowed))
        self.shots = {}

    @property
    def number(self) -> int:
        """Of the line; 0 for one from no file."""
        return self._line.number or 0

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
            script if isinstance(script, str) else self._setting.source,
            self.number,
            fields,
            tuple(self.errors),
        )

    def _take_character(self, own: Mapping[str, Any]) -> None:
        """A character's fields go before the defaults, and behind what the line itself says."""
        name = self._fields.get("character")
        if name is None:
            return
        characters = self._setting.characters
        if not isinstance(name, str) or name not in characters:
            known = ", ".join(characters) or "none; characters stand in the header of a .yaml script"
            self.refuse("character", shortened(name), f"the script's characters are: {known}")
            return
        brought = {field: value for field, value in characters[name].items() if field not in own and field != "trigger"}
        # What a character brings stays with the line; its name is known in this script only.
        self._fields = {**{field: value for field, value in self._fields.items() if field != "character"}, **brought}
        trigger, prompt = characters[name].get("trigger"), self._fields.get("prompt")
        if trigger and isinstance(prompt, str) and prompt.strip():
            self._fields["prompt"] = f"{trigger}, {prompt}"

    def _validated(self) -> Shot | None:
        try:
            shot = Shot.model_validate(self._fields, strict=self._line.strict)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                self.refuse(*_explained(detail))
            return None
        except (ValueError, RecursionError) as error:
            self.refuse(None, "what cannot be read", f"must be plain JSON, not nested deeply ({error})")
            return None
        if shot.identity not in identities():
            self.refuse("identity", shortened(shot.identity), f"must be one of {', '.join(identities())}")
        # A shot travels between machines as JSON. All fields but this one are of types that survive that.
        if shot.metadata and not _survives_as_json(shot.metadata):
            allowed = "must be plain JSON, not nested deeply, without NaN, Infinity or broken text"
            self.refuse("metadata", shortened(shot.metadata), allowed)
        return shot

    def _with_files(self, shot: Shot) -> Shot:
        """The shot with its paths made absolute; what is not there is an error of the line."""
        found: dict[str, Any] = {}
        if shot.image is not None:
            found["image"] = self._existing("image", shot.image)
        if shot.face_image:
            found["face_image"] = tuple(self._existing("face_image", photo) for photo in shot.face_image)
        if shot.lora:
            found["lora"] = tuple(map(self._with_file, shot.lora))
        return shot.model_copy(update=found) if found else shot

    def _existing(self, field: str, path: str) -> str:
        place, there = self._setting.locate(path)
        if not there:
            self.refuse(field, shortened(path), f"must be an existing file (looked for {place})")
        return place

    def _with_file(self, lora: LoraRef) -> LoraRef:
        is_weights = lora.path.endswith(".safetensors")
        # A built-in name stays a name: each machine builds its own copy.
        if lora.path.startswith("builtin:") and is_weights:
            try:
                resolve(lora.path)
            except SetupError as error:
                self.refuse("lora", shortened(lora.path), str(error))
            return lora
        place, there = self._setting.locate(lora.path)
        if not there or not is_weights:
            self.refuse("lora", shortened(lora.path), f"must be an existing .safetensors file (looked for {place})")
        return lora.model_copy(update={"path": place})

    def _absolute(self, field: str, value: Any) -> Any:
        """Paths of a field as absolute ones, whatever its shape; everything else as it is."""
        if field not in ("image", "face_image", "lora") or value is None:
            return value
        if isinstance(value, str):
            return value if value.startswith("builtin:") else self._setting.locate(value)[0]
        if isinstance(value, list | tuple):
            return [one if isinstance(one, list | tuple) else self._absolute(field, one) for one in value]
        if isinstance(value, dict) and isinstance(value.get("path"), str):
            return {**value, "path": self._absolute(field, value["path"])}
        return value


def _survives_as_json(metadata: JsonValue) -> bool:
    for _ in range(LEVELS_AROUND):
        metadata = [metadata]
    try:
        return METADATA.validate_json(METADATA.dump_json(metadata)) == metadata
    except (ValueError, RecursionError):
        return False


def _seeded_variants(shot: Shot, run_seed: int) -> Iterator[tuple[str, Shot]]:
    assert shot.id is not None
    if shot.variants == 1:
        yield shot.id, shot.with_seed(run_seed)
        return
    for number in range(shot.variants):
        # Variants of a line with a seed of its own take the seeds after it; without one, each is seeded by its id.
        seed = None if shot.seed is None else (shot.seed + number) % 2**32
        shot_id = f"{shot.id}-v{number}"
        yield shot_id, shot.model_copy(update={"id": shot_id, "variants": 1, "seed": seed}).with_seed(run_seed)


def _merged(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Later layers win; `steps` and `guidance` are merged stage by stage."""
    out: dict[str, Any] = {}
    for layer in layers:
        given = nest_flat_settings(dict(layer))
        before = {name: out[name] for name in NESTED_FIELDS if name in out and name in given}
        out.update(given)
        for name, settings in before.items():
            if isinstance(settings, dict) and isinstance(given[name], dict):
                out[name] = {**settings, **given[name]}
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
