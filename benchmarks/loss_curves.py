"""Benchmark of lossy options: error by denoising step, loss by remaining steps and passes, by option and together, as curves.

What each option makes is compared with what the same stage makes without, by the measures of a trial (`planner/loss.py`).
"together" is the chain: an image by FLUX with an option, and from it a clip by SVD with an option.

    python -m benchmarks.loss_curves                                  # with the demo models, ten minutes on a CPU
    python -m benchmarks.loss_curves --picture docs/images/loss.svg
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.line_chart import Chart, charts_svg
from benchmarks.speed_options import GROUPS, items_of, shots_of
from vidgen_ray.planner.loss import as_clip, likenesses, psnr_of, ssim_of
from vidgen_ray.profile import Profile, load_profile
from vidgen_ray.stages.base import Frames, Item, Stage

SHOTS = 3
"""Shots without a face, and with one."""
STEPS = {"svd": 25, "flux": 28}
"""Steps of the published weights. The demo profile has fewer."""
SHARES = (0.2, 0.4, 0.6, 0.8)
"""Fractions of the steps that are guided."""
THRESHOLDS = (0.05, 0.08, 0.12, 0.2, 0.3)
"""Thresholds of First Block Cache."""
FEWER_STEPS = (20, 16, 12, 10)
"""Steps of FLUX that are compared with the cache."""
TRACED = ((0.0, 0.2), (0.0, 0.6), (0.2, 0.8), (0.4, 1.0))
"""Intervals whose error is shown by step."""
Options = Mapping[str, Any]


class Row(NamedTuple):
    """Loss of one case, over all shots."""

    kind: str
    """`interval`, `step`, `cache`, `option` or `together`."""
    case: str
    passes: float
    """Passes of SVD's network, or computed steps of FLUX's, relative to those without the option."""
    psnr_db: float
    """Mean over the shots."""
    worst_db: float
    ssim: float
    likeness: float | None
    """Mean change, of the shots with a face in both results."""
    errors: Sequence[float] = ()
    """Error of the latents after each step, relative to the finished latents."""
    seconds: float = 1.0
    """Seconds of all shots, relative to those without the option. On this machine."""


class Made(NamedTuple):
    """What a stage has made of all shots."""

    clips: Sequence[Frames]
    latents: Sequence[NDArray[np.float32]]
    """Latents of the first shot after each step."""
    seconds: float = 1.0
    """Seconds of all shots, without loading."""
    computed: float = 1.0
    """Part of the steps of FLUX that First Block Cache has computed."""


def with_steps(item: Item, name: str, steps: int) -> Item:
    counts = item.shot.steps.model_copy(update={name: steps})
    return Item(item.shot.model_copy(update={"steps": counts}), item.artefacts)


@contextmanager
def recorded_latents(stage: Stage[Any]) -> Iterator[list[NDArray[np.float32]]]:
    """Yield a list that gets the latents after each step of a diffusers pipeline."""
    pipe = getattr(stage, "pipe", None) or stage.model.text_to_image  # type: ignore[attr-defined]  # stages of FLUX have it
    latents: list[NDArray[np.float32]] = []
    step = pipe.scheduler.step

    def recorded(*arguments: Any, **named: Any) -> Any:
        output = step(*arguments, **named)
        latents.append(output[0].float().cpu().numpy())
        return output

    pipe.scheduler.step = recorded
    try:
        yield latents
    finally:
        del pipe.scheduler.step


@contextmanager
def counted_blocks(stage: Stage[Any]) -> Iterator[list[int]]:
    """Yield the calls of the first two blocks of FLUX. Without another network they stay 1."""
    calls = [1, 1]
    if not hasattr(stage, "model"):
        yield calls
        return

    def counting(number: int) -> Callable[..., None]:
        def count(*_: Any) -> None:
            calls[number] += 1

        return count

    # The hooks of the cache enclose the blocks, not their layers.
    network = stage.model.text_to_image.transformer
    blocks = (*network.transformer_blocks, *network.single_transformer_blocks)[:2]
    hooks = [block.attn.register_forward_pre_hook(counting(number)) for number, block in enumerate(blocks)]
    try:
        calls[:] = 0, 0
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def made(profile: Profile, group: str, items: Sequence[Item], options: Options, steps: int) -> Made:
    """Run the stage of a group with these options for all items."""
    stage_class = GROUPS[group].stage
    params = profile.params(stage_class)
    given = [with_steps(item, stage_class.name, steps) for item in items]
    with stage_class(type(params).model_validate({**dict(params), **options})) as stage:
        # The first call is slower than all others.
        stage(with_steps(items[0], stage_class.name, 1))
        begun = time.perf_counter()
        with counted_blocks(stage) as calls:
            with recorded_latents(stage) as latents:
                first = as_clip(stage(given[0])[stage.writes[0]])  # type: ignore[literal-required]  # the name of an artefact
            others = [as_clip(stage(item)[stage.writes[0]]) for item in given[1:]]  # type: ignore[literal-required]
        seconds = time.perf_counter() - begun
    return Made([first, *others], latents, seconds, calls[1] / calls[0])


def errors_by_step(reference: Made, tried: Made) -> list[float]:
    """Return the errors of the latents after each step. Empty if the numbers of steps differ."""
    if len(reference.latents) != len(tried.latents):
        return []
    size = float(np.linalg.norm(reference.latents[-1]))
    return [float(np.linalg.norm(b - a)) / size for a, b in zip(reference.latents, tried.latents, strict=True)]


class Comparison:
    """Compares what a group makes with options with what it makes without."""

    def __init__(self, profile: Profile, items: Sequence[Item], reference: Made, console: Console):
        self.profile, self.items, self.reference, self.console = profile, items, reference, console

    def row(self, kind: str, case: str, tried: Made, passes: float = 1.0) -> Row:
        pairs = list(zip(self.reference.clips, tried.clips, strict=True))
        psnr = [psnr_of(a, b) for a, b in pairs]
        ssim = float(np.mean([ssim_of(a, b) for a, b in pairs]))
        errors = errors_by_step(self.reference, tried)
        likeness, seconds = self.change_of_likeness(tried.clips), tried.seconds / self.reference.seconds
        row = Row(kind, case, passes, float(np.mean(psnr)), min(psnr), ssim, likeness, errors, seconds)
        self.console.print(" | ".join(cells(row)), markup=False)
        return row

    def change_of_likeness(self, clips: Sequence[Frames]) -> float | None:
        changes = []
        for item, before, after in zip(self.items, self.reference.clips, clips, strict=True):
            if (face := item.artefacts.get("face")) is None:
                continue
            known = likenesses(self.profile, face, [before, after])
            if None not in known:
                changes.append(float(known[1] or 0) - float(known[0] or 0))
        return float(np.mean(changes)) if changes else None


def items_with_and_without_faces(profile: Profile, name: str) -> list[Item]:
    groups = [GROUPS[name], GROUPS[f"{name}-face"]]
    return [item for group in groups for item in items_of(profile, group, shots_of(profile, group)[:SHOTS])]


def placed(share: float) -> dict[str, tuple[float, float]]:
    """Return where in the steps this fraction of them may lie."""
    return {
        "the first steps": (0.0, share),
        "the middle": (0.5 - share / 2, 0.5 + share / 2),
        "the last steps": (1 - share, 1.0),
    }


def interval_rows(profile: Profile, compared: Comparison, items: Sequence[Item]) -> Iterator[Row]:
    """Yield the loss of guidance in intervals of each size, and of fewer steps with as many passes."""
    steps = STEPS["svd"]

    def clips(options: Options, steps: int = steps) -> Made:
        return made(profile, "svd", items, options, steps)

    for share in SHARES:
        passes = (1 + share) / 2
        for place, interval in placed(share).items():
            yield compared.row("interval", f"guidance in {place}", clips({"guidance_interval": interval}), passes)
        fewer = round(steps * passes)
        yield compared.row("interval", "fewer steps", clips({}, fewer), fewer / steps)
    for interval in TRACED:
        yield compared.row("step", f"guided from {interval[0]:g} to {interval[1]:g}", clips({"guidance_interval": interval}))


def cache_rows(profile: Profile, compared: Comparison) -> Iterator[Row]:
    """Yield the loss of FLUX with First Block Cache by threshold, and with fewer steps."""
    for threshold in THRESHOLDS:
        tried = made(profile, "flux", compared.items, {"first_block_cache": threshold}, STEPS["flux"])
        yield compared.row("cache", f"{threshold:g}", tried, tried.computed)
    for steps in FEWER_STEPS:
        tried = made(profile, "flux", compared.items, {}, steps)
        yield compared.row("cache", f"{steps} steps", tried, steps / STEPS["flux"])


CACHE = "FLUX first_block_cache 0.08"
FLUX_OPTIONS: Mapping[str, Options] = {
    CACHE: {"first_block_cache": 0.08},
    "FLUX bfloat16": {"dtype": "bfloat16"},
    "FLUX fp8_storage": {"quantize": "fp8_storage"},
}
SVD_OPTIONS: Mapping[str, Options] = {
    "SVD bfloat16": {"dtype": "bfloat16"},
    "SVD guided to 0.6": {"guidance_interval": (0.0, 0.6)},
    "SVD guided to 0.6, bfloat16": {"guidance_interval": (0.0, 0.6), "dtype": "bfloat16"},
}


def option_rows(profile: Profile, group: str, options: Mapping[str, Options], compared: Comparison) -> Iterator[Row]:
    for name, own in options.items():
        tried = made(profile, group, compared.items, own, STEPS[group])
        yield compared.row("option", name, tried)


def chain_rows(profile: Profile, images: Comparison, clips: Comparison) -> Iterator[Row]:
    """Yield the loss of clips whose image was made with an option, and that were made with one."""
    for image_name, image_options in FLUX_OPTIONS.items():
        drawn = made(profile, "flux", images.items, image_options, STEPS["flux"])
        items = [
            Item(item.shot, {**item.artefacts, "image": image[0]}) for item, image in zip(clips.items, drawn.clips, strict=True)
        ]
        for clip_name, clip_options in {"SVD": {}, **SVD_OPTIONS}.items():
            if clip_name in ("SVD", "SVD guided to 0.6, bfloat16"):
                tried = made(profile, "svd", items, clip_options, STEPS["svd"])
                yield clips.row("together", f"{image_name}, then {clip_name}", tried)


def cells(row: Row) -> tuple[str, ...]:
    likeness = "" if row.likeness is None else f"{row.likeness:+.3f}"
    loss = f"{row.psnr_db:.1f}", f"{row.worst_db:.1f}", f"{row.ssim:.3f}", likeness
    return row.kind, row.case, f"{row.passes:.2f}", *loss, f"{row.seconds:.2f}"


def measured(profile: Profile, console: Console) -> list[Row]:
    """Return the rows of all cases."""
    faces = items_with_and_without_faces(profile, "flux")
    images = Comparison(profile, faces, made(profile, "flux", faces, {}, STEPS["flux"]), console)
    items = [
        Item(item.shot, {**item.artefacts, "image": image[0]})
        for item, image in zip(faces, images.reference.clips, strict=True)
    ]
    clips = Comparison(profile, items, made(profile, "svd", items, {}, STEPS["svd"]), console)
    return [
        *interval_rows(profile, clips, items),
        *cache_rows(profile, images),
        *option_rows(profile, "flux", FLUX_OPTIONS, images),
        *option_rows(profile, "svd", SVD_OPTIONS, clips),
        *chain_rows(profile, images, clips),
    ]


SHOWN = (
    "SVD bfloat16",
    "SVD guided to 0.6",
    "FLUX fp8_storage, then SVD",
    "FLUX fp8_storage, then SVD guided to 0.6, bfloat16",
)
"""Cases whose error is drawn by step."""
SHARES_SHOWN = (0.2, 0.4, 0.6, 0.8, 1.0)


def charts(rows: Sequence[Row]) -> list[Chart]:
    """Return the loss by passes, and the errors by step of intervals and of options."""
    by_passes: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.kind == "interval":
            by_passes.setdefault(row.case, []).append((row.passes, row.psnr_db))
    of_flux = [row for row in reversed(rows) if row.kind == "cache"]
    cached, fewer = ([row for row in of_flux if row.case.endswith("steps") is fewer] for fewer in (False, True))
    by_computed = {
        "first_block_cache, from 0.3 to 0.05": [(row.passes, row.psnr_db) for row in cached],
        "the worst image": [(row.passes, row.worst_db) for row in cached],
        "fewer steps": [(row.passes, row.psnr_db) for row in fewer],
    }
    by_step = {row.case: list(enumerate(row.errors, 1)) for row in rows if row.kind == "step"}
    by_option = {row.case: list(enumerate(row.errors, 1)) for row in rows if row.case in SHOWN}
    of_latents = "error of the latents, relative to the finished ones"
    steps, errors = (0, 5, 10, 15, 20, 25), (0.001, 0.01, 0.1, 1)
    at_bottom = (0.04, 0.74)
    decibels = (20, 30, 40, 50, 60)
    return [
        Chart(
            "FLUX by computed steps",
            "computed steps, relative",
            "PSNR in dB",
            by_computed,
            decibels,
            SHARES_SHOWN,
            legend_at=(0.3, 0.74),
        ),
        Chart("Clips by passes", "passes, relative", "PSNR in dB", by_passes, decibels, PASSES, legend_at=(0.44, 0.74)),
        Chart("Intervals by step", "step", of_latents, by_step, errors, steps, is_log=True, legend_at=at_bottom),
        Chart("Options and together by step", "step", of_latents, by_option, errors, steps, is_log=True, legend_at=at_bottom),
    ]


PASSES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


COLUMNS = ("kind", "case", "passes", "PSNR dB", "worst", "SSIM", "likeness", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="demo")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--from-json", type=Path, help="read the rows from this file instead of measuring them")
    parser.add_argument("--picture", type=Path, help="draw the curves into this SVG file")
    args = parser.parse_args()
    if args.from_json:
        rows = [Row(*each) for each in json.loads(args.from_json.read_text())]
    else:
        rows = measured(load_profile(args.profile), Console(stderr=True))
    if args.json:
        args.json.write_text(json.dumps(rows))
    if args.picture:
        args.picture.write_text(charts_svg(charts(rows)))
    table = Table(*COLUMNS, title=f"{args.profile}, {2 * SHOTS} shots")
    for row in rows:
        table.add_row(*cells(row))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
