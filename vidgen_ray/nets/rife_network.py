"""RIFE: networks that draw the frame between two frames. Works on tensors and weights; does not know clips or shots.

Two layouts of `flownet.pkl` are read: HDv3, which draws the middle of two frames, and that of RIFE 4.25, which draws any time.
Source: Huang et al. 2022, Real-Time Intermediate Flow Estimation for Video Frame Interpolation, arXiv:2011.06294;
hzwer/ECCV2022-RIFE `train_log/IFNet_HDv3.py` and hzwer/Practical-RIFE (both MIT).
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import grid_sample, interpolate, pad

from vidgen_ray.errors import SetupError
from vidgen_ray.nets.weight_files import library_errors, load_torch_file, require_finite_weights
from vidgen_ray.system.model_files import rife_file

HALVINGS = 4
"""Most halvings of the interval between two frames by a network that only draws the middle: times are sixteenths."""

TRAINING_ONLY = ("block_tea.", "teacher.", "caltime.")
"""Parts of the published files that only training needs."""


class Warped(NamedTuple):
    """Two frames (1, 3, H, W) that are moved along the estimated motion to the same time, and how they are mixed."""

    first: Tensor
    second: Tensor
    share: Tensor
    """Share of the first one in each pixel, (1, 1, H, W)."""
    flow: Tensor
    """(1, 4, H, W): x and y in pixels from each pixel to where it is in the first frame, and in the second."""

    def mixed(self) -> Tensor:
        return self.first * self.share + self.second * (1 - self.share)


class Rife(nn.Module):
    """Base of both layouts. Frames are (1, 3, H, W) in 0..1."""

    multiple: ClassVar[int]
    """Frames are padded with black on the right and at the bottom to multiples of this many pixels, as in the reference."""
    any_time: ClassVar[bool]
    """True if `warped` takes any time between 0 and 1, False if it takes 1/2 only."""

    def warped(self, first: Tensor, second: Tensor, time: float, flow_scale: float) -> Warped:
        """Move both frames to a time between 0 (the first frame) and 1. Sides are multiples of `multiple / flow_scale`."""
        raise NotImplementedError


class FramePair:
    """Draws frames between two frames of any size.

    A network that only draws the middle halves the interval again and again, up to `HALVINGS` times.
    """

    def __init__(self, network: Rife, first: Tensor, second: Tensor, flow_scale: float = 1.0) -> None:
        """`flow_scale` 0.5 estimates motion at half the resolution, for frames larger than 1080p."""
        self._network, self._flow_scale = network, flow_scale
        self._height, self._width = first.shape[2:]
        step = round(network.multiple / flow_scale)
        padding = (0, -self._width % step, 0, -self._height % step)
        self._first, self._second = pad(first, padding), pad(second, padding)
        self._middle = network.warped(self._first, self._second, 0.5, flow_scale)
        self._drawn = {Fraction(0): self._first, Fraction(1, 2): self._middle.mixed(), Fraction(1): self._second}

    def aligned(self) -> tuple[Tensor, Tensor]:
        """Return both frames, moved along the estimated motion to the middle of the interval. Alike unless there is a cut."""
        return self._cropped(self._middle.first), self._cropped(self._middle.second)

    def motion(self) -> Tensor:
        """Return the motion (1, 2, H, W) from the first frame to the second: x and y in pixels."""
        flow = self._cropped(self._middle.flow)
        return flow[:, 2:] - flow[:, :2]

    def at(self, time: Fraction) -> Tensor:
        """Return the frame at a time between 0 (the first frame) and 1."""
        return self._cropped(self._at(time))

    def _at(self, time: Fraction) -> Tensor:
        if not self._network.any_time:
            time = Fraction(round(time * 2**HALVINGS), 2**HALVINGS)
        if time not in self._drawn:
            if self._network.any_time:
                warped = self._network.warped(self._first, self._second, float(time), self._flow_scale)
            else:
                # An odd numerator lies halfway between its neighbours, which are coarser.
                half = Fraction(1, time.denominator)
                warped = self._network.warped(self._at(time - half), self._at(time + half), 0.5, self._flow_scale)
            self._drawn[time] = warped.mixed()
        return self._drawn[time]

    def _cropped(self, frame: Tensor) -> Tensor:
        return frame[..., : self._height, : self._width]


class RifeHDv3(Rife):
    """IFNet of RIFE HDv3: three blocks from coarse to fine refine the flows to both frames and the mask that mixes them."""

    multiple: ClassVar[int] = 32
    any_time: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__()
        self.block0, self.block1, self.block2 = (_BlockV3(11, 90) for _ in range(3))

    def warped(self, first: Tensor, second: Tensor, time: float, flow_scale: float) -> Warped:
        """Move both frames to the middle. Each block sees them in both orders, so that the result is symmetric."""
        flow = first.new_zeros((1, 4, *first.shape[2:]), dtype=torch.float32)
        mask = flow[:, :1]
        warped_first, warped_second = first, second
        for block, coarseness in zip((self.block0, self.block1, self.block2), (4, 2, 1), strict=True):
            scale = coarseness / flow_scale
            forward, forward_mask = block(torch.cat((warped_first, warped_second, mask), 1), flow, scale)
            swapped = torch.cat((warped_second, warped_first, -mask), 1)
            backward, backward_mask = block(swapped, _swap(flow), scale)
            flow = flow + (forward + _swap(backward)) / 2
            mask = mask + (forward_mask - backward_mask) / 2
            warped_first, warped_second = warp(first, flow[:, :2]), warp(second, flow[:, 2:])
        return Warped(warped_first, warped_second, torch.sigmoid(mask), flow)


class Rife425(Rife):
    """IFNet of RIFE 4.25: five blocks that also see the time, features of both frames and those of the block before."""

    multiple: ClassVar[int] = 128
    any_time: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.encode = _Encoder()
        self.block0 = _BlockV4(7 + 8, 192)
        self.block1, self.block2, self.block3, self.block4 = (_BlockV4(8 + 4 + 8 + 8, size) for size in (128, 96, 64, 32))

    def warped(self, first: Tensor, second: Tensor, time: float, flow_scale: float) -> Warped:
        times = torch.full_like(first[:, :1], time, dtype=torch.float32)
        features_first, features_second = self.encode(first), self.encode(second)
        inputs = torch.cat((first, second, features_first, features_second, times), 1)
        flow, mask, features = self.block0(inputs, None, 16 / flow_scale)
        for block, coarseness in zip((self.block1, self.block2, self.block3, self.block4), (8, 4, 2, 1), strict=True):
            parts = (
                warp(first, flow[:, :2]),
                warp(second, flow[:, 2:]),
                warp(features_first, flow[:, :2]),
                warp(features_second, flow[:, 2:]),
                times,
                mask,
                features,
            )
            change, mask, features = block(torch.cat(parts, 1), flow, coarseness / flow_scale)
            flow = flow + change
        return Warped(warp(first, flow[:, :2]), warp(second, flow[:, 2:]), torch.sigmoid(mask), flow)


class _BlockV3(nn.Module):
    """Inputs and flow at a coarser scale -> change of the flow (4 channels) and of the mask, at the scale of the inputs."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.conv0 = nn.Sequential(_conv_v3(inputs, channels // 2, 2), _conv_v3(channels // 2, channels, 2))
        self.convblock0, self.convblock1, self.convblock2, self.convblock3 = (
            nn.Sequential(_conv_v3(channels, channels), _conv_v3(channels, channels)) for _ in range(4)
        )
        self.conv1, self.conv2 = (_enlarge_v3(channels, outputs) for outputs in (4, 1))

    def forward(self, inputs: Tensor, flow: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        small = torch.cat((_resize(inputs, 1 / scale), _resize(flow, 1 / scale) / scale), 1)
        features = self.conv0(small.to(_dtype_of(self)))
        for block in (self.convblock0, self.convblock1, self.convblock2, self.convblock3):
            features = block(features) + features
        flow_change, mask_change = self.conv1(features).float(), self.conv2(features).float()
        return _resize(flow_change, scale) * scale, _resize(mask_change, scale)


class _BlockV4(nn.Module):
    """Inputs and flow at a coarser scale -> change of the flow (4), mask (1) and features (8), at the scale of the inputs."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        self.conv0 = nn.Sequential(_conv_v4(inputs, channels // 2), _conv_v4(channels // 2, channels))
        self.convblock = nn.Sequential(*(_ResidualConv(channels) for _ in range(8)))
        self.lastconv = nn.Sequential(nn.ConvTranspose2d(channels, 4 * 13, 4, 2, 1), nn.PixelShuffle(2))

    def forward(self, inputs: Tensor, flow: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        small = _resize(inputs, 1 / scale)
        if flow is not None:
            small = torch.cat((small, _resize(flow, 1 / scale) / scale), 1)
        output = self.lastconv(self.convblock(self.conv0(small.to(_dtype_of(self))))).float()
        output = _resize(output, scale)
        return output[:, :4] * scale, output[:, 4:5], output[:, 5:]


class _Encoder(nn.Module):
    """Frame (3 channels) -> features (4) of the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn0 = nn.Conv2d(3, 16, 3, 2, 1)
        self.cnn1 = nn.Conv2d(16, 16, 3, 1, 1)
        self.cnn2 = nn.Conv2d(16, 16, 3, 1, 1)
        self.cnn3 = nn.ConvTranspose2d(16, 4, 4, 2, 1)
        self.relu = nn.LeakyReLU(0.2)

    def forward(self, frame: Tensor) -> Tensor:
        features = frame.to(_dtype_of(self))
        for layer in (self.cnn0, self.cnn1, self.cnn2):
            features = self.relu(layer(features))
        encoded: Tensor = self.cnn3(features)
        return encoded.float()


class _ResidualConv(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1)
        self.beta = nn.Parameter(torch.ones((1, channels, 1, 1)))
        self.relu = nn.LeakyReLU(0.2)

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.relu(self.conv(features) * self.beta + features)
        return result


def _conv_v3(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.PReLU(outputs))


def _enlarge_v3(channels: int, outputs: int) -> nn.Sequential:
    half = channels // 2
    return nn.Sequential(
        nn.ConvTranspose2d(channels, half, 4, 2, 1), nn.PReLU(half), nn.ConvTranspose2d(half, outputs, 4, 2, 1)
    )


def _conv_v4(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.LeakyReLU(0.2))


def _swap(flow: Tensor) -> Tensor:
    """Swap the flows to the first and to the second frame."""
    return torch.cat((flow[:, 2:], flow[:, :2]), 1)


def _resize(pixels: Tensor, factor: float) -> Tensor:
    return interpolate(pixels, scale_factor=factor, mode="bilinear", align_corners=False, recompute_scale_factor=False)


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def warp(pixels: Tensor, flow: Tensor) -> Tensor:
    """Return the pixels (1, C, H, W) moved along a flow (1, 2, H, W): output (x, y) is input (x + flow_x, y + flow_y).

    Sampled bilinearly, with the border repeated, in float32: half precision resolves a position in 1024 pixels to a half.
    """
    height, width = flow.shape[2:]
    x = torch.linspace(-1, 1, width, device=flow.device) + flow[0, 0] / ((width - 1) / 2)
    y = torch.linspace(-1, 1, height, device=flow.device)[:, None] + flow[0, 1] / ((height - 1) / 2)
    grid = torch.stack((x, y), -1)[None]
    return grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=True)


def load_rife(path: Path, dtype: torch.dtype = torch.float32) -> Rife:
    """Load RIFE's weights from a file, or from the `flownet.safetensors` or `flownet.pkl` of a folder, for inference.

    Frames and flows stay in float32; `dtype` is that of the convolutions. Raises SetupError for other files.
    """
    file = rife_file(path)
    named = {name.removeprefix("module."): value for name, value in _read(file).items()}
    state = {name: value for name, value in named.items() if not name.startswith(TRAINING_ONLY)}
    network: Rife = Rife425() if "encode.cnn0.weight" in state else RifeHDv3()
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise SetupError(f"rife: {file} must have the layout of RIFE HDv3 or 4.25 ({reason})") from None
    require_finite_weights({f"rife {file}": network})
    return network.eval().requires_grad_(False).to(dtype)


def _read(file: Path) -> Mapping[str, Any]:
    """Return the state dict of a file. Raises SetupError."""
    from safetensors.torch import load_file

    with library_errors(f"rife: {file} cannot be read"):
        if file.suffix == ".safetensors":
            state: Mapping[str, Any] = load_file(file)
        else:
            state = load_torch_file(file)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise SetupError(f"rife: {file} must be a state dict: names and tensors")
    return state
