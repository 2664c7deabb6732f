"""The small trained models that are shipped with the package. They were trained by `training/`.

FLUX, HunyuanDiT and Stable Video Diffusion share one autoencoder, which is stored once, with FLUX. Wan shares FLUX's T5 and its
tokenizer. These models are copied together with the shared parts before use.
"""

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vidgen_ray import cache_dir

if TYPE_CHECKING:
    import torch

SHIPPED = Path(__file__).parent / "demo"
AUTOENCODER = SHIPPED / "flux" / "vae"
WITHOUT_AUTOENCODER = ("hunyuandit", "svd")
SHARED_WITH_FLUX = {"text_encoder": "text_encoder_2", "tokenizer": "tokenizer_2"}
"""Part of Wan -> the same part of FLUX."""
COMPACT_WEIGHTS, WHOLE_WEIGHTS = "compact.safetensors", "diffusion_pytorch_model.safetensors"
"""Weights of Wan as shipped and as loaded. Shipped matrices and kernels are in 8 bits with a scale per output channel. Kernels
over pixels and frames have only their last step in time, because the others are zero. `training/ship.py` writes them."""
SCALE = ":scale"
"""Suffix of the names of scales."""


def shipped_models() -> dict[str, Path]:
    """Return the models that are usable as shipped: name -> folder or file."""
    return {f"demo/{path.name}": path for path in sorted(SHIPPED.iterdir()) if path.name not in (*WITHOUT_AUTOENCODER, "wan")}


def digest(name: str) -> str:
    """Return a digest of the model's files and of the autoencoder. It changes when either is retrained."""
    parts = cache_dir.digest(SHIPPED / name), cache_dir.digest(AUTOENCODER)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def build_hunyuandit(folder: Path) -> None:
    """Write HunyuanDiT with the shared autoencoder."""
    _copy_with_autoencoder("hunyuandit", folder)


def build_svd(folder: Path) -> None:
    """Write Stable Video Diffusion with the shared autoencoder."""
    _copy_with_autoencoder("svd", folder)


def digest_of_wan() -> str:
    """Return a digest of Wan's own files and of those that it shares with FLUX."""
    parts = [SHIPPED / "wan", *(SHIPPED / "flux" / part for part in SHARED_WITH_FLUX.values())]
    return hashlib.sha256("\n".join(map(cache_dir.digest, parts)).encode()).hexdigest()[:16]


def build_wan(folder: Path) -> None:
    """Write Wan with FLUX's T5, and with its whole weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(SHIPPED / "wan", folder, dirs_exist_ok=True)
    for part, of_flux in SHARED_WITH_FLUX.items():
        shutil.copytree(SHIPPED / "flux" / of_flux, folder / part)
    for part in ("transformer", "vae"):
        shipped = folder / part / COMPACT_WEIGHTS
        save_file(whole(load_file(shipped)), folder / part / WHOLE_WEIGHTS)
        shipped.unlink()


def whole(stored: "Mapping[str, torch.Tensor]") -> "dict[str, torch.Tensor]":
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


def per_channel(scale: "torch.Tensor", tensor: "torch.Tensor") -> "torch.Tensor":
    """Return the scales of the output channels of a tensor in a shape that can be multiplied with it."""
    return scale.float().view(-1, *[1] * (tensor.dim() - 1))


def is_spatial(kernel: "torch.Tensor") -> bool:
    """Return whether a kernel covers 3x3 pixels, and one or three frames."""
    return kernel.dim() == 5 and kernel.shape[3:] == (3, 3)


def _copy_with_autoencoder(name: str, folder: Path) -> None:
    shutil.copytree(SHIPPED / name, folder, dirs_exist_ok=True)
    shutil.copytree(AUTOENCODER, folder / "vae")
