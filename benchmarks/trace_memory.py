"""Trace the GPU memory and the work of all stages at full size and write the table from which the planner works.

Networks are built on the meta device, where tensors have a shape and no memory, and run once per size while the bytes of live
tensors, floating-point operations and bytes read and written are counted. Needs no GPU and no weights:

    python -m benchmarks.trace_memory            # writes vidgen_ray/stages/memory_table.json, takes some minutes
    python -m benchmarks.trace_memory --check    # compares the table with other sizes and prints the differences

Attention counts as its output only, as in the fused kernels of torch. What these kernels and cuDNN need beside their output,
fragmentation and the CUDA context are not in the table; the planner adds a margin for them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from scipy.optimize import nnls

from benchmarks.meta_networks import RIFE_NETWORKS, LiveBytes, Traced, meta, network, tensor_bytes, trace
from benchmarks.trace_open_models import (
    CONSTANT,
    Size,
    Trace,
    constants,
    one_frame,
    open_model_traces,
    work_traces,
)
from vidgen_ray.bench.published_models import NETWORKS
from vidgen_ray.stages.memory_table import FP8, LORA_RANK, TABLE_FILE, TILES_PX, MemoryTable, load_table
from vidgen_ray.stages.speed import BLOCKS

TEXT_TOKENS = 512
IDENTITY_TOKENS = 8
UPSCALERS = ("animevideov3", "x4plus-anime", "x4plus")
TOLERANCE = 0.05
"""Largest relative difference between the table and other traced sizes that `--check` accepts."""

IMAGES = ((256, 256), (512, 512), (1024, 576), (1024, 1024), (1536, 1536), (2048, 2048))
"""Width and height of the points of the table."""
OTHER_IMAGES = ((512, 320), (640, 1024), (2048, 512), (1344, 768), (1920, 1088))
CLIPS = ((256, 256, 8), (512, 320, 14), (1024, 576, 14), (1024, 576, 25), (1024, 1024, 25), (2048, 2048, 25), (2048, 2048, 256))
"""Width, height and frames of the points of the table."""
OTHER_CLIPS = ((576, 1024, 25), (1024, 576, 50), (768, 768, 20), (1024, 576, 256))
CHUNKS = ((512, 512, 1), (1024, 576, 1), (1024, 576, 2), (1024, 576, 5), (1024, 576, 8), (2048, 2048, 8))
OTHER_CHUNKS = ((1024, 1024, 1), (576, 1024, 4), (2048, 2048, 2))
UPSCALED = ((128, 128, 1), (512, 512, 1), (1024, 576, 1), (1024, 576, 4), (2048, 2048, 4))
OTHER_UPSCALED = ((576, 1024, 2), (2048, 512, 1), (1024, 1024, 3))


# FLUX


def flux_step(width: int, height: int, frames: int = 1, *, variant: str = "", infusenet: bool = False) -> Traced:
    """One denoising step, with InfuseNet before it."""
    patches = width * height // 256
    transformer = network("flux/transformer", variant)
    models = [transformer]
    if infusenet:
        models.append(network("infusenet/net"))

    def step() -> Any:
        inputs = {
            "hidden_states": meta(1, patches, 64),
            "timestep": meta(1),
            "pooled_projections": meta(1, 768),
            "img_ids": meta(patches, 3),
            "guidance": meta(1, dtype=torch.float32),
            "return_dict": False,
        }
        residuals = {}
        if infusenet:
            double, single = network("infusenet/net")(
                controlnet_cond=meta(1, patches, 64),
                conditioning_scale=1.0,
                encoder_hidden_states=meta(1, IDENTITY_TOKENS, 4096),
                txt_ids=meta(IDENTITY_TOKENS, 3),
                **inputs,
            )
            residuals = {"controlnet_block_samples": double, "controlnet_single_block_samples": single}
        prompt = {"encoder_hidden_states": meta(1, TEXT_TOKENS, 4096), "txt_ids": meta(TEXT_TOKENS, 3)}
        return transformer(**inputs, **prompt, **residuals)

    return trace(step, *models)


def flux_text() -> Traced:
    encoder = network("flux/text_encoder_2")
    return trace(lambda: encoder(meta(1, TEXT_TOKENS, dtype=torch.int64)), encoder)


def vae_decode(width: int, height: int, frames: int = 1, *, model: str, tile_px: int = 0, variant: str = "") -> Traced:
    vae = network(f"{model}/vae", variant)
    _set_tiles(vae, tile_px)
    latents = meta(1, vae.config.latent_channels, height // 8, width // 8, dtype=vae.dtype)

    def decode() -> Any:
        pixels = vae.decode(latents, return_dict=False)[0]
        # As diffusers' image processor does on the device.
        return (pixels.float() * 0.5 + 0.5).clamp(0, 1)

    return trace(decode, vae)


def vae_encode(width: int, height: int, frames: int = 1, *, model: str, variant: str = "") -> Traced:
    vae = network(f"{model}/vae", variant)
    _set_tiles(vae, 0)
    pixels = meta(1, 3, height, width, dtype=vae.dtype)
    return trace(lambda: vae.encode(pixels).latent_dist.mode(), vae)


def _set_tiles(vae: Any, tile_px: int) -> None:
    if tile_px:
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = tile_px, tile_px // 8
    elif hasattr(vae, "use_tiling"):
        vae.use_tiling = False


# HunyuanDiT


def hunyuan_step(width: int, height: int, frames: int = 1) -> Traced:
    """One denoising step with guidance."""
    model = network("hunyuan/transformer")
    patches = width * height // 256
    rope = meta(patches, 88, dtype=torch.float32), meta(patches, 88, dtype=torch.float32)
    return trace(
        lambda: model(
            meta(2, 4, height // 8, width // 8),
            meta(2),
            encoder_hidden_states=meta(2, 77, 1024),
            text_embedding_mask=meta(2, 77, dtype=torch.int64),
            encoder_hidden_states_t5=meta(2, 256, 2048),
            text_embedding_mask_t5=meta(2, 256, dtype=torch.int64),
            image_meta_size=meta(2, 6),
            style=meta(2, dtype=torch.int64),
            image_rotary_emb=rope,
            return_dict=False,
        ),
        model,
    )


def hunyuan_text() -> Traced:
    encoder = network("hunyuan/text_encoder_2")
    return trace(lambda: encoder(meta(1, 256, dtype=torch.int64)), encoder)


# Stable Video Diffusion


def svd_step(width: int, height: int, frames: int, *, variant: str = "") -> Traced:
    """One denoising step with guidance."""
    unet = network("svd/unet", variant)
    return trace(
        lambda: unet(
            meta(2, frames, 8, height // 8, width // 8),
            meta(1, dtype=torch.float32),
            encoder_hidden_states=meta(2, 1, 1024),
            added_time_ids=meta(2, 3),
            return_dict=False,
        ),
        unet,
    )


def svd_decode(width: int, height: int, frames: int) -> Traced:
    """Decode a chunk of frames."""
    vae = network("svd/vae")
    return trace(lambda: vae.decode(meta(frames, 4, height // 8, width // 8), num_frames=frames, return_dict=False), vae)


def svd_clip(width: int, height: int, frames: int) -> Traced:
    """Join the decoded frames of a clip and convert them to 0..1 in float32, as diffusers does after the last chunk."""
    from diffusers.video_processor import VideoProcessor

    decoded = [meta(1, 3, height, width) for _ in range(frames)]

    def join() -> Any:
        clip = torch.cat(decoded)
        decoded.clear()
        clip = clip.reshape(-1, frames, *clip.shape[1:]).permute(0, 2, 1, 3, 4).float()
        return VideoProcessor(do_resize=True, vae_scale_factor=8).postprocess_video(clip, output_type="pt")

    live = LiveBytes()
    for frame in decoded:
        live.track(frame)
    with torch.no_grad(), live:
        join()
    return Traced(live.peak, 0, live.moved)


# SDXL with InstantID


def sdxl_step(width: int, height: int, frames: int = 1) -> Traced:
    """One denoising step with guidance, IdentityNet before it."""
    unet, controlnet = network("sdxl/unet"), network("sdxl/controlnet")
    added = {"text_embeds": meta(2, 1280), "time_ids": meta(2, 6)}

    def step() -> Any:
        latents = meta(2, 4, height // 8, width // 8)
        down, mid = controlnet(
            latents,
            meta(1),
            encoder_hidden_states=meta(2, 16, 2048),
            controlnet_cond=meta(2, 3, height, width),
            conditioning_scale=1.0,
            added_cond_kwargs=added,
            return_dict=False,
        )
        return unet(
            latents,
            meta(1),
            encoder_hidden_states=meta(2, 77, 2048),
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
            added_cond_kwargs=added,
            return_dict=False,
        )

    return trace(step, unet, controlnet)


# RealESRGAN


def upscale(width: int, height: int, frames: int, *, upscaler: str, whole: bool = True) -> Traced:
    """Upscale frames four times and convert them to uint8; with `whole` false the network alone, as for a tile."""
    model = network(f"realesrgan/{upscaler}")

    def call() -> Any:
        frames_uint8 = torch.empty(frames, 3, height, width, dtype=torch.uint8, device="meta")
        output = model((frames_uint8.float() / 255).to(torch.float16))
        if not whole:
            return output
        return output.float().clamp_(0, 1).mul_(255).round_().to(torch.uint8)

    return trace(call, model)


def traces() -> dict[str, tuple[Trace, tuple[Size, ...], tuple[Size, ...]]]:
    """Return curve -> function of width, height and frames; sizes of the table; other sizes to check it with."""
    images, others = one_frame(IMAGES), one_frame(OTHER_IMAGES)
    curves: dict[str, tuple[Any, tuple[Size, ...], tuple[Size, ...]]] = {
        "flux/step": (flux_step, images, others),
        "flux/step+infusenet": (partial(flux_step, infusenet=True), images, others),
        f"flux/step:{FP8}": (partial(flux_step, variant=FP8), images, others),
        f"flux/step+infusenet:{FP8}": (partial(flux_step, variant=FP8, infusenet=True), images, others),
        "hunyuan/step": (hunyuan_step, images[2:5], one_frame(((1280, 768), (864, 1152), (1280, 1280)))),
        "svd/step": (svd_step, CLIPS, OTHER_CLIPS),
        "svd/step:chunked": (partial(svd_step, variant="chunked"), CLIPS, OTHER_CLIPS),
        "svd/decode": (svd_decode, CHUNKS, OTHER_CHUNKS),
        "svd/clip": (svd_clip, CLIPS[1:3], OTHER_CLIPS),
        # diffusers encodes the start image in float32 if the weights are float16.
        "svd/encode": (partial(vae_encode, model="svd", variant="float32"), images, others),
        "sdxl/step": (sdxl_step, images, others),
    }
    for model, variant in (("flux", ""), ("hunyuan", ""), ("sdxl", "float32")):
        curves[f"{model}/encode"] = partial(vae_encode, model=model, variant=variant), images, others
        curves[f"{model}/decode"] = partial(vae_decode, model=model, variant=variant), images, others
        for tile_px in TILES_PX:
            decode = partial(vae_decode, model=model, variant=variant, tile_px=tile_px)
            curves[f"{model}/decode:tile{tile_px}"] = decode, images[2:], others[2:]
    for upscaler in UPSCALERS:
        curves[f"realesrgan/{upscaler}"] = partial(upscale, upscaler=upscaler), UPSCALED, OTHER_UPSCALED
        tile = partial(upscale, upscaler=upscaler, whole=False)
        curves[f"realesrgan/{upscaler}:network"] = tile, UPSCALED[:2], OTHER_UPSCALED
    return {**curves, **open_model_traces()}


def weights() -> dict[str, int]:
    """Return network -> bytes of its weights in 16 bits."""
    sizes = {name: tensor_bytes(network(name)) for name in NETWORKS if name != "flux-schnell/transformer"}
    sizes |= {f"realesrgan/{upscaler}": tensor_bytes(network(f"realesrgan/{upscaler}")) for upscaler in UPSCALERS}
    sizes[f"flux/transformer:{FP8}"] = tensor_bytes(network("flux/transformer", FP8))
    computed_in_fp8 = (f"{model}/transformer" for model in ("qwen_edit", "wan", "wan-ti2v"))
    sizes |= {f"{name}:{FP8}": fp8_bytes(network(name)) for name in computed_in_fp8}
    sizes |= {name: tensor_bytes(network(name)) for name in RIFE_NETWORKS}
    sizes |= {f"{model}/lora": lora_bytes(f"{model}/transformer") for model in ("flux", "klein", "wan", "wan-ti2v", "ltx")}
    # Projections of a face to tokens: the published files have 84.6 and 82 million parameters, see nets/identity_networks.py.
    sizes["infusenet/resampler"] = 2 * resampler_parameters(tokens=8, output=4096)
    sizes["instantid/adapter"] = 2 * (resampler_parameters(tokens=16, output=2048) + sdxl_adapter_parameters())
    return sizes


def fp8_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of a network of 16 bits whose blocks compute in fp8, with a scale in 32 bits per row."""
    linear = [m for name, m in model.named_modules() if name.partition(".")[0] in BLOCKS and isinstance(m, torch.nn.Linear)]
    return tensor_bytes(model) - sum(m.weight.numel() - 4 * m.out_features for m in linear)


