"""Step caches: reuse results of earlier denoising steps where they hardly change. Faster, and an approximation.

The caches are diffusers' hooks. This module gives them a fresh state per call and the context that some pipelines do not set.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import cycle
from typing import Any, Literal

StepCacheName = Literal["none", "first_block", "magcache", "taylorseer"]

WITHOUT_RESIDUALS = ("first_block", "magcache")
"""Caches that skip whole blocks. A ControlNet's residuals are added between blocks, also in skipped steps, where the cached
result has them already."""


class TransformerStepCache:
    """Step cache of a diffusers transformer. Use: `with cache.running(...)` around a pipeline call.

    `first_block` skips the other blocks while the residual of the first block changes by less than `threshold`. `magcache`
    skips all blocks while the error that is estimated from FLUX's published magnitudes is below `threshold`. `taylorseer`
    computes attention in every `interval`-th step and extrapolates in between.
    Source: ParaAttention's First Block Cache; Ma et al. 2025, MagCache, arXiv:2506.09045; Liu et al. 2025, TaylorSeer,
    arXiv:2503.06923; diffusers `hooks`.
    """

    def __init__(self, network: Any, name: StepCacheName, threshold: float, interval: int) -> None:
        self._network, self._name, self._threshold, self._interval = network, name, threshold, interval
        self._applied: tuple[int, int] | None = None
        """Steps of the schedule and steps that are run of the call that the cache is enabled for. `None`: it is disabled."""

    @contextmanager
    def running(self, schedule_steps: int, steps: int, passes: int, has_residuals: bool) -> Iterator[None]:
        """Run one pipeline call with a fresh cache.

        `steps` at the end of the `schedule_steps` are run, with `passes` of the network per step. `has_residuals`: a ControlNet
        adds residuals to the blocks. The call runs without the cache if that does not support them.
        """
        from diffusers.hooks import HookRegistry

        self._apply(None if has_residuals and self._name in WITHOUT_RESIDUALS else (schedule_steps, steps))
        # A cancelled call leaves its state behind.
        HookRegistry.check_if_exists_or_initialize(self._network).reset_stateful_hooks()
        with _cache_contexts(self._network, ("cond", "uncond")[:passes]):
            yield

    def _apply(self, call: tuple[int, int] | None) -> None:
        """Enable the cache for this number of steps, or disable it. It stays as it is if that is possible, because a compiled
        network is compiled again when the hooks change."""
        if call == self._applied or (call and self._applied and self._name != "magcache"):
            return
        if self._applied is not None:
            self._network.disable_cache()
        if call is not None:
            self._network.enable_cache(self._config(*call))
        self._applied = call

    def _config(self, schedule_steps: int, steps: int) -> Any:
        from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, nearest_interp

        if self._name == "first_block":
            return FirstBlockCacheConfig(self._threshold)
        if self._name == "taylorseer":
            return TaylorSeerCacheConfig(cache_interval=self._interval, taylor_factors_dtype=self._network.dtype)
        ratios = nearest_interp(FLUX_MAG_RATIOS, schedule_steps)[-steps:]
        return MagCacheConfig(self._threshold, num_inference_steps=steps, mag_ratios=ratios)


@contextmanager
def _cache_contexts(network: Any, names: tuple[str, ...]) -> Iterator[None]:
    """Name the passes of each step in turn. Caches keep one state per name. FLUX image to image names no passes."""
    next_name = cycle(names)
    current = ExitStack()

    def enter(*_: Any) -> None:
        current.enter_context(network.cache_context(next(next_name)))

    def leave(*_: Any) -> None:
        current.close()

    handles = (
        network.register_forward_pre_hook(enter),
        network.register_forward_hook(leave, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        current.close()
