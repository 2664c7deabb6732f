"""Operations of the plan, recomputed: of transformers by formulas, of convolutional networks layer by layer."""

import random

import pytest
import torch

from vidgen_ray.bench.published_models import build_network
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.shot import Shot
from vidgen_ray.stages.memory_table import network_work

SHAPES = 40
TOLERANCE = 0.03
IMAGES = tuple((64 * w, 64 * h) for w in range(6, 33) for h in range(6, 33))
T5 = 2 * 512 * 4.7e9
"""4.7 billion parameters and 512 tokens."""


def attention(queries, keys, width):
    return 4 * queries * keys * width


def flux(pixels, *, double=19, single=38, text=512):
    width, tokens = 3072, pixels // 256
    length = tokens + text
    blocks = 2 * 12 * width**2 * length * (double + single) + attention(length, length, width) * (double + single)
    modulations = 2 * width**2 * (12 * double + 3 * single)
    return blocks + modulations + 2 * (tokens * 128 * width + text * 4096 * width)


def infusenet(pixels):
    zero_layers = 2 * 3072**2 * pixels // 256 * 14
    return flux(pixels, double=4, single=10, text=8) + zero_layers


def klein(pixels):
    width, blocks, tokens, text = 3072, 25, pixels // 256, 512
    length = tokens + text
    # Gated: two projections up to three times the width, one down.
    linear = length * (4 + 9) * width**2
    return blocks * (2 * linear + attention(length, length, width)) + 2 * (tokens * 2 * 128 + text * 7680) * width


def qwen(pixels):
    width, blocks, length = 3072, 60, pixels // 256 + 400
    return blocks * (2 * 12 * width**2 * length + attention(length, length, width))


def cross_attending(tokens, text, width, hidden):
    """A block with attention over the tokens, attention from them to the text, and two linear layers."""
    linear = tokens * (6 * width**2 + 2 * width * hidden) + text * 2 * width**2
    return 2 * linear + attention(tokens, tokens, width) + attention(tokens, text, width)


