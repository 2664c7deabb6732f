"""Weight swapping: which stages are on the GPU."""

from types import SimpleNamespace
from unittest.mock import Mock

from vidgen_ray import pipeline as pipeline_module
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.pipeline import VideoGenerationPipeline
from vidgen_ray.planner.cluster import Cluster, Node
from vidgen_ray.profile import load_profile
from vidgen_ray.render.weights_on_gpu import WeightSwapper
from vidgen_ray.shot import Shot


class FakeStage:
    """A stage that records where its weights are. Several may share weights."""

    def __init__(self, name, shared=None):
        self.name = name
        self.params = SimpleNamespace(device="cuda")
        self.shared = shared if shared is not None else {"place": None}

    @property
    def place(self):
        return self.shared["place"]

    def load(self):
        self.shared["place"] = self.place or "cuda"

    def move(self, device):
        self.shared["place"] = device


def on_gpu(stages):
    return [name for name, stage in stages.items() if stage.place == "cuda"]


def test_only_one_group_is_on_the_gpu_until_there_are_none():
    stages = {name: FakeStage(name) for name in ("flux", "svd", "realesrgan")}
    swapper = WeightSwapper(stages, (("flux",), ("svd",)))
    swapper.load()
    assert on_gpu(stages) == ["realesrgan"]
    for name in ("flux", "svd", "flux"):
        swapper.ensure_on_gpu(name)
        assert set(on_gpu(stages)) == {name, "realesrgan"}
    swapper.regroup(())
    assert on_gpu(stages) == ["flux", "svd", "realesrgan"]


def test_stage_that_is_loaded_later_finds_its_group_on_the_gpu():
    flux = FakeStage("flux")
    stages = {"flux": flux}
    flux.load()
    swapper = WeightSwapper(stages, ())
    swapper.regroup((("flux", "lora"), ("svd",)))
    assert flux.place == "cpu"
    swapper.ensure_on_gpu("svd")
    stages["svd"] = FakeStage("svd")
    stages["svd"].load()
    assert on_gpu(stages) == ["svd"]
    # The same weights as FLUX: they must be on the GPU before the stage is added.
    swapper.ensure_on_gpu("lora")
    stages["lora"] = FakeStage("lora", flux.shared)
    stages["lora"].load()
    assert on_gpu(stages) == ["flux", "lora"]


def test_library_swaps_on_a_gpu_that_is_too_small_for_all_stages(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline_module, "this_machine", lambda: Cluster((Node((20.0,), 8, 256.0),)))
    monkeypatch.setattr(pipeline_module, "prepare_gpu", prepared := Mock())
    names = ("flux", "svd")

    def load(self):
        loaded.append((self.name, [name for name in names if name in pipeline._loaded and places[name] == "cuda"]))
        places[self.name] = "cuda"

    loaded, places = [], {}
    for name in names:
        monkeypatch.setattr(STAGE_BY_NAME[name], "load", load)
        monkeypatch.setattr(STAGE_BY_NAME[name], "move", lambda self, device: places.update({self.name: device}))
        monkeypatch.setattr(STAGE_BY_NAME[name], "close", lambda self: None)
    # Weights of any folder: they are not read.
    profile = load_profile("gpu-24gb")
    actors = {name: profile.actors[name].model_copy(update={"weights": str(tmp_path)}) for name in names}
    with VideoGenerationPipeline(profile.model_copy(update={"actors": actors}), tmp_path / "out") as pipeline:
        pipeline._stages([STAGE_BY_NAME[name] for name in names], Shot(prompt="a", upscale_video=False))
        assert loaded == [("flux", []), ("svd", [])]
        prepared.assert_called_once_with(1.0, 20.0)
        pipeline._swapper.ensure_on_gpu("flux")
        assert places == {"flux": "cuda", "svd": "cpu"}
