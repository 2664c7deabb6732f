"""Planned host memory and copies against those of the code that loads, swaps and runs the stages, with small networks whose
sizes replace those of the table. The GPU is simulated."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import ASTRONAUT
from tests.stages.fake_gpu import GPU, FakeGpu, host_bytes
from tests.stages.test_parity import gradient_image
from vidgen_ray.content_keys import with_local_loras
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.planner import layout
from vidgen_ray.planner.cluster import GB
from vidgen_ray.planner.gpu_memory import actors_of
from vidgen_ray.planner.layout import GPU_PROCESS_HOST_GB, PROCESS_HOST_GB, Actor, WorkerProcess
from vidgen_ray.render.weights_on_gpu import WeightSwapper
from vidgen_ray.stages import flux, memory_table
from vidgen_ray.stages.base import Item
from vidgen_ray.stages.flux_model import FluxModel

FACE = {"face_image": str(ASTRONAUT), "lora": "builtin:tiny/lora.safetensors", "num_frames": 2}
PHOTO = {"face_image": str(ASTRONAUT), "identity": "reference", "num_frames": 2}
WAN, LTX = ({"video_model": name, "num_frames": 9} for name in ("wan", "ltx"))
CHAIN = ("flux", "lora", "svd")
ONE_LORA = {"adapters_kept": 1}


@pytest.fixture
def gpu(monkeypatch):
    FluxModel._instances.clear()
    return FakeGpu(monkeypatch)


def networks_of(stage):
    """Return name in the table -> network of a loaded stage."""
    pipe = stage.model.text_to_image if hasattr(stage, "model") else stage.pipe
    networks = {f"{stage.actor}/{name}": part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    for injector in getattr(stage, "injectors", {}).values():
        networks |= {"infusenet/net": injector.infusenet.net, "infusenet/resampler": injector.infusenet.resampler}
    return networks


def size_of(network, *, adapters=False):
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return sum({each.data_ptr(): each.nbytes for name, each in tensors if ("lora_" in name) == adapters}.values())


def use_sizes_of(networks, monkeypatch):
    """Replace the sizes of networks in the table. It holds them in 16 bits, and the small ones are in 32 bits."""
    sizes = {name: size_of(network) / 2 for name, network in networks.items()}
    if "flux/transformer" in networks:
        sizes["flux/transformer:fp8_storage"] = sizes["flux/transformer"] * 2
        sizes["flux/lora"] = size_of(networks["flux/transformer"], adapters=True) / 2
    # Embeddings of prompts are no weights.
    monkeypatch.setattr(flux, "CACHED_PROMPTS", 0)
    table = memory_table.load_table()
    monkeypatch.setattr(memory_table, "load_table", lambda: replace(table, weights={**table.weights, **sizes}))


@pytest.mark.parametrize(
    ("names", "fields", "options", "groups"),
    [
        (CHAIN, FACE, {**ONE_LORA, "text_encoder": "gpu"}, ()),
        (CHAIN, FACE, {**ONE_LORA, "text_encoder": "swapped", "quantize": "fp8_storage"}, (("flux", "lora"), ("svd",))),
        (CHAIN, FACE, {**ONE_LORA, "text_encoder": "cpu"}, (("flux", "lora"), ("svd",))),
        (("wan",), WAN, {"cpu_offload": True}, ()),
        (("klein", "svd"), PHOTO, {"cpu_offload": True}, ()),
        (("ltx",), LTX, {}, ()),
    ],
)
def test_planned_host_memory_and_copies_are_those_of_the_code(
    tiny, make_shot, gpu, face, monkeypatch, names, fields, options, groups
):
    classes = [STAGE_BY_NAME[name] for name in names]
    shot = make_shot(width=128, height=64, **{"num_frames": 9, **fields})
    profile = tiny.model_copy(update={"actors": {**tiny.actors}})
    for stage in classes:
        actor = tiny.actor_of(stage)
        own = {**actor.options, **{name: value for name, value in options.items() if name in stage.Params.model_fields}}
        profile.actors[stage.actor] = actor.model_copy(update={"device": "cuda", "memory_gb": None, "options": own})
    stages = {
        stage.name: stage(profile.params(stage).model_copy(update={"device": GPU, "dtype": "float32"})) for stage in classes
    }
    swapper = WeightSwapper(stages, groups)
    swapper.load()
    artefacts = {"face": face, "photos": (gradient_image(64, 64),), "image": gradient_image(128)}
    copied, results = {}, {}
    for name, stage in stages.items():
        swapper.ensure_on_gpu(name)
        gpu.forget()
        result = stage(Item(with_local_loras(shot), artefacts))
        copied[name] = gpu.copied_bytes
        artefacts |= result
        results[stage.actor] = sum(array.nbytes for array in result.values()) * memory_table.RESULT_COPIES
        for part, network in networks_of(stage).items():
            if part.startswith(("flux/transformer", "infusenet/")):
                # InfuseNet and LoRAs are loaded on the GPU, where the simulation does not see them.
                network.to(GPU)
    swapper.ensure_on_gpu(names[0])
    networks = {name: network for stage in stages.values() for name, network in networks_of(stage).items()}
    held = host_bytes(networks.values())
    use_sizes_of(networks, monkeypatch)
    actors, _ = actors_of(profile, classes, [shot], 80)
    by_name = {stage: actor for actor in actors for stage in actor.stages}
    process = WorkerProcess(actors, tuple((by_name[group[0]],) for group in groups))
    planned = (process.host_gb - GPU_PROCESS_HOST_GB) * GB
    assert planned == pytest.approx(held + sum(results.values()), rel=0.01)
    for name, stage in stages.items():
        work = stage.work(profile.options_of(type(stage)).model_copy(update={"dtype": "float32"}), shot)
        assert copied[name] == pytest.approx(work.total.linked_bytes, rel=0.01), name


def test_host_memory_counts_the_rounding_of_pinned_blocks(monkeypatch):
    actors = [Actor("a", ("a",), 0, 1.0, gpu_gb, host_gb=10.0, cpus=1.0, swappable=True) for gpu_gb in (0.0, 20.0)]
    processes = [WorkerProcess((actor,), groups) for actor, groups in zip(actors, ((), ((actors[1],),)), strict=True)]
    for exact, factor in ((True, 1.0), (False, 1.56)):
        monkeypatch.setattr(layout, "pins_exact_sizes", lambda exact=exact: exact)
        host_gb = [WorkerProcess(process.actors, process.swap_groups).host_gb for process in processes]
        assert host_gb == pytest.approx([PROCESS_HOST_GB + 10, GPU_PROCESS_HOST_GB + factor * 30])
