"""InfuseNet, the FLUX ControlNet conditioned on identity tokens instead of text, with its projection.

Works on tokens, latents and weights. Does not know shots, faces or pipelines.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxControlNetModel
from torch import Tensor

from vidgen_ray.errors import SetupError
from vidgen_ray.nets.face_resampler import PROJECTION, FaceResampler, build_resampler, read_parts
from vidgen_ray.nets.model_folder import load_model

NET_FOLDER, PROJECTION_FILE = "InfuseNetModel", "image_proj_model.bin"
"""Names in the published folders of `ByteDance/InfiniteYou`: infu_flux_v1.0/aes_stage2 and infu_flux_v1.0/sim_stage1."""
EMBEDDING_SIZE = 512


class IdentityControlNet(FluxControlNetModel):  # type: ignore[misc]  # diffusers is untyped, its classes are Any
    """FluxControlNetModel that attends to identity tokens instead of the prompt's tokens.

    It has the weights and the `from_pretrained` of FluxControlNetModel and works in every diffusers pipeline that takes one.
    Source: Jiang et al. 2025, InfiniteYou, arXiv:2503.16418.
    """

    _identity: tuple[Tensor, float] | None = None

    @contextmanager
    def identity(self, tokens: Tensor, guidance: float = 1.0) -> Iterator[None]:
        """Use these tokens (B, n, joint_attention_dim) in the block. A batch of 1 is expanded to the rows of a call.

        `guidance` replaces the transformer's guidance. InfuseNet was trained and published with 1.
        """
        previous, self._identity = self._identity, (tokens, guidance)
        try:
            yield
        finally:
            self._identity = previous

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        encoder_hidden_states: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run FluxControlNetModel with the identity tokens.

        `encoder_hidden_states`, `txt_ids` and `guidance` of the caller are ignored.
        """
        if self._identity is None:
            raise RuntimeError(
                "IdentityControlNet was called without identity tokens; call it within `with net.identity(tokens):`"
            )
        tokens, identity_guidance = self._identity
        rows = len(hidden_states)
        return super().forward(
            hidden_states,
            *args,
            encoder_hidden_states=tokens.expand(rows, -1, -1),
            txt_ids=hidden_states.new_zeros(tokens.shape[1], 3),
            guidance=hidden_states.new_full((rows,), identity_guidance) if self.config.guidance_embeds else None,
            **kwargs,
        )


@dataclass(frozen=True, slots=True)
class InfuseNet:
    """ControlNet and resampler of one published folder, on one device and in one precision."""

    net: IdentityControlNet
    resampler: FaceResampler

    @torch.no_grad()
    def tokens(self, embeddings: Tensor) -> Tensor:
        """Return tokens (B, n, joint_attention_dim) of IR-SE50 embeddings (B, 512) of length 1."""
        tokens: Tensor = self.resampler(embeddings.to(self.net.device, self.net.dtype))
        return tokens


def load_infusenet(folder: Path, dtype: torch.dtype, device: str) -> InfuseNet:
    """Load both networks from a folder with `InfuseNetModel/` and `image_proj_model.bin`.

    Raises SetupError if one of them is missing or of another kind, or if they do not match.
    """
    if not folder.is_dir():
        raise SetupError(
            f"{folder}: no such folder; copy infu_flux_v1.0/aes_stage2 (or sim_stage1) of ByteDance/InfiniteYou to this path"
        )
    net = load_model(IdentityControlNet, "FluxControlNetModel", folder / NET_FOLDER, dtype)
    if net.union or net.input_hint_block is not None:
        raise SetupError(
            f"{folder / NET_FOLDER}: is a FLUX ControlNet of another design, with control modes or hints; must be InfuseNet"
        )
    file = folder / PROJECTION_FILE
    resampler = build_resampler(read_parts(file, PROJECTION)[PROJECTION], file)
    sizes = resampler.sizes
    if sizes.embedding != EMBEDDING_SIZE:
        raise SetupError(f"{file}: takes embeddings of {sizes.embedding} numbers, must be {EMBEDDING_SIZE} (a face embedding)")
    if sizes.output != net.config.joint_attention_dim:
        raise SetupError(
            f"{file}: returns tokens of {sizes.output} numbers, {NET_FOLDER} takes {net.config.joint_attention_dim}; "
            "copy both from the same published folder"
        )
    return InfuseNet(net.to(device), resampler.to(device, dtype))