def lora_bytes(name: str) -> int:
    """Return the bytes of a LoRA of rank `LORA_RANK` on all linear layers of a network."""
    linear = [m for m in network(name).modules() if isinstance(m, torch.nn.Linear)]
    return 2 * LORA_RANK * sum(m.in_features + m.out_features for m in linear)


def resampler_parameters(*, tokens: int, output: int) -> int:
    from vidgen_ray.nets.identity_networks import FaceResampler, ResamplerSizes

    with torch.device("meta"):
        model = FaceResampler(ResamplerSizes(512, tokens, 1280, 20, 4, 5120, output))
    return sum(parameter.numel() for parameter in model.parameters())


def sdxl_adapter_parameters() -> int:
    """Return the parameters that IP-Adapter adds to SDXL's UNet: a key and a value projection per cross attention."""
    unet = network("sdxl/unet")
    modules = unet.named_modules()
    return sum(2 * m.to_k.in_features * m.to_k.out_features for name, m in modules if name.endswith("attn2"))


def make_table() -> MemoryTable:
    """Trace all curves."""
    traced: dict[str, Points] = {
        "flux/text": [(CONSTANT, flux_text())],
        "hunyuan/text": [(CONSTANT, hunyuan_text())],
        **{name: [(CONSTANT, once)] for name, once in constants().items()},
    }
    for name, (run, sizes, _) in traces().items():
        traced[name] = sorted(((size, run(*size)) for size in sizes), key=lambda point: prod(point[0]))
        points = (f"{once.peak_bytes / 2**30:.2f} GiB, {once.flop / 1e12:.3g} TFLOP" for _, once in traced[name])
        sys.stdout.write(f"{name}: {'; '.join(points)}\n")
    others = {name: [(size, run(*size)) for size in sizes] for name, (run, sizes) in work_traces().items()}
    return MemoryTable(
        versions={"torch": torch.__version__.partition("+")[0], "diffusers": diffusers.__version__},
        weights=weights(),
        curves={name: [(prod(size), once.peak_bytes) for size, once in points] for name, points in traced.items()},
        work={name: work_terms(name, points) for name, points in (traced | others).items() if has_work(name)},
    )


