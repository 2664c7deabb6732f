"""Architectures of the published weights: the config of each network, to build it at full size without its weights.

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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


_FLUX: Mapping[str, Any] = {
    "attention_head_dim": 128,
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 4096,
    "num_attention_heads": 24,
    "num_layers": 19,
    "num_single_layers": 38,
    "patch_size": 1,
    "pooled_projection_dim": 768,
}
_CLIP_L: Mapping[str, Any] = {
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 77,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
_VAE: Mapping[str, Any] = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
_T5: Mapping[str, Any] = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "feed_forward_proj": "gated-gelu",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "vocab_size": 32128,
}
_SDXL_UNET: Mapping[str, Any] = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 2,
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
}
_WAN: Mapping[str, Any] = {
    "cross_attn_norm": True,
    "freq_dim": 256,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "text_dim": 4096,
}


@dataclass(frozen=True, slots=True)
class PublishedNetwork:
    """One network of a published model."""

    class_name: str
    """Class of diffusers or transformers."""
    config: Mapping[str, Any]
    config_name: str | None = None
    """Class of the config, for networks of transformers."""


NETWORKS: Mapping[str, PublishedNetwork] = {
    "flux/transformer": PublishedNetwork("FluxTransformer2DModel", _FLUX),
    "flux-schnell/transformer": PublishedNetwork("FluxTransformer2DModel", {**_FLUX, "guidance_embeds": False}),
    "flux/text_encoder": PublishedNetwork("CLIPTextModel", _CLIP_L, "CLIPTextConfig"),
    "flux/text_encoder_2": PublishedNetwork("T5EncoderModel", _T5, "T5Config"),
    "flux/vae": PublishedNetwork(
        "AutoencoderKL",
        {
            **_VAE,
            "force_upcast": True,
            "latent_channels": 16,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_post_quant_conv": False,
            "use_quant_conv": False,
        },
    ),
    "infusenet/net": PublishedNetwork("FluxControlNetModel", {**_FLUX, "num_layers": 4, "num_single_layers": 10}),
    "hunyuan/transformer": PublishedNetwork(
        "HunyuanDiT2DModel",
        {
            "activation_fn": "gelu-approximate",
            "attention_head_dim": 88,
            "cross_attention_dim": 1024,
            "cross_attention_dim_t5": 2048,
            "hidden_size": 1408,
            "in_channels": 4,
            "learn_sigma": True,
            "mlp_ratio": 4.3637,
            "num_attention_heads": 16,
            "num_layers": 40,
            "patch_size": 2,
            "pooled_projection_dim": 1024,
            "sample_size": 128,
            "text_len": 77,
            "text_len_t5": 256,
            "use_style_cond_and_image_meta_size": False,
        },
    ),
    "hunyuan/text_encoder": PublishedNetwork(
        "BertModel",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "vocab_size": 47020,
        },
        "BertConfig",
    ),
    "hunyuan/text_encoder_2": PublishedNetwork(
        "T5EncoderModel", {**_T5, "d_ff": 5120, "d_model": 2048, "num_heads": 32, "vocab_size": 250112}, "T5Config"
    ),
    "hunyuan/vae": PublishedNetwork("AutoencoderKL", {**_VAE, "force_upcast": False, "sample_size": 512}),
    "svd/unet": PublishedNetwork("UNetSpatioTemporalConditionModel", {}),
    "svd/vae": PublishedNetwork(
        "AutoencoderKLTemporalDecoder",
        {
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "force_upcast": True,
            "latent_channels": 4,
            "layers_per_block": 2,
            "sample_size": 768,
            "scaling_factor": 0.18215,
        },
    ),
    "svd/image_encoder": PublishedNetwork(
        "CLIPVisionModelWithProjection",
        {
            "hidden_size": 1280,
            "image_size": 224,
            "intermediate_size": 5120,
            "num_attention_heads": 16,
            "num_hidden_layers": 32,
            "patch_size": 14,
            "projection_dim": 1024,
        },
        "CLIPVisionConfig",
    ),
    "sdxl/unet": PublishedNetwork(
        "UNet2DConditionModel", {**_SDXL_UNET, "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}
    ),
    "sdxl/controlnet": PublishedNetwork("ControlNetModel", _SDXL_UNET),
    "sdxl/text_encoder": PublishedNetwork("CLIPTextModel", _CLIP_L, "CLIPTextConfig"),
    "sdxl/text_encoder_2": PublishedNetwork(
        "CLIPTextModelWithProjection",
        {
            "hidden_act": "gelu",
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "max_position_embeddings": 77,
            "num_attention_heads": 20,
            "num_hidden_layers": 32,
            "projection_dim": 1280,
            "vocab_size": 49408,
        },
        "CLIPTextConfig",
    ),
    "sdxl/vae": PublishedNetwork("AutoencoderKL", {**_VAE, "force_upcast": True}),
    "klein/transformer": PublishedNetwork(
        "Flux2Transformer2DModel",
        {
            "attention_head_dim": 128,
            "guidance_embeds": False,
            "in_channels": 128,
            "joint_attention_dim": 7680,
            "mlp_ratio": 3.0,
            "num_attention_heads": 24,
            "num_layers": 5,
            "num_single_layers": 20,
            "patch_size": 1,
        },
    ),
    "klein/text_encoder": PublishedNetwork(
        "Qwen3ForCausalLM",
        {
            "head_dim": 128,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "num_key_value_heads": 8,
            "tie_word_embeddings": True,
            "vocab_size": 151936,
        },
        "Qwen3Config",
    ),
    "klein/vae": PublishedNetwork("AutoencoderKLFlux2", {}),
    "qwen_edit/transformer": PublishedNetwork("QwenImageTransformer2DModel", {}),
    "qwen_edit/text_encoder": PublishedNetwork(
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": {
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_attention_heads": 28,
                "num_hidden_layers": 28,
                "num_key_value_heads": 4,
                "rope_parameters": {"mrope_section": [16, 24, 24], "rope_theta": 1_000_000.0, "rope_type": "default"},
                "vocab_size": 152064,
            },
            "tie_word_embeddings": False,
            "vision_config": {
                "depth": 32,
                "hidden_size": 1280,
                "intermediate_size": 3420,
                "num_heads": 16,
                "out_hidden_size": 3584,
                "patch_size": 14,
            },
        },
        "Qwen2_5_VLConfig",
    ),
    "qwen_edit/vae": PublishedNetwork("AutoencoderKLQwenImage", {}),
    # Both transformers of I2V-A14B.
    "wan/transformer": PublishedNetwork(
        "WanTransformer3DModel",
        {**_WAN, "ffn_dim": 13824, "in_channels": 36, "num_attention_heads": 40, "num_layers": 40, "out_channels": 16},
    ),
    "wan/text_encoder": PublishedNetwork(
        "UMT5EncoderModel",
        {
            "d_ff": 10240,
            "d_kv": 64,
            "d_model": 4096,
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": False,
            "num_heads": 64,
            "num_layers": 24,
            "vocab_size": 256384,
        },
        "UMT5Config",
    ),
    "wan/vae": PublishedNetwork("AutoencoderKLWan", {}),
    "wan-ti2v/transformer": PublishedNetwork(
        "WanTransformer3DModel",
        {**_WAN, "ffn_dim": 14336, "in_channels": 48, "num_attention_heads": 24, "num_layers": 30, "out_channels": 48},
    ),
    "wan-ti2v/vae": PublishedNetwork(
        "AutoencoderKLWan",
        {
            "base_dim": 160,
            "decoder_base_dim": 256,
            "in_channels": 12,
            "is_residual": True,
            # Values that do not matter for the memory.
            "latents_mean": [0.0] * 48,
            "latents_std": [1.0] * 48,
            "out_channels": 12,
            "patch_size": 2,
            "scale_factor_spatial": 16,
            "scale_factor_temporal": 4,
            "z_dim": 48,
        },
    ),
    "ltx/transformer": PublishedNetwork("LTXVideoTransformer3DModel", {}),
    "ltx/text_encoder": PublishedNetwork("T5EncoderModel", _T5, "T5Config"),
    "ltx/vae": PublishedNetwork(
        "AutoencoderKLLTXVideo",
        {
            "block_out_channels": [128, 256, 512, 512],
            "decoder_block_out_channels": [128, 256, 512, 512],
            "decoder_causal": False,
            "decoder_inject_noise": [False] * 5,
            "decoder_layers_per_block": [4, 3, 3, 3, 4],
            "decoder_spatio_temporal_scaling": [True, True, True, False],
            "encoder_causal": True,
            "latent_channels": 128,
            "layers_per_block": [4, 3, 3, 3, 4],
            "patch_size": 4,
            "patch_size_t": 1,
            "spatio_temporal_scaling": [True, True, True, False],
            "timestep_conditioning": False,
            "upsample_factor": [1] * 4,
            "upsample_residual": [False] * 4,
        },
    ),
}
"""Model and component -> network."""


def build_network(name: str, dtype: torch.dtype, device: str = "meta") -> Any:
    """Build a network of `NETWORKS`. On the device `meta` it takes no memory; elsewhere its weights are random."""
    import diffusers
    import torch
    import transformers

    network = NETWORKS[name]
    library = diffusers if network.config_name is None else transformers
    network_class = getattr(library, network.class_name)
    with torch.device(device):
        if network.config_name is None:
            model = network_class(**network.config)
        else:
            model = network_class(getattr(transformers, network.config_name)(**network.config))
    # Some classes of diffusers ignore the default device for single parameters.
    return model.eval().requires_grad_(False).to(device, dtype)


def realesrgan_network(upscaler: str) -> Any:
    """Build the network of an upscaler of `builtin:realesrgan` without weights."""
    from spandrel.architectures.Compact.__arch.SRVGG import SRVGGNetCompact
    from spandrel.architectures.ESRGAN.__arch.RRDB import RRDBNet

    if upscaler == "animevideov3":
        return SRVGGNetCompact(num_in_ch=3, num_out_ch=3, num_feat=64, num_conv=16, upscale=4, act_type="prelu")
    blocks = {"x4plus-anime": 6, "x4plus": 23}[upscaler]
    return RRDBNet(in_nc=3, out_nc=3, num_filters=64, num_blocks=blocks, scale=4)
