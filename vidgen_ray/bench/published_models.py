"""Networks of the published models at full size, without their files: their configs, and random weights for measurements.

Networks with random weights need as much time and memory as the published ones, and give meaningless images.

The configs are in `published_networks.json`. Their sources:

FLUX.1, HunyuanDiT and SDXL: `config.json` of the published repositories, as copied in lllyasviel/stable-diffusion-webui-forge,
`backend/huggingface/`, commit dfdcbab6. HunyuanDiT-v1.2 differs from the copied v1.0 in `use_style_cond_and_image_meta_size`.
SVD-XT: the defaults of diffusers' classes, which were written for it. InfuseNet: FLUX.1-dev's config with 4 double and 10
single blocks, as in modelscope/DiffSynth-Studio `diffsynth/configs/model_configs.py`; its size agrees with the published file
(11.8 GB in float32). IdentityNet: SDXL's UNet without its up blocks, as `ControlNetModel.from_unet` builds it.

FLUX.2 klein 4B: `scripts/convert_flux2_to_diffusers.py` of diffusers (commit 207bae7a); its text encoder is Qwen3-4B, with the
values of its `config.json`. Wan 2.2: `scripts/convert_wan_to_diffusers.py` of diffusers; UMT5-XXL as in `wan/modules/t5.py` of
Wan-Video/Wan2.2. LTX-Video 0.9.0: `scripts/convert_ltx_to_diffusers.py` of diffusers (commit 0871dc6e). Qwen-Image-Edit: the
defaults of diffusers' classes, which were written for it; its text encoder is Qwen2.5-VL-7B, with the config in
modelscope/DiffSynth-Studio `diffsynth/models/qwen_image_text_encoder.py` (commit 288fb760).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen_ray.errors import SetupError
from vidgen_ray.planner.cluster import GB
from vidgen_ray.stages.base import StageParams, torch_dtype
from vidgen_ray.stages.flux_model import T5, FluxParams
from vidgen_ray.stages.loading import OffloadParams
from vidgen_ray.system.free_memory import free_bytes
from vidgen_ray.system.model_files import PIPELINE_INDEX
from vidgen_ray.weights import resolve

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class PublishedNetwork:
    """One network of a published model."""

    class_name: str
    """Class of diffusers or transformers."""
    config: Mapping[str, Any]
    config_name: str | None = None
    """Class of the config, for networks of transformers."""


NETWORKS: Mapping[str, PublishedNetwork] = {
    name: PublishedNetwork(**fields)
    for name, fields in json.loads(Path(__file__).with_name("published_networks.json").read_bytes()).items()
}
"""Model and component -> network."""


def build_network(name: str, dtype: torch.dtype) -> Any:
    """Build a network of `NETWORKS` on the device `meta`, where it takes no memory."""
    return empty_network(NETWORKS[name]).requires_grad_(False).to("meta", dtype)


_PUBLISHED = {
    "black-forest-labs/FLUX.1-dev": ("flux", "builtin:tiny/flux"),
    "black-forest-labs/FLUX.1-schnell": ("flux-schnell", "builtin:tiny/flux-schnell"),
    "Tencent-Hunyuan/HunyuanDiT-v1.2-Diffusers": ("hunyuan", "builtin:tiny/hunyuandit"),
    "stabilityai/stable-video-diffusion-img2vid-xt": ("svd", "builtin:tiny/svd"),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": ("wan", "builtin:tiny/wan"),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": ("wan-ti2v", "builtin:tiny/wan-ti2v"),
    "black-forest-labs/FLUX.2-klein-4B": ("klein", "builtin:tiny/klein"),
    "Lightricks/LTX-Video": ("ltx", "builtin:tiny/ltx"),
}
"""Repository -> model in `NETWORKS`, and weights whose tokenizers and scheduler are like the published ones."""
HUB_REFERENCE = re.compile(r"hub:(?P<repository>[^@:]+).*")


@dataclass(frozen=True, slots=True)
class RandomModel:
    """Pipeline whose networks get random weights."""

    weights: str
    """Reference of weights on this machine with the tokenizers, the scheduler and other files."""
    networks: Mapping[str, PublishedNetwork]
    """Component of the pipeline -> network."""


def random_model(reference: str, relative_to: Path | None) -> RandomModel:
    """Return the model of a weight reference with the configs in its folder, or with the published ones without a folder.

    Raises SetupError if there is no folder, and no published config is known.
    """
    try:
        folder = resolve(reference, relative_to)
    except SetupError as error:
        match = HUB_REFERENCE.fullmatch(reference)
        if match is None or match["repository"] not in _PUBLISHED:
            known = ", ".join(_PUBLISHED)
            raise SetupError(f"{error}; without files, random weights are known only for {known}") from None
        model, weights = _PUBLISHED[match["repository"]]
        return RandomModel(weights, published_networks(model))
    return RandomModel(str(folder), dict(networks_in(folder)))


def published_networks(model: str) -> dict[str, PublishedNetwork]:
    """Return component -> network of a model of `NETWORKS`. `flux-schnell` and `wan-ti2v` have only some networks of their own.

    Wan I2V-A14B has two transformers of the same architecture.
    """
    family = model.partition("-")[0]
    networks = {
        name.partition("/")[2]: network
        for part in (family, model)
        for name, network in NETWORKS.items()
        if name.startswith(f"{part}/")
    }
    return {**networks, "transformer_2": networks["transformer"]} if model == "wan" else networks


def networks_in(folder: Path) -> Iterator[tuple[str, PublishedNetwork]]:
    """Yield component and network of a folder of a diffusers pipeline."""
    import diffusers
    import torch
    import transformers

    try:
        index = json.loads((folder / PIPELINE_INDEX).read_text("utf-8"))
        for component, value in index.items():
            library, class_name = value if isinstance(value, list) else ("", "")
            module = {"diffusers": diffusers, "transformers": transformers}.get(library or "")
            network_class: Any = getattr(module, class_name) if module else None
            if network_class is not None and issubclass(network_class, torch.nn.Module):
                config = json.loads((folder / component / "config.json").read_text("utf-8"))
                config_name = network_class.config_class.__name__ if module is transformers else None
                arguments = {name: value for name, value in config.items() if not name.startswith("_")}
                yield component, PublishedNetwork(class_name, arguments, config_name)
    except (OSError, ValueError, AttributeError) as error:
        raise SetupError(f"{folder}: no configs of a diffusers pipeline: {error}") from None


def random_pipeline(
    networks: Mapping[str, PublishedNetwork], params: StageParams, float32_parts: Collection[str] = ()
) -> dict[str, Any]:
    """Return component -> network with random weights in the precision of the stage, where the stage places it.

    `float32_parts`: components that keep float32. Weights are drawn on the stage's device, one parameter at a time: a GPU draws
    the 4.7 billion numbers of T5 in a second, one core of a CPU in two minutes. Raises SetupError, before it allocates weights,
    if they do not fit into the free memory.
    """
    dtypes = {name: torch_dtype("float32" if name in float32_parts else params.dtype) for name in networks}
    models = {component: empty_network(network) for component, network in networks.items()}
    places = {component: _place(component, params) for component in networks}
    needed: Counter[str] = Counter()
    for component, model in models.items():
        numbers = sum(parameter.numel() for parameter in model.parameters())
        needed[places[component]] += numbers * dtypes[component].itemsize
    for device, size in needed.items():
        free = free_bytes(device)
        if size > free:
            kind = "GPU" if device.startswith("cuda") else "host"
            raise SetupError(
                f"the weights need {size / GB:.3g} GB of {kind} memory, {free / GB:.3g} GB are free; "
                "use a profile for smaller machines"
            )
    for component, model in models.items():
        _draw_weights(model, dtypes[component], params.device, places[component])
    return models


def write_random_infusenet(folder: Path, dtype: str, device: str) -> None:
    """Write InfuseNet for FLUX.1 at full size, with random weights: 6 GB in 16 bits. They are drawn on `device`."""
    import torch

    from vidgen_ray.nets.identity_networks import (
        EMBEDDING_SIZE,
        NET_FOLDER,
        PROJECTION,
        PROJECTION_FILE,
        FaceResampler,
        ResamplerSizes,
    )

    net = empty_network(NETWORKS["infusenet/net"])
    _draw_weights(net, torch_dtype(dtype), device, "cpu")
    sizes = ResamplerSizes(EMBEDDING_SIZE, 8, 1280, 20, 4, 5120, net.config.joint_attention_dim)
    part = folder.with_name(f"{folder.name}.part")
    net.save_pretrained(part / NET_FOLDER)
    torch.save({PROJECTION: FaceResampler(sizes).state_dict()}, part / PROJECTION_FILE)
    part.rename(folder)


def _place(component: str, params: StageParams) -> str:
    """Return the device on which a network is built: the host for those that FLUX quantizes there, or that stay there."""
    if isinstance(params, OffloadParams) and params.cpu_offload:
        return "cpu"
    if isinstance(params, FluxParams) and (
        (component == "transformer" and params.quantize != "none") or (component == T5 and params.text_encoder != "gpu")
    ):
        return "cpu"
    return params.device


def empty_network(network: PublishedNetwork) -> Any:
    """Build a network whose parameters take no memory (device `meta`). Its buffers have their values."""
    import diffusers
    import transformers
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        if network.config_name is None:
            model = getattr(diffusers, network.class_name)(**network.config)
        else:
            config = getattr(transformers, network.config_name)(**network.config)
            model = getattr(transformers, network.class_name)(config)
    if network.config_name is not None:
        # The block above has separated parameters that layers share.
        model.tie_weights()
    return model.eval()


def _draw_weights(model: torch.nn.Module, dtype: torch.dtype, drawn_on: str, device: str) -> None:
    """Replace the empty parameters by random ones, drawn on one device and kept on the other, and move the buffers there.

    Modules that diffusers keeps in float32 are drawn in it.
    """
    import torch

    generator = torch.Generator(drawn_on).manual_seed(0)
    # transformers has the same attribute with another meaning.
    is_of_diffusers = type(model).__module__.startswith("diffusers.")
    in_float32 = set(getattr(model, "_keep_in_fp32_modules", None) or ()) if is_of_diffusers else set()
    # Layers that share a parameter share the drawn one.
    drawn: dict[int, torch.nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in drawn:
                kept = torch.float32 if in_float32.intersection((*path.split("."), name)) else dtype
                values = torch.empty(parameter.shape, dtype=kept, device=drawn_on)
                _fill(values, name, generator)
                drawn[id(parameter)] = torch.nn.Parameter(values.to(device), requires_grad=False)
            module._parameters[name] = drawn[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                is_cast = buffer.is_floating_point() and not in_float32.intersection(path.split("."))
                module._buffers[name] = buffer.to(device, dtype if is_cast else buffer.dtype)


def _fill(values: torch.Tensor, name: str, generator: torch.Generator) -> None:
    """Fill a parameter so that layers keep the variance of their input, and results stay finite also in float16."""
    if values.ndim > 1:
        inputs = values[0].numel()
        values.normal_(0, inputs**-0.5, generator=generator)
    elif name == "weight":
        values.fill_(1)
    else:
        values.zero_()