def wan(pixels, frames):
    text = 2 * 512 * (4096 * 5120 + 5120**2)
    return 40 * cross_attending(pixels // 256 * frames, 512, 5120, 13824) + text


def timestep_per_token(tokens, width):
    return 2 * tokens * (256 * width + 7 * width**2)


def wan_ti2v(pixels, frames):
    tokens = pixels // 1024 * frames
    return 30 * cross_attending(tokens, 512, 3072, 14336) + timestep_per_token(tokens, 3072)


def ltx(pixels, frames):
    tokens = pixels // 1024 * frames
    return 2 * (28 * cross_attending(tokens, 128, 2048, 4 * 2048) + timestep_per_token(tokens, 2048))


def hunyuan(pixels):
    width, tokens = 1408, pixels // 256
    # Skips over the middle join two widths.
    skips = 2 * 19 * tokens * 2 * width**2
    return 2 * (40 * cross_attending(tokens, 77 + 256, width, 6144) + skips)


def realesrgan(pixels, blocks=23):
    dense = sum(9 * (64 + 32 * n) * 32 for n in range(4)) + 9 * (64 + 32 * 4) * 64
    trunk = 9 * 3 * 64 + 9 * 64 * 64 + 3 * blocks * dense
    upsampled = 4 * 9 * 64 * 64 + 16 * (2 * 9 * 64 * 64 + 9 * 64 * 3)
    return 2 * pixels * (trunk + upsampled)


def autoencoder(pixels, channels, *, decode):
    """AutoencoderKL with 128, 256, 512 and 512 channels, eight times fewer pixels at the deepest level."""
    levels = (512, 512, 256, 128) if decode else (128, 256, 512, 512)
    sides, layers = ((8, 4, 2, 1), 3) if decode else ((1, 2, 4, 8), 2)
    total, before = 0.0, levels[0]
    for number, (width, side) in enumerate(zip(levels, sides, strict=True)):
        for layer in range(layers):
            own = before if layer == 0 else width
            total += 2 * pixels / side**2 * (9 * (own * width + width**2) + (own != width) * own * width)
        if number < 3:
            total += 2 * pixels / (side // 2 if decode else 2 * side) ** 2 * 9 * width**2
        before = width
    deep = pixels / 64
    middle = 2 * deep * (4 * 9 + 4) * 512**2 + attention(deep, deep, 512)
    outer = 2 * pixels * 9 * 3 * 128 + 2 * deep * 9 * 512 * (channels if decode else 2 * channels)
    return total + middle + outer


def random_sizes(seed, frames=(1,)):
    """Yield width, height and frames."""
    rng = random.Random(seed)
    for _ in range(SHAPES):
        yield *rng.choice(IMAGES), rng.choice(frames)


def flux_stage(shot):
    pixels = shot.width * shot.height
    steps = 28 * (flux(pixels) + (infusenet(pixels) if shot.face_image else 0))
    coded = autoencoder(pixels, 16, decode=True) + (autoencoder(pixels, 16, decode=False) if shot.face_image else 0)
    return T5 + steps + coded


def lora_stage(shot):
    pixels = shot.width * shot.height
    return 28 * 0.6 * flux(pixels) + autoencoder(pixels, 16, decode=True) + autoencoder(pixels, 16, decode=False)


def klein_stage(shot):
    pixels, photos = shot.width * shot.height, len(shot.face_image)
    coded = autoencoder(pixels, 32, decode=True) + photos * autoencoder(1024**2, 32, decode=False)
    return 4.273e12 + 4 * klein(pixels + photos * 1024**2) + coded


PHOTO = {"face_image": ("a.png",)}
STAGES = {
    "flux": ("flux", {}, flux_stage),
    "flux with a face": ("flux", {**PHOTO, "identity": "infusenet"}, flux_stage),
    "lora": ("lora", {"lora": "l.safetensors"}, lora_stage),
    "klein": ("klein", {"image_model": "klein"}, klein_stage),
    "klein with a photo": ("klein", {"image_model": "klein", **PHOTO, "identity": "reference"}, klein_stage),
    "realesrgan": ("realesrgan", {"upscaler": "x4plus"}, lambda shot: 25 * realesrgan(shot.width * shot.height)),
}


@pytest.mark.parametrize("name", STAGES)
def test_operations_of_a_stage_are_those_of_its_architecture(name):
    stage_name, fields, counted = STAGES[name]
    stage = STAGE_BY_NAME[stage_name]
    for width, height, _ in random_sizes(name):
        shot = Shot.model_validate({"prompt": "a", "width": width, "height": height, **fields})
        work = stage.work(stage.Params(weights="w"), shot)
        assert work.total.flop == pytest.approx(counted(shot), rel=TOLERANCE), (width, height)


STEPS = {
    "qwen_edit/step": lambda pixels, frames: qwen(pixels),
    "hunyuan/step": lambda pixels, frames: hunyuan(pixels),
    "wan/step": wan,
    "wan-ti2v/step": wan_ti2v,
    "ltx/step": ltx,
}


@pytest.mark.parametrize("name", STEPS)
def test_operations_of_a_step_are_those_of_its_architecture(name):
    frames = (2, 7, 13, 21) if name.startswith(("wan", "ltx")) else (1,)
    for width, height, n in random_sizes(name, frames):
        planned = network_work(name, width * height, n).flop
        assert planned == pytest.approx(STEPS[name](width * height, n), rel=TOLERANCE), (width, height, n)


WAN_CALLS = {"wan/step": 4, "wan/decode": 1, "wan/encode": 1, "wan/text": 1}


@pytest.mark.parametrize(
    ("stage", "fields", "terms"),
    [
        ("svd", {"steps": {"svd": 30}}, {"svd/step": 30, "svd/decode": 1, "svd/encode": 1}),
        (
            "wan",
            {"steps": {"wan": 4}, "guidance": {"wan": 1}},
            WAN_CALLS,
        ),
        ("wan", {"extend": 1}, {"wan/step": 160, "wan/decode": 2, "wan/encode": 2, "wan/text": 4}),
        ("ltx", {"guidance": {"ltx": 1}}, {"ltx/step": 25, "ltx/decode": 1, "ltx/encode": 1, "ltx/text": 1}),
        ("hunyuan", {"style_strength": 0.4}, {"hunyuan/step": 12, "hunyuan/decode": 1, "hunyuan/encode": 1, "hunyuan/text": 2}),
    ],
)
def test_work_of_a_stage_is_that_of_its_calls(stage, fields, terms):
    stage_class, frames = STAGE_BY_NAME[stage], 49
    shot = Shot(prompt="a", width=1280, height=704, num_frames=frames, **fields)
    pixels = 1280 * 768 if stage == "hunyuan" else 1280 * 704
    latent = {"wan": 13, "ltx": 7}.get(stage, frames)

    def flop(name):
        if name in ("svd/encode", "ltx/encode") or stage == "hunyuan":
            return network_work(name, pixels).flop
        return network_work(name, pixels, latent if name.endswith("step") else frames).flop

    work = stage_class.work(stage_class.Params(weights="w"), shot)
    assert work.total.flop == pytest.approx(sum(times * flop(name) for name, times in terms.items()))


class LayerCounter:
    """Counts the operations of linear layers and convolutions from the shapes of their outputs, and those of attention."""

    def __init__(self, network, monkeypatch):
        self.flop = 0.0
        for module in network.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d):
                module.register_forward_hook(self._layer)
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", self._attention)

    def _layer(self, module, _inputs, output):
        self.flop += 2 * output.numel() * module.weight[0].numel()

    def _attention(self, query, key, value, **_):
        self.flop += 4 * query.numel() * key.shape[-2]
        return torch.empty_like(query)


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def svd_step(network, width, height, frames):
    network(
        meta(2, frames, 8, height // 8, width // 8),
        meta(1, dtype=torch.float32),
        encoder_hidden_states=meta(2, 1, 1024),
        added_time_ids=meta(2, 3),
    )


NETS = {
    "svd/step": ("svd/unet", svd_step, (14, 25, 50)),
    "svd/decode": (
        "svd/vae",
        lambda vae, w, h, n: vae.decode(meta(n, 4, h // 8, w // 8), num_frames=n),
        (1, 2, 5, 8),
    ),
    "wan/encode": ("wan/vae", lambda vae, w, h, n: vae.encode(meta(1, 3, n, h, w)), (1, 5, 25, 49)),
    "wan/decode": ("wan/vae", lambda vae, w, h, n: vae.decode(meta(1, 16, (n + 3) // 4, h // 8, w // 8)), (1, 5, 25, 49)),
    "wan-ti2v/decode": (
        "wan-ti2v/vae",
        lambda vae, w, h, n: vae.decode(meta(1, 48, (n + 3) // 4, h // 16, w // 16)),
        (1, 5, 25),
    ),
    "ltx/decode": ("ltx/vae", lambda vae, w, h, n: vae.decode(meta(1, 128, (n + 7) // 8, h // 32, w // 32)), (9, 25, 65)),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("svd/decode", "ltx/decode") else pytest.mark.very_slow)
        for name in NETS
    ],
)
def test_operations_of_convolutional_networks_are_those_of_their_layers(name, monkeypatch):
    network_name, call, frames = NETS[name]
    network = build_network(network_name, torch.bfloat16)
    counter = LayerCounter(network, monkeypatch)
    for width, height, n in random_sizes(name, frames):
        counter.flop = 0.0
        with torch.no_grad():
            call(network, width, height, n)
        assert network_work(name, width * height, n).flop == pytest.approx(counter.flop, rel=TOLERANCE), (width, height, n)
