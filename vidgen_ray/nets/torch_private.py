"""Everything that uses private names of torch. They may change with any version; each has a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def plain_tensors(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensor, or those that a quantised one consists of, such as values and scales.

    The quantised tensor itself keeps the device with which it was made.
    """
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from plain_tensors(getattr(tensor, name))


@contextmanager
def call_replaced(network: torch.nn.Module, replacement: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace the call of a network in this block, compiled or not. `replacement` gets the call and returns another one.

    A hook would become a part of a network that is compiled as a whole.
    """
    compiled = network._compiled_call_impl
    network._compiled_call_impl = replacement(compiled or network._call_impl)
    try:
        yield
    finally:
        network._compiled_call_impl = compiled


def compile_forward(module: torch.nn.Module, backend: Any) -> None:
    """Compile the forward pass of a module in place of the whole module. Hooks of diffusers, added later, are not compiled."""
    import torch

    module._compiled_call_impl = None
    module.forward = torch.compile(module.forward, backend=backend)


def set_allocator_settings(settings: str) -> None:
    """Give settings to torch's allocators of GPU and pinned host memory. Raises any error for those that it does not know."""
    import torch

    # Since 2.13 the other function warns that it is deprecated.
    by_accelerator = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    if by_accelerator is None:
        by_accelerator = torch.cuda.memory._set_allocator_settings
    by_accelerator(settings)
