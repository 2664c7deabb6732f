"""Compare the clips of an output folder by what differs between them: the values of a `matrix`, choices, or settings.

Differences between two levels of a factor are taken within pairs: clips of one prompt or line, and of one seed, that are equal
in all other factors. Intervals are 95 % percentile bootstrap intervals over prompts, since the clips of one prompt are not
independent.
`compare.html` has plots (SVG), tables and the clips that differ most, and needs no network. `compare.json` has its data.
"""

from __future__ import annotations

import json
import math
import operator
import os
import posixpath
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import pyarrow
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from numpy.typing import NDArray
from scipy import stats

from vidgen_ray.dataset.lineage import changes, flat_settings
from vidgen_ray.dataset.tables import (
    HAS_NO_LINE_PROMPT,
    IN_SCRIPT_ORDER,
    NUMBERS,
    SAME_PROMPT,
    columns_of,
    open_tables,
    quoted,
    unscored,
)
from vidgen_ray.errors import UsageError
from vidgen_ray.outputs.manifest import SETTINGS
from vidgen_ray.outputs.storage import Storage
from vidgen_ray.report.gallery_page import FILE_AXES, LOOK, add_thumbnails
from vidgen_ray.report.shot_text import short_names, value_text
from vidgen_ray.shot import MATRIX
from vidgen_ray.system.quantities import count, size

Array = NDArray[np.float64]
Codes = NDArray[np.int64]

_FOLDER = "folder"
"""Factor of two folders."""
CONFIDENCE, RESAMPLES, _SEED = 0.95, 5000, 0
MIN_GROUPS = 5
"""Pairs, and prompts, that an interval needs."""
MAX_GROUPS = 500
"""Groups that are resampled. More prompts are resampled in blocks of several, each with prompts of the whole script."""
MAX_LEVELS = 50
EXTREMES = 2
"""Pairs with the largest rise, and with the largest fall, that are listed per measure."""
_LIKENESS = ("clip_likeness_mean", "clip_likeness_worst", "image_likeness", "frames_without_face")
_RESULTS = {
    "accepted": "CASE verdict WHEN 'accept' THEN 1 WHEN 'reject' THEN 0 END",
    "stars": "stars",
    "seconds": "seconds",
    "cost": "cost",
    "file_bytes": "coalesce(hd_video_bytes, video_bytes, image_bytes)",
}
"""Measure -> SQL. `accepted`: 1 or 0 for a reviewed clip, so that its mean is the share of accepted clips."""
_FACES, MOTION = ("clip_likeness_mean", "likeness", "image_likeness"), ("motion_share", "motion")
"""Measures for likeness against motion. The first that exists is used."""
SETTING_COLUMNS = ("mode", "width", "height", "num_frames", "fps", *SETTINGS)
INTERVAL = (
    f"{CONFIDENCE:.0%} percentile bootstrap over prompts, {RESAMPLES:,} resamples, widened for few prompts (Hesterberg 2015); "
    f"none below {MIN_GROUPS} prompts"
)


class Clips(NamedTuple):
    """Finished clips of one or two folders in the order of their scripts."""

    rows: list[dict[str, Any]]
    """`id`, `folder` (number), `line` (script and number), `file` (clip, or image of a shot without video), `image`, `prompt`,
    `seed`, `factors` (name -> value as JSON), `settings` (name -> value), and `unit`: the prompt of the line. If the
    prompts of a line differ by a factor and that of the line is not recorded, the unit is the line."""
    measures: list[str]
    values: Array
    """(clips, measures), NaN for null."""
    unscored: list[str]
    """Texts about clips that were not measured."""


