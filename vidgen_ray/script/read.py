"""Script reader: turns lines into validated shots.

Fills in defaults and characters and checks that files exist. Only ids are kept in memory. Lines can be checked in any process
and in any order; `unique_lines` then makes their ids unique, in the order of the script."""

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from vidgen_ray.errors import FieldError, MediaError, ScriptError, StageError, VidgenError
from vidgen_ray.nets.lora_files import FLUX, check_lora_file, check_lora_width
from vidgen_ray.profile import Profile
from vidgen_ray.script.check import LineChecker
from vidgen_ray.script.formats import ScriptVersion, open_script
from vidgen_ray.script.lines import Line, Lines, ScriptIndex, ScriptSettings
from vidgen_ray.shot import IMAGE_FIELDS, Shot, derive_id
from vidgen_ray.stages.flux import FluxLoRAStage
from vidgen_ray.system.cache_dir import file_version
from vidgen_ray.weights import resolve

CACHED_FILES = 4096


def check_files(shot: Shot, *, decode: bool = False) -> list[tuple[str, VidgenError]]:
    """Return field and error of each file of the shot that cannot be used. Each file is read once.

    By default only headers are read. `decode`: decode the images, which also finds damaged ones. See also `check_lora_sizes`.
    """
    images = [(field, path) for field in IMAGE_FIELDS if (path := getattr(shot, field))]
    images += [("face_image", photo) for photo in shot.face_image]
    checked = [(field, _image_error(path, _version(path), decode)) for field, path in images]
    checked += [("lora", _lora_error(lora.path, _version(lora.path), FLUX)) for lora in shot.lora]
    checked += [("video_lora", _lora_error(lora.path, _version(lora.path), shot.video_model)) for lora in shot.video_lora]
    return [(field, error) for field, error in checked if error is not None]


def file_problem(
    shot: Shot, profile: Profile, source: str, line: int | None = None, *, decode: bool = False
) -> ScriptError | None:
    """Return the error of a shot with a file that cannot be used, `None` if there is none. `decode`: see `check_files`."""
    wrong = check_files(shot, decode=decode) or check_lora_sizes(shot, profile)
    errors = [FieldError(source, line, field, "an unusable file", str(error)) for field, error in wrong]
    return ScriptError(errors) if errors else None


def check_lora_sizes(shot: Shot, profile: Profile) -> list[tuple[str, VidgenError]]:
    """Return field and error of each LoRA for a FLUX of another size than the profile's. Its other files must be usable.

    Nothing is known without the weights.
    """
    if not shot.lora or shot.image_model != "flux":
        return []
    # Damaged files are found by `check_files`, damaged weights when they are loaded.
    with suppress(Exception):
        weights = str(profile.params(FluxLoRAStage).weights)
        return [
            ("lora", error) for lora in shot.lora if (error := _size_error(lora.path, _version(lora.path), weights)) is not None
        ]
    return []


FileVersion = tuple[int, int, int, int]


def _version(path: str) -> FileVersion | None:
    """Return what differs after any change of the file. `None` for a built-in one, which is not a path and does not change."""
    with suppress(OSError, ValueError):
        return file_version(Path(path))
    return None


@lru_cache(CACHED_FILES)
def _size_error(path: str, version: FileVersion | None, weights: str) -> VidgenError | None:
    try:
        check_lora_width(resolve(path), path, Path(weights) / "transformer")
    except StageError as error:
        return error
    return None


@lru_cache(CACHED_FILES)
def _image_error(path: str, version: FileVersion | None, decode: bool) -> VidgenError | None:
    # Imported here: scripts without images need no pixels.
    from vidgen_ray.media.images import image_size, read_image

    try:
        if decode:
            read_image(Path(path))
        else:
            image_size(Path(path))
    except MediaError as error:
        return error
    return None


@lru_cache(CACHED_FILES)
def _lora_error(path: str, version: FileVersion | None, base_model: str) -> VidgenError | None:
    try:
        check_lora_file(resolve(path), base_model)
    except StageError as error:
        return error
    return None


UNIQUE = "give the line another id, change it, or use `variants` for several shots of it (in .csv, .jsonl, .yaml)"
"""Advice for two lines with the same id."""


