"""Errors that decide about retries, shared by the batch and the online executor."""

from vidgen_ray.outputs.records import Failure

ATTEMPTS = 3
"""Attempts per call before the shot has failed. The first one counts."""


class ShotFailed(Exception):
    """The shot failed and is not retried."""

    def __init__(self, failure: Failure) -> None:
        self.failure = failure
        super().__init__(failure)


class InputsLost(Exception):
    """The inputs of a call were lost with the process or node that held them."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error message. Ray appends many lines of ids."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
