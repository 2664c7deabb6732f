"""Settings of a data set, and SQL over the tables of an output folder: which clips it has, their columns, captions and splits.

A group is everything that is connected by an equal prompt, person or script, or by `continue_from`. It is never divided.
"""

from __future__ import annotations

import math
import re
from bisect import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import accumulate
from string import Formatter
from typing import Literal, NamedTuple

import duckdb
import numpy as np
import pyarrow
from pydantic import Field, field_validator

from vidgen_ray.cli.commands import note
from vidgen_ray.cli.options import FOR_HELP
from vidgen_ray.dataset.tables import (
    CAPTION,
    HAS_NO_LINE_PROMPT,
    IN_SCRIPT_ORDER,
    SAME_PROMPT,
    columns_of,
    quoted,
    run_query,
    selection,
    without_score,
)
from vidgen_ray.errors import FrozenModel, UsageError, shortened_value
from vidgen_ray.licences import ALLOWED, Requirement
from vidgen_ray.outputs.manifest import SCHEMA
from vidgen_ray.safety import DECLARED_BASES
from vidgen_ray.system.quantities import count

Format = Literal["videofolder", "webdataset", "parquet", "lance", "captions"]
_Kind = Literal["image", "video", "hd", "clip"]
SplitKey = Literal["prompt", "character", "source"]
KINDS: dict[_Kind, list[str]] = {"image": ["image"], "video": ["video"], "hd": ["hd_video"], "clip": ["hd_video", "video"]}
"""Kind of files -> columns with their paths, of which the first that is not null counts."""
FINISHED = "clips WHERE status = 'done'"
REJECTED_ROWS = f"{FINISHED} AND verdict = 'reject'"
CHOSEN_CLIPS = "clips SEMI JOIN chosen USING (id)"
INTERNAL = re.compile(
    r"run|team|submission_id|status|last_run|cut_tokens|lora_loads|failure_.*|ended_at|committed_at|consent|clip|clip_sha256"
    r"|(image|video|hd_video)(_sha256|_bytes)?|hd_width|hd_height|crop_.*|siblings|person|line_prompt|face_.*|start_image|last_image|pose"
    r"|note|who|reviewed_at"
)
"""Columns of `clips` that a data set does not have: internal ones, files of this machine, and what reviewers wrote."""
ENCODED = "STRUCT(num_frames BIGINT, fps DOUBLE, width BIGINT, height BIGINT)"
_OWN_COLUMNS = ("split", "file_name", "video", "image")
"""Columns of data sets beside those of `new`. Scores of the same name get another one."""
# Keys are named so that the key of a shot sorts last: a group keeps its smallest key when shots are added.
_KEYS: dict[SplitKey, str] = {
    "prompt": f"""SELECT id, 'prompt ' || {SAME_PROMPT} AS key FROM {CHOSEN_CLIPS} WHERE prompt IS NOT NULL
        UNION ALL SELECT id, concat('line ', line, ' of ', script) AS key FROM {CHOSEN_CLIPS}
        WHERE {HAS_NO_LINE_PROMPT} AND line IS NOT NULL""",
    "character": f"""SELECT id, 'character ' || character AS key FROM {CHOSEN_CLIPS} WHERE character IS NOT NULL
        UNION ALL SELECT id, 'photo ' || unnest(face_image) AS key FROM {CHOSEN_CLIPS}""",
    "source": f"SELECT id, 'script ' || script AS key FROM {CHOSEN_CLIPS}",
}
"""Key -> SQL of the ids and keys of clips. A person is a character, and each face photo."""
CHAINS = """SELECT id, 'shot ' || id AS key FROM clips
    UNION ALL SELECT id, 'shot ' || continue_from AS key FROM clips WHERE continue_from IS NOT NULL"""
FEW_GROUPS, MAX_DIVISIONS = 30, 100_000
"""Groups below which a set is divided as near to the shares as possible, and divisions of groups that are compared for it."""
RECORDED_GROUPS = 10_000
"""Groups below which all splits are recorded, since the set may become one of few groups."""


NOT_CAPTIONED = "vidgen caption has not seen it"
"""End of the reason of a clip that is left out because it was rendered after the captions were made."""


