"""Compare the clips of an output folder by what differs between them: the values of a `matrix`, choices, or settings.

Differences between two levels of a factor are taken within pairs: clips of one prompt and seed that are equal in all other
factors. Intervals are 95 % percentile bootstrap intervals over prompts, since the clips of one prompt are not independent.
"""

from __future__ import annotations

import json
import math
import operator
import sys
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow
from numpy.typing import NDArray
from scipy import stats

from vidgen_ray.dataset.tables import DIGEST, IN_SCRIPT_ORDER, open_tables, quoted
from vidgen_ray.errors import UsageError
from vidgen_ray.outputs.manifest import SCHEMA, SETTINGS
from vidgen_ray.outputs.storage import Storage
from vidgen_ray.report.gallery_page import FILE_AXES
from vidgen_ray.report.shot_text import short_names, value_text
from vidgen_ray.script.expansion import MATRIX
from vidgen_ray.shot import LORA_FIELDS, NESTED_FIELDS

Array = NDArray[np.float64]
Codes = NDArray[np.int64]

FOLDER = "folder"
"""Factor of two folders."""
CONFIDENCE, RESAMPLES, SEED = 0.95, 5000, 0
MIN_GROUPS = 5
"""Pairs, and prompts, that an interval needs."""
MAX_GROUPS = 500
"""Groups that are resampled. More prompts are resampled in blocks of several, each with prompts of the whole script."""
MAX_LEVELS = 50
EXTREMES = 2
"""Pairs with the largest rise, and with the largest fall, that are listed per measure."""
LIKENESS = ("clip_likeness_mean", "clip_likeness_worst", "image_likeness", "frames_without_face")
RESULTS = {
    "accepted": "CASE verdict WHEN 'accept' THEN 1 WHEN 'reject' THEN 0 END",
    "stars": "stars",
    "seconds": "seconds",
    "cost": "cost",
    "file_bytes": "coalesce(hd_video_bytes, video_bytes, image_bytes)",
}
"""Measure -> SQL. `accepted`: 1 or 0 for a reviewed clip, so that its mean is the share of accepted clips."""
NUMERIC = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER", "FLOAT", "DOUBLE", "BOOLEAN")
FACES, MOTION = ("clip_likeness_mean", "likeness", "image_likeness"), ("motion_share", "motion")
"""Measures for likeness against motion. The first that exists is used."""
SETTING_COLUMNS = tuple(
    name for name in dict.fromkeys(("mode", "width", "height", "num_frames", "fps", *SETTINGS)) if name in SCHEMA.names
)
INTERVAL = (
    f"{CONFIDENCE:.0%} percentile bootstrap over prompts, {RESAMPLES:,} resamples, widened for few prompts (Hesterberg 2015); "
    f"none below {MIN_GROUPS} prompts"
)


class Clips(NamedTuple):
    """Finished clips of one or two folders in the order of their scripts, as columns."""

    ids: list[str]
    folders: list[int]
    prompts: list[str]
    units: list[str]
    """The prompt. If the prompts of a line differ by a factor: the line, or the prompt of its matrix."""
    seeds: list[int | None]
    files: list[tuple[str | None, str | None]]
    """Clip and image, relative to the output folder. The clip of a shot without video is the image."""
    factors: list[dict[str, str]]
    """Name of a factor -> value as JSON. Clips that lack a factor do not belong to it."""
    settings: list[dict[str, str]]
    """Setting -> value as JSON."""
    measures: list[str]
    values: Array
    """(clips, measures), NaN for null."""


