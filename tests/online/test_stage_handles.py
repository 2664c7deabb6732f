"""Inference thread, retries of stage calls, and choice of the deployment, without Ray."""

import asyncio
import threading

import pytest
import ray
from ray.serve.exceptions import RayServeException

from vidgen_ray.engine.retries import InputsLost, ShotFailed
from vidgen_ray.engine.step_groups import CallResult
from vidgen_ray.engine.step_runner import StepFailed
from vidgen_ray.errors import Cancelled, StageError
from vidgen_ray.online import stage_handles as stage_handles_module
from vidgen_ray.online.director import adapters_of, error_of
from vidgen_ray.online.inference_thread import InferenceResult, InferenceThread, Progress
from vidgen_ray.online.server import _reason
from vidgen_ray.online.stage_handles import MAX_LOST_STARTS, RetryingCaller, StageHandles
from vidgen_ray.online.stage_replica import Result
from vidgen_ray.planner.layout import WorkerSpec
from vidgen_ray.stages.progress import report_progress

SOON_S = 10


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, SOON_S))


class TestInferenceThread:
    def test_yields_start_steps_and_result(self):
        def work():
            for step in (0, 1, 2):
                report_progress("flux", step, 2 if step else 0)
            return "image"

        async def updates():
            return [update async for update in InferenceThread().run(work, "flux", 60)]

        assert run(updates()) == [
            Progress("flux", 0, 0),
            Progress("flux", 1, 2),
            Progress("flux", 2, 2),
            InferenceResult("image"),
        ]

    def test_functions_run_one_after_another(self):
        order, first_may_end = [], threading.Event()

        async def both():
            inference_thread = InferenceThread()

            async def call(name, wait):
                async for _ in inference_thread.run(
                    lambda: (order.append(f"{name} starts"), wait(), order.append(f"{name} ends")), name, 60
                ):
                    pass

            first = asyncio.ensure_future(call("first", first_may_end.wait))
            await asyncio.sleep(0)
            second = asyncio.ensure_future(call("second", lambda: None))
            first_may_end.set()
            await asyncio.gather(first, second)

        run(both())
        assert order == ["first starts", "first ends", "second starts", "second ends"]

    def test_closing_the_generator_stops_the_function_at_its_next_step(self):
        steps, go_on, ended = [], threading.Event(), threading.Event()

        def work():
            try:
                for step in range(1, 100):
                    steps.append(step)
                    report_progress("svd", step, 100)
                    if step == 2:
                        go_on.wait()
            except Cancelled:
                ended.set()
                raise

        async def leave():
            updates = InferenceThread().run(work, "svd", 60)
            async for progress in updates:
                if progress.step == 2:
                    break
            await updates.aclose()
            go_on.set()
            await asyncio.to_thread(ended.wait)

        run(leave())
        assert steps == [1, 2, 3]

    def test_overdue_time_is_reported_until_the_function_returns(self):
        go_on = threading.Event()

        async def overdue():
            inference_thread = InferenceThread()
            updates = inference_thread.run(go_on.wait, "svd", 0)
            await anext(updates)
            overdue_s = inference_thread.overdue_s()
            go_on.set()
            assert [update async for update in updates] == [InferenceResult(True)]
            return overdue_s, inference_thread.overdue_s()

        running, after = run(overdue())
        assert running > 0
        assert after == 0


class Stream:
    """Fake response stream of a handle: progress, then a result or an error."""

    def __init__(self, *items):
        self._items = list(items)
        self.cancelled = False

    async def __anext__(self):
        if not self._items:
            raise StopAsyncIteration
        item = self._items.pop(0)
        if item == "hang":
            await asyncio.sleep(3600)
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self):
        self.cancelled = True


class Method:
    """Fake method of a handle. Each call returns the next stream, and the last one from then on."""

    def __init__(self, *streams):
        self._streams = streams
        self.calls = 0

    def remote(self, *args):
        self.calls += 1
        return Stream(*self._streams[min(self.calls, len(self._streams)) - 1])


STARTED = Progress("flux", 0, 0)
OK = Result(CallResult(), ("reference",))
CRASHED = ray.exceptions.ActorDiedError()


def failed(error):
    return Result(CallResult.of_failure(StepFailed("flux", error)))


def call(method, attempts=3, timeout_s=60.0):
    return run(RetryingCaller(attempts).call(method, stage="flux", timeout_s=timeout_s))


@pytest.fixture(autouse=True)
def no_retry_delay(monkeypatch):
    monkeypatch.setattr(stage_handles_module, "RETRY_DELAY_S", 0.0)


