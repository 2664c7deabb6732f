"""IR-SE50, the face recogniser that InfuseNet was trained with. Works on aligned faces.

The network has the layers and names of facexlib's `Backbone(50, 0.6, "ir_se")`, so that its published file
`recognition_arcface_ir_se50.pth` (43.8 M parameters) loads unchanged.
Source: Deng et al. 2019, ArcFace, arXiv:1801.07698; Hu et al. 2018, Squeeze-and-Excitation, arXiv:1709.01507;
TreB1eN/InsightFace_Pytorch `model.py`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from vidgen_ray.errors import SetupError
from vidgen_ray.nets.faces import CROP_PX, open_session
from vidgen_ray.nets.weight_files import load_torch_file

UNITS = (3, 4, 14, 3)
"""Units per stage. The first unit of a stage halves the image: 112 -> 56 -> 28 -> 14 -> 7."""
WIDTHS = (64, 128, 256, 512)
"""Channels per stage of the published network."""
LAST_SIDE_PX = CROP_PX // 16
EMBEDDING = 512
REDUCTION = 16
HINT = "use recognition_arcface_ir_se50.pth of facexlib, or an ONNX export of it"


class IRSE50(nn.Module):
    """Aligned faces (B, 3, 112, 112), BGR from -1 to 1 -> embeddings (B, 512) of length 1, in fp32."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.PReLU(widths[0])
        )
        units: list[nn.Module] = []
        inputs = widths[0]
        for width, n_units in zip(widths, UNITS, strict=True):
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
    """IR-SE50 recogniser from a `.pth` state dict, which is read without running code, or an `.onnx` export.

    Raises SetupError.
    """

    normalised = True

    def __init__(
        self, weights: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, threads: int | None = None
    ) -> None:
        if weights.suffix not in (".pth", ".onnx"):
            raise SetupError(f"ir_se50: got {str(weights)!r}, must end with .pth or .onnx; {HINT}")
        if not weights.is_file():
            raise SetupError(f"ir_se50: no file at {weights}; {HINT}")
        self._run = _load_onnx(weights, device, threads) if weights.suffix == ".onnx" else _load_torch(weights, device, dtype)
        try:
            trial = self.embed(np.zeros((1, CROP_PX, CROP_PX, 3), np.uint8))
        # onnxruntime raises many exception types for an export of another network.
        except Exception as error:
            raise SetupError(f"ir_se50 {weights}: does not take faces of {CROP_PX}x{CROP_PX} pixels; {HINT}") from error
        if trial.shape != (1, EMBEDDING) or not np.isfinite(trial).all():
            raise SetupError(
                f"ir_se50 {weights}: returns {trial.shape[1:]} numbers, finite: {np.isfinite(trial).all()}; "
                f"must be ({EMBEDDING},) finite numbers; {HINT}"
            )

    def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return embeddings (B, 512) of length 1 of aligned faces (B, 112, 112, 3) in BGR."""
        pixels = crops.astype(np.float32) / 255 * 2 - 1
        return self._run(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def read_network(file: Path) -> IRSE50:
    """Load the network of a `.pth` file on the CPU. The weights determine its widths."""
    try:
        state = load_torch_file(file)
    # torch raises many exception types for damaged files.
    except Exception as error:
        raise SetupError(f"ir_se50 {file}: cannot be read as a state dict; {HINT}: {error}") from error
    with torch.device("meta"):
        network = IRSE50(_widths(state, file))
    _require_same_tensors(network.state_dict(), state, file)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def _widths(state: Any, file: Path) -> tuple[int, ...]:
    first_units = [sum(UNITS[:stage]) for stage in range(len(UNITS))]
    try:
        return tuple(int(state[f"body.{unit}.res_layer.1.weight"].shape[0]) for unit in first_units)
    except (KeyError, TypeError, AttributeError, IndexError):
        raise SetupError(f"ir_se50 {file}: not the state dict of an IR-SE50; {HINT}") from None


def _require_same_tensors(expected: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor], file: Path) -> None:
    """Raise SetupError if a tensor is missing, unexpected or has another shape. The error names the first one."""
    # Old files lack num_batches_tracked, which inference does not use.
    names = [name for name in {**expected, **got} if not name.endswith("num_batches_tracked")]
    shapes = {name: [tuple(getattr(s[name], "shape", ())) if name in s else None for s in (got, expected)] for name in names}
    wrong = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    if wrong:
        name, (shape, must_be) = next(iter(wrong.items()))
        raise SetupError(
            f"ir_se50 {file}: {len(wrong)} of {len(names)} tensors differ, the first is {name}: "
            f"got {shape or 'none'}, must be {must_be or 'none'}; {HINT}"
        )


def _load_torch(file: Path, device: str, dtype: torch.dtype) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    network = read_network(file).to(device, dtype)

    @torch.inference_mode()
    def run(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        embeddings: NDArray[np.float32] = network(torch.from_numpy(pixels).to(device, dtype)).cpu().numpy()
        return embeddings

    return run


def _load_onnx(file: Path, device: str, threads: int | None) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    session = open_session(file, device, threads, f"ir_se50 {file}")
    name = session.get_inputs()[0].name

    def run(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        # One at a time: some exports have a fixed batch size of 1. Some lack the final normalisation.
        embeddings = np.concatenate([session.run(None, {name: face[None]})[0] for face in pixels]).astype(np.float32)
        return np.asarray(embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), np.float32)

    return run
