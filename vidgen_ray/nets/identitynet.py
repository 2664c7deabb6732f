"""IdentityNet, InstantID's SDXL ControlNet conditioned on identity tokens instead of text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import ControlNetModel
from torch import Tensor


class IdentityNet(ControlNetModel):  # type: ignore[misc]  # diffusers is untyped, its classes are Any
    """ControlNetModel that attends to identity tokens instead of the prompt's tokens.

    It has the weights and the `from_pretrained` of ControlNetModel and works in every diffusers pipeline that takes one.
    Source: Wang et al. 2024, InstantID, arXiv:2401.07519.
    """

    _tokens: Tensor | None = None

    @contextmanager
    def identity(self, tokens: Tensor) -> Iterator[None]:
        """Use these tokens (rows, n, cross_attention_dim) in the block, one row per row of a call.

        With classifier-free guidance, the first half of the rows must be the tokens of an embedding of zeros.
        """
        previous, self._tokens = self._tokens, tokens
        try:
            yield
        finally:
            self._tokens = previous

    def forward(self, *args: Any, encoder_hidden_states: Tensor | None = None, **kwargs: Any) -> Any:
        """Run ControlNetModel with the identity tokens. `encoder_hidden_states` is ignored."""
        if self._tokens is None:
            raise RuntimeError("IdentityNet was called without identity tokens; call it within `with net.identity(tokens):`")
        return super().forward(*args, encoder_hidden_states=self._tokens, **kwargs)
