"""Options that make diffusion models faster or smaller, each compared with the plain stage.

Results are equal to the bit where the option is off: the same kernels run in the same order.
"""

import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch._dynamo
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from tests.fake_stages import with_actor
from tests.stages.conftest import PASSING
from tests.stages.test_parity import gradient_image, levels_apart
from vidgen_ray.bench.bench_command import random_models, with_random_weights
from vidgen_ray.bench.tiny_networks import write_random_lora
from vidgen_ray.content_keys import with_local_loras
from vidgen_ray.errors import SetupError
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.planner import speed_trials
from vidgen_ray.planner.choose_layout import compilations
from vidgen_ray.planner.demand import demand_of, demand_seconds
from vidgen_ray.planner.speed_trials import Trial, invented_item, run_once, try_option
from vidgen_ray.profile import load_profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages import flux_model, identity, loading, speed
from vidgen_ray.stages.base import RECOMPILE_LIMIT, Item, pixels_to_uint8
from vidgen_ray.stages.flux import FluxLoRAStage, FluxStage
from vidgen_ray.stages.qwen_edit import QwenEditStage
from vidgen_ray.stages.realesrgan import RealESRGANStage
from vidgen_ray.stages.svd import SVDStage
from vidgen_ray.stages.wan import WanStage
from vidgen_ray.weights import resolve

LORA = resolve("builtin:tiny/lora.safetensors")
ROUNDING_LEVELS = 1
"""Largest difference, in levels of 255, of an option that changes nothing but the rounding."""
SIZES = ((128, 64), (64, 64), (128, 128))
"""Width and height of images."""


def with_options(stage_class, profile, **options):
    return stage_class(type(profile.params(stage_class)).model_validate({**dict(profile.params(stage_class)), **options}))


def image_of(stage, shot, **artefacts):
    return stage(Item(shot, artefacts))["image"]


@pytest.fixture(scope="module")
def plain(tiny):
    with FluxStage(tiny.params(FluxStage)) as stage:
        yield stage


def test_exact_options_change_only_the_rounding(tiny, make_shot):
    item = Item(make_shot(width=64, num_frames=4, steps={"svd": 2}), {"image": gradient_image(64, 64)})
    with SVDStage(tiny.params(SVDStage)) as stage:
        clip = stage(item)["frames"]
    for options in ({"channels_last": True}, {"attention_backend": "_native_math"}):
        with with_options(SVDStage, tiny, **options) as stage:
            assert levels_apart(stage(item)["frames"], clip) <= ROUNDING_LEVELS, options


# Guidance in a part of the steps

INTERVAL, STEPS = (0.0, 0.6), 5
GUIDED = [2, 2, 2, 1, 1]
"""Passes of each step."""


