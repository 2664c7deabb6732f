"""IR-SE50, the recogniser whose embedding InfuseNet was trained with. Knows aligned faces, not photos.

The network and its names are those of facexlib's `Backbone(50, 0.6, "ir_se")`, so that its published file loads as it is:
`recognition_arcface_ir_se50.pth`, 43.8 M parameters.
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
from vidgen_ray.nets.face_alignment import CROP_PX
from vidgen_ray.nets.onnx_sessions import open_session

UNITS = (3, 4, 14, 3)
"""Of each stage; the first unit of a stage halves the picture: 112 -> 56 -> 28 -> 14 -> 7."""
WIDTHS = (64, 128, 256, 512)
"""Channels of each stage in the published network."""
LAST_SIDE_PX = CROP_PX // 16
EMBEDDING = 512
REDUCTION = 16
WHAT_TO_DO = "give recognition_arcface_ir_se50.pth of facexlib, or an ONNX export of it"


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
    """Two convolutions, their channels weighed by their means, and a shortcut: (B, C, H, W) -> (B, D, H/stride, W/stride)."""

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
        # Narrow networks, as tests have them, keep one channel.
        hidden = max(1, channels // REDUCTION)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        means = x.mean((2, 3), keepdim=True)
        shares: torch.Tensor = self.fc2(self.fc1(means).relu()).sigmoid()
        return x * shares


class IRSE50Embedder:
    """`weights`: a `.pth` state dict, read without running code, or an `.onnx` export. Raises SetupError."""

    normalised = True

    def __init__(
        self, weights: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, threads: int | None = None
    ) -> None:
        if weights.suffix not in (".pth", ".onnx"):
            raise SetupError(f"ir_se50: got {str(weights)!r}, must end with .pth or .onnx; {WHAT_TO_DO}")
        if not weights.is_file():
            raise SetupError(f"ir_se50: no file at {weights}; {WHAT_TO_DO}")
        self._run = _of_onnx(weights, device, threads) if weights.suffix == ".onnx" else _of_torch(weights, device, dtype)
        try:
            trial = self.embed(np.zeros((1, CROP_PX, CROP_PX, 3), np.uint8))
        # An export of another network raises whatever onnxruntime stumbles over.
        except Exception as error:
            raise SetupError(f"ir_se50 {weights}: does not take faces of {CROP_PX}x{CROP_PX} pixels; {WHAT_TO_DO}") from error
        if trial.shape != (1, EMBEDDING) or not np.isfinite(trial).all():
            raise SetupError(
                f"ir_se50 {weights}: gives {trial.shape[1:]} numbers, finite: {np.isfinite(trial).all()}; "
                f"must be ({EMBEDDING},) finite ones; {WHAT_TO_DO}"
            )

    def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Aligned faces (B, 112, 112, 3) in BGR -> (B, 512), each of length 1."""
        pixels = crops.astype(np.float32) / 255 * 2 - 1
        return self._run(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def read_network(file: Path) -> IRSE50:
    """The network with the weights of a `.pth` file, on the CPU; its widths are told by the weights."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    # Damaged files raise whatever their reader stumbles over.
    except Exception as error:
        raise SetupError(f"ir_se50 {file}: cannot be read as a state dict; {WHAT_TO_DO}: {error}") from error
    with torch.device("meta"):
        network = IRSE50(_widths(state, file))
    _require_same_tensors(network.state_dict(), state, file)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def _widths(state: Any, file: Path) -> tuple[int, ...]:
    firsts = [sum(UNITS[:stage]) for stage in range(len(UNITS))]
    try:
        return tuple(int(state[f"body.{unit}.res_layer.1.weight"].shape[0]) for unit in firsts)
    except (KeyError, TypeError, AttributeError, IndexError):
        raise SetupError(f"ir_se50 {file}: not the state dict of an IR-SE50; {WHAT_TO_DO}") from None


def _require_same_tensors(wanted: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor], file: Path) -> None:
    """SetupError naming the first tensor that is missing, superfluous or of another shape."""
    # A count of training steps that old files do not have and nobody reads.
    names = [name for name in {**wanted, **got} if not name.endswith("num_batches_tracked")]
    shapes = {name: [tuple(getattr(s[name], "shape", ())) if name in s else None for s in (got, wanted)] for name in names}
    wrong = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    if wrong:
        name, (shape, must_be) = next(iter(wrong.items()))
        raise SetupError(
            f"ir_se50 {file}: {len(wrong)} of {len(names)} tensors differ, the first is {name}: "
            f"got {shape or 'none'}, must be {must_be or 'none'}; {WHAT_TO_DO}"
        )


def _of_torch(file: Path, device: str, dtype: torch.dtype) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    network = read_network(file).to(device, dtype)

    @torch.inference_mode()
    def run(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        embeddings: NDArray[np.float32] = network(torch.from_numpy(pixels).to(device, dtype)).cpu().numpy()
        return embeddings

    return run


def _of_onnx(file: Path, device: str, threads: int | None) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    session = open_session(file, device, threads, f"ir_se50 {file}")
    name = session.get_inputs()[0].name

    def run(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        # One by one: exports for a single face are about, and so are such without the last step, the length of 1.
        found = np.concatenate([session.run(None, {name: face[None]})[0] for face in pixels]).astype(np.float32)
        return np.asarray(found / np.linalg.norm(found, axis=1, keepdims=True), np.float32)

    return run
