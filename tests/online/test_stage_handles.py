"""A call from both ends, without Ray: what the bench of a replica tells, and what the caller tries again."""

import asyncio
import threading

import pytest
import ray
from ray.serve.exceptions import RayServeException

from vidgen_ray.engine.retries import InputsLost, ShotFailed
from vidgen_ray.engine.step_groups import CallResult
from vidgen_ray.engine.step_runner import StepFailed
from vidgen_ray.errors import Cancelled, StageError
from vidgen_ray.online import stage_handles as caller_module
from vidgen_ray.online.director import adapters_of, error_of
from vidgen_ray.online.inference_thread import InferenceResult, InferenceThread, Progress
from vidgen_ray.online.server import _reason
from vidgen_ray.online.stage_handles import PASSED_OVER, RetryingCaller, StageHandles
from vidgen_ray.online.stage_replica import Result
from vidgen_ray.planner.layout import WorkerSpec
from vidgen_ray.stages.progress import report_progress

SOON_S = 10


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, SOON_S))


class TestWorkbench:
    def test_work_is_told_to_have_begun_then_its_steps_then_what_it_came_to(self):
        def work():
            for step in (0, 1, 2):
                report_progress("flux", step, 2 if step else 0)
            return "picture"

        async def told():
            return [news async for news in InferenceThread().work(work, "flux", 60)]

        assert run(told()) == [
            Progress("flux", 0, 0),
            Progress("flux", 1, 2),
            Progress("flux", 2, 2),
            InferenceResult("picture"),
        ]

    def test_what_is_asked_second_begins_when_the_first_has_ended(self):
        order, first_may_end = [], threading.Event()

        async def both():
            bench = InferenceThread()

            async def one(name, wait):
                async for _ in bench.work(
                    lambda: (order.append(f"{name} begins"), wait(), order.append(f"{name} ends")), name, 60
                ):
                    pass

            first = asyncio.ensure_future(one("first", first_may_end.wait))
            await asyncio.sleep(0)
            second = asyncio.ensure_future(one("second", lambda: None))
            first_may_end.set()
            await asyncio.gather(first, second)

        run(both())
        assert order == ["first begins", "first ends", "second begins", "second ends"]

    def test_a_caller_that_goes_away_ends_the_work_at_its_next_step(self):
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
            working = InferenceThread().work(work, "svd", 60)
            async for progress in working:
                if progress.step == 2:
                    break
            await working.aclose()
            go_on.set()
            await asyncio.to_thread(ended.wait)

        run(leave())
        assert steps == [1, 2, 3]

    def test_work_that_outlasts_its_time_is_known_and_forgotten_when_it_ends(self):
        go_on = threading.Event()

        async def overdue():
            bench = InferenceThread()
            working = bench.work(go_on.wait, "svd", 0)
            await anext(working)
            late = bench.overdue_s()
            go_on.set()
            assert [news async for news in working] == [InferenceResult(True)]
            return late, bench.overdue_s()

        late, after = run(overdue())
        assert late > 0
        assert after == 0


class Stream:
    """What a handle gives: news, in the end an answer or an error."""

    def __init__(self, *news):
        self._news = list(news)
        self.cancelled = False

    async def __anext__(self):
        if not self._news:
            raise StopAsyncIteration
        news = self._news.pop(0)
        if news == "hang":
            await asyncio.sleep(3600)
        if isinstance(news, Exception):
            raise news
        return news

    def cancel(self):
        self.cancelled = True


class Method:
    """A method of a handle, of whose calls each gives the next of these streams, the last again and again."""

    def __init__(self, *streams):
        self._streams = streams
        self.calls = 0

    def remote(self, *args):
        self.calls += 1
        return Stream(*self._streams[min(self.calls, len(self._streams)) - 1])


BEGUN = Progress("flux", 0, 0)
FINE = Result(CallResult(), ("reference",))
DIED = ray.exceptions.ActorDiedError()


def failed(error):
    return Result(CallResult.of_failure(StepFailed("flux", error)))


def called(method, attempts=3, timeout_s=60.0):
    return run(RetryingCaller(attempts).call(method, stage="flux", timeout_s=timeout_s))


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(caller_module, "AGAIN_S", 0.0)


