"""Order of shots that minimizes LoRA changes. Independent of stages and workers."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from more_itertools import batched

from vidgen_ray.content_keys import ShotPlan

T = TypeVar("T")

WINDOW = 4096
"""Shots ordered together. A window takes some megabytes."""


def in_lora_order(items: Iterable[T], plan_of: Callable[[T], ShotPlan], window: int = WINDOW) -> Iterator[T]:
    """Yield all items, grouped by LoRAs and, within a group, by prompt.

    At most `window` items are held. Each window starts with the LoRAs that the previous one ended with, if it has them.
    Apart from that, groups and the shots in them keep their order.
    """
    if window < 1:
        raise ValueError(f"window: got {window}, must be at least 1")
    active: frozenset[str] | None = None
    for batch in batched(items, window):
        groups: dict[frozenset[str], dict[str, list[T]]] = {}
        for item in batch:
            plan = plan_of(item)
            groups.setdefault(_loras(plan), {}).setdefault(plan.shot.prompt, []).append(item)
        for loras in sorted(groups, key=lambda loras: loras != active):
            for same_prompt in groups[loras].values():
                yield from same_prompt
            # Shots without LoRAs do not change the active LoRAs.
            active = loras or active


def _loras(plan: ShotPlan) -> frozenset[str]:
    """Return the LoRA files that the shot needs. Their strength can change without loading them again."""
    return frozenset(lora.path for lora in plan.shot.lora)
