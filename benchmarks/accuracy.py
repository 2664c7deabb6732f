"""Compare planned seconds, memory and operations with published ones, and write the tables of docs/accuracy.md.

    python -m benchmarks.accuracy            # prints the tables
    python -m benchmarks.accuracy --write    # writes them into the page

Published figures are those of benchmarks/public_figures.json. Planned ones are computed here, never stored.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.planner.choose_layout import plan_run
from vidgen_ray.planner.cluster import CARDS, GB, parse_gpus, profile_for
from vidgen_ray.planner.demand import demand_of, demand_seconds
from vidgen_ray.planner.layout import CONTEXT_GB
from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.memory_table import network_work

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "public_figures.json"
PAGE = ROOT / "docs" / "accuracy.md"
Row = Mapping[str, Any]
SIDES = ("width", "height", "num_frames")
CLIP: dict[str, Any] = {
    "face_image": "face.png",
    "lora": "l.safetensors",
    "num_frames": 25,
    "width": 1024,
    "height": 576,
    "scale": 4,
}
"""The clip of the README's table of cards."""
SPEED_CARDS = ("RTX-4090", "RTX-5090", "L40S", "H100")
COMPILED: dict[str, Any] = {"compile": True}
"""Options of FLUX whose gain is known, without loss."""
CACHED: dict[str, Any] = {"first_block_cache": 0.08}
"""The same with loss."""
INTERVAL: dict[str, Any] = {"guidance_interval": [0, 0.6]}
"""The same of SVD."""


def figures() -> dict[str, list[Row]]:
    """Return the published figures: kind -> rows."""
    rows: dict[str, list[Row]] = json.loads(FIGURES.read_text(encoding="utf-8"))
    return rows


def _shot(row: Row) -> Shot:
    sides = dict(zip(SIDES, map(int, row["size"].split("x")), strict=False))
    video = {"video_model": row["stage"]} if "num_frames" in sides else {}
    return Shot.model_validate({"prompt": "a", **sides, **video, **row["fields"]})


def _profile(row: Row) -> Profile:
    profile = load_profile(row.get("profile", "gpu"))
    return profile.with_options({STAGE_BY_NAME[row["stage"]].actor: row.get("options", {})})


def planned_seconds(row: Row) -> float:
    """Return the planned seconds of a row's shot in its stage on its card."""
    card = next(card for card in CARDS if card.name == row["card"])
    return demand_seconds(_profile(row), STAGE_BY_NAME[row["stage"]], demand_of([_shot(row)]), {}, card)


def planned_gb(row: Row) -> float:
    """Return the planned GPU memory of a row's shot, with the CUDA context."""
    stage = STAGE_BY_NAME[row["stage"]]
    memory = stage.memory(_profile(row).options_of(stage), _shot(row))
    assert memory is not None
    return memory.total / GB + CONTEXT_GB


def _source(row: Row) -> str:
    name = f"[{row['source']}]({row['link']})" if "link" in row else row["source"]
    return f"{name}, {row['date']}"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _compared(row: Row, planned: float) -> Iterator[str]:
    yield from (row["card"], row["model"], row["size"])
    yield ", ".join(map(str, row["fields"].get("steps", {}).values())) or "-"
    yield from (row["how"], _number(row["figure"]), _number(planned), f"{planned / row['figure'] - 1:+.0%}")
    yield _source(row) + ("; used for the plan" if row.get("used") else "")


def _table(head: str, rows: Iterator[tuple[str, ...]]) -> list[str]:
    columns = head.split("|")
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines]


def seconds_table() -> list[str]:
    head = "card|model|size|steps|how|public s|planned s|difference|source"
    return _table(head, (tuple(_compared(row, planned_seconds(row))) for row in figures()["seconds"]))


def gb_table() -> list[str]:
    head = "card|model|size|steps|how|public GB|planned GB|difference|source"
    return _table(head, (tuple(_compared(row, planned_gb(row))) for row in figures()["gb"]))


def operations_table() -> list[str]:
    """Return the table of operations of one step, in 10^12."""

    def cells(row: Row) -> tuple[str, ...]:
        planned = network_work(row["work"], math.prod(map(int, row["size"].split("x")))).flop / 1e12
        difference = f"{planned / row['figure'] - 1:+.2%}"
        return (row["work"], row["size"], f"{row['figure']:.3f}", f"{planned:.3f}", difference, _source(row))

    return _table("network|size|public T|planned T|difference|source", map(cells, figures()["operations"]))


def clip_seconds(gpu: str, options: Mapping[str, Mapping[str, Any]]) -> float:
    """Return the planned seconds a clip on one GPU, with these options beside those that its memory decides."""
    cluster = parse_gpus(f"1x{gpu}")
    profile = profile_for("auto", lambda: cluster).with_options(options)
    shot = Shot.model_validate({"prompt": "a", **profile.defaults, **CLIP})
    return 3600 / plan_run(profile, demand_of([shot] * 100), cluster).shots_per_hour


def speed_table() -> list[str]:
    """Return the table of seconds a clip: the plain path, without loss, and with a stated one."""

    def cells(gpu: str) -> tuple[str, ...]:
        cluster = parse_gpus(f"1x{gpu}")
        can_compile = profile_for("auto", lambda: cluster).actors["flux"].options.get("quantize") != "fp8_storage"
        lossless = COMPILED if can_compile else {}
        options: tuple[dict[str, Any], ...] = (
            {},
            {"flux": lossless},
            {"flux": lossless, "svd": INTERVAL},
            {"flux": {**lossless, **CACHED}, "svd": INTERVAL},
        )
        without = "`compile` (FLUX)" if can_compile else "none: FLUX is held in 8 bits"
        return (gpu.replace("-", " "), *(f"{clip_seconds(gpu, each):.0f}" for each in options), without)

    head = "card|plain s|without loss s|with `guidance_interval` s|and `first_block_cache` s|options without loss"
    return _table(head, map(cells, SPEED_CARDS))


TABLES = {"seconds": seconds_table, "gb": gb_table, "operations": operations_table, "speed": speed_table}
"""Name of a table in the page -> its lines."""


def page(text: str) -> str:
    """Return the page with current tables between its markers."""
    for name, table in TABLES.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        content = begin + "\n".join(table()) + "\n" + end
        text, count = re.subn(pattern, lambda _, content=content: content, text, flags=re.DOTALL)
        assert count == 1, name
    return text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the tables into docs/accuracy.md")
    if parser.parse_args(arguments).write:
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return
    for table in TABLES.values():
        sys.stdout.write("\n".join(table()) + "\n\n")


if __name__ == "__main__":
    main()
