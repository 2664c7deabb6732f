"""Traces of FLUX.2 klein, Qwen-Image-Edit, Wan 2.2, LTX-Video and RIFE for the memory table. See `trace_memory`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.meta_networks import RIFE_NETWORKS, Traced, meta, network, trace
from vidgen_ray.nets.rife_network import FramePair
from vidgen_ray.stages.loading import set_vae_tiles
from vidgen_ray.stages.memory_table import TILES_PX
from vidgen_ray.stages.rife import FLOW_SCALES
from vidgen_ray.stages.wan import DECODED_FRAMES

Trace = Callable[..., Traced]
"""Width, height and frames -> what a call takes."""
Size = tuple[int, int, int]
CONSTANT = (0, 0, 1)
"""Size of a call that does not depend on the shot."""

TEXT_TOKENS = 512
LTX_TEXT_TOKENS = 128
QWEN_TEXT_TOKENS = 1700
"""Tokens of the longest instruction, of the template around it, and of three images with 196 tokens each."""
USUAL_QWEN_TEXT_TOKENS = 400
"""The same for an instruction of two sentences and one image, for the work: the model gets no padding."""

IMAGES = ((256, 256), (512, 512), (1024, 1024), (2048, 2048))
OTHER_IMAGES = ((640, 1024), (2048, 512), (1920, 1088))
OTHER_PADDED = ((512, 1024), (2048, 512), (1536, 1024))
"""Sizes that RIFE pads at no flow scale."""
SEQUENCES = ((1024, 1024), (2048, 1024), (2048, 2048), (4096, 2048))
"""Sizes whose pixels are those of the image together with those of the images that the model sees."""
OTHER_SEQUENCES = ((1536, 1024), (3072, 2048))
CLIPS = ((256, 256, 2), (832, 480, 6), (1280, 704, 21), (2048, 2048, 21))
"""Width, height and latent frames."""
OTHER_CLIPS = ((1024, 576, 7), (704, 1280, 31), (2048, 2048, 2))
WAN_IMAGES = ((256, 256), (512, 512), (1024, 1024))
CODED_CLIPS = ((256, 256, 1), (256, 256, 9), (512, 512, 17), (512, 512, 49), (1024, 1024, 9), (1024, 1024, 25))
"""Width, height and frames of clips that autoencoders encode and decode."""
OTHER_WAN_IMAGES = ((1280, 704), (512, 320))


def one_frame(images: Iterable[tuple[int, int]]) -> tuple[Size, ...]:
    return tuple((width, height, 1) for width, height in images)


# FLUX.2 klein and Qwen-Image-Edit. The pixels are those of all images in the sequence.


def klein_step(width: int, height: int, frames: int = 1) -> Traced:
    """One denoising step. `width` times `height`: the image and the photos."""
    model, tokens = network("klein/transformer"), width * height // 256
    return trace(
        lambda: model(
            hidden_states=meta(1, tokens, 128),
            timestep=meta(1),
            encoder_hidden_states=meta(1, TEXT_TOKENS, 7680),
            txt_ids=meta(1, TEXT_TOKENS, 4),
            img_ids=meta(1, tokens, 4),
            guidance=None,
            return_dict=False,
        ),
        model,
    )


def klein_text() -> Traced:
    """The language model computes logits and keeps the results of all layers, as the pipeline calls it."""
    model = network("klein/text_encoder")
    # With a mask that is made already, the model does not look at the values of its inputs.
    inputs = {
        "input_ids": meta(1, TEXT_TOKENS, dtype=torch.int64),
        "attention_mask": {"full_attention": meta(1, 1, TEXT_TOKENS, TEXT_TOKENS)},
    }
    return trace(lambda: model(**inputs, output_hidden_states=True, use_cache=False), model)


def qwen_step(width: int, height: int, frames: int = 1, *, text_tokens: int = QWEN_TEXT_TOKENS) -> Traced:
    """One denoising step. `width` times `height`: the new image and those that the model sees."""
    model = network("qwen_edit/transformer")
    return trace(
        lambda: model(
            hidden_states=meta(1, width * height // 256, 64),
            timestep=meta(1),
            encoder_hidden_states=meta(1, text_tokens, 3584),
            img_shapes=[[(1, height // 16, width // 16)]],
            return_dict=False,
        ),
        model,
    )


def qwen_text(text_tokens: int = QWEN_TEXT_TOKENS) -> Traced:
    """The language model, with logits and the results of all layers. Its vision tower needs less and runs before it."""
    model = network("qwen_edit/text_encoder")

    def encode() -> Any:
        output = model.model.language_model(inputs_embeds=meta(1, text_tokens, 3584), output_hidden_states=True, use_cache=True)
        return output, model.lm_head(output.last_hidden_state)

    return trace(encode, model)


def image_decode(width: int, height: int, frames: int = 1, *, model: str, tile_px: int | None = None) -> Traced:
    vae = network(f"{model}/vae")
    set_vae_tiles(vae, tile_px)
    return trace(lambda: _to_pixels(vae.decode(_latents(vae, width, height), return_dict=False)[0]), vae)


def image_encode(width: int, height: int, frames: int = 1, *, model: str) -> Traced:
    vae = network(f"{model}/vae")
    set_vae_tiles(vae, None)
    pixels = meta(1, 3, *((1,) if model == "qwen_edit" else ()), height, width)
    return trace(lambda: vae.encode(pixels).latent_dist.mode(), vae)


def _latents(vae: Any, width: int, height: int) -> torch.Tensor:
    if hasattr(vae.config, "z_dim"):
        return meta(1, vae.config.z_dim, 1, height // 8, width // 8)
    return meta(1, vae.config.latent_channels, height // 8, width // 8)


def _to_pixels(decoded: torch.Tensor) -> torch.Tensor:
    """Convert to 0..1 as diffusers' image processor does on the device."""
    return (decoded.float() * 0.5 + 0.5).clamp(0, 1)


