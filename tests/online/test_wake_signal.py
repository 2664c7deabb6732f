"""Waking the director: datagrams for new jobs, and calls that find its address."""

import asyncio
import socket
from types import SimpleNamespace

import pytest
import ray

from vidgen_ray.engine.ray_cluster import LOOPBACK
from vidgen_ray.online import application
from vidgen_ray.online.application import DirectorClient
from vidgen_ray.online.wake_signal import WakeListener, WakeSender

NODE = "node-1"


class Director:
    """Director that counts its calls and the datagrams of its listener."""

    def __init__(self):
        self.calls = self.datagrams = 0
        self.changed = asyncio.Event()
        self.listener = WakeListener(NODE, self._on_datagram)
        self.handle = SimpleNamespace(wake=SimpleNamespace(remote=self._wake))

    def _on_datagram(self):
        self.datagrams += 1
        self.changed.set()

    async def _wake(self):
        self.calls += 1
        self.changed.set()
        return self.listener.address

    async def until(self, calls, datagrams):
        while (self.calls, self.datagrams) != (calls, datagrams):
            self.changed.clear()
            await self.changed.wait()


@pytest.fixture
def on_node(monkeypatch):
    """Return a function that sets the node of this process."""

    def set_node(name):
        monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: name))

    set_node(NODE)
    return set_node


def test_new_jobs_send_datagrams_once_the_address_is_known(on_node):
    async def run():
        director = Director()
        client = DirectorClient(director.handle)
        client.job_accepted()
        await director.until(calls=1, datagrams=0)
        client.job_accepted()
        client.job_accepted()
        await director.until(calls=1, datagrams=2)
        client.job_cancelled()
        await director.until(calls=2, datagrams=2)

    asyncio.run(run())


def test_old_address_is_renewed_by_a_call(on_node, monkeypatch):
    async def run():
        crashed, restarted = Director(), Director()
        client = DirectorClient(crashed.handle)
        client.job_accepted()
        await crashed.until(calls=1, datagrams=0)
        monkeypatch.setattr(application, "ADDRESS_VALID_S", -1.0)
        client._director = restarted.handle
        client.job_accepted()
        await restarted.until(calls=1, datagrams=0)
        monkeypatch.undo()
        client.job_accepted()
        await restarted.until(calls=1, datagrams=1)

    asyncio.run(run())


def test_director_on_another_node_gets_calls_only(on_node):
    async def run():
        director = Director()
        on_node("node-2")
        client = DirectorClient(director.handle)
        for calls in (1, 2):
            client.job_accepted()
            await director.until(calls=calls, datagrams=0)

    asyncio.run(run())


def test_datagrams_without_the_token_are_ignored(on_node):
    async def run():
        director = Director()
        address = director.listener.address
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            for content in (b"", address.token[:-1], address.token + b"x", bytes(16), bytes(1000)):
                other.sendto(content, (LOOPBACK, address.port))
        # Datagrams of one machine arrive in order.
        WakeSender().send(address)
        await director.until(calls=0, datagrams=1)

    asyncio.run(run())
