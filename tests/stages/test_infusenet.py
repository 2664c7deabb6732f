"""InfuseNet on FLUX with random weights in the published layout: identity tokens, parity, determinism and load errors."""

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
from vidgen_ray.nets.identity_networks import FaceResampler, IdentityControlNet, InfuseNet, ResamplerSizes, load_infusenet
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Image, noise_generator
from vidgen_ray.stages.flux_model import FluxModel, FluxParams
from vidgen_ray.stages.identity import InfuseNetInjector, injector_class, shared_injector
from vidgen_ray.weights import resolve

WIDTH, HEIGHT = 128, 64
DEV, SCHNELL = "tiny/flux", "tiny/flux-schnell"


@pytest.fixture(autouse=True)
def _inference_mode() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve("builtin:tiny/infusenet")


@pytest.fixture(scope="module")
def infusenet(folder: Path) -> InfuseNet:
    return load_infusenet(folder, torch.float32, "cpu")


@pytest.fixture(scope="module")
def injector_for(folder: Path) -> Callable[[str], InfuseNetInjector]:
    injectors: dict[str, InfuseNetInjector] = {}

    def load(flux: str) -> InfuseNetInjector:
        if flux not in injectors:
            model = FluxModel(FluxParams(weights=resolve(f"builtin:{flux}"), text_tokens=64))
            injectors[flux] = InfuseNetInjector(model, folder)
        return injectors[flux]

    return load


@pytest.fixture
def injector(injector_for) -> InfuseNetInjector:
    return injector_for(DEV)


def face(seed: int) -> np.ndarray:
    embedding = np.random.default_rng(seed).standard_normal(512).astype(np.float32)
    return embedding / np.linalg.norm(embedding)


