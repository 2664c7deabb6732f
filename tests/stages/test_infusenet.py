"""A person in FLUX by InfuseNet, on random weights of the published layout: the token path, parity, sameness, refusals."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from safetensors.torch import load_file

from tests.stages.published_resampler import published_shapes, published_tokens
from vidgen_ray.errors import SetupError, StageError
from vidgen_ray.nets.face_resampler import FaceResampler, ResamplerSizes
from vidgen_ray.nets.infusenet import IdentityControlNet, InfuseNet, load_infusenet
from vidgen_ray.nets.model_folder import require_same
from vidgen_ray.shot import LoraRef, Shot
from vidgen_ray.stages.base import Image, noise_generator
from vidgen_ray.stages.flux_model import FluxModel, FluxParams
from vidgen_ray.stages.identity import INJECTORS, identities, injector_class, shared_injector
from vidgen_ray.stages.identity.infusenet import MUST_AGREE, InfuseNetInjector
from vidgen_ray.weights import resolve

WIDTH, HEIGHT = 128, 64
LORA = LoraRef(path=str(resolve("builtin:tiny/lora.safetensors")))
DEV, SCHNELL = "tiny/flux", "tiny/flux-schnell"


@pytest.fixture(autouse=True)
def _as_a_stage_runs() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve("builtin:tiny/infusenet")


@pytest.fixture(scope="module")
def infusenet(folder: Path) -> InfuseNet:
    return load_infusenet(folder, torch.float32, "cpu")


@pytest.fixture(scope="module")
def injector_of(folder: Path) -> Callable[[str], InfuseNetInjector]:
    made: dict[str, InfuseNetInjector] = {}

    def of(flux: str) -> InfuseNetInjector:
        if flux not in made:
            made[flux] = InfuseNetInjector(FluxModel(FluxParams(weights=resolve(f"builtin:{flux}"), text_tokens=64)), folder)
        return made[flux]

    return of


@pytest.fixture
def injector(injector_of) -> InfuseNetInjector:
    return injector_of(DEV)


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
        **model.call_arguments(shot, FluxParams(weights=Path(), text_tokens=64)),
        "num_inference_steps": 3,
        "guidance_scale": 3.5,
    }


def image_arguments(model: FluxModel, shot: Shot) -> dict[str, Any]:
    return {
        **text_arguments(model, shot),
        "image": PILImage.fromarray(gradient()),
        "strength": 0.7,
        "num_inference_steps": 4,
    }


WAYS = {"text_to_image": text_arguments, "image_to_image": image_arguments}
both_ways = pytest.mark.parametrize("way", WAYS)


def drawn(injector: InfuseNetInjector, shot: Shot, way: str, who: np.ndarray, pose: Image = POSE, **said: Any) -> np.ndarray:
    arguments = WAYS[way](injector.model, shot)
    with injector.inject(who, pose, shot, "flux", **said) as calls:
        return getattr(calls, way)(**arguments, generator=noise_generator(shot, "flux")).images[0]


def plain(injector: InfuseNetInjector, shot: Shot, way: str) -> np.ndarray:
    arguments = WAYS[way](injector.model, shot)
    return getattr(injector.model, way)(**arguments, generator=noise_generator(shot, "flux")).images[0]


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


# The networks.


def test_the_resampler_is_the_published_formula(infusenet, folder):
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


def said(residuals) -> torch.Tensor:
    return torch.stack([sample for samples in residuals for sample in samples])


def test_the_net_hears_tokens_at_place_zero_and_guidance_one_instead_of_the_prompt(infusenet, folder):
    plain_net = diffusers.FluxControlNetModel.from_pretrained(folder / "InfuseNetModel")
    tokens = infusenet.tokens(torch.from_numpy(face(1)[None]))
    prompt = {"encoder_hidden_states": torch.ones(1, 64, 32), "txt_ids": torch.ones(64, 3), "guidance": torch.tensor([3.5])}
    inputs = controlnet_inputs(1)
    for guidance in (1.0, 2.0):
        told = {"encoder_hidden_states": tokens, "txt_ids": torch.zeros(8, 3), "guidance": torch.tensor([guidance])}
        expected = plain_net(**inputs, **told)
        with infusenet.net.identity(tokens, guidance):
            assert torch.equal(said(infusenet.net(**inputs, **prompt)), said(expected))
    with infusenet.net.identity(tokens):
        assert not torch.equal(said(infusenet.net(**inputs, **prompt)), said(expected)), "guidance is not heard"


def test_two_people_in_a_batch_are_each_the_same_as_alone(infusenet):
    tokens, inputs = infusenet.tokens(torch.from_numpy(np.stack([face(1), face(2)]))), controlnet_inputs(2)
    with infusenet.net.identity(tokens):
        together = said(infusenet.net(**inputs))
    for row in range(2):
        alone = {k: v[row : row + 1] if torch.is_tensor(v) and len(v) == 2 else v for k, v in inputs.items()}
        with infusenet.net.identity(tokens[row : row + 1]):
            torch.testing.assert_close(said(infusenet.net(**alone))[:, 0], together[:, row], atol=5e-6, rtol=0)


def test_the_net_refuses_to_work_for_nobody_even_after_a_failure(infusenet):
    with pytest.raises(ZeroDivisionError), infusenet.net.identity(infusenet.tokens(torch.from_numpy(face(1)[None]))):
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="was called without a person; call it within"):
        infusenet.net(**controlnet_inputs(1))


def test_the_tiny_folder_has_the_published_layout(folder):
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    shards = {f"InfuseNetModel/diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)}
    index = "InfuseNetModel/diffusion_pytorch_model.safetensors.index.json"
    assert files == {"InfuseNetModel/config.json", index, *shards, "image_proj_model.bin"}
    content = torch.load(folder / "image_proj_model.bin", weights_only=True)
    assert list(content) == ["image_proj"]
    assert set(content["image_proj"]) == set(published_shapes(2, 32, 128, 8, 32, 128))
    names = {name for shard in shards for name in load_file(folder / shard)}
    assert names == infusenet_names(double=1, single=2)


def infusenet_names(double: int, single: int) -> set[str]:
    """Names of a FLUX ControlNet's tensors with a guidance embedding."""
    linears = ["x_embedder", "context_embedder", "controlnet_x_embedder"]
    linears += [f"time_text_embed.{part}_embedder.linear_{n}" for part in ("timestep", "guidance", "text") for n in (1, 2)]
    linears += [f"controlnet_blocks.{n}" for n in range(double)] + [f"controlnet_single_blocks.{n}" for n in range(single)]
    scales = []
    for n in range(double):
        block = f"transformer_blocks.{n}"
        attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        linears += [f"{block}.attn.{name}" for name in attention]
        linears += [f"{block}.{ff}.net.{layer}" for ff in ("ff", "ff_context") for layer in ("0.proj", "2")]
        linears += [f"{block}.norm1.linear", f"{block}.norm1_context.linear"]
        scales += [f"{block}.attn.norm_{name}" for name in ("q", "k", "added_q", "added_k")]
    for n in range(single):
        block = f"single_transformer_blocks.{n}"
        linears += [f"{block}.{name}" for name in ("norm.linear", "proj_mlp", "proj_out")]
        linears += [f"{block}.attn.{name}" for name in ("to_q", "to_k", "to_v")]
        scales += [f"{block}.attn.norm_q", f"{block}.attn.norm_k"]
    return {f"{name}.{part}" for name in linears for part in ("weight", "bias")} | {f"{name}.weight" for name in scales}


