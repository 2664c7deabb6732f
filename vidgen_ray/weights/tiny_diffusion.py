"""Random weights in the real architectures, small enough to run on a laptop.

The folders load with the same calls as the real FLUX.1, HunyuanDiT-v1.2 and SVD-XT: same classes, 16 latent channels and an x8
autoencoder for FLUX, v-prediction for SVD. The generated images are noise.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
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
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from vidgen_ray.nets.libraries import silence_libraries

silence_libraries()

LATENT_BLOCKS = (8, 8, 16, 16)
"""Channels per level of the autoencoder. Four levels give the real x8 downscaling."""


def build_flux(folder: Path) -> None:
    """Write FLUX.1-dev: guidance embedding, dynamic shifting, 512 T5 tokens."""
    _flux_pipeline(guidance=True).save_pretrained(folder)


def build_flux_schnell(folder: Path) -> None:
    """Write FLUX.1-schnell: no guidance, fixed shift, 256 T5 tokens."""
    _flux_pipeline(guidance=False).save_pretrained(folder)


def build_lora(file: Path) -> None:
    """Write a LoRA on every attention projection of the tiny FLUX, in the diffusers layout."""
    write_random_lora(_flux_transformer(guidance=True), file, seed=4)


def write_random_lora(transformer: torch.nn.Module, file: Path, seed: int) -> None:
    """Write a random LoRA of rank 4 on every attention projection of a transformer, in the diffusers layout."""
    rank, generator, tensors = 4, torch.Generator().manual_seed(seed), {}
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            a = torch.randn(rank, module.in_features, generator=generator)
            b = torch.randn(module.out_features, rank, generator=generator)
            # 0.3 makes the effect of a random adapter visible on a random network.
            tensors[f"transformer.{name}.lora_A.weight"] = a * 0.3
            tensors[f"transformer.{name}.lora_B.weight"] = b * 0.3
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
            max_position_embeddings=512,
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
        mlp_ratio=4.0,
        learn_sigma=True,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        text_len=77,
        text_len_t5=256,
        activation_fn="gelu-approximate",
        use_style_cond_and_image_meta_size=False,
    )
    scheduler = DDPMScheduler(
        num_train_timesteps=1000,
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
            in_channels=3,
            out_channels=3,
            down_block_types=["DownEncoderBlock2D"] * 4,
            block_out_channels=[32, 32, 32, 32],
            layers_per_block=1,
            latent_channels=4,
            sample_size=64,
            scaling_factor=0.18215,
            force_upcast=True,
        ).eval(),
        image_encoder=CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=32,
                projection_dim=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=224,
                intermediate_size=37,
                patch_size=32,
            )
        ).eval(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            interpolation_type="linear",
            num_train_timesteps=1000,
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
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32,
        num_attention_heads=(2, 4),
        transformer_layers_per_block=1,
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96,
        num_frames=25,
    ).eval()
    with torch.no_grad():
        # A random network is dominated by its input image. Larger weights make the effect of the conditions measurable.
        for module in (unet.add_embedding.linear_2, unet.conv_out):
            module.weight.mul_(4.0)
    return unet


def _flux_pipeline(guidance: bool) -> Any:
    clip, t5 = clip_tokenizer(), t5_tokenizer(512 if guidance else 256)
    transformer = _flux_transformer(guidance)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000,
            shift=3.0 if guidance else 1.0,
            use_dynamic_shifting=guidance,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
        vae=autoencoder(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159, quant_conv=False),
        text_encoder=clip_text_encoder(clip),
        tokenizer=clip,
        text_encoder_2=t5_encoder(t5),
        tokenizer_2=t5,
        transformer=transformer,
    )


def _flux_transformer(guidance: bool) -> Any:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
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
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=LATENT_BLOCKS,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=64,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=quant_conv,
        use_post_quant_conv=quant_conv,
    ).eval()


def clip_text_encoder(tokenizer: Any) -> Any:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            projection_dim=32,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()


def t5_encoder(tokenizer: Any) -> Any:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            pad_token_id=0,
            eos_token_id=1,
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
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
