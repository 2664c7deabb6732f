"""Builders of the weights `builtin:tiny/...`, found by `vidgen_ray.weights` through the entry point group `vidgen.weights`.

Those of the identity models are here, the faces' in `tiny_faces`, the others in `tiny_networks`.
"""

from collections.abc import Callable, Mapping
from functools import partial
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
from transformers import CLIPTextModelWithProjection

from vidgen_ray.bench import tiny_networks
from vidgen_ray.bench.tiny_networks import (
    WAN_CHANNELS,
    WAN_INPUTS,
    autoencoder,
    clip_text_encoder,
    clip_tokenizer,
    flux_transformer,
    klein_transformer,
    ltx_transformer,
    wan_transformer,
    write_random_lora,
)
from vidgen_ray.nets.identity_networks import (
    EMBEDDING_SIZE,
    NET_FOLDER,
    PROJECTION,
    PROJECTION_FILE,
    FaceResampler,
    ResamplerSizes,
)
from vidgen_ray.nets.ir_se50 import IRSE50
from vidgen_ray.nets.weight_files import silence_libraries

IR_SE50_WIDTHS = (4, 6, 8, 12)
"""Increasing, so that both kinds of shortcut occur in the same places as in the real network."""


def build_antelopev2(folder: Path) -> None:
    """Write the models of faces. Only they need onnx."""
    from vidgen_ray.bench.tiny_faces import build_face_models

    build_face_models(folder)


def build_ir_se50(file: Path) -> None:
    """Write an IR-SE50 in the layout of `recognition_arcface_ir_se50.pth`, 1.4 MB."""
    random = torch.Generator().manual_seed(0)
    network = IRSE50(IR_SE50_WIDTHS)
    for name, weights in network.named_parameters():
        # The other parameters are scales and shifts, initialised to ones and zeros.
        if weights.ndim > 1:
            weights.data.normal_(0, (2 / weights[0].numel()) ** 0.5, generator=random)
        elif name.endswith("bias"):
            weights.data.zero_()
    torch.save(network.state_dict(), file)


silence_libraries()

TOKEN_CHANNELS = 32
"""Channels of the tiny FLUX's text tokens. The real T5 has 4096."""
_TEXT_CHANNELS = 32
"""Channels of each of the tiny SDXL's two text encoders. Its UNet attends to both, concatenated."""
TIME_CHANNELS = 8
"""Channels of the embedding of each of SDXL's six size and crop conditions."""


def build_infusenet(folder: Path) -> None:
    """Write InfuseNet for `tiny/flux` and `tiny/flux-schnell`: 1 double and 2 single blocks, guidance embedding, 8 tokens."""
    torch.manual_seed(5)
    net = FluxControlNetModel(
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
        text_encoder_2=clip_text_encoder(tokenizer, CLIPTextModelWithProjection),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
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
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        # With the real 32 groups, each group is a single channel, and the time embedding is normalised away.
        norm_num_groups=4,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=2 * _TEXT_CHANNELS,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_CHANNELS,
        projection_class_embeddings_input_dim=_TEXT_CHANNELS + 6 * TIME_CHANNELS,
    ).eval()


BUILDERS: Mapping[str, Callable[[Path], None]] = {
    "flux": tiny_networks.build_flux,
    "flux-schnell": partial(tiny_networks.build_flux, guidance=False),
    "lora.safetensors": lambda file: write_random_lora(flux_transformer(guidance=True), file, seed=4),
    "hunyuandit": tiny_networks.build_hunyuandit,
    "klein": tiny_networks.build_klein,
    "klein-lora.safetensors": lambda file: write_random_lora(klein_transformer(), file, seed=21),
    "qwen-edit": tiny_networks.build_qwen_edit,
    "svd": tiny_networks.build_svd,
    "wan": tiny_networks.build_wan,
    "wan-ti2v": tiny_networks.build_wan_ti2v,
    "wan-lora.safetensors": lambda file: write_random_lora(wan_transformer(WAN_INPUTS, WAN_CHANNELS, 6), file, seed=12),
    "ltx": tiny_networks.build_ltx,
    "ltx-distilled": partial(tiny_networks.build_ltx, timestep_conditioning=True),
    "ltx-lora.safetensors": lambda file: write_random_lora(ltx_transformer(), file, seed=12),
    "antelopev2": build_antelopev2,
    "ir_se50.pth": build_ir_se50,
    "infusenet": build_infusenet,
    "sdxl": build_sdxl,
    "instantid-sdxl": build_instantid_sdxl,
}
"""Name after `tiny/` -> function that writes the file, or into the folder if the name has no suffix."""
