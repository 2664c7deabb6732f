"""InstantID on SDXL with random weights in the published layout: projection, identity tokens, parity and load errors."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from tests.stages.published_resampler import layout, published_tokens
from vidgen_ray.errors import SetupError, StageError
from vidgen_ray.nets.identity_networks import FaceResampler, ResamplerSizes
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import FaceFeatures, Image, Item, noise_generator
from vidgen_ray.stages.identity import pose_image
from vidgen_ray.stages.instantid_sdxl import InstantIDSDXLParams, InstantIDSDXLStage
from vidgen_ray.weights import resolve

BASE, INSTANTID = (resolve(f"builtin:tiny/{name}") for name in ("sdxl", "instantid-sdxl"))
STEPS = 3
KEYPOINTS = np.array([[55, 20], [75, 22], [66, 32], [58, 42], [73, 43]], np.float32)
"""Keypoints in a photo of the shot's size."""


@pytest.fixture(autouse=True)
def _inference_mode() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def stage() -> InstantIDSDXLStage:
    return loaded(BASE, INSTANTID)


def loaded(base: Path, instantid: Path, **options: Any) -> InstantIDSDXLStage:
    stage = InstantIDSDXLStage(
        InstantIDSDXLParams(weights=base, extra_weights={"instantid": instantid}, steps=STEPS, **options)
    )
    stage.load()
    return stage


def embedding(seed: int) -> np.ndarray:
    """Return a random embedding like those of glintr100: not normalised, with a length of about 20."""
    return np.random.default_rng(seed).standard_normal(512).astype(np.float32)


def face(seed: int, keypoints: np.ndarray = KEYPOINTS) -> FaceFeatures:
    return features({"antelopev2": embedding(seed)}, keypoints)


def features(embeddings: dict[str, np.ndarray], keypoints: np.ndarray = KEYPOINTS) -> FaceFeatures:
    return FaceFeatures(embeddings, keypoints, (40, 5, 90, 60), 0.9, 1, (128, 64), "")


def generate(stage: InstantIDSDXLStage, shot: Shot, face: FaceFeatures) -> Image:
    return stage(Item(shot, {"face": face}))["image"]


def test_face_tokens_match_the_published_formula_and_diffusers(stage):
    weights = torch.load(INSTANTID / "ip-adapter.bin", weights_only=True)["image_proj"]
    faces = torch.from_numpy(np.stack([np.zeros(512, np.float32), embedding(1)]))
    (projection,) = stage.pipe.unet.encoder_hid_proj.image_projection_layers
    expected = published_tokens(weights, faces)
    assert expected.shape == (2, 16, 64)
    for tokens in (stage.resampler(faces), projection(faces[:, None])):
        torch.testing.assert_close(tokens, expected, atol=5e-6, rtol=0)
    assert (expected[0] - expected[1]).abs().max() > 0.1


def test_identitynet_uses_identity_tokens_instead_of_the_prompt(stage):
    generator = torch.Generator().manual_seed(3)
    conditions = {
        "controlnet_cond": torch.rand(2, 3, 64, 128, generator=generator),
        "added_cond_kwargs": {"text_embeds": torch.ones(2, 32), "time_ids": torch.ones(2, 6)},
        "return_dict": False,
    }
    sample, net = torch.randn(2, 4, 8, 16, generator=generator), stage.pipe.controlnet
    plain = diffusers.ControlNetModel.from_pretrained(INSTANTID / "ControlNetModel")
    outputs = []
    for seed in (1, 2):
        tokens = stage.resampler(torch.from_numpy(np.stack([np.zeros(512, np.float32), embedding(seed)])))
        with net.identity(tokens):
            down, middle = net(sample, 500, encoder_hidden_states=torch.ones(2, 77, 64), **conditions)
        expected_down, expected_middle = plain(sample, 500, encoder_hidden_states=tokens, **conditions)
        assert all(torch.equal(a, b) for a, b in zip(down, expected_down, strict=True))
        assert torch.equal(middle, expected_middle)
        outputs.append(middle)
    assert torch.equal(outputs[0][0], outputs[1][0]), "the unconditional row depends on the face"
    assert (outputs[0][1] - outputs[1][1]).abs().max() > 1e-3
    with pytest.raises(RuntimeError, match="IdentityNet was called without identity tokens"):
        net(sample, 500, encoder_hidden_states=torch.ones(2, 77, 64), **conditions)