def clip_and_passes(stage, item):
    """Return the clip, and the number of passes of each call of the network."""
    passes = []
    counted = stage.pipe.unet.conv_in.register_forward_pre_hook(lambda _, inputs: passes.append(len(inputs[0])))
    with counted:
        return stage(item)["frames"], [number // item.shot.num_frames for number in passes]


def test_guidance_interval_leaves_one_pass_to_the_other_steps(tiny, make_shot):
    item = Item(make_shot(width=64, num_frames=2, steps={"svd": STEPS}), {"image": gradient_image(64, 64)})
    with with_options(SVDStage, tiny) as stage, with_options(SVDStage, tiny, guidance_interval=INTERVAL) as in_interval:
        expected, passes = clip_and_passes(stage, item)
        assert passes == [2] * STEPS
        clip, passes = clip_and_passes(in_interval, item)
        assert passes == GUIDED
        assert not np.array_equal(clip, expected)
        in_interval.params = in_interval.params.model_copy(update={"forward_chunking": True})
        assert levels_apart(in_interval(item)["frames"], clip) <= ROUNDING_LEVELS
    for same in ({"guidance_interval": [0, 1]}, {"guidance_interval": [0.05, 0.95]}):
        with with_options(SVDStage, tiny, **same) as stage:
            assert np.array_equal(stage(item)["frames"], expected), same


def test_step_without_guidance_is_that_of_a_clip_without_it(tiny, make_shot):
    item = Item(make_shot(width=64, num_frames=2, steps={"svd": 4}), {"image": gradient_image(64, 64)})
    unguided = Item(
        item.shot.model_copy(update={"guidance": item.shot.guidance.model_copy(update={"svd": 1.0})}), item.artefacts
    )
    with with_options(SVDStage, tiny, guidance_interval=(0.0, 0.01)) as stage:
        clip, passes = clip_and_passes(stage, item)
        assert passes == [1] * 4
        assert levels_apart(clip, stage(unguided)["frames"]) <= ROUNDING_LEVELS


@pytest.mark.parametrize("interval", [[0.6, 0.6], [0.6, 0.2], [-0.1, 0.5], [0, 1.1], [0]])
def test_wrong_interval_is_refused(tiny, interval):
    with pytest.raises(ValueError, match="guidance_interval"):
        with_options(SVDStage, tiny, guidance_interval=interval)


def test_default_interval_is_not_part_of_keys(tiny):
    params = tiny.params(SVDStage)
    assert "guidance_interval" not in params.for_key()
    assert params.model_copy(update={"guidance_interval": INTERVAL}).for_key()["guidance_interval"] == [0.0, 0.6]


def test_plan_counts_the_passes_of_an_interval():
    profile = load_profile("gpu-80gb")
    demand = demand_of([Shot(prompt="a")])

    def seconds(gpus=1, **options):
        return demand_seconds(profile.with_options({"svd": options}), SVDStage, demand, {}, None, gpus)

    whole, part = seconds(), seconds(guidance_interval=[0, 0.6])
    assert 0.2 * 0.9 < 1 - part / whole < 0.2
    compiled = profile.with_options({"svd": {"compile": True}})
    in_interval = compiled.with_options({"svd": {"guidance_interval": [0, 0.6]}})
    assert [compilations(each, demand) for each in (profile, compiled, in_interval)] == [0, 1, 2]
    # A group computes both passes of a step at once.
    assert seconds(2, guidance_interval=[0, 0.6]) == pytest.approx(seconds(2))


# Compilation


@pytest.mark.slow
def test_compiled_flux_recompiles_once_for_other_sizes_with_and_without_faces(tiny, make_shot, face, counter):
    compiled = []
    with with_options(FluxStage, tiny, compile=True) as stage:
        for width, height in SIZES:
            fields = {"width": width, "height": height, "steps": {"flux": 1}}
            image_of(stage, make_shot(**fields))
            image_of(stage, make_shot(face_image="x.jpg", negative_prompt="blurred", **fields), face=face)
            compiled.append(counter.frame_count)
    assert 0 < compiled[0] < compiled[1] == compiled[2]
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["klein", "hunyuan", "wan", "ltx"])
def test_compiled_blocks_and_attention_backends_change_only_the_rounding(tiny, make_shot, counter, name):
    stage_class, shot = STAGE_BY_NAME[name], make_shot(**PASSING[name], steps={name: 2})
    item = Item(shot, {"image": gradient_image()})
    with with_options(stage_class, tiny) as plain:
        expected = plain(item)[plain.writes[0]]
    with with_options(stage_class, tiny, compile=True, attention_backend="_native_math") as fast:
        assert levels_apart(fast(item)[fast.writes[0]], expected) <= ROUNDING_LEVELS
    assert counter.frame_count > 0


@pytest.mark.slow
def test_compiled_flux_swaps_loras_of_the_same_layers_without_compiling_again(tiny, make_shot, counter, tmp_path):
    files = []
    with with_options(FluxStage, tiny) as plain, with_options(FluxStage, tiny, compile=True) as stage:

        def compare(file, *, weight=1.0, size=SIZES[0]):
            lora = [{"path": str(file), "weight": weight}] if file else []
            shot = make_shot(mode="fast", lora=lora, width=size[0], height=size[1], steps={"flux": 1})
            assert levels_apart(image_of(stage, shot), image_of(plain, shot)) <= ROUNDING_LEVELS, file
            return counter.frame_count

        for n, rank in enumerate((16, 4, 8, 16)):
            files.append(tmp_path / f"{n}.safetensors")
            write_random_lora(plain.model.text_to_image.transformer, files[-1], n, rank=rank)
        compiled = [compare(file, weight=1 - 0.1 * n, size=SIZES[n % 3]) for n, file in enumerate(files)]
        assert compiled[1] == compiled[-1], "one compilation for the first size, and one for all others"
        # Other layers: one more compilation, and the layers of the LoRA before have no effect.
        tensors = load_file(files[0])
        fewer = tmp_path / "fewer.safetensors"
        save_file({key: value for key, value in tensors.items() if "to_out" not in key}, fewer)
        for file in (fewer, files[0], None):
            compare(file)