class TestCaller:
    @pytest.mark.parametrize(
        "streams",
        [
            [(BEGUN, FINE)],
            [(BEGUN, DIED), (BEGUN, FINE)],
            [(BEGUN, failed(RuntimeError("a fault"))), (BEGUN, DIED), (BEGUN, FINE)],
            [(BEGUN, RayServeException("gone")), (BEGUN, FINE)],
            # It waited behind whoever is to blame.
            [*[(DIED,)] * (PASSED_OVER - 1), (BEGUN, FINE)],
            [(), (BEGUN, FINE)],
        ],
    )
    def test_what_another_attempt_may_not_meet_is_tried_again(self, streams):
        method = Method(*streams)
        assert called(method) == FINE
        assert method.calls == len(streams)

    @pytest.mark.parametrize(
        ("streams", "error", "calls", "attempts"),
        [
            ([(BEGUN, DIED)], "ReplicaDied", 3, 3),
            ([(BEGUN, failed(RuntimeError("a fault")))], "RuntimeError", 3, 3),
            ([(BEGUN, failed(StageError("no")))], "StageError", 1, 1),
            ([(DIED,)], "ReplicaDied", PASSED_OVER, 1),
        ],
    )
    def test_it_gives_up_at_once_where_it_is_the_shot_and_after_three_where_it_is_not(self, streams, error, calls, attempts):
        method = Method(*streams)
        with pytest.raises(ShotFailed) as gave_up:
            called(method)
        failure = gave_up.value.failure
        assert (failure.error, method.calls, failure.attempts) == (error, calls, attempts)

    def test_time_counts_from_when_the_work_has_begun(self):
        with pytest.raises(ShotFailed) as gave_up:
            called(Method((BEGUN, "hang")), attempts=2, timeout_s=0.01)
        assert (gave_up.value.failure.error, gave_up.value.failure.attempts) == ("TimedOut", 2)

    def test_inputs_that_are_gone_are_no_failure_of_the_call(self):
        lost = Result(CallResult(failure=failed(RuntimeError("x")).answer.failure), inputs_lost=True)
        with pytest.raises(InputsLost):
            called(Method((lost,)))

    def test_a_caller_that_is_cancelled_cancels_the_call(self):
        streams = []

        class Hanging:
            def remote(self, *args):
                streams.append(Stream(BEGUN, "hang"))
                return streams[-1]

        async def cancel():
            begun = asyncio.Event()
            calling = asyncio.ensure_future(
                RetryingCaller(3).call(Hanging(), stage="flux", timeout_s=60, told=lambda _: begun.set())
            )
            await begun.wait()
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling

        run(cancel())
        assert [stream.cancelled for stream in streams] == [True]


class Handle:
    def options(self, **_):
        return self


def test_a_call_goes_to_the_deployment_with_the_least_in_hand_of_those_that_take_it():
    specs = {
        "flux": (WorkerSpec(("flux",), 1, 1), 1),
        "both": (WorkerSpec(("flux", "svd"), 1, 1), 2),
        "turns": (WorkerSpec(("flux", "svd", "hunyuan"), 1, 1, (("svd",), ("hunyuan",))), 4),
    }
    handles = StageHandles(dict.fromkeys(specs, Handle()), specs)
    assert handles.can_fuse("svd", "realesrgan") is False
    assert handles.taking("svd") in ("both", "turns")
    handles._in_hand.update({"both": 2, "turns": 5})
    assert handles.taking("svd") == "both"
    handles._in_hand.update({"flux": 1, "turns": -3})
    assert handles.taking("flux") == "turns"


def test_shots_with_the_same_loras_are_known_to_the_router_by_one_name(make_shot, tiny):
    from vidgen_ray.content_keys import ShotPlanner, params_of
    from vidgen_ray.graph import stages_of

    def name(**fields):
        shot = make_shot(generate_video=False, **fields)
        plan = ShotPlanner(params_of(tiny, stages_of(shot)), tiny.encode)(shot)
        return adapters_of(plan, plan.steps)

    lora = "builtin:tiny/lora.safetensors"
    assert name() == ""
    assert name(lora=lora) == name(lora=lora, prompt="another", seed=8) != ""


def test_an_error_says_the_stage_and_nothing_of_the_server():
    failure = StepFailed("svd", StageError("svd: got a picture of 10x10")).failure()
    error = error_of(failure)
    assert (error.code, error.type, error.stage) == ("invalid_shot", "invalid_request_error", "svd")
    assert failure.worker not in error.message


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (
            "The deployment failed.\nTraceback\n  File x\nvidgen_ray.errors.SetupError: loading: no weights\n",
            "loading: no weights",
        ),
        ("The deployment failed.\nTraceback\n  File x\nImportError: no av\n", "ImportError: no av"),
        ("The deployment failed.\n", "The deployment failed."),
        ("", "Serve could not start it, and does not say why"),
    ],
)
def test_of_serves_account_of_a_failure_a_person_sees_what_they_can_mend(messages, says):
    assert _reason(messages) == says
