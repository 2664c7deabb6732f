"""How every diffusers pipeline is loaded: local files, safetensors, the profile's dtype and device."""

import json
from typing import Any

from vidgen_ray.errors import SetupError
from vidgen_ray.nets.libraries import silence_libraries
from vidgen_ray.stages.base import StageParams, torch_dtype


def require_device(device: str) -> None:
    """SetupError where the device is a GPU and torch has none."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SetupError(f"the profile asks for device {device}, and torch {torch.__version__} sees no GPU here")


def load_pipeline(pipeline_class: Any, params: StageParams, **kwargs: Any) -> Any:
    """`pipeline_class.from_pretrained` on `params.weights`. SetupError where the folder is not such a pipeline."""
    silence_libraries()
    require_device(params.device)
    folder = params.weights
    try:
        kind = json.loads((folder / "model_index.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise SetupError(f"{folder}: no model_index.json; {pipeline_class.__name__} needs a diffusers folder") from None
    # Folders of other pipelines have parts of the same names, and diffusers would begin to put them together.
    # The last of them is diffusers' common base.
    wanted = [c.__name__ for c in pipeline_class.__mro__ if c.__name__.endswith("Pipeline")][:-1]
    if kind not in wanted:
        raise SetupError(f"{folder}: holds a {kind}, must be one of {', '.join(wanted)}")
    try:
        pipe = pipeline_class.from_pretrained(
            str(folder), dtype=torch_dtype(params.dtype), local_files_only=True, use_safetensors=True, **kwargs
        )
    # Damaged files raise whatever their reader stumbles over.
    except Exception as error:
        raise SetupError(f"{folder}: not the weights of {pipeline_class.__name__}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(params.device)
