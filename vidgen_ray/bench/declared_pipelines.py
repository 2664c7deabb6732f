"""Small random pipelines of any declared diffusers class, for the contract tests of the declarations.

Each component has the class of the type hint in the constructor of the pipeline and the config of the section `tiny` of the
declaration. Two keys there have a meaning of their own: `_class_name` chooses a class where the hint names several or only a
base class, and `value` gives an argument that is no component, such as `boundary_ratio`.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import torch
import transformers
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from vidgen_ray.bench.tiny_networks import (
    SPECIAL_TOKENS,
    clip_text_encoder,
    clip_tokenizer,
    qwen_tokenizer,
    t5_encoder,
    t5_tokenizer,
)
from vidgen_ray.declared.arguments import class_of, interface_of
from vidgen_ray.declared.declaration import Declaration

QWEN_CHANNELS, GEMMA_CHANNELS, VISION_CHANNELS = 16, 16, 16
"""Channels of the text encoders of the families Qwen and Gemma, and of the image encoders. Those of T5 and CLIP have 32."""
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As that of `tiny_networks`, but a message may also be a list of texts."""
_SIZES = {"hidden_size": QWEN_CHANNELS, "intermediate_size": QWEN_CHANNELS, "num_hidden_layers": 3}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
_ROPE = {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6}
_VISION_SIZES = {
    "depth": 2,
    "hidden_size": VISION_CHANNELS,
    "intermediate_size": VISION_CHANNELS,
    "num_heads": 2,
    "out_hidden_size": QWEN_CHANNELS,
}


def tiny_pipeline(declaration: Declaration, seed: int = 0) -> Any:
    """Return the pipeline of a declaration with small random networks, in float32 and on the CPU."""
    pipeline_class, parts = class_of(declaration), {}
    made = inspect.signature(pipeline_class.__init__).parameters
    for number, (name, hint) in enumerate(interface_of(pipeline_class).components.items()):
        config = declaration.tiny.get(name)
        if config is None and made[name].default is not inspect.Parameter.empty:
            continue
        torch.manual_seed(seed + number)
        parts[name] = _component(hint, dict(config or {}), declaration)
    return pipeline_class(**parts)


def _component(hint: Any, config: dict[str, Any], declaration: Declaration) -> Any:
    if "value" in config:
        return config["value"]
    component_class = next(each for each in typing.get_args(hint) or (hint,) if each is not type(None))
    if name := config.pop("_class_name", None):
        component_class = getattr(diffusers, name, None) or getattr(transformers, name)
    make = _BUILDERS.get(component_class)
    component = component_class(**config) if make is None else make(declaration, **config)
    if isinstance(component, diffusers.ModelMixin):
        randomise(component)
    return component.eval() if isinstance(component, torch.nn.Module) else component


def randomise(network: torch.nn.Module) -> None:
    """Draw all weights with two or more dimensions from a normal distribution.

    Some classes start gates and modulations at zero, so that conditions had no effect, or leave parameters uninitialised.
    """
    with torch.no_grad():
        for weights in network.parameters():
            if weights.ndim > 1:
                weights.normal_(0, weights[0].numel() ** -0.5)


def _read_tokens(declaration: Declaration) -> int:
    return declaration.text.tokens if declaration.text is not None else 512


def _qwen_chat_tokenizer(_: Declaration) -> Any:
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _qwen_processor(processor_class: Any, video_processor_class: Any) -> Callable[[Declaration], Any]:
    return lambda declaration: processor_class(
        image_processor=Qwen2VLImageProcessor(
            patch_size=16 if processor_class is Qwen3VLProcessor else 14,
            size={"shortest_edge": 3136, "longest_edge": 1 << 24},
        ),
        tokenizer=_qwen_chat_tokenizer(declaration),
        video_processor=video_processor_class(),
        chat_template=_CHAT_TEMPLATE,
    )


def _qwen_ids() -> dict[str, int]:
    tokenizer = qwen_tokenizer()
    names = {"vision_start_token_id": 3, "vision_end_token_id": 4, "image_token_id": 5, "video_token_id": 6}
    return {name: tokenizer.convert_tokens_to_ids(SPECIAL_TOKENS[place]) for name, place in names.items()}


def _qwen3(network_class: Any) -> Callable[..., Any]:
    def make(_: Declaration, **config: Any) -> Any:
        sizes = {**_SIZES, **_HEADS, "head_dim": 8, "max_position_embeddings": 2048}
        return network_class(Qwen3Config(vocab_size=len(qwen_tokenizer()) + 8, **{**sizes, **config}))

    return make


