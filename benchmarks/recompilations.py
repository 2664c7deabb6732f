"""Count what torch.compile compiles over LoRAs and image sizes, for the networks of small random weights.

The compiler backend counts graphs and generates no code, so the counts are those of any machine; torch decides about them from
the code and the values of the networks. Each stage runs with its own compile option, adapters without slots as the control.

    python -m benchmarks.recompilations                 # 20 LoRAs x 3 sizes, some minutes on a CPU
    python -m benchmarks.recompilations --loras 4 --markdown
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
import torch
import torch._dynamo
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch._dynamo.testing import CompileCounter

from vidgen_ray.media import read_image
from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.shot import LoraRef, Shot
from vidgen_ray.stages import speed
from vidgen_ray.stages.base import Item, Stage
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.flux_lora import FluxLoRAStage
from vidgen_ray.stages.hunyuandit import HunyuanDiTStage
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.weights import resolve

SIZES = ((128, 64), (64, 64), (128, 128))
"""Width and height of images."""
CLIPS = ((128, 64, 4), (128, 128, 6), (64, 64, 5))
"""Width, height and frames of clips."""
LORA_RANKS = (4, 2, 3)
MAX_RANK = 8
NO_LIMIT = 10_000
FACE = Path(__file__).parent.parent / "examples" / "faces" / "ada.png"


@dataclass(frozen=True)
class Counts:
    """Graphs that were compiled in the course of a number of calls."""

    case: str
    calls: int
    """Calls of the stage."""
    first: int
    """Graphs of the first call of the first size."""
    second_size: int
    """Further graphs up to the first call of the second size."""
    later: int
    """Further graphs in all later calls."""
    ended: str = ""
    """Why the calls ended early. Empty: they did not."""


def write_loras(folder: Path, count: int) -> list[str]:
    """Write LoRA files for the tiny FLUX of different ranks, scales and sets of layers. Returns their paths."""
    base = load_file(resolve("builtin:tiny/lora.safetensors"))
    files = []
    for number in range(count):
        rank = LORA_RANKS[number % len(LORA_RANKS)]
        tensors = {
            key: (value[:rank] if ".lora_A." in key else value[:, :rank]).contiguous() * (1 + number / 10)
            for key, value in base.items()
            if number % 2 or "single" not in key
        }
        files.append(str(folder / f"{number}.safetensors"))
        save_file(tensors, files[-1])
    return files


@contextmanager
def counting() -> Iterator[CompileCounter]:
    """Compile with a backend that counts graphs, from an empty cache."""
    backend, counter = speed.COMPILE_BACKEND, CompileCounter()
    speed.COMPILE_BACKEND = counter
    torch._dynamo.reset()
    try:
        yield counter
    finally:
        speed.COMPILE_BACKEND = backend
        torch._dynamo.reset()


def shot_of(profile: Profile, width: int, height: int, **fields: Any) -> Shot:
    return Shot.model_validate(
        {**profile.defaults, "prompt": "a photo of a man", "seed": 7, "width": width, "height": height, **fields}
    )


def stage_with(profile: Profile, stage: type[Stage[Any]], **options: Any) -> Stage[Any]:
    params = profile.params(stage)
    return stage(type(params).model_validate({**dict(params), **options}))


def count(case: str, counter: CompileCounter, calls: Sequence[tuple[int, Callable[[], Any]]]) -> Counts:
    """Run calls, given with the number of their size, and count the graphs. The limit of torch ends them early."""
    after: dict[int, int] = {}
    done, ended = 0, ""
    try:
        for size, call in calls:
            call()
            done += 1
            after.setdefault(size, counter.frame_count)
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        ended = "torch's limit"
    return Counts(case, done, after[0], after[1] - after[0], counter.frame_count - after[1], ended)


def lora_calls(profile: Profile, stage: Stage[Any], files: Sequence[str]) -> list[tuple[int, Callable[[], Any]]]:
    """Return calls of all LoRAs in all sizes, with changing weights."""

    def call(number: int, file: str, width: int, height: int) -> Callable[[], Any]:
        shot = shot_of(profile, width, height, lora=[LoraRef(path=file, weight=0.5 + number % 10 / 20)])
        return lambda: stage([Item(shot, {"image": grey(width, height)})])

    return [(size, call(n, file, *SIZES[size])) for n, file in enumerate(files) for size in range(len(SIZES))]


def grey(width: int, height: int) -> np.ndarray:
    return np.full((height, width, 3), 127, np.uint8)


def count_slots(profile: Profile, files: Sequence[str]) -> Counts:
    with counting() as counter, stage_with(profile, FluxLoRAStage, compile="regional", lora_max_rank=MAX_RANK) as stage:
        return count(f"FLUX, {len(files)} LoRAs in slots", counter, lora_calls(profile, stage, files))


def count_adapters(profile: Profile, files: Sequence[str], limit: int) -> Counts:
    """Count compilations with ordinary adapters, compiled as diffusers' documentation does it. `limit`: that of torch."""
    name = f"FLUX, {len(files)} ordinary adapters" + ("" if limit == NO_LIMIT else f", recompile_limit {limit}")
    with (
        counting() as counter,
        stage_with(profile, FluxLoRAStage) as stage,
        torch._dynamo.config.patch(recompile_limit=limit, accumulated_recompile_limit=NO_LIMIT),
    ):
        stage.model.text_to_image.transformer.compile_repeated_blocks(fullgraph=True, backend=counter)  # type: ignore[attr-defined]
        return count(name, counter, lora_calls(profile, stage, files))


