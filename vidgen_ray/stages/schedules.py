"""Noise schedules that the authors of published weights state, by name: what a profile's option `schedule` chooses from.

A scheduler folder may differ from them: diffusers' converters write defaults, and LoRAs for a few steps have none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, field_validator

from vidgen_ray.errors import StageError
from vidgen_ray.stages.base import IN_KEY_IF_CHANGED, StageParams
from vidgen_ray.stages.lora import FEW_STEP_LORA

if TYPE_CHECKING:
    from vidgen_ray.shot import Shot

_EULER, _UNIPC = "FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"
_WAN = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "solver_order": 2, "flow_shift": 5.0}
_LTX_DISTILLED = (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725)
_SDXL_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
# Of the authors' inference code, for shots without a negative prompt.
_WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
_HUNYUAN_NEGATIVE = "错误的眼睛，糟糕的人脸，毁容，糟糕的艺术，变形，多余的肢体，模糊的颜色，模糊，重复，病态，残缺，"
_LTX_NEGATIVE = "worst quality, inconsistent motion, blurry, jittery, distorted"


@dataclass(frozen=True, slots=True)
class Schedule:
    """Noise schedule of published weights, and the settings that their authors use with it."""

    weights: str
    """Name of the weights, for people."""
    actor: str
    """Entry of a profile's `actors` that runs them."""
    published: str
    """Regular expression for the path of a folder with these weights."""
    scheduler: str
    """Class of diffusers."""
    config: Mapping[str, Any]
    """Arguments of the class."""
    shift: str
    """Shift of the noise levels, for people."""
    timesteps: str
    """Timesteps of the default steps, of 1000, for people."""
    steps: int
    """Default steps of the stage with this schedule."""
    guidance: float
    """Default guidance scale of the stage with this schedule. 0 if the network has none, 1 or less: one pass per step."""
    source: str
    """File of the authors that states it."""
    own_class: str = ""
    """Subclass of it in `nets/published_schedulers.py`, with the authors' noise levels."""
    authors: str = ""
    """Steps and guidance of the authors' code, if the defaults differ."""
    few_step_lora: str = ""
    """Regular expression for the path of the LoRA that is merged."""
    negative_prompt: str = field(default="", repr=False)
    """Negative prompt of the authors' code."""

    @property
    def has_fixed_steps(self) -> bool:
        """Return whether the weights were distilled to exactly these timesteps."""
        return "noise_levels" in self.config


