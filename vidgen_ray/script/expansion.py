"""Expand a line: fields of its character and its style, choices such as `{sunny|rainy}` in its texts, and a `matrix` of values.

A character is a person: photos, LoRA, trigger words, a description. A style is a look. Both stand in the header of a .yaml
script; characters may also stand in a file of their own. Each shot of a line with choices gets an id that depends on its own
choices only, so that adding a choice changes no other shot."""

import hashlib
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from vidgen_ray.errors import FieldError, ScriptError, known_fields, shortened_value
from vidgen_ray.limits import MAX_SHOTS_PER_LINE
from vidgen_ray.script.lines import WrongField, absolute_path, read_yaml_file, with_absolute_paths
from vidgen_ray.shot import MATRIX, Shot, wrong_defaults

CHARACTER_FIELDS = (
    "face_image",
    "face_index",
    "consent",
    "identity",
    "identity_strength",
    "identity_start",
    "identity_end",
    "pose",
    "min_identity",
    "max_tries",
    "image_model",
    "lora",
    "lora_strength",
)
"""Fields of a shot that a character may set."""
STYLE_FIELDS = (
    "negative_prompt",
    "use_hunyuan_style",
    "style_model",
    "style_prompt",
    "style_strength",
    "lora",
    "lora_strength",
    "steps",
    "guidance",
)
"""Fields of a shot that a style may set."""
CHARACTER_TEXTS = ("trigger", "description")
"""`trigger` is put before the prompt. `description` replaces `{NAME}` in prompts."""
STYLE_TEXTS = ("prompt",)
"""`prompt` is appended to the prompt of the shot."""
_NAME = re.compile(r"[^\W\d_][\w\u0300-\u036f-]{0,63}")
"""Name of a character or a style, in any language. Accents may be characters of their own, see `normal_form`."""
MENTION = re.compile(rf"\{{({_NAME.pattern})\}}")
"""Name of a character in a prompt."""

NamedFields = Mapping[str, Mapping[str, Any]]


def read_characters(path: Path) -> NamedFields:
    """Return the characters of a YAML file, with absolute paths. They may stand below `characters:` or at the top level.

    Raises ScriptError.
    """
    content = read_yaml_file(path)
    if isinstance(content, dict) and set(content) == {"characters"}:
        content = content["characters"]
    characters = checked_characters(path.name, content)
    absolute = partial(absolute_path, path.parent)
    return {
        name: {field: with_absolute_paths(field, value, absolute) for field, value in fields.items()}
        for name, fields in characters.items()
    }


def checked_characters(source: str, value: Any) -> NamedFields:
    """Return the characters of a header. Raises ScriptError for the first wrong one."""
    return _checked(source, "characters", value, CHARACTER_FIELDS, CHARACTER_TEXTS)


def checked_styles(source: str, value: Any) -> NamedFields:
    """Return the styles of a header. Raises ScriptError for the first wrong one."""
    return _checked(source, "styles", value, STYLE_FIELDS, STYLE_TEXTS)


def _checked(source: str, kind: str, value: Any, fields: Sequence[str], texts: Sequence[str]) -> NamedFields:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise _wrong(source, kind, shortened_value(value), "must be a mapping of names to fields")
    for name, named in value.items():
        where = f"{kind}.{str(name)[:64]}"
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            allowed = "a name must be 1 to 64 letters, digits, _ or -, starting with a letter"
            raise _wrong(source, kind, shortened_value(name), allowed)
        if not isinstance(named, dict):
            raise _wrong(source, where, shortened_value(named), f"must be a mapping with {', '.join((*fields, *texts))}")
        for field, content in named.items():
            if field not in (*fields, *texts):
                raise _wrong(
                    source, f"{where}.{str(field)[:64]}", "an unknown field", known_fields(str(field), (*fields, *texts))
                )
            if field in texts and (not isinstance(content, str) or not content.strip()):
                raise _wrong(source, f"{where}.{field}", shortened_value(content), "must be text")
        shot_fields = {field: content for field, content in named.items() if field in fields}
        for wrong, got, allowed in wrong_defaults(shot_fields, strict=True)[:1]:
            raise _wrong(source, f"{where}.{wrong}", got, allowed)
    return {normal_form(name): named for name, named in value.items()}


def normal_form(name: str) -> str:
    """Return a name in the form in which names are compared."""
    return unicodedata.normalize("NFC", name)


def with_style(fields: dict[str, Any], own: Mapping[str, Any], styles: NamedFields, name: Any) -> dict[str, Any]:
    """Return the fields of a shot with those of the style. The line's own fields win. Raises WrongField."""
    style = _named("style", name, styles, "styles")
    added = {field: value for field, value in style.items() if field not in own and field not in STYLE_TEXTS}
    if "style_prompt" in added:
        added.setdefault("use_hunyuan_style", own.get("use_hunyuan_style", True))
    if "lora" in added and fields.get("lora"):
        added["lora"] = [*_as_list(fields["lora"]), *_as_list(added["lora"])]
    fields = {**fields, **added}
    if "prompt" in style and isinstance(fields.get("prompt"), str) and fields["prompt"].strip():
        fields["prompt"] = f"{fields['prompt']}, {style['prompt']}"
    return fields