def gradient(shift: int = 0) -> Image:
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    return np.stack([x * 255 // WIDTH, y * 255 // HEIGHT, (x + y + shift) % 256], -1).astype(np.uint8)


POSE = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
POSE[20:30, 50:60] = 255, 0, 0
POSE[22:40, 70:75] = 0, 255, 0


def text_arguments(model: FluxModel, shot: Shot) -> dict[str, Any]:
    return {
        **model.call_arguments(shot, FluxParams(weights=Path(), text_tokens=64), guidance=3.5),
        "num_inference_steps": 3,
        "output_type": "np",
    }


def image_arguments(model: FluxModel, shot: Shot) -> dict[str, Any]:
    return {
        **text_arguments(model, shot),
        "image": PILImage.fromarray(gradient()),
        "strength": 0.7,
        "num_inference_steps": 4,
    }


TASKS = {"text_to_image": text_arguments, "image_to_image": image_arguments}
both_tasks = pytest.mark.parametrize("task", TASKS)


def generate_with_face(
    injector: InfuseNetInjector, shot: Shot, task: str, embedding: np.ndarray, pose: Image = POSE, **fields: Any
) -> np.ndarray:
    shot = shot.model_copy(update=fields)
    arguments = TASKS[task](injector.model, shot)
    with injector.inject(embedding, pose, shot, "flux") as pipelines:
        return getattr(pipelines, task)(**arguments, generator=noise_generator(shot.seed)).images[0]


def generate(injector: InfuseNetInjector, shot: Shot, task: str) -> np.ndarray:
    """Generate an image without InfuseNet."""
    arguments = TASKS[task](injector.model, shot)
    return getattr(injector.model, task)(**arguments, generator=noise_generator(shot.seed)).images[0]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


# The networks.


def test_tokens_match_the_published_formula(infusenet, folder):
    weights = torch.load(folder / "image_proj_model.bin", weights_only=True)["image_proj"]
    faces = torch.from_numpy(np.stack([face(1), face(2)]))
    tokens = infusenet.tokens(faces)
    assert tokens.shape == (2, 8, 32)
    torch.testing.assert_close(tokens, published_tokens(weights, faces), atol=2e-6, rtol=0)
    assert (tokens[0] - tokens[1]).abs().max() > 0.1, "every face gives the same tokens"


def controlnet_inputs(rows: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    patches = 8
    return {
        "hidden_states": torch.randn(rows, patches, 64, generator=generator),
        "controlnet_cond": torch.randn(rows, patches, 64, generator=generator),
        "timestep": torch.full((rows,), 0.7),
        "pooled_projections": torch.randn(rows, 32, generator=generator),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(4.0)),
        "return_dict": False,
    }


def stacked(residuals) -> torch.Tensor:
    return torch.stack([sample for samples in residuals for sample in samples])


def test_infusenet_uses_identity_tokens_at_position_0_and_guidance_1(infusenet, folder):
    plain_net = diffusers.FluxControlNetModel.from_pretrained(folder / "InfuseNetModel")
    tokens = infusenet.tokens(torch.from_numpy(face(1)[None]))
    prompt = {"encoder_hidden_states": torch.ones(1, 64, 32), "txt_ids": torch.ones(64, 3), "guidance": torch.tensor([3.5])}
    inputs = controlnet_inputs(1)
    identity = {"encoder_hidden_states": tokens, "txt_ids": torch.zeros(8, 3)}
    one, two = (stacked(plain_net(**inputs, **identity, guidance=torch.tensor([guidance]))) for guidance in (1.0, 2.0))
    with infusenet.net.identity(tokens):
        assert torch.equal(stacked(infusenet.net(**inputs, **prompt)), one)
    assert not torch.equal(one, two), "guidance has no effect"


def test_call_without_identity_tokens_raises_runtime_error(infusenet):
    with pytest.raises(ZeroDivisionError), infusenet.net.identity(infusenet.tokens(torch.from_numpy(face(1)[None]))):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="was called without identity tokens; call it within"):
        infusenet.net(**controlnet_inputs(1))


def test_networks_have_the_published_layout():
    sizes = ResamplerSizes(512, tokens=8, channels=1280, heads=20, depth=4, hidden=5120, output=4096)
    with torch.device("meta"):
        net = IdentityControlNet(num_layers=4, num_single_layers=10, guidance_embeds=True)
        resampler = FaceResampler(sizes)
    assert ResamplerSizes.from_weights(resampler.state_dict()) == sizes
    assert (layout(resampler), layout(net)) == ("21b4e503a5f3be07", "c202bf4b97dc2579")
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(2952.7e6, abs=0.05e6)


# The injector.


@both_tasks
def test_identity_strength_0_equals_plain_flux(injector, make_shot, task):
    for fields in ({}, {"negative_prompt": "blurred"}):
        shot = make_shot(identity_strength=0.0, **fields)
        assert np.array_equal(generate_with_face(injector, shot, task, face(1)), generate(injector, shot, task))


def controlnet_pipeline(injector: InfuseNetInjector, pipeline_class: Any) -> Any:
    parts = {
        k: v for k, v in injector.model.image_to_image.components.items() if k not in ("image_encoder", "feature_extractor")
    }
    scheduler = parts.pop("scheduler")
    pipe = pipeline_class(controlnet=injector.infusenet.net, scheduler=type(scheduler).from_config(scheduler.config), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate_with_diffusers(injector: InfuseNetInjector, shot: Shot, task: str, **options: Any) -> np.ndarray:
    """Generate an image with diffusers' ControlNet pipeline from the initial noise of the plain pipeline."""
    arguments = TASKS[task](injector.model, shot)
    name = {"text_to_image": "FluxControlNetPipeline", "image_to_image": "FluxControlNetImg2ImgPipeline"}[task]
    with injector.infusenet.net.identity(injector.infusenet.tokens(torch.from_numpy(face(1)[None]))):
        return controlnet_pipeline(injector, getattr(diffusers, name))(
            **arguments,
            control_image=PILImage.fromarray(POSE),
            controlnet_conditioning_scale=shot.identity_strength,
            latents=first_latents(injector.model, shot, task),
            generator=noise_generator(shot.derived_seed("flux/pose")),
            **options,
        ).images[0]


def first_latents(model: FluxModel, shot: Shot, task: str) -> torch.Tensor:
    """Return the latents of the plain pipeline's first call to the transformer."""
    latents: list[torch.Tensor] = []
    hook = model.text_to_image.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: latents.append(kwargs["hidden_states"]), with_kwargs=True
    )
    getattr(model, task)(**TASKS[task](model, shot), generator=noise_generator(shot.seed))
    hook.remove()
    return latents[0]


@both_tasks
@pytest.mark.parametrize("flux", [DEV, SCHNELL])
def test_infusenet_equals_the_controlnet_pipelines_of_diffusers(injector_for, make_shot, task, flux):
    injector = injector_for(flux)
    shot = make_shot(identity_strength=0.8)
    assert np.array_equal(generate_with_face(injector, shot, task, face(1)), generate_with_diffusers(injector, shot, task))
    in_range = generate_with_diffusers(injector, shot, task, control_guidance_start=0.3, control_guidance_end=0.7)
    assert np.array_equal(generate_with_face(injector, shot, task, face(1), identity_start=0.3, identity_end=0.7), in_range)


@both_tasks
def test_infusenet_equals_diffusers_in_bfloat16(folder, make_shot, task):
    params = FluxParams(weights=resolve(f"builtin:{DEV}"), text_tokens=64, dtype="bfloat16")
    injector, shot = InfuseNetInjector(FluxModel(params), folder), make_shot()
    image = generate_with_face(injector, shot, task, face(1))
    assert np.array_equal(image, generate_with_diffusers(injector, shot, task))
    assert not np.array_equal(image, generate(injector, shot, task))


def test_infusenet_equals_diffusers_with_a_negative_prompt(injector, make_shot):
    """diffusers supports negative prompts for text to image only."""
    shot = make_shot(negative_prompt="blurred")
    expected = generate_with_diffusers(injector, shot, "text_to_image")
    assert np.array_equal(generate_with_face(injector, shot, "text_to_image", face(1)), expected)


def test_negative_prompt_changes_image_to_image(injector, make_shot):
    images = [
        generate_with_face(injector, make_shot(negative_prompt=text), "image_to_image", face(seed))
        for text, seed in ((None, 1), ("blurred", 1), ("a cat", 1), ("blurred", 2))
    ]
    for n, image in enumerate(images):
        for other in images[:n]:
            assert difference(image, other) > 1e-4


@pytest.mark.parametrize("negative", [None, "blurred"])
def test_infusenet_runs_once_per_active_step(injector, make_shot, negative):
    calls: list[Any] = []
    hook = injector.infusenet.net.register_forward_hook(lambda *_: calls.append(1))
    shot = make_shot(negative_prompt=negative)
    generate_with_face(injector, shot, "text_to_image", face(1))
    assert len(calls) == 3
    generate_with_face(injector, shot, "text_to_image", face(1), identity_start=0.3, identity_end=0.7)
    assert len(calls) == 3 + 1
    hook.remove()


def test_failed_call_does_not_change_the_model(injector, make_shot):
    shot = make_shot()
    before = generate(injector, shot, "text_to_image")
    with pytest.raises(TypeError), injector.inject(face(1), POSE, shot, "flux") as pipelines:
        pipelines.text_to_image(nonsense=1)
    assert not injector.model.text_to_image.transformer._forward_pre_hooks
    assert np.array_equal(generate(injector, shot, "text_to_image"), before)


def test_stages_with_one_model_share_an_injector(injector, folder):
    first = shared_injector("infusenet", injector.model, folder)
    assert shared_injector("infusenet", injector.model, folder) is first
    first.move("cpu")
    with pytest.raises(StageError, match="identity: got 'pulid', must be one of infusenet"):
        injector_class("pulid")


def test_invalid_embedding_raises_stage_error(injector, make_shot):
    with pytest.raises(StageError, match=r"got an embedding of shape \(256,\), infusenet takes 512 numbers"):
        generate_with_face(injector, make_shot(), "text_to_image", face(1)[:256])


# Load errors.


def rewrite_projection(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "image_proj_model.bin"
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)


def replace_projection(embedding: int = 512, output: int = 32) -> Callable[[Path], None]:
    sizes = ResamplerSizes(embedding, tokens=8, channels=32, heads=2, depth=2, hidden=128, output=output)
    return lambda folder: rewrite_projection(folder, lambda c: c.update(image_proj=FaceResampler(sizes).state_dict()))


def edit_config(folder: Path, old: str, new: str) -> None:
    file = folder / "InfuseNetModel" / "config.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


PROBLEMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no such folder; copy infu_flux_v1.0/aes_stage2"),
    "no net": (lambda f: shutil.rmtree(f / "InfuseNetModel"), "InfuseNetModel: no config.json of a FluxControlNetModel; copy"),
    "no projection": ((lambda f: (f / "image_proj_model.bin").unlink()), r"image_proj_model\.bin: no such file; copy"),
    "another class": (
        lambda f: edit_config(f, "FluxControlNetModel", "ControlNetModel"),
        "holds a ControlNetModel, must be a FluxControlNetModel; copy",
    ),
    "more blocks": (
        lambda f: edit_config(f, '"num_layers": 1', '"num_layers": 2'),
        r"InfuseNetModel: \d+ missing keys, the first is 'controlnet_blocks\.1\.bias'; copy",
    ),
    "damaged projection": (
        lambda f: (f / "image_proj_model.bin").write_bytes(b"\x80\x02not a pickle"),
        "is not a file of tensors only.*copy the published file again",
    ),
    "another file": (
        lambda f: torch.save({"ip_adapter": {}}, f / "image_proj_model.bin"),
        "got a dict of ip_adapter, must have the weights 'image_proj'; copy",
    ),
    "another projection": (
        lambda f: rewrite_projection(f, lambda c: c.update(image_proj={"proj.weight": torch.zeros(2, 2)})),
        "image_proj has other tensors .*'latents'.*; it is not a projection of face embeddings",
    ),
    "missing tensor": (
        lambda f: rewrite_projection(f, lambda c: c["image_proj"].pop("layers.1.0.to_kv.weight")),
        r"image_proj .*Missing key.* \"layers\.1\.0\.to_kv\.weight\"",
    ),
    "wrong shape": (
        lambda f: rewrite_projection(f, lambda c: c["image_proj"].update({"norm_out.bias": torch.zeros(7)})),
        r"image_proj .*size mismatch for norm_out\.bias",
    ),
    "wrong embedding size": (replace_projection(embedding=768), "takes embeddings of 768 numbers, must be 512"),
    "wrong token size": (
        replace_projection(output=48),
        "returns tokens of 48 numbers, InfuseNetModel takes 32; copy both from the same published folder",
    ),
}


