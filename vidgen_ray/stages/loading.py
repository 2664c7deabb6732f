"""Load diffusers pipelines from local safetensors, and move their weights between GPU memory and host memory."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from inspect import isfunction, signature
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar
from weakref import WeakKeyDictionary

from vidgen_ray.errors import SetupError
from vidgen_ray.nets.deferred_imports import deferred_imports
from vidgen_ray.nets.diffusers_private import search_hooks_once
from vidgen_ray.nets.torch_private import plain_tensors
from vidgen_ray.nets.weight_files import library_errors, require_finite_weights, silence_libraries
from vidgen_ray.stages.base import NOT_IN_KEY, Artefacts, Item, Stage, StageParams, torch_dtype
from vidgen_ray.stages.memory_table import TILES_PX, activation_bytes
from vidgen_ray.stages.schedules import use_schedule
from vidgen_ray.stages.speed import CompileParams, compute_in_fp8, is_in_fp8, require_fp8, speed_up
from vidgen_ray.system.model_files import check_pipeline_folder

if TYPE_CHECKING:
    import torch


_Networks = Callable[[StageParams, Collection[str]], Mapping[str, Any]]
"""Parameters of a stage and its components in float32 -> component of its pipeline -> network."""
_networks: ContextVar[_Networks | None] = ContextVar("_networks", default=None)


@contextmanager
def networks_from(make: _Networks) -> Iterator[None]:
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


def diffusers_classes(params: StageParams, *names: str) -> tuple[Any, ...]:
    """Return classes of diffusers, imported with what a stage with these parameters needs."""
    with deferred_imports_of(params):
        import diffusers

        return tuple(getattr(diffusers, name) for name in names)


def deferred_imports_of(params: StageParams) -> AbstractContextManager[None]:
    return deferred_imports(params.device, compiles=getattr(params, "compile", False))


def load_pipeline(
    pipeline_class: Any,
    params: StageParams,
    *,
    accepted_classes: Sequence[str] = (),
    float32_parts: Sequence[str] = (),
    cpu_offload: bool = False,
    host_parts: frozenset[str] = frozenset(),
    **kwargs: Any,
) -> Any:
    """Return `pipeline_class.from_pretrained(params.weights)`. Raises SetupError if the folder holds no such pipeline.

    `accepted_classes`: names of further classes whose folders `pipeline_class` loads, such as text to video for image to video.
    `float32_parts`: components that keep float32 with any dtype. `cpu_offload`: keep the weights in host memory and move each
    part to the GPU when it runs. No effect on a CPU. `host_parts`: components that stay on the host; the caller moves them.
    `kwargs` may give components that are loaded already. Their weights are not checked for NaN.
    """
    silence_libraries()
    require_device(params.device)
    if is_in_fp8(params):
        require_fp8(params)
    folder = params.weights
    # The last class is diffusers' common base class.
    classes = [c.__name__ for c in pipeline_class.__mro__ if c.__name__.endswith("Pipeline")][:-1]
    check_pipeline_folder(folder, list(dict.fromkeys([*classes, *accepted_classes])))
    if (make := _networks.get()) is not None:
        kwargs |= make(params, float32_parts)
    given = kwargs.keys() - host_parts
    dtypes = {"default": torch_dtype(params.dtype), **dict.fromkeys(float32_parts, torch_dtype("float32"))}
    offloads = cpu_offload and params.device != "cpu"
    # Files are mapped, and their tensors go to the GPU one by one, also if they are converted on the way.
    direct = {"device_map": params.device} if not cpu_offload and params.device != "cpu" else {}
    load = partial(pipeline_class.from_pretrained, str(folder), dtype=dtypes, local_files_only=True, use_safetensors=True)
    with library_errors(f"{folder}: not the weights of {pipeline_class.__name__}"), deferred_imports_of(params):
        if direct and (missing := host_parts - kwargs.keys()):
            # A pipeline is loaded to one device.
            others = (name for name in pipeline_class.load_config(str(folder)) if not name.startswith("_"))
            on_host = load(**dict.fromkeys(name for name in others if name not in missing))
            kwargs |= {name: on_host.components[name] for name in missing}
        pipe = load(**direct, **kwargs)
    use_schedule(pipe, params)
    pipe.set_progress_bar_config(disable=True)
    search_hooks_once()
    import torch

    networks = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    _keep_signatures(pipe, networks.values())
    loaded = {f"{folder}: {name}": part for name, part in networks.items() if name not in given}
    if offloads:
        for name, network in loaded.items():
            move_networks([network], params.device)
            require_finite_weights({name: network})
            move_networks([network], "cpu")
        _offload(list(networks.values()), params.device)
        return pipe
    for name, network in networks.items():
        if name not in host_parts:
            network.to(params.device)
    require_finite_weights(loaded, device=params.device)
    return pipe


def _keep_signatures(pipe: Any, networks: Iterable[torch.nn.Module]) -> None:
    """Keep the signatures of functions for which diffusers asks in each call: of attention, in every block of every step."""
    processors = {type(vars(module).get("processor")) for network in networks for module in network.modules()}
    set_timesteps = getattr(pipe.components.get("scheduler"), "set_timesteps", None)
    functions = (type(pipe).__init__, getattr(set_timesteps, "__func__", None), *(kind.__call__ for kind in processors))
    for function in filter(isfunction, functions):
        vars(function)["__signature__"] = signature(function)


def speed_up_transformers(pipe: Any, params: OffloadedParams) -> None:
    """Apply the options that make the transformers of a loaded pipeline faster. Merge LoRAs before."""
    for name in ("transformer", "transformer_2"):
        if (transformer := getattr(pipe, name, None)) is None:
            continue
        if is_in_fp8(params):
            compute_in_fp8(transformer, params.device)
            if params.cpu_offload:
                move_networks([transformer], "cpu")
        speed_up(transformer, params)


def _offload(networks: Sequence[torch.nn.Module], device: str) -> None:
    """Have each of the networks on the GPU only while it runs, alone. The one that ran last stays there.

    A replacement of diffusers' `enable_model_cpu_offload`, whose hooks copy weights back to host memory. diffusers finds the
    device of the pipeline by the hook, and calls it for `vae.encode` and `vae.decode`, too.
    """
    import torch
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Alone(ModelHook):  # type: ignore[misc]  # accelerate has no types
        execution_device = torch.device(device)

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            move_networks([network for network in networks if network is not module], "cpu")
            move_networks([module], device)
            return args, kwargs

    for network in networks:
        add_hook_to_module(network, Alone())


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


_own_dtypes: WeakKeyDictionary[Any, dict[str, torch.dtype]] = WeakKeyDictionary()
"""Network -> name of a tensor -> dtype with which it was loaded."""


@contextmanager
def dtypes_kept(network: Any) -> Iterator[None]:
    """Run a block that casts weights of a network, and casts them back at its end. They are cast back after an error, too.

    diffusers casts autoencoders in float16 to float32, and fp8 layers to 16 bits. If there is no memory to cast them back, the
    next block begins with that.
    """
    _restore_dtypes(network)
    try:
        yield
    except BaseException:
        with suppress(Exception):
            _restore_dtypes(network)
        raise


def _restore_dtypes(network: Any) -> None:
    own = _own_dtypes.setdefault(network, {})
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        if tensor.dtype != own.setdefault(name, tensor.dtype):
            tensor.data = tensor.data.to(own[name])


ADAPTER = "lora_"
"""Part of the names of the parameters that peft adds for a LoRA."""
_COPY = "_vidgen_host_copy"
"""Attribute of a tensor on a GPU: its copy in host memory."""


def move_networks(networks: Iterable[Any], device: str) -> None:
    """Move torch modules to `device`, `cpu` for host memory. Anything else among `networks` is ignored.

    A network gets a copy of its weights in pinned host memory when it moves for the first time. Later, its GPU copy is
    dropped and the host copy is used again, since inference does not change weights. Adapters of LoRAs are copied each time:
    they are small, and are loaded and replaced while the network is in use.
    """
    import torch

    # In inference mode, weights would become tensors that cannot be changed outside of it, as those of LoRAs are, and for which
    # networks are compiled again.
    with torch.inference_mode(False), torch.no_grad():
        for network in networks:
            if not isinstance(network, torch.nn.Module):
                continue
            for name, tensor in (*network.named_parameters(), *network.named_buffers()):
                for plain in plain_tensors(tensor):
                    if device == "cpu":
                        _to_host(name, plain)
                    else:
                        _to_gpu(name, plain, device)
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.synchronize(device)


def pin_networks(networks: Iterable[torch.nn.Module]) -> None:
    """Give networks the copy in pinned host memory that `move_networks` would make later. Those on the host stay there."""
    for network in networks:
        for tensor in (*network.parameters(), *network.buffers()):
            for plain in plain_tensors(tensor):
                if not _is_on_host(plain):
                    setattr(plain, _COPY, _pinned_copy(plain))
                elif not _is_pinned(plain):
                    plain.data = _pinned_copy(plain)


def _to_host(name: str, tensor: torch.Tensor) -> None:
    copy = getattr(tensor, _COPY, None)
    if copy is None:
        if _is_on_host(tensor):
            return
        copy = _pinned_copy(tensor)
    tensor.data = copy
    setattr(tensor, _COPY, None)


def _to_gpu(name: str, tensor: torch.Tensor, device: str) -> None:
    if not _is_on_host(tensor):
        return
    # Adapters may change in place while they are on the GPU.
    is_kept = ADAPTER not in name
    host = _pinned_copy(tensor) if is_kept and not _is_pinned(tensor) else tensor.data
    tensor.data = _on_device(host, device, non_blocking=_is_pinned(host))
    setattr(tensor, _COPY, host if is_kept else None)


def _is_on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _is_pinned(tensor: torch.Tensor) -> bool:
    """Return whether a tensor on the host can be copied to a GPU at the full rate of the bus. Without a GPU, none is copied."""
    import torch

    return not torch.cuda.is_available() or tensor.is_pinned()


def _on_device(host: torch.Tensor, device: str, *, non_blocking: bool) -> torch.Tensor:
    return host.to(device, non_blocking=non_blocking)


def _pinned_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in host memory; pinned, so that it is copied to a GPU at the full rate of the bus, if there is one."""
    import torch

    copy = torch.empty_like(tensor, device="cpu", pin_memory=torch.cuda.is_available())
    copy.copy_(tensor)
    return copy