def compare(storages: Sequence[Storage], names: Sequence[str] = (), reference: str | None = None) -> dict[str, Any]:
    """Return the comparison of the clips of an output folder, or of two, as JSON data.

    `names`: factors. Default: all. `reference`: level that the others are compared with. Default: the first of the script.
    Raises UsageError for an unknown factor or level, and if the clips differ in no setting.
    """
    clips = _joined([_load(storage, number, len(storages) > 1) for number, storage in enumerate(storages)])
    also_differ: dict[str, list[str]] = defaultdict(list)
    if len(storages) == 2:
        texts = short_names([storage.url for storage in storages])
        for factors, number in zip(clips.factors, clips.folders, strict=True):
            factors[FOLDER] = json.dumps(texts[storages[number].url])
        also_differ[FOLDER] = _settings_of_folders(clips)
        kinds = {FOLDER: "folder"}
    else:
        kinds = dict.fromkeys((name for factors in clips.factors for name in factors), "script")
        kinds |= dict.fromkeys(_add_setting_factors(clips, also_differ), "setting")
    levels = {name: _levels(clips, name) for name in kinds}
    varied = {name: values for name, values in levels.items() if 1 < len(values) <= MAX_LEVELS}
    if not varied:
        raise UsageError(
            f"{storages[0].url}: its clips differ in no setting; compare those of a script with a `matrix`, or two folders"
        )
    if unknown := [name for name in names if name not in varied]:
        raise UsageError(f"--factor {unknown[0]}: must be one of {', '.join(varied)}")
    chosen = {name: varied[name] for name in names or varied}
    if reference is not None and not any(reference in level_texts(name, each).values() for name, each in chosen.items()):
        known = "; ".join(f"{name}: {', '.join(level_texts(name, each).values())}" for name, each in chosen.items())
        raise UsageError(f"--reference {reference}: must be a level ({known})")
    return {
        "folders": [storage.url for storage in storages],
        "clips": len(clips.ids),
        "interval": INTERVAL,
        "left_out": {name: len(values) for name, values in levels.items() if len(values) > MAX_LEVELS},
        "factors": [
            {"name": name, "kind": kinds[name], "also_differ": also_differ[name], **_factor(clips, name, each, reference)}
            for name, each in chosen.items()
        ],
    }


# ---- clips and their factors


def _load(storage: Storage, number: int, all_settings: bool) -> Clips:
    """Return the clips of a folder. Without `all_settings`, clips of a matrix or with choices have none."""
    with open_tables(storage) as database:
        scores = [
            name for name, kind, *_ in database.execute("DESCRIBE scores").fetchall() if name != DIGEST and kind in NUMERIC
        ]
        results = {name: sql for name, sql in RESULTS.items() if sql != name or name in (*SCHEMA.names, "stars")}
        measures = {**{name: name for name in LIKENESS}, **{name: quoted(name) for name in scores}, **results}
        columns = ", ".join(f"({sql})::DOUBLE AS {quoted(name)}" for name, sql in measures.items())
        settings = ", ".join(f"to_json({name}) AS {name}" for name in SETTING_COLUMNS)
        table = database.sql(
            f"SELECT id, script, line, coalesce(prompt, '') AS prompt, metadata->>'$.{MATRIX}.prompt' AS raw_prompt, factors, "
            f"coalesce(try_cast(metadata->>'$.{MATRIX}.seed' AS BIGINT), seed) AS seed, clip, image, {settings}, {columns} "
            f"FROM clips WHERE status = 'done' {IN_SCRIPT_ORDER}"
        ).to_arrow_table()
    values = np.stack([table.column(name).to_numpy(zero_copy_only=False) for name in measures], axis=1).astype(float)
    rows = table.select([name for name in table.column_names if name not in {*measures, *SETTING_COLUMNS}]).to_pylist()
    texts = defaultdict[tuple[str, int], set[str]](set)
    for row in rows:
        texts[row["script"], row["line"]].add(row["prompt"])
    factors = [
        {name: json.dumps(value) for name, value in json.loads(row["factors"]).items() if name != "prompt"} for row in rows
    ]
    units = [
        row["raw_prompt"] or (f"{place[0]}, line {place[1]}" if own and place[1] and len(texts[place]) > 1 else row["prompt"])
        for row, own in zip(rows, factors, strict=True)
        for place in [(row["script"], row["line"])]
    ]
    shown = [position for position, own in enumerate(factors) if all_settings or not own]
    settings_of = dict(
        zip(shown, map(_settings, table.select(SETTING_COLUMNS).take(pyarrow.array(shown, "int64")).to_pylist()), strict=True)
    )
    return Clips(
        ids=[row["id"] for row in rows],
        folders=[number] * len(rows),
        prompts=[row["prompt"] for row in rows],
        units=units,
        seeds=[row["seed"] for row in rows],
        files=[(row["clip"], row["image"]) for row in rows],
        factors=factors,
        settings=[settings_of.get(position, {}) for position in range(len(rows))],
        measures=list(measures),
        values=values,
    )


