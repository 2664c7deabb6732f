"""Stages divided among several processes on the CPU: the result of one process, and errors, cancelled calls and crashes."""

import json
import multiprocessing
import os
import shutil
from math import ceil
from unittest.mock import Mock

import diffusers
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tests.stages.test_parity import gradient_image
from vidgen_ray.bench.tiny_networks import write_random_lora
from vidgen_ray.engine import gpu_group
from vidgen_ray.engine.gpu_group import GpuGroup
from vidgen_ray.errors import Cancelled, StageError
from vidgen_ray.shot import Shot
from vidgen_ray.stages import context_parallel, speed
from vidgen_ray.stages.base import FaceFeatures, Item, progress_callback
from vidgen_ray.stages.flux import FluxParams, FluxStage
from vidgen_ray.stages.realesrgan import RealESRGANParams, RealESRGANStage
from vidgen_ray.stages.svd import SVDParams, SVDStage
from vidgen_ray.stages.wan import WanParams, WanStage
from vidgen_ray.system.free_memory import is_out_of_memory
from vidgen_ray.weights import resolve

pytestmark = pytest.mark.slow

TOLERANCE = 1
"""Largest difference to the result of one process, in levels of 255."""
NETWORKS = {"flux": ["transformer"], "infusenet": ["InfuseNetModel"], "wan": ["transformer", "transformer_2"]}
TI2V = {"wan-ti2v": ["transformer"]}


def count_tokens(stage, block, item, run, dim=1):
    """Run the stage. Note how many tokens, or items of this dimension, the block gets in how many calls."""
    seen = []
    hook = block.register_forward_pre_hook(
        lambda _, inputs, named: seen.append((inputs[0] if inputs else named["hidden_states"]).shape[dim]), with_kwargs=True
    )
    try:
        result = run(item)
    finally:
        hook.remove()
    stage.note(f"{len(seen)} calls with {min(seen)} tokens")
    return result


def load_without_code(load):
    """Load a stage that is compiled in a group, without generating code."""
    backend, speed.COMPILE_BACKEND = speed.COMPILE_BACKEND, "eager"
    load()
    speed.COMPILE_BACKEND = backend


class CountingFlux(FluxStage):
    def load(self):
        load_without_code(super().load)

    def run(self, item):
        return count_tokens(self, self.model.text_to_image.transformer.single_transformer_blocks[0], item, super().run)


class CountingSVD(SVDStage):
    def run(self, item):
        return count_tokens(self, self.pipe.unet.mid_block, item, super().run, dim=0)


class SVDInInterval(CountingSVD):
    """The last of three steps has one pass, which all processes compute."""


class CountingWan(WanStage):
    """Fails as the prompt says."""

    def run(self, item):
        prompt = item.shot.prompt if dist.is_initialized() else "alone"
        if prompt == "crash" and dist.get_rank() == 1:
            os._exit(1)
        if prompt == "wrong":
            raise StageError("wrong in all processes")
        if prompt == "oom in one" and dist.get_rank() == 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 9.00 GiB")
        if prompt in ("crash", "oom in one"):
            dist.barrier()
        return count_tokens(self, self.pipe.transformer.blocks[1], item, super().run)


