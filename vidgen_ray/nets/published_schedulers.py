"""Schedulers of published weights whose noise levels diffusers' own classes do not give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.configuration_utils import register_to_config

if TYPE_CHECKING:
    import torch


class StatedNoiseLevels(FlowMatchEulerDiscreteScheduler):  # type: ignore[misc]  # diffusers is untyped, its classes are Any
    """Euler's method for flow matching, at noise levels that do not depend on those that a pipeline gives.

    The levels are those before `shift`. diffusers' own class ends at its lowest training level, and rounds the latents to the
    precision of the network in each step.
    """

    @register_to_config  # type: ignore[untyped-decorator]  # diffusers has no types
    def __init__(self, noise_levels: Sequence[float] = (1.0,), shift: float = 1.0, num_train_timesteps: int = 1000) -> None:
        super().__init__(num_train_timesteps=num_train_timesteps, shift=shift)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
    ) -> None:
        """Set the stated levels, and for another number of steps, as in measurements, levels between them and 0."""
        levels, given = [*self.config.noise_levels, 0.0], sigmas if timesteps is None else timesteps
        steps = len(given) if given is not None else num_inference_steps or len(levels) - 1
        positions = np.arange(steps) * (len(levels) - 1) / steps
        super().set_timesteps(sigmas=np.interp(positions, range(len(levels)), levels), device=device)

    def step(self, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, **arguments: Any) -> Any:
        return super().step(model_output.to(sample.dtype), timestep, sample, **arguments)


class WanUniPC(UniPCMultistepScheduler):  # type: ignore[misc]  # diffusers is untyped, its classes are Any
    """UniPC for Wan, at equal distances from the first training level, 0.999, to 0. diffusers' own ones go from 1 to 0.001.

    Source: Wan-Video/Wan2.2, `wan/utils/fm_solvers_unipc.py`.
    """

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Set the levels of this many steps."""
        if sigmas is None and num_inference_steps is not None:
            first = 1 - 1 / self.config.num_train_timesteps
            sigmas = [first * (1 - step / num_inference_steps) for step in range(num_inference_steps)]
        super().set_timesteps(device=device, sigmas=np.array(sigmas), mu=mu)
