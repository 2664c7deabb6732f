"""InfuseNet on FLUX with random weights in the published layout: identity tokens, parity, determinism and load errors.

Parity is bitwise in fp32: the same kernels run in the same order, on tensors of the same shapes.
"""

import shutil
from functools import partial

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders import unet
from PIL import Image as PILImage

from tests.nets.test_ir_se50 import layout
from tests.stages.test_parity import gradient_image
from vidgen_ray.errors import SetupError, StageError
from vidgen_ray.nets.identity_networks import FaceResampler, IdentityControlNet, ResamplerSizes, load_infusenet
from vidgen_ray.stages.base import noise_generator
from vidgen_ray.stages.flux_model import FluxModel, FluxParams
from vidgen_ray.stages.identity import InfuseNetInjector
from vidgen_ray.weights import resolve

DEV, SCHNELL = "tiny/flux", "tiny/flux-schnell"
FOLDER = resolve("builtin:tiny/infusenet")


@pytest.fixture(autouse=True)
def _inference_mode():
    with torch.inference_mode():
        yield


def injector_for(flux, dtype="float32"):
    params = FluxParams(weights=resolve(f"builtin:{flux}"), text_tokens=64, dtype=dtype)
    return InfuseNetInjector(FluxModel(params), FOLDER)


@pytest.fixture(scope="module")
def injector():
    return injector_for(DEV)


@pytest.fixture(scope="module")
def infusenet():
    return load_infusenet(FOLDER, torch.float32, "cpu")


def face(seed):
    embedding = np.random.default_rng(seed).standard_normal(512).astype(np.float32)
    return embedding / np.linalg.norm(embedding)


POSE = np.zeros((64, 128, 3), np.uint8)
POSE[20:30, 50:60] = 255, 0, 0
POSE[22:40, 70:75] = 0, 255, 0


def arguments_of(model, shot, task):
    """Return the arguments of the pipeline of a task, in three steps or fewer."""
    own = {"num_inference_steps": 3, "output_type": "np"}
    if task == "image_to_image":
        own |= {"image": PILImage.fromarray(gradient_image()), "strength": 0.7}
    return {**model.call_arguments(shot, model.params, guidance=3.5), **own}


def generate_with_face(injector, shot, task, embedding, **fields):
    shot = shot.model_copy(update=fields)
    arguments = arguments_of(injector.model, shot, task)
    with injector.inject(embedding, POSE, shot, "flux") as pipelines:
        return getattr(pipelines, task)(**arguments, generator=noise_generator(shot.seed)).images[0]


def generate(injector, shot, task):
    """Generate an image without InfuseNet."""
    arguments = arguments_of(injector.model, shot, task)
    return getattr(injector.model, task)(**arguments, generator=noise_generator(shot.seed)).images[0]


# The networks.


def test_tokens_match_those_of_diffusers(infusenet, monkeypatch):
    weights = torch.load(FOLDER / "image_proj_model.bin", weights_only=True)["image_proj"]
    # diffusers takes the number of layers from the class. The published weights have 4.
    monkeypatch.setattr(unet, "IPAdapterPlusImageProjection", partial(unet.IPAdapterPlusImageProjection, depth=2))
    projection = diffusers.UNet2DConditionModel.from_pretrained(
        resolve("builtin:tiny/sdxl"), subfolder="unet"
    )._convert_ip_adapter_image_proj_to_diffusers(weights)
    faces = torch.from_numpy(np.stack([face(1), face(2)]))
    tokens = infusenet.tokens(faces)
    assert tokens.shape == (2, 8, 32)
    torch.testing.assert_close(tokens, projection(faces[:, None]), atol=2e-6, rtol=0)
    assert (tokens[0] - tokens[1]).abs().max() > 0.1, "every face gives the same tokens"


