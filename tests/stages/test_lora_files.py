"""LoRAs in the names of the programs that train them: the same factors under each name, or a refusal with the reason."""

import re

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from vidgen_ray.errors import StageError
from vidgen_ray.nets.lora_files import check_lora_file
from vidgen_ray.shot import LocalLora
from vidgen_ray.stages.lora import LoraAdapters
from vidgen_ray.system.cache_dir import digest
from vidgen_ray.weights import resolve

RANK, ALPHA = 4, 2.0
KOHYA, PEFT = ("lora_down", "lora_up"), ("lora_A", "lora_B")


def tensors(layers, factors=PEFT, form="{}", *, alpha=False, end="weight"):
    """Return the tensors of a LoRA. `layers`: name of each -> (inputs, outputs). `form`: how the program writes the name."""
    found = {}
    for layer, (inputs, outputs) in layers.items():
        generator = torch.Generator().manual_seed(inputs + outputs)
        name = form.format(layer.replace(".", "_") if form.endswith("_{}") else layer)
        # A program with alpha has factors that are larger by as much as the scale makes them smaller.
        down = torch.randn(RANK, inputs, generator=generator) * (RANK / ALPHA if alpha else 1)
        found[f"{name}.{factors[0]}.{end}"] = down
        found[f"{name}.{factors[1]}.{end}"] = torch.randn(outputs, RANK, generator=generator)
        if alpha:
            found[f"{name}.alpha"] = torch.tensor(ALPHA)
    return found


def with_xlabs_names(layers):
    """Return a LoRA in the names of XLabs. `layers`: as in `tensors`."""
    names = {"double_blocks.0.img_attn.qkv": "qkv_lora1", "double_blocks.0.img_attn.proj": "proj_lora1"}
    of_xlabs = {f"double_blocks.0.processor.{names[layer]}": size for layer, size in layers.items()}
    return {re.sub(r"lora_(down|up)", r"\1", key): each for key, each in tensors(of_xlabs, KOHYA).items()}


def loaded(pipe, path, model):
    """Return what a LoRA adds to each layer, and the notes about the file."""
    adapters = LoraAdapters(pipe, 1, model)
    with adapters.active([LocalLora(path=str(path), weight=1.0, sha256=digest(path))]):
        parts = {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder}
        found = {
            f"{part}.{name}": factor.weight @ layer.lora_A[adapter].weight * layer.scaling[adapter]
            for part, network in parts.items()
            for name, layer in network.named_modules()
            for adapter, factor in getattr(layer, "lora_B", {}).items()
        }
        notes = adapters.take_notes()
    pipe.unload_lora_weights()
    return found, " ".join(notes)


@pytest.fixture(scope="module", params=["flux", "klein", "wan"])
def model(request):
    """Name, pipeline, layers in the names of the authors' code with their sizes, and one in diffusers' names."""
    classes = {
        "flux": diffusers.FluxPipeline,
        "klein": diffusers.Flux2KleinPipeline,
        "wan": diffusers.WanImageToVideoPipeline,
    }
    pipe = classes[request.param].from_pretrained(resolve(f"builtin:tiny/{request.param}"))
    width = pipe.transformer.config.num_attention_heads * pipe.transformer.config.attention_head_dim
    if request.param == "wan":
        layers = {f"blocks.1.{part}": (width, width) for part in ("self_attn.q", "cross_attn.o")}
        return request.param, pipe, layers, {"blocks.1.attn1.to_q": (width, width)}
    layers = {"double_blocks.0.img_attn.qkv": (width, 3 * width), "double_blocks.0.img_attn.proj": (width, width)}
    return request.param, pipe, layers, {"transformer_blocks.0.attn.to_q": (width, width)}


def test_names_of_all_programs_give_the_same_lora(tmp_path, model):
    name, pipe, layers, _ = model
    files = {
        "kohya": tensors(layers, KOHYA, "lora_unet_{}", alpha=True),
        "ComfyUI": tensors(layers, KOHYA, "diffusion_model.{}", alpha=True),
        "ai-toolkit": tensors(layers, PEFT, "diffusion_model.{}"),
        "fal": tensors(layers, PEFT, "base_model.model.{}"),
        "names of the authors' code": tensors(layers, PEFT),
        "lightx2v": tensors(layers, KOHYA),
        "DiffSynth": tensors(layers, PEFT, "pipe.dit.{}", end="default.weight"),
        "SimpleTuner": tensors(layers, PEFT, "transformer.{}"),
    }
    if name == "flux":
        files["XLabs"] = with_xlabs_names(layers)
    results = {}
    for program, content in files.items():
        path = tmp_path / f"{program}.safetensors"
        save_file(content, path)
        check_lora_file(path, "wan" if name == "wan" else "FLUX.1")
        results[program], notes = loaded(pipe, path, name)
        assert not notes, program
    reference = results["kohya"]
    assert len(reference) == (2 if name == "wan" else 4)
    for program, result in results.items():
        assert result.keys() == reference.keys(), program
        # kohya's scale is in one factor, or in both.
        torch.testing.assert_close(result, reference, msg=program)


