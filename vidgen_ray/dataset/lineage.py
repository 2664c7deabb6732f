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
from vidgen_ray.media import Mp4Settings
from vidgen_ray.outputs.cleanup import read_each
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
AFTER_STEPS = ("crop_width", "crop_height", "min_identity", "retries")
"""Fields that are part of the key of a shot, but of none of its steps."""
OTHER_DEVICE = "another GPU, driver or encoder"
UNRECORDED = "version of the stage, or an option or a file that its record does not name"
MAX_VALUES = 20
"""Old and new values that are counted per kind of reason."""
SHOWN_VALUES, SHOWN_IDS = 3, 3


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

    def as_json(self) -> dict[str, Any]:
        reasons = [reason._asdict() for reason in self.reasons]
        return {**self._asdict(), "reasons": reasons}


def differences(old: OutputFolder, new: OutputFolder) -> Iterator[Difference | None]:
    """Yield what differs for each finished shot, by shard and id. `None` for a shot with the same bytes in both folders."""
    options = tuple(map(_options, (old, new)))
    shards = {name for outputs in (old, new) for name in outputs.storage.folders(SHOTS) if SHARD.fullmatch(name)}
    for shard in sorted(shards):
        before, after = (dict(_records(outputs.storage, shard)) for outputs in (old, new))
        for shot_id in sorted(before.keys() | after.keys()):
            if shot_id not in after:
                yield Difference(shot_id, "only in OUT1")
            elif shot_id not in before:
                yield Difference(shot_id, "only in OUT2")
            else:
                yield _difference(shot_id, before[shot_id], after[shot_id], options)


def _records(storage: Storage, shard: str) -> Iterator[tuple[str, bytes]]:
    """Yield id and record of each finished shot of a shard."""
    ids = storage.folders(f"{SHOTS}/{shard}")
    for shot_id, content in read_each(storage, ids, [f"{SHOTS}/{shard}/{shot_id}/{RECORD}" for shot_id in ids]):
        if content is not None:
            yield shot_id, content


def _options(outputs: OutputFolder) -> dict[str, Any]:
    """Return `ACTOR.OPTION` -> value of the profile of the last run, and those of its files."""
    try:
        profile = read_last_run(outputs)["profile"]
        of_actors = {
            f"{actor}.{name}": value
            for actor, settings in profile["actors"].items()
            for name, value in {**settings["options"], "device": settings["device"], "dtype": settings["dtype"]}.items()
        }
        of_files = {f"{part}.{name}": value for part in FILE_OPTIONS for name, value in profile[part].items()}
        return of_actors | of_files
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _difference(shot_id: str, old: bytes, new: bytes, options: tuple[dict[str, Any], ...]) -> Difference | None:
    try:
        before, after = (json.loads(text) for text in (old, new))
        digests = [
            {name: record["files"].get(file, {}).get("sha256") for name, file in SHOT_FILES.items()}
            for record in (before, after)
        ]
        if digests[0] == digests[1]:
            return None
        file = next(name for name in SHOT_FILES if digests[0][name] != digests[1][name])
        step, reasons = _reasons(before, after, options)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Difference(shot_id, "different", reasons=(Reason("record", "a damaged shot.json; see `vidgen verify`"),))
    return Difference(shot_id, "different", file, step, tuple(reasons))


