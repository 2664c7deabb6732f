"""FLUX.2 klein and Qwen-Image-Edit: photos, LoRAs, and parity with plain diffusers calls.

Parity is bitwise in fp32: the same kernels run in the same order, on tensors of the same shapes.
"""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from tests.stages.test_parity import as_uint8, generator, gradient_image, loaded, plain
from vidgen_ray.content_keys import ShotPlanner, params_of
from vidgen_ray.graph import STAGES
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.flux2_klein import Flux2KleinStage
from vidgen_ray.stages.loading import set_vae_tiles
from vidgen_ray.stages.qwen_edit import QwenEditStage, instruction
from vidgen_ray.weights import resolve

LORA = str(resolve("builtin:tiny/klein-lora.safetensors"))
KLEIN_CALL = {"width": 128, "height": 64, "num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "np"}
TEXT = {"max_sequence_length": 64, "text_encoder_out_layers": (1, 2, 3)}
REFERENCE = {"face_image": "x.jpg", "identity": "reference"}
QWEN = {"use_hunyuan_style": True, "style_model": "qwen-edit", "style_prompt": "ink"}


@pytest.fixture(scope="module")
def klein(tiny):
    return loaded(Flux2KleinStage, tiny)


@pytest.fixture(scope="module")
def qwen(tiny):
    return loaded(QwenEditStage, tiny)


@pytest.fixture(scope="module")
def photos(photo):
    return (photo[:256, :256], photo[100:228, 100:356])


def image_of(stage, shot, **artefacts):
    return stage(Item(shot, artefacts))["image"]


@pytest.mark.parametrize("with_photos", [False, True])
def test_klein_equals_diffusers(klein, make_shot, photos, with_photos):
    shot = make_shot(**REFERENCE) if with_photos else make_shot(image_model="klein")
    images = {"image": [Image.fromarray(photo) for photo in photos]} if with_photos else {}
    expected = plain(diffusers.Flux2KleinPipeline, "tiny/klein")(
        prompt=shot.prompt, generator=generator(shot, "klein"), **images, **KLEIN_CALL, **TEXT
    ).images[0]
    assert np.array_equal(image_of(klein, shot, photos=photos), as_uint8(expected))


@pytest.mark.parametrize("name", ["klein", "qwen"])
def test_autoencoder_works_in_tiles(request, name):
    vae = request.getfixturevalue(name).pipe.vae
    channels = (vae.config.z_dim, 1) if name == "qwen" else (vae.config.latent_channels,)
    latents = torch.randn((1, *channels, 32, 32), generator=torch.Generator().manual_seed(0))
    sizes = []
    handle = vae.decoder.register_forward_hook(lambda module, args, output: sizes.append(output.shape[-2:]))
    with torch.inference_mode():
        decoded = []
        for tile_px in (None, 256, 128):
            set_vae_tiles(vae, tile_px)
            decoded.append(vae.decode(latents, return_dict=False)[0])
    handle.remove()
    set_vae_tiles(vae, None)
    whole, same, tiled = decoded
    assert torch.equal(whole, same), "an image that fits into a tile"
    assert tiled.shape == whole.shape
    assert (128, 128) in sizes
    # Attention and norms of random weights depend on the whole image. Another image would differ by about 1.4.
    assert (tiled - whole).abs().mean() < 0.5 * whole.abs().mean()


def test_lora_is_active_in_klein_and_leaves_no_trace(klein, make_shot):
    before = image_of(klein, make_shot(image_model="klein"))
    shot = make_shot(image_model="klein", lora=[{"path": LORA, "weight": 0.8}])
    pipe = plain(diffusers.Flux2KleinPipeline, "tiny/klein")
    pipe.load_lora_weights(LORA, adapter_name="one")
    pipe.set_adapters(["one"], [0.8])
    expected = pipe(prompt=shot.prompt, generator=generator(shot, "klein"), **KLEIN_CALL, **TEXT).images[0]
    assert np.array_equal(image_of(klein, shot), as_uint8(expected))
    assert not np.array_equal(as_uint8(expected), before)
    assert np.array_equal(image_of(klein, make_shot(image_model="klein")), before)


@pytest.mark.parametrize("with_photos", [False, True])
def test_qwen_edit_equals_diffusers(qwen, make_shot, photos, with_photos):
    shot = make_shot(**QWEN, **(REFERENCE if with_photos else {}), negative_prompt="blurred")
    pictures = [gradient_image(), *(photos if with_photos else ())]
    expected = plain(diffusers.QwenImageEditPlusPipeline, "tiny/qwen-edit")(
        image=[Image.fromarray(picture) for picture in pictures],
        prompt=instruction(shot.prompt, "ink"),
        negative_prompt="blurred",
        true_cfg_scale=4.0,
        width=128,
        height=64,
        num_inference_steps=2,
        generator=generator(shot, "qwen_edit"),
        output_type="np",
    ).images[0]
    restyled = image_of(qwen, shot, image=gradient_image(), photos=photos)
    assert np.array_equal(restyled, as_uint8(expected))
    other = image_of(qwen, shot.model_copy(update={"style_prompt": "oil painting"}), image=gradient_image(), photos=photos)
    assert not np.array_equal(restyled, other), "the style prompt has no effect"


def test_photos_are_part_of_the_key(tiny, make_shot, tmp_path):
    planner = ShotPlanner(params_of(tiny, STAGES), tiny.encode)
    one, other = tmp_path / "one.png", tmp_path / "other.png"
    Image.fromarray(gradient_image()).save(one)
    Image.fromarray(gradient_image()[::-1]).save(other)

    def keys(photo):
        shot = make_shot(face_image=str(photo), identity="reference", **QWEN)
        return {step.stage: step.key for step in planner(shot).steps}

    first, second = keys(one), keys(other)
    assert all(first[stage] != second[stage] for stage in ("klein", "qwen_edit"))


def test_identity_methods_of_flux_are_rejected_with_klein():
    with pytest.raises(ValidationError, match="identity is infusenet, must be reference or none with image_model klein"):
        Shot(prompt="a", image_model="klein", identity="infusenet")
    assert Shot(prompt="a", image_model="klein").identity == "reference"
