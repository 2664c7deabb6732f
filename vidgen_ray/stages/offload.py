"""Base of stages whose pipeline can stay in host memory, with one part at a time on the GPU."""

from typing import Annotated, Any, TypeVar

from vidgen_ray.stages.base import InKey, Stage, StageParams


class OffloadParams(StageParams):
    cpu_offload: Annotated[bool, InKey.NEVER] = False
    """Keep the weights in host memory and move each part (text encoder, transformer, autoencoder) to the GPU when it runs."""


OP = TypeVar("OP", bound=OffloadParams)


class OffloadedStage(Stage[OP]):
    """A stage with one diffusers pipeline, loaded by `load_pipeline` with `cpu_offload`."""

    pipe: Any

    def move(self, device: str) -> None:
        # Offloaded weights are in host memory whenever the stage does not run.
        if not self.params.cpu_offload:
            self.pipe.to(device)
