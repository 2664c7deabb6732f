"""Random identity networks with the published layouts and key names, for the tiny FLUX and the tiny SDXL.

A different face or pose changes the image. The networks are untrained.
"""

from pathlib import Path

import torch
from diffusers import (
    ControlNetModel,
    EulerDiscreteScheduler,
    FluxControlNetModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from vidgen_ray.nets.face_resampler import PROJECTION, FaceResampler, ResamplerSizes
from vidgen_ray.nets.infusenet import EMBEDDING_SIZE, NET_FOLDER, PROJECTION_FILE
from vidgen_ray.nets.libraries import silence_libraries
from vidgen_ray.weights.tiny_diffusion import autoencoder, clip_text_encoder, clip_tokenizer

silence_libraries()

TOKEN_CHANNELS = 32
"""Channels of the tiny FLUX's text tokens. The real T5 has 4096."""
TEXT_CHANNELS = 32
"""Channels of each of the tiny SDXL's two text encoders. Its UNet attends to both, concatenated."""
TIME_CHANNELS = 8
"""Channels of the embedding of each of SDXL's six size and crop conditions."""


def build_infusenet(folder: Path) -> None:
    """Write InfuseNet for `tiny/flux` and `tiny/flux-schnell`: 1 double and 2 single blocks, guidance embedding, 8 tokens."""
    torch.manual_seed(5)
    net = FluxControlNetModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TOKEN_CHANNELS,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=[4, 6, 6],
    )
    # diffusers initialises these layers to zero, so that the network has no effect.
    for layer in (net.controlnet_x_embedder, *net.controlnet_blocks, *net.controlnet_single_blocks):
        layer.reset_parameters()
    resampler = FaceResampler(
        ResamplerSizes(EMBEDDING_SIZE, tokens=8, channels=32, heads=2, depth=2, hidden=128, output=TOKEN_CHANNELS)
    )
    with torch.no_grad():
        # Without scaling, embeddings of length 1 are negligible beside the resampler's biases, and tokens beside the latents.
        resampler.proj_in.weight.mul_(EMBEDDING_SIZE**0.5)
        for block in net.transformer_blocks:
            block.attn.add_v_proj.weight.mul_(10.0)
            block.attn.to_out[0].weight.mul_(10.0)
    # The shard size gives two shards, as in the published 11.8 GB.
    net.eval().save_pretrained(folder / NET_FOLDER, max_shard_size="250KB")
    torch.save({PROJECTION: resampler.state_dict()}, folder / PROJECTION_FILE)


def build_sdxl(folder: Path) -> None:
    """Write SDXL base: two CLIP encoders, size and crop conditions, no attention at the finest level."""
    tokenizer = clip_tokenizer()
    unet = _sdxl_unet()
    StableDiffusionXLPipeline(
        vae=autoencoder(latent_channels=4, scaling_factor=0.13025, shift_factor=None, quant_conv=True),
        text_encoder=clip_text_encoder(tokenizer),
        text_encoder_2=CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=TEXT_CHANNELS,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=77,
                projection_dim=TEXT_CHANNELS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ).eval(),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            num_train_timesteps=1000,
            steps_offset=1,
            timestep_spacing="leading",
        ),
        add_watermarker=False,
    ).save_pretrained(folder)


def build_instantid_sdxl(folder: Path) -> None:
    """Write InstantID for `tiny/sdxl`: IdentityNet, and the adapter with its resampler to 16 tokens."""
    unet = _sdxl_unet()
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16, 16))
    # diffusers initialises these layers to zero, so that the network has no effect.
    for layer in (net.controlnet_cond_embedding.conv_out, *net.controlnet_down_blocks, net.controlnet_mid_block):
        layer.reset_parameters()
    with torch.no_grad():
        # Without scaling, the keypoints are negligible beside the latents that they are added to.
        for convolution in net.controlnet_cond_embedding.modules():
            if isinstance(convolution, torch.nn.Conv2d):
                convolution.weight.mul_(3.0)
    net.eval().save_pretrained(folder / "ControlNetModel")
    channels = unet.config.cross_attention_dim
    resampler = FaceResampler(
        # diffusers reads resamplers of depth 4 only.
        ResamplerSizes(EMBEDDING_SIZE, tokens=16, channels=32, heads=2, depth=4, hidden=128, output=channels)
    )
    torch.save({PROJECTION: resampler.state_dict(), "ip_adapter": _adapter(unet)}, folder / "ip-adapter.bin")


def _adapter(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Return key and value weights for each cross-attention, named by its index among all attentions of the UNet."""
    tensors = {}
    for n, name in enumerate(unet.attn_processors):
        attention = unet.get_submodule(name.removesuffix(".processor"))
        if attention.is_cross_attention:
            for part, text_layer in (("to_k_ip", attention.to_k), ("to_v_ip", attention.to_v)):
                tensors[f"{n}.{part}.weight"] = torch.randn_like(text_layer.weight) / text_layer.in_features**0.5
    return tensors


def _sdxl_unet() -> UNet2DConditionModel:
    torch.manual_seed(6)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        # With the real 32 groups, each group is a single channel, and the time embedding is normalised away.
        norm_num_groups=4,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=2 * TEXT_CHANNELS,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_CHANNELS,
        projection_class_embeddings_input_dim=TEXT_CHANNELS + 6 * TIME_CHANNELS,
    ).eval()