def compare_clips(storages: Sequence[Storage], names: Sequence[str] = (), reference: str | None = None) -> dict[str, Any]:
    """Return the comparison of the clips of an output folder, or of two, as JSON data.

    `names`: factors. Default: all. `reference`: level that the others are compared with. Default: the first of the script.
    Raises UsageError for an unknown factor or level, and if the clips differ in no setting.
    """
    rows, measures, values, texts_of_unscored = _load(storages)
    also_differ: dict[str, list[str]] = defaultdict(list)
    if len(storages) == 2:
        texts = short_names([storage.url for storage in storages])
        for row in rows:
            row["factors"][_FOLDER] = json.dumps(texts[storages[row["folder"]].url])
        also_differ[_FOLDER] = _settings_of_folders(rows)
        levels = {_FOLDER: _levels(rows, _FOLDER)}
    else:
        _add_setting_factors(rows, also_differ)
        levels = {name: _levels(rows, name) for name in dict.fromkeys(name for row in rows for name in row["factors"])}
    varied = {name: each for name, each in levels.items() if 1 < len(each) <= MAX_LEVELS}
    if not varied:
        raise UsageError(
            f"{storages[0].url}: its clips differ in no setting; compare those of a script with a `matrix`, or two folders"
        )
    if unknown := [name for name in names if name not in varied]:
        raise UsageError(f"--factor {unknown[0]}: must be one of {', '.join(varied)}")
    chosen = {name: varied[name] for name in names or varied}
    if reference is not None and not any(reference in each.values() for each in chosen.values()):
        known = "; ".join(f"{name}: {', '.join(each.values())}" for name, each in chosen.items())
        raise UsageError(f"--reference {reference}: must be a level ({known})")
    is_same = (values == values[:1]).all(0)
    same = {measures[column]: _number(values[0, column]) for column in np.flatnonzero(is_same)}
    clips = Clips(rows, [name for name in measures if name not in same], values[:, ~is_same], texts_of_unscored)
    return {
        "folders": [storage.url for storage in storages],
        "clips": len(rows),
        "unscored": clips.unscored,
        "interval": INTERVAL,
        "same": same,
        "left_out": {name: len(each) for name, each in levels.items() if len(each) > MAX_LEVELS},
        "factors": [
            {"name": name, "also_differ": also_differ[name], **_factor(clips, name, each, reference)}
            for name, each in chosen.items()
        ],
    }


# ---- clips and their factors


def _load(storages: Sequence[Storage]) -> Clips:
    """Return the clips of the folders. Those of one folder have settings only if they have no factors."""
    one = len(storages) == 1
    settings = ", ".join(f"'{name}', {name}" for name in SETTING_COLUMNS)
    unit = f"coalesce({SAME_PROMPT}, '')"
    # The same line has the same prompt in the scripts of two folders, which may have different names.
    if one:
        differ = "own <> '{}' AND min(prompt) OVER of_line <> max(prompt) OVER of_line"
        of_line = f"CASE WHEN {differ} THEN script || ', line ' || line END"
        unit = f"coalesce(CASE WHEN {HAS_NO_LINE_PROMPT} THEN {of_line} END, {unit})"
    tables, texts = [], list[str]()
    for number, storage in enumerate(storages):
        with open_tables(storage) as database:
            scores = [name for name, kind in columns_of(database, "scores").items() if NUMBERS.fullmatch(kind)]
            measures = {**{name: name for name in _LIKENESS}, **{name: quoted(name) for name in scores}, **_RESULTS}
            columns = ", ".join(f"({sql})::DOUBLE AS {quoted(name)}" for name, sql in measures.items())
            table = database.sql(f"""
                SELECT {{'id': id, 'folder': {number}, 'line': concat_ws(':', script, coalesce(line::VARCHAR, id)),
                    'file': clip, 'image': image, 'prompt': coalesce(prompt, ''),
                    'seed': coalesce(try_cast(metadata->>'$.{MATRIX}.seed' AS BIGINT), seed), 'unit': {unit}, 'factors': own,
                    'settings': CASE WHEN own = '{{}}' OR {not one} THEN json_object({settings})::VARCHAR ELSE '{{}}' END
                }} AS clip, {columns}
                FROM (SELECT *, json_merge_patch(factors, '{{"prompt": null}}')::VARCHAR AS own FROM clips)
                WHERE status = 'done' WINDOW of_line AS (PARTITION BY script, line) {IN_SCRIPT_ORDER}""")
            tables.append(table.to_arrow_table())
            texts += unscored(database)
    table = pyarrow.concat_tables(tables, promote_options="default")
    rows = table.column("clip").to_pylist()
    for row in rows:
        row["factors"] = {name: json.dumps(value) for name, value in json.loads(row["factors"]).items()}
        row["settings"] = flat_settings(json.loads(row["settings"]))
    found = [name for name in table.column_names if name != "clip"]
    return Clips(rows, found, np.stack([table.column(name).to_numpy() for name in found], axis=1), texts)


