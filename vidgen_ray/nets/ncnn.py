"""Read Real-ESRGAN weights from ncnn's .param/.bin pair. Supports the two networks of Real-ESRGAN, not ncnn in general.

The text file lists one layer per line: `Kind name n_inputs n_outputs inputs.. outputs.. key=value..`. The binary file has
no header and stores the layers' values in the same order. A Convolution has a 4-byte flag that names the format of its
weights, the weights (OIHW), padded to 4 bytes, and its bias in fp32. A PReLU has fp32 slopes. No other layer here has values.
Source: Tencent/ncnn, `src/modelbin.cpp` and the load_model of each layer.
"""

import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vidgen_ray.errors import SetupError

MAGIC = "7767517"
FP32, FP16 = 0, 0x01306B47
CONVOLUTION, PRELU = "Convolution", "PReLU"
OUTPUTS, KERNEL, PADDING, BIAS, WEIGHTS = 0, 1, 4, 5, 6
"""Keys of a Convolution's values. OUTPUTS is also the number of slopes of a PReLU."""
DENSE_BLOCK = (CONVOLUTION, "Concat") * 4 + (CONVOLUTION, "Eltwise")


@dataclass(frozen=True, slots=True)
class Layer:
    """One line of the text file."""

    kind: str
    name: str
    values: dict[int, str]

    def number(self, key: int) -> int:
        """Return a count. ncnn omits zeros."""
        text = self.values.get(key, "0")
        if not text.isdecimal():
            raise SetupError(f"ncnn layer {self.name}: got {key}={text}, must be a whole number")
        return int(text)


def read_realesrgan(param: Path, binary: Path) -> dict[str, torch.Tensor]:
    """Return the fp32 state dict with the names of the official .pth.

    The names are `body.N` for SRVGGNetCompact, and `conv_first`, `body.N.rdbM.convK`, `conv_body` and so on for RRDBNet.
    fp16 weights are converted to fp32 without loss. Raises SetupError for anything but one of the two networks at its own
    scale. ncnn's x2 and x3 variants have the same weights and an extra resize, which a state dict cannot express.
    """
    layers = _read_layers(param)
    layers_with_weights = [layer for layer in layers if layer.kind in (CONVOLUTION, PRELU)]
    content = _Binary(binary)
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in zip(_official_names(layers, param), layers_with_weights, strict=True):
        if layer.kind == PRELU:
            tensors[f"{name}.weight"] = content.floats(layer, layer.number(OUTPUTS))
            continue
        outputs, inputs = _convolution_channels(layer, param)
        weights = content.flagged(layer, layer.number(WEIGHTS))
        tensors[f"{name}.weight"] = weights.reshape(outputs, inputs, 3, 3)
        tensors[f"{name}.bias"] = content.floats(layer, outputs)
    content.expect_end()
    return tensors


def _read_layers(param: Path) -> list[Layer]:
    magic, *lines = _content(param).decode("utf-8", "replace").split("\n")
    if magic.strip() != MAGIC:
        raise SetupError(f"{param}: begins with {magic[:20]!r}, must begin with ncnn's {MAGIC!r}")
    try:
        declared = int(lines[0].split()[0])
        layers = [_layer(line.split()) for line in lines[1:] if line.strip()]
    except (ValueError, IndexError) as error:
        raise SetupError(f"{param}: not ncnn's text format: {error}") from error
    if len(layers) != declared:
        raise SetupError(f"{param}: has {len(layers)} layers, must have {declared} as declared in its second line")
    return layers


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SetupError(f"{path}: cannot be read: {error.strerror}") from error


def _layer(words: Sequence[str]) -> Layer:
    kind, name, n_inputs, n_outputs = words[:4]
    values = (word.split("=", 1) for word in words[4 + int(n_inputs) + int(n_outputs) :])
    return Layer(kind, name, {int(key): value for key, value in values})


def _official_names(layers: Sequence[Layer], param: Path) -> list[str]:
    """Return the official name of each layer that has weights, in file order."""
    # ncnn inserts a Split after each result that is used twice. The other layers determine the network.
    kinds = tuple(layer.kind for layer in layers if layer.kind != "Split")
    activated = kinds.count(PRELU)
    if kinds == ("Input", *(CONVOLUTION, PRELU) * activated, CONVOLUTION, "PixelShuffle", "Interp", "BinaryOp"):
        return [f"body.{i}" for i in range(2 * activated + 1)]
    blocks = kinds.count("Eltwise") // 4
    trunk = (*DENSE_BLOCK * 3, "Eltwise") * blocks
    head = (CONVOLUTION, "BinaryOp", *("Interp", CONVOLUTION) * 2, CONVOLUTION, CONVOLUTION)
    if blocks and kinds == ("Input", CONVOLUTION, *trunk, *head):
        dense = [f"body.{b}.rdb{r}.conv{c}" for b in range(blocks) for r in (1, 2, 3) for c in range(1, 6)]
        return ["conv_first", *dense, "conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    got = ", ".join(f"{n} {kind}" for kind, n in Counter(kinds).items())
    raise SetupError(
        f"{param}: got the layers {got}, ending with {' '.join(kinds[-3:])}; "
        "must be those of SRVGGNetCompact or RRDBNet at their own scale"
    )


def _convolution_channels(layer: Layer, param: Path) -> tuple[int, int]:
    """Return output and input channels of a 3x3 convolution with padding 1 and a bias. The networks have no other kind."""
    geometry = {key: layer.number(key) for key in (KERNEL, PADDING, BIAS)}
    outputs, weights = layer.number(OUTPUTS), layer.number(WEIGHTS)
    if geometry != {KERNEL: 3, PADDING: 1, BIAS: 1} or outputs < 1 or weights < 1 or weights % (9 * outputs):
        got = " ".join(f"{key}={value}" for key, value in layer.values.items())
        raise SetupError(
            f"{param}, {layer.name}: got {got}; must be a 3x3 convolution with padding 1 and a bias (1=3 4=1 5=1), "
            "and 9 weights for each pair of channels"
        )
    return outputs, weights // (9 * outputs)


class _Binary:
    """Sequential reader of the binary file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._content = _content(path)
        self._at = 0

    def flagged(self, layer: Layer, count: int) -> torch.Tensor:
        (flag,) = struct.unpack("<I", self._take(layer, 4))
        if flag == FP32:
            return self.floats(layer, count)
        if flag == FP16:
            halves: NDArray[np.float16] = np.frombuffer(self._take(layer, (2 * count + 3) // 4 * 4), "<f2", count)
            return torch.from_numpy(halves.astype(np.float32))
        raise SetupError(
            f"{self._path}, {layer.name}: got weights flag {flag:#x}, must be {FP32:#x} (fp32) or {FP16:#x} (fp16)"
        )

    def floats(self, layer: Layer, count: int) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(self._take(layer, 4 * count), "<f4").astype(np.float32))

    def expect_end(self) -> None:
        left = len(self._content) - self._at
        if left:
            raise SetupError(f"{self._path}: {left} bytes left over; its .param must describe the whole file")

    def _take(self, layer: Layer, n_bytes: int) -> bytes:
        taken = self._content[self._at : self._at + n_bytes]
        if len(taken) < n_bytes:
            raise SetupError(
                f"{self._path}, {layer.name}: got {len(self._content)} bytes, must be at least {self._at + n_bytes}"
            )
        self._at += n_bytes
        return taken
