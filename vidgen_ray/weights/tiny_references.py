"""Random weights in the architectures of FLUX.2 klein and Qwen-Image-Edit, small enough for a laptop. Images are noise."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vidgen_ray.weights.tiny_diffusion import write_random_lora

TEXT_CHANNELS = 16
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
    tokenizer = _qwen_tokenizer()
    torch.manual_seed(20)
    text_encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer) + 8,
            hidden_size=TEXT_CHANNELS,
            intermediate_size=TEXT_CHANNELS,
            num_hidden_layers=KLEIN_LAYERS + 1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=512,
        )
    )
    vae = AutoencoderKLFlux2(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=4,
        sample_size=64,
    )
    Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=_klein_transformer(),
        is_distilled=True,
    ).save_pretrained(folder)


def build_klein_lora(file: Path) -> None:
    """Write a random LoRA on the attention of the tiny FLUX.2 klein, in the layout of diffusers."""
    write_random_lora(_klein_transformer(), file, seed=21)


def build_qwen_edit(folder: Path) -> None:
    """Write Qwen-Image-Edit-2509: a vision-language model reads the instruction and the images."""
    tokenizer = _qwen_tokenizer()
    token_ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    torch.manual_seed(22)
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer) + 8,
                "hidden_size": TEXT_CHANNELS,
                "intermediate_size": TEXT_CHANNELS,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
                "rope_theta": 1e6,
                "pad_token_id": None,
            },
            vision_config={
                "depth": 2,
                "hidden_size": TEXT_CHANNELS,
                "intermediate_size": TEXT_CHANNELS,
                "num_heads": 2,
                "out_hidden_size": TEXT_CHANNELS,
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
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_CHANNELS,
        guidance_embeds=False,
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


def _klein_transformer() -> Any:
    torch.manual_seed(23)
    return Flux2Transformer2DModel(
        patch_size=1,
        in_channels=128,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=KLEIN_LAYERS * TEXT_CHANNELS,
        timestep_guidance_channels=256,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    ).eval()


def _qwen_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer without merges, which makes one token per byte."""
    pieces = [*sorted(ByteLevel.alphabet()), *SPECIAL_TOKENS]
    tokenizer = Qwen2Tokenizer(
        vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], pad_token="<|endoftext|>", model_max_length=4096
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