class ControlNetWithFace(diffusers.ControlNetModel):
    """A second, minimal implementation of IdentityNet."""

    face: torch.Tensor

    def forward(self, sample, timestep, encoder_hidden_states, controlnet_cond, **kwargs):
        return super().forward(sample, timestep, self.face, controlnet_cond, **kwargs)


@pytest.mark.parametrize(("negative", "strength"), [(None, 1.0), ("blurred", 0.5)])
def test_instantid_sdxl_equals_diffusers(stage, make_shot, negative, strength):
    shot = make_shot(negative_prompt=negative, identity_strength=strength)
    net = ControlNetWithFace.from_pretrained(INSTANTID / "ControlNetModel")
    pipe = diffusers.StableDiffusionXLControlNetPipeline.from_pretrained(BASE, controlnet=net, add_watermarker=False)
    pipe.load_ip_adapter(str(INSTANTID), subfolder="", weight_name="ip-adapter.bin", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.8 * strength)
    pipe.set_progress_bar_config(disable=True)
    faces = torch.from_numpy(np.stack([np.zeros(512, np.float32), embedding(1)]))[:, None]
    (projection,) = pipe.unet.encoder_hid_proj.image_projection_layers
    net.face = projection(faces)
    expected = pipe(
        shot.prompt,
        negative_prompt=negative,
        width=128,
        height=64,
        image=PILImage.fromarray(pose_image(face(1), shot)),
        ip_adapter_image_embeds=[faces[:, None]],
        controlnet_conditioning_scale=0.8 * strength,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        generator=noise_generator(shot.derived_seed("instantid_sdxl")),
        output_type="np",
    ).images[0]
    image = generate(stage, shot, face(1))
    assert image.shape == (64, 128, 3)
    assert np.array_equal(image, (expected * 255).round().astype(np.uint8))


def test_identity_strength_0_equals_plain_sdxl(stage, make_shot):
    shot = make_shot(identity_strength=0.0)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(BASE, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        shot.prompt,
        width=128,
        height=64,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
        generator=noise_generator(shot.derived_seed("instantid_sdxl")),
        output_type="np",
    ).images[0]
    assert np.array_equal(generate(stage, shot, face(1)), (expected * 255).round().astype(np.uint8))


def test_wrong_embedding_is_rejected(stage, make_shot):
    with pytest.raises(StageError, match="got embeddings by ir_se50, antelopev2 is needed"):
        generate(stage, make_shot(), features({"ir_se50": embedding(1)}))
    with pytest.raises(StageError, match=r"got an embedding of shape \(256,\), instantid_sdxl takes 512 numbers"):
        generate(stage, make_shot(), features({"antelopev2": embedding(1)[:256]}))


def test_resampler_has_the_published_layout():
    with torch.device("meta"):
        resampler = FaceResampler(ResamplerSizes(512, tokens=16, channels=1280, heads=20, depth=4, hidden=5120, output=2048))
    assert layout(resampler) == "94cb1b05231026f7"


def rewrite_adapter(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(folder / "ip-adapter.bin", weights_only=True)
    change(content)
    torch.save(content, folder / "ip-adapter.bin")


def replace_resampler(folder: Path) -> None:
    sizes = ResamplerSizes(512, tokens=16, channels=32, heads=2, depth=4, hidden=128, output=48)
    rewrite_adapter(folder, lambda c: c.update(image_proj=FaceResampler(sizes).state_dict()))


def replace_net(folder: Path) -> None:
    config = {**diffusers.ControlNetModel.load_config(folder / "ControlNetModel"), "cross_attention_dim": 48}
    diffusers.ControlNetModel.from_config(config).save_pretrained(folder / "ControlNetModel")


PROBLEMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "incomplete adapter": (
        lambda f: rewrite_adapter(f, lambda c: c.pop("ip_adapter")),
        "got a dict of image_proj, must have the weights 'ip_adapter'",
    ),
    "adapter of another UNet": (
        lambda f: rewrite_adapter(f, lambda c: c["ip_adapter"].popitem()),
        "ip_adapter does not fit the UNet of .*: ",
    ),
    "wrong token size": (replace_resampler, "returns tokens of 48 numbers, the UNet of .* takes 64; use SDXL base"),
    "wrong net": (replace_net, "cross_attention_dim is 48, the profile's SDXL weights have 64; use weights trained for"),
}


def test_wrong_instantid_folder_raises_setup_error(tmp_path):
    for number, (damage, message) in enumerate(PROBLEMS.values()):
        copy = tmp_path / str(number)
        shutil.copytree(INSTANTID, copy)
        damage(copy)
        with pytest.raises(SetupError, match=f"(?s){message}"):
            loaded(BASE, copy)