def test_networks_of_the_published_sizes_have_the_published_parameters():
    with torch.device("meta"):
        net = IdentityControlNet(num_layers=4, num_single_layers=10, guidance_embeds=True)
        weights = {k: torch.empty(s) for k, s in published_shapes(4, 1280, 1280, 8, 4096, 5120).items()}
        sizes = ResamplerSizes.from_weights(weights)
        resampler = FaceResampler(sizes)
    assert sizes == ResamplerSizes(512, tokens=8, channels=1280, heads=20, depth=4, hidden=5120, output=4096)
    assert {k: tuple(v.shape) for k, v in resampler.state_dict().items()} == {k: tuple(v.shape) for k, v in weights.items()}
    assert sum(p.numel() for p in resampler.parameters()) == pytest.approx(84.6e6, abs=0.05e6)
    tensors = {k: tuple(v.shape) for k, v in net.state_dict().items()}
    assert tensors.keys() == infusenet_names(double=4, single=10)
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(2952.7e6, abs=0.05e6)
    for name, shape in {
        "context_embedder.weight": (3072, 4096),
        "controlnet_x_embedder.weight": (3072, 64),
        "controlnet_single_blocks.9.weight": (3072, 3072),
        "time_text_embed.guidance_embedder.linear_1.weight": (3072, 256),
        "time_text_embed.text_embedder.linear_1.weight": (3072, 768),
        "transformer_blocks.3.ff.net.0.proj.weight": (12288, 3072),
        "single_transformer_blocks.9.proj_out.weight": (3072, 15360),
    }.items():
        assert tensors[name] == shape