def test_names_of_diffusers_are_read_with_and_without_a_prefix(tmp_path, model):
    name, pipe, _, layers = model
    forms = ("transformer.{}", "{}", "base_model.model.{}", "diffusion_model.{}")
    results = []
    for number, form in enumerate(forms):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors(layers, PEFT, form), path)
        check_lora_file(path, "wan" if name == "wan" else "FLUX.1")
        results.append(loaded(pipe, path, name)[0])
    assert len(results[0]) == 1
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def clip_layers(pipe, form):
    """Return the layers of CLIP that sd-scripts trains, in its names."""
    width, inner = pipe.text_encoder.config.hidden_size, pipe.text_encoder.config.intermediate_size
    attention = {f"self_attn.{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
    own = {**attention, "mlp.fc1": (width, inner), "mlp.fc2": (inner, width)}
    return tensors({f"text_model.encoder.layers.0.{layer}": size for layer, size in own.items()}, KOHYA, form, alpha=True)


@pytest.mark.parametrize("model", ["flux"], indirect=True)
def test_flux_lora_with_layers_of_text_encoders_is_loaded(tmp_path, model):
    """FluxGym and sd-scripts train CLIP, too. T5 cannot be changed, which is said."""
    _, pipe, layers, of_diffusers = model
    t5 = {"encoder.block.0.layer.0.SelfAttention.q": (8, 8)}
    files = {
        "FluxGym": (tensors(layers, KOHYA, "lora_unet_{}", alpha=True), "lora_te3_{}", 4),
        "OneTrainer": (tensors(of_diffusers, KOHYA, "lora_transformer_{}", alpha=True), "lora_te2_{}", 1),
    }
    for program, (own, form_of_t5, count) in files.items():
        path = tmp_path / f"{program}.safetensors"
        save_file({**own, **clip_layers(pipe, "lora_te1_{}"), **tensors(t5, KOHYA, form_of_t5, alpha=True)}, path)
        check_lora_file(path)
        added, notes = loaded(pipe, path, "FLUX")
        assert sum(layer.startswith("transformer.") for layer in added) == count, program
        assert sum(layer.startswith("text_encoder.") for layer in added) == 6, program
        assert "1 of its layers are ignored" in notes
        assert "SelfAttention_q" in notes


def test_unknown_layer_is_left_out_with_a_note(tmp_path, model):
    name, pipe, layers, of_diffusers = model
    forms = [("lora_unet_{}", KOHYA, layers), ("diffusion_model.{}", PEFT, layers), ("transformer.{}", PEFT, of_diffusers)]
    for number, (form, factors, own) in enumerate(forms):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors(own, factors, form), path)
        expected, _ = loaded(pipe, path, name)
        save_file(tensors({**own, "other.layer": (8, 8)}, factors, form), path)
        added, notes = loaded(pipe, path, name)
        assert added.keys() == expected.keys()
        assert "1 of its layers are ignored" in notes
        assert "other" in notes


LAYER = {"single_transformer_blocks.0.attn.to_k": (8, 8)}
FLUX_LORA = tensors(LAYER, PEFT, "transformer.{}")
SDXL = tensors({"down_blocks.0.attn": (8, 8)}, KOHYA, "lora_unet_{}")
WAN = tensors({"blocks.0.self_attn.q": (8, 8)}, PEFT, "diffusion_model.{}")


@pytest.mark.parametrize(
    ("content", "base_model", "message"),
    [
        (
            {**FLUX_LORA, **SDXL},
            "FLUX.1",
            "has layers of FLUX.1 and of Stable Diffusion or SDXL, must have those of FLUX.1 only",
        ),
        ({**FLUX_LORA, **WAN}, "FLUX.1", "has layers of FLUX.1 and of Wan, must have those of FLUX.1 only"),
        (WAN, "FLUX.1", "was trained for Wan, must be for FLUX.1"),
        (FLUX_LORA, "wan", "was trained for FLUX.1, must be for wan"),
        (SDXL, "wan", "was trained for Stable Diffusion or SDXL, must be for wan"),
        ({**SDXL, **tensors(LAYER, KOHYA, "lora_te1_{}")}, "FLUX.1", "was trained for Stable Diffusion or SDXL"),
        (tensors(LAYER, KOHYA, "lora_te1_{}"), "FLUX.1", "has layers of text encoders only"),
        (
            {key: each[:0] if "lora_A" in key else each[:, :0] for key, each in FLUX_LORA.items()},
            "FLUX.1",
            "has rank 0, must be",
        ),
        ({"lycoris_a.lokr_w1": torch.ones(2, 2), "lycoris_a.lokr_w2": torch.ones(2, 2)}, "FLUX.1", "is a LoKr, must be a LoRA"),
        ({**FLUX_LORA, "transformer.a.dora_scale": torch.ones(8, 1)}, "FLUX.1", "is a DoRA, must be a LoRA"),
        ({**FLUX_LORA, "transformer.a.lora_magnitude_vector": torch.ones(8)}, "FLUX.1", "is a DoRA, must be a LoRA"),
    ],
)
def test_lora_is_refused_with_the_reason(tmp_path, content, base_model, message):
    path = tmp_path / "a.safetensors"
    save_file({key: each.contiguous() for key, each in content.items()}, path)
    with pytest.raises(StageError, match=re.escape(message)):
        check_lora_file(path, base_model)
