"""Speed and memory options of FLUX: prompt cache, text encoder, step caches, quantisation, merged LoRAs."""

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vidgen_ray.errors import SetupError
from vidgen_ray.stages import quantization
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.flux import FluxStage
from vidgen_ray.stages.flux_lora import FluxLoRAStage
from vidgen_ray.stages.flux_model import FluxModel, FluxParams
from vidgen_ray.stages.instantid import InstantIDStage
from vidgen_ray.stages.prompt_cache import PromptCache
from vidgen_ray.stages.quantization import load_quantized
from vidgen_ray.weights import resolve

LORA = resolve("builtin:tiny/lora.safetensors")


def flux_params(tiny, **options):
    return FluxParams.model_validate({**dict(tiny.params(FluxStage)), **options})


def image_of(stage, shot, **artefacts):
    return stage([Item(shot, artefacts)])[0]["image"]


@pytest.fixture(scope="module")
def plain(tiny):
    with FluxStage(tiny.params(FluxStage)) as stage:
        yield stage


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    """A cache folder with nothing in it but the built weights."""
    weights = resolve("builtin:tiny/flux")
    monkeypatch.setenv("VIDGEN_CACHE", str(tmp_path))
    return tmp_path, weights


def test_text_encoder_that_is_not_kept_gives_the_same_image(plain, tiny, make_shot):
    shot = make_shot(negative_prompt="blurred")
    with FluxStage(flux_params(tiny, keep_text_encoder=False)) as stage:
        assert stage.model.text_to_image.text_encoder_2 is None
        assert np.array_equal(image_of(stage, shot), image_of(plain, shot))
        assert stage.model.text_to_image.text_encoder_2 is None


def test_stored_prompts_need_no_text_encoder(plain, tiny, make_shot, cache_folder, monkeypatch):
    params = flux_params(tiny, prompt_cache_gb=1, keep_text_encoder=False)
    with FluxStage(params) as stage:
        expected = image_of(stage, make_shot())
    assert np.array_equal(expected, image_of(plain, make_shot()))
    monkeypatch.setattr(FluxModel, "_load_t5", lambda self: pytest.fail("the text encoder is loaded"))
    with FluxStage(params) as stage:
        assert np.array_equal(image_of(stage, make_shot()), expected)
        with pytest.raises(pytest.fail.Exception, match="the text encoder is loaded"):
            image_of(stage, make_shot(prompt="another prompt"))


def test_prompt_cache_deletes_the_least_recently_used_and_replaces_damaged_files(tmp_path):
    tensor = torch.arange(256, dtype=torch.bfloat16)
    size = 512 + 200
    cache = PromptCache(tmp_path, 3 * size)
    for prompt in "abc":
        cache.put([prompt], (tensor, tensor[:1].clone()))
        assert cache.get([prompt]) is not None
    cache.get(["a"])
    cache.put(["d"], (tensor, tensor[:1].clone()))
    kept = {prompt for prompt in "abcd" if cache.get([prompt]) is not None}
    assert "a" in kept
    assert "b" not in kept
    (first, second) = cache.get(["a"])
    assert torch.equal(first, tensor)
    assert torch.equal(second, tensor[:1])
    for file in tmp_path.iterdir():
        file.write_bytes(b"damaged")
    assert cache.get(["a"]) is None


@pytest.fixture(scope="module")
def face(tiny, photo):
    with InstantIDStage(tiny.params(InstantIDStage)) as stage:
        return stage.features([photo])


def transformer_calls(stage, index):
    """Return a list that grows with each call of a block of the transformer."""
    calls = []
    stage.model.text_to_image.transformer.single_transformer_blocks[index].attn.to_q.register_forward_hook(
        lambda *_: calls.append(1)
    )
    return calls


@pytest.mark.parametrize(
    "options",
    [
        {"step_cache": "first_block", "step_cache_threshold": 10.0},
        {"step_cache": "magcache", "step_cache_threshold": 10.0},
        {"step_cache": "taylorseer"},
    ],
    ids=lambda options: options["step_cache"],
)
def test_step_cache_skips_blocks_and_starts_fresh_for_each_shot(plain, tiny, make_shot, options):
    steps = {"steps": {"flux": 8, "lora": 8}}
    params = flux_params(tiny, **options)
    flux, lora = FluxStage(params), FluxLoRAStage(params)
    with flux, lora:
        calls = transformer_calls(flux, 0)
        image = image_of(flux, make_shot(**steps))
        assert 0 < len(calls) < 8
        assert not np.array_equal(image, image_of(plain, make_shot(**steps))), "an approximation"
        # FluxImg2ImgPipeline names no passes, and a negative prompt has two per step.
        image_of(lora, make_shot(lora=[str(LORA)], negative_prompt="blurred", **steps), image=image)
        assert np.array_equal(image_of(flux, make_shot(**steps)), image)


@pytest.mark.parametrize("name", ["first_block", "magcache"])
def test_step_cache_that_skips_blocks_is_paused_for_faces(plain, tiny, make_shot, face, name):
    """The residuals of InfuseNet are part of the cached result, and would be added again between the skipped blocks."""
    shot = make_shot(face_image="x.jpg", steps={"flux": 6})
    with FluxStage(flux_params(tiny, step_cache=name, step_cache_threshold=10.0)) as stage:
        calls = transformer_calls(stage, 0)
        assert np.array_equal(image_of(stage, shot, face=face), image_of(plain, shot, face=face))
        assert len(calls) == 6