SCHEDULES: Mapping[str, Schedule] = {
    "flux.1-dev": Schedule(
        weights="FLUX.1-dev",
        actor="flux",
        published=r"FLUX\.1-dev",
        scheduler=_EULER,
        config={"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "max_image_seq_len": 4096},
        shift="by tokens, 1.65 to 3.16",
        timesteps="1000 to 79.5",
        steps=28,
        guidance=3.5,
        authors="50 steps, 2.5",
        source="black-forest-labs/flux `src/flux/sampling.py`",
    ),
    "flux.1-schnell": Schedule(
        weights="FLUX.1-schnell",
        actor="flux",
        published=r"FLUX\.1-schnell",
        scheduler=_EULER,
        config={"use_dynamic_shifting": False, "shift": 1.0},
        shift="none",
        timesteps="1000, 750, 500, 250",
        steps=4,
        guidance=0,
        source="black-forest-labs/flux `src/flux/cli.py`",
    ),
    "flux.2-klein": Schedule(
        weights="FLUX.2 klein",
        actor="klein",
        published=r"FLUX\.2-klein-\dB",
        scheduler=_EULER,
        config={"use_dynamic_shifting": True, "time_shift_type": "exponential"},
        shift="by tokens and steps",
        timesteps="1000, 962.2, 894.7, 739",
        steps=4,
        guidance=0,
        source="black-forest-labs/flux2 `src/flux2/sampling.py`",
    ),
    "sdxl": Schedule(
        weights="SDXL, InstantID",
        actor="instantid_sdxl",
        published=r"stable-diffusion-xl-base-1\.0",
        scheduler="EulerDiscreteScheduler",
        config={**_SDXL_BETAS, "steps_offset": 1, "timestep_spacing": "leading"},
        shift="none",
        timesteps="958 to 1",
        steps=30,
        guidance=5,
        source="instantX-research/InstantID `infer.py`, SDXL's folder",
    ),
    "hunyuandit-1.2": Schedule(
        weights="HunyuanDiT v1.2",
        actor="hunyuan",
        published=r"HunyuanDiT-v1\.2-Diffusers(?!-Distilled)",
        scheduler="DPMSolverMultistepScheduler",
        config={
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.018,
            "prediction_type": "v_prediction",
            "solver_order": 2,
            "algorithm_type": "dpmsolver++",
            "timestep_spacing": "linspace",
        },
        shift="none",
        timesteps="999 to 33",
        steps=30,
        guidance=5,
        authors="100 steps of DDPM, 6",
        negative_prompt=_HUNYUAN_NEGATIVE,
        source="Tencent/HunyuanDiT `hydit/constants.py`, `hydit/train.sh`",
    ),
    "qwen-image-edit": Schedule(
        weights="Qwen-Image-Edit-2509",
        actor="qwen_edit",
        published="Qwen-Image-Edit-2509",
        scheduler=_EULER,
        config={
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 0.9,
            "max_image_seq_len": 8192,
            "shift_terminal": 0.02,
        },
        shift="by tokens, 1.65 to 2.46",
        timesteps="1000 to 20",
        steps=40,
        guidance=4,
        source="QwenLM/Qwen-Image `README.md`, its folder",
    ),
    "svd-xt": Schedule(
        weights="SVD-XT",
        actor="svd",
        published="stable-video-diffusion-img2vid-xt",
        scheduler="EulerDiscreteScheduler",
        config={
            "use_karras_sigmas": True,
            "sigma_min": 0.002,
            "sigma_max": 700.0,
            "prediction_type": "v_prediction",
            "timestep_type": "continuous",
            "timestep_spacing": "leading",
            "steps_offset": 1,
            **_SDXL_BETAS,
        },
        shift="Karras",
        timesteps="sigma 700 to 0.002",
        steps=25,
        guidance=3,
        authors="30 steps, 1.5 to 3",
        source="Stability-AI/generative-models `scripts/sampling/`",
    ),
    "wan2.2-i2v-a14b": Schedule(
        weights="Wan 2.2 I2V-A14B",
        actor="wan",
        published=r"Wan2\.2-I2V-A14B",
        scheduler=_UNIPC,
        own_class="WanUniPC",
        config=_WAN,
        shift="5",
        timesteps="999 to 113",
        steps=40,
        guidance=3.5,
        negative_prompt=_WAN_NEGATIVE,
        source="Wan-Video/Wan2.2 `wan/configs/wan_i2v_A14B.py`",
    ),
    "wan2.2-ti2v-5b": Schedule(
        weights="Wan 2.2 TI2V-5B",
        actor="wan",
        published=r"Wan2\.2-TI2V-5B",
        scheduler=_UNIPC,
        own_class="WanUniPC",
        config=_WAN,
        shift="5",
        timesteps="999 to 92",
        steps=50,
        guidance=5,
        negative_prompt=_WAN_NEGATIVE,
        source="Wan-Video/Wan2.2 `wan/configs/wan_ti2v_5B.py`",
    ),
    "wan2.2-lightning": Schedule(
        weights="Wan 2.2 I2V-A14B with Lightning",
        actor="wan",
        published=r"Wan2\.2-I2V-A14B",
        few_step_lora=r"Wan2\.2-Lightning",
        scheduler=_EULER,
        own_class="StatedNoiseLevels",
        config={"shift": 5.0, "noise_levels": (1.0, 0.75, 0.5, 0.25)},
        shift="5",
        timesteps="1000, 937.5, 833.3, 625",
        steps=4,
        guidance=1,
        source="ModelTC/Wan2.2-Lightning `wan/utils/fm_solvers_euler.py`",
    ),
    "ltx-0.9": Schedule(
        weights="LTX-Video 0.9",
        actor="ltx",
        published="Lightricks--LTX-Video/",
        scheduler=_EULER,
        config={
            "use_dynamic_shifting": True,
            "base_shift": 0.95,
            "max_shift": 2.05,
            "base_image_seq_len": 1024,
            "max_image_seq_len": 4096,
            "shift_terminal": 0.1,
        },
        shift="by tokens, to 0.1",
        timesteps="1000 to 100",
        steps=40,
        guidance=3,
        negative_prompt=_LTX_NEGATIVE,
        source="Lightricks/LTX-Video `configs/ltxv-2b-0.9.yaml`",
    ),
    "ltx-0.9.8-distilled": Schedule(
        weights="LTX-Video 0.9.8 distilled",
        actor="ltx",
        published=r"(?i)ltx-?v(ideo)?.*0\.9\.8.*distilled",
        scheduler=_EULER,
        own_class="StatedNoiseLevels",
        config={"noise_levels": _LTX_DISTILLED},
        shift="none",
        timesteps="1000, 993.7, 987.5, 981.2, 975, 909.4, 725",
        steps=7,
        guidance=1,
        source="Lightricks/LTX-Video `configs/ltxv-2b-0.9.8-distilled.yaml`",
    ),
}
"""Value of the option `schedule` -> schedule."""


class ScheduleParams(StageParams):
    """Parameters of a stage with a denoising network."""

    schedule_actor: ClassVar[str] = ""
    """`Schedule.actor` of the schedules that the stage takes."""

    schedule: Annotated[str | None, IN_KEY_IF_CHANGED] = Field(default=None)
    """Noise schedule that the authors of the weights state, see docs/models.md. `None`: that of the weights' folder."""

    @field_validator("schedule")
    @classmethod
    def _check_schedule(cls, name: str | None) -> str | None:
        own = [each for each, schedule in SCHEDULES.items() if schedule.actor == cls.schedule_actor]
        if name is None or name in own:
            return name
        other = SCHEDULES.get(name)
        whose = f" ({name} is for {other.weights})" if other else ""
        raise ValueError(f"must be {' or '.join(own) or 'left out'}{whose}")

    @property
    def stated(self) -> Schedule | None:
        """Schedule that the profile chooses by name."""
        return None if self.schedule is None else SCHEDULES[self.schedule]

    def negative_prompt_of(self, shot: Shot) -> str | None:
        """Return the negative prompt of the shot, or of the schedule. `None` if neither has one."""
        stated = self.stated.negative_prompt if self.stated else ""
        return shot.negative_prompt or stated or None

    def check_shot(self, shot: Shot, stage: str) -> None:
        schedule = self.stated
        if schedule and schedule.has_fixed_steps:
            self._check_distilled(shot, stage, schedule)
        elif getattr(shot.steps, stage, None) == 1:  # stages of SDXL have no steps per line
            config = schedule.config if schedule else _stored_config(self.weights) or {}
            if config.get("shift_terminal"):
                # The first timestep would also be the last one, and is 0 / 0.
                name = f"schedule {self.schedule}" if schedule else "the scheduler of these weights"
                raise StageError(f"steps.{stage}: got 1, must be at least 2 with {name}")

    def _check_distilled(self, shot: Shot, stage: str, schedule: Schedule) -> None:
        for settings, stated in (("steps", schedule.steps), ("guidance", schedule.guidance)):
            got = getattr(getattr(shot, settings), stage)
            is_missing = got is None
            if is_missing or (settings == "steps" and got != stated):
                raise StageError(
                    f"{settings}.{stage}: got {'none' if is_missing else got}, the weights of this profile were distilled to "
                    f"{stated:g} (schedule {self.schedule}); set {settings}: {{{stage}: {stated:g}}} in the line or in the "
                    f"profile's `defaults`, or use a profile with other weights for {stage}"
                )

    def notes(self) -> Iterator[str]:
        known = _known_schedule(self)
        schedule = self.stated or known
        if schedule and known and schedule is not known and self._is_for_others(schedule, known):
            yield f"schedule {self.schedule} is for {schedule.weights}, but the weights are {known.weights}"
        stored = _stored_config(self.weights)
        if schedule is None or stored is None:
            return
        difference = _difference(stored, schedule)
        if not difference:
            return
        named = self.schedule is not None
        used = f"schedule {self.schedule} is used" if named else "which is used; set the option `schedule` in the profile"
        yield f"scheduler of the weights: {difference}, the authors of {schedule.weights} state otherwise; {used}"

    def _is_for_others(self, schedule: Schedule, known: Schedule) -> bool:
        """Return whether a schedule is for other weights than these. Those for a few steps may be in the LoRAs of a shot."""
        return bool(known.few_step_lora) or not re.search(schedule.published, f"{self.weights}/")


def use_schedule(pipe: Any, params: StageParams) -> None:
    """Give a diffusers pipeline the scheduler that the profile chooses by name, if it does."""
    schedule = params.stated if isinstance(params, ScheduleParams) else None
    if schedule is not None:
        pipe.scheduler = scheduler_of(schedule)


def scheduler_of(schedule: Schedule) -> Any:
    import diffusers

    from vidgen_ray.nets import published_schedulers

    module, name = (published_schedulers, schedule.own_class) if schedule.own_class else (diffusers, schedule.scheduler)
    return getattr(module, name)(**schedule.config)


def _known_schedule(params: StageParams) -> Schedule | None:
    """Return the schedule of published weights, recognised by their path. `None` for others."""
    merged = str(params.extra_weights.get(FEW_STEP_LORA, ""))
    for schedule in SCHEDULES.values():
        has_lora = re.search(schedule.few_step_lora, merged) if schedule.few_step_lora else not merged
        if has_lora and re.search(schedule.published, f"{params.weights}/"):
            return schedule
    return None


def _stored_config(weights: Path) -> dict[str, Any] | None:
    """Return the content of a scheduler folder. `None` if there is none."""
    try:
        config = json.loads((weights / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return config if isinstance(config, dict) else None


def _difference(stored: Mapping[str, Any], schedule: Schedule) -> str:
    """Return the class of a stored scheduler and its values that differ from those of a schedule. Empty if none do."""
    name = stored.get("_class_name")
    values = {key: stored[key] for key, value in schedule.config.items() if key in stored and stored[key] != value}
    shift = {key: stored[key] for key in ("shift", "flow_shift") if key in stored}
    if name != schedule.scheduler:
        values |= shift
    elif not values:
        return ""
    return ", ".join([str(name), *(f"{key} {value}" for key, value in values.items())])