@dataclass(frozen=True, slots=True)
class Script:
    """Checked lines of a script: a line for each shot, and the rejected lines."""

    source: str
    lines: tuple[Line, ...]

    @property
    def shots(self) -> list[Shot]:
        """Valid shots. Variants are separate shots."""
        return [shot for line in self.lines for shot in line.shots]

    @property
    def rejected(self) -> list[Line]:
        """Lines with errors."""
        return [line for line in self.lines if line.errors]

    @property
    def errors(self) -> list[FieldError]:
        """Errors of all rejected lines."""
        return [error for line in self.lines for error in line.errors]

    @property
    def notes(self) -> list[str]:
        """Settings that have no effect, as messages."""
        return [note for line in self.lines for note in line.notes]


def open_lines(settings: ScriptSettings, version: ScriptVersion | None = None) -> tuple[LineChecker, Lines]:
    """Return the checker and the unchecked lines of a script. `version` and errors: see `open_script`."""
    header, lines = open_script(settings, version)
    return LineChecker.of(settings, header), lines


def iter_script(settings: ScriptSettings) -> Lines:
    """Yield a line for each valid shot, and the rejected lines of a script, in order.

    Only its ids stay in memory. Only .yaml scripts are read as a whole.
    Raises ScriptError, possibly after some lines, if the file cannot be read or has no lines.
    """
    checker, lines = open_lines(settings)
    empty = True
    for line in unique_lines(map(checker.check, lines), ScriptIndex()):
        empty = False
        yield line
    if empty:
        raise no_lines(settings.path)


def no_lines(path: Path) -> ScriptError:
    return ScriptError([FieldError(path.name, None, None, "no lines", "must have at least one shot")])


def read_script(settings: ScriptSettings, *, decode_files: bool = False) -> Script:
    """Read a script that fits into memory. See `iter_script`. `decode_files`: decode images and read the headers of LoRAs."""
    lines = tuple(iter_script(settings))
    for line in lines if decode_files else ():
        wrong = [] if line.errors else check_files(line.shot, decode=True)
        for field, error in wrong:
            line.reject(field, "an unusable file", str(error))
    return Script(settings.path.name, lines)


def unique_lines(lines: Iterable[Line], index: ScriptIndex) -> Lines:
    """Yield a line for each shot, and the rejected lines, each with an id that no earlier line of the script has.

    The first line with an id owns it. A later valid line with the same id is rejected.
    """
    line_of = index.line_of
    for line in lines:
        wrong = _wrong_id(line, line_of)
        if line.shots and wrong is None:
            for number, shot in enumerate(line.shots):
                assert shot.id is not None
                line_of[shot.id] = line.number
                if len(line.shots) == 1:
                    yield line
                    break
                results = line.results[number : number + 1]
                yield replace(line, shots=(shot,), results=results, notes=() if number else line.notes)
            continue
        rejected = replace(line)
        if wrong is not None:
            rejected.reject(*wrong)
        own_id, named = line.fields.get("id"), line.id
        if not named or named in line_of:
            named = index.unused_name(default_id(line))
        if isinstance(own_id, str) and own_id in line_of:
            # With the id of another line, rendering failures.jsonl would overwrite that line's clip.
            rejected.fields = {name: value for name, value in line.fields.items() if name != "id"}
        rejected.id = named
        line_of[named] = line.number
        yield rejected


def _wrong_id(line: Line, line_of: Mapping[str, int]) -> tuple[str, str, str] | None:
    """Return what is wrong with a line whose id is taken, or that continues a shot which no earlier line has.

    `line_of`: ids of earlier lines. Rows of a data set have the number 0.
    """
    taken = next((shot.id for shot in line.shots if shot.id in line_of), None)
    if taken is not None:
        allowed = f"line {line_of[taken]} has the same {'id' if line.has_own_id else 'content'}; {UNIQUE}"
        return "id", repr(taken), allowed
    for id_ in (shot.continue_from for shot in line.shots if shot.continue_from):
        if line.number == 0:
            allowed = "must not be set in a data set, since Ray Data does not keep the order of rows; use a script"
            return "continue_from", repr(id_), allowed
        # A failed line is rendered again without the finished shot that it continues.
        if line_of.get(id_, line.number) >= line.number and line.failed_as is None:
            return "continue_from", repr(id_), "must be the id of an earlier line"
    return None


def default_id(line: Line) -> str:
    """Return the name of a rejected line, `SCRIPT:NUMBER`, or `NAME:HASH` for a row without a number. No id has a colon."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", line.script)[-64:]
    return f"{name}:{line.number or derive_id({**line.fields, 'prompt': ''})}"
