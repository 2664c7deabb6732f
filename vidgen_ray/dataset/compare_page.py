"""Page of a comparison: `compare.html` with plots, tables and the clips that differ most, and `compare.json` with its data.

Plots are SVG (`compare_plots.html`), clips are referred to by relative paths. The page needs no network.
"""

from __future__ import annotations

import json
import math
import os
import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from vidgen_ray.outputs.storage import Storage
from vidgen_ray.report.gallery_page import LOOK, add_thumbnails
from vidgen_ray.system.quantities import count, size

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
    environment.filters |= {"label": label, "number": number_text, "pairs": _pairs_text, "measured": _measured}
    environment.globals["axis"] = axis
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


def _measured(factor: Mapping[str, Any], *measures: str) -> list[Mapping[str, Any]]:
    """Return the levels that have values of these measures."""
    return [level for level in factor["levels"] if all(level["measures"][name]["mean"] is not None for name in measures)]


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
