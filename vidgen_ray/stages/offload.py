"""Base of stages whose pipeline can stay in host memory, with one part at a time on the GPU."""

from typing import Annotated, Any, Literal, TypeVar

from vidgen_ray.stages.base import NOT_IN_KEY, Stage, StageParams
from vidgen_ray.stages.memory import TILES_PX, activation_bytes, next_tile_px


class OffloadParams(StageParams):
    cpu_offload: Annotated[bool, NOT_IN_KEY] = False
    """Keep the weights in host memory and move each part (text encoder, transformer, autoencoder) to the GPU when it runs."""


class ImageParams(OffloadParams):
    """Parameters of a stage that makes images and sees others."""

    vae_tile_px: Literal[512, 256] | None = None
    """Side of the tiles in which the autoencoder works, for large images on small GPUs. `None`: on whole images."""


OP = TypeVar("OP", bound=OffloadParams)
IP = TypeVar("IP", bound=ImageParams)


class OffloadedStage(Stage[OP]):
    """A stage with one diffusers pipeline, loaded by `load_pipeline` with `cpu_offload`."""

    pipe: Any

    def move(self, device: str) -> None:
        # Offloaded weights are in host memory whenever the stage does not run.
        if not self.params.cpu_offload:
            self.pipe.to(device)


class ImageStage(OffloadedStage[IP]):
    """An offloaded stage that makes an image."""

    @classmethod
    def lower_memory(cls, params: IP) -> IP | None:
        """Return smaller tiles of the autoencoder."""
        if params.vae_tile_px == TILES_PX[-1]:
            return None
        return params.model_copy(update={"vae_tile_px": next_tile_px(params.vae_tile_px)})


def autoencoder_peaks(model: str, params: ImageParams, pixels: int, seen_pixels: int) -> tuple[int, int]:
    """Return the bytes of activations of encoding an image of `seen_pixels`, and of decoding one of `pixels`."""
    if params.vae_tile_px is None:
        encode = activation_bytes(f"{model}/encode", seen_pixels, params.dtype)
        return encode, activation_bytes(f"{model}/decode", pixels, params.dtype)
    decode = activation_bytes(f"{model}/decode:tile{params.vae_tile_px}", pixels, params.dtype)
    # The image itself, in the precision of the network and in float32.
    image = seen_pixels * 3 * (2 + 4)
    return activation_bytes(f"{model}/encode", params.vae_tile_px**2, params.dtype) + image, decode