def _add_setting_factors(rows: Sequence[dict[str, Any]], also_differ: dict[str, list[str]]) -> None:
    """Make factors of the settings that differ between clips of one prompt without a matrix and choices.

    Of settings that always change together, the first with the most levels is the factor. The others are added to
    `also_differ`.
    """
    rows = [row for row in rows if not row["factors"]]
    seen = defaultdict[tuple[str, str], set[str]](set)
    for row in rows:
        for name, value in row["settings"].items():
            seen[name, row["unit"]].add(json.dumps(value))
    differing = dict.fromkeys(name for (name, _), values in seen.items() if len(values) > 1)
    values_of = {name: [json.dumps(row["settings"].get(name)) for row in rows] for name in differing}
    kept: list[str] = []
    for name in sorted(differing, key=lambda name: -len(set(values_of[name]))):
        for other in kept:
            # Each value of the other setting always comes with the same value of this one.
            if len(set(zip(values_of[other], values_of[name], strict=True))) == len(set(values_of[other])):
                also_differ[other].append(name)
                break
        else:
            kept.append(name)
    for name in kept:
        for row, value in zip(rows, values_of[name], strict=True):
            row["factors"][name] = value


def _settings_of_folders(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the settings that differ between clips of the same id, with `OLD -> NEW` if it is the same for all of them."""
    old = {row["id"]: row["settings"] for row in rows if not row["folder"]}
    found = defaultdict[str, set[str]](set)
    for row in rows:
        if row["folder"] and row["id"] in old:
            for change in changes("field", old[row["id"]], row["settings"]):
                found[change.name].add(str(change))
    return [min(texts) if len(texts) == 1 else name for name, texts in found.items()]


def _levels(rows: Iterable[Mapping[str, Any]], name: str) -> dict[str, str]:
    """Return value -> text, short for files, of a factor: numbers by size, others in the order of the script."""
    values = list(dict.fromkeys(row["factors"][name] for row in rows if name in row["factors"]))
    if _is_numeric(values):
        values.sort(key=json.loads)
    texts = {value: value_text(json.loads(value)) or "(empty)" for value in values}
    names = short_names(texts.values()) if name in FILE_AXES or name == "start_image" else {}
    return {value: names.get(text, text) for value, text in texts.items()}


def _is_numeric(values: Iterable[str]) -> bool:
    return all(type(json.loads(value)) in (int, float) for value in values)


# ---- one factor


def _factor(clips: Clips, name: str, text_of: Mapping[str, str], reference_text: str | None) -> dict[str, Any]:
    levels, texts = list(text_of), list(text_of.values())
    numbers = [number for number, row in enumerate(clips.rows) if name in row["factors"]]
    rows, values = [clips.rows[number] for number in numbers], clips.values[numbers]
    level_of = np.array([levels.index(row["factors"][name]) for row in rows])
    reference = texts.index(reference_text) if reference_text in texts else int(level_of[0])
    present = np.stack([np.isfinite(values[level_of == level]).any(0) for level in range(len(levels))]).sum(0)
    measures = [measure for measure, n_levels in zip(clips.measures, present, strict=True) if n_levels > 1]
    values = values[:, present > 1]
    prompts = _codes(row["unit"] for row in rows)
    paired_by, cells = _pairing(rows, name, level_of, reference)
    prompt_of_cell = np.zeros(cells.max() + 1, np.int64)
    prompt_of_cell[cells] = prompts
    n_cells = len(prompt_of_cell)
    sums, counts = _sums(values, level_of * n_cells + cells, len(levels) * n_cells)
    counts[counts == 0] = math.nan
    means = (sums / counts).reshape(len(levels), n_cells, len(measures))
    differences = means - means[reference]
    described, pairs = [], []
    for level, value in enumerate(levels):
        is_level, is_reference = level_of == level, level_of == reference
        about = {
            "level": texts[level],
            "value": json.loads(value),
            "clips": int(is_level.sum()),
            "prompts": len(set(prompts[is_level])),
            "measures": _estimates(measures, values[is_level], prompts[is_level], "clips"),
        }
        if level != reference:
            in_both = np.isin(cells, cells[is_level]) & np.isin(cells, cells[is_reference])
            about["unpaired"] = int((~in_both[is_level | is_reference]).sum())
            about["differences"] = _estimates(measures, differences[level], prompt_of_cell, "pairs")
            pairs += about["differences"].values()
        described.append(about)
    extremes = defaultdict[str, list[dict[str, Any]]](list)
    for column, measure in enumerate(measures):
        for level, cell in _extremes(differences[:, :, column], prompt_of_cell):
            shown = []
            for side in (reference, level):
                row = np.flatnonzero((level_of == side) & (cells == cell))[0]
                about = {key: each for key, each in rows[row].items() if key not in ("line", "unit", "factors", "settings")}
                shown.append({**about, "value": _number(values[row, column])})
            change = _number(differences[level, cell, column])
            extremes[measure].append({"level": texts[level], "difference": change, "clips": shown})
    ranks = {measure: _rank(measure, described) for measure in measures}
    main = {name for names in (_FACES, MOTION) for name in names}
    equal = [name for name, (is_equal, _) in ranks.items() if is_equal and name not in main]
    # A page without any measure would say nothing.
    equal = equal if len(equal) < len(measures) else []
    most = max(pairs, key=operator.itemgetter("pairs"), default={"pairs": 0})
    return {
        "numeric": _is_numeric(levels),
        "reference": texts[reference],
        "paired_by": paired_by,
        "pairs": most["pairs"],
        "reason": most.get("reason"),
        "clips": len(rows),
        "clips_without": len(clips.rows) - len(rows),
        "measures": sorted(measures, key=lambda name: (name in equal, ranks[name][1])),
        "equal": equal,
        "left_out": {
            measure: f"has values for {n_levels} of {len(levels)} levels"
            for measure, n_levels in zip(clips.measures, present, strict=True)
            if n_levels < 2
        },
        "levels": described,
        "pareto": _pareto(described, measures),
        "extremes": extremes,
    }


def _rank(measure: str, levels: Sequence[Mapping[str, Any]]) -> tuple[bool, float]:
    """Return whether no level differs from the reference, and the rank of the largest difference relative to its interval.

    A level differs if the interval excludes 0, and without an interval if the mean does. Those without rank last.
    """
    is_equal, rank = True, math.inf
    for found in (level["differences"][measure] for level in levels if "differences" in level):
        low, high, mean = (found[name] for name in ("low", "high", "mean"))
        if low is None:
            is_equal = is_equal and not mean
        else:
            is_equal = is_equal and low <= 0 <= high
            rank = min(rank, -abs(mean) / max((high - low) / 2, 1e-9))
    return is_equal, rank


def _pairing(rows: Sequence[Mapping[str, Any]], name: str, level_of: Codes, reference: int) -> tuple[str, Codes]:
    """Return how clips are paired, and the number of the cell of each: clips of one cell differ only in the factor.

    The way that gives the most pairs is used. Clips of a line get different seeds unless the script sets one.
    """
    keys = [(row["unit"], *sorted({**row["factors"], name: ""}.items())) for row in rows]
    ways = {"prompt and seed": _codes((key, row["seed"]) for key, row in zip(keys, rows, strict=True))}
    # Several lines can have the same prompt and seed, such as those of several persons.
    ways["line and seed"] = _codes((key, row["line"], row["seed"]) for key, row in zip(keys, rows, strict=True))
    if name == _FOLDER:
        ways["id"] = _codes(row["id"] for row in rows)
    ways["prompt, as means over seeds"] = _codes(keys)

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
    sums, counts = np.zeros((2, n_groups, values.shape[1]))
    np.add.at(sums, groups, np.where(known, values, 0.0))
    np.add.at(counts, groups, known.astype(float))
    return sums, counts


def _estimates(measures: Sequence[str], values: Array, groups: Codes, unit: str) -> dict[str, dict[str, Any]]:
    """Return count, mean and interval of each column of values (values, measures) in groups. `unit`: `clips` or `pairs`."""
    sums, counts = _sums(values, groups, groups.max() + 1)
    estimates: dict[str, dict[str, Any]] = {}
    for column, measure in enumerate(measures):
        has = counts[:, column] > 0
        n, n_groups = int(counts[:, column].sum()), int(has.sum())
        mean = _number(sums[:, column].sum() / n) if n else None
        estimates[measure] = {unit: n, "mean": mean, "low": None, "high": None}
        if n_groups < MIN_GROUPS:
            few = count(n, unit[:-1]) + (f" of {count(n_groups, 'prompt')}" if n_groups < n else "")
            estimates[measure]["reason"] = f"{few}; an interval needs {MIN_GROUPS} prompts"
        else:
            low, high = interval(sums[has, column], counts[has, column])
            estimates[measure] |= {"low": _number(low), "high": _number(high)}
    return estimates


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
    drawn = np.random.default_rng(_SEED).integers(0, n, (RESAMPLES, n)) + n * np.arange(RESAMPLES)[:, None]
    return np.bincount(drawn.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n).astype(float)


def _extremes(differences: Array, prompts: Codes) -> list[tuple[int, int]]:
    """Return level and cell of the largest rises, and then of the largest falls, at most one per prompt for each.

    `differences`: (levels, cells). `prompts`: (cells,).
    """
    found: list[tuple[int, int]] = []
    for sign in (1, -1):
        of_prompt: dict[int, tuple[int, int]] = {}
        # NaN comes last.
        for place in np.argsort(-sign * differences, axis=None, kind="stable"):
            level, cell = divmod(int(place), len(prompts))
            if len(of_prompt) == EXTREMES or not sign * differences[level, cell] > 0:
                break
            of_prompt.setdefault(prompts[cell], (level, cell))
        found += of_prompt.values()
    return found


def _pareto(levels: Sequence[Mapping[str, Any]], measures: Sequence[str]) -> dict[str, Any]:
    """Return the measures of likeness and motion that there are, and for each level those that exceed it.

    They exceed it in the mean of one of the two, and are not less in the other.
    """
    axes = [next((name for name in names if name in measures), None) for names in (_FACES, MOTION)]
    points: dict[str, list[float]] = {}
    if None not in axes:
        means = {level["level"]: [level["measures"][axis]["mean"] for axis in axes] for level in levels}
        points = {level: point for level, point in means.items() if None not in point}
    exceeded_by = {
        level: [other for other, better in points.items() if better != point and all(map(operator.ge, better, point))]
        for level, point in points.items()
    }
    return {"measures": [axis for axis in axes if axis], "exceeded_by": exceeded_by}


def _number(value: float) -> float | None:
    """Return the value with 6 digits, `None` for NaN."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


PAGE, DATA = "compare.html", "compare.json"


def write_page(result: Mapping[str, Any], storages: Sequence[Storage], target: Storage) -> Path | str:
    """Write page and data of a comparison into a folder. Return the location of the page. Raises OSError."""

    def link(folder: int, path: str | None) -> str | None:
        """Return the URL of a file, relative to the page. `None` if the page cannot refer to it."""
        storage = storages[folder]
        if path and storage.local is not None and target.local is not None:
            path = os.path.relpath(storage.local / path, target.local).replace(os.sep, posixpath.sep)
        elif storage.url != target.url:
            return None
        return path and quote(path)

    @cache
    def poster(folder: int, image: str | None) -> str | None:
        """Return the URL of the thumbnail of an image, relative to the page."""
        storage, row = storages[folder], {"image": image}
        if image and storage.local is not None:
            add_thumbnails(storage.local, [row])
        return link(folder, row.get("thumbnail", image))

    environment = Environment(loader=PackageLoader("vidgen_ray.dataset", "."), autoescape=True, trim_blocks=True)
    environment.filters |= {
        "label": label,
        "number": number_text,
        "pairs": _pairs_text,
        "measured": _measured,
        "counted": count,
    }
    environment.globals |= {"axis": axis, "tick_texts": tick_texts}
    look = files("vidgen_ray.report")
    style, script = (Markup(look.joinpath(name).read_text(encoding="utf-8")) for name in LOOK)  # own files
    page = environment.get_template(PAGE).render(
        result=result,
        style=style,
        script=script,
        link=link,
        poster=poster,
    )
    target.write(DATA, json.dumps(result, indent=1))
    target.write(PAGE, page)
    return target.place(PAGE)


def label(measure: str) -> str:
    return measure.replace("_", " ")


def _pairs_text(estimate: Mapping[str, Any]) -> str:
    """Return the number of pairs of a difference, and that of their prompts if they are too few for an interval."""
    few, _, _ = (estimate.get("reason") or "").partition(";")
    return few or count(estimate["pairs"], "pair")


def number_text(value: float | None, measure: str, signed: bool = False, digits: int = 3) -> str:
    """Return the value of a measure, or a difference with its sign. `digits`: significant ones of it."""
    if value is None:
        return "–"
    amount = abs(value)
    if measure == "file_bytes":
        text = size(amount, digits)
    elif measure == "accepted":
        text = f"{amount:.0%}"
    else:
        text = f"{amount:,.0f}" if amount >= 10**digits else f"{amount:.{digits}g}"
    return ("−" if value < 0 else "+" if signed and value > 0 else "") + text


def _measured(factor: Mapping[str, Any], *measures: str) -> list[Mapping[str, Any]]:
    """Return the levels that have values of these measures."""
    return [level for level in factor["levels"] if all(level["measures"][name]["mean"] is not None for name in measures)]


MAX_TICK_DIGITS = 9
"""Significant digits below which the numbers of an axis stay."""


class Axis(NamedTuple):
    at: Callable[[float], float]
    """Value -> pixels."""
    ticks: list[float]
    """One to three round numbers."""


def axis(levels: Iterable[Mapping[str, Any]], measure: str, begin: float, end: float) -> Axis:
    """Return the axis from `begin` to `end` pixels that holds the means of these levels and their intervals."""
    estimates = [level["measures"][measure] for level in levels]
    values = [each[name] for each in estimates for name in ("mean", "low", "high") if each[name] is not None]
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    power = 10 ** math.floor(math.log10((high - low) / 2))
    step = max((step * power for step in (1, 2, 5) if step * power <= (high - low) / 2), default=power)
    ticks = [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return Axis(lambda value: begin + (value - low) / (high - low) * (end - begin), ticks[:: math.ceil(len(ticks) / 3)])


def tick_texts(ticks: Sequence[float], measure: str) -> list[tuple[float, str]]:
    """Return the values of an axis with their texts, which have as many digits as it takes to tell them apart."""
    for digits in range(3, MAX_TICK_DIGITS):
        texts = [number_text(tick, measure, digits=digits) for tick in ticks]
        if len(set(texts)) == len(texts):
            break
    return list(zip(ticks, texts, strict=True))
