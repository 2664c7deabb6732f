"""Values of a shot's `identity`, and the injectors, which condition FLUX on a face.

The networks are in `nets/identity_networks.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache as once
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakValueDictionary

from vidgen_ray.errors import SetupError, StageError
from vidgen_ray.nets.diffusers_private import packed_flux_latents
from vidgen_ray.shot import INSTANTID_SDXL, NO_IDENTITY, REFERENCE, Shot
from vidgen_ray.stages.base import FaceFeatures, Image, noise_generator
from vidgen_ray.stages.context_parallel import divide, own_part
from vidgen_ray.stages.loading import move_networks
from vidgen_ray.stages.speed import compute_in_fp8, separate_from_others, speed_up
from vidgen_ray.system.free_memory import is_out_of_memory

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from vidgen_ray.nets.identity_networks import IdentityControlNet
    from vidgen_ray.stages.first_block_cache import FirstBlockCache
    from vidgen_ray.stages.flux_model import FluxModel


INFUSENET_BLOCKS = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
"""Classes of its blocks, which diffusers does not state for this network."""


@dataclass(frozen=True, slots=True)
class FluxPipelines:
    """The two pipelines of FLUX, called like those of diffusers."""

    text_to_image: Callable[..., Any]
    image_to_image: Callable[..., Any]


class FluxInjector(ABC):
    """A method to condition FLUX on the identity of a face.

    Use `shared_injector(name, model, weights)`, then `with injector.inject(...) as pipelines: pipelines.text_to_image(...)`.
    An injector has its own networks and uses those of the model without changing them. Blocks must not be nested.
    """

    name: ClassVar[str]
    embedding: ClassVar[str]
    """Recogniser that the weights were trained with. Embeddings of another one silently give another face."""
    networks: ClassVar[tuple[str, ...]]
    """Its networks in the memory table."""
    step_curve: ClassVar[str]
    """Curve of the memory table for a denoising step with this injector."""

    @abstractmethod
    def __init__(self, model: FluxModel, weights: Path) -> None:
        """Load the injector's weights with the model's dtype and device.

        Raises SetupError if they are missing, of another kind, or made for another FLUX.
        """

    @abstractmethod
    def move(self, device: str) -> None:
        """Move the injector's own weights to `device`. The model is moved separately."""

    @abstractmethod
    def inject(
        self, embedding: NDArray[np.float32], pose: Image, shot: Shot, stage: str
    ) -> AbstractContextManager[FluxPipelines]:
        """Yield pipelines that generate the face with the strength `shot.identity_strength`. 0 has no effect, bitwise.

        `embedding` (512,) is the one that `self.embedding` names. `pose` is the keypoint image at the size of the shot.
        Identity conditioning is active from `shot.identity_start` to `shot.identity_end` only, fractions of the steps that are
        run.
        An injector that needs noise must draw it from its own generator, derived from `shot` and `stage`, so that the diffusion
        noise is the same with and without a face.
        """


_instances: WeakValueDictionary[tuple[str, FluxModel, Path], FluxInjector] = WeakValueDictionary()


def shared_injector(name: str, model: FluxModel, weights: Path) -> FluxInjector:
    """Return the injector of this model, loaded on first use. Stages of one process with the same weights share it."""
    import torch

    key = (name, model, weights)
    if (injector := _instances.get(key)) is None:
        # Weights that are made in inference mode, in which stages run, cannot be moved outside of it.
        try:
            with torch.inference_mode(False):
                injector = _instances[key] = injector_class(name)(model, weights)
        except SetupError as error:
            # The files are not wrong: the call is tried once more.
            if isinstance(error.__cause__, Exception) and is_out_of_memory(error.__cause__):
                raise error.__cause__ from None
            raise
    return injector


def pose_image(face: FaceFeatures, shot: Shot) -> Image:
    """Draw the keypoints, RGB at the size of the shot, at their position in the centred photo. Black if `shot.pose` is none.

    Line widths scale with the size of the image. The networks were trained on images of about a megapixel.
    """
    import numpy as np

    width, height = shot.width, shot.height
    if shot.pose == "none":
        return np.zeros((height, width, 3), np.uint8)
    from vidgen_ray.nets.faces import TRAINING_AREA_PX, draw_keypoints, map_to_canvas

    points = map_to_canvas(face.keypoints, face.photo_size, (width, height))
    return draw_keypoints(points, width, height, (width * height / TRAINING_AREA_PX) ** 0.5)


MUST_AGREE = ("in_channels", "num_attention_heads", "attention_head_dim", "axes_dims_rope", "pooled_projection_dim")
"""Config values that must be equal in InfuseNet and FLUX's transformer."""


