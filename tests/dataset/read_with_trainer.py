"""Reads an exported data set with the data code of a trainer, and prints file -> frames, height, width and caption as JSON.

Runs as a process of its own: TRAINER:MODEL FOLDER SPLIT. With TRAINER rules, it compares the rules with that code. Packages
that the trainers import but that their data code does not use are replaced.
"""

import json
import shlex
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from vidgen_ray.trainers import TRAINERS, SourceClip, parse_target


class Replaced(ModuleType):
    __version__ = "0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


for replaced in ("modelscope", "wandb", "torchdata", "torchdata.stateful_dataloader"):
    sys.modules[replaced] = Replaced(replaced)
    sys.modules[replaced].__spec__ = ModuleSpec(replaced, None)
sys.modules["torchdata"].stateful_dataloader = sys.modules["torchdata.stateful_dataloader"]


def without_models(package):
    """Let a package be imported without its models. The wheel of finetrainers lacks modules that these import."""
    sys.modules[package] = ModuleType(package)
    sys.modules[package].__path__ = [f"{each}/{package}" for each in sys.path]


def read_finetrainers(target, folder, split):
    import datasets

    without_models("finetrainers")
    import torchvision
    from finetrainers.data import dataset

    # Of the torchvision of its time; `datasets` 3.3 decodes with decord.
    torchvision.io.video_reader = Replaced("video_reader")
    assert datasets.__version__ == "3.3.2"
    for config in json.loads((folder / f"{split}.json").read_text())["datasets"]:
        data = dataset.initialize_dataset(config.pop("data_root"), config.pop("dataset_type"))
        paths = [Path(each["video"]["path"]) for each in data._data.cast_column("video", datasets.Video(decode=False))]
        wrapped = dataset.wrap_iterable_dataset_for_preprocessing(data, "video", config)
        for path, sample in zip(paths, wrapped, strict=True):
            frames, _, height, width = sample["video"].shape
            yield path, frames, height, width, sample["caption"]


def read_diffsynth(target, folder, split):
    from diffsynth.core.data.unified_dataset import UnifiedDataset

    is_ltx = target.model.frame_step == 8
    words = shlex.split((folder / f"{split}.args").read_text())
    options = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    # As examples/wanvideo/model_training/train.py and examples/ltx2/model_training/train.py call it.
    rest = {"frame_rate": float(options["frame_rate"]), "fix_frame_rate": True} if is_ltx else {}
    side, step = (32, 8) if is_ltx else (16, 4)
    operator = UnifiedDataset.default_video_operator(
        base_path=options["dataset_base_path"],
        max_pixels=int(options["max_pixels"]),
        height_division_factor=side,
        width_division_factor=side,
        num_frames=int(options["num_frames"]),
        time_division_factor=step,
        time_division_remainder=1,
        **rest,
    )
    data = UnifiedDataset(
        base_path=options["dataset_base_path"],
        metadata_path=options["dataset_metadata_path"],
        data_file_keys=options["data_file_keys"].split(","),
        main_data_operator=operator,
    )
    for number in range(len(data)):
        sample = data[number]
        width, height = sample["video"][0].size
        yield folder / data.data[number]["video"], len(sample["video"]), height, width, sample["prompt"]


def read_simpletuner(target, folder, split):
    import numpy as np
    from simpletuner.helpers.data_backend.local import LocalDataBackend
    from simpletuner.helpers.metadata.backends.discovery import DiscoveryMetadataBackend
    from simpletuner.helpers.models.hunyuanvideo.model import HunyuanVideo
    from simpletuner.helpers.models.ltxvideo.model import LTXVideo
    from simpletuner.helpers.models.registry import ModelRegistry
    from simpletuner.helpers.models.wan.model import Wan
    from simpletuner.helpers.prompts import PromptHandler
    from simpletuner.helpers.training.state_tracker import StateTracker

    family = {16: "wan", 25: "ltxvideo"}.get(target.model.fps, "wan" if target.model.frame_step == 8 else "hunyuanvideo")
    for name, model in (("wan", Wan), ("ltxvideo", LTXVideo), ("hunyuanvideo", HunyuanVideo)):
        ModelRegistry._registry[name] = model
    accelerator = SimpleNamespace(is_main_process=True, is_local_main_process=True, num_processes=1, process_index=0)
    arguments = {"aspect_bucket_alignment": target.model.side_step_px, "aspect_bucket_rounding": 2, "model_family": family}
    more = {"output_dir": str(folder / "cache"), "cache_dir": str(folder / "cache"), "delete_unwanted_images": False}
    StateTracker.set_args(SimpleNamespace(**arguments, **more, framerate=target.model.fps))
    StateTracker.set_model_family(family)
    *configs, _ = json.loads((folder / f"{split}.json").read_text())
    for config in configs:
        StateTracker.set_data_backend_config(config["id"], config)
        backend = LocalDataBackend(accelerator, config["id"])
        found = DiscoveryMetadataBackend(
            id=config["id"],
            instance_data_dir=config["instance_data_dir"],
            cache_file=str(folder / f"cache/{config['id']}"),
            metadata_file=str(folder / f"cache/{config['id']}-metadata"),
            data_backend=backend,
            accelerator=accelerator,
            batch_size=1,
            resolution=config["resolution"],
            resolution_type=config["resolution_type"],
            minimum_image_size=config["minimum_image_size"],
            num_frames=config["video"]["num_frames"],
            minimum_num_frames=config["video"]["min_frames"],
        )
        updates, statistics = {}, {"skipped": {"not_found": 0, "too_small": 0}}
        for path in sorted(Path(config["instance_data_dir"]).glob("*.mp4")):
            found._process_for_bucket(str(path), {}, metadata_updates=updates, statistics=statistics)
        for name, metadata in updates.items():
            # Its cache of latents takes this many frames of the clip.
            frames = len(np.empty(metadata["num_frames"])[: config["video"]["num_frames"]])
            width, height = metadata["target_size"]
            caption = PromptHandler.prepare_instance_prompt_from_textfile(
                name, True, False, backend, disable_multiline_split=config["disable_multiline_split"]
            )
            yield Path(name), frames, height, width, caption