def with_character(
    fields: dict[str, Any], own: Mapping[str, Any], characters: NamedFields, name: Any
) -> tuple[dict[str, Any], str | None]:
    """Return the fields of a shot with those of its character, and the character's name.

    The character is that of the field `character`, otherwise the only one that the prompt mentions as `{NAME}`. The line's own
    fields win. Raises WrongField.
    """
    mentioned = list(dict.fromkeys(_mentions(fields.get("prompt"), characters)))
    if name is None and len(mentioned) > 1:
        allowed = f"must be set: the prompt names {' and '.join(mentioned)}, and a shot has the face of one"
        raise WrongField("character", "nothing", allowed)
    if name is None and mentioned:
        name = mentioned[0]
    character: Mapping[str, Any] = {}
    if name is not None:
        character = _named("character", name, characters, "characters")
        name = normal_form(name)
        fields = {
            **fields,
            **{field: value for field, value in character.items() if field in CHARACTER_FIELDS and field not in own},
        }
    trigger, prompt = character.get("trigger"), fields.get("prompt")
    for text in ("prompt", "style_prompt"):
        if characters and isinstance(fields.get(text), str):
            fields = {**fields, text: MENTION.sub(lambda found: _description(found[1], characters), fields[text])}
    # A mention of a character without a description is replaced by its trigger, which must not appear twice.
    has_trigger = name in mentioned and "description" not in character
    if trigger and isinstance(prompt, str) and prompt.strip() and not has_trigger:
        fields = {**fields, "prompt": f"{trigger}, {fields['prompt']}"}
    return fields, name


def _mentions(prompt: Any, characters: NamedFields) -> Iterator[str]:
    if not characters or not isinstance(prompt, str):
        return
    for name in map(normal_form, MENTION.findall(prompt)):
        if name not in characters:
            raise WrongField("prompt", f"{{{name}}}", f"is no character of the script; these are {', '.join(characters)}")
        yield name


def _description(name: str, characters: NamedFields) -> str:
    character = characters.get(normal_form(name), {})
    return str(character.get("description") or character.get("trigger") or name)


def _named(field: str, name: Any, named: NamedFields, section: str) -> Mapping[str, Any]:
    if not isinstance(name, str) or normal_form(name) not in named:
        names = ", ".join(named) or "none"
        more = (
            " (define characters in the header of a .yaml script, or with --characters FILE)" if section == "characters" else ""
        )
        raise WrongField(field, shortened_value(name), f"must be one of the script's {section}: {names}{'' if named else more}")
    return named[normal_form(name)]


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _wrong(source: str, field: str | None, got: str, allowed: str) -> ScriptError:
    return ScriptError([FieldError(source, None, field, got, allowed)])


MATRIX_NUMBER = "matrix_number"
"""Key in the metadata of a shot of a `matrix`, or with choices: its number among those of its line, from 0."""
CHOSEN = "choices"
"""Key in the metadata of a shot with choices: their options (`sunny|rainy`) -> the option that was chosen."""
LINE_PROMPT = "line_prompt"
"""Key in the metadata of a shot with a character, a style or choices: the prompt as its line has it."""
STYLE = "style"
"""Field of a line: name of a style in the header. Not a field of a shot."""
_TEXTS = ("prompt", "negative_prompt", "style_prompt", "motion_prompt")
CHOICES = re.compile(r"\{([^{}|]*(?:\|[^{}|]*)+)\}")
UNCLOSED_CHOICES = re.compile(r"\{[^{}]*\|[^{}]*(?:\{|$)")
NO_MATRIX_FIELDS = ("id", "variants", "metadata", "consent", "priority")
SUFFIX_LETTERS = 24
CHOICE_LETTERS = 60
HASH_DIGITS = 6
FILE_NAME = re.compile(r"^(?:.*[/:])?([^/:]+)\.(?:safetensors|png|jpe?g|webp|bmp|tiff?)$", re.IGNORECASE | re.DOTALL)
"""A file whose name stands for it."""


class Expanded(NamedTuple):
    """The fields of one of the shots of a line."""

    fields: dict[str, Any]
    suffix: str
    """Text to add to the id of the line. Empty for a line that is not expanded."""
    values: dict[str, Any]
    """Values of its `matrix` by field."""
    chosen: dict[str, str]
    """Chosen option of each of its choices."""


def is_expandable(fields: Mapping[str, Any]) -> bool:
    """Return whether the line may stand for several shots. Fast, since few lines do."""
    return MATRIX in fields or any("|" in text for name in _TEXTS if isinstance(text := fields.get(name), str))


