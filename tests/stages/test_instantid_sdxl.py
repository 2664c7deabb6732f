"""InstantID on SDXL with random weights in the published layout: projection, parity and load errors.

Parity is bitwise in fp32: the same kernels run in the same order, on tensors of the same shapes.
"""

import shutil
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from tests.stages.test_parity import as_uint8, generator, loaded, plain
from vidgen_ray.errors import SetupError, StageError
from vidgen_ray.nets.identity_networks import FaceResampler, ResamplerSizes
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.identity import pose_image
from vidgen_ray.stages.instantid_sdxl import InstantIDSDXLStage
from vidgen_ray.weights import resolve

INSTANTID = resolve("builtin:tiny/instantid-sdxl")
CALL = {"width": 128, "height": 64, "num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "np"}


@pytest.fixture(autouse=True)
def _inference_mode():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def stage(tiny):
    return loaded(InstantIDSDXLStage, tiny, steps=3)


@pytest.fixture
def embeddings(face):
    """Embeddings (2, 512) for classifier-free guidance."""
    return torch.from_numpy(np.stack([np.zeros(512, np.float32), face.embedding("antelopev2")]))


def generate(stage, shot, face):
    return stage(Item(shot, {"face": face}))["image"]


def test_face_tokens_match_those_of_diffusers(stage, embeddings):
    (projection,) = stage.pipe.unet.encoder_hid_proj.image_projection_layers
    expected = projection(embeddings[:, None])
    assert expected.shape == (2, 16, 64)
    torch.testing.assert_close(stage.resampler(embeddings), expected, atol=5e-6, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 0.1


class ControlNetWithFace(diffusers.ControlNetModel):
    """A second, minimal implementation of IdentityNet."""

    def forward(self, sample, timestep, encoder_hidden_states, controlnet_cond, **kwargs):
        return super().forward(sample, timestep, self.face, controlnet_cond, **kwargs)


def test_instantid_sdxl_equals_diffusers(stage, make_shot, face, embeddings):
    shot = make_shot(negative_prompt="blurred", identity_strength=0.5)
    net = ControlNetWithFace.from_pretrained(INSTANTID / "ControlNetModel")
    pipe = diffusers.StableDiffusionXLControlNetPipeline.from_pretrained(
        resolve("builtin:tiny/sdxl"), controlnet=net, add_watermarker=False
    )
    pipe.load_ip_adapter(str(INSTANTID), subfolder="", weight_name="ip-adapter.bin", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.8 * 0.5)
    pipe.set_progress_bar_config(disable=True)
    (projection,) = pipe.unet.encoder_hid_proj.image_projection_layers
    net.face = projection(embeddings[:, None])
    expected = pipe(
        shot.prompt,
        negative_prompt="blurred",
        image=PILImage.fromarray(pose_image(face, shot)),
        ip_adapter_image_embeds=[embeddings[:, None, None]],
        controlnet_conditioning_scale=0.8 * 0.5,
        generator=generator(shot, "instantid_sdxl"),
        **CALL,
    ).images[0]
    assert np.array_equal(generate(stage, shot, face), as_uint8(expected))


def test_identity_strength_0_equals_plain_sdxl(stage, make_shot, face):
    shot = make_shot(identity_strength=0.0)
    pipe = plain(diffusers.StableDiffusionXLPipeline, "tiny/sdxl")
    expected = pipe(shot.prompt, generator=generator(shot, "instantid_sdxl"), **CALL).images[0]
    assert np.array_equal(generate(stage, shot, face), as_uint8(expected))


def test_wrong_embedding_is_rejected(stage, make_shot, face):
    for name, values, message in (
        ("ir_se50", face.embedding("ir_se50"), "got embeddings by ir_se50, antelopev2 is needed"),
        ("antelopev2", np.ones(256, np.float32), r"got an embedding of shape \(256,\), instantid_sdxl takes 512 numbers"),
    ):
        with pytest.raises(StageError, match=message):
            generate(stage, make_shot(), replace(face, embeddings={name: values}))


def rewrite_adapter(folder, change):
    content = torch.load(folder / "ip-adapter.bin", weights_only=True)
    change(content)
    torch.save(content, folder / "ip-adapter.bin")


def replace_resampler(folder):
    sizes = ResamplerSizes(512, tokens=16, channels=32, heads=2, depth=4, hidden=128, output=48)
    rewrite_adapter(folder, lambda c: c.update(image_proj=FaceResampler(sizes).state_dict()))


def replace_net(folder):
    config = {**diffusers.ControlNetModel.load_config(folder / "ControlNetModel"), "cross_attention_dim": 48}
    diffusers.ControlNetModel.from_config(config).save_pretrained(folder / "ControlNetModel")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: rewrite_adapter(f, lambda c: c["ip_adapter"].popitem()), "ip_adapter does not fit the UNet of .*: "),
        (replace_resampler, "returns tokens of 48 numbers, the UNet of .* takes 64; use SDXL base"),
        (replace_net, "cross_attention_dim is 48, the profile's SDXL weights have 64; use weights trained for"),
    ],
    ids=("adapter", "resampler", "net"),
)
def test_wrong_instantid_folder_raises_setup_error(tiny, tmp_path, damage, message):
    copy = shutil.copytree(INSTANTID, tmp_path / "copy")
    damage(copy)
    with pytest.raises(SetupError, match=f"(?s){message}"):
        loaded(InstantIDSDXLStage, tiny, extra_weights={"instantid": copy})
