"""Builders of the weights `builtin:tiny/...`, found by `vidgen_ray.weights` through the entry point group `vidgen.weights`.

Those of the face and identity models are here, the others in `tiny_networks`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from diffusers import (
    ControlNetModel,
    EulerDiscreteScheduler,
    FluxControlNetModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
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

STRIDES = (8, 16, 32)
ANCHORS = 2
"""Anchors per cell. Only the first one produces detections."""
BOX_HALF = 1.6
"""Half the side of a box, in strides."""
POINTS = ((-0.55, -0.45), (0.55, -0.45), (0.0, 0.1), (-0.45, 0.65), (0.45, 0.65))
"""Eyes, nose and corners of the mouth, in strides from the centre of the box."""
EMBEDDING = 512
OPSET, IR_VERSION = 17, 9
IR_SE50_WIDTHS = (4, 6, 8, 12)
"""Increasing, so that both kinds of shortcut occur in the same places as in the real network."""


def build_antelopev2(folder: Path) -> None:
    """Write `scrfd_10g_bnkps.onnx` and `glintr100.onnx`, as in antelopev2."""
    onnx.save(_detector(), folder / "scrfd_10g_bnkps.onnx")
    onnx.save(_recogniser(), folder / "glintr100.onnx")


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


class _Graph:
    """ONNX graph builder. `constant` and `node` return the name of their output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, value: NDArray[np.generic]) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def node(self, kind: str, *inputs: str, output: str | None = None, **attributes: object) -> str:
        output = output or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [output], **attributes))
        return output

    def model(self, name: str, image_shape: list[object], outputs: list[onnx.ValueInfoProto]) -> onnx.ModelProto:
        image = helper.make_tensor_value_info("input.1", TensorProto.FLOAT, image_shape)
        graph = helper.make_graph(self.nodes, name, [image], outputs, self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)


def _detector() -> onnx.ModelProto:
    """Return a model with SCRFD's interface.

    The input is (RGB - 127.5) / 128. The outputs are scores (N, 1), boxes (N, 4) and points (N, 10) for each of the strides 8,
    16 and 32. N is cells times anchors. Boxes and points are in strides from the corner of the cell.
    """
    graph = _Graph()
    outputs: dict[str, list[onnx.ValueInfoProto]] = {"score": [], "bbox": [], "kps": []}
    box = np.array([BOX_HALF - 0.5, BOX_HALF - 0.5, BOX_HALF + 0.5, BOX_HALF + 0.5], np.float32)
    points = (np.array(POINTS) + 0.5).ravel().astype(np.float32)
    for stride in STRIDES:
        cells = graph.node("AveragePool", "input.1", kernel_shape=[stride, stride], strides=[stride, stride])
        zeros = graph.constant(np.zeros((ANCHORS, 3, 1, 1), "f4"))
        score = _skin_peaks(graph, cells) if stride == STRIDES[-1] else graph.node("Conv", cells, zeros)
        for kind, value, width in (
            ("score", score, 1),
            ("bbox", _same_in_every_cell(graph, cells, box), 4),
            ("kps", _same_in_every_cell(graph, cells, points), 10),
        ):
            rows = graph.node("Transpose", value, perm=[0, 2, 3, 1])
            name = graph.node("Reshape", rows, graph.constant(np.array([-1, width], "i8")), output=f"{kind}_{stride}")
            outputs[kind].append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"n{stride}", width]))
    return graph.model("tiny_scrfd", [1, 3, "h", "w"], [o for kind in outputs.values() for o in kind])


def _skin_peaks(graph: _Graph, cells: str) -> str:
    """Return scores (1, 2, H, W), nonzero at local peaks of the blurred map of skin colour (warm, unsaturated, not dark)."""
    warmth = graph.node("Conv", cells, graph.constant(np.array([1, 0, -1], "f4").reshape(1, 3, 1, 1)))
    off_skin = graph.node("Abs", graph.node("Sub", warmth, graph.constant(np.array(0.55, "f4"))))
    dark = graph.node("Relu", graph.node("Conv", cells, graph.constant(np.array([0, -2, 0], "f4").reshape(1, 3, 1, 1))))
    likeness = graph.node("Sub", graph.constant(np.array(0.3, "f4")), graph.node("Add", off_skin, dark))
    skin = graph.node("Sigmoid", graph.node("Mul", likeness, graph.constant(np.array(25.0, "f4"))))
    y, x = np.mgrid[-2:3, -2:3]
    kernel = np.exp(-(x**2 + y**2) / 4.0).astype("f4").reshape(1, 1, 5, 5)
    blurred = graph.node("Conv", skin, graph.constant(kernel), pads=[2, 2, 2, 2])
    highest = graph.node("MaxPool", blurred, kernel_shape=[5, 5], pads=[2, 2, 2, 2])
    is_peak = graph.node("Cast", graph.node("Equal", blurred, highest), to=TensorProto.FLOAT)
    # A thin edge between two colours may have the colour of skin, too. A face fills its neighbourhood.
    excess = graph.node("Sub", blurred, graph.constant(np.array(4.5, "f4")))
    score = graph.node("Sigmoid", graph.node("Mul", excess, graph.constant(np.array(4.0, "f4"))))
    peaks = graph.node("Mul", score, is_peak)
    second_anchor = graph.node("Mul", peaks, graph.constant(np.array(0.0, "f4")))
    return graph.node("Concat", peaks, second_anchor, axis=1)


def _same_in_every_cell(graph: _Graph, cells: str, values: NDArray[np.float32]) -> str:
    """Return the same values for all cells and anchors."""
    bias = np.tile(values, ANCHORS)
    weights = graph.constant(np.zeros((len(bias), 3, 1, 1), "f4"))
    return graph.node("Conv", cells, weights, graph.constant(bias))


def _recogniser() -> onnx.ModelProto:
    """Return a model with ArcFace's interface: faces (B, 3, 112, 112) as (RGB - 127.5) / 127.5 -> embeddings (B, 512)."""
    graph = _Graph()
    inputs = 3 * (112 // 8) ** 2
    projection = np.random.default_rng(0).standard_normal((inputs, EMBEDDING)) / inputs**0.5
    pooled = graph.node("AveragePool", "input.1", kernel_shape=[8, 8], strides=[8, 8])
    graph.node("MatMul", graph.node("Flatten", pooled), graph.constant(projection.astype("f4")), output="683")
    outputs = [helper.make_tensor_value_info("683", TensorProto.FLOAT, ["b", EMBEDDING])]
    return graph.model("tiny_arcface", ["b", 3, 112, 112], outputs)


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
        cross_attention_dim=2 * TEXT_CHANNELS,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_CHANNELS,
        projection_class_embeddings_input_dim=TEXT_CHANNELS + 6 * TIME_CHANNELS,
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