class ExportSettings(FrozenModel):
    """Settings of a data set."""

    format: Format = Field(
        "videofolder",
        description="videofolder (MP4 files and metadata.parquet, for datasets), webdataset (tar shards), parquet (clips "
        "inside), lance, or captions (a .txt beside each file).",
    )
    files: _Kind | None = None
    """`clip`: the upscaled clip of a shot, otherwise its clip. `None`: `clip`, or `image` if no shot has a clip."""
    splits: dict[str, float] = Field(default_factory=lambda: {"train": 1.0})
    """Name -> share of the clips, in order."""
    split_by: tuple[SplitKey, ...] | None = None
    """`None`: as in the data set, or `default_split_by` for a new one."""
    resize: str | None = Field(None, description="Encode again, cropped around the centre, or with this shorter side.")
    trainer: str | None = Field(
        None, description=f"Clips, captions and configuration for a trainer, and used.json: what it does with each. {FOR_HELP}."
    )
    fit: bool = Field(False, description="Encode clips again that the trainer would cut, drop, or train at another speed.")
    where: str | None = None
    best: str | None = Field(None, description="Of the seeds of a line, only the shot with the highest value of this SQL.")
    cleared: Requirement | None = Field(
        None,
        description="Leave out clips whose weights may not be used commercially (commercial), or only under a condition "
        "(unconditional), and those with a face photo without declared consent. Default: all clips.",
    )
    caption: str = Field(
        "{prompt}",
        description="Such as 'A video of {character}: {metadata.scene}', with columns of `clips`, such as {caption}.",
    )
    shard_mb: int = Field(500, description="Size of the shards of webdataset and parquet. Their last clip may exceed it.")

    @field_validator("resize")
    @classmethod
    def _check_resize(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[1-9]\d{1,4}|[1-9]\d{0,3}[02468]x[1-9]\d{0,3}[02468]", value):
            raise ValueError("must be WIDTHxHEIGHT in even numbers of pixels, or those of the shorter side")
        return value

    @property
    def default_split_by(self) -> tuple[SplitKey, ...]:
        """A trainer shall see each person, so that only prompts are kept together."""
        return ("prompt",) if self.trainer else ("prompt", "character")

    def options(self) -> list[str]:
        """Return the options of the command for settings other than the defaults."""
        values = self.model_dump(exclude_defaults=True, exclude={"files", "fit"})
        if "splits" in values:
            values["split"] = ",".join(f"{name}={share:g}" for name, share in values.pop("splits").items())
        if (by := values.pop("split_by", self.default_split_by)) != self.default_split_by:
            values["split_by"] = ",".join(by)
        if "trainer" in values:
            values = {"for": values.pop("trainer")} | {name: value for name, value in values.items() if name != "format"}
        flags = [*([] if self.files in (None, "clip") else [f"--{self.files}"]), *(["--fit"] if self.fit else [])]
        return [*flags, *(text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value)))]


def parse_splits(text: str) -> dict[str, float]:
    """Parse `train=0.9,val=0.1`. Raises UsageError."""
    splits: dict[str, float] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*([A-Za-z0-9_]+)\s*=\s*([0-9]*[.]?[0-9]+)\s*", part)
        if found is None or found[1] in splits or not 0 < float(found[2]) <= 1:
            raise UsageError(
                f"--split: got {part.strip()!r}, must be NAME=SHARE such as val=0.1, each name once, above 0 up to 1"
            )
        splits[found[1]] = float(found[2])
    if abs(sum(splits.values()) - 1) > 1e-6:
        raise UsageError(f"--split: the shares add up to {sum(splits.values()):g}, must be 1")
    return splits