def test_infusenet_uses_identity_tokens_at_position_0_and_guidance_1(infusenet):
    plain_net = diffusers.FluxControlNetModel.from_pretrained(FOLDER / "InfuseNetModel")
    tokens = infusenet.tokens(torch.from_numpy(face(1)[None]))
    inputs = {
        "hidden_states": torch.linspace(-1, 1, 8 * 64).view(1, 8, 64),
        "controlnet_cond": torch.linspace(1, 0, 8 * 64).view(1, 8, 64),
        "timestep": torch.full((1,), 0.7),
        "pooled_projections": torch.linspace(-1, 1, 32)[None],
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(4.0)),
        "return_dict": False,
    }
    prompt = {"encoder_hidden_states": torch.ones(1, 64, 32), "txt_ids": torch.ones(64, 3), "guidance": torch.tensor([3.5])}
    identity = {"encoder_hidden_states": tokens, "txt_ids": torch.zeros(8, 3), "guidance": torch.ones(1)}
    expected, _ = plain_net(**inputs, **identity)
    with infusenet.net.identity(tokens):
        residuals, _ = infusenet.net(**inputs, **prompt)
    assert torch.equal(torch.stack(residuals), torch.stack(expected))
    other, _ = plain_net(**inputs, **{**identity, "guidance": torch.tensor([2.0])})
    assert not torch.equal(torch.stack(other), torch.stack(expected)), "guidance has no effect"
    with pytest.raises(RuntimeError, match="was called without identity tokens; call it within"):
        infusenet.net(**inputs)


def test_networks_have_the_published_layout():
    with torch.device("meta"):
        net = IdentityControlNet(num_layers=4, num_single_layers=10, guidance_embeds=True)
    assert layout(net) == "c202bf4b97dc2579"
    for tokens, output, published in ((8, 4096, "21b4e503a5f3be07"), (16, 2048, "94cb1b05231026f7")):
        sizes = ResamplerSizes(512, tokens=tokens, channels=1280, heads=20, depth=4, hidden=5120, output=output)
        with torch.device("meta"):
            resampler = FaceResampler(sizes)
        assert ResamplerSizes.from_weights(resampler.state_dict()) == sizes
        assert layout(resampler) == published
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(2952.7e6, abs=0.05e6)


# The injector.


def generate_with_diffusers(injector, shot, task, **options):
    """Generate an image with diffusers' ControlNet pipeline from the initial noise of the plain pipeline."""
    model = injector.model
    kind = {"text_to_image": "FluxControlNetPipeline", "image_to_image": "FluxControlNetImg2ImgPipeline"}[task]
    parts = {k: v for k, v in model.image_to_image.components.items() if k not in ("image_encoder", "feature_extractor")}
    scheduler = parts.pop("scheduler")
    parts["scheduler"] = type(scheduler).from_config(scheduler.config)
    pipe = getattr(diffusers, kind)(controlnet=injector.infusenet.net, **parts)
    pipe.set_progress_bar_config(disable=True)
    with injector.infusenet.net.identity(injector.infusenet.tokens(torch.from_numpy(face(1)[None]))):
        return pipe(
            **arguments_of(model, shot, task),
            control_image=PILImage.fromarray(POSE),
            controlnet_conditioning_scale=shot.identity_strength,
            latents=first_latents(model, shot, task),
            generator=noise_generator(shot.derived_seed("flux/pose")),
            **options,
        ).images[0]


def first_latents(model, shot, task):
    """Return the latents of the plain pipeline's first call to the transformer."""
    latents = []
    hook = model.text_to_image.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: latents.append(kwargs["hidden_states"]), with_kwargs=True
    )
    getattr(model, task)(**arguments_of(model, shot, task), generator=noise_generator(shot.seed))
    hook.remove()
    return latents[0]


@pytest.mark.parametrize("task", ["text_to_image", "image_to_image"])
def test_infusenet_equals_the_controlnet_pipelines_of_diffusers(injector, make_shot, task):
    shot = make_shot(identity_strength=0.8)
    assert np.array_equal(generate_with_face(injector, shot, task, face(1)), generate_with_diffusers(injector, shot, task))
    in_range = generate_with_diffusers(injector, shot, task, control_guidance_start=0.3, control_guidance_end=0.7)
    assert np.array_equal(generate_with_face(injector, shot, task, face(1), identity_start=0.3, identity_end=0.7), in_range)


