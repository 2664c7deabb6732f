"""Which shots of two output folders differ, and why, from their records `shot.json`.

Shots are matched by id and are equal if image and clips have the same bytes. Reasons are found step by step, from the first
whose content key differs. Folders are read shard by shard, so memory stays flat.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.media.encode import Mp4Settings
from vidgen_ray.outputs.folder import OutputFolder, read_last_run
from vidgen_ray.outputs.manifest import SHOT_FILES
from vidgen_ray.outputs.records import RECORD, SHARD, SHOTS
from vidgen_ray.outputs.storage import Storage
from vidgen_ray.report.shot_text import value_text
from vidgen_ray.shot import DERIVED_FIELDS, LORA_FIELDS, NESTED_FIELDS, Shot
from vidgen_ray.stages.base import NOT_IN_KEY
from vidgen_ray.system.quantities import count

FILE_OPTIONS = {"encode": tuple(Mp4Settings.model_fields), "provenance": ("metadata", "label")}
"""Part of a profile -> its options that change the bytes of files."""
WITHOUT_EFFECT = {"id", "variants", "consent", "character", "metadata"}
"""Fields of a shot that never change its bytes."""
AFTER_STEPS = ("crop_width", "crop_height", "min_identity", "max_tries")
"""Fields that are part of the key of a shot, but of none of its steps."""
OTHER_DEVICE = "another GPU, driver or encoder"
UNRECORDED = "version of the stage, or an option or a file that its record does not name"
SHOWN_IDS = 3


class Reason(NamedTuple):
    """A cause of other bytes."""

    kind: str
    """`field`, `weights`, `stage`, `option` (of the last run's profile), `software`, `device`, `record`, or `unrecorded`."""
    name: str
    old: Any = None
    new: Any = None

    def __str__(self) -> str:
        if self.old == self.new:
            return self.name
        values = (value_text(value)[:12] if self.kind == "weights" else value_text(value) for value in (self.old, self.new))
        return f"{self.name} {' -> '.join(values)}"


class Difference(NamedTuple):
    """A shot that is not the same in both folders."""

    id: str
    state: str
    """`only in OUT1`, `only in OUT2`, or `different`."""
    file: str | None = None
    """First of image, video and hd_video with other bytes."""
    step: str | None = None
    """First stage whose key differs. `None` if all steps have the same keys."""
    reasons: tuple[Reason, ...] = ()


def differences(old: OutputFolder, new: OutputFolder) -> Iterator[Difference | None]:
    """Yield what differs for each finished shot, by shard and id. `None` for a shot with the same bytes in both folders."""
    options = tuple(map(_options, (old, new)))
    shards = {name for outputs in (old, new) for name in outputs.storage.folders(SHOTS) if SHARD.fullmatch(name)}
    for shard in sorted(shards):
        before, after = (_records(outputs.storage, shard) for outputs in (old, new))
        for shot_id in sorted(before.keys() | after.keys()):
            if shot_id in before and shot_id in after:
                yield _difference(shot_id, before[shot_id], after[shot_id], options)
            else:
                yield Difference(shot_id, "only in OUT1" if shot_id in before else "only in OUT2")


def _records(storage: Storage, shard: str) -> dict[str, bytes]:
    """Return the record of each finished shot of a shard by id."""
    ids = storage.folders(f"{SHOTS}/{shard}")
    contents = storage.read_each(f"{SHOTS}/{shard}/{shot_id}/{RECORD}" for shot_id in ids)
    return {shot_id: content for shot_id, content in zip(ids, contents, strict=True) if content is not None}


def _options(outputs: OutputFolder) -> dict[str, Any]:
    """Return `ACTOR.OPTION` -> value of the profile of the last run, and those of its files."""
    try:
        profile = read_last_run(outputs)["profile"]
        parts = {
            actor: {**settings["options"], "device": settings["device"], "dtype": settings["dtype"]}
            for actor, settings in profile["actors"].items()
        }
        parts |= {part: profile[part] for part in FILE_OPTIONS}
        return {f"{part}.{name}": value for part, options in parts.items() for name, value in options.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _difference(shot_id: str, old: bytes, new: bytes, options: tuple[dict[str, Any], ...]) -> Difference | None:
    try:
        before, after = (json.loads(text) for text in (old, new))
        for name, file in SHOT_FILES.items():
            digests = [record["files"].get(file, {}).get("sha256") for record in (before, after)]
            if digests[0] != digests[1]:
                step, reasons = _reasons(before, after, options)
                return Difference(shot_id, "different", name, step, tuple(reasons))
    except (ValueError, KeyError, TypeError, AttributeError):
        return Difference(shot_id, "different", reasons=(Reason("record", "a damaged shot.json; see `vidgen verify`"),))
    return None


def _reasons(
    old: Mapping[str, Any], new: Mapping[str, Any], options: tuple[dict[str, Any], ...]
) -> tuple[str | None, list[Reason]]:
    """Return the first stage whose key differs, and why the bytes differ."""
    software = list(changes("software", old["software"], new["software"]))
    if old["key"] == new["key"]:
        return None, software or [Reason("device", OTHER_DEVICE)]
    before, after = ({step["stage"]: step for step in record["stages"]} for record in (old, new))
    stages = [name for name in dict.fromkeys((*STAGE_BY_NAME, *before, *after)) if name in before or name in after]
    changed = [name for name in stages if before.get(name, {}).get("key") != after.get(name, {}).get("key")]
    reasons = list(changes("field", _flat(old), _flat(new)))
    if before.keys() == after.keys():
        read = {*AFTER_STEPS, *_fields_read(changed), *(["image"] if changed[:1] == stages[:1] else [])}
        reasons = [reason for reason in reasons if read & {reason.name, reason.name.partition(".")[0]}]
    elif not reasons:
        sides = [("OUT1" if name in before else "OUT2", name) for name in stages if (name in before) != (name in after)]
        reasons = [Reason("stage", f"stage {name} only in {side}") for side, name in sides]
    weights = []
    for name in changed:
        if name in before and name in after and before[name]["weights"] != after[name]["weights"]:
            sides = [before[name]["weights"], after[name]["weights"]]
            removed, added = ([each for each in one if each not in other] for one, other in (sides, sides[::-1]))
            weights.append(Reason("weights", f"{name} weights", removed, added))
    # Another path of the same file changes nothing.
    reasons = [reason for reason in reasons if weights or reason.name not in LORA_FIELDS] + weights
    reasons += [reason for reason in changes("option", *options) if _has_effect(reason.name, changed)]
    if not reasons and new["shot"]["continue_from"]:
        reasons = [Reason("field", "last frame of continue_from", old["shot"]["continue_from"], new["shot"]["continue_from"])]
    return next(iter(changed), None), reasons or software or [Reason("unrecorded", UNRECORDED)]


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a shot that can change its bytes, and its face photos by their content."""
    left_out = {*WITHOUT_EFFECT, *(["image"] if record["shot"]["continue_from"] else [])}
    fields = {name: value for name, value in record["shot"].items() if name not in left_out}
    return flat_settings({**fields, "face_image": [photo[:12] for photo in record["face_photos"]]})


def flat_settings(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a shot with an entry per stage, and with the weights of LoRAs apart from their files."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if name in NESTED_FIELDS:
            flat |= {f"{name}.{stage}": each for stage, each in (value or {}).items()}
        elif name in LORA_FIELDS:
            weights = [lora["weight"] for lora in value or []]
            flat[name] = [lora["path"] for lora in value or []]
            flat[f"{name}.weight"] = weights[0] if len(weights) == 1 else weights
        else:
            flat[name] = value
    return flat


def _has_effect(option: str, stages: Iterable[str]) -> bool:
    """Return whether an option of the profile changes the bytes of one of these stages, or those of the files."""
    actor, _, name = option.partition(".")
    if actor in FILE_OPTIONS:
        return name in FILE_OPTIONS[actor]
    known = (STAGE_BY_NAME[stage] for stage in stages if stage in STAGE_BY_NAME)
    options = [stage.Params.model_fields for stage in known if stage.actor == actor]
    return any(name in fields and NOT_IN_KEY not in fields[name].metadata for fields in options)


def _fields_read(stages: Iterable[str]) -> set[str]:
    """Return the fields that these stages read. All, for a stage of a package that is not installed."""
    if not all(name in STAGE_BY_NAME for name in stages):
        return set(Shot.model_fields)
    read = {field for name in stages for field in (*STAGE_BY_NAME[name].reads, *STAGE_BY_NAME[name].identity_fields)}
    return {base for field in read for base in DERIVED_FIELDS.get(field, (field,))}


def changes(kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Reason]:
    """Yield a reason per name whose values differ."""
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield Reason(kind, name, old.get(name), new.get(name))


def difference_summary(found: Iterable[Difference | None]) -> Iterator[str]:
    """Yield lines with the number of equal shots, and of those that differ for the same reasons, the largest groups first.

    Memory use does not grow with the number of shots.
    """
    counts = Counter[tuple[str | None, ...] | None]()
    """State, step and names of reasons -> shots. `None` for equal shots."""
    ids, texts = (defaultdict[tuple[str | None, ...], list[str]](list) for _ in range(2))
    for difference in found:
        group = difference and (difference.state, difference.step, *(reason.name for reason in difference.reasons))
        counts[group] += 1
        if difference and group:
            ids[group] += [difference.id][: SHOWN_IDS - len(ids[group])]
            text = ", ".join(map(str, difference.reasons))
            # A second text says that the values differ.
            if len(texts[group]) < 2 and text not in texts[group]:
                texts[group].append(text)
    yield f"{count(counts.pop(None, 0), 'shot')} equal"
    for group, number in counts.most_common():
        if group:
            state, step, *names = group
            place = f" from {step}" if step else ", same key" if names == [OTHER_DEVICE] else ""
            text, *others = texts[group]
            why = f"{', '.join(map(str, names))}, such as {text}" if others else text
            shown = f"{', '.join(ids[group])}{', ...' if number > SHOWN_IDS else ''}"
            yield f"{count(number, 'shot')} {state}{place}{f': {why}' if why else ''} ({shown})"
