"""Overlap of calls: the end of one call, which needs only the decoder, runs beside the next call of the process.

An executor that allows this sets `overlap_allowed`. Without it, the marked blocks run as any other code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from copy import deepcopy
from functools import cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

N = TypeVar("N", bound="torch.nn.Module")

EndTurn = Callable[[], AbstractContextManager[None]]
"""Lets the next call begin, and runs a block at the same time."""
_end_turn: ContextVar[EndTurn | None] = ContextVar("end_turn", default=None)


@contextmanager
def overlap_allowed(end_turn: EndTurn | None) -> Iterator[None]:
    """Let stages that run in this block end their turn early, in the thread that runs them. `None` forbids it."""
    token = _end_turn.set(end_turn)
    try:
        yield
    finally:
        _end_turn.reset(token)


@contextmanager
def beside_next_call(latents: torch.Tensor, *, enabled: bool) -> Iterator[None]:
    """Run a block beside the next call, if `enabled` and if the executor allows it.

    Use it for the end of a call, which reads `latents`.

    The block may use only what other calls do not change: no parameters of the stage, and networks of its own, see
    `decoder_of`. On a GPU it has a CUDA stream of its own, so its results must be copied to host memory in the block.
    """
    end_turn = _end_turn.get()
    if end_turn is None or not enabled:
        yield
        return
    with own_stream("decode", latents), end_turn():
        yield


@contextmanager
def own_stream(name: str, *inputs: torch.Tensor, device: torch.device | None = None) -> Iterator[None]:
    """Run a block on a CUDA stream of this name, after the work that was started before. On the CPU nothing changes.

    `device`: where the block works, by default where its first input is.
    """
    import torch

    device = inputs[0].device if device is None else device
    if device.type != "cuda":
        yield
        return
    stream = _stream(name, device)
    stream.wait_stream(torch.cuda.current_stream(device))
    for tensor in inputs:
        # Their memory must not be used for something else before the block has read them.
        tensor.record_stream(stream)
    with torch.cuda.stream(stream):
        yield


def used_by_this_stream(tensors: Iterable[torch.Tensor]) -> None:
    """Keep the memory of tensors that another CUDA stream made until the current stream has used them."""
    import torch

    for tensor in tensors:
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))


@cache
def _stream(name: str, device: torch.device) -> torch.cuda.Stream:
    import torch

    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no type for it


def decoder_of(autoencoder: N, *, overlap_shots: bool) -> N:
    """Return the autoencoder that decodes: with `overlap_shots` a copy with the same memory for its weights.

    The copy has a precision, settings and caches of its own, since encoding the next image changes those of the autoencoder.
    It must be made again after the weights have moved.
    """
    if not overlap_shots:
        return autoencoder

    import torch

    memo: dict[int, object] = {id(buffer): buffer.detach() for buffer in autoencoder.buffers()}
    for weight in autoencoder.parameters():
        memo[id(weight)] = torch.nn.Parameter(weight.data, requires_grad=False)
    return deepcopy(autoencoder, memo)