def count_faces(profile: Profile) -> Counts:
    """Count compilations of FLUX with InfuseNet: plain, with a negative prompt and with a face in each size."""
    with InstantIDStage(profile.params(InstantIDStage)) as faces:
        face = faces.features([read_image(FACE)])
    with counting() as counter, stage_with(profile, FluxStage, compile="regional") as stage:

        def call(width: int, height: int) -> None:
            stage([Item(shot_of(profile, width, height))])
            stage([Item(shot_of(profile, width, height, negative_prompt="blurred"))])
            stage([Item(shot_of(profile, width, height, face_image="x.jpg"), {"face": face})])

        return count("FLUX with InfuseNet", counter, sized_calls(call, SIZES))


def count_images(profile: Profile, mode: str) -> Counts:
    with counting() as counter, stage_with(profile, HunyuanDiTStage, compile=mode) as stage:

        def call(width: int, height: int) -> None:
            stage([Item(shot_of(profile, width, height, use_hunyuan_style=True), {"image": grey(width, height)})])

        return count(f"HunyuanDiT, {mode}", counter, sized_calls(call, SIZES))


def count_clips(profile: Profile, mode: str) -> Counts:
    with counting() as counter, stage_with(profile, SVDStage, compile=mode) as stage:

        def call(width: int, height: int, frames: int) -> None:
            stage([Item(shot_of(profile, width, height, num_frames=frames), {"image": grey(width, height)})])

        return count(f"SVD, {mode}", counter, sized_calls(call, CLIPS))


def sized_calls(call: Callable[..., None], sizes: Sequence[Sequence[int]]) -> list[tuple[int, Callable[[], None]]]:
    """Return one call per size, and one more for each size after them."""
    return [(number, lambda size=size: call(*size)) for number, size in (*enumerate(sizes), *enumerate(sizes))]  # type: ignore[misc]


def all_counts(loras: int) -> Iterator[Counts]:
    profile = load_profile("tiny")
    with tempfile.TemporaryDirectory() as folder:
        files = write_loras(Path(folder), loras)
        yield count_slots(profile, files)
        yield count_adapters(profile, files, NO_LIMIT)
        yield count_adapters(profile, files, 8)
    yield count_faces(profile)
    for mode in ("regional", "full"):
        yield count_images(profile, mode)
    for mode in ("regional", "full"):
        yield count_clips(profile, mode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loras", type=int, default=20)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args()
    columns = ("networks", "calls", "first size", "second size", "all later calls")
    rows = []
    for counts in all_counts(args.loras):
        calls = f"{counts.calls}, then {counts.ended}" if counts.ended else str(counts.calls)
        rows.append((counts.case, calls, str(counts.first), str(counts.second_size), str(counts.later)))
        Console(stderr=True).print(" | ".join(rows[-1]), markup=False)
    if args.markdown:
        sys.stdout.write("".join(f"| {' | '.join(line)} |\n" for line in (columns, ("---",) * len(columns), *rows)))
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