# The injector.


@both_ways
@pytest.mark.parametrize("flux", [DEV, SCHNELL])
def test_without_strength_the_picture_is_the_plain_one_bitwise(injector_of, make_shot, way, flux):
    injector = injector_of(flux)
    for fields in ({}, {"negative_prompt": "blurred"}):
        shot = make_shot(identity_strength=0.0, **fields)
        assert np.array_equal(drawn(injector, shot, way, face(1)), plain(injector, shot, way))


@both_ways
@pytest.mark.parametrize("flux", [DEV, SCHNELL])
def test_person_pose_and_strength_each_change_the_picture_and_nothing_stays(injector_of, make_shot, way, flux):
    injector, shot = injector_of(flux), make_shot()
    before = plain(injector, shot, way)
    picture = drawn(injector, shot, way, face(1))
    assert np.array_equal(drawn(injector, shot, way, face(1)), picture)
    others = {
        "no person": before,
        "another person": drawn(injector, shot, way, face(2)),
        "no pose": drawn(injector, shot, way, face(1), np.zeros_like(POSE)),
        "less strength": drawn(injector, make_shot(identity_strength=0.5), way, face(1)),
        "a later start": drawn(injector, shot, way, face(1), start=0.3),
        "an earlier end": drawn(injector, shot, way, face(1), end=0.7),
        "another seed": drawn(injector, make_shot(seed=8), way, face(1)),
    }
    for what, other in others.items():
        assert difference(other, picture) > 0.02, what
    assert np.array_equal(plain(injector, shot, way), before), "the person lingers"