def _reasons(
    old: Mapping[str, Any], new: Mapping[str, Any], options: tuple[dict[str, Any], ...]
) -> tuple[str | None, list[Reason]]:
    """Return the first stage whose key differs, and why the bytes differ."""
    software = list(_changes("software", old["software"], new["software"]))
    if old["key"] == new["key"]:
        return None, software or [Reason("device", OTHER_DEVICE)]
    before, after = ({step["stage"]: step for step in record["stages"]} for record in (old, new))
    stages = [name for name in STAGE_BY_NAME if name in before or name in after]
    stages += [name for name in dict.fromkeys((*before, *after)) if name not in stages]
    changed = [name for name in stages if before.get(name, {}).get("key") != after.get(name, {}).get("key")]
    reasons = list(_changes("field", _flat(old), _flat(new)))
    if before.keys() == after.keys():
        read = {*AFTER_STEPS, *_fields_read(changed), *(["image"] if changed[:1] == stages[:1] else [])}
        reasons = [reason for reason in reasons if read & {reason.name, reason.name.partition(".")[0]}]
    elif not reasons:
        sides = [("OUT1" if name in before else "OUT2", name) for name in stages if (name in before) != (name in after)]
        reasons = [Reason("stage", f"stage {name} only in {side}") for side, name in sides]
    weights = []
    for name in changed:
        digests = [step.get(name, {}).get("weights", []) for step in (before, after)]
        if name in before and name in after and digests[0] != digests[1]:
            removed, added = ([each for each in digests[a] if each not in digests[b]] for a, b in ((0, 1), (1, 0)))
            weights.append(Reason("weights", f"{name} weights", removed, added))
    # Another path of the same file changes nothing.
    reasons = [reason for reason in reasons if weights or not reason.name.endswith(".path")] + weights
    reasons += [reason for reason in _changes("option", *options) if _has_effect(reason.name, changed)]
    if not reasons and new["shot"]["continue_from"]:
        reasons = [Reason("field", "last frame of continue_from", old["shot"]["continue_from"], new["shot"]["continue_from"])]
    return next(iter(changed), None), reasons or software or [Reason("unrecorded", UNRECORDED)]


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a shot that can change its bytes, with an entry per stage, and face photos by their content."""
    flat: dict[str, Any] = {}
    for name, value in record["shot"].items():
        if name in NESTED_FIELDS:
            flat |= {f"{name}.{stage}": each for stage, each in value.items()}
        elif name in LORA_FIELDS:
            flat |= {f"{name}.{each}": [lora[each] for lora in value] for each in ("path", "weight")}
        elif name == "face_image":
            flat[name] = [photo[:12] for photo in record["face_photos"]]
        elif name not in WITHOUT_EFFECT and not (name == "image" and record["shot"]["continue_from"]):
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


def _changes(kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Reason]:
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield Reason(kind, name, old.get(name), new.get(name))


class Summary:
    """Counts of equal and different shots, with equal reasons together. Memory use does not grow with the number of shots."""

    def __init__(self) -> None:
        self.equal = 0
        self.groups: dict[tuple[str | None, ...], list[str]] = defaultdict(list)
        """State, step and names of reasons -> first ids."""
        self._counts: Counter[tuple[str | None, ...]] = Counter()
        self._values: dict[tuple[str | None, ...], Counter[str]] = defaultdict(Counter)

    def add(self, difference: Difference | None) -> None:
        if difference is None:
            self.equal += 1
            return
        group = (difference.state, difference.step, *(reason.name for reason in difference.reasons))
        self._counts[group] += 1
        if len(ids := self.groups[group]) < SHOWN_IDS:
            ids.append(difference.id)
        text = ", ".join(map(str, difference.reasons))
        if text in (values := self._values[group]) or len(values) < MAX_VALUES:
            values[text] += 1

    def lines(self) -> Iterator[str]:
        """Yield the result as text, the largest groups first."""
        yield f"{count(self.equal, 'shot')} equal"
        for group, number in self._counts.most_common():
            state, step, *names = group
            ids = f" ({', '.join(self.groups[group])}{', ...' if number > SHOWN_IDS else ''})"
            if state != "different":
                yield f"{count(number, 'shot')} {state}{ids}"
                continue
            place = f" from {step}" if step else ", same key" if names == [OTHER_DEVICE] else ""
            values = self._values[group].most_common()
            if len(values) <= SHOWN_VALUES:
                for text, times in values:
                    yield f"{count(times, 'shot')} different{place}: {text}{ids if len(values) == 1 else ''}"
            else:
                yield f"{count(number, 'shot')} different{place}: {', '.join(map(str, names))}, such as {values[0][0]}{ids}"
