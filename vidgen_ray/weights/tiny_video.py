"""Random weights in the architectures of Wan 2.2 and LTX-Video, small enough to run on a laptop. The clips are noise."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from vidgen_ray.weights.tiny_diffusion import t5_encoder, t5_tokenizer, write_random_lora

TEXT_CHANNELS = 32
WAN_CHANNELS, TI2V_CHANNELS = 16, 48
"""Latent channels of the two autoencoders of Wan 2.2."""


def build_wan(folder: Path) -> None:
    """Write Wan 2.2 I2V-A14B: two transformers, the image as latents and mask beside the noise, 8x8x4 compression."""
    torch.manual_seed(5)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=WAN_CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    # Noise, image latents and a mask of 4 channels.
    high, low = (_wan_transformer(2 * WAN_CHANNELS + 4, WAN_CHANNELS, seed) for seed in (6, 7))
    _wan(vae, transformer=high, transformer_2=low, boundary_ratio=0.9).save_pretrained(folder)


def build_wan_ti2v(folder: Path) -> None:
    """Write Wan 2.2 TI2V-5B: one transformer with a timestep per token, 16x16x4 compression."""
    torch.manual_seed(8)
    vae = AutoencoderKLWan(
        base_dim=3,
        z_dim=TI2V_CHANNELS,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        patch_size=2,
        latents_mean=[0.0] * TI2V_CHANNELS,
        latents_std=[1.0] * TI2V_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        temperal_downsample=[False, True, True],
    )
    transformer = _wan_transformer(TI2V_CHANNELS, TI2V_CHANNELS, 9)
    _wan(vae, transformer=transformer, transformer_2=None, expand_timesteps=True).save_pretrained(folder)


def build_wan_lora(file: Path) -> None:
    """Write a LoRA on the attention of either transformer of the tiny Wan I2V-A14B, in the layout of diffusers."""
    write_random_lora(_wan_transformer(2 * WAN_CHANNELS + 4, WAN_CHANNELS, 6), file, seed=12)


def build_ltx(folder: Path) -> None:
    """Write LTX-Video 0.9: no timestep conditioning of the autoencoder, 32x32x8 compression."""
    _ltx_pipeline(timestep_conditioning=False).save_pretrained(folder)


def build_ltx_distilled(folder: Path) -> None:
    """Write LTX-Video 0.9.8: an autoencoder that is conditioned on a timestep."""
    _ltx_pipeline(timestep_conditioning=True).save_pretrained(folder)


def build_ltx_lora(file: Path) -> None:
    """Write a LoRA on the attention of the tiny LTX-Video, in the layout of diffusers."""
    write_random_lora(_ltx_transformer(), file, seed=12)


def _wan(vae: Any, **parts: Any) -> Any:
    tokenizer = t5_tokenizer(512)
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_CHANNELS,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    return WanImageToVideoPipeline(
        vae=vae.eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        image_encoder=None,
        image_processor=None,
        **parts,
    )


def _wan_transformer(in_channels: int, out_channels: int, seed: int) -> Any:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=TEXT_CHANNELS,
        freq_dim=256,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        # At least the number of latent frames and of tokens per row and column.
        rope_max_seq_len=64,
    ).eval()


def _ltx_pipeline(timestep_conditioning: bool) -> Any:
    tokenizer = t5_tokenizer(128)
    transformer = _ltx_transformer()
    torch.manual_seed(10)
    vae = AutoencoderKLLTXVideo(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        # Three levels halve space and time. The patches of 4x4 pixels make it 32x32x8.
        spatio_temporal_scaling=(True, True, True, False),
        decoder_spatio_temporal_scaling=(True, True, True, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=timestep_conditioning,
        patch_size=4,
        patch_size_t=1,
        encoder_causal=True,
        decoder_causal=False,
    )
    return LTXImageToVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
        vae=vae.eval(),
        text_encoder=t5_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
    )


def _ltx_transformer() -> Any:
    torch.manual_seed(11)
    return LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        patch_size=1,
        patch_size_t=1,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=TEXT_CHANNELS,
    ).eval()
