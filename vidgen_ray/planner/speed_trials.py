"""Trials of speed options: run stages with and without an option, keep the results by kind of GPU, and choose options by them.

A profile names options to try in `trial_options`, and lossy ones, which need `allow_loss`, in `lossy_trial_options`. One that
raises, changes the result too much or is not faster is left out, so a fast default never makes a clip fail. Options are settled
before content keys are planned, and stay settled during a run.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import JsonValue, TypeAdapter

from vidgen_ray.content_keys import with_local_loras
from vidgen_ray.errors import FrozenModel
from vidgen_ray.graph import STAGE_BY_NAME
from vidgen_ray.nets.torch_private import call_replaced
from vidgen_ray.planner.loss import (
    DEFAULT_LIMIT,
    Loss,
    LossLimit,
    as_clip,
    example_face,
    example_pictures,
    example_shots,
    likenesses,
    limit_of,
    loss_of,
    with_picture,
)
from vidgen_ray.profile import Profile
from vidgen_ray.shot import LORA_FIELDS, LoraRef, Shot
from vidgen_ray.stages.base import Artefacts, ChunkedStage, FaceFeatures, Frames, Item, Stage
from vidgen_ray.stages.speed import is_eight_bit_attention, missing_package
from vidgen_ray.system.cache_dir import CacheFile
from vidgen_ray.system.free_memory import free_gpu_memory

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_DIFFERENCE, MAX_DIFFERENCE_FP8 = 0.03, 0.2
"""Relative L2 difference of a call of the network up to which an option is used, in 16 bits and with weights in fp8.