@pytest.mark.parametrize(("flux", "dtype"), [(SCHNELL, "float32"), (DEV, "bfloat16")])
def test_infusenet_equals_diffusers_for_schnell_and_in_bfloat16(make_shot, flux, dtype):
    injector, shot = injector_for(flux, dtype), make_shot()
    image = generate_with_face(injector, shot, "text_to_image", face(1))
    assert np.array_equal(image, generate_with_diffusers(injector, shot, "text_to_image"))
    assert not np.array_equal(image, generate(injector, shot, "text_to_image"))


def test_infusenet_runs_once_per_active_step_also_with_a_negative_prompt(injector, make_shot):
    """diffusers supports negative prompts for text to image only."""
    calls = []
    shot = make_shot(negative_prompt="blurred")
    expected = generate_with_diffusers(injector, shot, "text_to_image")
    hook = injector.infusenet.net.register_forward_hook(lambda *_: calls.append(1))
    assert np.array_equal(generate_with_face(injector, shot, "text_to_image", face(1)), expected)
    assert len(calls) == 3
    generate_with_face(injector, shot, "text_to_image", face(1), identity_start=0.3, identity_end=0.7)
    assert len(calls) == 3 + 1
    hook.remove()


def test_negative_prompt_and_face_change_image_to_image(injector, make_shot):
    images = [
        generate_with_face(injector, make_shot(negative_prompt=text), "image_to_image", face(seed))
        for text, seed in ((None, 1), ("blurred", 1), ("blurred", 2))
    ]
    assert min(np.abs(image - images[1]).max() for image in (images[0], images[2])) > 1e-4


def test_failed_call_does_not_change_the_model(injector, make_shot):
    shot = make_shot()
    before = generate(injector, shot, "text_to_image")
    with pytest.raises(TypeError), injector.inject(face(1), POSE, shot, "flux") as pipelines:
        pipelines.text_to_image(nonsense=1)
    with pytest.raises(StageError, match=r"got an embedding of shape \(256,\), infusenet takes 512 numbers"):
        generate_with_face(injector, shot, "text_to_image", face(1)[:256])
    assert np.array_equal(generate(injector, shot, "text_to_image"), before)


# Load errors.


def replace_projection(folder, embedding=512, output=32):
    sizes = ResamplerSizes(embedding, tokens=8, channels=32, heads=2, depth=2, hidden=128, output=output)
    torch.save({"image_proj": FaceResampler(sizes).state_dict()}, folder / "image_proj_model.bin")


def change_net(folder, **config):
    old = diffusers.FluxControlNetModel.load_config(folder / "InfuseNetModel")
    shutil.rmtree(folder / "InfuseNetModel")
    diffusers.FluxControlNetModel.from_config({**old, **config}).save_pretrained(folder / "InfuseNetModel")


def change_config(folder, old, new):
    file = folder / "InfuseNetModel" / "config.json"
    file.write_text(file.read_text().replace(old, new))


PROBLEMS = (
    (lambda f: change_config(f, '"num_layers": 1', '"num_layers": 2'), r"\d+ missing keys, .*'controlnet_blocks\.1\.bias'"),
    (lambda f: change_net(f, num_mode=3), "of another design, with control modes or hints; must be InfuseNet"),
    (lambda f: replace_projection(f, embedding=768), "takes embeddings of 768 numbers, must be 512"),
    (lambda f: replace_projection(f, output=48), "returns tokens of 48 numbers, InfuseNetModel takes 32; copy both"),
    (lambda f: change_net(f, pooled_projection_dim=48), "pooled_projection_dim is 48, the profile's FLUX weights have 32"),
)


def test_wrong_infusenet_folder_raises_setup_error(injector, tmp_path):
    for number, (damage, message) in enumerate(PROBLEMS):
        copy = tmp_path / str(number)
        shutil.copytree(FOLDER, copy)
        damage(copy)
        with pytest.raises(SetupError, match=f"(?s){message}"):
            InfuseNetInjector(injector.model, copy)
