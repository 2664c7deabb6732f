"""Random weights in the real architectures of the diffusion models, small enough to run on a laptop.

Images and clips are noise. Values that are not given are the defaults of the classes, as in the published models.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLTemporalDecoder,
    AutoencoderKLWan,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    LTXImageToVideoPipeline,
    LTXVideoTransformer3DModel,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from vidgen_ray.nets.weight_files import silence_libraries

silence_libraries()

LATENT_BLOCKS = (8, 8, 16, 16)
"""Channels per level of the autoencoder. Four levels give the real x8 downscaling."""


def build_flux(folder: Path, *, guidance: bool = True) -> None:
    """Write FLUX.1-dev: guidance embedding, dynamic shifting, 512 T5 tokens.

    Without `guidance`, write FLUX.1-schnell: fixed shift, 256 T5 tokens.
    """
    clip, t5 = clip_tokenizer(), t5_tokenizer(512 if guidance else 256)
    transformer = flux_transformer(guidance)
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0 if guidance else 1.0,
            use_dynamic_shifting=guidance,
        ),
        vae=autoencoder(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, quant_conv=False),
        text_encoder=clip_text_encoder(clip),
        tokenizer=clip,
        text_encoder_2=t5_encoder(t5),
        tokenizer_2=t5,
        transformer=transformer,
    ).save_pretrained(folder)


def write_random_lora(transformer: torch.nn.Module, file: Path, seed: int, *, rank: int = 4, scale: float = 0.3) -> None:
    """Write a random LoRA on every attention projection of a transformer, in the diffusers layout.

    The default `scale` of the factors makes the effect visible on a random network.
    """
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            a = torch.randn(rank, module.in_features, generator=generator)
            b = torch.randn(module.out_features, rank, generator=generator)
            tensors[f"transformer.{name}.lora_A.weight"] = a * scale
            tensors[f"transformer.{name}.lora_B.weight"] = b * scale
    save_file(tensors, file)


def build_hunyuandit(folder: Path) -> None:
    """Write HunyuanDiT-v1.2: Bert and T5 encoders, learned sigma, v-prediction, no style or size conditions."""
    torch.manual_seed(2)
    bert_tokenizer, mt5_tokenizer = _bert_tokenizer(), t5_tokenizer(256)
    bert = BertModel(
        BertConfig(
            vocab_size=len(bert_tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
        )
    )
    transformer = HunyuanDiT2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=32,
        num_layers=4,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        use_style_cond_and_image_meta_size=False,
    )
    scheduler = DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.018,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,
    )
    HunyuanDiTPipeline(
        vae=autoencoder(latent_channels=4, scaling_factor=0.13025, shift_factor=None, quant_conv=True),
        text_encoder=bert.eval(),
        tokenizer=bert_tokenizer,
        transformer=transformer.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=t5_encoder(mt5_tokenizer),
        tokenizer_2=mt5_tokenizer,
    ).save_pretrained(folder)


def build_svd(folder: Path) -> None:
    """Write SVD-XT: 25 frames, the temporal autoencoder, Karras sigmas up to 700. fp16 halves the file size."""
    torch.manual_seed(3)
    unet = _svd_unet()
    pipeline = StableVideoDiffusionPipeline(
        vae=AutoencoderKLTemporalDecoder(
            down_block_types=["DownEncoderBlock2D"] * 4,
            block_out_channels=[32, 32, 32, 32],
            sample_size=64,
        ).eval(),
        image_encoder=CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=32,
                projection_dim=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=37,
            )
        ).eval(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            steps_offset=1,
            timestep_spacing="leading",
            timestep_type="continuous",
            use_karras_sigmas=True,
            sigma_min=0.002,
            sigma_max=700.0,
        ),
        feature_extractor=CLIPImageProcessor(crop_size=224, size=224),
    )
    pipeline.to(torch.float16).save_pretrained(folder)


def _svd_unet() -> Any:
    # At least one level needs 64 channels. With 32, each of GroupNorm's 32 groups is a single channel, and the embedding of
    # time, fps and motion, which is constant per channel, is normalised away.
    unet = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32,
        num_attention_heads=(2, 4),
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
    ).eval()
    with torch.no_grad():
        # A random network is dominated by its input image. Larger weights make the effect of the conditions measurable.
        for module in (unet.add_embedding.linear_2, unet.conv_out):
            module.weight.mul_(4.0)
    return unet


def flux_transformer(guidance: bool) -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        num_layers=2,
        num_single_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 6, 6],
        guidance_embeds=guidance,
    ).eval()


def autoencoder(latent_channels: int, scaling_factor: float, shift_factor: float | None, quant_conv: bool) -> Any:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=LATENT_BLOCKS,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=64,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
    ).eval()


def clip_text_encoder(tokenizer: Any, network_class: Any = CLIPTextModel) -> Any:
    return network_class(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def t5_encoder(tokenizer: Any, network_class: Any = T5EncoderModel, config_class: Any = T5Config, *, tied: bool = False) -> Any:
    return network_class(
        config_class(
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=tied,
        )
    ).eval()


def clip_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer without merges, which makes one token per byte."""
    letters = sorted(ByteLevel.alphabet())
    # The end token has the highest id, as in the real CLIP, whose pooling may search for the largest id.
    pieces = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def t5_tokenizer(max_length: int) -> Any:
    """Return a unigram tokenizer over printable ASCII and a few words. The special tokens have the ids of the real T5."""
    word_start = "\u2581"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), (word_start, -2.0)]
    pieces += [(chr(c), -3.0) for c in range(33, 127)]
    pieces += [
        (word_start + word, -1.0)
        for word in ["a", "the", "of", "in", "on", "and", "man", "woman", "portrait", "photo", "cinematic"]
    ]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_length)


