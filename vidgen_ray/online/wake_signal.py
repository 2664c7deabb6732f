"""Datagrams that wake the director for a new job. A call through Ray Serve takes both processes several milliseconds more.

A datagram may be lost, so it is only a faster way: the director also polls the store.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from vidgen_ray.engine.ray_cluster import LOOPBACK

TOKEN_BYTES = 16


class WakeAddress(NamedTuple):
    """Address of a listener, for processes on its node."""

    node: str
    """Ray node id."""
    port: int
    token: bytes
    """Content of the datagram. Others, e.g. of another user of the machine, are ignored."""


class WakeListener:
    """Socket on the loopback interface that receives datagrams. Create it inside an event loop, which calls `on_wake`."""

    def __init__(self, node: str, on_wake: Callable[[], None]) -> None:
        self._on_wake = on_wake
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind((LOOPBACK, 0))
        self.address = WakeAddress(node, self._socket.getsockname()[1], secrets.token_bytes(TOKEN_BYTES))
        asyncio.get_running_loop().add_reader(self._socket, self._receive)

    def _receive(self) -> None:
        # One datagram per call, so that many of them do not delay the loop.
        with suppress(OSError):
            if hmac.compare_digest(self._socket.recv(TOKEN_BYTES + 1), self.address.token):
                self._on_wake()


class WakeSender:
    """Socket that sends datagrams to listeners on this node."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def send(self, address: WakeAddress) -> None:
        """Wake the listener, unless it is gone."""
        with suppress(OSError):
            self._socket.sendto(address.token, (LOOPBACK, address.port))
