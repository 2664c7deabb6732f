"""The order in which shots are rendered so that adapters are changed seldom. Knows no stage and no worker."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from vidgen_ray.content_keys import ShotPlan

T = TypeVar("T")

WINDOW = 4096
"""Shots that are put in order together: some megabytes."""


def in_lora_order(items: Iterable[T], plan_of: Callable[[T], ShotPlan], window: int = WINDOW) -> Iterator[T]:
    """The same items, those with the same LoRAs side by side, and of these the ones with the same prompt.

    Looks `window` items ahead and holds no more. Each window begins with the LoRAs that the one before it ended with, if
    it has them; otherwise groups, and the shots in them, keep their order.
    """
    if window < 1:
        raise ValueError(f"window: got {window}, must be at least 1")
    rest = iter(items)
    worn: frozenset[str] | None = None
    while ahead := list(islice(rest, window)):
        groups: dict[frozenset[str], dict[str, list[T]]] = {}
        for item in ahead:
            plan = plan_of(item)
            groups.setdefault(_loras(plan), {}).setdefault(plan.shot.prompt, []).append(item)
        for loras in sorted(groups, key=lambda loras: loras != worn):
            for same_prompt in groups[loras].values():
                yield from same_prompt
            # Shots without LoRAs leave on the weights what is there.
            worn = loras or worn


def _loras(plan: ShotPlan) -> frozenset[str]:
    """What has to be laid on the weights. How strongly it acts is no part of that."""
    return frozenset(lora.path for lora in plan.shot.lora)
