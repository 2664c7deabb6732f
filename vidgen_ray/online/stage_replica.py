"""Ray Serve replica that holds stages: runs steps of a shot, or chunked steps on some of its frames.

Artefacts stay in Ray's object store. Calls take and return references to them.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve

from vidgen_ray.content_keys import ShotPlan
from vidgen_ray.engine.cache_writer import CacheSettings
from vidgen_ray.engine.likeness_check import likeness_of
from vidgen_ray.engine.step_groups import LOADING, CallResult
from vidgen_ray.engine.step_runner import StepFailed, StepRunner
from vidgen_ray.errors import SetupError
from vidgen_ray.graph import max_loras
from vidgen_ray.online.inference_thread import InferenceResult, InferenceThread, Progress
from vidgen_ray.online.replica_config import ReplicaConfig
from vidgen_ray.outputs.records import ShotRecord
from vidgen_ray.planner.layout import WorkerSpec
from vidgen_ray.stages.base import Artefacts, Item

EXIT_DELAY_S = 1.0
"""Seconds between the last response of a broken process and its exit."""


@dataclass(frozen=True, slots=True)
class Result:
    """Last item that a call streams."""

    call_result: CallResult
    output: tuple[Any, ...] | ShotRecord = ()
    """Reference to the artefacts, or the record of a finished shot."""
    inputs_lost: bool = False
    """The inputs of the call were lost with the process or node that held them."""


class StageReplica:
    """Holds stages in memory and runs one call at a time, while the inputs of the next are fetched."""

    def __init__(self, config: ReplicaConfig, spec: WorkerSpec) -> None:
        """Load the weights. Raises SetupError if that fails."""
        self._config = config
        self._inference_thread = InferenceThread()
        self._broken: str | None = None
        """Reason why every further call would fail. `None` if the process is healthy."""
        self._device = next((p.device for p in map(self._params, spec.stages) if p.device != "cpu"), "cpu")
        self._active_loras = serve.multiplexed(max_num_models_per_replica=max(1, max_loras(config.profile)))(_active_loras)
        try:
            stages = [config.stages[name](self._params(name)) for name in spec.stages]
            # Streamed images are read from the cache while a job runs, and lost artefacts are taken from it.
            cache = CacheSettings("all", wait=True).open(config.outputs.stage_cache)
            self._runner = StepRunner(stages, spec.gpus, cache, spec.swap_groups)
            self._runner.load()
        except Exception as error:
            # A single line, because Serve shows it at the end of its own message.
            raise SetupError(str(StepFailed(LOADING, error))) from error

    def _params(self, stage: str) -> Any:
        return self._config.profile.params(self._config.stages[stage])

    async def run(
        self, plan: ShotPlan, steps: tuple[str, ...], inputs: Sequence[Any], adapters: str = ""
    ) -> AsyncIterator[Progress | Result]:
        """Run these steps of a shot. `inputs`: a reference to its artefacts, or empty for the first steps.

        `adapters`: id of the set of active LoRAs, which Serve's router uses.
        """
        if adapters:
            await self._active_loras(adapters)

        def run_steps(artefacts: Artefacts) -> tuple[CallResult, Artefacts]:
            item, records = self._runner.run(plan, Item(plan.shot, artefacts), steps)
            return CallResult(tuple(records), likeness_of(item.artefacts)), item.artefacts

        async for item in self._call(run_steps, inputs, steps):
            yield item

    async def run_chunk(
        self, plan: ShotPlan, steps: tuple[str, ...], chunk: slice | None, inputs: Sequence[Any]
    ) -> AsyncIterator[Progress | Result]:
        """Run these chunked steps on a chunk of the clip. See `StepRunner.run_chunk`."""

        def process(artefacts: Artefacts) -> tuple[CallResult, Artefacts]:
            output, records = self._runner.run_chunk(plan, steps, chunk, artefacts)
            return CallResult(tuple(records)), output

        async for item in self._call(process, inputs, steps):
            yield item

    async def _call(
        self, function: Callable[[Artefacts], tuple[CallResult, Any]], inputs: Sequence[Any], stages: tuple[str, ...]
    ) -> AsyncIterator[Progress | Result]:
        if self._broken:
            # The call never starts, so it does not count as a failed attempt when this process exits.
            await asyncio.Event().wait()
        try:
            artefacts = await inputs[0] if inputs else Artefacts()
        except ray.exceptions.ObjectLostError as error:
            yield Result(CallResult(failure=StepFailed(stages[0], error).failure()), inputs_lost=True)
            return
        try:
            async for item in self._inference_thread.run(
                lambda: function(artefacts), stages[0], self._config.timeout_s(*stages)
            ):
                if isinstance(item, InferenceResult):
                    call_result, output = item.value
                    # In another thread, so that the next call can run.
                    yield Result(call_result, (await asyncio.to_thread(ray.put, output),))
                else:
                    yield item
        except StepFailed as failed:
            call_result = CallResult.of_failure(failed)
            if call_result.context_broken:
                self._exit_soon(str(failed))
            yield Result(call_result)

    def _exit_soon(self, reason: str) -> None:
        self._broken = reason
        asyncio.get_running_loop().call_later(EXIT_DELAY_S, os._exit, 1)

    async def check_health(self) -> None:
        """Raise RuntimeError if Serve should replace this process."""
        if self._broken:
            raise RuntimeError(self._broken)
        if overdue_s := self._inference_thread.overdue_s():
            # Serve would repeat the check twice before it kills this process, which accepts calls but never starts them.
            self._exit_soon(f"a call exceeded its timeout by {overdue_s:.0f} s")
            raise RuntimeError(self._broken)
        torch = sys.modules.get("torch")
        if self._device != "cpu" and torch is not None:
            # Raises if the device is lost or the CUDA context is broken.
            await asyncio.to_thread(torch.cuda.mem_get_info)


async def _active_loras(adapters: str) -> str:
    """Do nothing. As a multiplexed model, it tells Serve's router which LoRAs this replica used last.

    The FLUX model itself keeps the same number of LoRAs.
    """
    return adapters
