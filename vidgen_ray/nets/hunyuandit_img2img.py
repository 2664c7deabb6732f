"""Image to image for HunyuanDiT. diffusers provides text to image only."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import HunyuanDiTPipeline
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image as PILImage

ROPE_BASE_PX = 512
"""Image size, in pixels, to whose grid the positions are interpolated, as in training."""
META_SIZE = (1024, 1024)
"""Original height and width that weights up to v1.1 are conditioned on. Later weights have no such condition."""

StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""diffusers' `callback_on_step_end`: pipeline, step, timestep and tensors -> tensors."""


class HunyuanDiTImg2ImgPipeline(HunyuanDiTPipeline):  # type: ignore[misc]  # diffusers is untyped, its classes are Any
    """HunyuanDiTPipeline that starts from a noised image instead of pure noise. Same modules, same `from_pretrained`.

    Source: Meng et al. 2021, SDEdit, arXiv:2108.01073; Li et al. 2024, Hunyuan-DiT, arXiv:2405.08748. The denoising step is
    that of diffusers `HunyuanDiTPipeline`.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str,
        image: PILImage.Image,
        *,
        strength: float = 0.5,
        num_inference_steps: int = 30,
        guidance_scale: float = 5.0,
        negative_prompt: str | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        callback_on_step_end: StepCallback | None = None,
    ) -> StableDiffusionPipelineOutput:
        """Restyle the image, whose width and height are multiples of 16, by the prompt. The result has the same size.

        `strength` is above 0 and at most 1. Only the last `steps_to_run` of `num_inference_steps` are run. At 1 the image has
        no influence, and the result is that of HunyuanDiTPipeline with the same generator. The noise does not depend on the
        strength.
        A `guidance_scale` of 1 or less turns guidance off, and the negative prompt has no effect.
        `output_type`: "pil", "np" (1, H, W, 3) 0 to 1, "pt" (1, 3, H, W) 0 to 1, or "latent" (1, 4, H/8, W/8).
        `callback_on_step_end` is called as in diffusers, with the latents, which it may replace.
        """
        self._guidance_scale = guidance_scale
        conditions = self._conditions(prompt, negative_prompt, *image.size)
        timesteps = self._select_timesteps(num_inference_steps, strength)
        latents = self._noised_latents(image, strength, timesteps[:1], generator)
        latents = self._denoise(latents, timesteps, conditions, generator, callback_on_step_end)

        result = latents
        if output_type != "latent":
            result = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
        result = self.image_processor.postprocess(result, output_type=output_type)
        self.maybe_free_model_hooks()
        return StableDiffusionPipelineOutput(images=result, nsfw_content_detected=None)

    def _conditions(self, prompt: str, negative: str | None, width: int, height: int) -> dict[str, Any]:
        """Return the conditions of the transformer. With guidance, the row of the negative prompt comes first."""
        device, dtype = self._execution_device, self.transformer.dtype
        rows = 2 if self.do_classifier_free_guidance else 1
        bert, bert_mask = self._encode(prompt, negative, encoder=0)
        t5, t5_mask = self._encode(prompt, negative, encoder=1)
        return {
            "encoder_hidden_states": bert,
            "text_embedding_mask": bert_mask,
            "encoder_hidden_states_t5": t5,
            "text_embedding_mask_t5": t5_mask,
            "image_meta_size": torch.tensor([[*META_SIZE, height, width, 0, 0]] * rows, dtype=dtype, device=device),
            "style": torch.zeros(rows, dtype=torch.long, device=device),
            "image_rotary_emb": self._positions(height, width),
        }

    def _select_timesteps(self, num_inference_steps: int, strength: float) -> torch.Tensor:
        """Set the scheduler's timesteps and return those that the strength runs, (steps,)."""
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        start = (num_inference_steps - steps_to_run(num_inference_steps, strength)) * self.scheduler.order
        # DDPM has no such method. It looks up the next timestep in the whole schedule.
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)
        timesteps: torch.Tensor = self.scheduler.timesteps[start:]
        return timesteps

    def _denoise(
        self,
        latents: torch.Tensor,
        timesteps: torch.Tensor,
        conditions: Mapping[str, Any],
        generator: torch.Generator | None,
        callback_on_step_end: StepCallback | None,
    ) -> torch.Tensor:
        """Run the denoising steps on the latents (1, 4, H/8, W/8)."""
        guided: bool = self.do_classifier_free_guidance
        rows = 2 if guided else 1
        step_kwargs = self.prepare_extra_step_kwargs(generator, eta=0.0)
        self._num_timesteps = len(timesteps)
        for index, t in enumerate(self.progress_bar(timesteps)):
            model_input = self.scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, t)
            timestep = t.to(self.transformer.dtype).expand(rows)
            output = self.transformer(model_input, timestep, **conditions, return_dict=False)[0]
            predicted, _learned_variance = output.chunk(2, dim=1)
            if guided:
                negative, positive = predicted.chunk(2)
                predicted = negative + self.guidance_scale * (positive - negative)
            latents = self.scheduler.step(predicted, t, latents, **step_kwargs, return_dict=False)[0]
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, index, t, {"latents": latents}).get("latents", latents)
        return latents

    def _encode(self, prompt: str, negative: str | None, encoder: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return embeddings (rows, tokens, channels) by Bert (encoder 0) or mT5 (1), and their mask.

        With guidance, the row of the negative prompt comes first.
        """
        embeds, negative_embeds, mask, negative_mask = self.encode_prompt(
            prompt,
            device=self._execution_device,
            dtype=self.transformer.dtype,
            do_classifier_free_guidance=self.do_classifier_free_guidance,
            negative_prompt=negative,
            text_encoder_index=encoder,
        )
        if not self.do_classifier_free_guidance:
            return embeds, mask
        return torch.cat([negative_embeds, embeds]), torch.cat([negative_mask, mask])

    def _positions(self, height: int, width: int) -> Any:
        """Return the rotary embedding of the patches: cosines and sines, each (patches, channels per head)."""
        patch_px = self.vae_scale_factor * self.transformer.config.patch_size
        grid = height // patch_px, width // patch_px
        return get_2d_rotary_pos_embed(
            self.transformer.inner_dim // self.transformer.num_heads,
            get_resize_crop_region_for_grid(grid, ROPE_BASE_PX // patch_px),
            grid,
            device=self._execution_device,
            output_type="pt",
        )

    def _noised_latents(
        self, image: PILImage.Image, strength: float, timestep: torch.Tensor, generator: torch.Generator | None
    ) -> torch.Tensor:
        """Return the latents (1, 4, H/8, W/8) for the first step, noised to `timestep` (1,)."""
        device, dtype = self._execution_device, self.transformer.dtype
        width, height = (side // self.vae_scale_factor for side in image.size)
        shape = (1, self.transformer.config.in_channels, height, width)
        noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if strength == 1:
            pure: torch.Tensor = noise * self.scheduler.init_noise_sigma
            return pure
        pixels = self.image_processor.preprocess(image.convert("RGB"))
        # The mean, not a sample: as in text to image, the generator draws the diffusion noise only.
        mean = self.vae.encode(pixels.to(device, self.vae.dtype)).latent_dist.mode()
        clean = mean.to(dtype) * self.vae.config.scaling_factor
        noised: torch.Tensor = self.scheduler.add_noise(clean, noise, timestep)
        return noised


def steps_to_run(num_inference_steps: int, strength: float) -> int:
    """Return how many steps at the end of the schedule are run for a strength (0, 1]: its share, rounded up."""
    # In floating point 0.07 * 100 is a little above 7.
    return math.ceil(round(num_inference_steps * strength, 9))
