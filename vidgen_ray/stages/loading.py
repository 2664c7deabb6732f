"""Load diffusers pipelines from local safetensors, with the profile's dtype and device."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from vidgen_ray.errors import SetupError
from vidgen_ray.nets.finite import require_finite_weights
from vidgen_ray.nets.libraries import silence_libraries
from vidgen_ray.stages.base import StageParams, torch_dtype
from vidgen_ray.system.model_files import check_pipeline_folder

Networks = Callable[[StageParams], Mapping[str, Any]]
"""Parameters of a stage -> component of its pipeline -> network."""
_networks: ContextVar[Networks | None] = ContextVar("_networks", default=None)


@contextmanager
def networks_from(make: Networks) -> Iterator[None]:
    """Let `load_pipeline` use these networks in place of those in the folder, in this block. For measurements."""
    token = _networks.set(make)
    try:
        yield
    finally:
        _networks.reset(token)


def require_device(device: str) -> None:
    """Raise SetupError if the device is a GPU and torch finds none."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise SetupError(f"the profile asks for device {device}, but torch {torch.__version__} finds no GPU on this machine")


def load_pipeline(
    pipeline_class: Any,
    params: StageParams,
    *,
    also: Sequence[str] = (),
    float32_parts: Sequence[str] = (),
    cpu_offload: bool = False,
    place: bool = True,
    **kwargs: Any,
) -> Any:
    """Return `pipeline_class.from_pretrained(params.weights)`. Raises SetupError if the folder holds no such pipeline.

    `also`: names of further classes whose folders `pipeline_class` loads, such as that of text to video for image to video.
    `float32_parts`: components that keep float32 with any dtype. `cpu_offload`: keep the weights in host memory and move each
    part to the GPU when it runs. No effect on a CPU. `place`: move the weights to the device; otherwise the caller does.
    `kwargs` may give components that are loaded already. Their weights are not checked for NaN, which quantised ones do not
    support.
    """
    silence_libraries()
    require_device(params.device)
    folder = params.weights
    # The last class is diffusers' common base class.
    classes = [c.__name__ for c in pipeline_class.__mro__ if c.__name__.endswith("Pipeline")][:-1]
    check_pipeline_folder(folder, list(dict.fromkeys([*classes, *also])))
    if (make := _networks.get()) is not None:
        kwargs |= make(params)
    try:
        pipe = pipeline_class.from_pretrained(
            str(folder), dtype=_dtypes(params.dtype, float32_parts), local_files_only=True, use_safetensors=True, **kwargs
        )
    # diffusers raises many exception types for damaged files.
    except Exception as error:
        raise SetupError(f"{folder}: not the weights of {pipeline_class.__name__}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    if cpu_offload and params.device != "cpu":
        pipe.enable_model_cpu_offload(device=params.device)
    elif place:
        pipe.to(params.device)
    import torch

    try:
        parts = {
            name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module) and name not in kwargs
        }
        require_finite_weights(parts)
    except ValueError as error:
        raise SetupError(f"{folder}: {error}") from None
    return pipe


def _dtypes(dtype: str, float32_parts: Sequence[str]) -> Any:
    """Return the dtype of all components, or component -> dtype."""
    if not float32_parts:
        return torch_dtype(dtype)
    return {"default": torch_dtype(dtype), **{part: torch_dtype("float32") for part in float32_parts}}


def set_vae_tiles(vae: Any, tile_px: int | None) -> None:
    """Let a diffusers autoencoder work in overlapping square tiles of this side, in pixels. `None`: on whole images."""
    vae.use_tiling = tile_px is not None
    if tile_px is None:
        return
    if hasattr(vae, "tile_sample_min_height"):
        vae.tile_sample_min_height = vae.tile_sample_min_width = tile_px
        vae.tile_sample_stride_height = vae.tile_sample_stride_width = tile_px * 3 // 4
    else:
        vae.tile_sample_min_size = tile_px
        vae.tile_latent_min_size = tile_px // 2 ** (len(vae.config.block_out_channels) - 1)