@pytest.mark.slow
def test_planned_compilations_are_at_least_those_that_happen(tiny, make_shot, counter, face, tmp_path):
    profile = with_actor(tiny, "flux", options={**tiny.actors["flux"].options, "compile": True})
    file = tmp_path / "lora.safetensors"
    with FluxStage(profile.params(FluxStage)) as stage:
        write_random_lora(stage.model.text_to_image.transformer, file, 0, rank=16)

    def counted(**fields):
        """Return the planned compilations and the compiled graphs of shots without and with LoRAs."""
        torch._dynamo.reset()
        counter.frame_count = 0
        sizes = [{"width": width, "height": height} for width, height in fields.pop("sizes")]
        loras = [[{"path": str(file)}] * number for number in fields.pop("loras")]
        shots = [make_shot(mode="fast", steps={"flux": 1}, lora=lora, **size, **fields) for size in sizes for lora in loras]
        with FluxStage(profile.params(FluxStage)) as stage:
            for shot in (*shots, *shots):
                image_of(stage, with_local_loras(shot), face=face)
        return compilations(profile, demand_of(shots)), counter.frame_count

    assert compilations(tiny, demand_of([make_shot()])) == 0
    one, graphs = counted(sizes=SIZES[:1], loras=(0,))
    assert one == 1
    times, compiled = counted(sizes=SIZES, loras=(0, 1))
    assert times == 5
    assert 0.6 * times <= compiled / graphs <= times


def test_calls_in_any_thread_may_compile_many_variants(tiny, make_shot, counter, monkeypatch):
    """Ray runs the calls of an actor in several threads, and torch has one limit per thread."""
    limits = []

    def record(self, *arguments):
        limits.append(torch._dynamo.config.recompile_limit)
        return {}

    monkeypatch.setattr(FluxStage, "run", record)
    monkeypatch.setattr(RealESRGANStage, "_run_clip", record)
    frames = np.zeros((1, 64, 64, 3), np.uint8)
    with ThreadPoolExecutor(1) as other, with_options(FluxStage, tiny, compile=True) as stage:
        for run in (lambda call: call(), lambda call: other.submit(call).result()):
            run(lambda: stage(Item(make_shot())))
            run(lambda: RealESRGANStage(tiny.params(RealESRGANStage)).run_chunk(make_shot(), frames))
    assert limits == [RECOMPILE_LIMIT] * 4


COMPILED_TWICE = """
import sys, torch, torch._dynamo
if len(sys.argv) > 1:
    torch.__version__ = torch.torch_version.TorchVersion(sys.argv[1])
from vidgen_ray.stages.speed import compile_blocks

class Block(torch.nn.Linear):
    def forward(self, x):
        return torch.nn.functional.gelu(super().forward(x))

block, x = Block(8, 8), torch.randn(2, 8)
with torch.inference_mode():
    expected = block(x)
    compile_blocks(block, "cpu", ("Block",))
    assert torch.allclose(block(x), expected, atol=1e-5)
counters = torch._dynamo.utils.counters["inductor"]
print(counters["fxgraph_cache_hit"], counters["fxgraph_cache_miss"])
"""