def expand(fields: Mapping[str, Any]) -> list[Expanded]:
    """Return the shots that a line stands for, in the order of its values and choices.

    Raises WrongField for an invalid matrix, for nested or unclosed choices, and above MAX_SHOTS_PER_LINE.
    """
    plain = {name: value for name, value in fields.items() if name != MATRIX}
    axes = list(_matrix_axes(fields.get(MATRIX) or {}))
    expanded: list[Expanded] = []
    suffixes = set[str]()
    for values in product(*axes):
        own = {**plain, **dict(values)}
        for fields, chosen in _choose(own):
            suffix = _suffix([value for _, value in values], [option for _, option in chosen], suffixes)
            expanded.append(Expanded(fields, suffix, dict(values), _named_choices(chosen)))
        if len(expanded) > MAX_SHOTS_PER_LINE:
            raise WrongField(
                MATRIX if axes else "prompt", f"more than {MAX_SHOTS_PER_LINE} shots", f"must be at most {MAX_SHOTS_PER_LINE}"
            )
    return expanded


def _matrix_axes(matrix: Any) -> Iterator[list[tuple[str, Any]]]:
    if not isinstance(matrix, dict):
        raise WrongField(MATRIX, shortened_value(matrix), "must map fields to lists of values")
    allowed = [*(name for name in Shot.model_fields if name not in NO_MATRIX_FIELDS), STYLE]
    for name, values in matrix.items():
        if name not in allowed and "." not in str(name):
            raise WrongField(f"{MATRIX}.{str(name)[:40]}", "an unknown field", known_fields(str(name), allowed))
        if not isinstance(values, list) or not values:
            raise WrongField(f"{MATRIX}.{name}", shortened_value(values), "must be a list of values")
        yield [(name, value) for value in values]


def _suffix(values: Sequence[Any], chosen: Sequence[str], taken: set[str]) -> str:
    """Return what values and choices add to an id, with their hash if an earlier shot has the same.

    Raises WrongField if the earlier shot has the same values, too.
    """
    suffix = "".join(f"-{_slug(value)}" for value in (*values, *chosen))
    content = repr((values, chosen))
    if content in taken:
        raise WrongField(MATRIX, shortened_value(values), "must be listed once")
    if suffix in taken:
        suffix += f"-{hashlib.sha256(content.encode('utf-8', 'surrogatepass')).hexdigest()[:HASH_DIGITS]}"
    taken |= {suffix, content}
    return suffix


def _named_choices(chosen: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return options -> chosen option, as text. Options that a line has twice are numbered."""
    named: dict[str, str] = {}
    for options, option in chosen:
        name = options if len(options) <= CHOICE_LETTERS else f"{options[: CHOICE_LETTERS - 1]}…"
        same = sum(each == name or each.startswith(f"{name} (") for each in named)
        named[f"{name} ({same + 1})" if same else name] = option.strip()
    return named


def _choose(fields: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Sequence[tuple[str, str]]]]:
    """Yield the fields with each combination of the choices in their texts, and the options and the chosen one of each."""
    texts = {name: CHOICES.split(text) for name in _TEXTS if isinstance(text := fields.get(name), str) and "|" in text}
    choices = {
        (name, number): _options(name, parts[number]) for name, parts in texts.items() for number in range(1, len(parts), 2)
    }
    if (shots := prod(map(len, choices.values()))) > MAX_SHOTS_PER_LINE:
        raise WrongField("prompt", f"choices for {shots:,} shots", f"must be at most {MAX_SHOTS_PER_LINE} per line")
    for chosen in product(*choices.values()):
        parts = {name: list(text) for name, text in texts.items()}
        for (name, number), option in zip(choices, chosen, strict=True):
            parts[name][number] = option
        for name, text in parts.items():
            if CHOICES.search(joined := "".join(text)):
                raise WrongField(name, shortened_value(joined), "choices such as {a|b} must not contain other choices")
            if unclosed := UNCLOSED_CHOICES.search(joined):
                raise WrongField(name, shortened_value(unclosed[0]), "choices such as {a|b} must end with }")
        # A choice may be empty: "a {red |}ball".
        joined_texts = {name: " ".join("".join(text).split()) for name, text in parts.items()} if choices else {}
        yield (
            {**fields, **joined_texts},
            [(texts[name][number], option) for (name, number), option in zip(choices, chosen, strict=True)],
        )


def _options(name: str, text: str) -> list[str]:
    options = text.split("|")
    if len({" ".join(option.split()) for option in options}) < len(options):
        raise WrongField(name, shortened_value("{" + text + "}"), "choices must differ")
    return options


def _slug(value: Any) -> str:
    """Return the part of an id that stands for a value. Of a file it is the name, without folder and ending."""
    if isinstance(value, list | tuple):
        text = "-".join(map(_slug, value))
    elif isinstance(value, dict):
        text = "-".join(map(_slug, value.values()))
    else:
        text = FILE_NAME.sub(r"\1", str(value))
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")[:SUFFIX_LETTERS].strip("-").lower() or "none"
