"""Quantised weights of diffusion transformers: quantised while they are loaded, or files that are quantised already."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vidgen_ray.errors import SetupError

if TYPE_CHECKING:
    import torch

Quantization = Literal["none", "fp8", "fp8_weights", "int8_weights", "nf4", "fp8_storage"]
"""`fp8`: weights and activations, computed in 8 bits, on GPUs since Ada and Hopper. `fp8_weights`, `int8_weights`, `nf4`:
weights only, computed in the stage's dtype. `fp8_storage`: weights stored in fp8 and cast before each layer, without a further
package."""

PACKAGES = {"fp8": "torchao", "fp8_weights": "torchao", "int8_weights": "torchao", "nf4": "bitsandbytes"}
"""Package that a quantisation needs. All are in the extra `quantization`."""
NEEDS_GPU = {"fp8": "compute capability 8.9 (Ada, Hopper) or later", "nf4": "any compute capability"}
"""Quantisations that torchao or diffusers refuse to make without a GPU, and the GPU that they need."""
NUNCHAKU = "nunchaku_lite"
"""Name of nunchaku's quantisation in a `config.json`."""


def load_quantized(model_class: Any, folder: Path, quantize: Quantization, dtype: torch.dtype) -> Any:
    """Load a diffusers model from a folder and quantise it. For all but `fp8_storage`, which `nets.fp8` applies.

    Raises SetupError if the package is missing, or a GPU that it needs.
    """
    _require(PACKAGES[quantize], f"quantize: {quantize}")
    if quantize in NEEDS_GPU and not _has_gpu():
        raise SetupError(
            f"quantize: {quantize} needs an NVIDIA GPU of {NEEDS_GPU[quantize]}; without one use fp8_storage or int8_weights"
        )
    config = _bitsandbytes_config(dtype) if quantize == "nf4" else _torchao_config(quantize)
    return model_class.from_pretrained(
        str(folder), quantization_config=config, dtype=dtype, local_files_only=True, use_safetensors=True
    )


def load_quantized_file(model_class: Any, path: Path, config_folder: Path, dtype: torch.dtype) -> Any:
    """Load a model that is quantised already: a .gguf file, or a diffusers folder whose config names its quantisation.

    `config_folder` is the folder of the unquantised model, whose configuration a .gguf file does not have.
    Raises SetupError if a package is missing or the path holds neither.
    """
    if path.suffix == ".gguf":
        from diffusers import GGUFQuantizationConfig

        _require("gguf", path.name)
        return model_class.from_single_file(
            str(path),
            quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
            config=str(config_folder),
            dtype=dtype,
            local_files_only=True,
        )
    config = path / "config.json"
    if not config.is_file():
        raise SetupError(f"{path}: must be a .gguf file, or a folder with a config.json and the weights of a transformer")
    # diffusers downloads the kernels of these weights from the hub and runs them. A stage never downloads anything.
    if (json.loads(config.read_text(encoding="utf-8")).get("quantization_config") or {}).get("quant_method") == NUNCHAKU:
        raise SetupError(f"{path}: weights of nunchaku are not supported, because diffusers downloads code to run them")
    return model_class.from_pretrained(str(path), dtype=dtype, local_files_only=True, use_safetensors=True)


def _torchao_config(quantize: Quantization) -> Any:
    from diffusers import TorchAoConfig
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
    )

    kinds = {
        "fp8": Float8DynamicActivationFloat8WeightConfig,
        "fp8_weights": Float8WeightOnlyConfig,
        "int8_weights": Int8WeightOnlyConfig,
    }
    return TorchAoConfig(kinds[quantize]())


def _bitsandbytes_config(dtype: torch.dtype) -> Any:
    from diffusers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _require(package: str, option: str) -> None:
    if find_spec(package) is None:
        raise SetupError(f"{option} needs the package {package}; pip install 'vidgen-ray[quantization]'")
