"""Store the weights of a network in 8 bits and compute in 16."""

from __future__ import annotations

from typing import Any

import torch

KEPT = ("pos_embed", "norm_q", "norm_k", "norm_added_q", "norm_added_k", "^x_embedder$", "^context_embedder$", "^proj_out$")
"""Parts of FLUX's transformer that stay in 16 bits: small ones, and its ends. Its modulation layers are not among them."""


def store_in_fp8(transformer: Any, dtype: torch.dtype) -> None:
    """Store the linear layers of FLUX's transformer as float8_e4m3fn. Each is converted to `dtype` while it runs.

    Half of the memory of 16 bits, at the price of the conversions. Source: diffusers, layerwise casting.
    """
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(transformer, torch.float8_e4m3fn, dtype, skip_modules_pattern=KEPT)
