"""Memory plan of a single process that runs all stages, as in the library and in `vidgen shot`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vidgen_ray.errors import SetupError
from vidgen_ray.planner.cluster import Node
from vidgen_ray.planner.gpu_assignment import CONTEXT_GB, needed_gb, with_swapping
from vidgen_ray.planner.memory import actors_of
from vidgen_ray.profile import Profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Stage


def swap_groups(
    profile: Profile, stages: Sequence[type[Stage[Any]]], shots: Sequence[Shot], machine: Node
) -> tuple[tuple[str, ...], ...]:
    """Return the groups of stages that take turns on the first GPU. Empty if all fit together, or if there is no GPU.

    Raises SetupError if the stages or one of the shots do not fit.
    """
    if not machine.gpus:
        return ()
    gpu_gb = machine.gpus[0]
    actors, memories = actors_of(profile, stages, shots, gpu_gb)
    if refused := [reason for memory in memories for reason in memory.refused]:
        raise SetupError(refused[0])
    process = with_swapping(actors, gpu_gb)
    if process is None:
        needed = needed_gb([actor for actor in actors if actor.on_gpu]) + CONTEXT_GB
        raise SetupError(f"profile {profile.name}: the stages need {needed:.4g} GB of GPU memory, the GPU has {gpu_gb:.4g}")
    if machine.memory_gb is not None and process.host_gb > machine.memory_gb:
        raise SetupError(
            f"profile {profile.name}: needs {process.host_gb:.4g} GB of host memory, this machine has {machine.memory_gb:.4g}"
        )
    return tuple(tuple(stage for actor in group for stage in actor.stages) for group in process.swap_groups)