def controlnet_pipeline(injector: InfuseNetInjector, pipeline_class: Any) -> Any:
    parts = {
        k: v for k, v in injector.model.image_to_image.components.items() if k not in ("image_encoder", "feature_extractor")
    }
    scheduler = parts.pop("scheduler")
    pipe = pipeline_class(controlnet=injector.infusenet.net, scheduler=type(scheduler).from_config(scheduler.config), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def in_the_stock_pipeline(injector: InfuseNetInjector, shot: Shot, way: str, **told: Any) -> np.ndarray:
    """What diffusers' ControlNet pipeline draws from the noise that the plain pipeline would start with."""
    arguments = WAYS[way](injector.model, shot)
    name = {"text_to_image": "FluxControlNetPipeline", "image_to_image": "FluxControlNetImg2ImgPipeline"}[way]
    with injector.infusenet.net.identity(injector.infusenet.tokens(torch.from_numpy(face(1)[None]))):
        return controlnet_pipeline(injector, getattr(diffusers, name))(
            **arguments,
            control_image=PILImage.fromarray(POSE),
            controlnet_conditioning_scale=shot.identity_strength,
            latents=first_latents(injector.model, shot, way),
            generator=noise_generator(shot, "flux/pose"),
            **told,
        ).images[0]


def first_latents(model: FluxModel, shot: Shot, way: str) -> torch.Tensor:
    """What the plain pipeline hands to the transformer first."""
    seen: list[torch.Tensor] = []
    hook = model.text_to_image.transformer.register_forward_pre_hook(
        lambda module, args, told: seen.append(told["hidden_states"]), with_kwargs=True
    )
    getattr(model, way)(**WAYS[way](model, shot), generator=noise_generator(shot, "flux"))
    hook.remove()
    return seen[0]


@both_ways
@pytest.mark.parametrize("flux", [DEV, SCHNELL])
def test_it_equals_the_controlnet_pipelines_of_diffusers(injector_of, make_shot, way, flux):
    injector = injector_of(flux)
    shot = make_shot(identity_strength=0.8)
    assert np.array_equal(drawn(injector, shot, way, face(1)), in_the_stock_pipeline(injector, shot, way))
    ranged = in_the_stock_pipeline(injector, shot, way, control_guidance_start=0.3, control_guidance_end=0.7)
    assert np.array_equal(drawn(injector, shot, way, face(1), start=0.3, end=0.7), ranged)


@both_ways
def test_in_bfloat16_it_equals_them_too(folder, make_shot, way):
    params = FluxParams(weights=resolve(f"builtin:{DEV}"), text_tokens=64, dtype="bfloat16")
    injector, shot = InfuseNetInjector(FluxModel(params), folder), make_shot()
    picture = drawn(injector, shot, way, face(1))
    assert np.array_equal(picture, in_the_stock_pipeline(injector, shot, way))
    assert not np.array_equal(picture, plain(injector, shot, way))


def test_with_a_negative_prompt_it_equals_diffusers_which_has_it_for_text_to_image(injector, make_shot):
    shot = make_shot(negative_prompt="blurred")
    expected = in_the_stock_pipeline(injector, shot, "text_to_image")
    assert np.array_equal(drawn(injector, shot, "text_to_image", face(1)), expected)


def test_a_negative_prompt_acts_in_image_to_image_too(injector, make_shot):
    pictures = [
        drawn(injector, make_shot(negative_prompt=text), "image_to_image", face(who))
        for text, who in ((None, 1), ("blurred", 1), ("a cat", 1), ("blurred", 2))
    ]
    for n, picture in enumerate(pictures):
        for other in pictures[:n]:
            assert difference(picture, other) > 1e-4


@pytest.mark.parametrize("negative", [None, "blurred"])
def test_the_net_is_asked_once_a_step_and_not_outside_its_range(injector, make_shot, negative):
    asked: list[Any] = []
    hook = injector.infusenet.net.register_forward_hook(lambda *_: asked.append(1))
    shot = make_shot(negative_prompt=negative)
    drawn(injector, shot, "text_to_image", face(1))
    assert len(asked) == 3
    drawn(injector, shot, "text_to_image", face(1), start=0.3, end=0.7)
    assert len(asked) == 3 + 1
    hook.remove()


@both_ways
def test_the_person_wears_a_lora_and_takes_it_off(injector, make_shot, way):
    shot = make_shot()
    bare = drawn(injector, shot, way, face(1))
    with injector.model.loras_active([LORA]):
        dressed, other = (drawn(injector, shot, way, face(who)) for who in (1, 2))
        nobody = plain(injector, shot, way)
        unsteered = drawn(injector, make_shot(identity_strength=0.0), way, face(1))
    assert np.array_equal(unsteered, nobody)
    for what, picture in {"the LoRA": bare, "the person": other, "InfuseNet": nobody}.items():
        assert difference(dressed, picture) > 0.02, f"{what} does nothing"
    assert np.array_equal(drawn(injector, shot, way, face(1)), bare)


def test_a_failed_call_leaves_the_model_plain(injector, make_shot):
    shot = make_shot()
    before = plain(injector, shot, "text_to_image")
    with pytest.raises(TypeError), injector.inject(face(1), POSE, shot, "flux") as calls:
        calls.text_to_image(nonsense=1)
    assert not injector.model.text_to_image.transformer._forward_pre_hooks
    assert np.array_equal(plain(injector, shot, "text_to_image"), before)


def test_stages_on_one_model_share_an_injector(injector, folder):
    first = shared_injector("infusenet", injector.model, folder)
    assert shared_injector("infusenet", injector.model, folder) is first
    first.move("cpu")
    assert set(INJECTORS) == {"infusenet"}
    assert identities() == ("infusenet", "instantid-sdxl", "none")
    assert injector_class("infusenet").embedding == "ir_se50"
    with pytest.raises(StageError, match="identity: got 'pulid', FLUX is steered by infusenet"):
        injector_class("pulid")


@pytest.mark.parametrize(
    ("who", "said", "message"),
    [
        (face(1)[:256], {}, r"got an embedding of shape \(256,\), infusenet takes 512 numbers"),
        (face(1), {"start": 0.5, "end": 0.5}, r"got start 0.5 and end 0.5, must be 0 <= start < end <= 1"),
    ],
)
def test_what_a_shot_cannot_ask_is_said(injector, make_shot, who, said, message):
    with pytest.raises(StageError, match=message):
        drawn(injector, make_shot(), "text_to_image", who, **said)


# What cannot be loaded.


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = folder / "image_proj_model.bin"
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)


