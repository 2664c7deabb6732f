"""Muon for the layers of a network: each update of a matrix is orthogonal, which needs far fewer steps than AdamW.

Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon, with the rates of Liu et al. 2025, arXiv:2502.16982.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn


def matrices(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the trained weights of linear and convolutional layers. Embeddings, biases and norms are left to AdamW."""
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    found = (layer.weight for module in modules for layer in module.modules() if isinstance(layer, layers))
    return list({id(weight): weight for weight in found if isinstance(weight, nn.Parameter) and weight.requires_grad}.values())


class Muon(torch.optim.Muon):
    """torch's Muon, which accepts matrices only, for kernels too: as matrices (out, in x height x width)."""

    def __init__(self, weights: Iterable[nn.Parameter], rate: float) -> None:
        self._weights = list(weights)
        self._flat = [nn.Parameter(weight.detach().flatten(1).clone()) for weight in self._weights]
        super().__init__(self._flat, rate, weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for weight, flat in zip(self._weights, self._flat, strict=True):
            flat.copy_(weight.flatten(1))
            flat.grad = None if weight.grad is None else weight.grad.flatten(1)
        super().step()
        for weight, flat in zip(self._weights, self._flat, strict=True):
            weight.copy_(flat.view(weight.shape))