def test_cancelled_shot_does_not_change_the_next_one(tiny, make_shot):
    from vidgen_ray.errors import Cancelled
    from vidgen_ray.stages.progress import progress_callback

    def cancel(stage, done, steps):
        if done == 3:
            raise Cancelled

    shot = make_shot(steps={"flux": 8})
    with FluxStage(flux_params(tiny, step_cache="first_block", step_cache_threshold=10.0)) as stage:
        expected = image_of(stage, shot)
        with pytest.raises(Cancelled), progress_callback(cancel):
            image_of(stage, make_shot(steps={"flux": 8}, prompt="another"))
        assert np.array_equal(image_of(stage, shot), expected)


def test_weights_stored_in_fp8_are_computed_in_the_dtype(plain, tiny, make_shot, face):
    shot = make_shot(face_image="x.jpg")
    with FluxStage(flux_params(tiny, quantize="fp8_storage")) as stage:
        weights = stage.model.text_to_image.transformer.single_transformer_blocks[0].proj_mlp.weight
        assert weights.dtype == torch.float8_e4m3fn
        image = image_of(stage, shot, face=face)
        with FluxLoRAStage(stage.params) as lora:
            assert not np.array_equal(image_of(lora, make_shot(lora=[str(LORA)]), image=image), image)
    difference = np.abs(image.astype(int) - image_of(plain, shot, face=face))
    assert 0 < difference.mean() < 8


@pytest.mark.parametrize(("name", "package"), [("fp8", "torchao"), ("int8_weights", "torchao"), ("nf4", "bitsandbytes")])
def test_quantisation_names_the_package_that_is_missing(tiny, monkeypatch, name, package):
    found = importlib.util.find_spec
    monkeypatch.setattr("vidgen_ray.stages.quantization.find_spec", lambda module: None if module == package else found(module))
    with pytest.raises(SetupError, match=rf"quantize: {name} needs the package {package}; pip install 'vidgen-ray\[quant"):
        FluxStage(flux_params(tiny, quantize=name)).load()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("name", ["fp8", "nf4"])
def test_quantisation_names_the_gpu_that_is_missing(tiny, monkeypatch, name):
    monkeypatch.setattr("vidgen_ray.stages.quantization.find_spec", lambda module: "installed")
    with pytest.raises(SetupError, match=rf"quantize: {name} needs an NVIDIA GPU of .* use fp8_storage or int8_weights"):
        FluxStage(flux_params(tiny, quantize=name)).load()


def test_nf4_is_passed_to_diffusers(tmp_path, monkeypatch):
    """Checks the configuration only: diffusers refuses to load weights with bitsandbytes without a GPU."""
    import diffusers

    monkeypatch.setattr(quantization, "find_spec", lambda module: "installed")
    monkeypatch.setattr(quantization, "_has_gpu", lambda: True)
    monkeypatch.setattr(diffusers, "BitsAndBytesConfig", lambda **options: options)
    model_class = SimpleNamespace(from_pretrained=lambda folder, **options: (folder, options))
    folder, options = load_quantized(model_class, tmp_path, "nf4", torch.bfloat16)
    assert folder == str(tmp_path)
    expected = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    assert options["quantization_config"] == expected
    assert options["dtype"] == torch.bfloat16
    assert options["local_files_only"]
    assert options["use_safetensors"]


@pytest.mark.parametrize("name", ["int8_weights", "fp8_weights", "nf4"])
def test_quantised_weights_take_loras_and_faces(plain, tiny, make_shot, face, name):
    pytest.importorskip(quantization.PACKAGES[name])
    if name == "nf4" and not torch.cuda.is_available():
        pytest.skip("diffusers uses bitsandbytes on GPUs only")
    params = flux_params(tiny, quantize=name, dtype="bfloat16")
    flux, lora = FluxStage(params), FluxLoRAStage(params)
    shot = make_shot(face_image="x.jpg", lora=[str(LORA)])
    with flux, lora:
        image = image_of(flux, shot, face=face)
        refined = image_of(lora, shot, image=image, face=face)
    difference = np.abs(image.astype(int) - image_of(plain, shot, face=face))
    assert 0 < difference.mean() < 8
    assert not np.array_equal(refined, image)


def test_transformer_can_be_replaced_and_is_part_of_the_key(plain, tiny, make_shot, tmp_path):
    folder = resolve("builtin:tiny/flux-schnell") / "transformer"
    params = flux_params(tiny, extra_weights={"transformer": folder})
    assert FluxStage.weight_files(params, make_shot()) == (params.weights, folder)
    with FluxStage(params) as stage:
        assert stage.model.is_schnell
        assert not np.array_equal(image_of(stage, make_shot()), image_of(plain, make_shot()))
    with pytest.raises(SetupError, match=r"must be a \.gguf file, or a folder with a config\.json"):
        FluxStage(flux_params(tiny, extra_weights={"transformer": tmp_path})).load()
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "nunchaku_lite"}}')
    with pytest.raises(SetupError, match="weights of nunchaku are not supported"):
        FluxStage(flux_params(tiny, extra_weights={"transformer": tmp_path})).load()


def test_few_step_lora_is_merged_into_the_weights(plain, tiny, make_shot):
    params = flux_params(tiny, extra_weights={"few_step_lora": LORA})
    with FluxStage(params) as stage:
        assert not stage.model.text_to_image.get_list_adapters()
        assert not np.array_equal(image_of(stage, make_shot()), image_of(plain, make_shot()))


def test_profiles_with_other_options_share_no_model(tiny):
    with FluxStage(flux_params(tiny)) as one, FluxStage(flux_params(tiny, quantize="fp8_storage")) as other:
        assert one.model is not other.model
        with FluxLoRAStage(flux_params(tiny)) as same:
            assert one.model is same.model