def reprojected(embedding: int = 512, output: int = 32) -> Callable[[Path], None]:
    sizes = ResamplerSizes(embedding, tokens=8, channels=32, heads=2, depth=2, hidden=128, output=output)
    return lambda folder: rewritten(folder, lambda c: c.update(image_proj=FaceResampler(sizes).state_dict()))


def configured(folder: Path, old: str, new: str) -> None:
    file = folder / "InfuseNetModel" / "config.json"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


class _RunsCode:
    def __reduce__(self):
        return (print, ("code of the file ran",))


PROBLEMS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no such folder; copy infu_flux_v1.0/aes_stage2"),
    "no net": (lambda f: shutil.rmtree(f / "InfuseNetModel"), "InfuseNetModel: no config.json of a FluxControlNetModel; copy"),
    "no weights": (
        lambda f: next((f / "InfuseNetModel").glob("*-00002.safetensors")).unlink(),
        "InfuseNetModel: not the weights of a FluxControlNetModel",
    ),
    "no projection": ((lambda f: (f / "image_proj_model.bin").unlink()), r"image_proj_model\.bin: no such file; copy"),
    "another class": (
        lambda f: configured(f, "FluxControlNetModel", "ControlNetModel"),
        "holds a ControlNetModel, must be a FluxControlNetModel; copy",
    ),
    "another width": (
        lambda f: configured(f, '"in_channels": 64', '"in_channels": 48'),
        "not the weights of a FluxControlNetModel",
    ),
    "more blocks": (
        lambda f: configured(f, '"num_layers": 1', '"num_layers": 2'),
        r"InfuseNetModel: missing keys, \d+ of them, the first 'controlnet_blocks\.1\.bias'; copy",
    ),
    "fewer blocks": (
        lambda f: configured(f, '"num_single_layers": 2', '"num_single_layers": 1'),
        r"InfuseNetModel: unexpected keys, \d+ of them, the first 'controlnet_single_blocks\.1\.bias'; copy",
    ),
    "a damaged projection": (
        lambda f: (f / "image_proj_model.bin").write_bytes(b"\x80\x02not a pickle"),
        "cannot be read as tensors alone.*copy it again",
    ),
    "code": (lambda f: torch.save(_RunsCode(), f / "image_proj_model.bin"), "cannot be read as tensors alone"),
    "another file": (
        lambda f: torch.save({"ip_adapter": {}}, f / "image_proj_model.bin"),
        "got a dict of ip_adapter, must have the weights 'image_proj'; copy",
    ),
    "a bare tensor": (lambda f: torch.save(torch.zeros(1), f / "image_proj_model.bin"), "got Tensor, must have the weights"),
    "another projection": (
        lambda f: rewritten(f, lambda c: c.update(image_proj={"proj.weight": torch.zeros(2, 2)})),
        "image_proj has no tensor 'latents'; it is not the projection of a face embedding",
    ),
    "a lost tensor": (
        lambda f: rewritten(f, lambda c: c["image_proj"].pop("layers.1.0.to_kv.weight")),
        r"image_proj has no tensor 'layers\.1\.0\.to_kv\.weight'",
    ),
    "a tensor too many": (
        lambda f: rewritten(f, lambda c: c["image_proj"].update(extra=torch.zeros(1))),
        "image_proj has a tensor 'extra', which no resampler has",
    ),
    "a wrong shape": (
        lambda f: rewritten(f, lambda c: c["image_proj"].update({"norm_out.bias": torch.zeros(7)})),
        r"image_proj has 'norm_out\.bias' of shape \(7,\), must be \(32,\)",
    ),
    "odd heads": (
        lambda f: rewritten(f, lambda c: c["image_proj"].update({"layers.0.0.to_q.weight": torch.zeros(100, 32)})),
        r"layers\.0\.0\.to_q\.weight has 100 rows, must be a multiple of 64",
    ),
    "odd latents": (
        lambda f: rewritten(f, lambda c: c["image_proj"].update(latents=torch.zeros(8, 32))),
        "image_proj has latents or layers of another number of dimensions",
    ),
    "another embedding": (reprojected(embedding=768), "takes embeddings of 768 numbers, must be 512"),
    "other tokens": (
        reprojected(output=48),
        "gives tokens of 48 numbers, InfuseNetModel takes 32; copy both from one published folder",
    ),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_folder_that_is_not_infusenet_ends_in_a_sentence(folder, tmp_path, problem, capsys):
    copy = tmp_path / "weights"
    shutil.copytree(folder, copy)
    break_it, sentence = PROBLEMS[problem]
    break_it(copy)
    with pytest.raises(SetupError, match=f"(?s){sentence}"):
        load_infusenet(copy, torch.float32, "cpu")
    assert not capsys.readouterr().out


