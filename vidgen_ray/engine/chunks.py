"""Chunked stages at the end of a shot's chain: how a clip is cut, and which files and frame rates come out."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from vidgen_ray.graph import chunked_stages_of, clip_growth, clip_length
from vidgen_ray.outputs.records import StepRecord
from vidgen_ray.profile import Profile
from vidgen_ray.shot import Shot
from vidgen_ray.stages.base import ChunkedStage, Stage, frame_chunks

T = TypeVar("T")

CLIP_FILES = {"frames": "video.mp4", "hd_frames": "hd.mp4"}
"""Artefact -> file name of the clip made from it."""
MAX_CHUNKS_AHEAD = 3
"""Processed chunks of one clip that may wait for the encoder. They are raw frames in Ray's object store."""


def chunk_frames_of(profile: Profile, stages: Iterable[type[Stage[Any]]]) -> dict[str, int]:
    """Return stage name -> frames per call, for the chunked stages among these. Needs their weights on this machine."""
    return {stage.name: stage.chunk_frames(profile.params(stage)) for stage in stages if issubclass(stage, ChunkedStage)}


def chunk_unit(shot: Shot, chunk_frames: Mapping[str, int]) -> int:
    """Return the number of frames by which the finished clip may be cut. Cuts at its multiples do not change any byte.

    Each chunked stage then starts every chunk at a multiple of its own frames per call, which `chunk_frames` holds.
    """
    return math.lcm(*(chunk_frames[stage.name] for stage in chunked_stages_of(shot)))


def clip_chunks(shot: Shot, unit: int, max_bytes: int = 0) -> list[slice]:
    """Cut the finished clip of a shot with chunked stages into ranges of frames, in order.

    A chunk is the largest multiple of `unit` frames whose result is at most `max_bytes` of raw frames, but at least one unit.
    """
    units = max(1, max_bytes // (chunk_result_bytes(shot) * unit))
    n_frames, _ = clip_length(shot)
    return frame_chunks(n_frames, units * unit)


def chunk_result_bytes(shot: Shot) -> int:
    """Return the bytes of raw RGB frames that the chunked stages make for one frame of the finished clip."""
    chunked = {stage.writes[0] for stage in chunked_stages_of(shot)}
    pixels = sum(scale**2 for name, (scale, _) in clip_growth(shot).items() if name in chunked)
    return 3 * shot.width * shot.height * pixels


def join_records(chunks: Sequence[Sequence[StepRecord]]) -> tuple[StepRecord, ...]:
    """Merge the records of a clip's chunks into one record per stage."""
    return tuple(_joined(records) for records in zip(*chunks, strict=True))


def _joined(records: Sequence[StepRecord]) -> StepRecord:
    recovered = [record.recovered for record in records if record.recovered]
    return records[0].model_copy(
        update={
            "seconds": round(sum(record.seconds for record in records), 4),
            "gpu_seconds": round(sum(record.gpu_seconds for record in records), 4),
            "recovered": recovered[-1] if recovered else None,
        }
    )


async def ordered_window(chunks: Iterable[slice], process: Callable[[slice], Awaitable[T]]) -> AsyncGenerator[T]:
    """Yield `process(chunk)` for each chunk, in order, with at most `MAX_CHUNKS_AHEAD` of them started ahead."""
    pending: deque[asyncio.Future[T]] = deque()
    try:
        for chunk in chunks:
            if len(pending) == MAX_CHUNKS_AHEAD:
                yield await pending.popleft()
            pending.append(asyncio.ensure_future(process(chunk)))
        while pending:
            yield await pending.popleft()
    finally:
        for task in pending:
            task.cancel()