class OffloadParams(StageParams):
    cpu_offload: Annotated[bool, NOT_IN_KEY] = False
    """Keep the weights in host memory and move each part (text encoder, transformer, autoencoder) to the GPU when it runs."""


class OffloadedParams(OffloadParams, CompileParams):
    """Parameters of a stage with one diffusers pipeline, whose transformer can be made faster."""


class TiledParams(StageParams):
    """Parameters of a stage that makes images."""

    vae_tile_px: Literal[512, 256] | None = None
    """Side of the tiles in which the autoencoder works, for large images on small GPUs. `None`: on whole images."""


class ImageParams(OffloadedParams, TiledParams):
    """Parameters of a stage with one diffusers pipeline that makes images and sees others."""


OP = TypeVar("OP", bound=OffloadParams)
IP = TypeVar("IP", bound=ImageParams)


TP = TypeVar("TP", bound=TiledParams)


def with_smaller_tiles(params: TP) -> TP | None:
    """Return the parameters with the next smaller tiles of the autoencoder. `None` if there are none."""
    larger = (None, *TILES_PX)
    smaller = dict(pairwise(larger)).get(params.vae_tile_px)
    return None if smaller is None else params.model_copy(update={"vae_tile_px": smaller})


class TiledStage(Stage[TP]):
    """A stage that makes images, whose autoencoder works in tiles if there is little memory."""

    @classmethod
    def lower_memory(cls, params: TP) -> TP | None:
        return with_smaller_tiles(params)