def choose(database: duckdb.DuckDBPyConnection, settings: ExportSettings, kind: _Kind | None) -> _Kind:
    """Create the table `chosen` of ids, and `refused` and `missing` of ids with reasons. Return the kind of files.

    Rejected clips are left out. Without a kind, it is `clip`, or `image` if no shot has a clip. Raises UsageError for SQL.
    """
    wanted = f"({settings.where or 'true'}\n) AND status = 'done' AND verdict IS DISTINCT FROM 'reject'"
    database.register("selected", run_query(database, selection(wanted, settings.best, ("id",))).read_all())
    database.execute("CREATE TABLE chosen AS SELECT id FROM selected")
    problem = "NULL"
    if settings.cleared is not None:
        uses, bases = (", ".join(map(_text, values)) for values in (ALLOWED[settings.cleared], DECLARED_BASES))
        licences = "array_to_string(list_transform(licences, lambda x: coalesce(x, 'unknown')), ', ')"
        problem = f"""CASE WHEN coalesce(commercial_use, 'unknown') NOT IN ({uses}) THEN
                concat('commercial use: ', coalesce(commercial_use, 'unknown'), '; licences: ', coalesce({licences}, 'unknown'))
            WHEN len(face_image) > 0 AND coalesce(consent.basis, '') NOT IN ({bases}) THEN
                'shows a person (face photo) without declared consent' END"""
    database.execute(f"CREATE TABLE refused AS SELECT id, {problem} AS reason FROM {CHOSEN_CLIPS} WHERE reason IS NOT NULL")
    database.execute("DELETE FROM chosen WHERE id IN (SELECT id FROM refused)")
    if kind is None:
        kind = "clip" if row_count(database, f"{CHOSEN_CLIPS} WHERE coalesce(hd_video, video) IS NOT NULL") else "image"
    path = f"coalesce({', '.join(KINDS[kind])}, NULL)"
    database.execute(f"CREATE TABLE missing AS SELECT id, 'has no {kind}' AS reason FROM {CHOSEN_CLIPS} WHERE {path} IS NULL")
    if f"{{{CAPTION}}}" in settings.caption and CAPTION in columns_of(database, "clips"):
        reason = f"concat('has no caption: ', coalesce(caption_error, '{NOT_CAPTIONED}'))"
        database.execute(
            f"INSERT INTO missing SELECT id, {reason} FROM {CHOSEN_CLIPS} WHERE {path} IS NOT NULL AND caption IS NULL"
        )
    database.execute("DELETE FROM chosen WHERE id IN (SELECT id FROM missing)")
    return kind


def row_count(database: duckdb.DuckDBPyConnection, table: str) -> int:
    """Return the number of rows of a table or of what follows `FROM`."""
    ((number,),) = database.execute(f"SELECT count(*) FROM {table}").fetchall()
    return int(number)


def load_rows(database: duckdb.DuckDBPyConnection, kind: _Kind, caption: str, *, in_shards: bool) -> None:
    """Create the table `new` with the rows of `chosen`: the columns of the data set, and others whose names start with `_`.

    `_source` and `_bytes`: the file in the output folder. `_sample`: name of the clip, without dots in shards. `_place`: order.
    `_group` and `_encoded`: folder below that of the split, and what the clip is encoded as; `apply_rules` sets them.
    `_content` changes with the clip, `_signature` with the row, too. Raises UsageError for a caption with unknown names.
    """
    path, sha256, size = (
        f"coalesce({', '.join(f'{each}{end}' for each in KINDS[kind])}, NULL)" for end in ("", "_sha256", "_bytes")
    )
    columns = {"id": "id", "caption": _caption(database, caption), "prompt": "prompt", "sha256": sha256, "bytes": size}
    for side in ("width", "height"):
        # As `graph.file_sizes` cuts files that are not upscaled.
        cut = f"greatest(2, round_even(crop_{side} / if(upscale_video, scale, 1) / 2, 0) * 2)::BIGINT"
        is_hd = f"{kind in ('hd', 'clip')} AND hd_video IS NOT NULL"
        columns[side] = f"if({is_hd}, hd_{side}, if(crop_{side} IS NULL, {side}, least({side}, {cut})))"
    for name, type_ in (("num_frames", "BIGINT"), ("fps", "DOUBLE"), ("duration_s", "DOUBLE")):
        columns[name] = f"({'NULL' if kind == 'image' else name})::{type_}"
    columns["ai_generated"] = "true"
    columns |= {f"consent_{name}": f"consent.{name}" for name in ("subject", "basis", "reference")}
    for name in ("lora", "video_lora"):
        # Their paths reveal how a machine is set up.
        file = "{'file': parse_filename(x.path), 'weight': x.weight}"
        columns[name] = f"to_json(list_transform({name}, lambda x: {file}))::VARCHAR"
    own = {*columns, *_OWN_COLUMNS}
    for name, type_ in columns_of(database, "clips").items():
        if not INTERNAL.fullmatch(name) and not (name in own and name in SCHEMA.names):
            columns[f"score_{name}" if name in own else name] = _flat(name, type_)
    sample = "if(contains(id, '.'), concat(replace(id, '.', '_'), '-', left(sha256(id), 8)), id)" if in_shards else "id"
    listed = ", ".join(f"{sql} AS {quoted(name)}" for name, sql in columns.items())
    database.execute(
        f"""CREATE TABLE new AS
        WITH record AS (SELECT {listed} FROM {CHOSEN_CLIPS}),
        file AS (
            SELECT id, row_number() OVER ({IN_SCRIPT_ORDER}) AS _place, {path} AS _source, {size} AS _bytes,
                {sample} AS _sample, '' AS _group, NULL::{ENCODED} AS _encoded
            FROM {CHOSEN_CLIPS}
        )
        SELECT record.*, file.* EXCLUDE (id), sha256(concat_ws(' ', _source, sha256, _bytes)) AS _content,
            sha256(concat(to_json(record), _source)) AS _signature
        FROM record JOIN file USING (id)"""
    )


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _flat(name: str, type_: str) -> str:
    """Return the SQL of a column as a boolean, an integer, a finite number or text, which all formats have."""
    column = quoted(name)
    if type_ in ("BOOLEAN", "VARCHAR", "BIGINT"):
        return column
    if type_ in ("TINYINT", "SMALLINT", "INTEGER", "UTINYINT", "USMALLINT", "UINTEGER"):
        return f"{column}::BIGINT"
    if type_ in ("FLOAT", "DOUBLE", "HUGEINT", "UBIGINT") or type_.startswith("DECIMAL"):
        return f"CASE WHEN isfinite({column}::DOUBLE) THEN {column}::DOUBLE END"
    return f"{column}::VARCHAR" if type_.startswith(("TIMESTAMP", "DATE", "JSON")) else f"to_json({column})::VARCHAR"


