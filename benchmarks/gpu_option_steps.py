"""Steps of tools/gpu_first_hour.py about options of FLUX, SVD and Wan: trials, compilation, and a LoRA that the user gives."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._inductor.utils import fresh_inductor_cache

from benchmarks.gpu_cases import (
    FACE,
    LONG_S,
    WAN,
    Run,
    calls_of,
    changed_params,
    compiled_graphs,
    random_loras,
    shot_for,
    sized,
)
from benchmarks.gpu_kernels import seconds_of
from vidgen_ray.engine.trials import TIMEOUT_S
from vidgen_ray.planner.speed_trials import Trial, invented_item, run_once, try_option
from vidgen_ray.stages.base import Stage
from vidgen_ray.stages.flux import FluxLoRAStage, FluxStage
from vidgen_ray.stages.flux2_klein import Flux2KleinStage
from vidgen_ray.stages.speed import missing_package
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.stages.wan import WanStage
from vidgen_ray.system.free_memory import free_gpu_memory
from vidgen_ray.weights import resolve

CACHED_STEPS = {"flux": 28, "lora": 28, "wan": 40}
"""Steps with which a cache of steps is tried: it skips none of a few."""


def options_step(run: Run) -> None:
    """Try speed options of FLUX, SVD and Wan as `vidgen bench` does, and count what a compiled FLUX compiles again."""
    fields = {**run.clip, "steps": {"flux": 4, "lora": 4, "svd": 4}}

    def tried(actor: str, options: Mapping[str, Any], *, exact: bool = False) -> dict[str, Any]:
        """Try the last option. Those before it are set."""
        profile = run.profile.with_options({actor: dict([*options.items()][:-1])})
        names = ("flux", "lora") if actor == "flux" else (actor,)
        own = {"flux": {**fields, **FACE}, "svd": fields, "wan": {**fields, **WAN, "steps": {"wan": 2}}}[actor]
        if "first_block_cache" in options:
            own = {**own, "steps": CACHED_STEPS if run.on_gpu else dict.fromkeys(CACHED_STEPS, 4)}
        shots = [(name, shot_for(profile, **own, **loras[-1])) for name in names]
        with torch._inductor.config.patch(emulate_precision_casts=exact):
            result = try_option(Trial(profile, actor, *[*options.items()][-1]), shots)
        return {"trial": result.model_dump(), "problem": result.error or None, "rejected": result.rejected}

    tried_options: tuple[tuple[str, dict[str, Any]], ...] = (
        ("svd", {"compile": True}),
        ("flux", {"compile": True}),
        ("flux", {"quantize": "fp8", "compile": True}),
        ("svd", {"compile": True, "channels_last": True}),
        ("flux", {"quantize": "fp8"}),
        ("wan", {"quantize": "fp8"}),
        ("flux", {"quantize": "fp8_storage"}),
        ("flux", {"compile": True, "first_block_cache": 0.08}),
        *([("flux", {"attention_backend": "sage"})] if not missing_package("sage") else []),
        ("flux", {"attention_backend": "_native_cudnn"}),
    )
    with random_loras(run, (64, 16, 16)) as loras:
        trials = {
            f"{actor} {', '.join(f'{k}: {v}' for k, v in each.items())}": partial(tried, actor, each)
            for actor, each in tried_options
        }
        exact = partial(tried, "flux", {"compile": True}, exact=True)
        recompiled = partial(_recompilation, run, loras)
        cases = {
            **trials,
            "flux compile: True, emulate_precision_casts": exact,
            "lora compile: True, sizes and LoRAs": recompiled,
        }
        run.rows.measure(cases, dict.fromkeys(cases, TIMEOUT_S))


def _recompilation(run: Run, loras: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    other = {"width": 768, "height": 1024} if run.on_gpu else {"width": 64, "height": 64}
    sizes = (run.clip, other)
    shots = [*((size, loras[0]) for size in (sizes[0], *sizes, sizes[0])), *((sizes[0], lora) for lora in loras[1:])]
    stage = FluxLoRAStage(changed_params(run.profile.params(FluxLoRAStage), {"compile": True}))  # type: ignore[arg-type]
    items = [
        invented_item(FluxLoRAStage, shot_for(run.profile, steps={"lora": 4}, **size, **FACE, **lora)) for size, lora in shots
    ]
    with stage:
        calls = calls_of(stage, items)
    del stage
    free_gpu_memory()
    return {"calls": calls}


def compile_step(run: Run) -> None:
    """Measure how long the compilation of each network takes: for the first size, for another one, and for a third."""
    clips = (run.clip, sized(run.on_gpu, 768, 1024, 25), sized(run.on_gpu, 896, 640, 25))
    if not run.on_gpu:
        clips = (run.clip, {**run.clip, "height": 128}, {**run.clip, "height": 192})
    videos = [{**WAN, **sized(run.on_gpu, *size)} for size in ((832, 480, 81), (832, 480, 49), (1280, 704, 49))]
    steps = {"steps": {"flux": 2, "svd": 2, "wan": 1}}
    cases = {
        "compilation of flux and infusenet": partial(_compiled, run, FluxStage, [{**FACE, **clip, **steps} for clip in clips]),
        "compilation of svd": partial(_compiled, run, SVDStage, [{**clip, **steps} for clip in clips]),
        "compilation of klein": partial(
            _compiled, run, Flux2KleinStage, [{"image_model": "klein", "identity": "none", **clip} for clip in clips]
        ),
        "compilation of wan": partial(_compiled, run, WanStage, [{**video, **steps} for video in videos]),
    }
    run.rows.measure(cases, dict.fromkeys(cases, TIMEOUT_S))


def _compiled(run: Run, stage_class: type[Stage[Any]], sizes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the seconds of the first call and of the next one at each size, without results of earlier compilations."""
    torch._dynamo.reset()
    shots = [shot_for(run.profile, **fields) for fields in sizes]
    compiled = []
    with fresh_inductor_cache(), stage_class(changed_params(run.profile.params(stage_class), {"compile": True})) as stage:
        for shot in shots:
            graphs, call = compiled_graphs(), partial(run_once, stage, invented_item(stage_class, shot))
            first_s, again_s = seconds_of(call), seconds_of(call)
            compiled.append(
                {
                    "size": f"{shot.width}x{shot.height}x{shot.clip_frames}",
                    "compile_s": first_s - again_s,
                    "call_s": again_s,
                    "graphs": compiled_graphs() - graphs,
                }
            )
    del stage, call
    free_gpu_memory()
    return {"compiled": compiled}


