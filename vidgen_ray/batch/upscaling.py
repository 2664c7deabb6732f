"""Per-frame upscaling across a pool of actors: chunks of a clip go out, come back in order, and are encoded meanwhile.

Chunks in flight lie outside of Ray Data's accounting, so the bound is ours: each clip has at most `window` chunks beyond
the encoder, and raw upscaled frames never exist as a whole clip.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from vidgen_ray.batch.layout import Pool
from vidgen_ray.profile import Profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import Frames
from vidgen_ray.stages.realesrgan import RealESRGANStage

CHUNK_RETRIES = 3


class Upscaler:
    """The actor: RealESRGAN's weights in memory."""

    def __init__(self, profile: Profile) -> None:
        self._stage = RealESRGANStage(profile.params(RealESRGANStage))
        self._stage.load()

    def upscale(self, frames: Frames, scale: int, upscaler: str) -> Frames:
        return self._stage.upscale(frames, scale, upscaler)


def start_upscalers(profile: Profile, pool: Pool, run: str) -> list[Any]:
    """Start the pool, its actors named `<run>/upscaler/<n>`. It dies with the driver."""
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

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = actors
        self._in_flight = [0] * len(actors)
        self._lock = threading.Lock()

    def upscaled(self, stage: RealESRGANStage, shot: Shot, frames: Frames) -> Iterator[Frames]:
        """The clip's chunks, upscaled, in order. `stage` only says how a clip is cut; it needs no weights."""
        window = 2 * len(self._actors)
        pending: deque[tuple[int, Any]] = deque()
        try:
            for chunk in stage.chunks(len(frames)):
                if len(pending) >= window:
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

    def _take(self, pending: deque[tuple[int, Any]]) -> Frames:
        actor, reference = pending.popleft()
        try:
            frames: Frames = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            # The upscaler's own error, without Ray's account of where it was raised.
            raise error.cause from None
        finally:
            self._returned(actor)
        return frames

    def _returned(self, actor: int) -> None:
        with self._lock:
            self._in_flight[actor] -= 1
