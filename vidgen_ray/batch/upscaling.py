"""Per-frame upscaling across a pool of actors: chunks of a clip go out, come back in order, and are encoded meanwhile.

Chunks in flight lie outside of Ray Data's accounting, so the bound is ours: each clip has at most `CHUNKS_AHEAD` of them
beyond the encoder, however many upscalers there are; more upscalers are kept busy by more clips at once.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from vidgen_ray.batch.layout import Pool
from vidgen_ray.errors import VidgenError
from vidgen_ray.profile import Profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Frames
from vidgen_ray.stages.realesrgan import RealESRGANStage, frame_chunks
from vidgen_ray.steps import UpscaledChunk

CHUNKS_AHEAD = 3
CHUNKS_PER_UPSCALER = 2
"""In flight, so that an upscaler has its next chunk at hand when it ends one."""
CHUNK_RETRIES = 3


def clips_at_once(upscalers: int) -> int:
    """How many clips must be finished at the same time to keep so many upscalers busy; at least two, for the encoder."""
    return max(2, math.ceil(upscalers * CHUNKS_PER_UPSCALER / CHUNKS_AHEAD))


class Upscaler:
    """The actor: RealESRGAN's weights in memory."""

    def __init__(self, profile: Profile) -> None:
        self._unusable: VidgenError | None = None
        try:
            self._stage = RealESRGANStage(profile.params(RealESRGANStage))
            self._stage.load()
        except VidgenError as error:
            # Raised here it would reach the user as Ray's account of a dead actor.
            self._unusable = error

    def upscale(self, frames: Frames, scale: int, upscaler: str) -> tuple[Frames, float]:
        """The chunk upscaled, and the seconds that it took."""
        if self._unusable:
            raise self._unusable
        begun = time.monotonic()
        return self._stage.upscale(frames, scale, upscaler), time.monotonic() - begun


def start_upscalers(profile: Profile, pool: Pool, run: str) -> list[Any]:
    """Start the pool, its actors named `<run>/upscaler/<n>`. They live as long as the driver holds them."""
    actor_class = ray.remote(Upscaler)
    return [
        # A chunk runs twice rather than never when its actor dies; upscaling has no side effects.
        actor_class.options(
            name=f"{run}/upscaler/{n}",
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            max_restarts=-1,
            max_task_retries=CHUNK_RETRIES,
        ).remote(profile)
        for n in range(pool.actors)
    ]


class UpscalerPool:
    """Hands chunks to the actor with the fewest in flight. Safe to use from several threads."""

    def __init__(self, actors: Sequence[Any], frames_per_call: int) -> None:
        # Pools of several processes share the actors; each begins with another one.
        self._actors = random.sample(list(actors), len(actors))
        self._in_flight = [0] * len(actors)
        self._frames_per_call = frames_per_call
        self._lock = threading.Lock()

    def upscaled(self, shot: Shot, frames: Frames) -> Iterator[UpscaledChunk]:
        """The clip's chunks, upscaled, in order."""
        pending: deque[tuple[int, Any]] = deque()
        try:
            for chunk in frame_chunks(len(frames), self._frames_per_call):
                if len(pending) == CHUNKS_AHEAD:
                    yield self._take(pending)
                pending.append(self._send(frames[chunk], shot))
            while pending:
                yield self._take(pending)
        finally:
            for actor, reference in pending:
                ray.cancel(reference, recursive=False)
                self._returned(actor)

    def _send(self, frames: Frames, shot: Shot) -> tuple[int, Any]:
        with self._lock:
            actor = min(range(len(self._actors)), key=self._in_flight.__getitem__)
            self._in_flight[actor] += 1
        return actor, self._actors[actor].upscale.remote(frames, shot.scale, shot.upscaler)

    def _take(self, pending: deque[tuple[int, Any]]) -> UpscaledChunk:
        actor, reference = pending.popleft()
        try:
            return UpscaledChunk(*ray.get(reference))
        except ray.exceptions.RayTaskError as error:
            # The upscaler's own error, without Ray's account of where it was raised.
            raise error.cause from None
        finally:
            self._returned(actor)

    def _returned(self, actor: int) -> None:
        with self._lock:
            self._in_flight[actor] -= 1