Not of a finished image: denoising amplifies rounding. Sources: docs/speed.md.
"""
MIN_SPEEDUP = 1.03
"""Plain seconds divided by those with the option, from which an option is used."""
CPU = "cpu"
"""Stands for the kind of GPU of a machine without any, and of actors on the CPU."""
_PACKAGES = ("torch", "diffusers", "torchao", "triton", "sageattention")
"""Packages whose versions a result is valid for."""


class Trial(NamedTuple):
    """An option of an actor to try."""

    profile: Profile
    """Profile without the option. Those before it are settled."""
    actor: str
    option: str
    value: JsonValue

    @property
    def limit(self) -> LossLimit | None:
        """LossLimit of the loss. `None` if the option changes no more than the rounding."""
        is_lossy = (self.option, self.value) in self.profile.actors[self.actor].lossy_trial_options.items()
        return limit_of(self.option, self.value) or (DEFAULT_LIMIT if is_lossy else None)

    @property
    def key(self) -> str:
        """Text that identifies the trial on one kind of GPU."""
        section, tried = self.profile.actors[self.actor], self.profile.tried_options(self.actor)
        options = {name: value for name, value in section.options.items() if name not in dict(tried)}
        limit = self.limit and self.limit.model_dump()
        known = [section.weights, section.dtype, section.device, options, tried, self.value, limit, _versions()]
        return f"{self.actor} {self.option} {hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]}"

    @property
    def with_option(self) -> Profile:
        return self.profile.with_options({self.actor: {self.option: self.value}})


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


class TrialResult(FrozenModel):
    """Result of a trial on one kind of GPU."""

    speedup: float = 0.0
    """Plain seconds divided by those with the option. 0 if it raised."""
    difference: float = 0.0
    """Largest relative L2 difference of the first calls of the network."""
    in_fp8: bool = False
    """The network has weights in fp8."""
    loss: Loss | None = None
    """Loss of images or clips. `None` for options that change no more than the rounding."""
    limit: LossLimit | None = None
    """Largest loss that is allowed."""
    error: str = ""
    """Error that the option raised. Empty if it raised none."""

    @property
    def rejected(self) -> str:
        """Reason why the option is left out. Empty if it is used."""
        if self.error:
            return self.error
        if self.loss and self.limit and (lost := self.loss.above(self.limit)):
            return lost
        allowed = MAX_DIFFERENCE_FP8 if self.in_fp8 else MAX_DIFFERENCE
        # Also for NaN.
        if not self.difference <= allowed:
            return f"changes a call of the network by {self.difference:.2g} (relative L2), at most {allowed:g} is allowed"
        return "" if self.speedup >= MIN_SPEEDUP else f"is not faster ({self.speedup:.2f} times)"

    def __str__(self) -> str:
        lost = f", {self.loss}" if self.loss else ""
        return f"left out: {self.rejected}" if self.rejected else f"used, {self.speedup:.2f} times as fast{lost}"


_results = CacheFile("trials.json", TypeAdapter(dict[str, dict[str, TrialResult]]))
"""Kind of GPU -> key of the trial -> result."""


def settled(profile: Profile, cards: Sequence[str]) -> Profile:
    """Return the profile with the options that trials on all these kinds of GPUs have accepted."""
    stored = _results.read()
    for actor in profile.actors:
        for option, value in profile.tried_options(actor):
            trial = Trial(profile, actor, option, value)
            results = [stored.get(card, {}).get(trial.key) for card in _cards(profile, actor, cards)]
            if results and all(result is not None and not result.rejected for result in results):
                profile = trial.with_option
    return profile


def accepted_losses(profile: Profile, cards: Sequence[str]) -> Iterator[str]:
    """Yield each lossy option in use that a trial has accepted, with its loss."""
    stored = _results.read()
    for actor, section in profile.actors.items():
        in_use = [each for each in profile.tried_options(actor) if each in section.options.items()]
        for trial in (Trial(profile, actor, *each) for each in in_use):
            losses = [
                known[trial.key].loss for card in _cards(profile, actor, cards) if trial.key in (known := stored.get(card, {}))
            ]
            yield from (f"{actor}: {trial.option}={trial.value}, {loss}" for loss in losses if loss)


def open_trials(profile: Profile, actor: str, cards: Sequence[str]) -> Iterator[tuple[Trial, str]]:
    """Yield the trials of an actor without a result, each with a kind of GPU to run it on. `keep` the result of each before the
    next one: options that were accepted are part of the next trials."""
    for option, value in profile.tried_options(actor):
        for card in _cards(profile, actor, cards):
            trial = Trial(settled(profile, cards), actor, option, value)
            if is_tried_on(card, value) and trial.key not in _results.read().get(card, {}):
                yield trial, card


ADA = ("L4", "L40S", "RTX 6000 Ada", "RTX 4080", "RTX 4090")
GEFORCE = re.compile(r"RTX [345]0\d0")
WITHOUT_FP8 = ("T4", "A4500", "A10G", "A10", "RTX 3090", "A5000", "A100 40 GB", "A40", "A6000", "A100 80 GB")


def is_tried_on(card: str, value: JsonValue) -> bool:
    """Return whether a kind of GPU may gain from a value of an option.

    torch prefers cuDNN's attention on Hopper and Blackwell itself, and FlashAttention is faster on Ampere. Attention in 8 bits
    pays on GeForce cards, whose 16-bit products with sums in 32 bits run at half of the rate.
    """
    if is_eight_bit_attention(value):
        return GEFORCE.match(card) is not None
    return (value != "_native_cudnn" or card in ADA) and (value != "fp8" or card not in WITHOUT_FP8)


def _cards(profile: Profile, actor: str, cards: Sequence[str]) -> Sequence[str]:
    return cards if profile.actors[actor].device == "cuda" else (CPU,)


def keep(trial: Trial, card: str, result: TrialResult) -> None:
    """Store the result of a trial for a kind of GPU. Raises OSError if the file cannot be written."""
    with _results.update() as stored:
        stored.setdefault(card, {})[trial.key] = result


def as_recorded(profile: Profile, recorded: Mapping[str, Any]) -> Profile:
    """Return the profile with the tried options that a run has recorded, so that its shots keep their content keys.

    `recorded`: the profile in `run.json`. Without effect for another profile.
    """
    changed = {}
    for name, actor in profile.actors.items():
        other = recorded.get("actors", {}).get(name, {})
        are_equal = all(other.get(kind, {}) == getattr(actor, kind) for kind in ("trial_options", "lossy_trial_options"))
        if recorded.get("name") == profile.name and are_equal:
            tried = actor.trial_options.keys() | actor.lossy_trial_options.keys()
            options = {option: value for option, value in actor.options.items() if option not in tried}
            options |= {option: value for option, value in other["options"].items() if option in tried}
            changed[name] = actor.model_copy(update={"options": options})
    return profile.model_copy(update={"actors": {**profile.actors, **changed}}) if changed else profile


CALLS = 2
"""Timed calls of each size, of which the fastest counts."""
MAX_STEPS = 8
"""Denoising steps of a call. All steps of a shot take equally long."""
_MAX_REASON = 300
"""Maximum number of characters of an error in a result."""


def try_options(
    profile: Profile,
    actor: str,
    cards: Sequence[str],
    run: Callable[[Trial, str], TrialResult | None],
    on_message: Callable[[str], None],
) -> None:
    """Try the options of an actor without a result on these kinds of GPUs, and keep the results.

    `run`: runs a trial on a kind of GPU. `None` from it leaves this option and the actor's next ones untried. Raises OSError if
    a result cannot be stored.
    """
    for trial, card in open_trials(profile, actor, cards):
        what = f"{actor}: {trial.option}={trial.value} on {card}"
        on_message(f"trying {what}, once for this kind of GPU and these versions of torch and diffusers")
        result = run(trial, card)
        if result is None:
            on_message(f"{what}: could not be tried")
            return
        keep(trial, card, result)
        on_message(f"{what}: {result}")


def try_option(trial: Trial, shots: Iterable[tuple[str, Shot]]) -> TrialResult:
    """Run shots through stages of the actor with and without the option, on this machine. `shots`: stage and shot.

    A lossy option is compared by the results of several shots, all others by a call of the network. Raises what the stages
    raise without the option.
    """
    if missing := missing_package(trial.value):
        return TrialResult(error=missing, limit=trial.limit)
    by_stage: dict[str, list[Shot]] = {}
    for name, shot in shots:
        by_stage.setdefault(name, []).append(shot)
    if trial.limit:
        return _try_lossy_option(trial, trial.limit, by_stage)
    in_fp8 = trial.with_option.actors[trial.actor].options.get("quantize", "none") != "none"
    with tempfile.TemporaryDirectory(prefix="vidgen-trial-") as folder:
        calls = [
            (STAGE_BY_NAME[name], _calls(STAGE_BY_NAME[name], own[0], Path(folder, name))) for name, own in by_stage.items()
        ]
        plain_s, plain = _timed(trial.profile, calls)
        try:
            tried_s, tried = _timed(trial.with_option, calls)
        # Compilers, kernels and packages raise errors of any class.
        except Exception as error:
            return TrialResult(error=_reason(error), in_fp8=in_fp8)
    difference = max(_difference(a, b) for a, b in zip(plain, tried, strict=True))
    return TrialResult(speedup=plain_s / tried_s, difference=difference, in_fp8=in_fp8)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_MAX_REASON]


def _try_lossy_option(trial: Trial, limit: LossLimit, shots: Mapping[str, Sequence[Shot]]) -> TrialResult:
    """Compare seconds and results of a lossy option with those without it. `shots`: stage -> its shots."""
    face = example_face(trial.profile)
    plain_s, plain = _timed_results(trial.profile, shots, face)
    try:
        tried_s, tried = _timed_results(trial.with_option, shots, face)
    except Exception as error:
        return TrialResult(error=_reason(error), limit=limit)
    likeness = [] if face is None else likenesses(trial.profile, face, [*plain, *tried])
    return TrialResult(speedup=plain_s / tried_s, loss=loss_of(plain, tried, likeness), limit=limit)


def _timed_results(
    profile: Profile, shots: Mapping[str, Sequence[Shot]], face: FaceFeatures | None
) -> tuple[float, list[Frames]]:
    """Return the seconds of all shots but the first of each stage, with all of their steps, and the results of all."""
    seconds, results = 0.0, []
    for name, own in shots.items():
        stage_class = STAGE_BY_NAME[name]
        with stage_class(profile.params(stage_class)) as stage:
            for number, (shot, picture) in enumerate(zip(example_shots(own), example_pictures(), strict=True)):
                item = with_picture(invented_item(stage_class, shot), picture, face)
                begun = time.perf_counter()
                results.append(as_clip(run_once(stage, item)))
                seconds += time.perf_counter() - begun if number else 0.0
        del stage
        free_gpu_memory()
    return seconds, results


def _calls(stage_class: type[Stage[Any]], shot: Shot, folder: Path) -> list[tuple[Shot, Shot]]:
    """Return shots of two sizes for each call, as a run has them: each with a new prompt, and LoRAs whose ranks differ."""
    if f"steps.{stage_class.name}" in stage_class.reads:
        steps = min(getattr(shot.steps, stage_class.name) or MAX_STEPS, MAX_STEPS)
        shot = shot.model_copy(update={"steps": shot.steps.model_copy(update={stage_class.name: steps})})
    # A multiple of what all models need, and another number of tokens.
    height = shot.height - SIZE_STEP_PX if shot.height > SIZE_STEP_PX else shot.height + SIZE_STEP_PX
    loras = [with_local_loras(shot)]
    if stage_class.active_loras(shot):
        loras.append(_with_half_ranks(loras[0], folder))
    calls = []
    for number in range(CALLS + 1):
        first, second = (loras[(number + n) % len(loras)] for n in (0, 1))
        prompts = [{"prompt": f"{shot.prompt}, {number * 2 + n}"} for n in (0, 1)]
        calls.append((first.model_copy(update=prompts[0]), second.model_copy(update={**prompts[1], "height": height})))
    return calls


SIZE_STEP_PX = 64


def _with_half_ranks(shot: Shot, folder: Path) -> Shot:
    """Return the shot with its LoRAs cut to half of their ranks, as files in the folder. Their ranks are one at least."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()

    def half(lora: LoraRef, name: str) -> LoraRef:
        factors = {}
        for key, factor in load_file(lora.path).items():
            axis = 0 if LORA_DOWN.search(key) else 1 if LORA_UP.search(key) else None
            cut = factor if axis is None else factor.narrow(axis, 0, max(1, factor.shape[axis] // 2))
            factors[key] = cut.contiguous()
        file = folder / f"{name}.safetensors"
        save_file(factors, file)
        return lora.model_copy(update={"path": str(file)})

    loras = {name: tuple(half(lora, f"{name}{n}") for n, lora in enumerate(getattr(shot, name))) for name in LORA_FIELDS}
    return shot.model_copy(update=loras)


LORA_DOWN, LORA_UP = re.compile(r"lora_(A|down)(\.[^.]+)?\.weight$"), re.compile(r"lora_(B|up)(\.[^.]+)?\.weight$")
"""Names of the factors of a LoRA, in the notations of peft and of kohya."""


def _timed(
    profile: Profile, calls: Iterable[tuple[type[Stage[Any]], Sequence[tuple[Shot, Shot]]]]
) -> tuple[float, list[NDArray[np.float32]]]:
    """Return the seconds of a call of each stage and size, without the first one, and what each network gives first."""
    import numpy as np

    seconds, results = 0.0, []
    for stage_class, shots in calls:
        with stage_class(profile.params(stage_class)) as stage:
            with _first_outputs(stage) as outputs:
                images = [run_once(stage, invented_item(stage_class, shot)) for shot in shots[0]]
            durations = [[_seconds(stage, invented_item(stage_class, shot)) for shot in sizes] for sizes in shots[1:]]
            seconds += sum(map(min, zip(*durations, strict=True)))
            results += outputs or [image.astype(np.float32) for image in images]
        del stage
        free_gpu_memory()
    return seconds, results


def _seconds(stage: Stage[Any], item: Item) -> float:
    begun = time.perf_counter()
    # A result is an array on the host, so the GPU has finished.
    run_once(stage, item)
    return time.perf_counter() - begun


@contextmanager
def _first_outputs(stage: Stage[Any]) -> Iterator[list[NDArray[np.float32]]]:
    """Yield a list that gets what the first two calls of the stage's denoising network give. It stays empty without one.

    The second transformer of Wan is not among them.
    """
    pipe = getattr(stage, "pipe", None) or getattr(getattr(stage, "model", None), "text_to_image", None)
    network = getattr(pipe, "transformer", None) or getattr(pipe, "unet", None)
    outputs: list[NDArray[np.float32]] = []
    if network is None:
        yield outputs
        return

    def replacement(whole: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            output = whole(*args, **kwargs)
            if len(outputs) < 2:
                outputs.append(output[0].float().cpu().numpy())
            return output

        return call

    with call_replaced(network, replacement):
        yield outputs


def _difference(plain: NDArray[np.float32], tried: NDArray[np.float32]) -> float:
    import numpy as np

    return float(np.linalg.norm(tried - plain) / max(float(np.linalg.norm(plain)), 1e-12))


def run_once(stage: Stage[Any], item: Item) -> NDArray[np.uint8]:
    """Return the image or the frames that the stage makes; one chunk of a chunked stage."""
    (name,) = stage.writes
    if not isinstance(stage, ChunkedStage):
        return stage(item)[name]  # type: ignore[literal-required,no-any-return]  # the name of an artefact
    frames = item.artefacts[stage.takes[0]]  # type: ignore[literal-required]
    return stage.run_chunk(item.shot, *stage.first_chunk(item.shot, frames))


def invented_item(stage_class: type[Stage[Any]], shot: Shot) -> Item:
    """Return the shot with invented inputs: smooth images that move, and the features of no real face."""

    import numpy as np
    from PIL import Image as PILImage

    random = np.random.default_rng(0)
    small = PILImage.fromarray(random.integers(0, 256, (9, 16, 3), np.uint8))
    image = np.asarray(small.resize((shot.width, shot.height), PILImage.Resampling.BICUBIC))
    embedding = random.standard_normal(512).astype(np.float32)
    eyes_nose_mouth = np.array([[0.4, 0.4], [0.6, 0.4], [0.5, 0.5], [0.42, 0.6], [0.58, 0.6]], np.float32)
    available = {
        "photos": (image,),
        "image": image,
        "last_image": image,
        "frames": np.stack([np.roll(image, 4 * n, 1) for n in range(shot.clip_frames)]),
        "face": FaceFeatures(
            embeddings={"antelopev2": embedding * 20, "ir_se50": embedding / np.linalg.norm(embedding)},
            keypoints=eyes_nose_mouth * np.array([shot.width, shot.height], np.float32),
            box=(0.3 * shot.width, 0.3 * shot.height, 0.7 * shot.width, 0.7 * shot.height),
            score=1.0,
            faces_found=1,
            photo_size=(shot.width, shot.height),
            digest="",
        ),
    }
    needs = {name: available[name] for name in stage_class.needs(shot)}
    return Item(with_local_loras(shot), Artefacts(**needs))  # type: ignore[typeddict-item]
