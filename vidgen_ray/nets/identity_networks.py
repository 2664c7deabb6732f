"""Networks that condition diffusion models on a face: the projection to tokens, InfuseNet of InfiniteYou, and IdentityNet of
InstantID.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import ControlNetModel, FluxControlNetModel
from einops import rearrange
from torch import Tensor, nn

from vidgen_ray.errors import SetupError
from vidgen_ray.nets.weight_files import library_errors, load_model, load_torch_file, not_finite

HEAD_CHANNELS = 64
"""Channels of an attention head. The weights do not determine it. Every published face resampler uses 64."""
PROJECTION = "image_proj"
"""Name of the resampler's state dict in a published file."""


@dataclass(frozen=True, slots=True)
class ResamplerSizes:
    """Layer sizes: InfuseNet (512, 8, 1280, 20, 4, 5120, 4096), InstantID for SDXL (512, 16, 1280, 20, 4, 5120, 2048)."""

    embedding: int
    tokens: int
    channels: int
    heads: int
    depth: int
    hidden: int
    """Hidden channels of a feed-forward layer."""
    output: int

    @classmethod
    def from_weights(cls, weights: Mapping[str, Tensor]) -> Self:
        """Read the sizes from a state dict. Raises ValueError if it does not belong to a resampler."""
        try:
            _, tokens, channels = weights["latents"].shape
            heads = weights["layers.0.0.to_q.weight"].shape[0] // HEAD_CHANNELS
            hidden = weights["layers.0.1.1.weight"].shape[0]
            embedding = weights["proj_in.weight"].shape[1]
            output = weights["proj_out.weight"].shape[0]
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(f"has other tensors ({error})") from None
        depth = len({key.split(".")[1] for key in weights if key.startswith("layers.")})
        return cls(embedding, tokens, channels, heads, depth, hidden, output)


class FaceResampler(nn.Module):
    """Embeddings (B, embedding) -> tokens (B, tokens, output): learned latents attend to the embedding and to each other.

    The state dict has the keys of IP-Adapter's `Resampler`, which InstantID and InfiniteYou use for their published weights.
    Source: Alayrac et al. 2022, Flamingo, arXiv:2204.14198 (the Perceiver resampler).
    """

    def __init__(self, sizes: ResamplerSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.latents = nn.Parameter(torch.randn(1, sizes.tokens, sizes.channels) / sizes.channels**0.5)
        self.proj_in = nn.Linear(sizes.embedding, sizes.channels)
        self.proj_out = nn.Linear(sizes.channels, sizes.output)
        self.norm_out = nn.LayerNorm(sizes.output)
        self.layers = nn.ModuleList(nn.ModuleList([_Attention(sizes), _feed_forward(sizes)]) for _ in range(sizes.depth))

    def forward(self, embeddings: Tensor) -> Tensor:
        face = self.proj_in(embeddings)[:, None]
        latents = self.latents.expand(len(embeddings), -1, -1)
        for attention, feed_forward in self._layers():
            latents = latents + attention(face, latents)
            latents = latents + feed_forward(latents)
        tokens: Tensor = self.norm_out(self.proj_out(latents))
        return tokens

    def _layers(self) -> Iterator[tuple[nn.Module, nn.Module]]:
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleList)
            yield layer[0], layer[1]


class _Attention(nn.Module):
    """Attention from the latents (B, n, channels) to the face (B, 1, channels) and the latents."""

    def __init__(self, sizes: ResamplerSizes) -> None:
        super().__init__()
        inner = sizes.heads * HEAD_CHANNELS
        self.heads = sizes.heads
        self.norm1 = nn.LayerNorm(sizes.channels)
        self.norm2 = nn.LayerNorm(sizes.channels)
        self.to_q = nn.Linear(sizes.channels, inner, bias=False)
        self.to_kv = nn.Linear(sizes.channels, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, sizes.channels, bias=False)

    def forward(self, face: Tensor, latents: Tensor) -> Tensor:
        face, latents = self.norm1(face), self.norm2(latents)
        keys, values = self.to_kv(torch.cat([face, latents], dim=1)).chunk(2, dim=-1)
        query, keys, values = (
            rearrange(x, "b n (heads c) -> b heads n c", heads=self.heads) for x in (self.to_q(latents), keys, values)
        )
        attended = nn.functional.scaled_dot_product_attention(query, keys, values)
        out: Tensor = self.to_out(rearrange(attended, "b heads n c -> b n (heads c)"))
        return out


def _feed_forward(sizes: ResamplerSizes) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(sizes.channels),
        nn.Linear(sizes.channels, sizes.hidden, bias=False),
        nn.GELU(),
        nn.Linear(sizes.hidden, sizes.channels, bias=False),
    )