def test_wrong_infusenet_folder_raises_setup_error(folder, tmp_path):
    for number, (damage, message) in enumerate(PROBLEMS.values()):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        damage(copy)
        with pytest.raises(SetupError, match=f"(?s){message}"):
            load_infusenet(copy, torch.float32, "cpu")


def test_controlnet_of_another_design_is_rejected(folder, tmp_path):
    shutil.copy(folder / "image_proj_model.bin", tmp_path)
    config = {**diffusers.FluxControlNetModel.load_config(folder / "InfuseNetModel"), "num_mode": 3}
    diffusers.FluxControlNetModel.from_config(config).save_pretrained(tmp_path / "InfuseNetModel")
    with pytest.raises(SetupError, match="of another design, with control modes or hints; must be InfuseNet"):
        load_infusenet(tmp_path, torch.float32, "cpu")


def test_infusenet_for_another_flux_is_rejected(injector, folder, tmp_path):
    shutil.copy(folder / "image_proj_model.bin", tmp_path)
    config = {**diffusers.FluxControlNetModel.load_config(folder / "InfuseNetModel"), "pooled_projection_dim": 48}
    diffusers.FluxControlNetModel.from_config(config).save_pretrained(tmp_path / "InfuseNetModel")
    with pytest.raises(
        SetupError, match="pooled_projection_dim is 48, the profile's FLUX weights have 32; use weights trained"
    ):
        InfuseNetInjector(injector.model, tmp_path)
