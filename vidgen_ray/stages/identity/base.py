"""Interface of injectors, which condition FLUX on the identity of a face."""

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
    """The two pipelines of FLUX, called like the diffusers pipelines. A FluxModel implements this protocol."""

    @property
    def text_to_image(self) -> Callable[..., Any]:
        """Pipeline with the interface of `FluxPipeline`."""

    @property
    def image_to_image(self) -> Callable[..., Any]:
        """Pipeline with the interface of `FluxImg2ImgPipeline`."""


class FluxInjector(ABC):
    """A method to condition FLUX on the identity of a face.

    Use `shared_injector(name, model, weights)`, then `with injector.inject(...) as pipelines: pipelines.text_to_image(...)`.
    An injector has its own networks and uses those of the model without changing them. Blocks must not be nested.
    """

    name: ClassVar[str]
    embedding: ClassVar[str]
    """Recogniser that the weights were trained with. Embeddings of another one silently give another face."""
    passes_per_step: ClassVar[float]
    """Cost added to a denoising step, in passes of FLUX's transformer, for estimates."""
    networks: ClassVar[tuple[str, ...]]
    """Its networks in the memory table."""
    step_curve: ClassVar[str]
    """Curve of the memory table for a denoising step with this injector."""

    @abstractmethod
    def __init__(self, model: FluxModel, weights: Path) -> None:
        """Load the injector's weights with the model's dtype and device.

        Raises SetupError if they are missing, of another kind, or made for another FLUX.
        """

    @abstractmethod
    def move(self, device: str) -> None:
        """Move the injector's own weights to `device`. The model is moved separately."""

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
        """Yield pipelines that generate the face with the strength `shot.identity_strength`. 0 has no effect, bitwise.

        `embedding` (512,) is the one that `self.embedding` names. `pose` is the keypoint image at the size of the shot.
        `start` and `end` are fractions, 0 to 1, of the steps that are run. Identity conditioning is active between them only.
        An injector that needs noise must draw it from its own generator, derived from `shot` and `stage`, so that the diffusion
        noise is the same with and without a face.
        """
