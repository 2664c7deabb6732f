"""A replica that holds stages: takes a shot through some of them, or enlarges some of its frames.

Artefacts stay in Ray's memory: a call is given a reference to what the shot has, and gives one to what it has then.
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
from vidgen_ray.engine.likeness_check import likeness_of
from vidgen_ray.engine.step_groups import LOADING, CallResult
from vidgen_ray.engine.step_runner import StepFailed, StepRunner
from vidgen_ray.errors import SetupError
from vidgen_ray.online.inference_thread import InferenceResult, InferenceThread, Progress
from vidgen_ray.online.replica_config import ReplicaConfig
from vidgen_ray.outputs.records import ShotRecord
from vidgen_ray.planner.layout import WorkerSpec
from vidgen_ray.stages.base import Artefacts, Item
from vidgen_ray.stages.flux_model import FluxParams

LAST_WORDS_S = 1.0
"""Between the answer of a process that is of no use any more, and its end."""


@dataclass(frozen=True, slots=True)
class Result:
    """The last that a call says. `given` is what it made: a reference to it, or the record of a shot that is done."""

    answer: CallResult
    given: tuple[Any, ...] | ShotRecord = ()
    inputs_lost: bool = False
    """Whether what the call was to work on is gone, with the process or the node that held it."""


class StageReplica:
    """Stages in memory, at work on one call at a time; the inputs of the next are fetched meanwhile."""

    def __init__(self, service: ReplicaConfig, spec: WorkerSpec) -> None:
        """Loads the weights. Raises SetupError where they cannot be."""
        self._service = service
        self._inference_thread = InferenceThread()
        self._useless: str | None = None
        """Why every further call would fail, where it would."""
        self._device = next((p.device for p in map(self._params, spec.stages) if p.device != "cpu"), "cpu")
        self._active_loras = serve.multiplexed(max_num_models_per_replica=_adapters_kept(service))(_active_loras)
        try:
            stages = [service.stages[name](self._params(name)) for name in spec.stages]
            self._runner = StepRunner(stages, spec.gpus, service.outputs.stage_cache, spec.turns)
            self._runner.load()
        except Exception as error:
            # In one line: Serve shows it to people, behind its own account of it.
            raise SetupError(str(StepFailed(LOADING, error))) from error

    def _params(self, stage: str) -> Any:
        return self._service.profile.params(self._service.stages[stage])

    async def run(
        self, plan: ShotPlan, steps: tuple[str, ...], inputs: Sequence[Any], adapters: str = ""
    ) -> AsyncIterator[Progress | Result]:
        """Take a shot through these steps. `inputs`: a reference to what it has, or nothing where it has nothing yet.

        `adapters` is the name under which the shot's LoRAs, together, are known to the router.
        """
        if adapters:
            await self._active_loras(adapters)

        def taken(artefacts: Artefacts) -> tuple[CallResult, Artefacts]:
            item, records = self._runner.run(plan, Item(plan.shot, artefacts), steps)
            return CallResult(tuple(records), likeness_of(item.artefacts)), item.artefacts

        async for news in self._call(taken, inputs, steps):
            yield news

    async def run_chunk(
        self, plan: ShotPlan, steps: tuple[str, ...], chunk: slice | None, inputs: Sequence[Any]
    ) -> AsyncIterator[Progress | Result]:
        """Take a chunk of the clip through these chunked steps; see `StepRunner.run_chunk`."""

        def process(artefacts: Artefacts) -> tuple[CallResult, Artefacts]:
            made, records = self._runner.run_chunk(plan, steps, chunk, artefacts)
            return CallResult(tuple(records)), made

        async for news in self._call(process, inputs, steps):
            yield news

    async def _call(
        self, work: Callable[[Artefacts], tuple[CallResult, Any]], inputs: Sequence[Any], stages: tuple[str, ...]
    ) -> AsyncIterator[Progress | Result]:
        if self._useless:
            # It never begins, so nobody is to blame when this process goes.
            await asyncio.Event().wait()
        try:
            artefacts = await inputs[0] if inputs else Artefacts()
        except ray.exceptions.ObjectLostError as error:
            yield Result(CallResult(failure=StepFailed(stages[0], error).failure()), inputs_lost=True)
            return
        try:
            async for news in self._inference_thread.run(lambda: work(artefacts), stages[0], self._service.timeout_s(*stages)):
                if isinstance(news, InferenceResult):
                    answer, made = news.value
                    # In another thread: the next call works meanwhile.
                    yield Result(answer, (await asyncio.to_thread(ray.put, made),))
                else:
                    yield news
        except StepFailed as failed:
            answer = CallResult.of_failure(failed)
            if answer.context_broken:
                self._end(str(failed))
            yield Result(answer)

    def _end(self, why: str) -> None:
        self._useless = why
        asyncio.get_running_loop().call_later(LAST_WORDS_S, os._exit, 1)

    async def check_health(self) -> None:
        """Raises RuntimeError where Serve should put another process in place of this one."""
        if self._useless:
            raise RuntimeError(self._useless)
        if overdue_s := self._inference_thread.overdue_s():
            # Serve would look twice more before it ends this process, which takes on calls and never begins them.
            self._end(f"a call has outlasted its time by {overdue_s:.0f} s")
            raise RuntimeError(self._useless)
        torch = sys.modules.get("torch")
        if self._device != "cpu" and torch is not None:
            # Of a device that is lost, or a context that is broken, the driver says so here.
            await asyncio.to_thread(torch.cuda.mem_get_info)


async def _active_loras(adapters: str) -> str:
    """What tells Serve's router which LoRAs this replica has worn last. FLUX's model itself keeps as many, the same ones."""
    return adapters


def _adapters_kept(service: ReplicaConfig) -> int:
    flux = service.profile.actors.get("flux")
    default: int = FluxParams.model_fields["adapters_kept"].default
    return int(flux.options.get("adapters_kept", default)) if flux else default  # type: ignore[arg-type]  # checked by the stage
