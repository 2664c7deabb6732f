"""InfuseNet, the FLUX ControlNet that is told a person instead of a prompt, and its projection, from published files.

Knows tokens, latents and weights; does not know shots, faces or pipelines.
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
"""As published in `ByteDance/InfiniteYou`, infu_flux_v1.0/aes_stage2 and infu_flux_v1.0/sim_stage1."""
EMBEDDING_SIZE = 512


class IdentityControlNet(FluxControlNetModel):  # type: ignore[misc]  # diffusers is untyped, its classes are Any
    """FluxControlNetModel that attends to identity tokens where its caller hands it the prompt's.

    Same weights, same `from_pretrained`; it may stand in any diffusers pipeline that takes a FluxControlNetModel.
    Source: Jiang et al. 2025, InfiniteYou, arXiv:2503.16418.
    """

    _identity: tuple[Tensor, float] | None = None

    @contextmanager
    def identity(self, tokens: Tensor, guidance: float = 1.0) -> Iterator[None]:
        """Run a block with these tokens (B, n, joint_attention_dim); of a batch of 1 every row of a call gets the same.

        `guidance` is what InfuseNet is told in place of the transformer's; it was trained and published with 1.
        """
        before, self._identity = self._identity, (tokens, guidance)
        try:
            yield
        finally:
            self._identity = before

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        encoder_hidden_states: Tensor | None = None,
        txt_ids: Tensor | None = None,
        guidance: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As FluxControlNetModel's; the prompt's states and places and the transformer's guidance are not looked at."""
        if self._identity is None:
            raise RuntimeError("IdentityControlNet was called without a person; call it within `with net.identity(tokens):`")
        tokens, told = self._identity
        rows = len(hidden_states)
        return super().forward(
            hidden_states,
            *args,
            encoder_hidden_states=tokens.expand(rows, -1, -1),
            txt_ids=hidden_states.new_zeros(tokens.shape[1], 3),
            guidance=hidden_states.new_full((rows,), told) if self.config.guidance_embeds else None,
            **kwargs,
        )


@dataclass(frozen=True, slots=True)
class InfuseNet:
    """The two networks of one published folder, on one device, in one precision."""

    net: IdentityControlNet
    resampler: FaceResampler

    @torch.no_grad()
    def tokens(self, embeddings: Tensor) -> Tensor:
        """Embeddings (B, 512) of IR-SE50, normalised as it gives them -> tokens (B, n, joint_attention_dim)."""
        tokens: Tensor = self.resampler(embeddings.to(self.net.device, self.net.dtype))
        return tokens

    def to(self, device: str) -> None:
        self.net.to(device)
        self.resampler.to(device)


def load_infusenet(folder: Path, dtype: torch.dtype, device: str) -> InfuseNet:
    """From a folder with `InfuseNetModel/` and `image_proj_model.bin`.

    Raises SetupError where one of them is not there or is not what its name says, or where they do not fit together.
    """
    if not folder.is_dir():
        raise SetupError(
            f"{folder}: no such folder; copy infu_flux_v1.0/aes_stage2 (or sim_stage1) of ByteDance/InfiniteYou there"
        )
    net = load_model(IdentityControlNet, "FluxControlNetModel", folder / NET_FOLDER, dtype)
    if net.union or net.input_hint_block is not None:
        raise SetupError(
            f"{folder / NET_FOLDER}: a FLUX ControlNet of another design, with control modes or hints; not InfuseNet"
        )
    file = folder / PROJECTION_FILE
    resampler = build_resampler(read_parts(file, PROJECTION)[PROJECTION], file)
    sizes = resampler.sizes
    if sizes.embedding != EMBEDDING_SIZE:
        raise SetupError(f"{file}: takes embeddings of {sizes.embedding} numbers, must be {EMBEDDING_SIZE}, as a face has")
    if sizes.output != net.config.joint_attention_dim:
        raise SetupError(
            f"{file}: gives tokens of {sizes.output} numbers, {NET_FOLDER} takes {net.config.joint_attention_dim}; "
            "copy both from one published folder"
        )
    return InfuseNet(net.to(device), resampler.to(device, dtype))