def test_a_controlnet_of_another_design_is_refused(folder, tmp_path):
    shutil.copy(folder / "image_proj_model.bin", tmp_path)
    config = {**diffusers.FluxControlNetModel.load_config(folder / "InfuseNetModel"), "num_mode": 3}
    diffusers.FluxControlNetModel.from_config(config).save_pretrained(tmp_path / "InfuseNetModel")
    with pytest.raises(SetupError, match="of another design, with control modes or hints; not InfuseNet"):
        load_infusenet(tmp_path, torch.float32, "cpu")


def test_an_infusenet_for_another_flux_is_refused(injector, folder, tmp_path):
    shutil.copy(folder / "image_proj_model.bin", tmp_path)
    config = {**diffusers.FluxControlNetModel.load_config(folder / "InfuseNetModel"), "pooled_projection_dim": 48}
    diffusers.FluxControlNetModel.from_config(config).save_pretrained(tmp_path / "InfuseNetModel")
    with pytest.raises(SetupError, match="pooled_projection_dim is 48, the profile's FLUX weights have 32; use one that was"):
        InfuseNetInjector(injector.model, tmp_path)


def test_a_default_that_one_configuration_spells_out_and_the_other_does_not_is_the_same(tmp_path):
    with torch.device("meta"):
        flux = diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1)
        net = IdentityControlNet(num_layers=1, num_single_layers=1)
    require_same(net.config, flux.config, MUST_AGREE, tmp_path, "FLUX")
