"""What an injector is: a way to make FLUX draw a certain person. Knows FluxModel and its two calls, no method and no files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Image

if TYPE_CHECKING:
    from vidgen_ray.stages.flux_model import FluxModel


class FluxPipelines(Protocol):
    """The two ways to a picture, each called as the diffusers pipeline of that name. A FluxModel is one of these."""

    @property
    def text_to_image(self) -> Callable[..., Any]:
        """As `FluxPipeline`."""

    @property
    def image_to_image(self) -> Callable[..., Any]:
        """As `FluxImg2ImgPipeline`."""


class FluxInjector(ABC):
    """Use `shared_injector(name, model, weights)`; then `with injector.inject(...) as calls: calls.text_to_image(...)`.

    An injector owns networks of its own and borrows those of the model, which it leaves as they were. One block at a time.
    """

    name: ClassVar[str]
    embedding: ClassVar[str]
    """Name of the face embedding that the weights were trained with; any other would be another person, unnoticed."""
    passes: ClassVar[float]
    """The work that it adds to a step, in passes of FLUX's transformer. For estimates."""

    @abstractmethod
    def __init__(self, model: FluxModel, weights: Path) -> None:
        """Load the method's own weights in the model's precision, to the model's device.

        Raises SetupError where they are missing, of another kind, or made for another FLUX.
        """

    @abstractmethod
    def move(self, device: str) -> None:
        """Take the method's own weights to another memory; the model moves by itself."""

    @abstractmethod
    def inject(
        self,
        embedding: NDArray[np.float32],
        pose: Image,
        shot: Shot,
        stage: str,
        *,
        start: float = 0.0,
        end: float = 1.0,
    ) -> AbstractContextManager[FluxPipelines]:
        """A block in which the calls draw the person as strongly as `shot.identity_strength` says; 0 is not at all, bitwise.

        `embedding` is what the model of that name gives, (512,) of a recogniser; `pose` the keypoint picture at the shot's
        size. A method that needs noise of its own draws it from a generator of its own, derived from `shot` and the name
        of the `stage`: the diffusion noise is the same with the person and without. `start` and `end` are shares, 0 to 1,
        of the steps that are run; outside of them the person has no say.
        """
