"""Fast convolutional networks on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn


def channels_last(net: nn.Module) -> None:
    """Convert a network to channels-last, apart from its group norms, whose gradients are 9 times slower in this layout."""
    for layer in net.modules():
        if isinstance(layer, nn.GroupNorm):
            layer.forward = partial(_normed, layer.forward)  # type: ignore[method-assign]
    net.to(memory_format=torch.channels_last)


def _normed(norm: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return norm(images.contiguous()).contiguous(memory_format=torch.channels_last)