def _settings(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the settings of a clip, with an entry per stage, and with the weights of LoRAs apart from their files."""
    settings: dict[str, str] = {}
    for name in SETTING_COLUMNS:
        text = row[name] or "null"
        if name in NESTED_FIELDS:
            settings |= {f"{name}.{stage}": json.dumps(value) for stage, value in (json.loads(text) or {}).items()}
        elif name in LORA_FIELDS:
            loras = json.loads(text) or []
            weights = [lora["weight"] for lora in loras]
            settings[name] = json.dumps([lora["path"] for lora in loras])
            settings[f"{name}.weight"] = json.dumps(weights[0] if len(weights) == 1 else weights)
        else:
            settings[name] = text
    return {name: sys.intern(text) for name, text in settings.items()}


def _joined(parts: Sequence[Clips]) -> Clips:
    if len(parts) == 1:
        return parts[0]
    measures = list(dict.fromkeys(name for part in parts for name in part.measures))
    values = np.full((sum(len(part.ids) for part in parts), len(measures)), math.nan)
    begin = 0
    for part in parts:
        values[begin : begin + len(part.ids), [measures.index(name) for name in part.measures]] = part.values
        begin += len(part.ids)
    lists = {
        name: [each for part in parts for each in getattr(part, name)]
        for name in Clips._fields
        if name not in ("measures", "values")
    }
    # The same line has the same prompt in both scripts, which may have different names.
    return Clips(**{**lists, "units": lists["prompts"]}, measures=measures, values=values)


def _add_setting_factors(clips: Clips, also_differ: dict[str, list[str]]) -> list[str]:
    """Make factors of the settings that differ between clips of one prompt without a matrix and choices. Return their names.

    Of settings that always change together, the first with the most levels is the factor. The others are added to
    `also_differ`.
    """
    rows = [number for number, factors in enumerate(clips.factors) if not factors]
    seen = defaultdict[tuple[str, str], set[str]](set)
    for row in rows:
        for name, value in clips.settings[row].items():
            seen[name, clips.units[row]].add(value)
    differing = dict.fromkeys(name for (name, _), values in seen.items() if len(values) > 1)
    values_of = {name: [clips.settings[row].get(name, "null") for row in rows] for name in differing}
    kept: list[str] = []
    for name in sorted(differing, key=lambda name: -len(set(values_of[name]))):
        same = next((other for other in kept if _follows(values_of[name], values_of[other])), None)
        if same is None:
            kept.append(name)
        else:
            also_differ[same].append(name)
    for name in kept:
        for row, value in zip(rows, values_of[name], strict=True):
            clips.factors[row][name] = value
    return kept


def _follows(values: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether each of the other values always comes with the same value."""
    return len(set(zip(others, values, strict=True))) == len(set(others))


def _settings_of_folders(clips: Clips) -> list[str]:
    """Return the settings that differ between clips of the same id, with `OLD -> NEW` if it is the same for all of them."""
    old = {shot_id: each for shot_id, each, number in zip(clips.ids, clips.settings, clips.folders, strict=True) if not number}
    changes = defaultdict[str, set[tuple[str, str]]](set)
    for shot_id, settings, number in zip(clips.ids, clips.settings, clips.folders, strict=True):
        if number and shot_id in old:
            for name in dict.fromkeys((*old[shot_id], *settings)):
                before, after = (each.get(name, "null") for each in (old[shot_id], settings))
                if before != after:
                    changes[name].add((before, after))
    return [
        f"{name} {' -> '.join(value_text(json.loads(value)) for value in min(values))}" if len(values) == 1 else name
        for name, values in changes.items()
    ]


def _levels(clips: Clips, name: str) -> list[str]:
    """Return the values of a factor: numbers by size, others in the order of the script."""
    values = list(dict.fromkeys(factors[name] for factors in clips.factors if name in factors))
    return sorted(values, key=json.loads) if is_numeric(values) else values


def is_numeric(levels: Iterable[str]) -> bool:
    return all(type(json.loads(level)) in (int, float) for level in levels)


def level_texts(name: str, levels: Sequence[str]) -> dict[str, str]:
    """Return value -> its text, which is short for files."""
    texts = {level: value_text(json.loads(level)) or "(empty)" for level in levels}
    names = short_names(texts.values()) if name in FILE_AXES or name == "start_image" else {}
    return {level: names.get(text, text) for level, text in texts.items()}


# ---- one factor


def _factor(clips: Clips, name: str, levels: Sequence[str], reference_text: str | None) -> dict[str, Any]:
    texts = level_texts(name, levels)
    rows = np.array([number for number, factors in enumerate(clips.factors) if name in factors])
    first = clips.factors[rows[0]][name]
    reference = next((level for level, text in texts.items() if text == reference_text), first)
    level_of = np.array([levels.index(clips.factors[row][name]) for row in rows])
    values, units = clips.values[rows], _codes(clips.units[row] for row in rows)
    present = np.stack([np.isfinite(values[level_of == number]).any(0) for number in range(len(levels))])
    kept = np.flatnonzero(present.sum(0) > 1)
    measures = [clips.measures[number] for number in kept]
    values = values[:, kept]
    paired_by, cells = _pairing(clips, name, rows, level_of, levels.index(reference))
    group_of_cell = np.zeros(cells.max() + 1, np.int64)
    group_of_cell[cells[::-1]] = units[::-1]
    is_reference = level_of == levels.index(reference)
    before = _cell_means(values[is_reference], cells[is_reference], len(group_of_cell))
    described, extremes = [], defaultdict[str, list[dict[str, Any]]](list)
    for number, level in enumerate(levels):
        is_level = level_of == number
        sums, counts = _sums(values[is_level], units[is_level], units.max() + 1)
        about = {
            "level": texts[level],
            "value": json.loads(level),
            "clips": int(is_level.sum()),
            "prompts": len(set(units[is_level])),
            "measures": {measure: _estimate(*each) for measure, each in zip(measures, _columns(sums, counts), strict=True)},
        }
        if level != reference:
            after = _cell_means(values[is_level], cells[is_level], len(group_of_cell))
            differences = after - before
            in_both = np.isin(cells, cells[is_level]) & np.isin(cells, cells[is_reference])
            sums, counts = _sums(differences, group_of_cell, units.max() + 1)
            about["unpaired"] = int((~in_both[is_level | is_reference]).sum())
            about["differences"] = {
                measure: _estimate(*each, "pairs") for measure, each in zip(measures, _columns(sums, counts), strict=True)
            }
            for column, measure in enumerate(measures):
                for cell in _extreme_cells(differences[:, column], group_of_cell):
                    pair = [rows[np.flatnonzero(side & (cells == cell))[0]] for side in (is_reference, is_level)]
                    shown = [_clip(clips, row, kept[column]) for row in pair]
                    change = _number(differences[cell, column])
                    extremes[measure].append({"level": texts[level], "difference": change, "clips": shown})
        described.append(about)
    return {
        "numeric": is_numeric(levels),
        "reference": texts[reference],
        "paired_by": paired_by,
        "clips": len(rows),
        "clips_without": len(clips.ids) - len(rows),
        "measures": measures,
        "left_out": {
            measure: f"has values for {count} of {len(levels)} levels"
            for measure, count in zip(clips.measures, present.sum(0).tolist(), strict=True)
            if count < 2
        },
        "levels": described,
        "pareto": _pareto(described, measures),
        "extremes": {measure: _largest(found) for measure, found in extremes.items()},
    }


def _pairing(clips: Clips, name: str, rows: Codes, level_of: Codes, reference: int) -> tuple[str, Codes]:
    """Return how clips are paired, and the number of the cell of each: clips of one cell differ only in the factor.

    The way that gives the most pairs is used. Clips of a line get different seeds unless the script sets one.
    """
    others = [tuple(sorted((key, value) for key, value in clips.factors[row].items() if key != name)) for row in rows]
    unit = [clips.units[row] for row in rows]
    ways = {"prompt and seed": _codes(zip(unit, (clips.seeds[row] for row in rows), others, strict=True))}
    if name == FOLDER:
        ways["id"] = _codes(clips.ids[row] for row in rows)
    ways["prompt, as means over seeds"] = _codes(zip(unit, others, strict=True))

    def pairs(way: str) -> int:
        with_reference = set(ways[way][level_of == reference].tolist())
        found = set(zip(ways[way].tolist(), level_of.tolist(), strict=True))
        return sum(cell in with_reference and level != reference for cell, level in found)

    best = max(ways, key=pairs)
    return best, ways[best]


def _codes(keys: Iterable[Hashable]) -> Codes:
    """Return a number for each key, the same for equal ones, in the order in which they first appear."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)


def _sums(values: Array, groups: Codes, n_groups: int) -> tuple[Array, Array]:
    """Return sum and count of the finite values per group and measure, each (groups, measures)."""
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    columns = range(values.shape[1])
    sums = np.array([np.bincount(groups, filled[:, column], n_groups) for column in columns], float)
    counts = np.array([np.bincount(groups, known[:, column], n_groups) for column in columns], float)
    return sums.reshape(-1, n_groups).T, counts.reshape(-1, n_groups).T


def _cell_means(values: Array, cells: Codes, n_cells: int) -> Array:
    sums, counts = _sums(values, cells, n_cells)
    means: Array = np.divide(sums, counts, out=np.full(sums.shape, math.nan), where=counts > 0)
    return means


def _columns(sums: Array, counts: Array) -> Iterator[tuple[Array, Array]]:
    for column in range(sums.shape[1]):
        has = counts[:, column] > 0
        yield sums[has, column], counts[has, column]


def _estimate(sums: Array, counts: Array, unit: str = "clips") -> dict[str, Any]:
    """Return count, mean and interval of values in groups, each with the sum and the count of its values."""
    n, groups = int(counts.sum()), len(sums)
    estimate = {unit: n, "mean": _number(sums.sum() / n) if n else None, "low": None, "high": None}
    if groups < MIN_GROUPS:
        few = f"{n} {unit}" if groups == n else f"{n} {unit} of {groups} prompt{'s' if groups > 1 else ''}"
        return {**estimate, "reason": f"{few}; an interval needs {MIN_GROUPS} prompts"}
    low, high = interval(sums, counts)
    return {**estimate, "low": _number(low), "high": _number(high)}


def interval(sums: Array, counts: Array) -> tuple[float, float]:
    """Return the interval of the mean of values in independent groups, by resampling groups.

    `sums`, `counts`: (groups,) sum and number of the values of each group. The percentiles are widened as a t-interval is
    compared with a normal one, since a resample of few groups varies too little.
    Source: Hesterberg 2015, What Teachers Should Know About the Bootstrap, arXiv:1411.5279, section 4.5.
    """
    if len(sums) > MAX_GROUPS:
        blocks = np.arange(len(sums)) % MAX_GROUPS
        sums, counts = (np.bincount(blocks, each).astype(float) for each in (sums, counts))
    n = len(sums)
    drawn = _resamples(n)
    tail = stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    low, high = np.quantile((drawn @ sums) / (drawn @ counts), [tail, 1 - tail])
    return float(low), float(high)


@lru_cache(4)
def _resamples(n: int) -> Array:
    """Return (resamples, n): how often each of n groups is drawn."""
    drawn = np.random.default_rng(SEED).integers(0, n, (RESAMPLES, n)) + n * np.arange(RESAMPLES)[:, None]
    return np.bincount(drawn.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n).astype(float)


def _extreme_cells(differences: Array, prompts: Codes) -> list[int]:
    """Return the cells with the largest rises and falls, at most one per prompt for each."""
    known = np.flatnonzero(np.isfinite(differences) & (differences != 0))
    falling = known[np.argsort(differences[known], kind="stable")]
    found = []
    for order, sign in ((falling[::-1], 1), (falling, -1)):
        _, first = np.unique(prompts[order], return_index=True)
        found += [int(cell) for cell in order[np.sort(first)[:EXTREMES]] if differences[cell] * sign > 0]
    return found


def _largest(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the pairs with the largest rises, and then those with the largest falls, over all levels."""
    falling = sorted(found, key=lambda pair: float(pair["difference"]))
    largest = []
    for order, sign in ((falling[::-1], 1), (falling, -1)):
        of_prompt: dict[str, dict[str, Any]] = {}
        for pair in order:
            if pair["difference"] * sign > 0:
                of_prompt.setdefault(pair["clips"][0]["prompt"], pair)
        largest += list(of_prompt.values())[:EXTREMES]
    return largest


def _clip(clips: Clips, row: int, measure: int) -> dict[str, Any]:
    file, image = clips.files[row]
    return {
        "id": clips.ids[row],
        "folder": clips.folders[row],
        "file": file,
        "image": image,
        "prompt": clips.prompts[row],
        "seed": clips.seeds[row],
        "value": _number(clips.values[row, measure]),
    }


def _pareto(levels: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> dict[str, Any] | None:
    """Return for each level those that exceed it: in the mean of likeness or motion, and not less in the other.

    `None` if one of the two is not measured.
    """
    axes = [next((name for name in names if name in measures), None) for names in (FACES, MOTION)]
    if None in axes:
        return None
    means = {level["level"]: [level["measures"][axis]["mean"] for axis in axes] for level in levels}
    points = {level: point for level, point in means.items() if None not in point}
    exceeded_by = {
        level: [other for other, better in points.items() if better != point and all(map(operator.ge, better, point))]
        for level, point in points.items()
    }
    return {"measures": axes, "exceeded_by": exceeded_by}


def _number(value: float) -> float | None:
    """Return the value with 6 digits, `None` for NaN."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