def _caption(database: duckdb.DuckDBPyConnection, template: str) -> str:
    """Return the SQL of captions. Prints how many chosen clips have no value of a name in it."""
    parts = _caption_parts(database, template)
    for name, value in parts:
        empty = f"{CHOSEN_CLIPS} WHERE coalesce(trim({value}), '') = ''"
        if name and (number := row_count(database, empty)):
            ((example,),) = database.execute(f"SELECT min(id) FROM {empty}").fetchall()
            note(f"--caption: {{{name}}} is empty for {count(number, 'clip')}, such as {example}")
    return f"concat('', {', '.join(value for _, value in parts)})" if parts else "''"


def _caption_parts(database: duckdb.DuckDBPyConnection, template: str) -> list[tuple[str | None, str]]:
    """Return the parts of a caption: the name of the column or of the metadata, or `None` for text, and its SQL."""
    columns = columns_of(database, "clips")
    found = f"SELECT DISTINCT unnest(json_keys(metadata)) AS key FROM {CHOSEN_CLIPS} ORDER BY key"
    keys = [f"metadata.{key}" for (key,) in database.execute(found).fetchall()]
    parts: list[tuple[str | None, str]] = []
    try:
        fields = list(Formatter().parse(template))
    except ValueError as error:
        raise UsageError(f"--caption: got {template!r}: {error}; braces that are text are written twice") from None
    for text, name, form, conversion in fields:
        parts.append((None, _text(text)))
        if name is None:
            continue
        # `metadata.a.b` is `b` of `a`.
        path = name.split(".")
        if form or conversion or not (name in columns or (".".join(path[:2]) in keys and '"' not in name)):
            problem = without_score(database, name) or f"unknown name {{{name}}}, must be one of {', '.join([*keys, *columns])}"
            raise UsageError(f"--caption: {problem}")
        value = f"{quoted(name)}::VARCHAR"
        if name not in columns:
            value = f"json_extract_string(metadata, {_text('$' + ''.join(f'.{quoted(part)}' for part in path[1:]))})"
        parts.append((name, value))
    return parts


class Group(NamedTuple):
    """Clips that belong into one split."""

    number: int
    key: str
    """The smallest of its keys, such as `prompt a boat`."""
    place: float
    """A number from 0 to 1 that depends only on the key."""
    clips: int
    splits: list[str]
    """Splits of its clips that are exported already."""