@pytest.mark.slow
def test_code_that_another_torch_has_compiled_is_not_used(tmp_path):
    if (missing := speed.missing_compiler("cpu")) is not None:
        pytest.skip(f"needs {missing}")

    def hits_and_misses(*version):
        command = [sys.executable, "-c", COMPILED_TWICE, *version]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()

    assert hits_and_misses() == ["0", "1"]
    assert hits_and_misses() == ["1", "0"]
    assert hits_and_misses("2.10.0") == ["0", "1"]
    for entry in (tmp_path / "inductor" / "fxgraph").rglob("*"):
        if entry.is_file():
            entry.write_bytes(b"of another torch")
    assert hits_and_misses()[0] == "0"


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_options_name_what_is_missing(tiny, monkeypatch):
    for found, message in (
        (None, r"package torchao; pip install 'torchao"),
        ("found", "NVIDIA GPU .* use fp8_storage"),
    ):
        monkeypatch.setattr(speed, "find_spec", lambda _, found=found: found)
        with pytest.raises(SetupError, match=f"quantize: fp8 needs .*{message}"):
            with_options(FluxStage, tiny, quantize="fp8").load()
    monkeypatch.setenv("CXX", "no-such-compiler")
    for stage_class, options, message in (
        (FluxStage, {"attention_backend": "flash_hub"}, "'flash_hub', which downloads code"),
        (SVDStage, {"attention_backend": "sage"}, r"attention_backend: .*'sage'"),
        (FluxStage, {"attention_backend": "sage"}, "attention_backend: 'sage' cannot be used .*sageattention>=2"),
        (SVDStage, {"compile": True}, r"compile: needs a C\+\+ compiler"),
    ):
        with pytest.raises(SetupError, match=message):
            with_options(stage_class, tiny, **options).load()


def test_fp8_quantizes_also_random_weights(tiny, monkeypatch):
    """Measurements with random weights are those of fp8."""
    quantized = fp8_networks(monkeypatch)
    with with_random_weights(tiny, random_models(tiny)) as profile, with_options(FluxStage, profile, quantize="fp8") as stage:
        assert quantized == [stage.model.text_to_image.transformer]


def test_fp8_quantizes_infusenet(tiny, monkeypatch):
    quantized = fp8_networks(monkeypatch)
    with with_options(FluxStage, tiny, quantize="fp8") as stage:
        assert quantized[1:] == []
        injector = stage._injector("infusenet")
        assert quantized[1:] == [injector.infusenet.net]


def fp8_networks(monkeypatch):
    """Return a list that gets the networks that would be quantised."""
    quantized = []
    monkeypatch.setattr(loading, "require_fp8", lambda params: None)
    for module in (flux_model, identity, loading):
        monkeypatch.setattr(module, "compute_in_fp8", lambda network, device: quantized.append(network))
    return quantized


@pytest.mark.parametrize("stage_class", [WanStage, QwenEditStage])
def test_fp8_quantizes_all_transformers_of_a_pipeline(tiny, monkeypatch, stage_class):
    quantized = fp8_networks(monkeypatch)
    with with_options(stage_class, tiny, quantize="fp8") as stage:
        transformers = [stage.pipe.components.get(name) for name in ("transformer", "transformer_2")]
        assert quantized == [*filter(None, transformers)]


@pytest.fixture
def torchao_on_a_cpu(monkeypatch):
    torchao = pytest.importorskip("torchao.quantization")
    monkeypatch.setattr(torchao.quant_api, "_check_hardware_support", lambda granularity: None)
    monkeypatch.setattr(loading, "require_fp8", lambda params: None)


@pytest.fixture
def fp8_products_on_a_cpu(torchao_on_a_cpu):
    columns, rows = torch.ones(16, 32).to(torch.float8_e4m3fn), torch.ones(32, 16).to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(columns, rows.t().contiguous().t(), torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("this version of torch computes fp8 with a scale per row on GPUs only")


def test_trial_accepts_the_difference_of_fp8(tiny, make_shot, monkeypatch, fp8_products_on_a_cpu):
    monkeypatch.setattr(speed_trials, "MIN_SPEEDUP", 0.0)
    name = "qwen_edit"
    actors = {**tiny.actors, name: tiny.actors[name].model_copy(update={"dtype": "bfloat16"})}
    trial = Trial(tiny.model_copy(update={"actors": actors}), name, "quantize", "fp8")
    result = try_option(trial, [(name, make_shot(**PASSING[name]))])
    assert not result.rejected
    assert result.loss is not None
    assert result.limit is not None
    assert result.limit.psnr_db < result.loss.psnr_db < math.inf


def test_wan_computes_its_blocks_in_fp8(fp8_products_on_a_cpu):
    # torchao leaves sizes that are not multiples of 16, as those of the tiny weights.
    config = WanTransformer3DModel.load_config(resolve("builtin:tiny/wan") / "transformer")
    torch.manual_seed(0)
    network = WanTransformer3DModel.from_config({**config, "attention_head_dim": 16, "ffn_dim": 64}).to(torch.bfloat16).eval()
    inputs = torch.randn(1, config["in_channels"], 2, 8, 8), torch.tensor([500.0]), torch.randn(1, 8, config["text_dim"])
    with torch.no_grad():
        plain = network(*(each.bfloat16() for each in inputs))[0].float()
        speed.compute_in_fp8(network, "cpu")
        computed = network(*(each.bfloat16() for each in inputs))[0].float()
    linear = {name: layer for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)}
    assert {name for name, layer in linear.items() if hasattr(layer.weight, "scale")} == {n for n in linear if "blocks." in n}
    assert 0.001 < (computed - plain).norm() / plain.norm() < speed_trials.MAX_DIFFERENCE_FP8


