"""Image to image for HunyuanDiT, which diffusers has as text to image only. Knows pictures and prompts, not shots."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import HunyuanDiTPipeline
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image as PILImage

SIZE_MULTIPLE_PX = 16
"""The autoencoder halves a picture three times, the transformer takes its latents in patches of 2x2."""
ROPE_BASE_PX = 512
"""Positions are interpolated to the grid of a picture of this size, as in training."""
META_SIZE = (1024, 1024)
"""Height and width that weights up to v1.1 are told as the original size; later ones have no such condition."""


class HunyuanDiTImg2ImgPipeline(HunyuanDiTPipeline):  # type: ignore[misc]  # diffusers is untyped, its classes are Any
    """HunyuanDiTPipeline that starts from a noised picture instead of from noise. Same modules, same `from_pretrained`.

    Source: Meng et al. 2021, SDEdit, arXiv:2108.01073; Li et al. 2024, Hunyuan-DiT, arXiv:2405.08748; the denoising
    step is the one of diffusers `HunyuanDiTPipeline`.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        image: PILImage.Image | Sequence[PILImage.Image],
        *,
        strength: float = 0.5,
        num_inference_steps: int = 30,
        guidance_scale: float = 5.0,
        negative_prompt: str | Sequence[str] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]] | None = None,
    ) -> StableDiffusionPipelineOutput:
        """Restyle each picture by its prompt; a list of generators has one a row. Pictures come back at their own size.

        Pictures have one size, width and height multiples of 16. `strength` is above 0 and at most 1: of the schedule's
        `num_inference_steps` the last `steps_to_run` are run. At 1 nothing of the picture is left, and the result is
        that of HunyuanDiTPipeline for the same generator. A generator's noise is the same at every strength.
        `guidance_scale` of 1 or less is without guidance, and the negative prompt has no effect.
        `output_type`: "pil", "np" (B, H, W, 3) 0 to 1, "pt" (B, 3, H, W) 0 to 1, or "latent" (B, 4, H/8, W/8).
        `callback_on_step_end` is called as by diffusers, with the latents, which it may replace.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        pictures = [image] if isinstance(image, PILImage.Image) else list(image)
        width, height = _check(prompts, pictures, strength, generator)
        if isinstance(negative_prompt, str):
            negative_prompt = [negative_prompt] * len(prompts)
        elif negative_prompt is not None:
            negative_prompt = list(negative_prompt)

        self._guidance_scale = guidance_scale
        guided: bool = self.do_classifier_free_guidance
        device, dtype = self._execution_device, self.transformer.dtype
        rows = len(prompts) * (2 if guided else 1)
        bert, bert_mask = self._encode(prompts, negative_prompt, encoder=0)
        t5, t5_mask = self._encode(prompts, negative_prompt, encoder=1)
        conditions = {
            "encoder_hidden_states": bert,
            "text_embedding_mask": bert_mask,
            "encoder_hidden_states_t5": t5,
            "text_embedding_mask_t5": t5_mask,
            "image_meta_size": torch.tensor([[*META_SIZE, height, width, 0, 0]] * rows, dtype=dtype, device=device),
            "style": torch.zeros(rows, dtype=torch.long, device=device),
            "image_rotary_emb": self._positions(height, width),
        }

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        start = (num_inference_steps - steps_to_run(num_inference_steps, strength)) * self.scheduler.order
        timesteps = self.scheduler.timesteps[start:]
        # DDPM has no such method: it looks each step's successor up in the whole schedule.
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(start)

        latents = self._noised(pictures, strength, timesteps[:1], generator)
        step_kwargs = self.prepare_extra_step_kwargs(generator, eta=0.0)
        self._num_timesteps = len(timesteps)
        for index, t in enumerate(self.progress_bar(timesteps)):
            seen = self.scheduler.scale_model_input(torch.cat([latents] * 2) if guided else latents, t)
            output = self.transformer(seen, t.to(dtype).expand(rows), **conditions, return_dict=False)[0]
            predicted, _learned_variance = output.chunk(2, dim=1)
            if guided:
                without, with_prompt = predicted.chunk(2)
                predicted = without + guidance_scale * (with_prompt - without)
            latents = self.scheduler.step(predicted, t, latents, **step_kwargs, return_dict=False)[0]
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, index, t, {"latents": latents}).get("latents", latents)

        result, unsafe = latents, None
        if output_type != "latent":
            decoded = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]
            result, unsafe = self.run_safety_checker(decoded, device, dtype)
        result = self.image_processor.postprocess(
            result, output_type=output_type, do_denormalize=[not u for u in unsafe or [False] * len(prompts)]
        )
        self.maybe_free_model_hooks()
        return StableDiffusionPipelineOutput(images=result, nsfw_content_detected=unsafe)

    def _encode(self, prompts: list[str], negative: list[str] | None, encoder: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings (rows, tokens, channels) of Bert, encoder 0, or mT5, 1, and their mask; negatives come first."""
        embeds, negative_embeds, mask, negative_mask = self.encode_prompt(
            prompts,
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
        """Rotary embedding of the patches: cosines and sines, each (patches, channels of a head)."""
        patch_px = self.vae_scale_factor * self.transformer.config.patch_size
        grid = height // patch_px, width // patch_px
        return get_2d_rotary_pos_embed(
            self.transformer.inner_dim // self.transformer.num_heads,
            get_resize_crop_region_for_grid(grid, ROPE_BASE_PX // patch_px),
            grid,
            device=self._execution_device,
            output_type="pt",
        )

    def _noised(
        self,
        pictures: list[PILImage.Image],
        strength: float,
        timestep: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> torch.Tensor:
        """The latents (B, 4, H/8, W/8) that the first step, at `timestep` (1,), starts from."""
        device, dtype = self._execution_device, self.transformer.dtype
        width, height = pictures[0].size
        shape = (
            len(pictures),
            self.transformer.config.in_channels,
            height // self.vae_scale_factor,
            width // self.vae_scale_factor,
        )
        noise = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        if strength == 1:
            pure: torch.Tensor = noise * self.scheduler.init_noise_sigma
            return pure
        pixels = self.image_processor.preprocess([picture.convert("RGB") for picture in pictures])
        # The mean, not a sample: the generators are spent on the diffusion noise alone, as for text to image.
        mean = self.vae.encode(pixels.to(device, self.vae.dtype)).latent_dist.mode()
        clean = mean.to(dtype) * self.vae.config.scaling_factor
        noised: torch.Tensor = self.scheduler.add_noise(clean, noise, timestep.repeat(len(pictures)))
        return noised


def steps_to_run(num_inference_steps: int, strength: float) -> int:
    """How many of the schedule's last steps a strength (0, 1] runs: its share, rounded up, so at least one."""
    # In floating point 0.07 * 100 is a little above 7.
    return math.ceil(round(num_inference_steps * strength, 9))


def _check(
    prompts: list[str],
    pictures: list[PILImage.Image],
    strength: float,
    generator: torch.Generator | list[torch.Generator] | None,
) -> tuple[int, int]:
    """The pictures' width and height. ValueError where the arguments do not fit together."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength: got {strength}, must be above 0 and at most 1")
    if not prompts or len(prompts) != len(pictures):
        raise ValueError(f"got {len(prompts)} prompts and {len(pictures)} pictures, must be as many, at least one")
    if isinstance(generator, list) and len(generator) != len(prompts):
        raise ValueError(f"generator: got {len(generator)}, must be one a picture, of which there are {len(prompts)}")
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(f"image: got the sizes {sorted(sizes)}, must be one size a call")
    width, height = sizes.pop()
    if width % SIZE_MULTIPLE_PX or height % SIZE_MULTIPLE_PX:
        raise ValueError(f"image: got {width}x{height}, width and height must be multiples of {SIZE_MULTIPLE_PX}")
    return width, height
