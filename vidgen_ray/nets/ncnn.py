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

FP32, FP16 = 0, 0x01306B47
CONVOLUTION, PRELU = "Convolution", "PReLU"
OUTPUTS, WEIGHTS = 0, 6
"""Keys of a Convolution's values. OUTPUTS is also the number of slopes of a PReLU."""
DENSE_BLOCK = (CONVOLUTION, "Concat") * 4 + (CONVOLUTION, "Eltwise")


@dataclass(frozen=True, slots=True)
class Layer:
    """One line of the text file."""

    kind: str
    values: dict[int, str]


def read_realesrgan(param: Path, binary: Path) -> dict[str, torch.Tensor]:
    """Return the fp32 state dict with the names of the official .pth.

    The names are `body.N` for SRVGGNetCompact, and `conv_first`, `body.N.rdbM.convK`, `conv_body` and so on for RRDBNet.
    fp16 weights are converted to fp32 without loss. Raises SetupError for anything but one of the two networks at its own
    scale. ncnn's x2 and x3 variants have the same weights and an extra resize, which a state dict cannot express.
    """
    try:
        layers = [_layer(line.split()) for line in param.read_text("utf-8").splitlines()[2:]]
        content = _Binary(binary.read_bytes())
        tensors: dict[str, torch.Tensor] = {}
        layers_with_weights = [layer for layer in layers if layer.kind in (CONVOLUTION, PRELU)]
        for name, layer in zip(_official_names(layers), layers_with_weights, strict=True):
            outputs = int(layer.values[OUTPUTS])
            if layer.kind == PRELU:
                tensors[f"{name}.weight"] = content.floats(outputs)
                continue
            tensors[f"{name}.weight"] = content.flagged(int(layer.values[WEIGHTS])).reshape(outputs, -1, 3, 3)
            tensors[f"{name}.bias"] = content.floats(outputs)
        content.expect_end()
    except (OSError, ValueError, LookupError, RuntimeError, struct.error) as error:
        raise SetupError(f"{param}: cannot be read with {binary.name}: {error}") from error
    return tensors


def _layer(words: Sequence[str]) -> Layer:
    kind, _, n_inputs, n_outputs = words[:4]
    values = (word.split("=", 1) for word in words[4 + int(n_inputs) + int(n_outputs) :])
    return Layer(kind, {int(key): value for key, value in values})


def _official_names(layers: Sequence[Layer]) -> list[str]:
    """Return the official name of each layer that has weights, in file order. Raises ValueError for other networks."""
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
    raise ValueError(f"got the layers {got}, must be those of SRVGGNetCompact or RRDBNet at their own scale")


class _Binary:
    """Sequential reader of the binary file."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def flagged(self, count: int) -> torch.Tensor:
        (flag,) = struct.unpack("<I", self._take(4))
        if flag == FP32:
            return self.floats(count)
        if flag != FP16:
            raise ValueError(f"got weights flag {flag:#x}, must be {FP32:#x} (fp32) or {FP16:#x} (fp16)")
        halves: NDArray[np.float16] = np.frombuffer(self._take((2 * count + 3) // 4 * 4), "<f2", count)
        return torch.from_numpy(halves.astype(np.float32))

    def floats(self, count: int) -> torch.Tensor:
        return torch.from_numpy(np.frombuffer(self._take(4 * count), "<f4").astype(np.float32))

    def expect_end(self) -> None:
        if left := len(self._content) - self._at:
            raise ValueError(f"{left} bytes left over")

    def _take(self, n_bytes: int) -> bytes:
        self._at += n_bytes
        if self._at > len(self._content):
            raise ValueError(f"got {len(self._content)} bytes, must be at least {self._at}")
        return self._content[self._at - n_bytes : self._at]
