"""Everything that uses private names of diffusers. They may change with any version; each has a test."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

if TYPE_CHECKING:
    import torch

_SEARCH = "_get_top_level_group_offload_hook"
"""Private function of diffusers. A version without it searches in its own way."""


@cache
def search_hooks_once() -> None:
    """Have diffusers search a network for hooks once, not in all of its modules ten times per image, until one is registered.

    The hooks are those of group offloading, which tell the device, and of caches. Moving a network changes none of them.
    """
    from diffusers.hooks import HookRegistry, group_offloading

    without_hooks = WeakSet[Any]()
    search = vars(group_offloading).get(_SEARCH)
    reset, register = HookRegistry.reset_stateful_hooks, HookRegistry.register_hook

    def has_hooks(network: Any) -> bool:
        if network in without_hooks:
            return False
        if any("_diffusers_hook" in vars(module) and module._diffusers_hook.hooks for module in network.modules()):
            return True
        without_hooks.add(network)
        return False

    def register_hook(self: Any, *arguments: Any, **named: Any) -> None:
        # The module may be part of any network.
        without_hooks.clear()
        register(self, *arguments, **named)

    def reset_hooks(self: Any, recurse: bool = True) -> None:
        if has_hooks(self._module_ref):
            reset(self, recurse)

    if search is not None:
        vars(group_offloading)[_SEARCH] = lambda network: search(network) if has_hooks(network) else None
    HookRegistry.register_hook, HookRegistry.reset_stateful_hooks = register_hook, reset_hooks


def first_block_states(first_block: Any) -> dict[str, Any]:
    """Return what diffusers' First Block Cache keeps between steps, by pass. `first_block`: that of the transformer.

    diffusers drops it at the end of a pipeline's call only, not after an error.
    """
    from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK

    states: dict[str, Any] = first_block._diffusers_hook.get_hook(_FBC_LEADER_BLOCK_HOOK).state_manager._state_cache
    return states


def packed_flux_latents(pipe: Any, latents: torch.Tensor) -> torch.Tensor:
    """Return latents (1, 16, H/8, W/8) as tokens of FLUX (1, H/16 * W/16, 64)."""
    packed: torch.Tensor = pipe._pack_latents(latents, *latents.shape)
    return packed


def unpacked_ltx_latents(pipe: Any, tokens: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """Return tokens of LTX as latents for its autoencoder, not normalised. `size`: latent frames, height and width."""
    vae = pipe.vae
    latents = pipe._unpack_latents(tokens, *size, pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size)
    unpacked: torch.Tensor = pipe._denormalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    return unpacked
