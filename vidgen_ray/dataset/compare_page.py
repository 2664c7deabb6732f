"""Page of a comparison: `compare.html` with plots, tables and the clips that differ most, and `compare.json` with its data.

Plots are SVG, clips are referred to by relative paths. The page needs no network.
"""

from __future__ import annotations

import json
import math
import os
import posixpath
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from vidgen_ray.outputs.storage import Storage
from vidgen_ray.report.gallery_page import LOOK, add_thumbnails
from vidgen_ray.system.quantities import count, size

PAGE, DATA = "compare.html", "compare.json"
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 340, 58, 12, 12, 26
"""Width of a plot and its margins in pixels."""
ROW = 28
"""Height of a level in a plot."""
LETTERS = 18
"""Maximum length of the name of a level in a plot."""

Bounds = tuple[float, float]


def write_page(result: Mapping[str, Any], storages: Sequence[Storage], target: Storage) -> Path | str:
    """Write page and data of a comparison into a folder. Return the location of the page. Raises OSError."""
    clips = [
        clip
        for factor in result["factors"]
        for pairs in factor["extremes"].values()
        for pair in pairs
        for clip in pair["clips"]
    ]
    posters: dict[tuple[int, str], str] = {}
    for number, storage in enumerate(storages):
        rows = [{"image": image} for image in {clip["image"] for clip in clips if clip["folder"] == number and clip["image"]}]
        if storage.local is not None:
            add_thumbnails(storage.local, rows, lambda made, total: None)
        posters |= {(number, row["image"]): row.get("thumbnail", row["image"]) for row in rows}

    def link(folder: int, path: str | None) -> str | None:
        """Return the URL of a file, relative to the page. `None` if the page cannot refer to it."""
        storage = storages[folder]
        if path and storage.local is not None and target.local is not None:
            path = os.path.relpath(storage.local / path, target.local).replace(os.sep, posixpath.sep)
        elif storage.url != target.url:
            return None
        return path and quote(path)

    environment = Environment(loader=PackageLoader("vidgen_ray.dataset", "."), autoescape=True, trim_blocks=True)
    environment.filters |= {"label": label, "number": number_text, "pairs": _pairs_text}
    look = files("vidgen_ray.report")
    style, script = (Markup(look.joinpath(name).read_text(encoding="utf-8")) for name in LOOK)  # own files
    page = environment.get_template(PAGE).render(
        result=result,
        style=style,
        script=script,
        plot=plot,
        trade_off=trade_off,
        link=link,
        poster=lambda clip: link(clip["folder"], posters.get((clip["folder"], clip["image"]))),
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


def number_text(value: float | None, measure: str, signed: bool = False) -> str:
    """Return the value of a measure, or a difference with its sign."""
    if value is None:
        return "–"
    amount = abs(value)
    if measure == "file_bytes":
        text = size(amount)
    elif measure == "accepted":
        text = f"{amount:.0%}"
    else:
        text = f"{amount:,.0f}" if amount >= 1000 else f"{amount:.3g}"
    return ("−" if value < 0 else "+" if signed and value > 0 else "") + text


def plot(factor: Mapping[str, Any], measure: str) -> Markup:
    """Return the means of the levels with their intervals, a row per level."""
    levels = [level for level in factor["levels"] if level["measures"][measure]["mean"] is not None]
    bounds = _bounds([level["measures"][measure] for level in levels])
    left = min(LEFT + 70, 12 + 7 * max(min(len(level["level"]), LETTERS) for level in levels))
    across = _scale(bounds, left + 12, WIDTH - RIGHT - 14)
    height = TOP + ROW * len(levels) + BOTTOM
    parts = []
    for tick in _ticks(bounds):
        parts.append(f'<line class="grid" x1="{across(tick):.1f}" x2="{across(tick):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(_text(across(tick), height - 8, number_text(tick, measure), "middle"))
    for number, level in enumerate(levels):
        y, each = TOP + ROW * (number + 0.5), level["measures"][measure]
        name = level["level"] if len(level["level"]) <= LETTERS else f"{level['level'][: LETTERS - 1]}…"
        parts += [_text(left, y + 4, name, "end"), _interval(y, each, across, vertical=False), _dot(across(each["mean"]), y)]
    return _svg(parts, height, _summary(levels, measure))


def trade_off(factor: Mapping[str, Any]) -> Markup:
    """Return the levels by the means of likeness and motion, with their intervals."""
    upward, sideways = factor["pareto"]["measures"]
    levels = [level for level in factor["levels"] if level["level"] in factor["pareto"]["exceeded_by"]]
    height = 300
    y_bounds, x_bounds = (_bounds([level["measures"][name] for level in levels]) for name in (upward, sideways))
    across, up = _scale(x_bounds, LEFT + 10, WIDTH - RIGHT - 24), _scale(y_bounds, height - BOTTOM - 18, TOP + 18)
    points = [(across(level["measures"][sideways]["mean"]), up(level["measures"][upward]["mean"])) for level in levels]
    parts = [_text(LEFT - 50, TOP, f"↑ {label(upward)}", "start"), _text(WIDTH - 4, height - 6, f"{label(sideways)} →", "end")]
    for tick in _ticks(y_bounds):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>')
        parts.append(_text(LEFT - 6, up(tick) + 4, number_text(tick, upward), "end"))
    for tick in _ticks(x_bounds):
        parts.append(_text(across(tick), height - BOTTOM + 2, number_text(tick, sideways), "middle"))
    if factor["numeric"]:
        parts.append(f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}"/>')
    for level, (x, y) in zip(levels, points, strict=True):
        parts += [
            _interval(x, level["measures"][upward], up, vertical=True),
            _interval(y, level["measures"][sideways], across, vertical=False),
            _dot(x, y),
            _text(x + 7, y - 7, level["level"][:LETTERS], "start" if x < WIDTH * 0.7 else "end", "name"),
        ]
    return _svg(parts, height, f"{_summary(levels, upward)}. {_summary(levels, sideways)}")


def _bounds(estimates: Sequence[Mapping[str, Any]]) -> Bounds:
    values = [each[name] for each in estimates for name in ("mean", "low", "high") if each[name] is not None]
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1))


def _scale(bounds: Bounds, begin: float, end: float) -> Any:
    """Return a function from values to pixels."""
    low, high = bounds
    return lambda value: begin + (value - low) / (high - low) * (end - begin)


def _ticks(bounds: Bounds) -> list[float]:
    """Return one to three round numbers in the bounds."""
    low, high = bounds
    power = 10 ** math.floor(math.log10((high - low) / 2))
    step = max((step * power for step in (1, 2, 5) if step * power <= (high - low) / 2), default=power)
    ticks = [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return ticks[:: math.ceil(len(ticks) / 3)]


def _interval(at: float, estimate: Mapping[str, Any], scale: Any, *, vertical: bool) -> str:
    if estimate["low"] is None:
        return ""
    low, high = scale(estimate["low"]), scale(estimate["high"])
    x1, x2, y1, y2 = (at, at, low, high) if vertical else (low, high, at, at)
    return f'<line class="interval" x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}"/>'


def _dot(x: float, y: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _summary(levels: Sequence[Mapping[str, Any]], measure: str) -> str:
    """Return the plot as text, for screen readers."""
    means = (f"{level['level']}: {number_text(level['measures'][measure]['mean'], measure)}" for level in levels)
    return f"Mean {label(measure)} per level: {', '.join(means)}"


def _svg(parts: Sequence[str], height: float, summary: str) -> Markup:
    content = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(summary)}">{"".join(parts)}</svg>'
    return Markup(content)