class OffloadedStage(Stage[OP]):
    """A stage with one diffusers pipeline, loaded by `load_pipeline` with `cpu_offload`."""

    pipe: Any

    def __call__(self, item: Item) -> Artefacts:
        try:
            return super().__call__(item)
        finally:
            if self.params.cpu_offload:
                move_networks(self.pipe.components.values(), "cpu")

    def move(self, device: str) -> None:
        # Offloaded weights are in host memory whenever the stage does not run.
        if not self.params.cpu_offload:
            move_networks(self.pipe.components.values(), device)


class ImageStage(OffloadedStage[IP], TiledStage[IP]):
    """An offloaded stage that makes an image, for which the photos of the shot's face may be reference images."""

    identity_field: ClassVar[str] = "uses_reference_photos"
    identity_fields: ClassVar[tuple[str, ...]] = ("face_image",)
    identity_inputs: ClassVar[tuple[str, ...]] = ("photos",)
    writes: ClassVar[tuple[str, ...]] = ("image",)


def autoencoder_peaks(model: str, params: ImageParams, pixels: int, seen_pixels: int) -> tuple[int, int]:
    """Return the bytes of activations of encoding an image of `seen_pixels`, and of decoding one of `pixels`."""
    if params.vae_tile_px is None:
        encode = activation_bytes(f"{model}/encode", seen_pixels, params.dtype)
        return encode, activation_bytes(f"{model}/decode", pixels, params.dtype)
    decode = activation_bytes(f"{model}/decode:tile{params.vae_tile_px}", pixels, params.dtype)
    # The image itself, in the precision of the network and in float32.
    image = seen_pixels * 3 * (2 + 4)
    return activation_bytes(f"{model}/encode", params.vae_tile_px**2, params.dtype) + image, decode
