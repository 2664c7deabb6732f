"""Which stages live on which actors, how many of each, and with what share of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from vidgen_ray.profile import Profile
from vidgen_ray.stages.base import Stage
from vidgen_ray.stages.realesrgan import RealESRGANStage


@dataclass(frozen=True, slots=True)
class Pool:
    """Actors of one kind; `cpus` and `gpus` are of each."""

    name: str
    stages: tuple[type[Stage[Any]], ...]
    actors: int
    cpus: float
    gpus: float


@dataclass(frozen=True, slots=True)
class Layout:
    """`chain` in the order in which shots pass it; `upscalers` where any shot is upscaled."""

    chain: tuple[Pool, ...]
    upscalers: Pool | None

    @property
    def pools(self) -> tuple[Pool, ...]:
        return (*self.chain, self.upscalers) if self.upscalers else self.chain


def fits(layout: Layout, gpus: Sequence[int]) -> bool:
    """Whether the pools find places on nodes with so many GPUs each; an actor's share lies on one GPU.

    Largest first: it may miss a packing that exists, and never finds one that does not.
    """
    free = [1.0 for node in gpus for _ in range(node)]
    for share in sorted((pool.gpus for pool in layout.pools for _ in range(pool.actors) if pool.gpus), reverse=True):
        place = next((n for n, room in enumerate(free) if share <= room + 1e-6), None)
        if place is None:
            return False
        free[place] -= share
    return True


def layout_of(profile: Profile, stages: Sequence[type[Stage[Any]]]) -> Layout:
    """The pools for the stages a script uses; a stage that no shot passes has no actors.

    `staged`: a pool for each actor of the profile. `fused`: one pool whose actors hold the whole chain, which saves the
    start of processes where they would only wait for each other. Upscalers are a pool of their own in both.
    """
    chain = tuple(stage for stage in stages if stage is not RealESRGANStage)
    upscalers = _pool(profile, "realesrgan", (RealESRGANStage,)) if RealESRGANStage in stages else None
    if profile.layout == "fused" and chain:
        return Layout((_pool(profile, "chain", chain),), upscalers)
    by_actor = groupby(chain, key=lambda stage: stage.actor)
    return Layout(tuple(_pool(profile, actor, tuple(held)) for actor, held in by_actor), upscalers)


def _pool(profile: Profile, name: str, stages: tuple[type[Stage[Any]], ...]) -> Pool:
    shares = {stage.actor: profile.actor_of(stage) for stage in stages}.values()
    return Pool(
        name,
        stages,
        actors=min(share.actors for share in shares),
        # The stages of one actor run in turn, but their weights are there together.
        cpus=max(share.cpus for share in shares),
        gpus=sum(share.gpus for share in shares),
    )
