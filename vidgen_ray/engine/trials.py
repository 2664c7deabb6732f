"""Trials of speed options: run shots through the stages of an actor with and without an option.

`try_option` runs a trial on this machine, `run_trials` on a Ray cluster, as tasks that take one GPU each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from vidgen_ray.content_keys import with_local_loras
from vidgen_ray.graph import STAGE_BY_NAME, stages_of
from vidgen_ray.planner.cluster import Cluster
from vidgen_ray.planner.speed_trials import Trial, TrialResult, keep, open_trials, settled
from vidgen_ray.profile import Profile
from vidgen_ray.render.oom_fallback import free_gpu_memory
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Artefacts, ChunkedStage, FaceFeatures, Item, Stage

CALLS = 2
"""Calls after the first one, of which the median counts."""
MAX_REASON = 300
"""Maximum number of characters of an error in a result."""


def try_options(
    profile: Profile,
    actor: str,
    cards: Sequence[str],
    run: Callable[[Trial, str], TrialResult | None],
    on_message: Callable[[str], None],
) -> None:
    """Try the options of an actor without a result on these kinds of GPUs, and keep the results.

    `run`: runs a trial on a kind of GPU. `None` from it leaves this option and the actor's next ones untried. Raises OSError if
    a result cannot be stored.
    """
    for trial, card in open_trials(profile, actor, cards):
        what = f"{actor}: {trial.option}={trial.value} on {card}"
        on_message(f"trying {what}, once for this kind of GPU and these versions of torch and diffusers")
        result = run(trial, card)
        if result is None:
            on_message(f"{what}: could not be tried")
            return
        keep(trial, card, result)
        on_message(f"{what}: {result}")


def try_option(trial: Trial, shots: Iterable[tuple[str, Shot]]) -> TrialResult:
    """Run shots through stages of the actor with and without the option, on this machine. `shots`: stage and shot.

    Raises what the stages raise without the option.
    """
    calls = [(STAGE_BY_NAME[name], shot) for name, shot in shots]
    plain_s, plain = _timed(trial.profile, calls)
    try:
        tried_s, tried = _timed(trial.with_option, calls)
    # Compilers, kernels and packages raise errors of any class.
    except Exception as error:
        return TrialResult(error=f"{type(error).__name__}: {' '.join(str(error).split())}"[:MAX_REASON])
    levels = max(float(np.abs(a.astype(np.int16) - b).mean()) for a, b in zip(plain, tried, strict=True))
    return TrialResult(speedup=plain_s / tried_s, levels=levels)


def _timed(profile: Profile, calls: Iterable[tuple[type[Stage[Any]], Shot]]) -> tuple[float, list[NDArray[np.uint8]]]:
    """Return the seconds of the calls, without the first one of each, and their results."""
    seconds, results = 0.0, []
    for stage_class, shot in calls:
        with stage_class(profile.params(stage_class)) as stage:
            item, durations = _item_for(stage_class, shot), []
            for _ in range(CALLS + 1):
                begun = time.perf_counter()
                # A result is an array on the host, so the GPU has finished.
                result = _result(stage, item)
                durations.append(time.perf_counter() - begun)
            seconds += median(durations[1:])
            results.append(result)
        del stage
        free_gpu_memory()
    return seconds, results


def _result(stage: Stage[Any], item: Item) -> NDArray[np.uint8]:
    """Return the image or the frames that the stage makes; one chunk of a chunked stage."""
    (name,) = stage.writes
    if not isinstance(stage, ChunkedStage):
        return stage(item)[name]  # type: ignore[literal-required,no-any-return]  # the name of an artefact
    frames = item.artefacts[stage.takes[0]]  # type: ignore[literal-required]
    return stage.run_chunk(item.shot, *stage.first_chunk(item.shot, frames))


def _item_for(stage_class: type[Stage[Any]], shot: Shot) -> Item:
    """Return the shot with invented inputs: smooth images that move, and the features of no real face."""
    random = np.random.default_rng(0)
    small = PILImage.fromarray(random.integers(0, 256, (9, 16, 3), np.uint8))
    image = np.asarray(small.resize((shot.width, shot.height), PILImage.Resampling.BICUBIC))
    embedding = random.standard_normal(512).astype(np.float32)
    eyes_nose_mouth = np.array([[0.4, 0.4], [0.6, 0.4], [0.5, 0.5], [0.42, 0.6], [0.58, 0.6]], np.float32)
    available = {
        "photos": (image,),
        "image": image,
        "last_image": image,
        "frames": np.stack([np.roll(image, 4 * n, 1) for n in range(shot.clip_frames)]),
        "face": FaceFeatures(
            embeddings={"antelopev2": embedding * 20, "ir_se50": embedding / np.linalg.norm(embedding)},
            keypoints=eyes_nose_mouth * np.array([shot.width, shot.height], np.float32),
            box=(0.3 * shot.width, 0.3 * shot.height, 0.7 * shot.width, 0.7 * shot.height),
            score=1.0,
            faces_found=1,
            photo_size=(shot.width, shot.height),
            digest="",
        ),
    }
    needs = {name: available[name] for name in stage_class.needs(shot)}
    return Item(with_local_loras(shot), Artefacts(**needs))  # type: ignore[typeddict-item]


TIMEOUT_S = 1800.0
"""Longest trial: a model is loaded twice, and compiled."""


def run_trials(
    profile: Profile, shots: Sequence[Shot], address: str | None, cluster: Cluster, on_message: Callable[[str], None]
) -> Profile:
    """Return the profile with settled speed options. Those of the actors that the shots pass are tried if it is not known
    whether they help on the GPUs of the cluster, the one at `address` or this machine.

    Without a free GPU, or if the stages fail without the option, an option stays untried and is left out. Raises OSError if a
    result cannot be stored.
    """
    from vidgen_ray.engine.ray_cluster import connected

    examples: dict[str, dict[str, Shot]] = {}
    for shot in shots:
        for stage in (stage for stage in stages_of(shot) if stage.actor in profile.actors):
            examples.setdefault(stage.actor, {}).setdefault(stage.name, shot)
    actors = [actor for actor in examples if any(True for _ in open_trials(profile, actor, cluster.kinds))]
    with connected(address, 0) if actors else nullcontext():
        for actor in actors:
            try_options(profile, actor, cluster.kinds, partial(_run, list(examples[actor].items())), on_message)
    return settled(profile, cluster.kinds)


def _run(shots: list[tuple[str, Shot]], trial: Trial, card: str) -> TrialResult | None:
    """Return the result of a trial. `None` if no GPU of this kind is free, or if the stages fail without the option."""
    import ray

    from vidgen_ray.engine.ray_cluster import live_cluster

    resources: dict[str, Any] = {"num_cpus": 1, "max_retries": 0, "max_calls": 1}
    if trial.profile.actors[trial.actor].device == "cuda":
        free = next((node for node in live_cluster().free.nodes if card in Cluster((node,)).kinds), None)
        if free is None:
            return None
        resources |= {"num_gpus": 1, "label_selector": dict([free.label]) if free.label else {}}
    call = ray.remote(**resources)(try_option).remote(trial, shots)
    try:
        result: TrialResult = ray.get(call, timeout=TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(call, force=True)
        return TrialResult(error=f"timeout: it did not end within {TIMEOUT_S:g} s")
    except ray.exceptions.RayTaskError:
        return None
    # A crash of its process: of a compiled kernel, or for lack of memory.
    except ray.exceptions.RayError as error:
        return TrialResult(error=f"crash: {type(error).__name__}")
    return result