# Wan 2.2 and LTX-Video


def wan_step(width: int, height: int, latent_frames: int, *, model: str = "wan") -> Traced:
    """One pass of a denoising step: guidance takes two passes, one after the other."""
    transformer = network(f"{model}/transformer")
    channels, patch, per_token = (48, 32, True) if model == "wan-ti2v" else (36, 16, False)
    latents = meta(1, channels, latent_frames, height * 2 // patch, width * 2 // patch)
    tokens = latent_frames * (height // patch) * (width // patch)
    return trace(
        lambda: transformer(
            hidden_states=latents,
            timestep=meta(1, tokens, dtype=torch.float32) if per_token else meta(1, dtype=torch.float32),
            encoder_hidden_states=meta(1, TEXT_TOKENS, 4096),
            return_dict=False,
        ),
        transformer,
    )


def text_encoder(name: str, tokens: int) -> Traced:
    model = network(name)
    return trace(lambda: model(meta(1, tokens, dtype=torch.int64)), model)


def wan_decode(width: int, height: int, frames: int = DECODED_FRAMES, *, model: str = "wan") -> Traced:
    """Decode a clip in float32."""
    vae = network(f"{model}/vae", "float32")
    side = vae.config.scale_factor_spatial
    latents = meta(1, vae.config.z_dim, (frames - 1) // 4 + 1, height // side, width // side, dtype=torch.float32)
    return trace(lambda: vae.decode(latents, return_dict=False)[0], vae)


def wan_encode(width: int, height: int, frames: int = DECODED_FRAMES, *, model: str = "wan") -> Traced:
    """Encode a clip in float32."""
    vae = network(f"{model}/vae", "float32")
    pixels = meta(1, 3, frames, height, width, dtype=torch.float32)
    return trace(lambda: vae.encode(pixels).latent_dist.mode(), vae)


def wan_memory(width: int, height: int, frames: int = 1, *, work: Trace, model: str) -> Traced:
    """Working memory of the autoencoder: that of a short clip, or of the image that TI2V-5B encodes."""
    return work(width, height, 1 if (work, model) == (wan_encode, "wan-ti2v") else DECODED_FRAMES, model=model)


def ltx_step(width: int, height: int, latent_frames: int) -> Traced:
    """One denoising step with guidance, which takes both passes at once."""
    model = network("ltx/transformer")
    rows, columns = height // 32, width // 32
    tokens = latent_frames * rows * columns
    return trace(
        lambda: model(
            hidden_states=meta(2, tokens, 128),
            encoder_hidden_states=meta(2, LTX_TEXT_TOKENS, 4096),
            timestep=meta(2, tokens, dtype=torch.float32),
            encoder_attention_mask=meta(2, LTX_TEXT_TOKENS),
            num_frames=latent_frames,
            height=rows,
            width=columns,
            rope_interpolation_scale=(8 / 25, 32, 32),
            return_dict=False,
        ),
        model,
    )


def ltx_decode(width: int, height: int, latent_frames: int) -> Traced:
    """Decode the whole clip."""
    vae = network("ltx/vae")
    latents = meta(1, 128, latent_frames, height // 32, width // 32)
    return trace(lambda: _to_pixels(vae.decode(latents, None, return_dict=False)[0]), vae)


def ltx_encode(width: int, height: int, frames: int = 1) -> Traced:
    vae = network("ltx/vae")
    return trace(lambda: vae.encode(meta(1, 3, 1, height, width)).latent_dist.mode(), vae)


# RIFE


def rife_pair(width: int, height: int, frames: int = 1, *, layout: str, flow_scale: float) -> Traced:
    """Draw the middle of two frames in float32, with convolutions in float16."""
    model = network(layout)
    first, second = (meta(1, 3, height, width, dtype=torch.float32) for _ in range(2))

    def draw() -> Any:
        pair = FramePair(model, first, second, flow_scale)
        return pair, pair.aligned()

    drawn = trace(draw, model)
    return drawn._replace(peak_bytes=drawn.peak_bytes + 2 * first.untyped_storage().nbytes())


def constants() -> dict[str, Traced]:
    """Return the curves that do not depend on the size of a shot."""
    return {
        "klein/text": klein_text(),
        "qwen_edit/text": qwen_text(),
        "wan/text": text_encoder("wan/text_encoder", TEXT_TOKENS),
        "ltx/text": text_encoder("ltx/text_encoder", LTX_TEXT_TOKENS),
    }


def work_traces() -> Mapping[str, tuple[Trace, tuple[Size, ...]]]:
    """Return curve -> function and sizes for curves whose work is not that of the call whose memory is traced."""
    return {
        "wan/encode": (wan_encode, CODED_CLIPS),
        "wan/decode": (wan_decode, CODED_CLIPS),
        "wan-ti2v/encode": (partial(wan_encode, model="wan-ti2v"), CODED_CLIPS),
        "wan-ti2v/decode": (partial(wan_decode, model="wan-ti2v"), CODED_CLIPS),
        "ltx/decode": (lambda width, height, frames: ltx_decode(width, height, (frames - 1) // 8 + 1), CODED_CLIPS),
        "qwen_edit/text": (lambda *_: qwen_text(USUAL_QWEN_TEXT_TOKENS), (CONSTANT,)),
        "qwen_edit/step": (partial(qwen_step, text_tokens=USUAL_QWEN_TEXT_TOKENS), one_frame(SEQUENCES)),
    }


def open_model_traces() -> Mapping[str, tuple[Trace, tuple[Size, ...], tuple[Size, ...]]]:
    """Return curve -> function of width, height and frames; sizes of the table; other sizes to check it with."""
    images, others = one_frame(IMAGES), one_frame(OTHER_IMAGES)
    sequences, other_sequences = one_frame(SEQUENCES), one_frame(OTHER_SEQUENCES)
    wan_images, other_wan_images = one_frame(WAN_IMAGES), one_frame(OTHER_WAN_IMAGES)
    curves: dict[str, tuple[Any, tuple[Size, ...], tuple[Size, ...]]] = {
        "klein/step": (klein_step, sequences, other_sequences),
        "qwen_edit/step": (qwen_step, sequences, other_sequences),
        "ltx/step": (ltx_step, CLIPS, OTHER_CLIPS),
        # Clips of few frames need less than the curve: the first latent frame gives one frame, the others eight.
        "ltx/decode": (ltx_decode, CLIPS, OTHER_CLIPS[:2]),
        "ltx/encode": (ltx_encode, images, others),
    }
    for model in ("klein", "qwen_edit"):
        curves[f"{model}/encode"] = partial(image_encode, model=model), images, others
        curves[f"{model}/decode"] = partial(image_decode, model=model), images, others
        for tile_px in TILES_PX:
            decode = partial(image_decode, model=model, tile_px=tile_px)
            curves[f"{model}/decode:tile{tile_px}"] = decode, images[2:], others
    for model in ("wan", "wan-ti2v"):
        curves[f"{model}/step"] = partial(wan_step, model=model), CLIPS, OTHER_CLIPS
        for name, work in (("encode", wan_encode), ("decode", wan_decode)):
            curves[f"{model}/{name}"] = partial(wan_memory, work=work, model=model), wan_images, other_wan_images
    for layout in RIFE_NETWORKS:
        for flow_scale in FLOW_SCALES:
            draw = partial(rife_pair, layout=layout, flow_scale=flow_scale)
            curves[f"{layout}:{flow_scale:g}"] = draw, images, one_frame(OTHER_PADDED)
    return curves
