"""Ray Serve replica that encodes and commits shots.

It also runs the chunked stages of a shot on any free replicas and receives their frames directly, a bounded number of chunks at
a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any, TypeVar

import ray

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.chunks import chunk_unit, clip_chunks, join_records, ordered_window
from vidgen_ray.engine.retries import InputsLost, ShotFailed
from vidgen_ray.engine.shot_writer import ShotFiles
from vidgen_ray.engine.step_groups import OUTPUT, CallResult, group_chunked_steps
from vidgen_ray.engine.step_runner import StepFailed
from vidgen_ray.errors import VidgenError
from vidgen_ray.graph import chunked_stages_of
from vidgen_ray.online.inference_thread import Progress
from vidgen_ray.online.replica_config import ReplicaConfig
from vidgen_ray.online.stage_handles import RetryingCaller, StageHandles
from vidgen_ray.online.stage_replica import Result
from vidgen_ray.outputs.records import ShotRecord, StepRecord
from vidgen_ray.planner.layout import WorkerSpec
from vidgen_ray.stages.base import Artefacts, Item

R = TypeVar("R")


class EncoderReplica:
    """Encodes and commits several shots at once, each in its own thread."""

    def __init__(self, config: ReplicaConfig, handles: Mapping[str, Any], specs: Mapping[str, tuple[WorkerSpec, int]]) -> None:
        """`handles` and `specs`: as in StageHandles, for the deployments with chunked stages."""
        self._config = config
        self._stages = StageHandles(handles, specs)
        self._caller = RetryingCaller(config.attempts)

    async def write(
        self, plan: ShotPlan, inputs: Sequence[Any], records: tuple[StepRecord, ...]
    ) -> AsyncIterator[Progress | Result]:
        """Write the files of a shot and commit it. `inputs`: a reference to its artefacts, or empty if it has none."""
        chunked = chunked_stages_of(plan.shot)
        reported = chunked[-1].name if chunked else OUTPUT
        yield Progress(reported, 0, 0)
        files = _Files()
        # Chunks are processed while the image and the original clip are written.
        opened = asyncio.ensure_future(self._open(files, plan, inputs))
        chunk_records: list[Sequence[StepRecord]] = []
        try:
            async with aclosing(self._chunks(plan, inputs)) as chunks:
                async for chunk, records_of_chunk, artefacts in chunks:
                    await opened
                    await files.add(artefacts)
                    chunk_records.append(records_of_chunk)
                    yield Progress(reported, chunk.stop, plan.shot.num_frames)
            await opened
            record = await files.commit([*records, *join_records(chunk_records)])
            yield Result(CallResult(), record)
        except (InputsLost, ray.exceptions.ObjectLostError) as lost:
            yield Result(CallResult(failure=StepFailed(OUTPUT, lost).failure()), inputs_lost=True)
        except ShotFailed as failed:
            yield Result(CallResult(failure=failed.failure, final=True))
        # A full disk or an unreadable start image fails this shot only.
        except (OSError, VidgenError) as error:
            yield Result(CallResult.of_failure(StepFailed(OUTPUT, error)))
        finally:
            opened.cancel()
            files.close()

    async def _open(self, files: _Files, plan: ShotPlan, inputs: Sequence[Any]) -> None:
        item = Item(plan.shot, await inputs[0] if inputs else Artefacts())
        await files.open(plan, item, self._config.outputs, self._config.profile.encode)

    def _chunks(self, plan: ShotPlan, inputs: Sequence[Any]) -> AsyncGenerator[tuple[slice, tuple[StepRecord, ...], Artefacts]]:
        """Process the clip's chunks on any free replicas. Yields ranges of frames, records and results in order.

        Yields nothing for a shot without chunked stages. Raises ShotFailed and InputsLost.
        """
        calls = group_chunked_steps(plan, self._stages.can_fuse)

        async def process(chunk: slice) -> tuple[slice, tuple[StepRecord, ...], Artefacts]:
            cut: slice | None = chunk
            current = inputs
            records: tuple[StepRecord, ...] = ()
            for steps in calls:
                names = tuple(step.stage for step in steps)
                timeout_s = self._config.timeout_s(*names)
                result = await self._stages.call(
                    self._caller, "run_chunk", plan, names, cut, current, stages=names, timeout_s=timeout_s
                )
                assert isinstance(result.output, tuple)
                current, records, cut = result.output, records + result.call_result.records, None
            return chunk, records, await current[0]

        chunks = clip_chunks(plan.shot, chunk_unit(plan.shot, self._config.chunk_frames)) if calls else []
        return ordered_window(chunks, process)


class _Files:
    """ShotFiles with a thread of its own, which opens, writes and closes the files in order."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="files")
        self._files: ShotFiles | None = None

    async def open(self, *args: Any) -> None:
        """Open the files. Arguments as for ShotFiles."""

        def open_files() -> None:
            self._files = ShotFiles(*args)

        await self._run(open_files)

    async def add(self, chunk: Artefacts) -> None:
        await self._run(lambda: self._opened.add(chunk))

    async def commit(self, records: Sequence[StepRecord]) -> ShotRecord:
        return await self._run(lambda: self._opened.commit(records))

    def close(self) -> None:
        """Delete uncommitted files after the pending writes. Returns without waiting."""

        def close_files() -> None:
            if self._files is not None:
                self._files.close()

        self._thread.submit(close_files)
        self._thread.shutdown(wait=False)

    @property
    def _opened(self) -> ShotFiles:
        assert self._files is not None
        return self._files

    async def _run(self, function: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)