class TestRetryingCaller:
    @pytest.mark.parametrize(
        "streams",
        [
            [(STARTED, OK)],
            [(STARTED, CRASHED), (STARTED, OK)],
            [(STARTED, failed(RuntimeError("a fault"))), (STARTED, CRASHED), (STARTED, OK)],
            [(STARTED, RayServeException("gone")), (STARTED, OK)],
            # The call waited behind another one that crashed the process.
            [*[(CRASHED,)] * (MAX_LOST_STARTS - 1), (STARTED, OK)],
            [(), (STARTED, OK)],
        ],
    )
    def test_transient_failures_are_retried(self, streams):
        method = Method(*streams)
        assert call(method) == OK
        assert method.calls == len(streams)

    @pytest.mark.parametrize(
        ("streams", "error", "calls", "attempts"),
        [
            ([(STARTED, CRASHED)], "ReplicaDied", 3, 3),
            ([(STARTED, failed(RuntimeError("a fault")))], "RuntimeError", 3, 3),
            ([(STARTED, failed(StageError("no")))], "StageError", 1, 1),
            ([(CRASHED,)], "ReplicaDied", MAX_LOST_STARTS, 1),
        ],
    )
    def test_shot_errors_fail_at_once_and_other_errors_after_three_attempts(self, streams, error, calls, attempts):
        method = Method(*streams)
        with pytest.raises(ShotFailed) as raised:
            call(method)
        failure = raised.value.failure
        assert (failure.error, method.calls, failure.attempts) == (error, calls, attempts)

    def test_timeout_starts_when_execution_starts(self):
        with pytest.raises(ShotFailed) as raised:
            call(Method((STARTED, "hang")), attempts=2, timeout_s=0.01)
        assert (raised.value.failure.error, raised.value.failure.attempts) == ("TimedOut", 2)

    def test_lost_inputs_raise_inputs_lost(self):
        lost = Result(CallResult(failure=failed(RuntimeError("x")).call_result.failure), inputs_lost=True)
        with pytest.raises(InputsLost):
            call(Method((lost,)))

    def test_cancelling_the_caller_cancels_the_call(self):
        streams = []

        class Hanging:
            def remote(self, *args):
                streams.append(Stream(STARTED, "hang"))
                return streams[-1]

        async def cancel():
            started = asyncio.Event()
            calling = asyncio.ensure_future(
                RetryingCaller(3).call(Hanging(), stage="flux", timeout_s=60, on_progress=lambda _: started.set())
            )
            await started.wait()
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling

        run(cancel())
        assert [stream.cancelled for stream in streams] == [True]


class Handle:
    def options(self, **_):
        return self


def test_calls_go_to_the_least_loaded_deployment_that_can_run_them():
    specs = {
        "flux": (WorkerSpec(("flux",), 1, 1), 1),
        "both": (WorkerSpec(("flux", "svd"), 1, 1), 2),
        "turns": (WorkerSpec(("flux", "svd", "hunyuan"), 1, 1, (("svd",), ("hunyuan",))), 4),
    }
    handles = StageHandles(dict.fromkeys(specs, Handle()), specs)
    assert handles.can_fuse("svd", "realesrgan") is False
    assert handles.least_loaded("svd") in ("both", "turns")
    handles._pending.update({"both": 2, "turns": 5})
    assert handles.least_loaded("svd") == "both"
    handles._pending.update({"flux": 1, "turns": -3})
    assert handles.least_loaded("flux") == "turns"


def test_shots_with_the_same_loras_have_the_same_multiplexed_model_id(make_shot, tiny):
    from vidgen_ray.content_keys import ShotPlanner, params_of
    from vidgen_ray.graph import stages_of

    def model_id(**fields):
        shot = make_shot(generate_video=False, **fields)
        plan = ShotPlanner(params_of(tiny, stages_of(shot)), tiny.encode)(shot)
        return adapters_of(plan, plan.steps)

    lora = "builtin:tiny/lora.safetensors"
    assert model_id() == ""
    assert model_id(lora=lora) == model_id(lora=lora, prompt="another", seed=8) != ""


def test_job_error_names_the_stage_but_not_the_server():
    failure = StepFailed("svd", StageError("svd: got an image of 10x10")).failure()
    error = error_of(failure)
    assert (error.code, error.type, error.stage) == ("invalid_shot", "invalid_request_error", "svd")
    assert failure.worker not in error.message


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "The deployment failed.\nTraceback\n  File x\nvidgen_ray.errors.SetupError: loading: no weights\n",
            "loading: no weights",
        ),
        ("The deployment failed.\nTraceback\n  File x\nImportError: no av\n", "ImportError: no av"),
        ("The deployment failed.\n", "The deployment failed."),
        ("", "Ray Serve failed to start the application and gave no reason"),
    ],
)
def test_cause_is_extracted_from_serve_error_messages(message, reason):
    assert _reason(message) == reason