def assign_splits(
    database: duckdb.DuckDBPyConnection,
    splits: Mapping[str, float],
    by: Sequence[SplitKey],
    known: Mapping[str, str] | None = None,
    *,
    train_all: bool = False,
) -> dict[str, str]:
    """Create the table `splits` with the split of each id in `chosen`.

    Return place -> split for the next call: of all groups below RECORDED_GROUPS, otherwise where the hash gives another one.

    A group keeps its split: that of its exported clips (table `done`), or the one in `known`, which an earlier call returned.
    That of another group follows from the hash of its smallest key, so that it does not depend on the other clips. Few groups
    are divided as near to the shares as whole groups allow, as are many if their hashes miss the shares.
    `train_all`: give the largest split clips of each person.
    Raises UsageError if clips connect groups of several splits, or there are fewer groups than splits.
    """
    if len(splits) == 1 or not row_count(database, "chosen"):
        database.execute(f"CREATE TABLE splits AS SELECT id, '{next(iter(splits))}' AS split FROM chosen")
        return dict(known or {})
    if "prompt" in by and (unknown := row_count(database, f"{CHOSEN_CLIPS} WHERE {HAS_NO_LINE_PROMPT}")):
        note(
            f"{count(unknown, 'clip')} without the prompt of the line, so prompts with triggers and descriptions are compared; "
            "render the script again, which only records them, and export to another folder"
        )
    groups = _groups(database, by)
    if connected := next((group for group in groups if len(group.splits) > 1), None):
        raise _connected(database, connected, by)
    ends, names = [*accumulate(splits.values())], [*splits]
    known, are_few = dict(known or {}), len(groups) < FEW_GROUPS
    found = {group.number: group.splits[0] if group.splits else known.get(str(group.place)) for group in groups}
    kept = {number: split for number, split in found.items() if split is not None}
    hashed = {group.number: names[min(bisect(ends, group.place), len(names) - 1)] for group in groups}
    is_first, chosen = not kept, hashed | kept
    if are_few or (is_first and _missed(groups, chosen, splits)):
        chosen = _nearest(groups, hashed, kept, splits)
    if train_all:
        chosen |= _moved_to_training(database, groups, chosen, kept, splits)
    if is_first:
        _check_shares(groups, chosen, splits, by)
    table = pyarrow.table({"number": [*chosen], "split": pyarrow.array(chosen.values(), pyarrow.string())})
    database.register("chosen_splits", table)
    database.execute("CREATE TABLE splits AS SELECT id, split FROM members JOIN chosen_splits USING (number)")
    by_number = {group.number: str(group.place) for group in groups}
    are_recorded = len(groups) < RECORDED_GROUPS
    return known | {by_number[each]: split for each, split in chosen.items() if are_recorded or split != hashed[each]}


def _moved_to_training(
    database: duckdb.DuckDBPyConnection,
    groups: Sequence[Group],
    chosen: Mapping[int, str],
    kept: Mapping[int, str],
    splits: Mapping[str, float],
) -> dict[int, str]:
    """Return number -> largest split, of the largest group of each person who has no clip in that split.

    Prints who stays without one, since all clips of that person are in `kept`.
    """
    training = max(splits, key=lambda name: splits[name])
    sizes = {group.number: (group.clips, group.place) for group in groups}
    moved = dict[int, str]()
    persons = f"SELECT key, list(DISTINCT number) FROM ({_KEYS['character']}) JOIN members USING (id) GROUP BY key ORDER BY key"
    for person, numbers in database.execute(persons).fetchall():
        if any(moved.get(number, chosen[number]) == training for number in numbers):
            continue
        if free := [number for number in numbers if number not in kept]:
            moved[max(free, key=lambda number: sizes[number])] = training
        else:
            note(f"{training} has no clip of {shortened_value(person)}; export to another folder to divide all clips again")
    return moved


