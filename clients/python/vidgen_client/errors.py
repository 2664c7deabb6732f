"""Errors of the client. All are `ClientError`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from vidgen_client.models import Video


class ClientError(Exception):
    """Base class of all errors of the client."""


class ConnectionFailed(ClientError):
    """The server could not be reached, or the connection was lost."""


@dataclass(eq=False)
class ApiError(ClientError):
    """The server answered with an error."""

    message: str
    """Explanation by the server. Names the field and what is allowed."""
    _: KW_ONLY
    status: int
    """HTTP status."""
    code: str | None = None
    """Stable code, for example `invalid_value`. `None` if the answer is not from vidgen-ray, for example from a proxy."""
    param: str | None = None
    """Field of the request that caused the error."""
    retry_after_s: float | None = None
    """Delay in seconds that the server asks for before the next attempt."""
    retryable: bool = False
    """True if the same request may succeed later."""

    def __str__(self) -> str:
        return f"{self.message} (HTTP {self.status}{f', {self.code}' if self.code else ''})"


class JobFailed(ClientError):
    """The job of a video failed. `video.error` says why."""

    def __init__(self, video: Video) -> None:
        error = video.error
        super().__init__(f"{video.id} {video.status}" + (f": {error.message}" if error else ""))
        self.video = video
        self.code = error.code if error else None
        """Stable code, for example `stage_failed`."""
        self.param = error.param if error else None
        """Field of the request that caused the error."""


class JobCancelled(JobFailed):
    """The job of a video was cancelled."""


class WaitTimeout(ClientError):
    """The job did not end within the time limit. It continues on the server."""

    def __init__(self, video: Video, timeout_s: float) -> None:
        super().__init__(f"{video.id} is {video.status} after {timeout_s:g} s. Its job continues; wait for it again.")
        self.video = video
