"""Window of an engine: limits the shots in progress by number and by their raw frames in Ray's object store."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from vidgen_ray.engine.chunks import MAX_CHUNKS_AHEAD, chunk_result_bytes
from vidgen_ray.graph import chunked_stages_of, clip_length
from vidgen_ray.shot import Shot

OBJECT_STORE_SHARE = 0.4
"""Share of Ray's object store that shots in progress may fill. Above it, Ray starts to spill to disk."""


class Window:
    """Limit on concurrent shots. First come, first served. Use it inside an event loop."""

    def __init__(self, shots: int, max_bytes: float) -> None:
        """`shots`: maximum number of shots. `max_bytes`: maximum of their bytes; one shot may exceed it if it is alone."""
        self._shots = shots
        self._max_bytes = max_bytes
        self._open = 0
        self._bytes = 0
        self._waiting: deque[tuple[asyncio.Future[None], int]] = deque()

    @property
    def shots(self) -> int:
        """Maximum number of shots."""
        return self._shots

    @property
    def in_progress(self) -> int:
        return self._open

    def resize(self, shots: int) -> None:
        """Change the maximum number of shots. If more are in progress, no shot is admitted until enough of them have ended."""
        self._shots = shots
        self._admit_waiting()

    @asynccontextmanager
    async def admit(self, size: int) -> AsyncIterator[None]:
        """Wait until there is room for a shot of `size` bytes, and occupy it during the block."""
        if self._waiting or not self._has_room(size):
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((turn, size))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._leave(size)
                # Otherwise a shot that left the window in the meantime has removed the cancelled one.
                elif (turn, size) in self._waiting:
                    self._waiting.remove((turn, size))
                    self._admit_waiting()
                raise
        else:
            self._enter(size)
        try:
            yield
        finally:
            self._leave(size)

    def _has_room(self, size: int) -> bool:
        return self._open < self._shots and (not self._open or self._bytes + size <= self._max_bytes)

    def _enter(self, size: int) -> None:
        self._open += 1
        self._bytes += size

    def _leave(self, size: int) -> None:
        self._open -= 1
        self._bytes -= size
        self._admit_waiting()

    def _admit_waiting(self) -> None:
        while self._waiting and self._has_room(self._waiting[0][1]):
            turn, size = self._waiting.popleft()
            if not turn.done():
                self._enter(size)
                turn.set_result(None)


def object_store_bytes(shot: Shot, chunk_bytes: int) -> int:
    """Return the most bytes of raw frames that a shot in progress has in the object store. `chunk_bytes`: largest chunk."""
    image = 3 * shot.width * shot.height
    if not shot.generate_video:
        return image
    frames = image * shot.clip_frames
    if not chunked_stages_of(shot):
        return image + frames
    n_frames, _ = clip_length(shot)
    return image + frames + min(chunk_result_bytes(shot) * n_frames, chunk_bytes * (MAX_CHUNKS_AHEAD + 1))
