"""IR-SE50, the face recogniser that InfuseNet was trained with. Works on aligned faces.

The network has the layers and names of facexlib's `Backbone(50, 0.6, "ir_se")`, so that its published file
`recognition_arcface_ir_se50.pth` (43.8 M parameters) loads unchanged.
Source: Deng et al. 2019, ArcFace, arXiv:1801.07698; Hu et al. 2018, Squeeze-and-Excitation, arXiv:1709.01507;
TreB1eN/InsightFace_Pytorch `model.py`.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from vidgen_ray.nets.faces import CROP_PX
from vidgen_ray.nets.weight_files import library_errors, load_torch_file, require_finite_weights

_UNITS = (3, 4, 14, 3)
"""Units per stage. The first unit of a stage halves the image: 112 -> 56 -> 28 -> 14 -> 7."""
_WIDTHS = (64, 128, 256, 512)
"""Channels per stage of the published network."""
LAST_SIDE_PX = CROP_PX // 16
EMBEDDING = 512
REDUCTION = 16
HINT = "use recognition_arcface_ir_se50.pth of facexlib"


class IRSE50(nn.Module):
    """Aligned faces (B, 3, 112, 112), BGR from -1 to 1 -> embeddings (B, 512) of length 1, in fp32."""

    def __init__(self, widths: tuple[int, ...] = _WIDTHS) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.PReLU(widths[0])
        )
        units: list[nn.Module] = []
        inputs = widths[0]
        for width, n_units in zip(widths, _UNITS, strict=True):
            units += [_Unit(inputs, width, stride=2), *(_Unit(width, width, stride=1) for _ in range(n_units - 1))]
            inputs = width
        self.body = nn.Sequential(*units)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Dropout(0.6),
            nn.Flatten(),
            nn.Linear(inputs * LAST_SIDE_PX**2, EMBEDDING),
            nn.BatchNorm1d(EMBEDDING),
        )

    def forward(self, faces: torch.Tensor) -> torch.Tensor:
        embeddings: torch.Tensor = self.output_layer(self.body(self.input_layer(faces)))
        return functional.normalize(embeddings.float())


class _Unit(nn.Module):
    """Residual unit with squeeze and excitation: (B, C, H, W) -> (B, D, H/stride, W/stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        if inputs != outputs:
            self.shortcut_layer = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            _SqueezeExcite(outputs),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.res_layer(x) + self.shortcut_layer(x)
        return result


class _SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        # At least one channel, for the narrow networks in tests.
        hidden = max(1, channels // REDUCTION)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        means = x.mean((2, 3), keepdim=True)
        weights: torch.Tensor = self.fc2(self.fc1(means).relu()).sigmoid()
        return x * weights


class IRSE50Embedder:
    """IR-SE50 recogniser from a `.pth` state dict, which is read without running code. Raises SetupError."""

    normalised = True

    def __init__(
        self, weights: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, threads: int | None = None
    ) -> None:
        self._network = read_network(weights).to(device, dtype)

    @torch.inference_mode()
    def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return embeddings (B, 512) of length 1 of aligned faces (B, 112, 112, 3) in BGR."""
        pixels = np.ascontiguousarray((crops.astype(np.float32) / 255 * 2 - 1).transpose(0, 3, 1, 2))
        weight = next(self._network.parameters())
        embeddings: NDArray[np.float32] = self._network(torch.from_numpy(pixels).to(weight.device, weight.dtype)).cpu().numpy()
        return embeddings


def read_network(file: Path) -> IRSE50:
    """Load the network of a `.pth` file on the CPU. The weights determine its widths. Raises SetupError."""
    with library_errors(f"ir_se50 {file}: not the weights of an IR-SE50; {HINT}"):
        state = load_torch_file(file)
        with torch.device("meta"):
            network = IRSE50(_widths(state))
        network.load_state_dict(state, assign=True)
        require_finite_weights({"ir_se50": network})
    return network.eval().requires_grad_(False)


def _widths(state: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    first_units = [sum(_UNITS[:stage]) for stage in range(len(_UNITS))]
    return tuple(int(state[f"body.{unit}.res_layer.1.weight"].shape[0]) for unit in first_units)