class InfuseNetInjector(FluxInjector):
    """FluxModel's own pipelines with a hook that runs InfuseNet before the transformer in each step.

    The results are bitwise those of diffusers `FluxControlNetPipeline` and `FluxControlNetImg2ImgPipeline` for the same
    latents. These pipelines are not used for two reasons. They draw the pose latents from the generator before the diffusion
    noise, so a face would change the noise of a seed. The image-to-image one has no negative prompt.
    Source: Jiang et al. 2025, InfiniteYou, arXiv:2503.16418.
    """

    name: ClassVar[str] = "infusenet"
    embedding: ClassVar[str] = "ir_se50"
    networks: ClassVar[tuple[str, ...]] = ("infusenet/net", "infusenet/resampler")
    step_curve: ClassVar[str] = "flux/step+infusenet"

    def __init__(self, model: FluxModel, weights: Path) -> None:
        from vidgen_ray.nets.identity_networks import NET_FOLDER, load_infusenet
        from vidgen_ray.nets.weight_files import require_same

        self.model = model
        transformer = model.text_to_image.transformer
        self.infusenet = load_infusenet(weights, model.dtype, model.device)
        require_same(self.infusenet.net.config, transformer.config, MUST_AGREE, weights / NET_FOLDER, "FLUX")
        if model.params.quantize == "fp8":
            compute_in_fp8(self.infusenet.net, model.device)
        if model.params.compile:
            separate_from_others(self.infusenet.net, INFUSENET_BLOCKS)
        speed_up(self.infusenet.net, model.params, INFUSENET_BLOCKS)
        # Each process adds its residuals to its own tokens.
        divide(self.infusenet.net, {"hidden_states": 1, "controlnet_cond": 1, "img_ids": 0})

    def move(self, device: str) -> None:
        move_networks((self.infusenet.net, self.infusenet.resampler), device)

    @contextmanager
    def inject(self, embedding: NDArray[np.float32], pose: Image, shot: Shot, stage: str) -> Iterator[FluxPipelines]:
        import torch

        size = self.infusenet.resampler.sizes.embedding
        if embedding.shape != (size,):
            raise StageError(f"face: got an embedding of shape {embedding.shape}, {self.name} takes {size} numbers")
        if shot.identity_strength == 0:
            yield FluxPipelines(self.model.text_to_image, self.model.image_to_image)
            return
        conditioning = _IdentityConditioning(
            net=self.infusenet.net,
            cache=self.model.cache,
            pose=self._pose_latents(pose, noise_generator(shot.derived_seed(f"{stage}/pose"))),
            shot=shot,
            tokens=self.infusenet.tokens(torch.tensor(embedding[None])),
        )
        yield FluxPipelines(
            partial(conditioning.run, self.model.text_to_image), partial(conditioning.run, self.model.image_to_image)
        )

    def _pose_latents(self, pose: Image, generator: torch.Generator) -> torch.Tensor:
        """Encode the keypoint image with the autoencoder. Return a sample, packed as FLUX latents: (1, H/16 * W/16, 64)."""
        import torch
        from PIL import Image as PILImage

        pipe, vae = self.model.text_to_image, self.model.text_to_image.vae
        # (1, 3, H, W), -1 to 1. Contiguous as in diffusers' ControlNet pipelines, because the layout affects the rounding of
        # convolutions.
        pixels = pipe.image_processor.preprocess(PILImage.fromarray(pose)).contiguous()
        with torch.no_grad():
            encoded = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.sample(generator)
        latents = (encoded - vae.config.shift_factor) * vae.config.scaling_factor
        return packed_flux_latents(pipe, latents)


@dataclass(frozen=True, slots=True)
class _IdentityConditioning:
    """InfuseNet's inputs that stay the same in all steps of a pipeline call."""

    net: IdentityControlNet
    cache: FirstBlockCache | None
    """Cache of the transformer, which then adds the residuals itself. InfuseNet runs in computed steps only."""
    pose: torch.Tensor
    shot: Shot
    tokens: torch.Tensor
    """(1, n, channels of the attention)"""

    def run(self, pipe: Any, /, **arguments: Any) -> Any:
        """Call the pipeline with InfuseNet's residuals in the steps from `identity_start` to `identity_end` of the shot."""
        step, residuals = -1, {}
        cache = self.cache

        def add_residuals(transformer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            nonlocal step, residuals
            # A negative prompt makes two passes per step. Both get the residuals, as in diffusers. InfiniteYou adds them to one
            # pass only, which multiplies the identity conditioning by `true_cfg_scale`.
            if (current_step := _step_index(pipe.scheduler)) != step:
                step = current_step
                steps = pipe.num_timesteps
                is_active = self.shot.identity_start <= step / steps and (step + 1) / steps <= self.shot.identity_end
                if cache is not None:
                    cache.use_residuals(once(partial(self._residuals, kwargs)) if is_active else None)
                else:
                    residuals = self._residuals(kwargs) if is_active else {}
            return args, kwargs | residuals

        hook = pipe.transformer.register_forward_pre_hook(add_residuals, with_kwargs=True)
        try:
            return pipe(**arguments)
        finally:
            hook.remove()
            if cache is not None:
                cache.use_residuals(None)

    def _residuals(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return InfuseNet's residuals for the inputs of the transformer, as arguments of the transformer."""
        with self.net.identity(own_part(self.tokens)):
            double, single = self.net(
                hidden_states=inputs["hidden_states"],
                controlnet_cond=self.pose,
                conditioning_scale=self.shot.identity_strength,
                timestep=inputs["timestep"],
                pooled_projections=inputs["pooled_projections"],
                img_ids=inputs["img_ids"],
                return_dict=False,
            )
        return {"controlnet_block_samples": double, "controlnet_single_block_samples": single}


def _step_index(scheduler: Any) -> int:
    """Return the current step of a pipeline, counted from the first step that it runs."""
    first: int = scheduler.begin_index or 0
    # The index is None before the first step.
    return 0 if scheduler.step_index is None else scheduler.step_index - first


INJECTORS: dict[str, type[FluxInjector]] = {"infusenet": InfuseNetInjector}
"""Name -> class. A new injector is one new class and one entry here."""


def identities() -> tuple[str, ...]:
    """Return all values of a shot's `identity`."""
    return (*INJECTORS, INSTANTID_SDXL, REFERENCE, NO_IDENTITY)


def injector_class(name: str) -> type[FluxInjector]:
    """Return the class of an injector. Raises StageError for unknown names."""
    if name not in INJECTORS:
        raise StageError(f"identity: got {name!r}, must be one of {', '.join(INJECTORS)}")
    return INJECTORS[name]