@pytest.fixture(scope="module", autouse=True)
def forked_processes():
    """Fork the processes of groups from one that has imported torch. Those of a run are in tests/batch/test_faults.py."""
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload([__name__, "diffusers.pipelines.flux.pipeline_flux", "diffusers.pipelines.wan.pipeline_wan"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_group, "multiprocessing", Mock(get_context=lambda _: forking))
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Tiny weights whose transformers have four attention heads, which four processes can divide."""
    root = tmp_path_factory.mktemp("weights")
    for name, networks in {**NETWORKS, **TI2V}.items():
        shutil.copytree(resolve(f"builtin:tiny/{name}"), root / name)
        for seed, network in enumerate(networks):
            file = root / name / network / "config.json"
            config = {**json.loads(file.read_text()), "num_attention_heads": 4}
            torch.manual_seed(seed)
            made = getattr(diffusers, config["_class_name"]).from_config(config)
            if name == "infusenet":
                # diffusers initialises these layers to zero, so that the network has no effect.
                for layer in (made.controlnet_x_embedder, *made.controlnet_blocks, *made.controlnet_single_blocks):
                    layer.reset_parameters()
            shutil.rmtree(file.parent)
            made.save_pretrained(file.parent)
    transformer = diffusers.FluxTransformer2DModel.from_pretrained(root / "flux" / "transformer")
    write_random_lora(transformer, root / "lora.safetensors", seed=4)
    # The tokens are gathered after this layer.
    layer, tensors = transformer.proj_out, load_file(root / "lora.safetensors")
    tensors["transformer.proj_out.lora_A.weight"] = torch.randn(4, layer.in_features) * 0.3
    tensors["transformer.proj_out.lora_B.weight"] = torch.randn(layer.out_features, 4) * 0.3
    save_file(tensors, root / "lora.safetensors")
    return root


class Runner:
    """The same stages in a group of processes and, if a result is asked for, in this one, where nothing is compiled."""

    def __init__(self, weights, processes, wan, compiled):
        self.group = GpuGroup(processes)
        flux = FluxParams(
            weights=weights / "flux",
            extra_weights={"infusenet": weights / "infusenet"},
            text_tokens=64,
            threads=1,
            # Its casts are not compiled.
            quantize="none" if compiled else "fp8_storage",
        )
        svd = SVDParams(weights=resolve("builtin:tiny/svd"), threads=1)
        upscaler = RealESRGANParams(weights=resolve("builtin:realesrgan"), frames_per_call=2, threads=1)
        self.params = {
            RealESRGANStage: upscaler,
            CountingFlux: flux,
            CountingSVD: svd,
            SVDInInterval: svd.model_copy(update={"guidance_interval": (0.0, 0.6)}),
            CountingWan: WanParams(weights=weights / wan, threads=1),
        }
        in_group = self.params | {CountingFlux: flux.model_copy(update={"compile": compiled})}
        self.divided = {kind: self.group.divided(kind, kind.divided(params)) for kind, params in in_group.items()}
        for stage in self.divided.values():
            stage.load()

    def both(self, kind, item):
        """Return the results and notes of the group and of one process."""
        with kind(self.params[kind]) as stage:
            alone = stage(item)
        together = self.divided[kind](item)
        (name,) = kind.writes
        return together[name], alone[name], self.divided[kind].take_notes(), stage.take_notes()


TWO, FOUR = pytest.param((2, "wan-ti2v", True), id="two processes"), pytest.param((4, "wan", False), id="four processes")


@pytest.fixture(scope="module", params=[TWO, FOUR])
def runner(weights, request):
    runner = Runner(weights, *request.param)
    yield runner
    runner.group.stop()


def shot(prompt="a dog", width=128, height=64, **fields):
    return Shot(id="s", prompt=prompt, seed=3, width=width, height=height, **fields)


def clip(prompt="a dog", guidance=1.0):
    fields = {"video_model": "wan", "num_frames": 9, "steps": {"wan": 3}, "guidance": {"wan": guidance}}
    return Item(shot(prompt, negative_prompt="blurred", **fields), {"image": gradient_image()})


def guided_by_image():
    return Item(shot(steps={"svd": 3}, num_frames=5), {"image": gradient_image()})


def picture(**fields):
    embedding = np.random.default_rng(0).standard_normal(512).astype(np.float32)
    points = np.array([[40, 30], [60, 30], [50, 40], [42, 50], [58, 50]], np.float32)
    embeddings = {"ir_se50": embedding / np.linalg.norm(embedding)}
    face = FaceFeatures(embeddings, points, (20, 10, 80, 60), 1.0, 1, (128, 64), "")
    return Item(shot(steps={"flux": 3}, **fields), {"face": face})


FACE = {"face_image": "photo.png"}


@pytest.mark.parametrize("kind", ["guided clip", "clip by SVD", "guided in an interval", "odd image"])
def test_group_makes_the_result_of_one_process_with_its_part_of_the_tokens(runner, kind):
    processes = len(list(runner.group.pids))
    compare(
        runner,
        *{
            "guided clip": (CountingWan, clip(guidance=5.0), 2, processes // 2),
            "clip by SVD": (CountingSVD, guided_by_image(), 1, 2),
            "guided in an interval": (SVDInInterval, guided_by_image(), 1, 1),
            "odd image": (CountingFlux, picture(width=112, generate_video=False, height=80), 1, processes),
        }[kind],
    )


# Compiled, it takes 40 seconds.
@pytest.mark.parametrize("runner", [pytest.param(*TWO.values, id=TWO.id, marks=pytest.mark.very_slow), FOUR], indirect=True)
def test_face_with_a_lora_and_two_passes_is_divided(runner, weights):
    lora = {"lora": [{"path": str(weights / "lora.safetensors")}], "mode": "fast"}
    item = picture(**FACE, **lora, negative_prompt="blurred")
    compare(runner, CountingFlux, item, 2, len(list(runner.group.pids)) // 2)


def compare(runner, stage, item, calls_by, tokens_by):
    together, alone, own_notes, notes = runner.both(stage, item)
    assert alone.std() > 5
    assert np.abs(together.astype(int) - alone).max() <= TOLERANCE
    (all_calls, all_tokens), (calls, tokens) = ((int(w) for w in n[-1].split() if w.isdigit()) for n in (notes, own_notes))
    assert calls == all_calls // calls_by
    # The first process gets one more if the tokens cannot be divided evenly.
    assert tokens == ceil(all_tokens / tokens_by)


def test_processes_share_the_chunks_of_a_clip(runner):
    frames = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), np.uint8)
    one, reported = shot(width=64, num_frames=9, upscale_video=True, scale=2, upscaler="animevideov3"), []
    with progress_callback(lambda *progress: reported.append(progress)):
        together = runner.divided[RealESRGANStage].run_chunk(one, frames[2:], slice(2, 9))
    assert len(reported) == ceil(4 / len(list(runner.group.pids)))
    with RealESRGANStage(runner.params[RealESRGANStage]) as stage:
        assert np.array_equal(together, stage.run_chunk(one, frames[2:], slice(2, 9)))


@pytest.mark.parametrize("runner", [TWO], indirect=True)
def test_errors_and_cancelled_calls_leave_the_group_usable_and_a_crash_its_worker(runner, monkeypatch):
    stage, before = runner.divided[CountingWan], list(runner.group.pids)
    with pytest.raises(StageError, match="wrong in all processes"):
        stage(clip("wrong"))
    reported = []

    def cancel(*progress):
        reported.append(progress)
        raise Cancelled

    with pytest.raises(Cancelled), progress_callback(cancel):
        stage(clip())
    assert reported == [("wan", 1, 3)]
    together, alone, _, _ = runner.both(CountingWan, clip())
    assert np.abs(together.astype(int) - alone).max() <= TOLERANCE
    assert list(runner.group.pids) == before
    # An error of one process ends the call, and the group starts again.
    monkeypatch.setattr(gpu_group, "SAME_ERROR_S", 0.5)
    with pytest.raises(RuntimeError) as error:
        stage(clip("oom in one"))
    assert is_out_of_memory(error.value)
    assert stage(clip())["frames"].shape == (9, 64, 128, 3)
    assert not set(before) & set(runner.group.pids)
    # The worker computes alone if its processes cannot work together.
    together, alone, notes, _ = runner.both(CountingWan, clip("crash"))
    assert np.array_equal(together, alone)
    (alone_because,) = (note for note in notes if note.startswith("computed on one GPU"))
    assert alone_because.endswith("because several could not work together: RuntimeError: the process of a GPU has crashed")
    assert not list(runner.group.pids)
    together, alone, _, _ = runner.both(CountingFlux, picture())
    assert np.array_equal(together, alone)
    clips = runner.divided[RealESRGANStage]
    assert clips.run_chunk(shot(scale=2, upscaler="animevideov3"), together[None]).shape == (1, 128, 256, 3)
    assert clips.take_notes() == (alone_because,)


def test_lost_group_is_not_started_again():
    group = GpuGroup(2)
    group._start = Mock(side_effect=OSError("no memory"))
    for kind, params in ((SVDStage, SVDParams), (RealESRGANStage, RealESRGANParams)):
        group.divided(kind, params(weights="none")).load()
    assert group.lost == "OSError: no memory"
    group._start.assert_called_once()


def code_columns(rank, processes, meeting, config, sizes, results):
    """Encode and decode random clips in this process of a group, and put them with the widest part that it computed.

    In 64 bits, because small networks amplify rounding.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan.from_config(config).double().eval()
    if processes > 1:
        context_parallel.join_group(rank, processes, meeting, "cpu")
    widths = []
    for part in (vae.encoder, vae.decoder):
        context_parallel.divide_columns(part)
        part.mid_block.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[-1]))
    coded = []
    with torch.inference_mode():
        for width, tiled in sizes:
            vae.use_tiling = tiled
            latents = vae.encode(torch.rand(1, 3, 9, 64, width, dtype=torch.float64) * 2 - 1).latent_dist.mean
            coded += [latents, vae.decode(latents).sample]
    results.put((rank, max(widths), [each.numpy() for each in coded]))


@pytest.mark.parametrize("name", ["wan", "wan-ti2v"])
def test_autoencoder_of_wan_computes_its_columns_in_several_processes(tmp_path, weights, name):
    """Also of unequal numbers, in tiles whose last one is narrower, and with fewer columns than processes."""
    config = json.loads((weights / name / "vae" / "config.json").read_text())
    unit, forking = config["scale_factor_spatial"], gpu_group.multiprocessing.get_context("spawn")
    sizes = ((13 * unit, False), (512 + 2 * unit, True), (2 * unit, False))
    results, found = forking.Queue(), {}
    for processes in (1, 4):
        arguments = processes, tmp_path / "meeting", config, sizes, results
        started = [forking.Process(target=code_columns, args=(rank, *arguments)) for rank in range(processes)]
        for process in started:
            process.start()
        found[processes] = {rank: result for rank, *result in (results.get(timeout=60) for _ in started)}
        for process in started:
            process.join()
    ((widest, alone),) = found[1].values()
    for part, together in found[4].values():
        # Four of thirteen columns, six of the 32 of a tile, or all two.
        assert part < widest / 2
        for divided, whole in zip(together, alone, strict=True):
            assert np.abs(divided - whole).max() < 1e-6 * np.abs(whole).max()