@pytest.mark.parametrize("identity", ["none", "infusenet"])
def test_graphs_of_the_first_size_have_no_variable_sizes(tiny, make_shot, monkeypatch, identity):
    """InfuseNet's blocks are those of FLUX, with another number of text tokens."""
    variable = []

    def backend(graph, inputs):
        variable.append(sum(isinstance(each, torch.SymInt) for each in inputs))
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(speed, "COMPILE_BACKEND", backend)
    shot = make_shot(width=64, face_image="x.jpg", identity=identity)
    with with_options(FluxStage, tiny, compile=True) as stage:
        run_once(stage, invented_item(FluxStage, shot))
    torch._dynamo.reset()
    networks = 1 if identity == "none" else 2
    # torch takes the views that the second of the blocks without text gets for tensors of variable size.
    assert (len(variable), sum(map(bool, variable))) == (3 * networks, networks)


@pytest.mark.parametrize(("capability", "scales"), [((9, 0), (128, 1)), ((10, 0), (128, 1)), ((12, 0), (1, 1))])
def test_fp8_has_the_scales_of_the_card_and_leaves_float32_and_the_ends(torchao_on_a_cpu, monkeypatch, capability, scales):
    monkeypatch.setattr(speed, "_capability", lambda device: capability)
    layers = [torch.nn.Linear(64, 128, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    weights = layers[0].weight.detach().clone()
    last = torch.nn.Linear(64, 128, dtype=torch.bfloat16)
    speed.compute_in_fp8(torch.nn.ModuleDict({"blocks": torch.nn.ModuleList(layers), "proj_out": last}), "cpu")
    assert type(last.weight) is torch.nn.Parameter
    assert layers[0].weight.scale.shape == scales
    assert (layers[0].weight.dequantize() - weights).abs().max() < 0.01
    assert layers[1].weight.dtype == torch.float32
    assert torch.get_float32_matmul_precision() == "highest"


def test_few_step_lora_is_merged_into_the_weights(plain, tiny, make_shot):
    with with_options(FluxStage, tiny, extra_weights={"few_step_lora": LORA}) as stage:
        assert not stage.model.text_to_image.get_list_adapters()
        assert not np.array_equal(image_of(stage, make_shot()), image_of(plain, make_shot()))


# Pixels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pixels_on_the_device_give_the_bytes_of_the_host(dtype):
    steps = torch.cat([torch.linspace(0, 1, 3 * 32 * 64 - 256), torch.arange(256) / 255])
    pixels = steps.reshape(3, 32, 64).to(dtype)
    assert np.array_equal(pixels_to_uint8(pixels), (pixels.permute(1, 2, 0).float().numpy() * 255).round())
    assert pixels_to_uint8(pixels[None]).shape == (1, 32, 64, 3)


def test_second_lora_joins_the_first_beside_weights_in_8_bits(tiny, make_shot, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file({name: tensor * 2 for name, tensor in load_file(LORA).items()}, other)

    def item(file):
        return Item(make_shot(lora=[{"path": str(file)}]), {"image": gradient_image()})

    with with_options(FluxLoRAStage, tiny, quantize="fp8_storage") as stage, torch.inference_mode():
        first = stage(item(LORA))["image"]
        second = stage(item(other))["image"]
        assert not np.array_equal(first, second)
        assert np.array_equal(first, stage(item(LORA))["image"])
