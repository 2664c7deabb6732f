"""First Block Cache: skip all blocks of a transformer but the first in steps in which the first one changes little.

The cache is diffusers'. A skipped step adds to the output of the first block what the other blocks added in the last computed
step. diffusers adds the residuals of a ControlNet between the blocks, in skipped steps a second time. Here they are added
within the blocks, once, and the ControlNet runs in computed steps only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import cycle
from math import ceil
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from vidgen_ray.nets.diffusers_private import first_block_states
from vidgen_ray.nets.torch_private import call_replaced
from vidgen_ray.stages.base import IN_KEY_IF_CHANGED
from vidgen_ray.stages.speed import BLOCKS, CompileParams, compile_without_hooks

if TYPE_CHECKING:
    import torch

    ResidualsOf = Callable[[], Mapping[str, Sequence[torch.Tensor] | None]]
    """Function that returns a ControlNet's residuals for one step, by argument of FLUX's transformer."""

RESIDUALS = {
    "transformer_blocks": "controlnet_block_samples",
    "single_transformer_blocks": "controlnet_single_block_samples",
}
"""List of FLUX's blocks -> argument of the transformer with the residuals that are added to their outputs."""
MIN_CACHED_STEPS = 12
"""Denoising steps below which the plan counts no gain: the changes from step to step are too large. *Assumed.*"""


class FirstBlockCacheParams(CompileParams):
    """Parameters of a stage with a transformer that can skip blocks in steps that change little."""

    first_block_cache: Annotated[float, IN_KEY_IF_CHANGED] = Field(default=0, ge=0, le=1)
    """Skip the other blocks of the transformer in steps in which what the first block adds has changed by at most this fraction
    since the last computed step. 0: compute all steps. Lossy. Few-step weights gain nothing. Source: ParaAttention."""


class FirstBlockCache:
    """First Block Cache of one transformer, which runs within `steps` only."""

    def __init__(self, network: Any, params: FirstBlockCacheParams) -> None:
        """Add the hooks to one of diffusers' transformers, to which all other options were applied."""
        from diffusers.hooks import FirstBlockCacheConfig

        self.network = network
        self._residuals_of: ResidualsOf | None = None
        blocks = [block for name in BLOCKS for block in getattr(network, name, ())]
        if params.compile:
            # The hooks choose in each step what runs, so they stay outside of what is compiled.
            compile_without_hooks(blocks)
        if all(hasattr(network, name) for name in RESIDUALS):
            self._add_residuals_within(blocks)
        network.enable_cache(FirstBlockCacheConfig(threshold=params.first_block_cache))
        self._states = first_block_states(blocks[0])

    @contextmanager
    def steps(self, *, guided: bool) -> Iterator[None]:
        """Cache the steps of one call of a pipeline in this block. `guided`: each step calls the network twice.

        Nothing is kept from an earlier call, nor after an error.
        """
        # Not all pipelines name their passes.
        passes = cycle(("cond", "uncond") if guided else ("cond",))

        def replacement(whole: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                with self.network.cache_context(next(passes)):
                    return whole(*args, **kwargs)

            return call

        self._states.clear()
        try:
            with call_replaced(self.network, replacement):
                yield
        finally:
            self._states.clear()

    def use_residuals(self, residuals_of: ResidualsOf | None) -> None:
        """Add these residuals in the current step and all later ones, if it is computed. `None`: add none."""
        if (residuals_of is None) != (self._residuals_of is None):
            # The step before had them, or had none.
            self._states.clear()
        self._residuals_of = residuals_of

    def _add_residuals_within(self, blocks: Sequence[Any]) -> None:
        """Have all blocks but the first add the residual of the block before to their inputs, and the last one its own, too."""
        from diffusers.hooks import HookRegistry, ModelHook

        places = [(kind, n) for kind in RESIDUALS for n in range(len(getattr(self.network, kind)))]

        def added(hidden_states: torch.Tensor, place: tuple[str, int]) -> torch.Tensor:
            residual = self._residual(*place)
            return hidden_states if residual is None else hidden_states + residual

        class AddsResidual(ModelHook):  # type: ignore[misc]  # diffusers is untyped, its classes are Any
            def __init__(self, number: int) -> None:
                self.number = number

            def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
                if self.number:
                    kwargs["hidden_states"] = added(kwargs["hidden_states"], places[self.number - 1])
                return args, kwargs

            def post_forward(self, module: Any, output: Any) -> Any:
                is_last = self.number == len(blocks) - 1
                return (output[0], added(output[1], places[-1])) if is_last else output

        for number, block in enumerate(blocks):
            HookRegistry.check_if_exists_or_initialize(block).register_hook(AddsResidual(number), "residuals")

    def _residual(self, kind: str, number: int) -> torch.Tensor | None:
        """Return what is added to the output of a block. A ControlNet with fewer blocks has one for several."""
        if self._residuals_of is None or not (residuals := self._residuals_of().get(RESIDUALS[kind])):
            return None
        return residuals[number // ceil(len(getattr(self.network, kind)) / len(residuals))]


class FirstBlockCaches:
    """First Block Caches of all transformers of a pipeline. None if the option is off."""

    def __init__(self, pipe: Any, params: FirstBlockCacheParams) -> None:
        """Add the hooks to the transformers of a loaded pipeline. Apply all other options before."""
        networks = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
        is_used = params.first_block_cache > 0
        self._caches = [FirstBlockCache(network, params) for network in networks if network is not None and is_used]

    @contextmanager
    def steps(self, *, guided: bool) -> Iterator[None]:
        """Cache the steps of one call of the pipeline in this block, see `FirstBlockCache.steps`."""
        with ExitStack() as stack:
            for cache in self._caches:
                stack.enter_context(cache.steps(guided=guided))
            yield


def cached_bytes(params: FirstBlockCacheParams, tokens: int, channels: int) -> int:
    """Return the bytes that the cache of one pass keeps: output of the first block, what it and what the others have added."""
    number_bytes = 4 if params.dtype == "float32" else 2
    return 3 * tokens * channels * number_bytes if params.first_block_cache else 0


def computed_share(params: FirstBlockCacheParams, steps: float, shares: Mapping[float, float]) -> float:
    """Return the expected seconds of a step relative to those without cache. `shares`: threshold -> measured ones."""
    import numpy as np

    if steps < MIN_CACHED_STEPS:
        return 1.0
    return float(np.interp(params.first_block_cache, [0.0, *shares], [1.0, *shares.values()]))