def rules_finetrainers(model, clip, use):
    import torch
    from finetrainers import functional

    video = torch.arange(clip.num_frames).float()[:, None, None, None].expand(-1, 3, 16, 16)
    taken, _ = functional.resize_to_nearest_bucket_video(video, [(use.frames, 16, 16)])
    assert (len(taken), taken[0, 0, 0, 0].round(), taken[-1, 0, 0, 0].round()) == (use.frames, 0, clip.num_frames - 1)
    assert abs(clip.num_frames / clip.fps / (len(taken) / model.fps) - use.speed) < 1e-9


def rules_diffsynth(model, clip, use):
    from diffsynth.core.data.operators import FrameSamplerByRateMixin, ImageCropAndResize

    is_ltx = model.frame_step == 8
    side, step = (32, 8) if is_ltx else (16, 4)
    sampler = FrameSamplerByRateMixin(model.frames, step, 1, model.fps if is_ltx else 24, fix_frame_rate=is_ltx)
    about = {"fps": clip.fps, "duration": round(clip.num_frames / clip.fps + 1e-9, 2)}
    reader = SimpleNamespace(count_frames=lambda: clip.num_frames, get_meta_data=lambda: about)
    assert sampler.get_num_frames(reader) == use.frames
    resize = ImageCropAndResize(None, None, model.pixels, side, side)
    assert resize.get_height_width(SimpleNamespace(size=(clip.width, clip.height))) == (use.height, use.width)


def rules_simpletuner(model, clip, use):
    from simpletuner.helpers.models.wan.model import Wan
    from simpletuner.helpers.multiaspect.image import MultiaspectImage
    from simpletuner.helpers.training.state_tracker import StateTracker

    if model.frame_step == 8:
        assert min(Wan.adjust_video_frames(clip.num_frames), model.frames) == use.frames
    StateTracker.set_args(SimpleNamespace(aspect_bucket_alignment=model.side_step_px, aspect_bucket_rounding=2))
    ratio, short = MultiaspectImage.calculate_image_aspect_ratio((clip.width, clip.height)), min(use.width, use.height)
    size, *_ = MultiaspectImage.calculate_new_size_by_pixel_edge(ratio, short, (clip.width, clip.height))
    assert size == (use.width, use.height)


def compare_rules(trainer):
    compare, sides = globals()[f"rules_{trainer}"], st.integers(32, 1400).map(lambda side: side * 2)
    rates, models = st.sampled_from([5, 8, 15, 16, 23.976, 24, 25, 30, 60]), st.sampled_from([*TRAINERS[trainer].models])

    @settings(max_examples=200, deadline=None, database=None)
    @given(st.builds(SourceClip, st.integers(1, 300), rates, sides, sides), models)
    def check(clip, model):
        target = parse_target(f"{trainer}:{model}")
        use = target.use(clip)
        if not use.problem or "speed" in use.problem:
            compare(target.model, clip, use)

    check()


if __name__ == "__main__" and sys.argv[2] == "rules":
    if sys.argv[1] == "finetrainers":
        without_models("finetrainers")
    compare_rules(sys.argv[1])
elif __name__ == "__main__":
    name, folder, split = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    read = globals()[f"read_{name.partition(':')[0]}"]
    samples = list(read(parse_target(name), folder, split))
    sys.stdout.write("\n" + json.dumps({str(Path(path).relative_to(folder)): rest for path, *rest in samples}))