def lora_step(run: Run) -> None:
    """Load a LoRA that the user gives into FLUX, and measure how much it changes an image at two weights."""
    if run.lora is None:
        run.rows.add("LoRA from elsewhere", "none was given; run the step lora with --lora FILE or --lora OWNER/NAME")
        return
    run.rows.measure({f"LoRA {run.lora}": partial(_foreign_lora, run, run.lora)}, {f"LoRA {run.lora}": LONG_S})


def _foreign_lora(run: Run, name: str) -> dict[str, Any]:
    file = lora_file(name)
    results, seconds = [], []
    with FluxLoRAStage(run.profile.params(FluxLoRAStage)) as stage:
        for weight in (1.0, 0.5):
            lora = {"path": str(file), "weight": weight}
            item = invented_item(FluxLoRAStage, shot_for(run.profile, steps={"lora": 4}, **run.clip, lora=[lora]))
            begun = time.perf_counter()
            results.append(run_once(stage, item))
            seconds.append(time.perf_counter() - begun)
        notes = stage.take_notes()
    del stage
    free_gpu_memory()
    levels = float(np.abs(results[0].astype(np.int16) - results[1]).mean())
    problem = None if levels else "its weight changes nothing"
    return {
        "file": file.name,
        "file_bytes": file.stat().st_size,
        "first_s": seconds[0],
        "seconds": seconds[1],
        "changes": levels,
        "notes": notes,
        "problem": problem,
    }


def lora_file(name: str) -> Path:
    """Return a LoRA: a file, a `builtin:` name, or the first .safetensors file of a Hugging Face repository OWNER/NAME."""
    if name.startswith("builtin:") or Path(name).exists():
        return resolve(name)
    import huggingface_hub

    files = [file for file in huggingface_hub.list_repo_files(name) if file.endswith(".safetensors")]
    if not files:
        raise FileNotFoundError(f"{name} has no .safetensors file")
    return Path(huggingface_hub.hf_hub_download(name, files[0]))
