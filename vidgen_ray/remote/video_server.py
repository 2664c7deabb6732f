"""Client of servers with OpenAI's API: clips and images as of vLLM-Omni, SGLang Diffusion and `vidgen serve`, and chats.

A job has the content key of its step and is stored before it is polled. Who renders the step again, after a crash or in a later
run, asks for the same job. Sources: docs/serving/videos_api.md of vLLM-Omni, entrypoints/openai/video_api.py of SGLang.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from email.utils import parsedate_to_datetime
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vidgen_ray.errors import Cancelled, OtherWeights, SetupError, StageError, shortened_value
from vidgen_ray.stages.base import JobRecords

if TYPE_CHECKING:
    import httpx2

_T = TypeVar("_T")
_M = TypeVar("_M", bound=BaseModel)

CONNECT_S, RESPONSE_S = 10.0, 120.0
"""Timeouts of a connection and of a response. A job takes longer, but its requests do not."""
REQUEST_RETRY_S, MAX_RETRY_AFTER_S = (0.25, 15.0), 120.0
"""First and longest pause between two attempts of a request, and the longest that a server can ask for."""
PATIENCE_S = 30.0
"""Seconds without a response after which a call goes to another server, if one responds. Otherwise the network may be down."""
STATUS_POLL_S, _POLL_SHARE = (0.1, 10.0), 0.05
"""Shortest and longest pause between two polls, and its share of the seconds that the job has taken."""
SUBMITS, ANSWERS = 3, 3
"""Most submissions of a job in one call, and most downloads of its result."""
_LISTED = 100
"""Jobs in which one is searched whose submission had no response."""
MAX_JSON_BYTES = 32 * 2**20
"""Largest response without a clip or an image."""
UNFINISHED = ("queued", "in_progress")
VOLATILE = ("created", "permission")
"""Fields of a model in `/v1/models` that change with each start of a server."""


class ServerFailed(Exception):
    """A server did not do what it was asked for. Another one may."""


class ServerDown(Exception):
    """A server does not respond."""


class WrongAnswer(ServerFailed):
    """A server answered something else than the result of the job."""


class _JobEnded(Exception):
    """The job has failed, or the server does not know it, such as after a restart; then `error` is `None`."""

    def __init__(self, error: ServerFailed | None = None) -> None:
        self.error = error
        super().__init__(error)


class _Unanswered(Exception):
    """A job was submitted, or not: the response is missing."""


class RemoteJob(BaseModel):
    """Stored state of a job."""

    key: str
    server: str
    id: str | None = None
    """`None` until the server has accepted it."""
    since: float = 0.0
    """Before the submission, in seconds since 1970 by the clock of the server. 0 if it is unknown."""
    submits: int = 1
    """Number of this submission, counted from 1."""
    found: bool = False
    """It was found in the list of jobs, because its submission had no response."""
    ended: bool = False
    """It has failed, was cancelled or is lost. The next one is another submission."""


class _Job(BaseModel):
    """State of a job at its server."""

    model_config = ConfigDict(coerce_numbers_to_str=True)
    id: str
    status: str = ""
    created_at: float = 0
    prompt: str | None = None
    size: str | None = None
    progress: Any = None
    error: Any = None


class _Jobs(BaseModel):
    data: list[_Job]


class _Image(BaseModel):
    b64_json: str


class _Images(BaseModel):
    data: list[_Image] = Field(min_length=1)


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class ChatAnswer(BaseModel):
    """Answer of a chat. `model`: the one that has answered."""

    model: str | None = None
    choices: list[_Choice] = Field(min_length=1)


def auth_headers(key_env: str | None) -> dict[str, str]:
    """Return the headers with the key in this environment variable. Raises SetupError if it is not set."""
    if key_env is None:
        return {}
    if not (key := os.environ.get(key_env)):
        raise SetupError(f"key_env: the environment variable {key_env} is not set; set it on every node before Ray starts")
    if not (key.isascii() and key.isprintable()):
        raise SetupError(f"key_env: {key_env} has a line break or another character that no key has; set it without")
    return {"Authorization": f"Bearer {key}"}


@lru_cache(maxsize=64)
def reported_model(model: str, servers: tuple[str, ...], key_env: str | None) -> str:
    """Return what the first server that responds says of the model, see `model_digest`. Raises SetupError."""
    problems, headers = [], auth_headers(key_env)
    for server in servers:
        try:
            return model_digest(model, server, _models_of(server, headers, RESPONSE_S))
        except ServerDown as error:
            problems.append(str(error))
    raise SetupError(f"remote:{model}: no server responds; start one, or correct `servers`: {'; '.join(problems)}")


def unusable_servers(model: str, servers: Sequence[str], key_env: str | None) -> list[str]:
    """Return what is wrong with each server that does not respond, refuses the key, or does not have the model."""

    def problem_of(server: str) -> str:
        try:
            model_digest(model, server, _models_of(server, auth_headers(key_env), CONNECT_S))
        except (ServerDown, SetupError) as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(servers)) as pool:
        return [problem for problem in pool.map(problem_of, servers) if problem]


def _models_of(server: str, headers: Mapping[str, str], timeout_s: float) -> httpx2.Response:
    """Return the response of `/v1/models`. Raises ServerDown if there is none within `timeout_s`."""

    import httpx2

    try:
        with httpx2.Client(headers=dict(headers)) as http:
            return _fetch(http, "GET", f"{server}/v1/models", time.monotonic() + timeout_s, MAX_JSON_BYTES)
    except (httpx2.HTTPError, WrongAnswer) as error:
        reason = str(error).removeprefix(f"{server}/v1/models: ") or type(error).__name__
        raise ServerDown(f"{server}: does not respond: {reason}") from None


def _fetch(
    http: httpx2.Client,
    method: str,
    url: str,
    deadline: float,
    max_bytes: int,
    on_wait: Callable[[], None] = lambda: None,
    **arguments: Any,
) -> httpx2.Response:
    """Return a response with its body. `deadline`: by the monotonic clock. `on_wait` is called each second of the body.

    Raises httpx2's errors, also at the deadline, and WrongAnswer for a larger body.
    """

    import httpx2

    now = time.monotonic()
    left_s = max(1.0, min(RESPONSE_S, deadline - now))
    timeout = httpx2.Timeout(left_s, connect=min(CONNECT_S, left_s))
    body = bytearray()
    with http.stream(method, url, timeout=timeout, **arguments) as response:
        for part in response.iter_bytes():
            if body and time.monotonic() > deadline:
                raise httpx2.ReadTimeout(f"sent {len(body):,} bytes, and not yet the whole response", request=response.request)
            body += part
            if len(body) > max_bytes:
                raise WrongAnswer(f"{url}: answers with more than {max_bytes:,} bytes")
            if time.monotonic() > now + 1:
                now = time.monotonic()
                on_wait()
    # Its body is decoded.
    headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() != "content-encoding"]
    return httpx2.Response(response.status_code, headers=headers, content=bytes(body), request=response.request)


def model_digest(model: str, server: str, response: httpx2.Response) -> str:
    """Return a digest of what `/v1/models` says of the model, such as its name and revision. Raises SetupError without it."""
    if response.status_code in (401, 403):
        raise SetupError(f"{server}: refuses the key: {_error_text(response)}; set `key_env`, and the variable that it names")
    if response.is_redirect:
        raise SetupError(f"{server}: redirects to {response.headers.get('location')}; write the server's own URL in `servers`")
    try:
        entries = {str(entry["id"]): entry for entry in response.json()["data"]}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SetupError(f"{server}/v1/models: got no list of models; is this a server with OpenAI's API?") from None
    if model not in entries:
        raise SetupError(f"{server}: has no model {model!r}, must be one of {', '.join(sorted(entries)) or 'none'}")
    stable = {name: value for name, value in entries[model].items() if name not in VOLATILE}
    return hashlib.sha256(json.dumps(stable, sort_keys=True).encode()).hexdigest()[:16]


class VideoServers:
    """Requests to one server of several with the same model. Thread-safe. Stored jobs of the others are polled there."""

    def __init__(
        self,
        model: str,
        reported: str,
        servers: Sequence[str],
        headers: Mapping[str, str],
        timeout_s: float,
        on_progress: Callable[[int], None],
    ) -> None:
        """`reported`: see `model_digest`. `servers`: its own first. `timeout_s`: of a call. `on_progress` gets percents, and
        may raise Cancelled."""

        import httpx2

        self._model, self._reported = model, reported
        self._server, *self._others = servers
        self._timeout_s = timeout_s
        self._on_progress = on_progress
        # Each caller has a connection of its own.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self._http = httpx2.Client(headers=dict(headers), limits=limits)
        self._finding = threading.Lock()
        self._is_verified = False
        """The server has the model, and has responded to all requests since."""
        self._clocks: dict[str, float] = {}
        """Server -> its time in seconds since 1970, by its own clock, when the monotonic clock of this process is 0."""

    def close(self) -> None:
        self._http.close()

    def clip(
        self,
        key: str,
        fields: Mapping[str, str],
        image: bytes | None,
        store: JobRecords,
        check: Callable[[bytes, bool], _T],
        max_bytes: int = MAX_JSON_BYTES,
    ) -> tuple[_T, int]:
        """Return `check(content of the clip, job.found)` of the job with this key, and the number of its submission.

        A job that is stored is asked for, others are submitted first. `image`: PNG. `check` raises WrongAnswer for a clip that
        cannot be that of the job, as one of more than `max_bytes` is. Raises StageError if the server refuses the request,
        OtherWeights for another model, and ServerFailed.
        """
        deadline = time.monotonic() + self._timeout_s
        for _ in range(SUBMITS):
            job = self._stored(key, store)
            try:
                self._verify(deadline)
                job = self._accepted(job, fields, image, store, deadline)
                return self._result(job, fields, store, check, max_bytes, deadline), job.submits
            except _JobEnded as ended:
                self._end(job, store, is_known=True)
                # A job of another server says nothing about the own one, to which it is submitted next.
                if ended.error is not None and job.server == self._server:
                    raise ended.error from None
            except TimeoutError as error:
                self._end(job, store, is_known=False)
                raise self._too_late(error) from None
            except (Cancelled, KeyboardInterrupt):
                self._end(job, store, is_known=False)
                raise
        raise ServerFailed(f"{self._server}: lost the job after each of {SUBMITS} submissions")

    def image(self, key: str, body: Mapping[str, Any], max_bytes: int) -> str:
        """Return an image in base64, in a response of at most `max_bytes`. Raises as `clip`."""
        return self._answer(_Images, "/v1/images/generations", key, body, max_bytes).data[0].b64_json

    def chat(self, key: str, body: Mapping[str, Any]) -> ChatAnswer:
        """Return the answer of a chat. Raises as `clip`."""
        return self._answer(ChatAnswer, "/v1/chat/completions", key, body, MAX_JSON_BYTES)

    def _answer(self, model: type[_M], path: str, key: str, body: Mapping[str, Any], max_bytes: int) -> _M:
        """Return the parsed response to a request. A request without a response is repeated, with the same key."""
        deadline = time.monotonic() + self._timeout_s
        try:
            self._verify(deadline)
            for number in range(SUBMITS):
                try:
                    arguments = {"json": dict(body), "headers": {"Idempotency-Key": key}}
                    return _parsed(model, self._post(path, deadline, max_bytes=max_bytes, **arguments))
                except _Unanswered as error:
                    problem = error
                self._sleep(REQUEST_RETRY_S[0] * 2**number, deadline)
        except TimeoutError as error:
            raise self._too_late(error) from None
        raise ServerFailed(f"{self._server}: no response to {SUBMITS} requests: {problem}")

    def _too_late(self, error: TimeoutError) -> ServerFailed:
        reason = f": {error}" if str(error) else ""
        return ServerFailed(f"{self._server}: took longer than {self._timeout_s:.0f} s{reason}")

    def _verify(self, deadline: float) -> None:
        """Raise OtherWeights if the server has another model than at planning, such as after a restart."""
        if not self._is_verified:
            response = self._request("GET", self._server, "/v1/models", deadline)
            if (found := model_digest(self._model, self._server, response)) != self._reported:
                raise OtherWeights(f"{self._server}: describes {self._model} as {found}, must be as planned: {self._reported}")
            self._is_verified = True

    # Submission

    def _stored(self, key: str, store: JobRecords) -> RemoteJob:
        content = store.get(key)
        return RemoteJob.model_validate_json(content) if content else RemoteJob(key=key, server="", submits=0, ended=True)

    def _accepted(
        self, job: RemoteJob, fields: Mapping[str, str], image: bytes | None, store: JobRecords, deadline: float
    ) -> RemoteJob:
        """Return a job that a server has accepted, with its id: the stored one, or a new one."""
        if job.ended or job.server not in (self._server, *self._others):
            job = self._put(RemoteJob(key=job.key, server=self._server, since=self._now(), submits=job.submits + 1), store)
        elif job.id is None:
            try:
                job = self._find(job, fields, store, deadline)
            except WrongAnswer:
                if job.server == self._server:
                    raise
        files = {"input_reference": ("image.png", image, "image/png")} if image is not None else None
        headers = {"Idempotency-Key": f"{job.key}-{job.submits}"}
        for attempt in range(SUBMITS):
            if job.id is not None:
                return job
            if job.server != self._server:
                job = self._put(job.model_copy(update={"server": self._server, "since": self._now()}), store)
            try:
                accepted = _parsed(_Job, self._post("/v1/videos", deadline, data=dict(fields), files=files, headers=headers))
                job = self._put(job.model_copy(update={"id": accepted.id}), store)
            except (_Unanswered, WrongAnswer) as error:
                problem = error
                self._sleep(REQUEST_RETRY_S[0] * 2**attempt, deadline)
                job = self._find(job, fields, store, deadline)
        if job.id is None:
            raise ServerFailed(f"{self._server}: no response to {SUBMITS} submissions: {problem}")
        return job

    def _now(self) -> float:
        """Return the time of the own server, see `RemoteJob.since`."""
        clock = self._clocks.get(self._server)
        return 0.0 if clock is None else clock + time.monotonic()

    def _post(self, path: str, deadline: float, **arguments: Any) -> httpx2.Response:
        response = self._request("POST", self._server, path, deadline, **arguments)
        if response.status_code == 404:
            raise StageError(f"{self._server}{path}: {_error_text(response)}")
        return response

    def _find(self, job: RemoteJob, fields: Mapping[str, str], store: JobRecords, deadline: float) -> RemoteJob:
        """Return the job, with its id if the list of jobs has exactly one that can be it."""
        if not job.since:
            return job
        with self._finding:
            query = {"limit": _LISTED, "order": "desc"}
            listed = self._request("GET", job.server, "/v1/videos", deadline, params=query)
            ids = [
                entry.id
                for entry in (_parsed(_Jobs, listed).data if listed.status_code != 404 else [])
                if entry.created_at >= int(job.since)
                and entry.status in (*UNFINISHED, "completed")
                and all(getattr(entry, name) in (None, fields[name]) for name in ("prompt", "size"))
                and _owner(job.server, entry.id, store) in (None, job.key)
            ]
            return self._put(job.model_copy(update={"id": ids[0], "found": True}), store) if len(ids) == 1 else job

    def _put(self, job: RemoteJob, store: JobRecords) -> RemoteJob:
        record = job.model_dump_json().encode()
        if job.id is not None:
            store[_claim(job.server, job.id)] = record
        store[job.key] = record
        return job

    def _end(self, job: RemoteJob, store: JobRecords, *, is_known: bool) -> None:
        """Record that a job has ended. If the server does not know that yet, it is deleted there."""

        import httpx2

        if not job.ended and not is_known and job.id is not None and _owner(job.server, job.id, store) == job.key:
            with suppress(httpx2.HTTPError):
                self._http.delete(f"{job.server}/v1/videos/{job.id}", timeout=CONNECT_S)
        if not job.ended and (is_known or job.id is not None):
            store[job.key] = job.model_copy(update={"ended": True}).model_dump_json().encode()

    # Result

    def _result(
        self,
        job: RemoteJob,
        fields: Mapping[str, str],
        store: JobRecords,
        check: Callable[[bytes, bool], _T],
        max_bytes: int,
        deadline: float,
    ) -> _T:
        """Wait for a job and return its checked clip. Raises _JobEnded, TimeoutError and ServerFailed."""
        for attempt in range(ANSWERS):
            try:
                self._wait_for(job, fields, deadline)
                path = f"/v1/videos/{job.id}/content"
                content = self._request("GET", job.server, path, deadline, max_bytes=max_bytes)
                if content.status_code == 404:
                    raise WrongAnswer(f"{job.server}: the job {job.id} is completed, but has no content")
                if job.found and _owner(job.server, str(job.id), store) != job.key:
                    # It was submitted by a step whose response came later than the list of jobs.
                    raise _JobEnded
                return check(content.content, job.found)
            except WrongAnswer as error:
                problem = error if str(error).startswith(job.server) else WrongAnswer(f"{job.server}: {error}")
                self._sleep(REQUEST_RETRY_S[0] * 2**attempt, deadline)
        raise _JobEnded(problem)

    def _wait_for(self, job: RemoteJob, fields: Mapping[str, str], deadline: float) -> None:
        started = time.monotonic()
        while True:
            response = self._request("GET", job.server, f"/v1/videos/{job.id}", deadline)
            if response.status_code == 404:
                raise _JobEnded
            state = _parsed(_Job, response)
            if state.id != job.id or state.prompt not in (None, fields["prompt"]):
                raise WrongAnswer(f"{job.server}: answered with another job than {job.id}")
            if state.status == "completed":
                return
            if state.status not in UNFINISHED:
                why = _message_of(state.error) or f"its status is {state.status!r}"
                raise _JobEnded(ServerFailed(f"{job.server}: the job {job.id} failed: {why}"))
            pause_s = _POLL_SHARE * (time.monotonic() - started)
            percent = int(state.progress) if isinstance(state.progress, int | float) and 0 <= state.progress <= 100 else 0
            self._sleep(min(STATUS_POLL_S[1], max(STATUS_POLL_S[0], pause_s)), deadline, percent)

    # Requests

    def _request(
        self, method: str, server: str, path: str, deadline: float, max_bytes: int | None = None, **arguments: Any
    ) -> httpx2.Response:
        """Return a response of success, or of 404. Failures of the network and of the server are retried.

        Raises _Unanswered instead for a POST that the server may have carried out, StageError if the server refuses it,
        ServerFailed if the server does not respond while another one does, or with more than `max_bytes` (default:
        MAX_JSON_BYTES), and TimeoutError at the deadline.
        """

        import httpx2

        failing_since: float | None = None
        # A redirected POST would become a GET.
        arguments["follow_redirects"] = method == "GET"
        for pause_s in _pauses():
            try:
                # A clip may take as long as the call. All other responses are small.
                until = deadline if path.endswith("/content") else min(deadline, time.monotonic() + RESPONSE_S)
                url, on_wait = f"{server}{path}", partial(self._on_progress, 0)
                response = _fetch(self._http, method, url, until, max_bytes or MAX_JSON_BYTES, on_wait, **arguments)
            except httpx2.RequestError as error:
                problem = f"{type(error).__name__}: {error}"
                self._is_verified = False
                if method == "POST" and not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
                    raise _Unanswered(problem) from None
            else:
                status = response.status_code
                problem = f"{status}: {_error_text(response)}"
                with suppress(KeyError, ValueError):
                    date = parsedate_to_datetime(response.headers["date"])
                    self._clocks[server] = date.timestamp() - time.monotonic()
                if response.is_success or status == 404:
                    return response
                if status == 429 or (status == 503 and "retry-after" in response.headers):
                    failing_since = None
                    self._sleep(_retry_after_s(response, pause_s), deadline, problem=problem)
                    continue
                if status < 500 and status != 408:
                    raise StageError(f"{server}{path}: {problem}")
                if method == "POST" and status != 503:
                    raise _Unanswered(problem)
            failing_since = failing_since or time.monotonic()
            others = [other for other in (self._server, *self._others) if other != server]
            if time.monotonic() - failing_since > PATIENCE_S and any(map(self._responds, others)):
                # A job of another server is submitted to the own one.
                raise ServerFailed(f"{server}{path}: {problem}") if server == self._server else _JobEnded
            self._sleep(pause_s, deadline, problem=problem)
        raise AssertionError("pauses do not end")

    def _responds(self, server: str) -> bool:
        import httpx2

        try:
            response = _fetch(self._http, "GET", f"{server}/v1/models", time.monotonic() + CONNECT_S, MAX_JSON_BYTES)
        except (httpx2.RequestError, WrongAnswer):
            return False
        return response.status_code < 500

    def _sleep(self, seconds: float, deadline: float, percent: int = 0, problem: str = "") -> None:
        """Sleep in short pieces, so that a cancelled call ends soon. Raises Cancelled, and TimeoutError at the deadline.

        `problem`: why it waits.
        """
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until:
            if now > deadline:
                raise TimeoutError(problem)
            self._on_progress(percent)
            time.sleep(min(until - now, 1.0))


def _claim(server: str, job_id: str) -> str:
    """Return the name of the record that tells to which step a job belongs."""
    return hashlib.sha256(f"{server} {job_id}".encode()).hexdigest()


def _owner(server: str, job_id: str, store: JobRecords) -> str | None:
    """Return the key of the step to which a job belongs. `None` if no step has it."""
    content = store.get(_claim(server, job_id))
    return RemoteJob.model_validate_json(content).key if content else None


def _pauses() -> Iterator[float]:
    pause_s = REQUEST_RETRY_S[0]
    while True:
        yield pause_s
        pause_s = min(REQUEST_RETRY_S[1], 2 * pause_s)


def _retry_after_s(response: httpx2.Response, default: float) -> float:
    with suppress(KeyError, ValueError):
        return min(MAX_RETRY_AFTER_S, max(REQUEST_RETRY_S[0], float(response.headers["retry-after"])))
    return default


def _parsed(model: type[_M], response: httpx2.Response) -> _M:
    try:
        return model.model_validate_json(response.content)
    except ValidationError:
        raise WrongAnswer(f"{response.url}: got {shortened_value(response.text)}, must be JSON as of OpenAI's API") from None


def _error_text(response: httpx2.Response) -> str:
    """Return the message of an error as OpenAI's API has it, or the beginning of another body."""
    if response.is_success:
        return ""
    with suppress(ValueError, AttributeError):
        content = response.json()
        return _message_of(content.get("error") or content.get("detail") or content)
    return response.text[:300]


def _message_of(error: Any) -> str:
    message = error.get("message") if isinstance(error, dict) else None
    return str(message or error or "")[:300]
