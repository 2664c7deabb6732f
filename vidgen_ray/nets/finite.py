"""Checks for NaN and infinite numbers in weights and results."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NOT_FINITE = "the model returned NaN or infinite values; check the weights, the LoRAs and the profile's dtype"


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all numbers are finite. The result of a GPU tensor is waited for."""
    return bool(tensor.isfinite().all())


def not_finite(tensors: Mapping[str, Any]) -> str | None:
    """Return the name of the first tensor of floating-point numbers that are not all finite."""
    return next((name for name, tensor in tensors.items() if tensor.is_floating_point() and not is_finite(tensor)), None)


def require_finite_weights(networks: Mapping[str, Any]) -> None:
    """Raise ValueError if a parameter of a network holds NaN or infinity. `networks`: name -> torch module."""
    for name, network in networks.items():
        if (parameter := not_finite(dict(network.named_parameters()))) is not None:
            raise ValueError(
                f"{name}: {parameter} has NaN or infinite values; copy the weights again, or choose a dtype with their range"
            )
