"""IdentityNet, the SDXL ControlNet of InstantID, which is told a person instead of a prompt. Knows tokens, no faces."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import ControlNetModel
from torch import Tensor


class IdentityNet(ControlNetModel):  # type: ignore[misc]  # diffusers is untyped, its classes are Any
    """ControlNetModel that attends to identity tokens where its caller hands it the prompt's.

    Same weights, same `from_pretrained`; it may stand in any diffusers pipeline that takes a ControlNetModel.
    Source: Wang et al. 2024, InstantID, arXiv:2401.07519.
    """

    _tokens: Tensor | None = None

    @contextmanager
    def identity(self, tokens: Tensor) -> Iterator[None]:
        """Run a block with these tokens (rows, n, cross_attention_dim), a row for each of a call's.

        With classifier-free guidance the first half of the rows is nobody: the tokens of an embedding of zeros.
        """
        before, self._tokens = self._tokens, tokens
        try:
            yield
        finally:
            self._tokens = before

    def forward(self, *args: Any, encoder_hidden_states: Tensor | None = None, **kwargs: Any) -> Any:
        """As ControlNetModel's; the prompt's states are not looked at."""
        if self._tokens is None:
            raise RuntimeError("IdentityNet was called without a person; call it within `with net.identity(tokens):`")
        return super().forward(*args, encoder_hidden_states=self._tokens, **kwargs)