def _nearest(
    groups: Sequence[Group], hashed: Mapping[int, str], kept: Mapping[int, str], splits: Mapping[str, float]
) -> dict[int, str]:
    """Return number -> split of all groups, with the smallest sum of differences to the shares, and no empty split if possible.

    Of equal divisions, the one with the most clips in the split of their hash is returned. Exact for few groups.
    """
    names = [*splits]
    targets = [share * sum(group.clips for group in groups) for share in splits.values()]
    # The largest first.
    free = sorted((group for group in groups if group.number not in kept), key=lambda group: (-group.clips, group.place))
    loads = tuple(sum(group.clips for group in groups if kept.get(group.number) == name) for name in names)
    found: dict[tuple[int, ...], tuple[int, tuple[int, ...]]] = {loads: (0, ())}
    """Clips per split -> clips that are in the split of their hash, and the split of each group so far."""
    width = max(1, MAX_DIVISIONS // max(1, len(free)))
    for group in free:
        further: dict[tuple[int, ...], tuple[int, tuple[int, ...]]] = {}
        for loads, (alike, places) in found.items():
            for place, name in enumerate(names):
                added = (*loads[:place], loads[place] + group.clips, *loads[place + 1 :])
                division = (alike + group.clips * (hashed[group.number] == name), (*places, place))
                if added not in further or further[added] < division:
                    further[added] = division
        if len(further) > width:
            nearest = sorted(further, key=lambda loads: math.dist(loads, targets))
            further = {loads: further[loads] for loads in nearest[:width]}
        found = further

    def distance(loads: tuple[int, ...]) -> tuple[float, ...]:
        deviation = sum(abs(load - target) for load, target in zip(loads, targets, strict=True))
        return loads.count(0), round(deviation, 6), -found[loads][0], *loads

    _, places = found[min(found, key=distance)]
    return {**kept, **{group.number: names[place] for group, place in zip(free, places, strict=True)}}


def _groups(database: duckdb.DuckDBPyConnection, by: Sequence[SplitKey]) -> list[Group]:
    """Create the table `members` with the group of each id in `chosen`. Return the groups, sorted by their keys."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    keys = " UNION ALL ".join([*(_KEYS[name] for name in by), CHAINS])
    rank = "dense_rank() OVER (ORDER BY {}) - 1"
    database.execute(f"CREATE TABLE keys AS SELECT *, {rank.format('id')} AS shot, {rank.format('key')} AS rank FROM ({keys})")
    edges = database.execute("SELECT shot, rank FROM keys").fetchnumpy()
    shots, ranks = (np.asarray(edges[name], np.int64) for name in ("shot", "rank"))
    ranks += shots.max() + 1
    size = int(ranks.max()) + 1
    graph = coo_array((np.ones(len(shots), bool), (shots, ranks)), (size, size))
    _, labels = connected_components(graph, directed=False)
    database.register("labels", pyarrow.table({"shot": np.arange(size), "number": labels}))
    members = "SELECT DISTINCT id, number FROM keys SEMI JOIN chosen USING (id) JOIN labels USING (shot)"
    database.execute(f"CREATE TABLE members AS {members}")
    found = database.execute(
        """SELECT number, min(key) AS first, ('0x' || left(sha256(first), 13))::BIGINT / 16.0 ** 13, count(DISTINCT id),
            coalesce(list_sort(list(DISTINCT split) FILTER (split IS NOT NULL)), [])
        FROM members JOIN keys USING (id) LEFT JOIN done USING (id) GROUP BY number ORDER BY first"""
    )
    return [Group(*row) for row in found.fetchall()]


def _missed(groups: Sequence[Group], chosen: Mapping[int, str], splits: Mapping[str, float]) -> dict[str, int]:
    """Return split -> clips of the splits that are empty, or far from their share."""
    sizes = Counter[str]()
    for group in groups:
        sizes[chosen[group.number]] += group.clips
    expected = {name: share * sizes.total() for name, share in splits.items()}
    return {
        name: sizes[name] for name, clips in expected.items() if not sizes[name] or abs(sizes[name] - clips) > max(clips / 2, 1)
    }


def _check_shares(
    groups: Sequence[Group], chosen: Mapping[int, str], splits: Mapping[str, float], by: Sequence[SplitKey]
) -> None:
    """Print which splits are far from their share, or raise UsageError if one is empty."""
    largest, total = max(groups, key=lambda group: group.clips), sum(group.clips for group in groups)
    others = [key for key in _KEYS if key not in by] if len(by) == 1 else by
    for name, size in sorted(_missed(groups, chosen, splits).items(), key=lambda item: item[1]):
        text = (
            f"--split {name}={splits[name]:g}: {{}} {size:,} of {total:,} clips. Clips of the same "
            f"{' or '.join(by)}, or of a continued chain, are never divided; the largest such group, with "
            f"{shortened_value(largest.key)}, has {count(largest.clips, 'clip')}. Try "
            f"{', '.join(f'--split-by {key}' for key in others)}, or other shares"
        )
        if not size:
            raise UsageError(text.format("would have"))
        note(text.format("has"))


def _connected(database: duckdb.DuckDBPyConnection, group: Group, by: Sequence[SplitKey]) -> UsageError:
    """Return the error of clips that connect clips of several splits."""
    rows = database.execute(
        "SELECT id, split FROM members LEFT JOIN done USING (id) WHERE number = ? ORDER BY id", [group.number]
    ).fetchall()
    new = ", ".join([id_ for id_, split in rows if split is None][:3]) or "a changed clip"
    known = " and ".join(f"{next(id_ for id_, split in rows if split == name)} of {name}" for name in group.splits)
    return UsageError(
        f"--split-by {','.join(by)}: {new} connects {known}, through {shortened_value(group.key)} or other keys. Exported "
        "clips keep their split: leave the new clips out with --where, or export to another folder"
    )