def has_work(curve: str) -> bool:
    """Return whether the planner computes seconds from a curve: not from those of options that only change memory."""
    return (":" not in curve or curve.endswith(":1")) and curve != "svd/clip"


Points = list[tuple[Size, Traced]]
OVER_ALL = ((0, 0), (1, 1), (2, 2))
"""Exponents of pixels and frames for attention over all tokens."""
PER_FRAME = ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1))
"""The same for attention within frames, and between the same places of all frames."""
MAX_MISFIT = 0.01
"""Largest relative difference between the operations of a traced size and of the polynomial."""
NEGLIGIBLE = 1e-5


def work_terms(name: str, points: Points) -> list[tuple[int, int, float, float]]:
    """Return the terms of the polynomials, with factors that are not negative, through the work of the traced sizes."""
    sizes = [(width * height, frames) for (width, height, frames), _ in points]
    is_clip = any(frames > 1 for _, frames in sizes)
    exponents = PER_FRAME if is_clip and (name == "svd/step" or not name.endswith("/step")) else OVER_ALL
    exponents = exponents if len(points) > 1 else exponents[:1]
    terms = np.array([[float(pixels) ** a * float(frames) ** b for a, b in exponents] for pixels, frames in sizes])
    flop, moved = (
        _fitted(terms, np.array([getattr(once, attribute) for _, once in points], dtype=float))
        for attribute in ("flop", "moved_bytes")
    )
    misfit = max(abs(terms @ flop / [max(1, once.flop) for _, once in points] - 1))
    if misfit > MAX_MISFIT and any(flop):
        raise SystemExit(f"{name}: its operations differ by {misfit:.1%} from a polynomial of pixels and frames")
    factors = zip(exponents, flop, moved, strict=True)
    return [(a, b, float(f"{own:.6g}"), float(f"{other:.6g}")) for (a, b), own, other in factors if own or other]