def _qwen_text_config(**config: Any) -> dict[str, Any]:
    vocabulary = {"vocab_size": len(qwen_tokenizer()) + 8, "pad_token_id": None}
    return {**_SIZES, **_HEADS, **vocabulary, "rope_scaling": _ROPE, "rope_theta": 1e6, **config}


def _qwen_vl(network_class: Any, config_class: Any, vision: Mapping[str, Any]) -> Callable[..., Any]:
    def make(_: Declaration, **config: Any) -> Any:
        text = _qwen_text_config(**config)
        return network_class(config_class(text_config=text, vision_config={**_VISION_SIZES, **vision}, **_qwen_ids()))

    return make


def _gemma_tokenizer(declaration: Declaration) -> Any:
    """Return a BPE tokenizer without merges over printable ASCII, which makes one token per character."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *map(chr, range(33, 127))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=_read_tokens(declaration))


def _gemma_sizes(**config: Any) -> dict[str, Any]:
    sizes = {"hidden_size": GEMMA_CHANNELS, "intermediate_size": GEMMA_CHANNELS, "num_hidden_layers": 2, "head_dim": 8}
    return {**sizes, **_HEADS, "vocab_size": 128, "max_position_embeddings": 2048, **config}


def _gemma_3(_: Declaration, **config: Any) -> Any:
    vision = {"hidden_size": VISION_CHANNELS, "intermediate_size": VISION_CHANNELS, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 16}
    return Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=_gemma_sizes(**config), vision_config=vision, mm_tokens_per_image=4)
    )


def _clip_vision(_: Declaration, **config: Any) -> Any:
    sizes = {"hidden_size": VISION_CHANNELS, "projection_dim": VISION_CHANNELS, "intermediate_size": VISION_CHANNELS}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**{**sizes, **config}))


def _siglip_vision(_: Declaration, **config: Any) -> Any:
    sizes = {"hidden_size": VISION_CHANNELS, "intermediate_size": VISION_CHANNELS, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "image_size": 32, "patch_size": 8}
    return SiglipVisionModel(SiglipVisionConfig(**{**sizes, **config}))


_BUILDERS: Mapping[Any, Callable[..., Any]] = {
    T5Tokenizer: lambda declaration: t5_tokenizer(_read_tokens(declaration)),
    T5EncoderModel: lambda declaration: t5_encoder(t5_tokenizer(_read_tokens(declaration))),
    UMT5EncoderModel: lambda declaration: t5_encoder(
        t5_tokenizer(_read_tokens(declaration)), UMT5EncoderModel, UMT5Config, tied=True
    ),
    CLIPTokenizer: lambda _: clip_tokenizer(),
    CLIPTextModel: lambda _: clip_text_encoder(clip_tokenizer()),
    ByT5Tokenizer: lambda _: ByT5Tokenizer(),
    Qwen2Tokenizer: _qwen_chat_tokenizer,
    Qwen2VLProcessor: _qwen_processor(Qwen2VLProcessor, Qwen2VLVideoProcessor),
    Qwen2_5_VLProcessor: _qwen_processor(Qwen2_5_VLProcessor, Qwen2VLVideoProcessor),
    Qwen3VLProcessor: _qwen_processor(Qwen3VLProcessor, Qwen3VLVideoProcessor),
    Qwen3ForCausalLM: _qwen3(Qwen3ForCausalLM),
    Qwen3Model: _qwen3(Qwen3Model),
    Qwen2_5_VLTextModel: lambda _, **config: Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**_qwen_text_config(**config))),
    Qwen2_5_VLForConditionalGeneration: _qwen_vl(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, {}),
    Qwen3VLForConditionalGeneration: _qwen_vl(
        Qwen3VLForConditionalGeneration,
        Qwen3VLConfig,
        {"num_position_embeddings": 16, "deepstack_visual_indexes": [0], "patch_size": 16},
    ),
    GemmaTokenizer: _gemma_tokenizer,
    Gemma2Model: lambda _, **config: Gemma2Model(Gemma2Config(**_gemma_sizes(**config))),
    Gemma3ForConditionalGeneration: _gemma_3,
    CLIPImageProcessor: lambda _: CLIPImageProcessor(crop_size=32, size=32),
    CLIPVisionModelWithProjection: _clip_vision,
    SiglipImageProcessor: lambda _: SiglipImageProcessor(size={"height": 32, "width": 32}),
    SiglipVisionModel: _siglip_vision,
}
"""Class of a component that needs more than a config -> function that makes it, with the fields of its config."""