def _bert_tokenizer() -> Any:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    for code in range(33, 127):
        letter = chr(code).lower()
        pieces += [p for p in (letter, "##" + letter) if p not in pieces]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, model_max_length=77)


_TEXT_CHANNELS = 16
KLEIN_LAYERS = 3
"""Layers of the text encoder whose outputs the transformer of FLUX.2 klein reads."""
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_klein(folder: Path) -> None:
    """Write FLUX.2 klein, distilled: no guidance, outputs of three layers of the text encoder."""
    tokenizer = qwen_tokenizer()
    torch.manual_seed(20)
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer) + 8,
            hidden_size=_TEXT_CHANNELS,
            intermediate_size=_TEXT_CHANNELS,
            num_hidden_layers=KLEIN_LAYERS + 1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=512,
        )
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=64,
    )
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=klein_transformer(),
        is_distilled=True,
    ).save_pretrained(folder)


def build_qwen_edit(folder: Path) -> None:
    """Write Qwen-Image-Edit-2509: a vision-language model reads the instruction and the images."""
    tokenizer = qwen_tokenizer()
    token_ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    torch.manual_seed(22)
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer) + 8,
                "hidden_size": _TEXT_CHANNELS,
                "intermediate_size": _TEXT_CHANNELS,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
                "rope_theta": 1e6,
                "pad_token_id": None,
            },
            vision_config={
                "depth": 2,
                "hidden_size": _TEXT_CHANNELS,
                "intermediate_size": _TEXT_CHANNELS,
                "num_heads": 2,
                "out_hidden_size": _TEXT_CHANNELS,
            },
            vision_start_token_id=token_ids["<|vision_start|>"],
            vision_end_token_id=token_ids["<|vision_end|>"],
            image_token_id=token_ids["<|image_pad|>"],
            video_token_id=token_ids["<|video_pad|>"],
        )
    )
    processor = Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=CHAT_TEMPLATE,
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    transformer = QwenImageTransformer2DModel(
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_TEXT_CHANNELS,
        axes_dims_rope=(8, 4, 4),
    )
    QwenImageEditPlusPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        processor=processor,
        transformer=transformer.eval(),
    ).save_pretrained(folder)


def klein_transformer() -> Any:
    torch.manual_seed(23)
    return Flux2Transformer2DModel(
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=KLEIN_LAYERS * _TEXT_CHANNELS,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    ).eval()


def qwen_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer without merges, which makes one token per byte."""
    pieces = [*sorted(ByteLevel.alphabet()), *SPECIAL_TOKENS]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], pad_token="<|endoftext|>", model_max_length=4096
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


VIDEO_TEXT_CHANNELS = 32
WAN_CHANNELS, TI2V_CHANNELS = 16, 48
"""Latent channels of the two autoencoders of Wan 2.2."""
WAN_INPUTS = 2 * WAN_CHANNELS + 4
"""Channels of noise, image latents and a mask."""


def build_wan(folder: Path) -> None:
    """Write Wan 2.2 I2V-A14B: two transformers, the image as latents and mask beside the noise, 8x8x4 compression."""
    torch.manual_seed(5)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=WAN_CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    high, low = (wan_transformer(WAN_INPUTS, WAN_CHANNELS, seed) for seed in (6, 7))
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
    )
    transformer = wan_transformer(TI2V_CHANNELS, TI2V_CHANNELS, 9)
    _wan(vae, transformer=transformer, transformer_2=None, expand_timesteps=True).save_pretrained(folder)


def _wan(vae: Any, **parts: Any) -> Any:
    tokenizer = t5_tokenizer(512)
    text_encoder = t5_encoder(tokenizer, UMT5EncoderModel, UMT5Config, tied=True)
    return WanImageToVideoPipeline(
        vae=vae.eval(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        image_encoder=None,
        image_processor=None,
        **parts,
    )


def wan_transformer(in_channels: int, out_channels: int, seed: int) -> Any:
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=VIDEO_TEXT_CHANNELS,
        ffn_dim=32,
        num_layers=2,
        # At least the number of latent frames and of tokens per row and column.
        rope_max_seq_len=64,
    ).eval()


def build_ltx(folder: Path, *, timestep_conditioning: bool = False) -> None:
    """Write LTX-Video 0.9, 32x32x8 compression. With `timestep_conditioning` of the autoencoder: LTX-Video 0.9.8."""
    tokenizer = t5_tokenizer(128)
    transformer = ltx_transformer()
    torch.manual_seed(10)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        # By default, three levels halve space and time, and patches of 4x4 pixels make it 32x32x8.
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        timestep_conditioning=timestep_conditioning,
    )
    LTXImageToVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            shift_terminal=0.1,
        ),
        vae=vae.eval(),
        text_encoder=t5_encoder(tokenizer),
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)


def ltx_transformer() -> Any:
    torch.manual_seed(11)
    return LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=2,
        caption_channels=VIDEO_TEXT_CHANNELS,
    ).eval()