def read_parts(file: Path, *parts: str) -> dict[str, dict[str, Tensor]]:
    """Return the named state dicts of a published file, a torch pickle of state dicts by name. Runs no code from the file.

    Raises SetupError if the file is missing, is not such a pickle, or lacks a part.
    """
    if not file.is_file():
        raise SetupError(f"{file}: no such file; copy the published file to this path")
    with library_errors(f"{file}: is not a file of tensors only; copy the published file again"):
        content = load_torch_file(file)
    for part in parts:
        state = content.get(part) if isinstance(content, dict) else None
        if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            got = f"a dict of {', '.join(map(str, content))}"[:200] if isinstance(content, dict) else type(content).__name__
            raise SetupError(f"{file}: got {got}, must have the weights {part!r}; copy the published file again")
    return {part: content[part] for part in parts}


def build_resampler(weights: Mapping[str, Tensor], file: Path) -> FaceResampler:
    """Build the resampler from a state dict that was read from `file`.

    Raises SetupError if tensors are missing, unexpected or have the wrong shape.
    """
    try:
        sizes = ResamplerSizes.from_weights(weights)
        with torch.device("meta"):
            resampler = FaceResampler(sizes)
        resampler.load_state_dict(dict(weights), assign=True)
        if (name := not_finite(weights)) is not None:
            raise ValueError(f"has NaN or infinite values in '{name}'")
    # torch names missing and unexpected tensors, and those of another shape, in a RuntimeError.
    except (ValueError, RuntimeError) as error:
        raise SetupError(f"{file}: {PROJECTION} {error}; it is not a projection of face embeddings") from None
    return resampler.eval().requires_grad_(False)


NET_FOLDER, PROJECTION_FILE = "InfuseNetModel", "image_proj_model.bin"
"""Names in the published folders of `ByteDance/InfiniteYou`: infu_flux_v1.0/aes_stage2 and infu_flux_v1.0/sim_stage1."""
EMBEDDING_SIZE = 512


class _IdentityTokens:
    """Tokens that a ControlNet attends to instead of the prompt's."""

    _tokens: Tensor | None = None

    @contextmanager
    def identity(self, tokens: Tensor) -> Iterator[None]:
        """Use these tokens (B, n, channels of the attention) in the block.

        IdentityControlNet expands a batch of 1 to the rows of a call. IdentityNet takes one row per row of a call. With
        classifier-free guidance, the first half of these must be the tokens of an embedding of zeros.
        """
        previous, self._tokens = self._tokens, tokens
        try:
            yield
        finally:
            self._tokens = previous


class IdentityControlNet(_IdentityTokens, FluxControlNetModel):  # type: ignore[misc]  # diffusers is untyped, its classes are Any
    """FluxControlNetModel that attends to identity tokens instead of the prompt's tokens.

    It has the weights and the `from_pretrained` of FluxControlNetModel and works in every diffusers pipeline that takes one.
    Source: Jiang et al. 2025, InfiniteYou, arXiv:2503.16418.
    """

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
        if self._tokens is None:
            raise RuntimeError(
                "IdentityControlNet was called without identity tokens; call it within `with net.identity(tokens):`"
            )
        rows = len(hidden_states)
        return super().forward(
            hidden_states,
            *args,
            encoder_hidden_states=self._tokens.expand(rows, -1, -1),
            txt_ids=hidden_states.new_zeros(self._tokens.shape[1], 3),
            # InfuseNet was trained and published with a guidance of 1.
            guidance=hidden_states.new_ones(rows) if self.config.guidance_embeds else None,
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
    net = load_model(IdentityControlNet, "FluxControlNetModel", folder / NET_FOLDER, dtype, device)
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
    return InfuseNet(net, resampler.to(device, dtype))


class IdentityNet(_IdentityTokens, ControlNetModel):  # type: ignore[misc]  # diffusers is untyped, its classes are Any
    """ControlNetModel that attends to identity tokens instead of the prompt's tokens.

    It has the weights and the `from_pretrained` of ControlNetModel and works in every diffusers pipeline that takes one.
    Source: Wang et al. 2024, InstantID, arXiv:2401.07519.
    """

    def forward(self, *args: Any, encoder_hidden_states: Tensor | None = None, **kwargs: Any) -> Any:
        """Run ControlNetModel with the identity tokens. `encoder_hidden_states` is ignored."""
        if self._tokens is None:
            raise RuntimeError("IdentityNet was called without identity tokens; call it within `with net.identity(tokens):`")
        return super().forward(*args, encoder_hidden_states=self._tokens, **kwargs)
