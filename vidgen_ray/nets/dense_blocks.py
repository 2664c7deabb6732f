"""ESRGAN's trunk with a Triton kernel, for GPUs: the convolutions of a dense block write next to their inputs in one buffer.

spandrel's network concatenates the outputs of a block before each convolution, and activates, scales and adds in kernels of
their own. That moves 2560 channels of memory per pixel and block, this module 896. Source: Wang et al. 2018, arXiv:1809.00219.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

FEATURES, GROWTH = 64, 32
"""Channels of the trunk, and of each but the last convolution of a dense block."""
BLOCK_CHANNELS = FEATURES + 4 * GROWTH
RESIDUAL_SCALE = 0.2
SLOPE = 0.2
"""Of leaky ReLU."""
TILE_HEIGHT, TILE_WIDTH = 8, 16
"""Pixels of one program."""


@triton.jit  # type: ignore[untyped-decorator]
def _convolve(  # type: ignore[no-untyped-def]
    source,  # channels 0 to CHANNELS of (frames, height, width, BLOCK)
    weight,  # (3, 3, CHANNELS, OUTPUTS)
    bias,  # (OUTPUTS,)
    target,  # channels of a buffer like the source
    first,  # the input of the trunk's block, for the last dense block
    height,
    width,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    KIND: tl.constexpr,  # 0: activate, 1: add the input of the dense block, 2: and that of the trunk's block
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SLOPE_: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Compute a 3x3 convolution with zero padding, and what follows it, for one tile of a frame."""
    place = tl.arange(0, ROWS * COLUMNS)
    column = tl.program_id(0) * COLUMNS + place % COLUMNS
    row = tl.program_id(1) * ROWS + place // COLUMNS
    inside = (row < height) & (column < width)
    # Offsets of large clips exceed 32 bits.
    pixel = (tl.program_id(2).to(tl.int64) * height + row) * width + column
    outputs = tl.arange(0, OUTPUTS)
    total = tl.zeros((ROWS * COLUMNS, OUTPUTS), tl.float32)
    steps: tl.constexpr = CHANNELS // STEP
    # One loop over the nine pixels and their channels, so that loads run ahead of products.
    for step in range(9 * steps):
        tap = step // steps
        down, right = tap // 3 - 1, tap % 3 - 1
        seen = inside & (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
        channels = step % steps * STEP + tl.arange(0, STEP)
        neighbour = (pixel + down * width + right) * BLOCK
        values = tl.load(source + neighbour[:, None] + channels[None, :], mask=seen[:, None], other=0.0)
        factors = tl.load(weight + (tap * CHANNELS + channels)[:, None] * OUTPUTS + outputs[None, :])
        total = tl.dot(values, factors, total, input_precision="ieee")
    total += tl.load(bias + outputs).to(tl.float32)[None, :]
    place_of = pixel[:, None] * BLOCK + outputs[None, :]
    if KIND == 0:
        total = tl.where(total > 0, total, total * SLOPE_)
    else:
        total = total * SCALE + tl.load(source + place_of, mask=inside[:, None], other=0.0).to(tl.float32)
    if KIND == 2:
        total = total * SCALE + tl.load(first + place_of, mask=inside[:, None], other=0.0).to(tl.float32)
    tl.store(target + place_of, total.to(target.dtype.element_ty), mask=inside[:, None])


class DenseTrunk:
    """Runs spandrel's RRDBNet with the kernel. Its results differ from those of the network by rounding."""

    def __init__(self, network: Any) -> None:
        """`network`: one that `supports`. Its weights must stay where they are, and keep their dtype."""
        self._network = network
        trunk = network.model[1].sub
        self._blocks = [[list(map(_packed, _convolutions(dense))) for dense in _dense_blocks(block)] for block in trunk[:-1]]

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return what the network returns: (T, 3, H, W) -> (T, 3, scale * H, scale * W)."""
        first, shortcut, *rest = self._network.model
        features = first(pixels)
        result: Tensor = features + shortcut.sub[-1](self._trunk(features))
        for layer in rest:
            result = layer(result)
        return result

    def _trunk(self, features: Tensor) -> Tensor:
        """Run the blocks: (T, 64, H, W) -> the same."""
        frames, _, height, width = features.shape
        # The input of a block of the trunk stays in the first buffer until its last dense block replaces it.
        buffers = [features.new_empty((frames, height, width, BLOCK_CHANNELS)) for _ in range(3)]
        buffers[0][..., :FEATURES] = features.permute(0, 2, 3, 1)
        for block in self._blocks:
            for number, convolutions in enumerate(block):
                source, target = buffers[number], buffers[(number + 1) % 3]
                for position, (weight, bias) in enumerate(convolutions):
                    is_last = position == len(convolutions) - 1
                    kind = 0 if not is_last else 1 if number < 2 else 2
                    _run(source, weight, bias, target if is_last else source[..., weight.shape[2] :], buffers[0], kind)
        return buffers[0][..., :FEATURES].permute(0, 3, 1, 2)


def _run(source: Tensor, weight: Tensor, bias: Tensor, target: Tensor, first: Tensor, kind: int) -> None:
    frames, height, width, _ = source.shape
    grid = (triton.cdiv(width, TILE_WIDTH), triton.cdiv(height, TILE_HEIGHT), frames)
    constants = (*weight.shape[2:], BLOCK_CHANNELS, kind, GROWTH, TILE_HEIGHT, TILE_WIDTH, SLOPE, RESIDUAL_SCALE)
    _convolve[grid](source, weight, bias, target, first, height, width, *constants, num_warps=4, num_stages=4)


def supports(network: Any) -> bool:
    """Return whether a network is an RRDBNet of the usual sizes, such as x4plus."""
    try:
        dense = [dense for block in network.model[1].sub[:-1] for dense in _dense_blocks(block)]
        shapes = {tuple(conv.weight.shape for conv in _convolutions(each)) for each in dense}
        acts = [getattr(each, f"conv{n}")[1] for each in dense for n in range(1, 5)]
    except (AttributeError, IndexError, TypeError):
        return False
    inputs = [FEATURES + n * GROWTH for n in range(5)]
    usual = tuple((FEATURES if n == 4 else GROWTH, channels, 3, 3) for n, channels in enumerate(inputs))
    is_plain = all(isinstance(act, torch.nn.LeakyReLU) and act.negative_slope == SLOPE for act in acts)
    return shapes == {usual} and is_plain and all(each.conv1x1 is None for each in dense) and not network.shuffle_factor


def _dense_blocks(block: Any) -> tuple[Any, Any, Any]:
    return block.RDB1, block.RDB2, block.RDB3


def _convolutions(dense: Any) -> Iterator[Any]:
    """Yield the five convolutions. The last one has no activation."""
    for part in (dense.conv1, dense.conv2, dense.conv3, dense.conv4, dense.conv5):
        yield part[0] if isinstance(part, torch.nn.Sequential) else part


def _packed(convolution: torch.nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Return the weights as (3, 3, inputs, outputs), and the bias."""
    assert convolution.bias is not None
    return convolution.weight.permute(2, 3, 1, 0).contiguous(), convolution.bias
