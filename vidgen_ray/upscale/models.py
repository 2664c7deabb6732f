"""Super-resolution networks by name or path, and Real-ESRGAN's mixture of two weights for denoising."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidgen_ray.errors import SetupError, StageError, UsageError
from vidgen_ray.nets.finite import require_finite_weights
from vidgen_ray.stages.realesrgan import ENDINGS, load_network
from vidgen_ray.system.cache_dir import digest
from vidgen_ray.weights import resolve

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor

DEFAULT_MODEL = "animevideov3"
BUILTIN_MODELS: Mapping[str, str] = {
    "animevideov3": "drawn and filmed video, fast",
    "x4plus-anime": "drawn images, ten times slower",
    "x4plus": "photos and film, about twenty times slower",
}
GENERAL, DENOISING = "general-x4v3", "general-wdn-x4v3"
"""Parts of the file names of the two weights that `denoise` mixes."""


@dataclass(frozen=True)
class UpscaleModel:
    """A network in a file, or the mixture of two files with the same layout."""

    name: str
    file: Path
    denoising_file: Path | None = None
    denoise: float = 1.0
    """Share of `file` in the weights, 0 to 1. The rest is that of `denoising_file`."""

    @cached_property
    def key(self) -> str:
        """Return the digest of the weights."""
        if self.denoising_file is None:
            return digest(self.file)
        parts = f"{digest(self.file)} {digest(self.denoising_file)} {self.denoise}"
        return hashlib.sha256(parts.encode()).hexdigest()

    def load(self) -> ImageModelDescriptor[Any]:
        """Load the network in float32. Raises StageError if a file does not hold one, or two files do not fit together."""
        network = load_network(self.file)
        if self.denoising_file is not None:
            other = load_network(self.denoising_file).model.state_dict()
            own = network.model.state_dict()
            if {name: tensor.shape for name, tensor in own.items()} != {name: tensor.shape for name, tensor in other.items()}:
                raise StageError(f"{self.file.name} and {self.denoising_file.name} have different layouts, cannot be mixed")
            network.model.load_state_dict({name: tensor.lerp(other[name], 1 - self.denoise) for name, tensor in own.items()})
        try:
            require_finite_weights({self.name: network.model})
        except ValueError as error:
            raise StageError(str(error)) from None
        return network


def find_model(name: str, denoise: float | None = None) -> UpscaleModel:
    """Return the model with this name, or in this file.

    `denoise`, 0 to 1, needs weights named like realesr-general-x4v3 and, beside them, realesr-general-wdn-x4v3. As in
    Real-ESRGAN, 0 keeps noise, 1 removes it.
    Raises UsageError for an unknown name, and for `denoise` with other weights.
    """
    if name in BUILTIN_MODELS:
        file = next(path for ending in ENDINGS if (path := resolve("builtin:realesrgan") / f"{name}{ending}").is_file())
    else:
        file = Path(name).expanduser()
        if not file.is_file():
            allowed = f"must be one of {', '.join(BUILTIN_MODELS)}, or the path of a {' or '.join(ENDINGS)} file"
            raise UsageError(f"--model: got {name!r}, {allowed}")
        if file.suffix not in ENDINGS:
            raise UsageError(f"--model: got {name!r}, must end in {' or '.join(ENDINGS)}")
    if denoise is None:
        return UpscaleModel(file.stem, file)
    if not 0 <= denoise <= 1:
        raise UsageError(f"--denoise: got {denoise:g}, must be from 0 to 1")
    partner = file.with_name(file.name.replace(GENERAL, DENOISING))
    if GENERAL not in file.name:
        raise UsageError(f"--denoise: got weights {file.name}, must be those of realesr-{GENERAL}, by path with --model")
    if not partner.is_file():
        raise SetupError(f"--denoise: needs {partner}, which does not exist; put it beside {file.name}")
    return UpscaleModel(f"{file.stem} (denoise {denoise:g})", file, partner, denoise)
