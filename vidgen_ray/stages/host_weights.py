"""Move networks between GPU memory and host memory without copying unchanged weights back.

A network that leaves the GPU for the first time gets a copy of its weights in pinned host memory. Later, its GPU copy is
dropped and the host copy is used again, since inference does not change weights. Adapters of LoRAs are copied each time: they
are small, and are loaded and replaced while the network is in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ADAPTER = "lora_"
"""Part of the names of the parameters that peft adds for a LoRA."""
_COPY = "_vidgen_host_copy"
"""Attribute of a tensor on a GPU: its copy in host memory."""


def move_networks(networks: Iterable[Any], device: str) -> None:
    """Move torch modules to `device`, `cpu` for host memory. Anything else among `networks` is ignored."""
    import torch

    for network in networks:
        if not isinstance(network, torch.nn.Module):
            continue
        tensors = list(_tensors(network))
        if not all(_is_plain(tensor) for _, tensor in tensors):
            # Quantised tensors are classes of their own, whose data cannot be replaced, or which have scales in addition.
            network.to(device)
            continue
        for name, tensor in tensors:
            if device == "cpu":
                _to_host(name, tensor)
            else:
                _to_gpu(name, tensor, device)
    if device != "cpu":
        _wait_for_copies(device)


def _tensors(network: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all parameters and buffers once, also those that several layers share."""
    yield from network.named_parameters()
    yield from network.named_buffers()


def _is_plain(tensor: torch.Tensor) -> bool:
    import torch

    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and type(tensor.data) is torch.Tensor


def _to_host(name: str, tensor: torch.Tensor) -> None:
    copy = getattr(tensor, _COPY, None)
    if copy is None:
        if _is_on_host(tensor):
            return
        copy = _pinned_copy(tensor)
    tensor.data = copy
    setattr(tensor, _COPY, None)


def _to_gpu(name: str, tensor: torch.Tensor, device: str) -> None:
    if not _is_on_host(tensor):
        return
    host = tensor.data
    tensor.data = _on_device(host, device)
    # Adapters may change in place while they are on the GPU.
    setattr(tensor, _COPY, None if ADAPTER in name else host)


def _is_on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"


def _on_device(host: torch.Tensor, device: str) -> torch.Tensor:
    return host.to(device, non_blocking=True)


def _pinned_copy(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy in host memory; pinned, so that it is copied to a GPU at the full rate of the bus, if there is one."""
    import torch

    copy = torch.empty_like(tensor, device="cpu", pin_memory=torch.cuda.is_available())
    copy.copy_(tensor)
    return copy


def _wait_for_copies(device: str) -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize(device)
