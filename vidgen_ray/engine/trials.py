"""Trials of speed options on a Ray cluster, as tasks that take one GPU each. See `planner/speed_trials.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from vidgen_ray.graph import stages_of
from vidgen_ray.planner.cluster import Cluster
from vidgen_ray.planner.loss import COMPARED_SHOTS
from vidgen_ray.planner.speed_trials import Trial, TrialResult, open_trials, settled, try_option, try_options
from vidgen_ray.profile import Profile
from vidgen_ray.render.oom_fallback import prepare_gpu
from vidgen_ray.shot import Shot

TIMEOUT_S = 1800.0
"""Longest trial of an option that rounds differently: a model is loaded twice, and compiled."""
LOSSY_TIMEOUT_S = 7200.0
"""Longest trial of a lossy option: three shots with all of their steps, with and without it. One of Wan takes 10 minutes on a
card of 24 GB."""


def run_trials(
    profile: Profile, shots: Sequence[Shot], address: str | None, cluster: Cluster, on_message: Callable[[str], None]
) -> Profile:
    """Return the profile with settled speed options. Those of the actors that the shots pass are tried if it is not known
    whether they help on the GPUs of the cluster, the one at `address` or this machine.

    Without a free GPU, or if the stages fail without the option, an option stays untried and is left out. Raises OSError if a
    result cannot be stored.
    """
    from vidgen_ray.engine.ray_cluster import connected

    examples: dict[str, list[tuple[str, Shot]]] = {}
    passed = Counter[str]()
    for shot in shots:
        for stage in (stage for stage in stages_of(shot) if stage.actor in profile.actors):
            if passed[stage.name] < COMPARED_SHOTS:
                passed[stage.name] += 1
                examples.setdefault(stage.actor, []).append((stage.name, shot))
    actors = [actor for actor in examples if any(True for _ in open_trials(profile, actor, cluster.kinds))]
    with connected(address, 0) if actors else nullcontext():
        for actor in actors:
            try_options(profile, actor, cluster.kinds, partial(_run, examples[actor]), on_message)
    return settled(profile, cluster.kinds)


def try_as_worker(trial: Trial, shots: Sequence[tuple[str, Shot]]) -> TrialResult:
    """Run a trial with the allocator settings of a worker. Raises what the stages raise without the option."""
    prepare_gpu(1.0)
    return try_option(trial, shots)


def _run(shots: list[tuple[str, Shot]], trial: Trial, card: str) -> TrialResult | None:
    """Return the result of a trial. `None` if no GPU of this kind is free, or if the stages fail without the option."""
    import ray

    from vidgen_ray.engine.ray_cluster import live_cluster

    actor = trial.profile.actors[trial.actor]
    # As a worker has: Ray sets the number of threads of libraries by the CPUs.
    resources: dict[str, Any] = {"num_cpus": actor.cpus, "max_retries": 0, "max_calls": 1}
    if actor.device == "cuda":
        free = next((node for node in live_cluster().free.nodes if card in Cluster((node,)).kinds), None)
        if free is None:
            return None
        resources |= {"num_gpus": 1, "label_selector": dict([free.label]) if free.label else {}}
    timeout_s = LOSSY_TIMEOUT_S if trial.limit else TIMEOUT_S
    call = ray.remote(**resources)(try_as_worker).remote(trial, shots)
    try:
        result: TrialResult = ray.get(call, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(call, force=True)
        return TrialResult(error=f"timeout: it did not end within {timeout_s:g} s")
    except ray.exceptions.RayTaskError:
        return None
    # A crash of its process: of a compiled kernel, or for lack of memory.
    except ray.exceptions.RayError as error:
        return TrialResult(error=f"crash: {type(error).__name__}")
    return result
