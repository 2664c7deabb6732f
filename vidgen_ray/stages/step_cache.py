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
NEVER_REUSE = {"first_block": -1.0, "magcache": 2.0}
"""Values of FirstBlockCache's threshold and of MagCache's retention ratio with which every step is computed."""


class TransformerStepCache:
    """Step cache of a diffusers transformer. Use: `with cache.running(...)` around a pipeline call.

    `first_block` skips the other blocks while the residual of the first block changes by less than `threshold`. `magcache`
    skips all blocks while the error that is estimated from FLUX's published magnitudes is below `threshold`. `taylorseer`
    computes attention in every `interval`-th step and extrapolates in between.
    Source: ParaAttention's First Block Cache; Ma et al. 2025, MagCache, arXiv:2506.09045; Liu et al. 2025, TaylorSeer,
    arXiv:2503.06923; diffusers `hooks`.
    """

    def __init__(self, network: Any, name: StepCacheName, threshold: float, interval: int) -> None:
        from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

        self._network, self._name, self._threshold = network, name, threshold
        configs = {
            "first_block": lambda: FirstBlockCacheConfig(threshold),
            "magcache": lambda: MagCacheConfig(threshold, mag_ratios=FLUX_MAG_RATIOS),
            "taylorseer": lambda: TaylorSeerCacheConfig(cache_interval=interval, taylor_factors_dtype=network.dtype),
        }
        self._config: Any = configs[name]()
        network.enable_cache(self._config)

    @contextmanager
    def running(self, schedule_steps: int, steps: int, passes: int, has_residuals: bool) -> Iterator[None]:
        """Run one pipeline call with a fresh cache.

        `steps` at the end of the `schedule_steps` are run, with `passes` of the network per step. `has_residuals`: a ControlNet
        adds residuals to the blocks. Every step is then computed in full if the cache does not support that.
        """
        # A cancelled call leaves its state behind.
        self._network._reset_stateful_cache()
        self._configure(schedule_steps, steps, reuse=not (has_residuals and self._name in WITHOUT_RESIDUALS))
        with _cache_contexts(self._network, ("cond", "uncond")[:passes]):
            yield

    def _configure(self, schedule_steps: int, steps: int, reuse: bool) -> None:
        """Set what depends on the call. The hooks stay, because registering them again would recompile the network."""
        from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK
        from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, MagCacheConfig, nearest_interp

        if self._name == "first_block":
            head = next(block for block in self._network.modules() if _hook(block, _FBC_LEADER_BLOCK_HOOK) is not None)
            _hook(head, _FBC_LEADER_BLOCK_HOOK).threshold = self._threshold if reuse else NEVER_REUSE[self._name]
        elif self._name == "magcache":
            self._config.num_inference_steps = steps
            self._config.mag_ratios = nearest_interp(FLUX_MAG_RATIOS, schedule_steps)[-steps:]
            self._config.retention_ratio = MagCacheConfig.retention_ratio if reuse else NEVER_REUSE[self._name]


class AttentionBroadcast:
    """Pyramid attention broadcast: computes self-attention in every `interval`-th step in the middle of the schedule.

    For networks that diffusers' other step caches do not support, such as SVD's UNet. The attention outputs of a step stay in
    memory.
    Source: Zhao et al. 2024, arXiv:2408.12588; diffusers `PyramidAttentionBroadcastConfig`.
    """

    def __init__(self, network: Any, interval: int) -> None:
        from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

        self._network = network
        self._position = 1000.0
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=interval, current_timestep_callback=lambda: self._position
        )
        apply_pyramid_attention_broadcast(network, config)

    @contextmanager
    def running(self, steps: int) -> Iterator[None]:
        """Run one pipeline call of this many steps, one pass of the network each, with a fresh cache."""
        from diffusers.hooks import HookRegistry

        registry = HookRegistry.check_if_exists_or_initialize(self._network)
        registry.reset_stateful_hooks()
        # diffusers' range is in timesteps of 1000. Timesteps of SVD are logarithms of noise levels, so the position in the
        # schedule takes their place.
        positions = iter([1000 * (1 - step / steps) for step in range(steps)])

        def next_step(*_: Any) -> None:
            self._position = next(positions)

        handle = self._network.register_forward_pre_hook(next_step)
        try:
            yield
        finally:
            handle.remove()
            # Free the attention outputs.
            registry.reset_stateful_hooks()


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


def _hook(module: Any, name: str) -> Any:
    registry = getattr(module, "_diffusers_hook", None)
    return None if registry is None else registry.get_hook(name)