def _fitted(terms: Any, values: Any) -> Any:
    """Return the factors with the smallest relative differences."""
    if not all(values):
        return np.zeros(terms.shape[1])
    scale = terms.max(0)
    factors, _ = nnls(terms / scale / values[:, None], np.ones(len(values)))
    return np.where(factors > NEGLIGIBLE * max(values), factors, 0) / scale


def table_json(table: MemoryTable) -> str:
    """Return the table as JSON, one network or curve per line."""

    def block(values: Mapping[str, object]) -> str:
        return "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in values.items()) + "\n }"

    about = "GPU memory in bytes and work of the published models. Written by benchmarks/trace_memory.py; do not edit."
    parts = {"versions": table.versions, "weights": table.weights, "curves": table.curves, "work": table.work}
    blocks = [f' "about": {json.dumps(about)}', *(f' "{name}": {block(values)}' for name, values in parts.items())]
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def differences(
    table: MemoryTable, names: Iterable[str] | None = None, max_sizes: int | None = None
) -> Iterator[tuple[str, Size, float, int]]:
    """Yield curve, size, planned and traced bytes for sizes that are not in the table, at most `max_sizes` of each curve."""
    every: Mapping[str, Any] = traces()
    for name in every if names is None else names:
        run, _, sizes = every[name]
        for width, height, frames in sizes[:max_sizes]:
            traced = run(width, height, frames).peak_bytes
            yield name, (width, height, frames), table.curve(name, width * height * frames), traced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the table with other sizes")
    if not parser.parse_args().check:
        Path(TABLE_FILE).write_text(table_json(make_table()))
        return
    worst = 0.0
    for name, (width, height, frames), planned, traced in differences(load_table()):
        difference = planned / traced - 1
        worst = max(worst, abs(difference))
        gib = f"{planned / 2**30:7.2f} {traced / 2**30:7.2f}"
        sys.stdout.write(f"{name:32} {width}x{height}x{frames:<4} {gib} {difference:+.1%}\n")
    if worst > TOLERANCE:
        raise SystemExit(f"the table differs by up to {worst:.0%}; trace it again")


if __name__ == "__main__":
    main()
