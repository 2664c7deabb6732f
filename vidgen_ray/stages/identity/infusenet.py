"""InfuseNet injector: add InfuseNet's residuals to FLUX's transformer blocks in each step.

The networks are in `nets/infusenet.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from vidgen_ray.errors import StageError
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Image, noise_generator
from vidgen_ray.stages.host_weights import move_networks
from vidgen_ray.stages.identity.base import FluxInjector, FluxPipelines

if TYPE_CHECKING:
    import torch

    from vidgen_ray.nets.infusenet import IdentityControlNet
    from vidgen_ray.stages.flux_model import FluxModel

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
    # InfuseNet has 2.95 billion parameters, the transformer 11.9 billion. Both process the same patches.
    passes_per_step: ClassVar[float] = 0.25
    networks: ClassVar[tuple[str, ...]] = ("infusenet/net", "infusenet/resampler")
    step_curve: ClassVar[str] = "flux/step+infusenet"

    def __init__(self, model: FluxModel, weights: Path) -> None:
        from vidgen_ray.nets.infusenet import NET_FOLDER, load_infusenet
        from vidgen_ray.nets.model_folder import require_same

        self.model = model
        transformer = model.text_to_image.transformer
        self.infusenet = load_infusenet(weights, model.dtype, model.device)
        require_same(self.infusenet.net.config, transformer.config, MUST_AGREE, weights / NET_FOLDER, "FLUX")
        model.speed_up(self.infusenet.net)

    def move(self, device: str) -> None:
        move_networks((self.infusenet.net, self.infusenet.resampler), device)

    @contextmanager
    def inject(
        self,
        embedding: NDArray[np.float32],
        pose: Image,
        shot: Shot,
        stage: str,
        *,
        start: float = 0.0,
        end: float = 1.0,
    ) -> Iterator[FluxPipelines]:
        import torch

        if not 0 <= start < end <= 1:
            raise StageError(f"identity: got start {start} and end {end}, must be 0 <= start < end <= 1")
        size = self.infusenet.resampler.sizes.embedding
        if embedding.shape != (size,):
            raise StageError(f"face: got an embedding of shape {embedding.shape}, {self.name} takes {size} numbers")
        if shot.identity_strength == 0:
            yield self.model
            return
        conditioning = _IdentityConditioning(
            net=self.infusenet.net,
            pose=self._pose_latents(pose, noise_generator(shot.derived_seed(f"{stage}/pose"))),
            strength=shot.identity_strength,
            start=start,
            end=end,
        )
        tokens = self.infusenet.tokens(torch.tensor(embedding[None]))
        with self.infusenet.net.identity(tokens):
            yield _IdentityPipelines(
                partial(conditioning.run, self.model.text_to_image), partial(conditioning.run, self.model.image_to_image)
            )

    def _pose_latents(self, pose: Image, generator: torch.Generator) -> torch.Tensor:
        """Encode the keypoint image with the autoencoder. Return a sample, packed as FLUX latents: (1, H/16 * W/16, 64)."""
        import torch

        pipe, vae = self.model.text_to_image, self.model.text_to_image.vae
        # (1, 3, H, W), -1 to 1. Contiguous as in diffusers' ControlNet pipelines, because the layout affects the rounding of
        # convolutions.
        pixels = pipe.image_processor.preprocess(PILImage.fromarray(pose)).contiguous()
        with torch.no_grad():
            encoded = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.sample(generator)
        latents = (encoded - vae.config.shift_factor) * vae.config.scaling_factor
        packed: torch.Tensor = pipe._pack_latents(latents, *latents.shape)
        return packed


@dataclass(frozen=True, slots=True)
class _IdentityPipelines:
    text_to_image: Callable[..., Any]
    image_to_image: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class _IdentityConditioning:
    """InfuseNet's inputs that stay the same in all steps of a pipeline call."""

    net: IdentityControlNet
    pose: torch.Tensor
    strength: float
    start: float
    end: float

    def run(self, pipe: Any, /, **arguments: Any) -> Any:
        """Call the pipeline with InfuseNet's residuals in the steps from `start` to `end`."""
        step, residuals = -1, {}

        def add_residuals(transformer: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            nonlocal step, residuals
            # A negative prompt makes two passes per step. Both get the residuals, as in diffusers. InfiniteYou adds them to one
            # pass only, which multiplies the identity conditioning by `true_cfg_scale`.
            if (current_step := _step_index(pipe.scheduler)) != step:
                step = current_step
                residuals = self._residuals(kwargs) if self._is_active_step(step, pipe.num_timesteps) else {}
            return args, kwargs | residuals

        hook = pipe.transformer.register_forward_pre_hook(add_residuals, with_kwargs=True)
        try:
            return pipe(**arguments)
        finally:
            hook.remove()

    def _is_active_step(self, step: int, steps: int) -> bool:
        return self.start <= step / steps and (step + 1) / steps <= self.end

    def _residuals(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Return InfuseNet's residuals for the inputs of the transformer, as arguments of the transformer."""
        double, single = self.net(
            hidden_states=inputs["hidden_states"],
            controlnet_cond=self.pose,
            conditioning_scale=self.strength,
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
